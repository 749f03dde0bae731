"""The sliding window: only the last tokens are kept, and positions are counted in the cache.

The "window attention" baseline of StreamingLLM (arXiv:2309.17453), figure 1b and section 3.2. Paper -> here:
L cached tokens = size, the token being read among them. Keys are kept before rotation and rotated on every step at
the slot where they lie (`pos_shift` in the authors' code): slot 0 is position 0 of the cache, whatever its place
in the text. Deviation: the authors' cache holds L tokens beside the one being read; ours holds L with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.caches import Cache, View
from engine.mixers.rope import Positions, Rope
from engine.recording import event

SLOTS_AT_ONCE = 65536  # queries times slots of one pass, since each query of a full window gets its own keys


@dataclass(slots=True)
class _Plan:
    """What one pass does in every layer, over the n slots held and the T tokens that come: n + T candidates."""

    q_positions: Positions  # the slot of each query's own token
    mask: Tensor | None  # T S
    stay: Tensor | None  # n': the candidates that are held after the pass; None: all
    places: Tensor | None  # T S: the candidate in each slot, query by query; None: all see what is held by then


class Window(Cache):
    """The last `size` tokens. Memory is constant once it is full."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be a number of tokens above 0, not {size!r}")
        self.size = size
        self.bound = size
        self.at_once = max(1, SLOTS_AT_ONCE // size)
        self._k: dict[int, Tensor] = {}  # layer -> B H_kv n D, not rotated
        self._v: dict[int, Tensor] = {}  # layer -> B H_kv n D
        self._plan: _Plan | None = None  # of the pass under way

    def slots(self, position: int) -> list[int]:
        """The text positions that the token at `position` sees, slot by slot; its own is the last."""
        return list(range(max(0, position - self.size + 1), position + 1))

    def why(self) -> str:
        """Why a token is evicted, for people."""
        return f"it is older than the last {self.size}"

    def extend(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> View:
        B, G, T, D = k.shape
        # Copies either way: a slice of the product that made q, k and v would keep all of it alive.
        k = torch.cat((self._k[layer], k), 2) if layer in self._k else k.clone()  # B H_kv n+T D
        v = torch.cat((self._v[layer], v), 2) if layer in self._v else v.clone()  # B H_kv n+T D
        if self._plan is None:
            self._plan = self._make_plan(T, k.device)
        plan = self._plan
        if plan.stay is None:
            self._k[layer], self._v[layer] = k, v
        else:
            self._k[layer], self._v[layer] = k.index_select(2, plan.stay), v.index_select(2, plan.stay)
        if plan.places is None:
            k, v = self._k[layer], self._v[layer]
            return View(rope.rotate(k, range(k.shape[2])), v, plan.q_positions, plan.mask, causal=k.shape[2] == T)
        # A key slides by one slot between two queries, so that it is rotated anew for each: keys per query.
        S = plan.places.shape[1]
        k = k[:, :, plan.places].transpose(1, 2).reshape(B * T, G, S, D)
        v = v[:, :, plan.places].transpose(1, 2).reshape(B * T, G, S, v.shape[-1])
        mask = None if plan.mask is None else plan.mask[:, None, None].repeat(B, 1, 1, 1)  # B*T 1 1 S
        return View(rope.rotate(k, range(S)), v, plan.q_positions, mask)

    def _make_plan(self, T: int, device: torch.device) -> _Plan:
        seen, last = self.seen, self.seen + T - 1
        before = self.slots(seen - 1) if seen else []
        candidate = {position: i for i, position in enumerate((*before, *range(seen, last + 1)))}
        held = [candidate[position] for position in self.slots(last)]
        stay = torch.tensor(held, device=device) if len(held) < len(candidate) else None
        if T == 1:
            return _Plan(range(len(held) - 1, len(held)), None, stay, None)
        if stay is None:
            mask = torch.ones(T, last + 1, dtype=torch.bool, device=device).tril(seen) if seen else None  # T S
            return _Plan(range(seen, last + 1), mask, None, None)
        rows = [[candidate[position] for position in self.slots(q)] for q in range(seen, last + 1)]
        lengths = torch.tensor([len(row) for row in rows], device=device)  # T
        S = len(rows[-1])
        places = torch.tensor([row + [0] * (S - len(row)) for row in rows], device=device)  # T S
        mask = torch.arange(S, device=device) < lengths[:, None]  # T S
        return _Plan(lengths - 1, mask, stay, places)

    def advance(self, count: int) -> None:
        for position in range(self.seen, self.seen + count):
            before = self.slots(position - 1) if position else []
            for evicted in sorted(set(before).difference(self.slots(position))):
                event("cache.evict", position=evicted, reason=self.why(), cache=self.name)
        super().advance(count)
        self._plan = None

    def kept(self, layer: int) -> Tensor:
        return torch.tensor(self.slots(self.seen - 1) if self.seen else [], dtype=torch.long)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self._k.values(), *self._v.values()))
