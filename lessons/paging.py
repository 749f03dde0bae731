"""What the lesson `paged` watches: pages that show all texts side by side, and three ways to reserve in lockstep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.caches.paged import Paged, Pages
from engine.caches.reserved import Request, Reserved, Use
from engine.generate import generate
from engine.recording import labelled, site, step, tap
from lessons.models import name_ids

TABLES = site("paged.tables", "the block behind each entry of each text's table (-1: let go, -2: none)")
STATES = site("paged.states", "of each text: not here yet, waiting, running, sent away, done")
FAMILIES = site("paged.families", "the request that each text answers; forks answer the same one")
SLOTS = site("paged.slots", "of each slot: empty, held, dropped, left over")
USED = site("paged.used", "blocks that some table points to")
FREE = site("paged.free", "blocks on the free list")
POOL = site("paged.pool", "slots of the whole memory")
POINTERS = site("paged.pointers", "entries of all tables that point to a block")
REFERENCES = site("paged.references", "the sum of all blocks' reference counts")
HELD = site("paged.held", "slots that hold a word some text still sees")
TAKEN = site("paged.taken", "slots of all blocks in use")
SHARE = site("paged.share", "of the slots taken, those that hold a word", low=0.0, high=1.0)
RUNNING = site("paged.running", "texts being written at once")
COMING, WAITS, RUNS, AWAY, DONE = range(5)
EMPTY, LIVE, DROPPED, LEFT = range(4)
DROP_TOKENS = 24  # of the text that loses its words at the end


class Shown(Pages):
    """Pages that show all texts side by side, those that wait or are gone among them."""

    def __init__(self, blocks: int, *, block_size: int, requests: Sequence[Request], tokenizer: Any) -> None:
        super().__init__(blocks, block_size=block_size)
        self.ends = {name: request.tokens for request in requests for name in request.names}
        self.arrivals = {name: request.arrival for request in requests for name in request.names}
        self.families = [i for i, request in enumerate(requests) for _ in request.names] + [len(requests)]
        self.names = [*self.ends, "last"]
        self.ended: set[str] = set()
        self.been: set[str] = set()
        self.room = -(-max(*self.ends.values(), DROP_TOKENS) // block_size)
        self.tokenizer, self.told, self.t = tokenizer, set[int](), 0

    def close(self, name: str) -> list[int]:
        if len(self.table(name).tokens) >= self.ends.get(name, 0):
            self.ended.add(name)
        return super().close(name)

    def show(self) -> None:
        super().show()
        self.been |= set(self.tables)
        entries = np.full((len(self.names), self.room), -2, np.int32)
        for i, name in enumerate(self.names):
            if name in self.tables:
                row = [-1 if block is None else block for block in self.tables[name].blocks]
                entries[i, : len(row)] = row
        tap(TABLES, entries, "sequence entry")
        tap(STATES, np.array([self._state(name) for name in self.names], np.uint8), "sequence")
        tap(FAMILIES, np.array(self.families, np.uint8), "sequence")
        tap(SLOTS, self._codes(), "block slot")
        size, used = self.pool.block_size, sum(count > 0 for count in self.pool.refs)
        held = sum(self.live())
        for name, value in (
            (USED, used), (FREE, len(self.pool.free)), (POINTERS, int((entries >= 0).sum())), (HELD, held),
            (REFERENCES, sum(self.pool.refs)), (TAKEN, used * size), (POOL, self.pool.blocks * size),
        ):  # fmt: skip
            tap(name, value, "")
        tap(RUNNING, len(self.tables), "", way="paged")
        if used:
            tap(SHARE, held / (used * size), "", way="paged")
        new = set(self.contents[self.contents >= 0].tolist()) - self.told
        if new:
            name_ids(self.tokenizer, np.array(sorted(new)))
            self.told |= new
        self.t += 1

    def _state(self, name: str) -> int:
        if name in self.tables:
            return RUNS
        if name in self.ended:
            return DONE
        if name in self.been:
            return AWAY
        return WAITS if self.arrivals.get(name, self.t + 1) <= self.t else COMING

    def _codes(self) -> np.ndarray:
        """What each slot of each block is."""
        codes = np.where(self.contents != -1, LEFT, EMPTY).astype(np.uint8)
        size = self.pool.block_size
        for table in self.tables.values():
            for at in range(len(table.tokens)):
                block = table.blocks[at // size]
                if block is not None and not (at in table.dropped and codes[block, at % size] == LIVE):
                    codes[block, at % size] = DROPPED if at in table.dropped else LIVE
        return codes


class Ways(Reserved):
    """Three ways to reserve, in lockstep: the longest allowed for all, a power of two, exactly what is needed."""

    def __init__(self, ways: Mapping[str, Sequence[Request]], *, slots: int) -> None:
        (self.first, requests), *others = ways.items()
        super().__init__(requests, slots=slots)
        self.others = {name: Reserved(requests, slots=slots) for name, requests in others}

    @property
    def busy(self) -> bool:
        return super().busy or any(other.busy for other in self.others.values())

    def tick(self, t: int) -> Use:
        with labelled(way=self.first):
            use = self._shown(super().tick(t))
        for name, other in self.others.items():
            with labelled(way=name):
                self._shown(other.tick(t))
        return use

    def _shown(self, use: Use) -> Use:
        tap(RUNNING, use.running, "")
        if use.running:
            tap(SHARE, use.utilisation, "")
        return use


def lose_words(model: Any, pages: Shown, ids: list[int], *, oldest: bool) -> None:
    """One more text is read, and its words are dropped one by one: all but the newest."""
    spared = pages.open("last", ids)
    pages.append("last", ids[spared:])
    for _ in generate(model, ids[spared:], steps=1, cache=Paged(pages, ["last"])):
        pages.show()
    places = range(len(ids) - 1)
    for at in places if oldest else np.random.default_rng(0).permutation(len(places)):
        pages.drop("last", [int(at)])
        pages.show()
        step()
