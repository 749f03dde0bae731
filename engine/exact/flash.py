r"""FlashAttention: exact attention tile by tile, with a softmax that is kept up to date, so that no matrix is stored.

Dao et al. (arXiv:2205.14135), Algorithm 1; FlashAttention-2 (arXiv:2307.08691), Algorithm 1. For each tile S = QKᵀ/√d

    m' = max(m, rowmax S),   P = exp(S - m'),   l' = e^{m-m'} l + rowsum P,   O' = e^{m-m'} O + P V

and at the end O/l, with L = m + log l. Paper -> here: Br, Bc = queries and keys of a tile; M = `sram` (bytes here,
values there); order "keys": all queries for each block of keys (first paper), "queries": the other way (second).
Shapes: q, k, v [B, H, N, D] -> output [B, H, N, D], lse [B, H, N], float32 or better.
Errors: ValueError for shapes that differ, tiles below 1, an SRAM that can't hold a tile.
Deviations: O is kept undivided in both orders, as in the second paper; what is tapped and counted as O is O/l. A block
of queries starts in SRAM, so its first visit reads no O, m, l. m and l count as values of q's size. Nothing here is
fast: the loop is Python, and the machine has no SRAM of its own; bytes are counted, not timed (see `fused`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.cost import flash_peak, naive_peak
from engine.recording import event, note, recording_on, site, step, tap

ORDERS = ("keys", "queries")

TILE = site("flash.tile", "the tile's first query, the query after its last, its first key, the key after its last")
SCORES = site("flash.scores", "the scores of the tile: all of the matrix that is ever held", symbol="S_ij")
MAX = site("flash.max", "the largest score that each query has met", symbol="m")
SUM = site("flash.sum", "the sum of exp(score - m) over the keys that each query has met", symbol="l", low=0.0)
OUTPUT = site("flash.output", "the answer of the tile's queries as if the keys so far were all", symbol="O_i")
ALL = site("flash.output.all", "the answer of every query as if the keys it has met were all", symbol="O")
ROW = site("flash.row", "the answer of the chosen query as if the keys so far were all", symbol="O_i")
MET = site("flash.met", "how many keys each query has met", low=0.0)
MOVED = site("flash.moved", "bytes between HBM and SRAM so far, of one head", unit="bytes", low=0.0)
NAIVE = site("flash.naive", "bytes that standard attention moves for that part of the matrix", unit="bytes", low=0.0)
HELD = site("flash.sram", "bytes in SRAM during the tile", unit="bytes", low=0.0)


@dataclass(frozen=True)
class Tile:
    """Queries `rows` by keys `columns`; `masked` when no query may see any of the keys."""

    rows: slice
    columns: slice
    masked: bool

    @property
    def height(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def width(self) -> int:
        return int(self.columns.stop - self.columns.start)


@dataclass(frozen=True)
class Flash:
    """The answer, and what was counted on the way: bytes of one head, tiles of all."""

    output: Tensor  # B H N D
    lse: Tensor  # B H N
    moved: int
    naive_moved: int
    sram: int  # the most in SRAM at a time, the scores of the tile included
    peak: int  # the most in HBM
    naive_peak: int
    computed: int
    skipped: int


def choose_blocks(sram: int, d: int, *, value_bytes: int = 4) -> tuple[int, int]:
    """(Br, Bc) for `sram` bytes as in the paper: Bc = M/4d, Br = min(Bc, d), M in values.

    Q, K, V and O get a quarter each; the scores of the tile, another quarter at most, are left out. The paper rounds
    M/4d up, and may so ask for a row more than there is room for: here it is rounded down.
    """
    if d < 1 or value_bytes < 1:
        raise ValueError(f"d and value_bytes must be above 0, not {d} and {value_bytes}")
    values = sram // value_bytes
    if values < 4 * d:
        raise ValueError(
            f"sram must hold a row of Q, K, V and O, {4 * d * value_bytes} bytes at head width {d}, not {sram}"
        )
    Bc = values // (4 * d)
    return min(Bc, d), Bc


def tiles(N: int, *, Br: int, Bc: int, causal: bool, order: str = "keys") -> Iterator[Tile]:
    """Every tile of the N by N matrix in the order of the sweep, the last of a row or column cut to what is left."""
    if min(N, Br, Bc) < 1 or order not in ORDERS:
        raise ValueError(f"N, Br and Bc must be above 0 and order one of {ORDERS}, not {N, Br, Bc, order}")
    rows = [slice(a, min(N, a + Br)) for a in range(0, N, Br)]
    columns = [slice(a, min(N, a + Bc)) for a in range(0, N, Bc)]
    pairs = ((r, c) for c in columns for r in rows) if order == "keys" else ((r, c) for r in rows for c in columns)
    for r, c in pairs:
        yield Tile(r, c, causal and c.start >= r.stop)


def tile_scores(q: Tensor, k: Tensor, tile: Tile, *, causal: bool) -> Tensor:
    """S_ij of q, k [..., N, D]: [..., height, width], -inf where a query may not look."""
    scores = q[..., tile.rows, :] @ k[..., tile.columns, :].mT / q.shape[-1] ** 0.5
    if causal and tile.columns.stop - 1 > tile.rows.start:
        rows = torch.arange(tile.rows.start, tile.rows.stop, device=q.device)[:, None]
        columns = torch.arange(tile.columns.start, tile.columns.stop, device=q.device)
        scores = scores.masked_fill(columns > rows, -torch.inf)
    return scores


def online_softmax(m: Tensor, l: Tensor, o: Tensor, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, l [..., R] and o [..., R, D], not yet divided by l, after the keys of one more tile.

    A row whose keys are all masked so far has m = -inf, and exp(-inf - -inf) would be NaN: such a row stays 0.
    """
    new = torch.maximum(m, scores.amax(-1))  # R
    safe = new.masked_fill(new == -torch.inf, 0.0)
    p = (scores - safe[..., None]).exp()  # R C
    shrink = (m - safe).exp()  # R, what the sums so far are worth under the new maximum
    return new, shrink * l + p.sum(-1), shrink[..., None] * o + p @ v


@torch.no_grad()
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    Br: int,
    Bc: int,
    causal: bool = True,
    order: str = "keys",
    sram: int | None = None,
    head: int = 0,
    row: int = -1,
    whole: bool = False,
) -> Flash:
    """softmax(q kᵀ/√D) v in tiles of Br by Bc. A recording gets one step a tile, the skipped too.

    Shown are the first text's `head` and its query `row`; `whole` adds every query's answer at every tile. `sram`:
    the blocks of Q, K, V and O must fit in so many bytes, as the paper counts.
    """
    _check(q, k, v, head, row)
    B, H, N, D = q.shape
    size = q.element_size()
    height, width = min(Br, N), min(Bc, N)
    blocks = 2 * (height + width) * D * size
    if sram is not None and blocks > sram:
        raise ValueError(f"sram must hold the blocks of Br={Br} and Bc={Bc}, {blocks} bytes, not {sram}")
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    m = q.new_full((B, H, N), -torch.inf)  # B H N
    l, o = torch.zeros_like(m), torch.zeros_like(q)  # B H N, B H N D
    met = torch.zeros(N, dtype=torch.int32)
    count = _Count(D, order)
    note(Br=Br, Bc=Bc, length=N, width=D, causal=causal, order=order, head=head, row=row % N, value_bytes=size)
    for tile in tiles(N, Br=Br, Bc=Bc, causal=causal, order=order):
        r, c = tile.rows, tile.columns
        scores = None
        if not tile.masked:
            scores = tile_scores(q, k, tile, causal=causal)
            m[..., r], l[..., r], o[..., r, :] = online_softmax(
                m[..., r], l[..., r], o[..., r, :], scores, v[..., c, :]
            )
            met[r] = torch.arange(r.start, r.stop).add(1).clamp(max=c.stop).int() if causal else c.stop
        count.add(tile)
        if recording_on(TILE):
            _show(tile, scores, m, l, o, met, head, row % N, whole)
        tap(MOVED, count.moved * size, "")
        tap(NAIVE, count.naive * size, "")
        tap(HELD, 0 if tile.masked else count.held(tile) * size, "")
        event("flash.tile", rows=[r.start, r.stop], columns=[c.start, c.stop], skipped=tile.masked)
        step()
    peaks = flash_peak(N, D, order=order) * size, naive_peak(N, D) * size
    output, lse = o / l[..., None], m + l.log()
    return Flash(output, lse, count.moved * size, count.naive * size, count.most * size, *peaks, count.computed,
                 count.skipped)  # fmt: skip


class _Count:
    """Values of one head between HBM and SRAM, added up tile by tile: of the tiles, and of standard attention."""

    def __init__(self, d: int, order: str) -> None:
        self.d, self.order = d, order
        self.moved = self.naive = self.most = self.computed = self.skipped = 0
        self._rows: set[int] = set()  # blocks of queries that were visited
        self._columns: set[int] = set()
        self._naive: set[tuple[str, int]] = set()

    def held(self, tile: Tile) -> int:
        """In SRAM: the blocks of Q, O, K, V, the scores, m and l."""
        return 2 * (tile.height + tile.width) * self.d + tile.height * tile.width + 2 * tile.height

    def add(self, tile: Tile) -> None:
        row, column = tile.rows.start, tile.columns.start
        self._add_naive(tile)
        if tile.masked:
            self.skipped += 1
            return
        self.computed += 1
        self.most = max(self.most, self.held(tile))
        first = row not in self._rows
        if self.order == "keys":
            self.moved += 0 if column in self._columns else 2 * tile.width * self.d  # K, V in
            self.moved += tile.height * self.d + (0 if first else tile.height * (self.d + 2))  # Q; O, m, l in
            self.moved += tile.height * (self.d + 2)  # O, m, l out
        else:
            self.moved += 2 * tile.width * self.d + (tile.height * (2 * self.d + 1) if first else 0)  # Q in; O, L out
        self._rows.add(row)
        self._columns.add(column)

    def _add_naive(self, tile: Tile) -> None:
        """The tile's part of S out and in, P out and in; Q and O with a first row, K and V with a first column."""
        self.naive += 4 * tile.height * tile.width
        for where, part in (("row", tile.rows), ("column", tile.columns)):
            if (where, part.start) not in self._naive:
                self._naive.add((where, part.start))
                self.naive += 2 * (part.stop - part.start) * self.d


def _show(
    tile: Tile, scores: Tensor | None, m: Tensor, l: Tensor, o: Tensor, met: Tensor, head: int, row: int, whole: bool
) -> None:
    r, c = tile.rows, tile.columns
    tap(TILE, torch.tensor([r.start, r.stop, c.start, c.stop], dtype=torch.int32), "edge")
    tap(MAX, m[0, head].float(), "query")
    tap(SUM, l[0, head].float(), "query")
    tap(MET, met, "query")
    so_far = o[0, head] / l[0, head, :, None].clamp(min=torch.finfo(l.dtype).tiny)  # N D, 0 before the first key
    tap(ROW, so_far[row].float(), "width")
    if scores is not None:
        tap(SCORES, scores[0, head].float(), "row column")
        tap(OUTPUT, so_far[r].float(), "row width")
    if whole:
        tap(ALL, so_far.float(), "query width")


def _check(q: Tensor, k: Tensor, v: Tensor, head: int, row: int) -> None:
    if q.dim() != 4 or not q.shape == k.shape == v.shape or not q.numel() or not q.is_floating_point():
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k and v must be [batch, head, token, width] of the same sizes above 0, not {shapes}")
    if not 0 <= head < q.shape[1] or not -q.shape[2] <= row < q.shape[2]:
        raise ValueError(f"head and row must be of {q.shape[1]} heads and {q.shape[2]} queries, not {head} and {row}")
