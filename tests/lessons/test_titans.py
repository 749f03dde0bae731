"""Lesson titans: facts are learnt when told, changed ones unwritten, and a text that will not do gets a sentence."""

import numpy as np
import pytest

import lessons.titans as lesson
from app.runs import execute, findings
from engine.mixers.following import SURPRISE
from lessons.knobs import check
from lessons.reading import COURSE, FILLER, FOUND, course_cell


@pytest.fixture(scope="module")
def run():
    return execute("titans", {})


def test_a_fact_is_unknown_before_it_is_told_and_known_after(run):
    course = run.stack(COURSE)
    for n, (_, _, t) in enumerate(run.meta["told"]):
        assert course[t, n] > course[t - 1, n] + 0.2
    told = {(key, value): n for n, (key, value, _) in enumerate(run.meta["told"])}
    keys = [key for key, _ in told]
    changed = next(n for n, (key, _) in enumerate(told) if keys.count(key) > 1)
    assert course[-1, changed] < course[30, changed] - 0.2


def test_surprise_falls_on_repetition_and_a_step_too_large_overshoots(run):
    claims = {c["text"]: c for c in findings(lesson.LESSON, run).claims}
    assert claims["What was seen before surprises less"]["verdict"] == "agrees"
    wild = execute("titans", {"rate": 0.5, "momentum": 0.9, "forgetting": 0.0})
    assert wild.stack(SURPRISE)[-10:].mean() > 5 * run.stack(SURPRISE)[-10:].mean()
    assert np.isfinite(wild.stack(COURSE)).all()


def test_codes_are_asked_for_at_every_distance(run):
    assert run.stack(FOUND, of="toy").shape == (len(FILLER),)
    assert (run.stack(FOUND, of="toy") > 0.9).all()
    assert run.stack(FOUND, of="window")[-1] < 0.9


def test_a_cell_tells_what_a_word_did_to_a_fact(run):
    knobs, _ = check(lesson.Turn, {})
    opened = course_cell(run, knobs, {"query": 4, "fact": 0})
    assert opened.values["now"] > opened.values["before"] + 0.2
    with pytest.raises(ValueError, match="no fact 99"):
        course_cell(run, knobs, {"query": 4, "fact": 99})


@pytest.mark.parametrize(("own", "says"), [
    ("anna", "at least 4"), ("the quokka likes the owl", "Toyland has no word 'quokka'"),
])  # fmt: skip
def test_a_text_that_will_not_do_gets_a_sentence(own, says):
    with pytest.raises(ValueError, match=says):
        execute("titans", {"text": "own", "own": own})


@pytest.mark.parametrize("own", ["the the the the", ". . . . .", "anna likes the owl"])
def test_any_other_text_runs(own):
    recording = execute("titans", {"text": "own", "own": own})
    found = findings(lesson.LESSON, recording)
    assert found.facts
    assert all("could not" not in claim["why"] for claim in found.claims)
