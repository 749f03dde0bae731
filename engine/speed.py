"""How fast a model answers: the wait for the first new token, and the pace of those that follow.

Time to first token (TTFT) is reading the prompt and choosing one token; the pace is that of decoding alone. Both are
medians over fresh runs, because whatever else the machine does only ever adds time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from engine.caches import Cache
from engine.caches.recompute import Recompute
from engine.generate import generate
from engine.model import Decoder
from engine.recording import site, tap

FIRST = site("speed.first", "time to the first new token, of each run", symbol="TTFT", low=0.0, unit="s")
PACE = site("speed.pace", "new tokens a second after the first, of each run", low=0.0, unit="tokens/s")


@dataclass(frozen=True)
class Speed:
    """Medians over the runs, whose own figures are kept."""

    firsts: tuple[float, ...]  # seconds
    paces: tuple[float, ...]  # tokens a second

    @property
    def first(self) -> float:
        return median(self.firsts)

    @property
    def pace(self) -> float:
        return median(self.paces)


def speed(
    model: Decoder,
    ids: Tensor | Sequence[int],
    *,
    steps: int,
    cache: Callable[[], Cache | Recompute] | None = None,
    repeats: int = 5,
    warm: int = 1,
) -> Speed:
    """Continue the prompt `ids` greedily by `steps` tokens, `warm` + `repeats` times, each with a new cache.

    `cache` makes it; None recomputes the whole text for every token.
    """
    if steps < 2:
        raise ValueError(f"steps must be 2 or more, for a pace after the first token, not {steps}")
    if repeats < 1 or warm < 0:
        raise ValueError(f"repeats must be 1 or more and warm 0 or more, not {repeats} and {warm}")
    firsts, paces = [], []
    for at in range(warm + repeats):
        memory = None if cache is None else cache()
        began = time.perf_counter()
        said = generate(model, ids, steps=steps, cache=memory)
        next(said)  # a token is a plain number: the device has finished when it is there
        first = time.perf_counter()
        for _ in said:
            pass
        last = time.perf_counter()
        if at >= warm:
            firsts.append(tap(FIRST, first - began, ""))
            paces.append(tap(PACE, (steps - 1) / (last - first), ""))
    return Speed(tuple(firsts), tuple(paces))
