"""One cell, one click deep: the sum behind a number on the page, with this run's values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.recording import Recording
from lessons.views import Arithmetic

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def sub(number: int) -> str:
    """12 as ₁₂."""
    return str(number).translate(_SUBSCRIPTS)


def attention_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """The share that query i of a head pays to key j: dot product, scale, softmax, from the recorded q and k.

    `at` has query, key and head; the layer is the knob's. Adjacent query heads share a key head.
    """
    layer = nearest(recording, "attention.q", knobs.layer)
    q_all = recording.stack("attention.q", layer=layer)[0]  # H T W
    k_all = recording.stack("attention.k", layer=layer)[0]  # H_kv T W
    return look(q_all, k_all, at, layer=layer)


def look(q_all: np.ndarray, k_all: np.ndarray, at: Mapping[str, int], *, layer: int) -> Arithmetic:
    """The same from queries [H, T, W] and keys [H_kv, T, W], wherever they were kept."""
    i, j, head = at["query"], at["key"], at["head"]
    if not (0 <= j <= i < q_all.shape[1] and 0 <= head < q_all.shape[0]):
        raise ValueError(f"query {i} cannot look at key {j}: it has not been written yet")
    kv_head = head // (q_all.shape[0] // k_all.shape[0])
    q, keys = q_all[head, i].astype(np.float64), k_all[kv_head, : i + 1].astype(np.float64)
    k = keys[j]
    width = len(q)
    scores = keys @ q / math.sqrt(width)
    total = np.exp(scores - scores.max()).sum()
    top = math.exp(scores[j] - scores.max())
    share = top / total
    return Arithmetic(
        title=f"layer {layer}, head {head}: token {i} looks at token {j}",
        lines=(
            (f"q{sub(i)} · k{sub(j)}", f"{q @ k:.2f}"),
            (f"÷ √{width}", f"{scores[j]:.2f}"),
            (f"exp(… − {scores.max():.2f})", f"{top:.4f}"),
            (f"÷ {total:.3f}, the sum over {i + 1} keys", f"{share:.4f}"),
        ),
        note="A dot product, not a cosine: the lengths of q and k count."
        + (f" Key/value head {kv_head} serves this head." if len(k_all) < len(q_all) else ""),
        vectors=(
            (f"q{sub(i)}", tuple(q.tolist())),
            (f"k{sub(j)}", tuple(k.tolist())),
            ("q × k", tuple((q * k).tolist())),
        ),
        values={"dot": float(q @ k), "score": float(scores[j]), "share": float(share)},
    )


def nearest(recording: Recording, name: str, layer: int) -> int:
    """The recorded layer closest to the one asked for: a toy has fewer layers than the knob allows."""
    layers = [int(t.index["layer"]) for t in recording.tracks if t.name == name and "layer" in t.index]
    if not layers:
        raise ValueError(f"{name} was not recorded in this run")
    return min(layers, key=lambda have: abs(have - layer))
