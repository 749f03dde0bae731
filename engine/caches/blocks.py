"""Memory in blocks of a fixed size, and a table for each sequence that says which block holds which of its tokens.

"Efficient Memory Management for Large Language Model Serving with PagedAttention" (arXiv:2309.06180), section 4.
Paper -> here: KV block = a block number, block size B = `block_size`, block table = `Table.blocks`, copy-on-write =
what `append` does to a last block that is shared, shared prefix = `open`.
As in vLLM a full block is known by a hash of its tokens and of the block before, and found again by it (`pool.py`).

No tensor is here: the numbers alone are managed. `paged.py` adds keys and values.
Errors: ValueError for a request that the whole pool could not hold, `ExhaustedError` while others hold the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.caches.pool import ExhaustedError, Pool, chained
from engine.recording import event, recording_on, site, tap

TABLE = site("pages.table", "the block that holds each run of a sequence's tokens (-1: let go)", symbol="block table")
REFS = site("pages.refs", "how many tables point to each block", symbol="reference count", low=0.0)
FREE = site("pages.free", "blocks nobody points to, the next to be given away first", symbol="free list")
LIVE = site("pages.live", "slots of each block that hold a token of some sequence", low=0.0)
TOKENS = site("pages.tokens", "the token in each slot of each block (-1: none, -2: not told)")
EMPTY, UNTOLD = -1, -2


@dataclass
class Table:
    """The tokens of one sequence, place by place, and the blocks that hold them."""

    blocks: list[int | None] = field(default_factory=list)  # None: all its tokens were dropped
    tokens: list[int] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)
    text: bytes | None = b""  # hash up to the last full block; None: it can no longer be known
    written: int = 0  # tokens whose keys and values are there

    @property
    def live(self) -> int:
        return len(self.tokens) - len(self.dropped)


class Tables:
    """All sequences over one pool."""

    def __init__(self, blocks: int, *, block_size: int) -> None:
        self.pool = Pool(blocks, block_size=block_size)
        self.tables: dict[str, Table] = {}
        self.contents = np.full((blocks, block_size), EMPTY, np.int32)  # the token in each slot

    def copied(self, source: int, target: int) -> None:
        """What a block holds was copied: for who keeps tensors."""

    def table(self, name: str) -> Table:
        if name not in self.tables:
            raise ValueError(f"name must be one of {', '.join(self.tables) or 'no sequence at all'}, not {name!r}")
        return self.tables[name]

    def open(self, name: str, tokens: Sequence[int] = ()) -> int:
        """A new sequence. Full blocks of its coming `tokens` that are in memory already are shared: says how many
        tokens that spares. One token is always left to read, or nothing would predict the next."""
        if name in self.tables:
            raise ValueError(f"name must be new, and {name!r} is open")
        self.tables[name] = table = Table()
        for block, text in self._known(tokens):
            self.pool.share(block, name)
            table.blocks.append(block)
            table.text = text
        table.written = len(table.blocks) * self.pool.block_size
        table.tokens.extend(tokens[: table.written])
        return table.written

    def _known(self, tokens: Sequence[int]) -> Iterable[tuple[int, bytes]]:
        """The blocks that hold the beginning of `tokens`, each with the hash of the text up to its end."""
        size, text = self.pool.block_size, b""
        for end in range(size, len(tokens), size):
            text = chained(text, tokens[end - size : end])
            block = self.pool.find(text)
            if block is None:
                return
            yield block, text

    def cost(self, tokens: Sequence[int]) -> int:
        """Blocks that leave the free list when a new sequence of these tokens is opened and appended."""
        shared = sum(self.pool.refs[block] > 0 for block, _ in self._known(tokens))
        return -(-len(tokens) // self.pool.block_size) - shared

    def needs(self, name: str, count: int) -> int:
        """Blocks that leave the free list when `count` tokens are appended, the copy of a shared one among them."""
        table, size = self.table(name), self.pool.block_size
        new = -(-(len(table.tokens) + count) // size) - len(table.blocks)
        return new + (count > 0 and self._spoiled(table))

    def _spoiled(self, table: Table) -> bool:
        """Whether the last block has room and may not be written: others see it, or it was let go."""
        if len(table.tokens) % self.pool.block_size == 0:
            return False
        last = table.blocks[-1]
        return last is None or self.pool.refs[last] > 1

    def check(self, count: int) -> None:
        """Raise ValueError when the whole pool could not hold `count` tokens of one sequence."""
        if -(-count // self.pool.block_size) > self.pool.blocks:
            raise self._too_small(count)

    def _too_small(self, count: int) -> ValueError:
        blocks, size = self.pool.blocks, self.pool.block_size
        return ValueError(
            f"the request needs {count} tokens, and the pool of {blocks} blocks of {size} tokens holds {blocks * size}"
        )

    def append(self, name: str, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Slots (block, place in it) for the next tokens of a sequence; all of them, or `ExhaustedError` and none."""
        table, size = self.table(name), self.pool.block_size
        held = sum(block is not None for block in table.blocks)
        if held + self.needs(name, len(tokens)) > self.pool.blocks and len(self.tables) == 1:
            raise self._too_small(len(table.tokens) + len(tokens))
        needed = self.needs(name, len(tokens))
        if needed > len(self.pool.free):
            raise ExhaustedError(
                f"{name!r} needs {needed} blocks, and {len(self.pool.free)} of {self.pool.blocks} are free"
            )
        if tokens and self._spoiled(table):
            self._own_last(table, name)
        slots = []
        for token in tokens:
            place = len(table.tokens) % size
            if place == 0:
                table.blocks.append(self._fresh(name))
            block = table.blocks[-1]
            assert block is not None
            self.contents[block, place] = token
            table.tokens.append(token)
            slots.append((block, place))
            if place == size - 1:
                self._seal(table, block)
        return slots

    def _fresh(self, name: str) -> int:
        block = self.pool.allocate(name)
        self.contents[block] = EMPTY
        return block

    def _own_last(self, table: Table, name: str) -> None:
        """Copy-on-write: a last block that others see is left to them, and its copy is written instead."""
        old, new = table.blocks[-1], self._fresh(name)
        table.blocks[-1] = new
        if old is not None:
            self.contents[new] = self.contents[old]
            self.copied(old, new)
            self.pool.release(old, name)
            event("block.copy", source=old, block=new, sequence=name)

    def _seal(self, table: Table, block: int) -> None:
        tokens = table.tokens[-self.pool.block_size :]
        if table.text is None or table.dropped or UNTOLD in tokens:
            table.text = None  # what comes after dropped tokens was read without them: it is another text
            return
        table.text = chained(table.text, tokens)
        self.pool.seal(block, table.text)

    def fork(self, name: str, child: str) -> None:
        """A second sequence with the same tokens: no block is copied until one of the two writes."""
        table = self.table(name)
        if child in self.tables:
            raise ValueError(f"child must be new, and {child!r} is open")
        self.tables[child] = Table(
            list(table.blocks), list(table.tokens), set(table.dropped), table.text, table.written
        )
        for block in table.blocks:
            if block is not None:
                self.pool.share(block, child)

    def close(self, name: str) -> list[int]:
        """Forget a sequence; returns the blocks that came free. Its last blocks are given away first."""
        table = self.table(name)
        held = [block for block in reversed(table.blocks) if block is not None]
        freed = [block for block in held if self.pool.release(block, name)]
        del self.tables[name]
        return freed

    def drop(self, name: str, positions: Iterable[int]) -> list[int]:
        """Evict single tokens of a sequence; returns the blocks that came free. A block with one token left is as
        occupied as a full one, and one that another table points to does not come free at all."""
        table, size, freed = self.table(name), self.pool.block_size, []
        gone = set(positions)
        if any(not 0 <= position < table.written for position in gone):
            raise ValueError(f"positions must lie between 0 and {table.written - 1}, not {sorted(gone)}")
        table.dropped |= gone
        for number, block in enumerate(table.blocks):
            places = range(number * size, min((number + 1) * size, len(table.tokens)))
            if block is not None and table.dropped.issuperset(places):
                table.blocks[number] = None
                if self.pool.release(block, name):
                    freed.append(block)
        event("pages.drop", sequence=name, positions=sorted(gone), freed=freed)
        return freed

    def live(self) -> list[int]:
        """Slots of each block that hold a token which some sequence still sees."""
        size = self.pool.block_size
        seen: set[tuple[int, int]] = set()
        for table in self.tables.values():
            for number, block in enumerate(table.blocks):
                places = range(number * size, min((number + 1) * size, len(table.tokens)))
                seen.update((block, at % size) for at in places if block is not None and at not in table.dropped)
        count = [0] * self.pool.blocks
        for block, _ in seen:
            count[block] += 1
        return count

    def show(self) -> None:
        """Tap all tables and the pool as they are now."""
        for name, table in self.tables.items():
            entries = np.array([EMPTY if block is None else block for block in table.blocks], np.int32)
            tap(TABLE, entries, "entry", sequence=name)
        tap(REFS, np.array(self.pool.refs, np.int32), "block")
        tap(FREE, np.array(list(self.pool.free), np.int32), "place")
        tap(TOKENS, self.contents, "block slot")
        if recording_on(LIVE):
            tap(LIVE, np.array(self.live(), np.int32), "block")
