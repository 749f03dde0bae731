"""How many tokens to guess: as many as pay, by what was accepted so far.

"Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192), section 3.5, chooses gamma for an alpha
and a cost c = time of a drafted token / time of a check; here both are measured on the way. The older rule of thumb of
Hugging Face's assisted generation is there too: two more after a draft that was all right, one less otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from engine.cost import speculation_speedup
from engine.recording import site, tap
from engine.speculate import Dice, Draft, Drafter, Verdict

LENGTH = site("speculate.length", "tokens that the drafter was asked for", symbol="γ", low=0.0)
ALPHA = site("speculate.alpha", "estimated chance that a guess is accepted", symbol="α", low=0.0, high=1.0)


class HasLength(Protocol):
    """A drafter whose `length` may be set: Chain, Lookup, Feature."""

    length: int

    def draft(self, text: Sequence[int], *, room: int, temperature: float, dice: Dice) -> Draft: ...
    def told(self, draft: Draft, verdict: Verdict, hidden: Tensor) -> None: ...


def best_length(alpha: float, cost: float, *, most: int) -> int:
    """The gamma from 1 to `most` with the largest expected speed-up."""
    if most < 1:
        raise ValueError(f"most must be a number of drafted tokens above 0, not {most}")
    return max(range(1, most + 1), key=lambda gamma: speculation_speedup(alpha, gamma, cost=cost))


class Adaptive(Drafter):
    """Sets the length of `inner` before each draft. `rule` is "expected" (section 3.5) or "steps" (two up, one down).

    `memory` is how much of the old estimate of alpha stays when a draft comes back. `cost` is c where it is known;
    None measures it: seconds of the drafter a token, and the rest of a round as the time of the check.
    """

    def __init__(
        self,
        inner: HasLength,
        *,
        most: int = 8,
        rule: str = "expected",
        memory: float = 0.8,
        alpha: float = 0.6,
        cost: float | None = None,
    ) -> None:
        if rule not in ("expected", "steps"):
            raise ValueError(f"rule must be expected or steps, not {rule!r}")
        if most < 1:
            raise ValueError(f"most must be a number of drafted tokens above 0, not {most}")
        if not 0.0 <= memory < 1.0 or not 0.0 <= alpha <= 1.0 or (cost is not None and cost < 0.0):
            raise ValueError(
                f"memory must lie in [0, 1), alpha in [0, 1] and cost from 0 on: not {memory}, {alpha}, {cost}"
            )
        self.inner, self.most, self.rule, self.memory, self.alpha = inner, most, rule, memory, alpha
        self.cost = cost
        self._measures = cost is None
        self._left = 0.0  # when the last draft was handed over
        self._draft_seconds = 0.0  # a drafted token
        inner.length = min(inner.length, most)

    def draft(self, text: Sequence[int], *, room: int, temperature: float, dice: Dice) -> Draft:
        if self.rule == "expected" and self.cost is not None:
            self.inner.length = best_length(self.alpha, self.cost, most=self.most)
        tap(LENGTH, self.inner.length, "")
        tap(ALPHA, self.alpha, "")
        start = time.perf_counter()
        draft = self.inner.draft(text, room=room, temperature=temperature, dice=dice)
        self._left = time.perf_counter()
        self._draft_seconds = (self._left - start) / max(1, len(draft))
        return draft

    def told(self, draft: Draft, verdict: Verdict, hidden: Tensor) -> None:
        if len(draft):
            checked = time.perf_counter() - self._left
            if self._measures:
                newest = self._draft_seconds / checked
                self.cost = newest if self.cost is None else self.memory * self.cost + (1 - self.memory) * newest
            looked_at = len(verdict.accepted) + len(verdict.rejected)
            if looked_at:
                # Weighted by how many were looked at: a draft of one tells less than one of eight.
                kept = self.memory**looked_at
                self.alpha = kept * self.alpha + (1 - kept) * len(verdict.accepted) / looked_at
            if self.rule == "steps":
                whole = len(verdict.accepted) == len(draft)
                self.inner.length = max(1, min(self.most, self.inner.length + (2 if whole else -1)))
        self.inner.told(draft, verdict, hidden)
