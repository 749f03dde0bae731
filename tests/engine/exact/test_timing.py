"""A ring played through by hand: what is hidden, who waits."""

from itertools import pairwise

import pytest

from engine.exact.schedule import idle_share, schedule
from engine.exact.timing import COMPUTES, DONE, WAITS, hidden, moment, played


def seconds(lanes):
    return max(span.end for lane in lanes for span in lane)


def test_a_transfer_shorter_than_the_work_is_hidden_and_a_longer_one_is_not():
    work, carried = [[1.0, 1.0], [1.0, 1.0]], [[100], [100]]
    quick = played(work, carried, link=200.0)
    assert seconds(quick) == 2.0
    assert hidden(quick[0]) == (0.5, 0.5)
    slow = played(work, carried, link=50.0)
    assert seconds(slow) == 3.0
    assert hidden(slow[0]) == (2.0, 1.0)
    assert seconds(played(work, carried, link=50.0, overlap=False)) == 4.0
    assert hidden(played(work, carried, link=50.0, overlap=False)[1]) == (2.0, 0.0)
    assert seconds(played(work, carried, link=None)) == 2.0


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_every_block_comes_by_once_and_nobody_waits_less_than_the_cells_say(ranks, layout):
    plan = schedule(16 * ranks, ranks=ranks, layout=layout)
    lanes = played([[float(turn.cells) for turn in turns] for turns in plan], [[1] * (ranks - 1)] * ranks, link=None)
    for rank, lane in enumerate(lanes):
        assert sorted(span.block for span in lane if span.kind == "compute") == list(range(ranks))
        assert sorted([rank, *(span.block for span in lane if span.kind == "recv")]) == list(range(ranks))
        computing = [span for span in lane if span.kind == "compute"]
        assert all(a.end <= b.begin for a, b in pairwise(computing))
    # Without a common beat a rank waits for its neighbours alone: never longer than were all to wait for the slowest.
    steps = [max(turns[step].cells for turns in plan) for step in range(ranks)]
    assert seconds(lanes) <= sum(steps)
    busy = sum(span.work for span in lanes[0])
    assert 1 - busy / seconds(lanes) <= idle_share(plan)[0] + 1e-12
    if layout == "zigzag":
        assert seconds(lanes) == sum(steps)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="work must be"):
        played([[1.0]], [[1]], link=None)
    with pytest.raises(ValueError, match="link must be"):
        played([[1.0]], [[]], link=0.0)


def test_a_moment_tells_who_computes_and_what_is_on_its_way():
    plan = schedule(8, ranks=2)
    lanes = played([[1.0, 1.0], [1.0, 1.0]], [[100], [100]], link=50.0)
    early = moment(lanes, plan, 0.5)
    assert (early.state, early.block, early.coming, early.share) == ([COMPUTES] * 2, [0, 1], [1, 0], [0.25, 0.25])
    assert early.working == {((0, 4), (0, 4)): 0, ((4, 8), (4, 8)): 1}
    waiting = moment(lanes, plan, 1.5)
    assert (waiting.state, waiting.share, waiting.working) == ([WAITS] * 2, [0.75] * 2, {})
    assert waiting.finished == early.working
    late = moment(lanes, plan, 2.5)
    assert (late.state, late.block, late.coming) == ([COMPUTES] * 2, [1, 0], [-1, -1])
    end = moment(lanes, plan, 3.0)
    assert end.state == [DONE] * 2
    assert end.finished == {**early.working, ((4, 8), (0, 4)): 1}, "the other quarter is masked"
