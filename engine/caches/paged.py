"""PagedAttention: keys and values lie in blocks anywhere, and attention reads them through a table.

"Efficient Memory Management for Large Language Model Serving with PagedAttention" (arXiv:2309.06180), section 4.1.
Paper -> here: physical KV blocks = `_k`, `_v`; the block table = rows of `table`; one block size for all layers.
A key is rotated once, at its place in the text, so that a shared block serves every sequence that begins alike.
Deviation: the paper's kernel reads blocks in place; here they are gathered first, padded to the longest sequence of the
batch, and the padding is masked.

    cache = Paged.alone(blocks=8, block_size=16)          # one sequence: generate(model, ids, steps=9, cache=cache)
    Paged(pages, ["a", "b"])                              # a row each, of different lengths, in one pass

Shapes: a layer's keys [blocks, H_kv, block_size, D]; a batch's table [N, entries].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.caches import Cache, View
from engine.caches.blocks import UNTOLD, Table, Tables
from engine.caches.pool import ExhaustedError
from engine.mixers.rope import Positions, Rope
from engine.recording import event


@dataclass
class Swapped:
    """A sequence that lies in main memory: its table, and layer -> keys and values of its blocks [entries, ...]."""

    table: Table
    tensors: dict[int, tuple[Tensor, Tensor]]


class Pages(Tables):
    """Block tables with the keys and values that they point to. A layer's blocks are made when it is first used."""

    def __init__(self, blocks: int, *, block_size: int) -> None:
        super().__init__(blocks, block_size=block_size)
        self._k: dict[int, Tensor] = {}  # layer -> blocks H_kv block_size D, rotated
        self._v: dict[int, Tensor] = {}  # layer -> blocks H_kv block_size D

    def write(self, layer: int, blocks: Tensor, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [N, H_kv, T, D] into slots given by `blocks` and `places` [N, T]."""
        for held, new in ((self._k, k), (self._v, v)):
            if layer not in held:
                # Not a tensor of inference mode: it is written outside of it as well.
                with torch.inference_mode(False):
                    room = (self.pool.blocks, new.shape[1], self.pool.block_size, new.shape[3])
                    held[layer] = torch.zeros(room, dtype=new.dtype, device=new.device)
            held[layer][blocks, :, places] = new.transpose(1, 2).to(held[layer].dtype)

    def gather(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, H_kv, entries * block_size, D] behind a padded table [N, entries]."""
        k, v = (held[layer][table].transpose(1, 2).flatten(2, 3) for held in (self._k, self._v))
        return k, v

    def copied(self, source: int, target: int) -> None:
        for held in (*self._k.values(), *self._v.values()):
            held[target] = held[source]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers used so far."""
        return sum(held[0].numel() * held.element_size() for held in (*self._k.values(), *self._v.values()))

    def swap_out(self, name: str) -> Swapped:
        """Move a sequence to main memory and free its blocks."""
        table = self.table(name)
        held = [block for block in table.blocks if block is not None]
        tensors = {i: (self._k[i][held].cpu(), self._v[i][held].cpu()) for i in self._k}
        self.close(name)
        event("pages.swap_out", sequence=name, blocks=len(held))
        return Swapped(table, tensors)

    def swap_in(self, name: str, swapped: Swapped) -> None:
        """Bring it back, into whatever blocks are free (`ExhaustedError` if too few); it shares none of them."""
        table = swapped.table
        count = sum(block is not None for block in table.blocks)
        if count > len(self.pool.free):
            raise ExhaustedError(
                f"{name!r} needs {count} blocks, and {len(self.pool.free)} of {self.pool.blocks} are free"
            )
        self.open(name)
        new = [self._fresh(name) for _ in range(count)]
        self.tables[name] = table
        size, coming = self.pool.block_size, iter(new)
        table.blocks = [None if block is None else next(coming) for block in table.blocks]
        for number, block in enumerate(table.blocks):
            if block is not None:
                tokens = table.tokens[number * size : (number + 1) * size]
                self.contents[block, : len(tokens)] = tokens
        for layer, (k, v) in swapped.tensors.items():
            self._k[layer][new], self._v[layer][new] = k.to(self._k[layer].device), v.to(self._v[layer].device)
        event("pages.swap_in", sequence=name, blocks=count)


@dataclass(slots=True)
class _Plan:
    """Where one pass writes and reads, the same in every layer."""

    blocks: Tensor  # N T
    places: Tensor  # N T
    table: Tensor  # N entries
    slots: int  # S, of the longest row
    q_positions: Positions
    mask: Tensor | None  # N 1 T S
    causal: bool


class Paged(Cache):
    """A row for each of the sequences `names`, which are open in `pages`; they may differ in length. Tokens that were
    not appended to their table before a pass are appended without a name, so that their blocks cannot be found again.
    """

    def __init__(self, pages: Pages, names: Sequence[str]) -> None:
        super().__init__()
        if not names or len(set(names)) < len(names):
            raise ValueError(f"names must be different sequences, one at least, not {list(names)}")
        self.pages, self.names = pages, tuple(names)
        self.tables = [pages.table(name) for name in names]
        self.seen = max(table.written for table in self.tables)
        self._plan: _Plan | None = None  # of the pass under way

    @classmethod
    def alone(cls, *, blocks: int, block_size: int) -> Paged:
        """A pool for one sequence, called "text"."""
        pages = Pages(blocks, block_size=block_size)
        pages.open("text")
        return cls(pages, ["text"])

    def extend(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> View:
        N, _, T, _ = k.shape
        if len(self.names) != N:
            raise ValueError(f"ids must have a row for each of the {len(self.names)} sequences, not {N}")
        if self._plan is None:
            self._plan = self._make_plan(T, k.device)
        plan = self._plan
        self.pages.write(layer, plan.blocks, plan.places, rope.rotate(k, plan.q_positions), v)
        all_k, all_v = self.pages.gather(layer, plan.table)
        return View(all_k[:, :, : plan.slots], all_v[:, :, : plan.slots], plan.q_positions, plan.mask, plan.causal)

    def _make_plan(self, T: int, device: torch.device) -> _Plan:
        starts = [table.written for table in self.tables]
        for name, table, start in zip(self.names, self.tables, starts, strict=True):
            if (missing := start + T - len(table.tokens)) > 0:
                self.pages.append(name, [UNTOLD] * missing)
        size, S = self.pages.pool.block_size, max(starts) + T
        blocks = [
            [table.blocks[at // size] for at in range(i, i + T)] for i, table in zip(starts, self.tables, strict=True)
        ]
        entries = [[block or 0 for block in table.blocks] for table in self.tables]
        longest = max(map(len, entries))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in entries], device=device)  # N entries
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(T, device=device)  # N T
        whole = not any(table.dropped for table in self.tables)
        same = len(set(starts)) == 1
        mask = None
        if not (whole and same and (T == 1 or starts[0] == 0)):
            mask = torch.arange(S, device=device) <= positions[..., None]  # N T S
            for row, each in enumerate(self.tables):
                mask[row, :, [at for at in each.dropped if at < S]] = False
            mask = mask[:, None]
        return _Plan(
            torch.tensor(blocks, device=device), positions % size, padded, S,
            range(starts[0], S) if same else positions, mask, mask is None and T > 1,
        )  # fmt: skip

    def advance(self, count: int) -> None:
        for table in self.tables:
            table.written += count
        self.seen = max(table.written for table in self.tables)
        self._plan = None

    def drop(self, positions: Iterable[int]) -> list[int]:
        """Evict single tokens of the only row; returns the blocks that came free."""
        if len(self.names) > 1:
            raise ValueError(f"drop needs a cache of one sequence, and this one has {len(self.names)}")
        return self.pages.drop(self.names[0], positions)

    def kept(self, layer: int) -> Tensor:
        rows = [[at for at in range(table.written) if at not in table.dropped] for table in self.tables]
        longest = max(map(len, rows))
        kept = torch.tensor([row + [-1] * (longest - len(row)) for row in rows], dtype=torch.long)
        return kept if len(rows) > 1 else kept[0]

    @property
    def nbytes(self) -> int:
        """Of the blocks that these sequences occupy, a shared one counted once."""
        held = {block for table in self.tables for block in table.blocks if block is not None}
        return len(held) * self.pages.block_bytes
