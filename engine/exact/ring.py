"""Ring Attention: each device keeps a block of the text, and the blocks of keys and values go round.

Liu et al. (arXiv:2310.01889). Real processes through `torch.distributed`: gloo on the CPU, NCCL where there is a GPU
for each. After n steps every rank has met every block; it held its queries and two blocks of keys and values, never the
whole. Who computes what is in `schedule`, what a rank does in `rank`, the processes in `workers`.
Paper -> here: hosts = ranks, block = what a rank keeps; c = Tr tokens a rank.
Shapes: q, k, v [B, H, T, D] -> output [B, H, T, D], lse [B, H, T], in the dtype of q, which is float32 or float64.
Errors: ValueError for what can't be laid out, RankDied (a RuntimeError) when a process ends.
Deviations: a block is computed with its scores written down, not in tiles of SRAM; the feed-forward network, which the
paper computes in blocks too, is not part of it. `link` is a simulated speed: a transfer sleeps until bytes / speed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.exact.schedule import Turn, blocks, inverse, permutation, schedule
from engine.exact.workers import Pool, Progress
from engine.recording import event, note, recording_on, site, step, tap

HOLDS = site("ring.holds", "whose block of keys and values each rank holds")
MATRIX = site("ring.matrix", "chunk by chunk: the rank that has finished it, -1 not yet, -2 masked for good")
CELLS = site("ring.cells", "pairs of a query and a key that each rank computes in the step", low=0.0)
COMPUTE = site("ring.compute", "seconds that each rank computed in the step", unit="s", low=0.0)
TRANSFER = site("ring.transfer", "seconds that the next block was on its way to each rank", unit="s", low=0.0)
EXPOSED = site("ring.exposed", "seconds of that transfer in which the rank did not compute", unit="s", low=0.0)


@dataclass(frozen=True)
class Span:
    """Something that a rank did, in seconds since the first began; `block` is whose keys and values, `work` the seconds
    of processor time that computing took: less than it lasted where processes share a core."""

    kind: str  # compute, send, recv
    step: int
    block: int
    begin: float
    end: float
    work: float = 0.0

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Rank:
    """What one process reported. Bytes of `memory`: q, output, log-sum-exp and two blocks; `scores` beside."""

    spans: tuple[Span, ...]
    sent: int
    computed: int
    skipped: int
    memory: int
    scores: int

    @property
    def busy(self) -> float:
        return sum(span.seconds for span in self.spans if span.kind == "compute")

    @property
    def work(self) -> float:
        """Seconds of processor time."""
        return sum(span.work for span in self.spans)


@dataclass(frozen=True)
class Ring:
    """The answer in the order of the text, and what every rank did. `simulated`: transfers slept to a `link` speed."""

    output: Tensor
    lse: Tensor
    ranks: tuple[Rank, ...]
    plan: list[list[Turn]]
    backend: str
    simulated: bool

    @property
    def seconds(self) -> float:
        """From the first rank's start to the last one's end."""
        return max(span.end for rank in self.ranks for span in rank.spans)

    @property
    def idle(self) -> list[float]:
        """Seconds of that in which each rank did not compute."""
        return [self.seconds - rank.busy for rank in self.ranks]


IDLE = 60.0  # seconds without a call after which the processes of the shared pool end
_shared: list[Pool] = []
_sharing = threading.Lock()


def shared_pool() -> Pool:
    """The one pool of this process, which serves all callers in turn; it keeps nothing of a call."""
    with _sharing:
        if not _shared:
            _shared.append(Pool(idle=IDLE))
        return _shared[0]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ranks: int,
    causal: bool = True,
    layout: str = "contiguous",
    link: float | None = None,
    overlap: bool = True,
    pool: Pool | None = None,
    progress: Progress | None = None,
) -> Ring:
    """softmax(q kᵀ/√D) v by `ranks` processes. A recording gets one step a step of the ring.

    `link`: simulated bytes a second of each connection; None: as fast as it is. Without `overlap` a rank waits for
    its next block before it computes.
    """
    if q.dim() != 4 or not q.shape == k.shape == v.shape or q.dtype not in (torch.float32, torch.float64):
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k and v must be float [batch, head, token, width] of the same sizes, not {shapes}")
    if link is not None and not 0 < link < float("inf"):
        raise ValueError(f"link must be bytes a second above 0, or None for no limit, not {link}")
    T = q.shape[2]
    plan = schedule(T, ranks=ranks, layout=layout, causal=causal)
    kept = blocks(T, ranks=ranks, layout=layout)
    order = permutation(T, ranks=ranks, layout=layout)
    backend = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks > 1 else "gloo"
    sizes = [sum(stop - start for start, stop in block) for block in kept]
    parts = [t.detach().cpu()[:, :, order].split(sizes, 2) for t in (q, k, v)]
    jobs: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        (
            {"rank": rank, "ranks": ranks, "blocks": kept, "causal": causal, "link": link, "overlap": overlap,
             "backend": backend},
            {name: part[rank].contiguous() for name, part in zip("qkv", parts, strict=True)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    answers = (pool or shared_pool()).run(jobs, progress=progress)
    back = inverse(order)
    output = torch.cat([found["output"] for _, found in answers], 2)[:, :, back]
    lse = torch.cat([found["lse"] for _, found in answers], 2)[:, :, back]
    began = min(happened["begin"] for header, _ in answers for happened in header["events"])
    ring = Ring(
        output.to(q.device),
        lse.to(q.device),
        tuple(_rank(header, began) for header, _ in answers),
        plan,
        backend,
        link is not None,
    )
    if recording_on(HOLDS):
        _show(ring, kept, causal)
    return ring


def _rank(header: dict[str, Any], began: int) -> Rank:
    spans = [
        Span(e["kind"], e["step"], e["block"], (e["begin"] - began) / 1e9, (e["end"] - began) / 1e9,
             e.get("work", 0) / 1e9)
        for e in header["events"]
    ]  # fmt: skip
    return Rank(tuple(spans), *(header[name] for name in ("sent", "computed", "skipped", "memory", "scores")))


def _show(ring: Ring, kept: list[list[tuple[int, int]]], causal: bool) -> None:
    """What happened, a step of the ring at a time, after the fact."""
    chunks = sorted(chunk for block in kept for chunk in block)
    place = {chunk: i for i, chunk in enumerate(chunks)}
    matrix = np.full((len(chunks), len(chunks)), -1, np.int32)
    if causal:
        matrix[np.triu_indices(len(chunks), 1)] = -2
    note(ranks=len(ring.ranks), backend=ring.backend, simulated=ring.simulated, causal=causal, chunks=chunks,
         sent=[rank.sent for rank in ring.ranks], memory=[rank.memory for rank in ring.ranks],
         idle=ring.idle, seconds=ring.seconds)  # fmt: skip
    for number in range(len(ring.ranks)):
        turns = [turns[number] for turns in ring.plan]
        for turn in turns:
            for queries, keys in turn.computed:
                matrix[place[queries], place[keys]] = turn.rank
        tap(HOLDS, np.array([turn.block for turn in turns], np.int32), "rank")
        tap(MATRIX, matrix, "query key")
        tap(CELLS, np.array([turn.cells for turn in turns], np.int32), "rank")
        spent = {kind: np.zeros(len(turns)) for kind in ("compute", "recv", "exposed")}
        for i, rank in enumerate(ring.ranks):
            now = {span.kind: span for span in rank.spans if span.step == number}
            for span in now.values():
                event(f"ring.{span.kind}", rank=i, block=span.block, begin=span.begin, end=span.end)
            spent["compute"][i] = now["compute"].seconds
            if "recv" in now:
                recv, compute = now["recv"], now["compute"]
                hidden = max(0.0, min(recv.end, compute.end) - max(recv.begin, compute.begin))
                spent["recv"][i], spent["exposed"][i] = recv.seconds, recv.seconds - hidden
        for name, kind in ((COMPUTE, "compute"), (TRANSFER, "recv"), (EXPOSED, "exposed")):
            tap(name, spent[kind].astype(np.float32), "rank")
        step()
