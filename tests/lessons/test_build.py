"""Lesson build: what does not go together is said at its knob, figures hang together, and a browser keeps its tries."""

import json

import numpy as np
import pytest

import lessons.build as lesson
from app.runs import execute
from engine.generate import generate
from engine.recording import record
from engine.speculate.loop import GIVEN
from lessons.knobs import check
from lessons.models import REAL
from lessons.stacking import BYTES, FLOPS, PERPLEXITY, ROWS, SHARES, STEPS, USED, bench, chosen, refuse, stack
from tests.lessons.pages import INSIDE, QUICK, address, open_done

LABELS = {spec["label"] for spec in lesson.Turn.spec()}


def turned(**values):
    knobs, problems = check(lesson.Turn, {**QUICK["build"], **values})
    assert problems == []
    return knobs


@pytest.mark.parametrize(
    "values",
    [
        {"model": REAL, "heads": "MQA"},
        {"model": REAL, "experts": True},
        {"model": REAL, "mend": 10},
        {"experts": True, "heads": "GQA"},
        {"mend": 10, "bits": 16},
        {"guess": True, "cache": "window"},
        {"guess": True, "cache_bits": 4},
    ],
)
def test_what_cannot_stand_together_is_said_at_a_knob(values):
    with pytest.raises(ValueError, match=r"\.$") as said:
        refuse(turned(**values))
    assert any(str(said.value).startswith(f"{label} ") for label in LABELS)


@pytest.mark.parametrize("values", [{}, {"guess": True}, {"mend": 10, "prune": "2:4"}, {"experts": True, "bits": 16}])
def test_what_can_is_not_refused(values):
    refuse(turned(**values))


@pytest.fixture(scope="module")
def whole():
    values = {**QUICK["build"], "cache": "sinks", "budget": 32, "cache_bits": 4, "heads": "GQA"}
    return execute("build", values)


def test_a_ledger_adds_up(whole):
    rows, parts, used = (whole.track(name).latest() for name in (ROWS, SHARES, USED))
    on = np.flatnonzero(used)
    assert [STEPS[i] for i in on] == ["original", "heads", "rounded", "kept", "cached"]
    assert np.isnan(np.delete(rows, on, 0)).all()
    assert np.isfinite(rows[on]).all()
    np.testing.assert_allclose(parts[on].sum(1), rows[on, BYTES])
    assert (np.diff(rows[on, BYTES]) < 0).all(), "each of these steps saves bytes"
    assert rows[on[2], PERPLEXITY] != rows[on[1], PERPLEXITY]
    assert parts[on[1], 1] == parts[0, 1] / 4, "two key heads of eight"
    f = lesson.facts(whole)
    assert f["times"] == pytest.approx(rows[0, BYTES] / rows[on[-1], BYTES])
    assert 1 <= f["within"] <= f["times"]


def test_a_figure_opens_with_the_runs_numbers(whole):
    rows, used = (whole.track(name).latest() for name in (ROWS, USED))
    for row in range(len(STEPS)):
        for column in range(rows.shape[1]):
            opened = lesson.figure_cell(whole, turned(), {"row": row, "column": column})
            assert opened.title.startswith(lesson.ENTRIES[row].label)
            if used[row]:
                assert opened.values["here"] == rows[row, column]
            else:
                assert "not in this stack" in opened.note


def test_from_where_on_all_is_ten_times_smaller(whole):
    parts, used, tokens = whole.track(SHARES).latest(), whole.track(USED).latest(), whole.meta["tokens"]
    told = lesson._ten(parts, used, tokens, kept=32)
    far = float("".join(c for c in told if c.isdigit()))
    (weights, cache), (lean, held) = parts[0], parts[np.flatnonzero(used)[-1]]
    assert (weights + cache / tokens * far) / (lean + held) == pytest.approx(10, rel=0.01)


def test_a_model_that_guesses_works_more_for_a_token_and_says_the_same():
    knobs = turned(guess=True, bits=16)
    from engine.checkpoints import load

    model, tokenizer = load("toy")
    at = bench(knobs, model, tokenizer)
    assert [STEPS[row] for row, _ in stack(knobs, at)] == [STEPS[i] for i in np.flatnonzero(chosen(knobs)) if i]
    (_, lean), *_ = stack(knobs, at)
    at.count(0, at.original, 0.0, 150)
    at.count(8, lean, 0.0, 150)
    assert at.rows[8, FLOPS] > at.rows[0, FLOPS] * 0.9
    say = lean.say(at.prompt, steps=20)
    with record(keep={GIVEN: {}}):
        assert [say() for _ in range(20)] == list(generate(model, at.prompt, steps=20))


TRIES = f"{INSIDE}.querySelectorAll('.tries-item').length"
WORDS = f"[...{INSIDE}.querySelectorAll('.tries-words')].map((node) => node.textContent)"


@pytest.mark.browser
def test_a_browser_keeps_its_tries_and_opens_them_again(server, chromium_page):
    watched, page = chromium_page, chromium_page.page
    open_done(watched, address(server, "build"))
    watched.until(f"{TRIES} === 1")
    page.locator("#knob-bits").select_option(label="8")
    watched.until(f"{TRIES} === 2", seconds=120)
    words = page.evaluate(WORDS)
    assert "weights 8 bits" in words[0]
    assert "weights 4 bits" in words[1]
    page.reload()
    watched.until(f"window.leanscope?.ready && {TRIES} === 2", seconds=120)
    page.get_by_role("button", name="Open the try").click()
    watched.until(f"{INSIDE}.querySelector('#knob-bits').selectedOptions[0].label === '4'")
    here = f"{INSIDE}.querySelector('.tries-item.here .tries-words')"
    watched.until(f"{here}?.textContent.includes('weights 4')", seconds=120)
    assert page.evaluate(TRIES) == 2
    assert json.loads(page.evaluate("localStorage.getItem('leanscope-tries-build')"))[0]["x"] > 0

    # A conflict is told at its knob, and gone with the next run.
    page.locator("#knob-cache").select_option(label="A window")
    page.locator("#knob-guess").click()
    error = f"{INSIDE}.querySelector('#error-guess')"
    watched.until(f"!{error}.hidden && {error}.textContent.startsWith('Guess ahead')", seconds=120)
    page.locator("#knob-guess").click()
    watched.until(f"{error}.hidden", seconds=120)

    page.get_by_role("button", name="Clear all").click()
    watched.until(f"{TRIES} === 0")
    page.evaluate("localStorage.setItem('leanscope-tries-build', '[{\"x\": \"much\"}, 3, null]')")
    page.reload()
    watched.until(f"window.leanscope?.ready && {TRIES} === 1", seconds=120)
    assert watched.wrongs == []
