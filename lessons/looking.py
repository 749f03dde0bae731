"""How the heads of a model look at a text: who reads which key head, where each looks, how alike, at what price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.generate import generate
from engine.recording import Recording, record, site, tap
from lessons.arithmetic import look
from lessons.sharing import BYTES, weigh
from lessons.views import Arithmetic, Footprint, Heatmaps, Holding, Routes, knob, of

WIRES = site("heads.wires", "the key head that each query head reads")
GROUPS = site("heads.groups", "how many key heads there are")
GRAIN = site("heads.grain", "what one key head leaves of a token in one layer", unit="B")
PATTERN = site("heads.pattern", "the share of attention that a query pays to a key", symbol="softmax(q·k/√d)",
               low=0.0, high=1.0)  # fmt: skip
ASKED = site("heads.q", "what each token asks", symbol="q")
OFFERED = site("heads.k", "what each token offers", symbol="k")
OVERLAP = site("heads.overlap", "how much of their attention two heads pay to the same tokens", low=0.0, high=1.0)
FIRST_LOOKS = 8  # queries with fewer keys than this overlap anyway


def observe(model: Any, ids: Sequence[int]) -> None:
    """Wiring, attention and cache of one model that reads `ids`."""
    H, G = model.shape.heads, model.shape.kv_heads
    with record(keep={"attention.pattern": {}, "attention.q": {}, "attention.k": {}}) as seen:
        list(generate(model, ids, steps=1))
    got = {(t.name, t.index["layer"]): t.stack()[0] for t in seen.tracks.values()}
    for layer in range(model.shape.layers):
        pattern = tap(PATTERN, got["attention.pattern", layer], "head query key", layer=layer)
        tap(ASKED, got["attention.q", layer], "head query width", layer=layer)
        tap(OFFERED, got["attention.k", layer], "group key width", layer=layer)
        late = pattern[:, FIRST_LOOKS:]
        both = np.minimum(late[:, None], late[None]).sum(-1).mean(-1)
        tap(OVERLAP, both.astype(np.float32), "head other", layer=layer)
    kept = weigh("now", model, ids)
    tap(WIRES, np.arange(H, dtype=np.int32) // (H // G), "head")
    tap(GROUPS, G, "")
    tap(GRAIN, float(kept[0] / G), "")


def overlaps(recording: Recording) -> tuple[float, float]:
    """How alike heads look that share a key head, and those that do not: where there are both, the last such model."""
    found = (math.nan, math.nan)
    for at, wires in recording.track(WIRES).rows():
        same = wires[:, None] == wires[None]
        np.fill_diagonal(own := np.zeros_like(same), True)
        tracks = [t.latest(at) for t in recording.tracks if t.name == OVERLAP]
        if (same & ~own).any() and (~same).any():
            found = tuple(float(np.mean([t[pairs].mean() for t in tracks])) for pairs in (same & ~own, ~same))  # type: ignore[assignment]
    return found


def look_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """One share of attention, of the model whose picture is on the stage."""
    layers = [int(t.index["layer"]) for t in recording.tracks if t.name == ASKED]
    layer = min(layers, key=lambda have: abs(have - knobs.layer))
    q, k = (recording.track(name, layer=layer).latest(at.get("step")) for name in (ASKED, OFFERED))
    return look(q, k, at, layer=layer)


# fmt: off
LOOKS = (
    Footprint(
        name="strip", title="What one more token costs",
        holdings=(Holding("The cache", of(BYTES, design="now"), "keys and values, layer by layer"),),
        grain=of(GRAIN),
    ),
    Routes(
        name="wires", title="Who reads which notebook", span=4, tensor=of(WIRES), left="query head",
        right="key head", count=of(GROUPS),
    ),
    Heatmaps(
        name="looks", title="Where each query head looks", span=8, tensor=of(PATTERN, layer=knob("layer")),
        rows="query", columns="key", facet="head", focus=knob("head"), colours="attention",
        row_labels="tokens", column_labels="tokens", cell=look_cell,
    ),
    Heatmaps(
        name="overlap", title="How alike they look", span=4, tensor=of(OVERLAP, layer=knob("layer")),
        rows="head", columns="other", colours="recent", gaps=True,
    ),
)
# fmt: on
