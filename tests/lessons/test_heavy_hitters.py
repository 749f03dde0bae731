"""The lesson on heavy hitters: what its pictures show obeys the laws of eviction."""

import functools

import numpy as np
import pytest

from app.runs import execute
from lessons.eviction import EVICTED, LABELS, RECENT, SCORED
from lessons.heavy_hitters import LESSON, Turn, survivor_cell
from lessons.models import TOY

POLICIES = [name for name in LABELS if name != "full"]


@functools.cache
def ran(**values):
    return execute("heavy-hitters", {"model": TOY, "tokens": 96, "steps": 6, **values})


@pytest.mark.parametrize("name", POLICIES)
def test_the_budget_is_never_exceeded_and_nothing_comes_back(name):
    recording = ran()
    budget, recent = recording.meta["budget"], recording.meta["recent"]
    for track in recording.tracks:
        if track.name != "hitters.codes" or track.index["strategy"] != name:
            continue
        before = None
        for t, (_, codes) in enumerate(track.rows()):
            held = codes != EVICTED
            assert (held.sum(1) == min(t + 1, budget)).all()
            if name in (*SCORED, "norm"):
                assert (codes[:, max(0, t + 1 - recent) :] == RECENT).all()
            if before is not None:
                assert not (held[:, :-1] & ~before).any()
            before = held


def test_gathered_attention_is_shown_for_what_is_held_and_sums_to_the_queries_at_first():
    recording = ran()
    codes = recording.track("hitters.codes", strategy="h2o", layer=1)
    worth = recording.track("hitters.worth", strategy="h2o", layer=1)
    for t, ((_, state), (_, scores)) in enumerate(zip(codes.rows(), worth.rows(), strict=True)):
        assert (scores[state == EVICTED] == 0).all()
        if t < recording.meta["budget"]:
            assert np.allclose(scores.sum(1), t + 1, atol=1e-3)


def test_texts_part_where_the_counted_words_end():
    recording = ran()
    alike = recording.track("hitters.alike").latest()
    for count, name in zip(alike, LABELS, strict=True):
        parts = recording.meta["parts"][name]
        assert count == (6 if parts < 0 else parts)


def test_means_let_later_tokens_be_heavy():
    facts = LESSON.facts(ran())
    assert facts["place_raw"] < facts["place_mean"]
    assert facts["held_full"] == 1.0


def test_a_cell_of_the_map_says_when_each_head_let_go():
    recording = ran()
    opened = survivor_cell(recording, Turn(model=TOY), {"layer": 1, "token": 12})
    told = dict(opened.lines)
    for _, codes in recording.track("hitters.codes", strategy="h2o", layer=1).rows():
        last = codes
    for head in range(recording.meta["kv_heads"]):
        assert told[f"head {head}"].startswith("evicted" if last[head, 12] == EVICTED else "held")


def test_a_prompt_shorter_than_the_budget_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"The prompt has \d+ tokens; a budget of 32 needs 40 at least\."):
        execute("heavy-hitters", {"model": TOY, "text": "own", "own": "the red ball is in the attic ."})
