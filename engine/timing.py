"""How long work takes: a clock that waits for the device, and contenders that take turns.

Whatever else the machine does hits those alike that take turns; and since it only ever adds time, the shortest of
several tries tells most about the work itself, a median what one may expect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def now(where: torch.device | None = None) -> float:
    """Seconds on a clock, once `where` has done all that it was asked to."""
    if where is not None and where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter()


def in_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    where: torch.device | None = None,
    warm_up: int = 1,
    rotate: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each in every round, after `warm_up` rounds that do not count.

    With `rotate` another one begins each round: what a busy machine does has a rhythm, which always hits the same.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be above 0, not {rounds}")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(warm_up + rounds):
        first = i % len(names) if rotate and names else 0
        for name in names[first:] + names[:first]:
            began = now(where)
            contenders[name]()
            took = now(where) - began
            if i >= warm_up:
                times[name].append(took)
    return times
