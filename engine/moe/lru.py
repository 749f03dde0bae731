"""Which experts stay: the least recently used goes first, and what such a cache would hit without running anything.

Eliseev and Mazur (arXiv:2312.17238), section 3.1. Paper -> here: cache size k = size, of each layer or of all together.
A key is (layer, expert). Errors: ValueError for a size below 1, and for no requests.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Key = tuple[int, int]
"""Layer and number of an expert."""
Item = TypeVar("Item", bound=Hashable)


class LRU(Generic[Item]):
    """The last `size` different items that were used, the least recently used first."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be a number of experts above 0, not {size}")
        self.size = size
        self._order: dict[Item, None] = {}

    def __contains__(self, item: object) -> bool:
        return item in self._order

    def __iter__(self) -> Iterator[Item]:
        return iter(self._order)

    def use(self, item: Item) -> tuple[bool, Item | None]:
        """Note a use: whether it was there, and what had to go for it."""
        hit, gone = item in self._order, None
        if hit:
            del self._order[item]
        elif len(self._order) == self.size:
            gone = next(iter(self._order))
            del self._order[gone]
        self._order[item] = None
        return hit, gone


@dataclass
class Counts:
    """What happened so far. hits + misses = requests."""

    requests: int = 0
    hits: int = 0
    early: int = 0  # hits that were loaded ahead
    misses: int = 0
    evictions: int = 0
    guessed: int = 0  # experts guessed, whether in memory or not
    right: int = 0  # of them, those that the layer asked for
    foreseeable: int = 0  # requests of layers that were guessed for
    bytes: int = 0  # asked of the slow tier
    waited: float = 0.0  # seconds that computing stood still for an expert

    @property
    def hit_rate(self) -> float:
        """The share of requests that found their expert in memory or on its way; NaN before the first."""
        return self.hits / self.requests if self.requests else float("nan")

    @property
    def recall(self) -> float:
        """The share of experts asked for that had been guessed, where there was a guess; NaN before the first."""
        return self.right / self.foreseeable if self.foreseeable else float("nan")


def served_first(needed: Iterable[Item], held: LRU[Item]) -> list[Item]:
    """The order in which experts are served: those in memory, lest loading another evict them; then the others."""
    return sorted(needed, key=lambda item: item not in held)


def asked(chosen: Mapping[int, Tensor]) -> list[list[Key]]:
    """What decoding asks for, token by token and layer by layer, of chosen[layer] [N, E]: see `usage.calls`."""
    rows = {layer: mask.tolist() for layer, mask in sorted(chosen.items())}
    count = min((len(mask) for mask in rows.values()), default=0)
    return [[(i, e) for e, called in enumerate(mask[t]) if called] for t in range(count) for i, mask in rows.items()]


def hit_rate(asked: Sequence[Sequence[Key]], *, size: int, shared: bool = False) -> float:
    """The share of requests that a cache of `size` experts a layer (with `shared`: of all layers) finds in memory.

    Each entry of `asked` is what one layer asks for at once. It is what a run counts with nothing loaded ahead.
    """
    caches: dict[int, LRU[Key]] = {}
    hits = requests = 0
    for keys in asked:
        for key in served_first(keys, caches.setdefault(0 if shared or not keys else keys[0][0], LRU(size))):
            hits += caches[0 if shared else key[0]].use(key)[0]
            requests += 1
    if not requests:
        raise ValueError("asked must hold one request at least, and it holds none")
    return hits / requests
