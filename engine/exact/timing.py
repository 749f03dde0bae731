"""How long a ring would take if every rank had a device of its own: measured work, a link of some speed, nothing run.

Processes that share cores wait for each other, and a clock then tells more of the machine than of the ring. Here the
seconds of work are measured, and their order is played through by the rules of Ring Attention (Liu et al.,
arXiv:2310.01889): a block leaves and the next comes in while a rank computes; it goes on when both are through.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.exact.ring import Span


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
