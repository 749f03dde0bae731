"""What is remembered: one file a cache. Here is what all of them promise to a mixer.

`extend` takes the keys and values of the T tokens that came, and gives back what the queries of these tokens may
see. Keys come before rotation, because some caches count positions in the text and some in the cache. After all
layers of a pass the model calls `advance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.mixers.rope import Positions, Rope


@dataclass(slots=True)
class View:
    """What the T queries of a pass may see.

    Its rows are the batch, or every query has its own: then they are B*T, query by query, and each row serves
    one query. That is how caches say that the same key lies in different slots for different queries.
    """

    k: Tensor  # rows H_kv S D, rotated
    v: Tensor  # rows H_kv S D
    q_positions: Positions  # T or B T; a query's own key lies at this place of S
    mask: Tensor | None = None  # bool, broadcast to [rows, 1, queries a row, S], true where a query may look
    causal: bool = False  # S = T and query t sees keys 0..t; needs no mask


def fresh(k: Tensor, v: Tensor, rope: Rope) -> View:
    """The view of a first pass that nothing came before: plain causal attention."""
    positions = range(k.shape[2])
    return View(rope.rotate(k, positions), v, positions, causal=True)


class Cache:
    """The contract. One cache serves one sequence (or a batch of equal length) and all layers of one model."""

    bound: int | None = None  # slots that it never exceeds; None: as many as tokens were seen
    at_once: int | None = None  # tokens that one pass may bring, the model splits what is longer; None: any number
    watches: bool = False  # whether `observe` wants to be called: it costs an explicit attention pattern

    def __init__(self) -> None:
        self.seen = 0  # tokens seen so far
        self.name = ""  # told in events, where several caches read side by side
        self.states: dict[int, Any] = {}  # layer -> whatever a recurrent mixer carries

    def extend(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> View:
        """Take k and v [B, H_kv, T, D] of the tokens seen, seen + 1, ...; k is not rotated yet."""
        raise NotImplementedError

    def observe(self, layer: int, pattern: Tensor) -> None:
        """Look at the attention [B, H, T, S] that was paid to the last view. Called if `watches`."""

    def observe_residual(self, layer: int, x: Tensor) -> None:
        """Look at the residual stream [B, T, W] that enters a block. Called if `watches`."""

    def advance(self, count: int) -> None:
        """All layers have taken `count` more tokens."""
        self.seen += count

    def keep(self, seen: int, places: Sequence[int]) -> None:
        """Of the tokens read from number `seen` on keep those at `places`, counted from there, and forget the others:
        of a tree of guesses the path that came true. Raises ValueError where a token cannot be forgotten."""
        raise ValueError(f"{type(self).__name__} cannot forget a token that it has read: take a cache that keeps all")

    def crop(self, seen: int) -> None:
        """Forget every token from number `seen` on."""
        self.keep(seen, ())

    def kept(self, layer: int) -> Tensor:
        """The text positions now held, slot by slot: the last axis is S.

        [S] where all heads hold the same; [H_kv, S] where each head has its own, [B, H_kv, S] if rows differ too.
        A `Lockstep` puts its rows in front: [N, S], or [N, H_kv, S] as soon as one row has heads of its own.
        -1 where a row has no such slot.
        """
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors really held."""
        raise NotImplementedError
