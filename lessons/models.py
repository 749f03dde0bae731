"""The models that lessons run on: how they are chosen, and what a recording says of the one that ran."""

from __future__ import annotations

from typing import Any

import param

from engine import checkpoints, hardware
from engine.recording import event, note

REAL, TOY = "smollm2", "toy"
LABELS = {"SmolLM2-135M": REAL, "Toyland": TOY}


def choice(*, default: str = REAL) -> param.Selector:
    """The knob `model`: the real one or the toy. Pages draw it in the title line."""
    return param.Selector(default=default, objects=dict(LABELS), label="Model", doc="A real model, or a toy one.")


def load(name: str, *, fast: bool = False, dtype: str = "", device: str = "") -> tuple[Any, Any]:
    """The model and its tokenizer; notes in the recording which one it is.

    `fast` lets a real model run in bfloat16 where that is quick: for long readings, whose figures differ by less
    than one in a hundred. `dtype` (one of `checkpoints.DTYPES`) and `device` say otherwise where they are given.
    """
    kind = hardware.fast_dtype() if fast and name == REAL else None
    model, tokenizer = checkpoints.load(name, dtype=checkpoints.DTYPES.get(dtype, kind), device=device or None)
    introduce(name, model)
    return model, tokenizer


def introduce(name: str, model: Any) -> None:
    """Note in the recording which model runs."""
    shape = model.shape
    note(
        model={
            "name": next((label for label, value in LABELS.items() if value == name), name),
            "kind": "real" if name == REAL else "toy",
            "layers": shape.layers,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "width": shape.width,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": str(next(model.parameters()).device),
        }
    )


def name_ids(tokenizer: Any, ids: Any) -> None:
    """Tell the page how these token ids read, for views that show ids."""
    ids = sorted({int(i) for i in ids.reshape(-1)})
    event("text.words", words=dict(zip(map(str, ids), tokenizer.pieces(ids), strict=True)))


def read_aloud(pieces: list[str]) -> None:
    """Tell the page how tokens read, in order: those already told come before."""
    for piece in pieces:
        event("text.token", piece=piece)
