"""What the lesson `heavy_hitters` watches: six caches in lockstep, token by token, and the same at other budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.caches import Cache
from engine.caches.full import Full
from engine.caches.heavy_hitters import HeavyHitters
from engine.caches.norm import LowNorm
from engine.caches.selected import Selected
from engine.caches.sinks import Sinks
from engine.caches.window import Window
from engine.recording import Recording, newest, site, tap

STATES = ("empty", "kept", "sink", "recent", "heavy", "evicted")
_, KEPT, SINK, RECENT, HEAVY, EVICTED = range(6)
CODES = site("hitters.codes", "what became of each token in each head: sink, recent, heavy, evicted")
HELD = site("hitters.held", "heads of the layer that still hold the token")
WORTH = site("hitters.worth", "attention that each kept token has gathered in its head", symbol="F_score")
MEAN_KL = site("hitters.kl", "how far the next word is from the full cache's, mean since tokens had to go",
               symbol="KL(full‖policy)", low=0.0, unit="nats")  # fmt: skip
SLOTS_USED = site("hitters.slots", "tokens that each head holds, one number for each policy")
KEY_HELD = site("hitters.key", "share of the pass key's tokens that heads still hold", low=0.0, high=1.0)
ALIKE = site("hitters.alike", "new words that a policy says as the full cache does, before it says another one")
SWEEP = site("hitters.sweep", "mean KL to the full cache, budget by budget", low=0.0, unit="nats")
BUDGETS = site("hitters.budgets", "slots of each head")
PINNED = 4
LABELS = {
    "full": "Keep everything", "window": "Sliding window", "sinks": "Sinks + window", "h2o": "H2O: heavy hitters",
    "normalised": "H2O, mean attention", "norm": "Short keys",
}  # fmt: skip
SHORT = ("all", "window", "sinks", "H2O", "H2O mean", "short")
SWEPT = ("window", "sinks", "h2o", "norm")
SCORED = ("h2o", "normalised")


def recent_of(budget: int, share: float) -> int:
    """Of the budget, the slots for the last tokens."""
    return max(1, min(budget - 1, round(budget * share)))


def caches(budget: int, share: float) -> dict[str, Cache]:
    """Every policy with `budget` slots, of which those that watch spend a share on the last tokens."""
    recent = recent_of(budget, share)
    chosen = budget - recent
    return {
        "full": Full(), "window": Window(budget), "sinks": Sinks(PINNED, budget - PINNED),
        "h2o": HeavyHitters(chosen, recent=recent), "normalised": HeavyHitters(chosen, recent=recent, normalised=True),
        "norm": LowNorm(chosen, recent=recent),
    }  # fmt: skip


def show(name: str, cache: Cache, t: int, shape: Any, recent: int) -> np.ndarray:
    """Tap what became of tokens 0 to t in every head; returns how many heads of each layer hold each token. Positions
    are those in the text. Caches that do not choose hold the same in all layers and heads: one is shown."""
    held = []
    for layer in range(shape.layers if isinstance(cache, Selected) else 1):
        kept = cache.kept(layer).numpy()
        kept = np.broadcast_to(kept, (shape.kv_heads, kept.shape[-1]))
        codes = np.full((shape.kv_heads, t + 1), EVICTED, np.uint8)
        why = {"h2o": HEAVY, "normalised": HEAVY, "norm": KEPT, "full": KEPT}.get(name, RECENT)
        states = np.full(t + 1, why, np.uint8)
        if isinstance(cache, Selected):
            states[max(0, t + 1 - recent) :] = RECENT
        elif name == "sinks":
            states[:PINNED] = SINK
        np.put_along_axis(codes, kept, states[kept], 1)
        tap(CODES, codes, "head token", strategy=name, layer=layer)
        held.append((codes != EVICTED).sum(0))
        if name in SCORED and isinstance(cache, Selected):
            positions, worth = (x[0].float().cpu().numpy() for x in cache.valued(layer))
            scores = np.zeros(codes.shape, np.float32)
            np.put_along_axis(scores, positions.astype(np.int64), worth, 1)
            tap(WORTH, scores, "head token", strategy=name, layer=layer)
    counts = np.broadcast_to(np.array(held, np.uint8), (shape.layers, t + 1))
    return tap(HELD, counts, "layer token", strategy=name)


def budgets_of(budget: int, tokens: int) -> tuple[int, int, int]:
    """Half the budget, the budget, twice the budget."""
    return max(8, budget // 2), budget, min(2 * budget, tokens - 4)


def swept(budgets: Sequence[int], share: float) -> dict[str, Cache]:
    """Some policies at the first and the last of the budgets, under names of their own."""
    return {
        f"{name} {size}": cache
        for size in (budgets[0], budgets[-1])
        for name, cache in caches(size, share).items()
        if name in SWEPT
    }


def show_sweep(t: int, budgets: Sequence[int], sums: dict[str, float]) -> None:
    """Tap the mean KL at each budget, from the first token on that has to go anywhere; adds to `sums`."""
    if t < budgets[0]:
        return
    for name in SWEPT:
        means = []
        for size in budgets:
            row = name if size == budgets[1] else f"{name} {size}"
            kl = newest("compare.kl", strategy=row)
            sums[row] = sums.get(row, 0.0) + (0.0 if kl is None else float(kl))
            means.append(sums[row] / (t - budgets[0] + 1))
        tap(SWEEP, np.array(means, np.float32), "budget", strategy=name)
    tap(BUDGETS, np.array(budgets, np.float32), "budget")


def survival(recording: Recording, name: str, at: int, step: int) -> float:
    """The share of all heads that still hold the token `at` when `step` is read."""
    held = recording.track(HELD, strategy=name).latest(step)[:, at]
    return float(held.mean() / recording.meta["kv_heads"])


def heavy_place(recording: Recording, name: str, step: int) -> float:
    """Where the heavy tokens lie in the text on average: 0 its start, 1 its end."""
    layers = range(recording.meta["layers"])
    places = [np.nonzero(recording.track(CODES, strategy=name, layer=i).latest(step) == HEAVY)[1] for i in layers]
    return float(np.concatenate(places).mean() / step)
