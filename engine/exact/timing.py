"""How long a ring would take if every rank had a device of its own: measured work, a link of some speed, nothing run.

Processes that share cores wait for each other, and a clock then tells more of the machine than of the ring. Here the
seconds of work are measured, and their order is played through by the rules of Ring Attention (Liu et al.,
arXiv:2310.01889): a block leaves and the next comes in while a rank computes; it goes on when both are through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.exact.ring import Span
from engine.exact.schedule import Chunk, Turn

WAITS, COMPUTES, DONE = 1, 2, 3


def played(
    work: Sequence[Sequence[float]], carried: Sequence[Sequence[int]], *, link: float | None, overlap: bool = True
) -> list[list[Span]]:
    """Spans of every rank. `work[rank][step]`: seconds of computing; `carried[rank][step]`: bytes that it passes on.

    `link`: bytes a second of each connection, None for one that takes no time. A transfer begins when both its ends
    have come to that step. Without `overlap` a rank computes when its transfers are through.
    """
    ranks = len(work)
    if not ranks or any(len(row) != ranks for row in work) or any(len(row) != ranks - 1 for row in carried):
        raise ValueError(f"work must be seconds of {ranks} steps for each of {ranks} ranks, carried bytes of one less")
    if link is not None and not 0 < link < float("inf"):
        raise ValueError(f"link must be bytes a second above 0, or None for no limit, not {link}")
    free = [0.0] * ranks  # when each has done with the step before
    lanes: list[list[Span]] = [[] for _ in range(ranks)]
    for step in range(ranks):
        last = step == ranks - 1
        # sent[rank] is the passage from rank to rank + 1
        begun = [max(free[rank], free[(rank + 1) % ranks]) for rank in range(ranks)]
        sent = [
            begun[rank] + (0.0 if last or link is None else carried[rank][step] / link) for rank in range(ranks)
        ]  # fmt: skip
        through = []
        for rank in range(ranks):
            block, before = (rank - step) % ranks, (rank - 1) % ranks
            moved = free[rank] if last else max(sent[rank], sent[before])
            begin = free[rank] if overlap else moved
            end = begin + work[rank][step]
            lanes[rank].append(Span("compute", step, block, begin, end, work[rank][step]))
            if not last:
                lanes[rank].append(Span("send", step, block, begun[rank], sent[rank]))
                lanes[rank].append(Span("recv", step, (block - 1) % ranks, begun[before], sent[before]))
            through.append(max(end, moved))
        free = through
    return lanes


def hidden(lane: Sequence[Span]) -> tuple[float, float]:
    """(seconds that blocks were on their way to this rank, those of them in which it computed)."""
    transfers = [span for span in lane if span.kind == "recv"]
    computing = [span for span in lane if span.kind == "compute"]
    behind = sum(max(0.0, min(a.end, b.end) - max(a.begin, b.begin)) for a in transfers for b in computing)
    return sum(span.seconds for span in transfers), behind


@dataclass
class Moment:
    """What stands at one moment. `state`: WAITS, COMPUTES or DONE; `block`: whose block each rank works with; `coming`:
    whose is on its way to it (-1: none), and `share`, how far that has come; tiles (queries, keys) by their rank."""

    state: list[int]
    block: list[int]
    coming: list[int]
    share: list[float]
    finished: dict[tuple[Chunk, Chunk], int] = field(default_factory=dict)
    working: dict[tuple[Chunk, Chunk], int] = field(default_factory=dict)


def moment(lanes: Sequence[Sequence[Span]], plan: Sequence[Sequence[Turn]], t: float) -> Moment:
    """Who does what `t` seconds after the first began, from the spans of every rank and what it was to compute."""
    n = len(lanes)
    now = Moment([WAITS] * n, list(range(n)), [-1] * n, [0.0] * n)
    for rank, lane in enumerate(lanes):
        begun = [span for span in lane if span.kind == "compute" and span.begin <= t]
        for span in begun:
            over = span.end <= t
            now.block[rank] = span.block
            now.state[rank] = COMPUTES if not over else DONE if span.step == n - 1 else WAITS
            (now.finished if over else now.working).update(dict.fromkeys(plan[rank][span.step].computed, rank))
        for span in lane:
            if span.kind == "recv" and span.begin <= t and all(used.step <= span.step for used in begun):
                now.coming[rank] = span.block
                now.share[rank] = min(1.0, (t - span.begin) / span.seconds) if span.seconds > 0 else 1.0
    return now
