"""Learn with the grid on: figures of the run against the engine, the map of ternary weights, what 70B would take."""

import functools

import numpy as np
import pytest

from app.runs import execute
from engine.quant.bitnet import pack_trits
from lessons import microscope
from lessons.grid_on import AWAY, BITS, COLUMNS, FLIPPED, GRADIENT, PATH, PPL, STOOD, USED, gradient_cell
from lessons.knobs import check
from lessons.qat import LESSON, SWEEP, _gap, _longer_told
from lessons.ternary import CODES, COUNTED, FIELDS, INPUT, SHARES, calculator, compute, sums_cell
from tests.lessons.pages import INSIDE, address, open_done

TYPED = {f.name: f.value for f in FIELDS}
STEPS = 10


@functools.cache
def ran():
    return execute("qat", {"steps": STEPS})


def knobs():
    return check(LESSON.knobs, {"layer": 1})[0]


def test_fewer_bits_read_worse_and_training_wins_them_back():
    f = LESSON.facts(ran())
    swept = [f[f"ptq{bits}"] for bits in SWEEP]
    assert f["whole"] == pytest.approx(swept[0], rel=0.01)
    assert swept[-1] > swept[-2] > swept[-3] > 0.99 * f["whole"]
    assert f["ptq"] == pytest.approx(f["ptq2"], rel=1e-6)  # before training, the grid alone is PTQ
    assert f["qat"] < f["ptq"] / 5


def test_the_point_that_is_trained_falls_in_the_plane_of_all_bits():
    live = ran().stack(PPL, of="live")
    assert len(live) == len(ran().stack(BITS, of="live")) == 2
    assert live[-1] == pytest.approx(ran().meta["qat"])


def test_weights_stand_where_the_microscope_shows_them():
    for step in (7, 12):
        shown = {n: ran().track(n, method="qat", layer=1).latest(step) for n in (microscope.VALUES, microscope.CODES)}
        scale = ran().track(microscope.SCALE, method="qat", layer=1).latest(step)
        stood, used = (ran().track(n, layer=1).latest(step) for n in (STOOD, USED))
        np.testing.assert_allclose(stood, shown[microscope.VALUES][0] / scale[0], rtol=1e-5)
        np.testing.assert_array_equal(used, shown[microscope.CODES][0])
        np.testing.assert_array_equal(used, np.clip(stood.round(), -1, 1))


def test_followed_weights_begin_near_the_place_where_their_code_changes():
    for n in range(5):
        way = ran().stack(PATH, weight=n, layer=1)
        assert len(way) == STEPS + 1
        assert 0.3 < way[0] <= 0.5
    assert ran().stack(FLIPPED)[0] == 0 < ran().stack(FLIPPED)[-1] < 0.5
    assert ran().stack(AWAY) == pytest.approx(0.23, abs=0.05)


def test_a_weights_arithmetic_is_that_of_the_microscope_and_says_when_there_is_none():
    track = ran().track(GRADIENT, layer=1)
    found = gradient_cell(ran(), knobs(), {"row": 2, "column": 5, "step": 12})
    assert found.values["gradient"] == pytest.approx(track.latest(12)[2, 5])
    before, now = (ran().track(microscope.VALUES, method="qat", layer=1).latest(s)[2, 5] for s in (11, 12))
    assert found.values["moved"] == pytest.approx(now - before, abs=1e-7)
    assert track.latest().shape == (8, COLUMNS)
    with pytest.raises(ValueError, match="No gradient has come yet"):
        gradient_cell(ran(), knobs(), {"row": 2, "column": 5, "step": 3})


def test_sums_and_skipped_weights_are_all_the_weights_and_their_bytes_are_packed_ones():
    meta = ran().meta
    assert meta["additions"] + meta["skipped"] == meta["weights"] == 442_368
    assert meta["exact"]
    assert ran().track(COUNTED, of="bitnet").latest()[2:].sum() == meta["weights"]
    codes = ran().track(CODES, layer=1).latest()
    assert set(np.unique(codes)) == {-1, 0, 1}
    np.testing.assert_allclose(ran().track(SHARES, layer=1).latest(), [(codes == c).mean() for c in (-1, 0, 1)])
    assert meta["bytes_trits"] < 1.7 * meta["weights"] / 8 < meta["bytes_two"]
    import torch

    assert pack_trits(torch.tensor(codes)).numel() == 96 * 20  # 96 weights a row, five to a byte


def test_an_output_is_what_its_signed_additions_say():
    codes, x = ran().track(CODES, layer=1).latest().astype(int), ran().track(INPUT, layer=1).latest()
    found = sums_cell(ran(), knobs(), {"output": 7, "input": 3})
    assert dict(found.lines)["output"] == f"{int(codes[7] @ x):,}"
    assert found.values == {"plus": (codes[7] == 1).sum(), "minus": (codes[7] == -1).sum()}


def test_the_calculator_makes_room_for_texts():
    found = compute(TYPED).values
    assert (found["whole"], found["small"]) == (140e9, 14e9)
    text = 2 * 80 * 8 * 128 * 2 * 512
    assert (found["before"], found["after"]) == (20e9 // text, 146e9 // text)
    assert dict(compute(TYPED | {"memory": 100}).lines)["More texts at once"] == "it did not fit at all"
    assert dict(compute(TYPED | {"memory": 1}).lines)["More texts at once"] == "neither fits"
    assert calculator().presets[0] == ("A model of 70B", TYPED)


def test_runs_that_are_not_here_are_said_to_be_missing_and_others_told():
    assert _longer_told({"longer": {}}) == "The longer runs are not on this machine."
    told = _longer_told({"longer": {"qat2": 4.321, "qat16": 3.7}})
    assert told == "After 400 steps on longer texts: 2 bits 4.32; float, trained on alike, 3.70."
    assert "not on this machine" in _gap({"longer": {}})
    assert "4.00: 8% above float’s 3.70" in _gap({"longer": {"bitnet": 4.0}, "whole": 3.7})


@pytest.mark.browser
def test_perplexity_falls_as_training_is_played(server, chromium_page):
    open_done(chromium_page, address(server, "qat", beat=4, step=7))
    figures = f"{INSIDE}.querySelector('[data-view=figures]').textContent"
    chromium_page.until("leanscope.step === 7")
    chromium_page.until(f"{figures}.includes('213.03')")
    for _ in range(STEPS + 1):
        chromium_page.page.keyboard.press(".")
    qat = f"{ran().meta['qat']:.2f}"
    chromium_page.until(f"leanscope.step === {7 + STEPS + 1} && {figures}.includes('{qat}')")
    curve = f"{INSIDE}.querySelector('[data-view=curve] canvas').getAttribute('aria-label')"
    chromium_page.until(f"{curve}.includes('rounded afterwards: 213.0')")
