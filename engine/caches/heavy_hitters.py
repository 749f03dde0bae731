"""H2O: keep what was looked at. The last tokens, and those that gathered the most attention so far.

"H2O: Heavy-Hitter Oracle" (arXiv:2306.14048), Algorithm 1. Paper -> here: k = budget, the score function F_score
= `worth`, S_i = what `kept` says after token i, heavy hitters = `heavy`, the recent half of the budget = `recent`.
A query's attention sums to 1, so that all scores of a head sum to the queries read, less what went with evicted tokens.
Deviations: grouped queries add their attention to the score of the key/value head that they share. The authors attend
to k tokens beside the one being read and evict after; here the budget holds the one being read, and what goes is
decided before it looks. The prompt is read by the same rule, token by token, instead of whole and cut afterwards.
Raw sums favour early tokens, which more queries could see; `normalised` divides by the number of these queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.caches.selected import Selected


class HeavyHitters(Selected):
    """The last `recent` tokens and, in each layer and head, the `heavy` ones of the highest attention (one number, or
    one a layer). `sinks` keeps the first tokens whatever their score."""

    watches = True

    def __init__(self, heavy: int | Sequence[int], *, recent: int, sinks: int = 0, normalised: bool = False) -> None:
        super().__init__(heavy, recent=recent, sinks=sinks, called="heavy")
        self.normalised = normalised

    def first_score(self, k: Tensor) -> Tensor:
        return k.new_zeros(k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32))

    def observe(self, layer: int, pattern: Tensor) -> None:
        _, G, n = self._scores[layer].shape
        if pattern.shape[-1] != n or pattern.shape[2] != self._brought:
            raise ValueError(
                f"pattern must show all {self._brought} queries of the pass and {n} slots, "
                f"not {list(pattern.shape[2:])}"
            )
        paid = pattern.unflatten(1, (G, -1)).sum((2, 3))  # B H_kv S: of all queries of a group
        self._scores[layer] = self._scores[layer] + paid

    def worth(self, scores: Tensor, positions: Tensor) -> Tensor:
        return scores / (self.seen - positions) if self.normalised else scores

    def why(self, worth: float) -> str:
        unit = "a query on average" if self.normalised else "in all"
        return f"it got the least attention of its head so far: {worth:.3g} {unit}"
