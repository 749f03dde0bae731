"""The plain KV cache: every key and value of every token, kept where it was written.

"Fast Transformer Decoding" (arXiv:1911.02150), section 2.3. Paper -> here: K, V of incremental attention = `_k`, `_v`.
Positions are counted in the text, so a key is rotated once, on arrival. Memory grows with the text:
2 * layers * kv_heads * head_width values a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.caches import Cache, View
from engine.mixers.rope import Rope

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
        if layer not in self._k or self._k[layer].shape[2] < stop:
            self._grow(layer, k, v, stop)
        positions = range(start, stop)
        all_k, all_v = self._k[layer], self._v[layer]
        all_k.narrow(2, start, stop - start).copy_(rope.rotate(k, positions))
        all_v.narrow(2, start, stop - start).copy_(v)
        view = View(all_k.narrow(2, 0, stop), all_v.narrow(2, 0, stop), positions, causal=start == 0)
        if start and stop - start > 1:
            view.mask = torch.ones(stop - start, stop, dtype=torch.bool, device=k.device).tril(start)  # T S
        return view

    def _grow(self, layer: int, k: Tensor, v: Tensor, stop: int) -> None:
        capacity = self._capacity or BLOCK
        while capacity < stop:
            capacity *= 2
        for held, like in ((self._k, k), (self._v, v)):  # latent attention's differ in width
            room = like.new_empty(like.shape[0], like.shape[1], capacity, like.shape[3])
            if layer in held:
                room[:, :, : self.seen] = held[layer][:, :, : self.seen]
            held[layer] = room

    def kept(self, layer: int) -> Tensor:
        return torch.arange(self.seen)

    @property
    def nbytes(self) -> int:
        """Of the slots in use: the spare ones of the last doubling are not counted."""
        held = (*self._k.values(), *self._v.values())
        return sum(t[:, :, : self.seen].numel() * t.element_size() for t in held)
