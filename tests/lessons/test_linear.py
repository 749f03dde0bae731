"""Lesson linear: the matrix is the sum of what was written, the implied attention that of the matrix."""

import numpy as np
import pytest

import lessons.linear as lesson
from app.runs import execute
from lessons.kernels import ERROR, ESTIMATE, KERNEL, KINDS
from lessons.recall import FOUND, PAIRS, TOLD, code, one_pair
from tests.lessons.pages import INSIDE, address, open_done


@pytest.fixture(scope="module", params=[{}, {"map": "none"}, {"decay": 0.9}, {"map": "positive", "features": 20}])
def run(request):
    return execute("linear", {"tokens": 24, **request.param})


def test_the_matrix_is_what_was_written_and_faded(run):
    gamma, S = run.meta["gamma"], 0.0
    for state, write in zip(run.stack(lesson.STATE), run.stack(lesson.WRITE), strict=True):
        S = gamma * S + write
        np.testing.assert_allclose(state, S, rtol=1e-4, atol=1e-4 * np.abs(S).max())


def test_shares_add_up_to_one_and_fade(run):
    implied, fade = run.stack(lesson.IMPLIED), run.stack(lesson.FADE)
    if run.meta["map"] != "none":
        np.testing.assert_allclose(implied.sum(1), 1, rtol=1e-5)
        assert implied.min() >= 0
    gamma = run.meta["gamma"]
    np.testing.assert_allclose(fade[10, :11], gamma ** np.arange(10, -1, -1.0), rtol=1e-5)


def test_the_matrix_never_grows_and_the_cache_does(run):
    held, cache = run.stack(lesson.HOLDS, of="matrix"), run.stack(lesson.HOLDS, of="cache")
    assert len(set(held.tolist())) == 1
    assert np.diff(cache).tolist() == [2 * run.meta["D"]] * 23
    assert run.meta["forms"] < 1e-12


def test_estimates_close_in_on_the_kernel():
    recording = execute("linear", {"tokens": 24, "map": "positive", "features": 128, "sharp": 0.4})
    kernel, made = recording.stack(KERNEL)[-1], recording.stack(ESTIMATE)
    off = np.square(made / kernel - 1).mean((1, 2))
    assert off[-1] < 0.05 < off[0]
    for kind in KINDS:
        errors = recording.stack(ERROR, kind=kind)
        assert errors[-1] < errors[0] / 5
    for mean, doubt in recording.meta["bias"].values():
        assert abs(mean) < 4 * doubt


def test_recall_has_a_point_for_each_number_of_pairs(run):
    assert run.stack(TOLD).tolist() == list(PAIRS)
    assert "toy" in run.meta["recalled"]
    for name in lesson.RECALL:
        found = run.stack(FOUND, model=name)
        assert len(found) == (len(PAIRS) if name in run.meta["recalled"] else 1)
    assert run.stack(FOUND, model="toy")[0] > 0.5


def test_questions_are_as_long_as_asked_and_hold_their_pairs():
    from engine.toyland.tokenizer import Tokenizer

    tokenizer = Tokenizer()
    assert len(one_pair(6, seed=1).prompt.split()) > len(one_pair(3, seed=1).prompt.split())
    lengths = [len(tokenizer.prompt(code(tokenizer, toy=True, tokens=n, seed=3).prompt)) for n in (80, 150)]
    assert abs(lengths[0] - 80) < 10
    assert abs(lengths[1] - 150) < 10


@pytest.mark.browser
def test_a_faded_cell_is_opened_by_keyboard(server, chromium_page):
    open_done(chromium_page, address(server, "linear", beat=2, step=23, tokens=24, decay=0.9))
    chromium_page.page.keyboard.press("End")
    canvas = chromium_page.page.locator("[data-view=implied] canvas").first
    canvas.focus()
    chromium_page.page.keyboard.press("ArrowDown")
    chromium_page.page.keyboard.press("Enter")
    chromium_page.until(f"/share by the matrix/.test({INSIDE}.textContent)")
