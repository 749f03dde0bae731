"""The plain KV cache: every key and value of every token, kept where it was written.

"Fast Transformer Decoding" (arXiv:1911.02150), section 2.3. Paper -> here: K, V of incremental attention = `_k`, `_v`.
Positions are counted in the text, so a key is rotated once, on arrival. Memory grows with the text:
2 * layers * kv_heads * head_width values a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.caches import Cache, View
from engine.mixers.rope import Positions, Rope
from engine.mixers.state import repeated, tensors

BLOCK = 64  # slots of the first allocation; doubled when full, so that a token is copied about once


class Full(Cache):
    """Keeps all. `capacity` slots are allocated at first (0: a few), and doubled as often as the text needs."""

    def __init__(self, *, capacity: int = 0) -> None:
        super().__init__()
        if capacity < 0:
            raise ValueError(f"capacity must be 0 or a number of tokens, not {capacity}")
        self._capacity = capacity
        self._k: dict[int, Tensor] = {}  # layer -> B H_kv capacity D, rotated
        self._v: dict[int, Tensor] = {}  # layer -> B H_kv capacity D

    def extend(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> View:
        start, stop = self.seen, self.seen + k.shape[2]
        view = self.place(layer, k, v, rope, positions=range(start, stop))
        view.causal = start == 0
        if start and stop - start > 1:
            view.mask = torch.ones(stop - start, stop, dtype=torch.bool, device=k.device).tril(start)  # T S
        return view

    def place(self, layer: int, k: Tensor, v: Tensor, rope: Rope, *, positions: Positions) -> View:
        """Write k and v [B, H_kv, T, D] into the next slots, rotated to `positions`; the view has no mask yet."""
        start, stop = self.seen, self.seen + k.shape[2]
        if layer not in self._k or self._k[layer].shape[2] < stop:
            self._grow(layer, k, v, stop)
        all_k, all_v = self._k[layer], self._v[layer]
        all_k.narrow(2, start, stop - start).copy_(rope.rotate(k, positions))
        all_v.narrow(2, start, stop - start).copy_(v)
        return View(all_k.narrow(2, 0, stop), all_v.narrow(2, 0, stop), positions)

    def keep(self, seen: int, places: Sequence[int]) -> None:
        count = self.seen - seen
        if not 0 <= seen <= self.seen or any(not 0 <= place < count for place in places):
            raise ValueError(f"seen={seen} and places={list(places)} must lie within the {self.seen} tokens held")
        if list(places) != sorted(set(places)):
            raise ValueError(f"places must grow, not {list(places)}")
        if self.states and len(places) < count:
            raise ValueError("a recurrent state cannot forget a token: go back to a copy of cache.states instead")
        if list(places) != list(range(len(places))):
            for held in (*self._k.values(), *self._v.values()):
                slots = torch.tensor([seen + place for place in places], device=held.device)
                held[:, :, seen : seen + len(places)] = held.index_select(2, slots)
        self.seen = seen + len(places)

    def _grow(self, layer: int, k: Tensor, v: Tensor, stop: int) -> None:
        capacity = self._capacity or BLOCK
        while capacity < stop:
            capacity *= 2
        for held, like in ((self._k, k), (self._v, v)):  # latent attention's differ in width
            room = like.new_empty(like.shape[0], like.shape[1], capacity, like.shape[3])
            if layer in held:
                room[:, :, : self.seen] = held[layer][:, :, : self.seen]
            held[layer] = room

    def copies(self, rows: int) -> Full:
        """`rows` copies of a cache of one text, as the rows of a new one: each may read on in its own way."""
        if rows < 1 or any(t.shape[0] != 1 for t in (*self._k.values(), *tensors(self.states))):
            raise ValueError(f"rows must be 1 or more, of a cache that holds one text, not {rows}")
        made = Full(capacity=self.seen + BLOCK)
        made.seen = self.seen
        made.states = {layer: repeated(state, rows) for layer, state in self.states.items()}
        for held, mine in ((made._k, self._k), (made._v, self._v)):
            for layer, t in mine.items():
                room = t.new_empty(rows, t.shape[1], self.seen + BLOCK, t.shape[3])
                room[:, :, : self.seen] = t[:, :, : self.seen]
                held[layer] = room
        return made

    def kept(self, layer: int) -> Tensor:
        return torch.arange(self.seen)

    @property
    def nbytes(self) -> int:
        """Of the slots in use: the spare ones of the last doubling are not counted."""
        held = (*self._k.values(), *self._v.values())
        return sum(t[:, :, : self.seen].numel() * t.element_size() for t in held)
