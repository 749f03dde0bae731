"""Lesson ssm: what is drawn is the recurrence, asking changes nothing, and what is weighed is what is held."""

import numpy as np
import pytest

import lessons.memories as memories
import lessons.ssm as lesson
from app.runs import execute
from engine import checkpoints
from engine.recording import record
from lessons.knobs import check
from lessons.recall import FOUND, PAIRS, TOLD
from tests.lessons.pages import INSIDE, address, open_done

needs_mamba = pytest.mark.skipif(not checkpoints.available("mamba")[0], reason="not trained yet: mamba")


@pytest.fixture(scope="module")
def run():
    return execute("ssm", {"pairs": 5, "attention": 2, "which": 3})


@needs_mamba
def test_states_follow_the_recurrence_and_cells_say_so(run):
    off, spread, moved = memories.kept_rule(run)
    assert off < 1e-3
    assert spread < 1e-2
    assert moved > 0.05
    knobs, _ = check(lesson.Turn, {"layer": 2, "channel": 7})
    h = run.stack(memories.STATE, layer=2)
    for t in (0, 9):
        opened = memories.state_cell(run, knobs, {"query": t, "state": 3})
        before = h[t - 1, 7, 3] if t else 0.0
        np.testing.assert_allclose(opened.values["kept"] * before + opened.values["added"], h[t, 7, 3], atol=1e-5)
    with pytest.raises(ValueError, match="has not been read"):
        memories.state_cell(run, knobs, {"query": 999, "state": 0})


@needs_mamba
def test_states_never_grow_and_a_hybrid_grows_by_its_attention_layers(run):
    held = {name: run.stack(memories.HELD, of=name) for name in memories.MEMORIES}
    assert len(set(held["rwkv"].tolist())) == 1
    assert len(set(held["mamba"].tolist())) == 1
    softmax, hybrid = (set(np.diff(held[name]).tolist()) for name in ("softmax", "hybrid"))
    assert {2 * h for h in hybrid} == softmax  # 2 of 4 layers attend
    layers = run.stack(memories.LAYER_HELD, of="hybrid")
    np.testing.assert_allclose(layers.sum(-1), held["hybrid"])
    assert run.stack(memories.LAYERS, of="hybrid")[0].tolist().count(memories.CODES["SoftmaxAttention"]) == 2


@needs_mamba
def test_every_pair_told_so_far_is_asked_for(run):
    back = run.stack(memories.BACK, of="softmax")
    assert back.shape == (5, 5)
    assert (back[np.triu_indices(5, 1)] == 0).all()
    assert back[4].min() > 0.5  # attention knows them all
    assert run.stack(memories.KNOWN, of="softmax").tolist() == [1, 2, 3, 4, 5]


def test_who_is_not_there_is_not_asked_and_an_empty_row_says_so():
    with record() as recorder:
        memories.Readers({}, {})
    run = recorder.freeze()
    for name in memories.MEMORIES:
        assert np.isnan(run.stack(memories.BACK, of=name)).all()
        assert np.isnan(run.stack(memories.KNOWN, of=name)).all()


@needs_mamba
def test_recall_has_a_point_for_each_number_of_pairs(run):
    assert run.stack(TOLD).tolist() == list(PAIRS)
    assert (run.stack(FOUND, model="toy") > 0.9).all()
    assert run.steps == run.meta["tokens"] + len(PAIRS)


@pytest.mark.browser
@needs_mamba
def test_a_states_number_is_opened_by_keyboard(server, chromium_page):
    open_done(chromium_page, address(server, "ssm", beat=2, step=12, pairs=4))
    canvas = chromium_page.page.locator("[data-view=history] canvas").first
    canvas.focus()
    chromium_page.page.keyboard.press("ArrowDown")
    chromium_page.page.keyboard.press("Enter")
    chromium_page.until(f"/chosen by this token/.test({INSIDE}.textContent)")
