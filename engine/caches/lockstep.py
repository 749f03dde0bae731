"""Several caches side by side, one a batch row, so that the weights are read once for all of them.

A decode step is bound by reading the weights, so four policies in one pass cost little more than one. Each row
keeps its own slots and positions; rows with fewer slots are padded at the end, and the padding is masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.caches import Cache, View
from engine.mixers.rope import Rope


class Lockstep(Cache):
    """Row i of every batch goes to `caches[i]`. All rows take the same number of tokens."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        super().__init__()
        if not caches:
            raise ValueError("caches must hold at least one cache, and it is empty")
        if any(isinstance(cache, Lockstep) for cache in caches):
            raise ValueError("caches must be of one row each, and one of them is a Lockstep itself")
        self.caches = tuple(caches)
        self.seen = self.caches[0].seen
        bounds = [cache.bound for cache in self.caches if cache.bound is not None]
        self.bound = max(bounds) if len(bounds) == len(self.caches) else None
        self.at_once = self._at_once()
        self.watches = any(cache.watches for cache in self.caches)
        self._lengths: tuple[int, ...] = ()  # the rows' slots in the view last given
        self._masks: dict[tuple[int, ...], tuple[Tensor | None, Tensor]] = {}  # of this pass, by such lengths

    def extend(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> View:
        N, _, T, _ = k.shape
        if len(self.caches) != N:
            raise ValueError(f"ids must have a row for each of the {len(self.caches)} caches, not {N}")
        views = [cache.extend(layer, k[i : i + 1], v[i : i + 1], rope) for i, cache in enumerate(self.caches)]
        self._lengths = lengths = tuple(view.k.shape[2] for view in views)
        if lengths not in self._masks:
            self._masks[lengths] = self._line_up(views, T, max(lengths), k.device)
        mask, positions = self._masks[lengths]
        # One query a row: a token has its own row of slots when T > 1.
        keys = torch.cat([_padded(view.k, T, max(lengths)) for view in views])  # N*T H_kv S D
        values = torch.cat([_padded(view.v, T, max(lengths)) for view in views])  # N*T H_kv S D
        return View(keys, values, positions, mask)

    def _line_up(self, views: list[View], T: int, S: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """The masks [N*T, 1, 1, S] and the positions [N, T] of all rows."""
        masks, positions = [], []
        for view in views:
            own = view.k.shape[2]
            mask = view.mask
            if mask is None:
                mask = torch.ones(T, own, dtype=torch.bool, device=device)
                mask = mask.tril() if view.causal else mask
            masks.append(F.pad(mask.reshape(T, 1, 1, own), (0, S - own)))
            at = view.q_positions
            positions.append(torch.arange(at.start, at.stop, device=device) if isinstance(at, range) else at.reshape(T))
        mask = torch.cat(masks)
        return (None if bool(mask.all()) else mask), torch.stack(positions)

    def observe(self, layer: int, pattern: Tensor) -> None:
        for i, cache in enumerate(self.caches):
            if cache.watches:
                cache.observe(layer, pattern[i : i + 1, ..., : self._lengths[i]])

    def observe_residual(self, layer: int, x: Tensor) -> None:
        for i, cache in enumerate(self.caches):
            if cache.watches:
                cache.observe_residual(layer, x[i : i + 1])

    def advance(self, count: int) -> None:
        for cache in self.caches:
            cache.advance(count)
        super().advance(count)
        self.at_once = self._at_once()  # a cache that has filled up may take fewer tokens than before
        self._masks.clear()

    def _at_once(self) -> int | None:
        return min((c.at_once for c in self.caches if c.at_once is not None), default=None)

    def kept(self, layer: int) -> Tensor:
        rows = [cache.kept(layer) for cache in self.caches]
        S = max(row.shape[-1] for row in rows)
        rows = [F.pad(row, (0, S - row.shape[-1]), value=-1) for row in rows]
        heads = max((row.shape[0] for row in rows if row.dim() == 2), default=0)
        return torch.stack([row.expand(heads, S) if heads else row for row in rows])  # N S or N H_kv S

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)


def _padded(x: Tensor, T: int, S: int) -> Tensor:
    """Slots [1 or T, H_kv, own, D] -> [T, H_kv, S, D]: a row a query, zeros after the last slot."""
    x = x.expand(T, *x.shape[1:])
    return x if x.shape[2] == S else F.pad(x, (0, 0, 0, S - x.shape[2]))
