"""The few that spoil the scale: what is shown of inputs and ranges against the engine, and the laws of each way."""

import functools

import numpy as np
import pytest
import torch

from app.runs import execute
from engine import checkpoints
from engine.evaluate import perplexity, surprisal
from engine.quant import capture_inputs
from lessons import loud
from lessons.knobs import check
from lessons.loud import ALPHAS, PARTS, code_cell
from lessons.models import TOY
from lessons.outliers import LESSON, WAYS
from lessons.texts import text_ids
from tests.lessons.pages import INSIDE, address, open_done

TOKENS = 64


@functools.cache
def ran(**values):
    return execute("outliers", {"model": TOY, "tokens": TOKENS, **values})


@functools.cache
def inputs():
    model, tokenizer = checkpoints.load(TOY)
    ids = torch.tensor(text_ids(tokenizer, "bread", "", toy=True, tokens=TOKENS))
    with torch.inference_mode(), capture_inputs(model) as found:
        model(ids[None])
    return model, ids, dict(found)


def test_each_step_shows_the_inputs_of_its_layer():
    model, _, found = inputs()
    for part in PARTS.values():
        for layer in range(model.shape.layers):
            x = found[f"blocks.{layer}.{part}"].abs().numpy()
            np.testing.assert_allclose(ran().track(loud.X, part=part).latest(layer), x[: loud.ROWS], rtol=1e-5)
            near = ran().track(loud.CLOSE_IDS, part=part).latest(layer)
            np.testing.assert_allclose(
                ran().track(loud.CLOSE, part=part).latest(layer), x[: loud.ROWS, near], rtol=1e-5
            )
            assert set(np.argsort(-x.max(0))[:5]) <= set(near)
            stays = ran().track(loud.STAYS, part=part).latest(layer)
            np.testing.assert_array_equal(stays[0], x[:, near].max(0) < 6.0)
            top = ran().track(loud.X_TOP, part=part).latest(layer)
            np.testing.assert_allclose(top, np.sort(x.max(0))[::-1], rtol=1e-5)


def test_outlier_channels_are_counted_layer_by_layer():
    model, _, found = inputs()
    counted = [
        sum(int((found[f"blocks.{i}.{part}"].abs().amax(0) >= 6).sum()) for part in PARTS.values())
        for i in range(model.shape.layers)
    ]
    assert ran().meta["found"] == counted
    assert ran().track(loud.FOUND).latest(1).tolist() == [*counted[:2], 0, 0]


def test_smoothing_moves_ranges_and_keeps_their_product():
    for part in PARTS.values():
        for alpha in ALPHAS:
            where = {"layer": 3, "part": part}
            read = lambda name, where=where, **more: ran().track(name, **where, **more).latest().astype(float)  # noqa: E731
            x, w = read(loud.X_TOP_AT), read(loud.W_TOP_AT)
            x_after, w_after, s = (read(n, alpha=alpha) for n in (loud.X_AFTER, loud.W_AFTER, loud.FACTOR))
            np.testing.assert_allclose(x_after * w_after, x * w, rtol=1e-4)
            np.testing.assert_allclose(x_after * s, x, rtol=1e-4)
            if alpha == 100:
                np.testing.assert_allclose(x_after, 1, rtol=1e-4)
            if alpha == 0:
                np.testing.assert_allclose(w_after, 1, rtol=1e-4)
            if alpha == 50:
                np.testing.assert_allclose(x_after, w_after, rtol=1e-4)


def test_perplexity_is_the_engines_and_bars_come_one_by_one():
    model, ids, _ = inputs()
    f = LESSON.facts(ran())
    assert f["ppl_float"] == pytest.approx(perplexity(surprisal(model, ids)), rel=1e-5)
    ppls = ran().track(loud.PPLS)
    assert (np.isfinite(ppls.stack()).sum(axis=1) == np.arange(1, len(WAYS) + 1)).all()
    assert ran().track(loud.MOVED).latest()[0] == 0
    for at, name in enumerate(WAYS):
        assert ppls.latest()[at] == pytest.approx(f[f"ppl_{name}"], rel=1e-5)
        running = ran().track(loud.RUNNING, way=name).latest()
        assert len(running) == TOKENS - 1
        assert running[-1] == pytest.approx(f[f"ppl_{name}"], rel=1e-4)


def test_threshold_0_leaves_nothing_in_int8_and_changes_nothing():
    f = LESSON.facts(ran(threshold=0.0))
    assert f["ppl_int8"] == pytest.approx(f["ppl_float"], rel=1e-6)
    assert not ran(threshold=0.0).track(loud.STAYS, part="mixer.qkv").latest().any()
    assert f["lighter"] < 1


def test_awqs_search_never_loses_to_plain_rounding():
    for part in (*PARTS.values(), "mixer.out"):
        losses = ran().stack(loud.LOSS, part=part)
        assert losses.shape == (4, 20)
        np.testing.assert_allclose(losses[:, 0], 1.0)
        best = losses.argmin(1) / 20
        np.testing.assert_allclose(ran().stack(loud.RATIO, part=part), best, atol=1e-6)


def test_a_cell_says_what_each_scale_would_make_of_it():
    knobs = check(LESSON.knobs, {"model": TOY, "part": "ffn.down"})[0]
    x = ran().track(loud.CLOSE, part="ffn.down").latest(2)
    found = code_cell(ran(), knobs, {"token": 3, "channel": 7, "step": 2})
    assert found.values["value"] == pytest.approx(x[3, 7])
    most = inputs()[2]["blocks.2.ffn.down"].abs().max()
    assert dict(found.lines)[f"one scale for all: {most:.2f} ÷ 127 a step"] == f"{most / 127:.4f}"


def test_a_text_too_short_gets_a_sentence():
    with pytest.raises(ValueError, match="at least 24 are needed"):
        execute("outliers", {"model": TOY, "text": "own", "own": "the red ball is in the attic."})


@pytest.mark.browser
def test_alpha_moves_ranges_without_another_run(server, chromium_page):
    open_done(chromium_page, address(server, "outliers", beat=4, step=7))
    smoothed = f"{INSIDE}.querySelector('[data-view=smooth] canvas').getAttribute('aria-label')"
    weights = f"{INSIDE}.querySelector('[data-view=smooth_w] canvas').getAttribute('aria-label')"
    chromium_page.until(f"{smoothed}.includes('as they were') && !{smoothed}.includes('÷ s: 1.000 to 1.000')")
    status = f"{INSIDE}.querySelector('.run-status').textContent"
    before, told = chromium_page.page.evaluate(weights), chromium_page.page.evaluate(status)
    assert "computed" in told or "cache" in told, "the run has ended"
    chromium_page.page.locator("#knob-alpha").fill("100")  # all of it moves: every channel of X reaches 1
    chromium_page.until(f"{smoothed}.includes('÷ s: 1.000 to 1.000') && {weights} !== {before!r}")
    assert chromium_page.page.evaluate(status) == told  # and it is the run that there was
