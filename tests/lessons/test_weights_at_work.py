"""Fewer weights at work: figures of the runs against the engine, cells, calculators, what a page shows."""

import functools

import numpy as np
import pytest

from app.runs import execute
from engine.weights import ModelUnavailable
from lessons import contextual, experts, offload, prune, pruning, routing
from lessons.knobs import check
from lessons.models import TOY
from tests.lessons.pages import INSIDE, QUICK, address, open_done

MODELS = {"prune": {"model": TOY}, "contextual": {"model": TOY}}


@functools.cache
def ran(slug):
    try:
        return execute(slug, {**MODELS.get(slug, {}), **QUICK[slug]})
    except ModelUnavailable as error:
        pytest.skip(str(error))


def knobs(lesson, **values):
    return check(lesson.LESSON.knobs, values)[0]


def test_pruned_weights_are_the_smallest_of_those_shown_and_as_many_as_was_asked():
    where = {"layer": 1, "matrix": "ffn.gate_up"}
    weight = abs(ran("prune").track(pruning.WEIGHT, **where).latest())
    shares = ran("prune").stack(pruning.SHARE)
    for step, share in enumerate(shares):
        kept = ran("prune").track(pruning.KEPT, **where).latest(step).astype(bool)
        assert not kept.all() or share < 0.3
        assert kept.all() or weight[kept].min() >= weight[~kept].max()
    gone = ran("prune").track(pruning.GONE).latest(len(shares) - 1)
    assert gone.shape == (4, len(pruning.MATRICES))
    assert gone.mean() == pytest.approx(shares[-1], abs=0.05)


def test_stored_weights_and_places_give_the_two_largest_of_each_four_back():
    whole = ran("prune").track(pruning.FOUR).latest()
    chosen = ran("prune").track(pruning.CHOSEN).latest().astype(bool)
    values, places = (ran("prune").stack(site) for site in (pruning.PACKED, pruning.PLACED))
    back = np.zeros_like(whole)
    columns = np.arange(values.shape[1]) // 2 * 4 + places.astype(int)
    np.put_along_axis(back, columns, values, 1)
    np.testing.assert_allclose(back, whole * chosen, atol=1e-3)  # stored at 16 bits
    assert (chosen.reshape(pruning.SIDE, -1, 4).sum(-1) == 2).all()


def test_retraining_starts_from_the_pruned_toy_and_each_step_wakes_weights():
    f = prune.LESSON.facts(ran("prune"))
    assert f["ppl_back"] < 0.6 * f["ppl_cut"] > f["ppl_toy"]
    assert ran("prune").stack(pruning.TRAINED, of="held").tolist() == [0, 0, 10]
    woken = ran("prune").stack(pruning.WOKEN)
    assert len(woken) == QUICK["prune"]["steps"]
    assert f["revived"] == woken.mean() > 100_000


def test_a_weights_arithmetic_says_when_it_goes():
    weight = ran("prune").track(pruning.WEIGHT, layer=1, matrix="ffn.gate_up").latest()
    row, column = np.unravel_index(abs(weight).argmin(), weight.shape)
    told = [
        dict(prune.weight_cell(ran("prune"), knobs(prune), {"output": row, "input": column, "step": step}).lines)["it"]
        for step in (0, 8)
    ]
    assert told == ["stays", "is gone"]


def test_gates_of_a_text_are_the_likeliest_experts_and_full_ones_drop_words():
    odds, sent = (ran("experts").stack(site, design="fair", layer=0) for site in (routing.ODDS, routing.SENT))
    lost = ran("experts").track(routing.LOST, design="fair", layer=0).latest()
    np.testing.assert_allclose(odds.sum(1), 1, rtol=1e-4)
    served = sent.max(1) > 0
    assert (sent.argmax(1) == odds.argmax(1))[served].all()
    np.testing.assert_array_equal(lost == 2, ~served)
    assert ran("experts").track(routing.DROPS, design="fair", layer=0).latest() == (~served).sum()
    busiest = np.bincount(odds.argmax(1)[served], minlength=routing.COUNT).max()
    assert busiest <= np.ceil(1.25 * len(odds) / routing.COUNT)


def test_the_river_is_a_share_of_each_steps_tokens():
    river = ran("experts").stack(routing.RIVER, design="free", layer=1)
    np.testing.assert_allclose(river.sum(1), 1, rtol=1e-4)
    assert river.shape == (QUICK["experts"]["steps"], routing.COUNT)


def test_the_mixtures_calculator_counts_mixtral_and_refuses_more_than_there_are():
    typed = experts._preset(8, 2)
    found = experts.compute(typed).values
    assert (round(found["all"] / 1e8) / 10, round(found["active"] / 1e8) / 10) == (46.7, 12.9)
    with pytest.raises(ValueError, match="9 is more"):
        experts.compute(typed | {"used": 9})


def test_own_words_are_routed_and_strange_ones_refused():
    text = execute("experts", {**QUICK["experts"], "text": "own", "own": "anna is in the shed"})
    assert len(text.stack(routing.SENT, design="fair", layer=0)) == text.meta["tokens"] == 6
    with pytest.raises(ValueError, match="zyx"):
        execute("experts", {**QUICK["experts"], "text": "own", "own": "zyx"})


def test_codes_of_neurons_say_what_fires_and_what_was_foretold():
    run = ran("contextual")
    codes, silent = (run.stack(site, layer=1) for site in (contextual.FIRED, contextual.SILENT))
    assert codes.shape == (run.meta["tokens"], contextual.SHOWN)
    assert set(np.unique(codes)) <= {0, 1, 2, 3}
    assert (codes % 2 == 0).mean() == pytest.approx(silent.mean(), abs=0.15)  # of the first neurons, of all
    assert run.meta["off"] < 1e-4  # ReLU: without its zeros nothing changes
    found = contextual.fired_cell(run, knobs(contextual, layer=1), {"token": 3, "neuron": 5})
    assert found.values["code"] == codes[3, 5]


def test_the_truth_costs_least_and_all_neurons_cost_nothing():
    read = {way: ran("contextual").stack(contextual.PPL, way=way) for way in contextual.WAYS}
    assert len({float(values[0]) for values in read.values()}) == 1
    assert read["truth"][2] <= 1.02 * min(read["predictor"][2], read["habit"][2])


def test_what_a_shelf_fetched_lies_there_and_hits_and_misses_are_all_requests():
    run = ran("offload")
    for way in offload.WAYS:
        hits, misses = (run.stack(site, way=way) for site in (offload.HITS, offload.MISSES))
        assert (hits + misses).tolist() == [8 * (t + 1) for t in range(run.meta["tokens"])]  # four layers, two each
        shelf = run.track(offload.SHELF, way=way).latest()
        assert np.isin(shelf, (offload.HELD, offload.CAME)).sum(1).max() <= run.meta["size"]
        assert run.stack(offload.WAITED, way=way)[-1] >= 0
    assert run.meta["off"] < 1e-4


@pytest.mark.browser
def test_a_words_gate_opens_by_keyboard(server, chromium_page):
    open_done(chromium_page, address(server, "experts", beat=3))
    chromium_page.page.keyboard.press("End")
    chromium_page.until("leanscope.step === leanscope.steps - 1")
    chromium_page.page.locator("[data-view=odds] canvas").first.focus()
    chromium_page.page.keyboard.press("ArrowDown")
    chromium_page.page.keyboard.press("Enter")
    chromium_page.until(f"/the softmax of the router/.test({INSIDE}.textContent)")
