"""Who computes what in a ring of devices: layouts and schedule as pure functions, nothing run.

Ring Attention (Liu et al., arXiv:2310.01889): at step s rank r holds the keys and values that rank (r - s) mod n began
with, and passes them on to r + 1. Zigzag, the layout of `zhuzilin/ring-flash-attention`: the text is cut into 2n chunks
and rank r keeps chunks r and 2n - 1 - r, an early one and a late one, so that a causal mask spares every rank the same.
Paper -> here: hosts = ranks; block = what a rank keeps of the text. A tile is a chunk of queries by a chunk of keys.
Deviation: chunks need not be of one size; where the length does not divide, the first ones are a token longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "zigzag")
Chunk = tuple[int, int]  # first token, the token after the last


@dataclass(frozen=True)
class Turn:
    """What `rank` does at `step`: it meets the block of rank `block`; tiles as (queries, keys)."""

    rank: int
    step: int
    block: int
    computed: tuple[tuple[Chunk, Chunk], ...]
    skipped: tuple[tuple[Chunk, Chunk], ...]
    cells: int  # pairs of a query and a key that it may see

    @property
    def idle(self) -> bool:
        return not self.computed


def blocks(length: int, *, ranks: int, layout: str = "contiguous") -> list[list[Chunk]]:
    """The chunks that each rank keeps, in the order in which it keeps them."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if ranks < 1:
        raise ValueError(f"ranks must be above 0, not {ranks}")
    count = ranks if layout == "contiguous" else 2 * ranks
    if length < count:
        raise ValueError(f"length must be {count} tokens at least for {ranks} ranks, {layout}, not {length}")
    short, longer = divmod(length, count)
    starts = [i * short + min(i, longer) for i in range(count + 1)]
    chunks = list(pairwise(starts))
    if layout == "contiguous":
        return [[chunk] for chunk in chunks]
    return [[chunks[r], chunks[-1 - r]] for r in range(ranks)]


def permutation(length: int, *, ranks: int, layout: str = "contiguous") -> Tensor:
    """Which token stands at each place when the ranks' blocks are laid side by side: int64 [length]."""
    kept = blocks(length, ranks=ranks, layout=layout)
    return torch.cat([torch.arange(*chunk) for block in kept for chunk in block])


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def cells(queries: Chunk, keys: Chunk, *, causal: bool) -> int:
    """How many pairs of a query and a key of the tile may meet."""
    if not causal:
        return (queries[1] - queries[0]) * (keys[1] - keys[0])
    return sum(max(0, min(keys[1], query + 1) - keys[0]) for query in range(*queries))


def schedule(length: int, *, ranks: int, layout: str = "contiguous", causal: bool = True) -> list[list[Turn]]:
    """Every rank's turns: `schedule(...)[rank][step]`."""
    kept = blocks(length, ranks=ranks, layout=layout)
    plan = []
    for rank in range(ranks):
        turns = []
        for step in range(ranks):
            block = (rank - step) % ranks
            pairs = [(q, k) for q in kept[rank] for k in kept[block]]
            count = [cells(q, k, causal=causal) for q, k in pairs]
            computed = tuple(pair for pair, n in zip(pairs, count, strict=True) if n)
            skipped = tuple(pair for pair, n in zip(pairs, count, strict=True) if not n)
            turns.append(Turn(rank, step, block, computed, skipped, sum(count)))
        plan.append(turns)
    return plan


def idle_share(plan: list[list[Turn]]) -> list[float]:
    """The share of its time that each rank waits, if a cell costs the same everywhere and transfers cost nothing.

    All wait at every step for the slowest, since the blocks move together.
    """
    longest = [max(turns[step].cells for turns in plan) for step in range(len(plan))]
    return [1 - sum(turn.cells for turn in turns) / sum(longest) for turns in plan]
