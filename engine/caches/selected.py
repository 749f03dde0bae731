"""Caches that keep a chosen few: the bookkeeping of slots, head by head. A policy is no more than a score.

Every layer and every key/value head keeps its own tokens: the first `sinks`, the last `recent` (the one being read
among them) and the `chosen` others of the most worth. When a token comes and a head is full, the one of least worth
among those neither first nor recent goes, before the new query looks: worth knows past queries only, and the budget
sinks + chosen + recent is never exceeded. What has gone never comes back.
As in `Window`, keys are kept before rotation and turned at the slot where they lie; slots keep the order of the text.

A pass of several tokens means the same as those tokens one by one. As long as nothing has to go, that is a plain
causal pass; after that the worth of what is kept depends on the query before, so that `at_once` falls to 1 and the
model splits what is longer.

Shapes: k, v [B, H_kv, n, D]; positions and scores [B, H_kv, n]. All heads of a layer hold as many tokens.
Errors: ValueError for a budget without a recent token, and for a longer pass than `at_once`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.caches import Cache, View
from engine.mixers.rope import Rope
from engine.recording import event, recording_on, site, tap

REASONS = ("sink", "chosen", "recent")  # what the numbers of `selected.why` stand for

EVICT = "cache.evict"  # a filter that names layers keeps the events of these layers only
POSITIONS = site("selected.positions", "text positions of the tokens that a head keeps, slot by slot")
WORTH = site("selected.worth", "what each kept token is worth to its head: of the chosen ones, the least goes next")
WHY = site("selected.why", f"why a head keeps each token: {', '.join(f'{i} {word}' for i, word in enumerate(REASONS))}")


class Selected(Cache):
    """`chosen`: tokens chosen by worth in every head, one number for all layers or one each."""

    def __init__(self, chosen: int | Sequence[int], *, recent: int, sinks: int = 0, called: str = "chosen") -> None:
        super().__init__()
        each = (chosen,) if isinstance(chosen, int) else tuple(chosen)
        if not each or any(not _whole(number) for number in each):
            raise ValueError(f"{called} must be a number of tokens, 0 or more, or one a layer, not {chosen!r}")
        if not _whole(recent) or recent < 1:
            raise ValueError(f"recent must be a number of tokens above 0, not {recent!r}")
        if not _whole(sinks):
            raise ValueError(f"sinks must be a number of tokens, 0 or more, not {sinks!r}")
        self.recent, self.sinks, self._called = recent, sinks, called
        self._chosen = each[0] if isinstance(chosen, int) else each
        self.bound = sinks + recent + max(each)
        self._least = sinks + recent + min(each)  # the budget of the tightest layer
        self.at_once = self._least
        self._brought = 0  # tokens of the pass under way
        self._k: dict[int, Tensor] = {}  # layer -> B H_kv n D, not rotated
        self._v: dict[int, Tensor] = {}  # layer -> B H_kv n D
        self._positions: dict[int, Tensor] = {}  # layer -> B H_kv n, in the text, rising
        self._scores: dict[int, Tensor] = {}  # layer -> B H_kv n

    def budget(self, layer: int) -> int:
        """The slots of each head of a layer."""
        if isinstance(self._chosen, int):
            return self.sinks + self.recent + self._chosen
        if layer >= len(self._chosen):
            raise ValueError(
                f"{self._called} must name a number for every layer, and has {len(self._chosen)} for layer {layer}"
            )
        return self.sinks + self.recent + self._chosen[layer]

    # --- what a policy says -----------------------------------------------------------------------------------

    def first_score(self, k: Tensor) -> Tensor:
        """The score [B, H_kv, T] of tokens that come with keys k [B, H_kv, T, D]."""
        raise NotImplementedError

    def worth(self, scores: Tensor, positions: Tensor) -> Tensor:
        """The worth of kept tokens, from their scores and text positions [B, H_kv, n]: the least goes first."""
        return scores

    def why(self, worth: float) -> str:
        """Why a token of the least worth is evicted, for people."""
        raise NotImplementedError

    # --- the contract -----------------------------------------------------------------------------------------

    def extend(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> View:
        B, G, T, _ = k.shape
        start, stop, budget = self.seen, self.seen + T, self.budget(layer)
        if T > 1 and stop > self._least:
            raise ValueError(f"a pass may bring {self.at_once} tokens to this cache now, as at_once says, not {T}")
        self._brought = T
        positions = torch.arange(start, stop, device=k.device).expand(B, G, T)
        scores = self.first_score(k)
        if layer not in self._k:
            # Copies, since a slice of the product that made q, k and v would keep all of it alive.
            self._k[layer], self._v[layer] = k.clone(), v.clone()
            self._positions[layer], self._scores[layer] = positions.clone(), scores
        else:
            if self._k[layer].shape[2] + T > budget:
                self._evict(layer)
            for held, new in ((self._k, k), (self._v, v), (self._positions, positions), (self._scores, scores)):
                held[layer] = torch.cat((held[layer], new), 2)
        k, v = self._k[layer], self._v[layer]
        n = k.shape[2]
        view = View(rope.rotate(k, range(n)), v, range(n - T, n), causal=n == T)
        if T > 1 and n > T:
            view.mask = torch.ones(T, n, dtype=torch.bool, device=k.device).tril(n - T)  # T S
        return view

    def _evict(self, layer: int) -> None:
        """Make room for the token at position `seen`: one token of each head goes."""
        positions = self._positions[layer]
        worth = self.worth(self._scores[layer], positions)  # B H_kv n
        safe = self._reasons(positions, self.seen) != REASONS.index("chosen")
        victim = worth.masked_fill(safe, torch.inf).argmin(-1, keepdim=True)  # B H_kv 1
        if recording_on(EVICT, layer=layer):
            gone, least = positions.gather(2, victim)[..., 0].tolist(), worth.gather(2, victim)[..., 0].tolist()
            for row, values in zip(gone, least, strict=True):
                for head, (position, value) in enumerate(zip(row, values, strict=True)):
                    event(EVICT, layer=layer, head=head, position=position, reason=self.why(value), cache=self.name)
        stay = torch.arange(positions.shape[2] - 1, device=positions.device)
        stay = stay + (stay >= victim)  # B H_kv n-1: the order is kept
        for held in (self._positions, self._scores):
            held[layer] = held[layer].gather(2, stay)
        for held in (self._k, self._v):
            held[layer] = held[layer].gather(2, stay[..., None].expand(*stay.shape, held[layer].shape[3]))

    def _reasons(self, positions: Tensor, newest: int) -> Tensor:
        """Why each token is kept while the one at `newest` is read, as a place in REASONS."""
        reasons = torch.ones_like(positions, dtype=torch.int8)
        reasons[positions > newest - self.recent] = REASONS.index("recent")
        reasons[positions < self.sinks] = REASONS.index("sink")
        return reasons

    def advance(self, count: int) -> None:
        super().advance(count)
        self.at_once = max(1, self._least - self.seen)
        label: dict[str, str] = {"strategy": self.name} if self.name else {}
        for layer, positions in self._positions.items():
            rows = "head slot" if positions.shape[0] == 1 else "batch head slot"
            pick = 0 if positions.shape[0] == 1 else slice(None)
            if recording_on(POSITIONS, layer=layer):
                tap(POSITIONS, positions[pick].int(), rows, layer=layer, **label)
            if recording_on(WORTH, layer=layer):
                tap(WORTH, self.worth(self._scores[layer], positions)[pick].float(), rows, layer=layer, **label)
            if recording_on(WHY, layer=layer):
                tap(WHY, self._reasons(positions, self.seen - 1)[pick], rows, layer=layer, **label)

    def kept(self, layer: int) -> Tensor:
        if layer not in self._positions:
            return torch.empty(0, dtype=torch.long)
        positions = self._positions[layer].cpu()
        return positions[0] if positions.shape[0] == 1 else positions

    def valued(self, layer: int) -> tuple[Tensor, Tensor]:
        """What a layer holds: text positions, and what each token is worth to its head now, both [B, H_kv, n]."""
        positions = self._positions[layer]
        return positions, self.worth(self._scores[layer], positions)

    @property
    def nbytes(self) -> int:
        """With the positions and scores, which a plain cache does not need."""
        held = (self._k, self._v, self._positions, self._scores)
        return sum(t.numel() * t.element_size() for part in held for t in part.values())


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
