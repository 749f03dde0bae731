"""The patterns that lesson windows compares: which cells each leaves open, what a cache must hold for it, and the
arithmetic behind one cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.mixers.hybrid import Mixer, remixed
from engine.mixers.softmax import SoftmaxAttention
from engine.mixers.windows import WindowAttention, kept_positions, measured_reach, receptive_field, window_mask
from engine.recording import Recording, site
from lessons.views import Arithmetic, Calculator, Field

PATTERNS = {"Every cell": "full", "Window": "window", "Dilated": "dilated", "Local + global": "global",
            "Window, some layers full": "interleaved"}  # fmt: skip
EVERY_CELL, WINDOW, DILATED, GLOBAL, INTERLEAVED = PATTERNS.values()
STATES = ("empty", "kept", "sink", "recent", "evicted")
SINK, RECENT, EVICTED = 2, 3, 4

BENEATH = site("windows.beneath", "the share of attention that each head pays when every cell is open",
               symbol="softmax(q·k/√d)", grows="query", low=0.0, high=1.0)  # fmt: skip
OPEN = site("windows.open", "whether the mask leaves this cell open", grows="query", low=0.0, high=1.0)
FIELD = site("windows.field", "how strongly the last token's output hangs on each token, one layer deeper a row; the "
             "largest of a row is 1", symbol="‖∂y/∂x‖", grows="depth", low=0.0, high=1.0)  # fmt: skip
REACHED = site("windows.reached", "tokens from the last one back to the farthest that matters: measured by gradients")
FORMULA = site("windows.formula", "the same by the formula: (w − 1)·d more a layer, and 1")


def sizes(pattern: str, knobs: Any, layer: int) -> dict[str, int] | None:
    """The window of a layer under a pattern; None where it attends fully."""
    near = {"window": knobs.window}
    if pattern == EVERY_CELL or (pattern == INTERLEAVED and layer % knobs.every == knobs.every - 1):
        return None
    return near | {DILATED: {"dilation": knobs.dilation}, GLOBAL: {"global_tokens": knobs.pinned}}.get(pattern, {})


def mixer(pattern: str, knobs: Any, shape: Any) -> Mixer:
    def of_layer(layer: int) -> Any:
        size = sizes(pattern, knobs, layer)
        return SoftmaxAttention(shape, layer) if size is None else WindowAttention(shape, layer, **size)

    return of_layer


def mask_of(size: dict[str, int] | None, T: int) -> np.ndarray:
    return np.asarray(window_mask(T, **(size or {"window": T})), np.uint8)


def held_of(size: dict[str, int] | None, seen: int) -> np.ndarray:
    """What a layer's cache holds after so many tokens, token by token."""
    if size is None:
        return np.full(seen, RECENT, np.uint8)
    codes = np.full(seen, EVICTED, np.uint8)
    codes[np.asarray(kept_positions(seen, **size))] = RECENT
    codes[: size.get("global_tokens", 0)] = SINK
    return codes


def fields_of(model: Any, knobs: Any, ids: Any, top: int) -> tuple[np.ndarray, list[int], list[int]]:
    """Going down from the output of layer `top`: what matters, how far back by gradients, how far by the formula."""
    T = ids.shape[1]
    made = remixed(model, mixer(knobs.pattern, knobs, model.shape), layers=top + 1)
    gradients = np.asarray(measured_reach(made, ids).float().cpu())[::-1]  # depth token
    output = np.zeros((1, T), np.float32)
    output[0, -1] = 1
    rows = np.concatenate((output, gradients / np.maximum(gradients.max(1, keepdims=True), 1e-30)))
    pinned = knobs.pinned if knobs.pattern == GLOBAL else 0
    measured = [T - int(np.flatnonzero(row[pinned:])[0]) - pinned if row[pinned:].any() else 0 for row in rows]
    formula = [1]
    for layer in range(top, -1, -1):
        size = sizes(knobs.pattern, knobs, layer)
        more = T if size is None else receptive_field(1, window=size["window"], dilation=size.get("dilation", 1)) - 1
        formula.append(min(T - pinned, formula[-1] + more))
    return rows, measured, formula


def matrix_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """What a cell gets of a head's attention with every cell open, and what the mask makes of it."""
    i, j = at["query"], at["key"]
    if not 0 <= j <= i < recording.meta["tokens"]:
        raise ValueError(f"token {i} cannot look at token {j}, which comes later")
    layers, heads = recording.meta["model"]["layers"], recording.meta["model"]["heads"]
    layer, head = min(knobs.layer, layers - 1), min(knobs.head, heads - 1)
    share = recording.track(BENEATH, layer=layer).chunks[i].array[head, 0].astype(np.float64)
    mask = recording.track(OPEN, layer=layer).chunks[i].array[0].astype(bool)
    kept = float(share[mask].sum())
    after = share[j] / kept if mask[j] and kept else 0.0
    size = sizes(knobs.pattern, knobs, layer)
    rule = f"{i - j} < {size['window'] * size.get('dilation', 1)}?" if size else "a full layer: open"
    return Arithmetic(
        title=f"layer {layer}, head {head}: token {i} looks at token {j}",
        lines=(
            (f"i − j = {i} − {j}", f"{i - j} tokens back"),
            (rule, "open" if mask[j] else "left out, score −∞"),
            ("share with every cell open", f"{share[j]:.4f}"),
            (f"all {int(mask.sum())} open cells together", f"{kept:.4f}"),
            ("share through the mask", f"{after:.4f}"),
        ),
        note=f"{1 - kept:.0%} of this token’s attention in this head lay on cells that the mask leaves out.",
        vectors=(
            ("every cell open", tuple(share.tolist())),
            ("masked", tuple(np.where(mask, share / max(kept, 1e-30), 0).tolist())),
        ),
        values={"share": float(share[j]), "kept": kept, "after": after},
    )


def field_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """How far back a row of the receptive field goes: each layer adds (w − 1)·d."""
    depth, token = at["depth"], at["token"]
    row = recording.stack(FIELD)[depth]
    back = recording.meta["tokens"] - 1 - token
    reached = recording.stack(REACHED)[: depth + 1]
    lines = tuple((f"through {d} layers", f"{int(n)} tokens") for d, n in enumerate(reached))
    return Arithmetic(
        title=f"{depth} layers below the output: token {token}, {back} back",
        lines=(*lines, ("by the formula", f"{int(recording.stack(FORMULA)[depth])} tokens"),
               ("this token, of the row’s strongest", f"{row[token]:.2g}")),
        note="An exact 0: no path through the windows leads there." if not row[token] else "Not 0: it matters.",
        vectors=(("the row", tuple(row.tolist())),),
        values={"strength": float(row[token]), "back": float(back)},
    )  # fmt: skip


def sums(values: Mapping[str, float]) -> Arithmetic:
    """What windows save at any size, by the formulas."""
    n, w, L, every = (int(values[name]) for name in ("n", "w", "L", "every"))
    if w > n:
        raise ValueError(f"Window must be at most the text of {n:,} tokens, not {w:,}")
    whole, near = n * (n + 1) // 2, w * (w + 1) // 2 + (n - w) * w
    fulls = L // every
    kept = (fulls * n + (L - fulls) * min(n, w - 1)) / (L * n)
    return Arithmetic(
        title="windows by the formulas",
        lines=(
            ("cells of n²", f"{n * n:,}"),
            ("n² / (n·w)", f"{n / w:.2f}×"),
            ("causal cells, all and in windows", f"{whole:,} and {near:,}"),
            ("fewer, cell by cell", f"{whole / near:.2f}×"),
            ("reach, L·(w − 1) + 1", f"{receptive_field(L, window=w):,} tokens"),
            (f"cache with {fulls} of {L} layers full", f"{kept:.1%} of all"),
        ),
    )


# fmt: off
CALCULATOR = Calculator(
    name="sums", title="At any size", span=5, compute=sums,
    fields=(
        Field("n", "Text", 131_072, 2, 10_000_000, "tokens"),
        Field("w", "Window", 4096, 1, 10_000_000, "tokens"),
        Field("L", "Layers", 32, 1, 200), Field("every", "Full layer every", 2, 1, 200),
    ),
    presets=(
        ("The source’s example", {"n": 512, "w": 128, "L": 1, "every": 2}),
        ("Mistral 7B v0.1: windows only", {"n": 32768, "w": 4096, "L": 32, "every": 33}),
        ("Gemma 2 9B: every second full", {"n": 8192, "w": 4096, "L": 42, "every": 2}),
        ("Gemma 3 27B: one in six full", {"n": 131_072, "w": 1024, "L": 62, "every": 6}),
    ),
)
# fmt: on
