"""What the lessons on waiting for memory and on latents compute themselves, and their main interactions on the page."""

import numpy as np
import pytest

from app.answers import cell
from app.runs import execute, is_available
from engine import checkpoints, cost
from lessons import lesson, roofline
from lessons.latent import key_cell, value_cell
from lessons.models import TOY
from lessons.roofline import POINTS, RATE, point_cell, sizes
from tests.lessons.pages import INSIDE, address, open_done

QUICK = {"model": TOY, "batch": 3, "prompt": 9}


@pytest.fixture(scope="module")
def ran():
    there, why = is_available(TOY)
    if not there:
        pytest.skip(why)
    return execute("roofline", QUICK)


def test_batches_double_up_to_the_largest():
    assert [sizes(n) for n in (1, 2, 3, 32, 50)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16, 32],
                                                     [1, 2, 4, 8, 16, 32, 50]]  # fmt: skip


def test_a_point_of_the_roofline_is_counted_work_over_its_time(ran):
    shape = checkpoints.load(TOY)[0].shape
    for phase, queries, keys in ((0, 1, 10), (1, 9, 9)):
        work = cost.forward_work(shape, queries=queries, keys=keys, batch=3, logits=1)
        qkv = next(w for w in work if w.name == "qkv")
        opened = point_cell(ran, None, {"batch": 2, "phase": phase, "operation": POINTS.index("qkv")})
        assert opened.values["intensity"] == pytest.approx(qkv.flops / qkv.bytes)
        assert opened.values["rate"] == pytest.approx(float(ran.stack(RATE)[2, phase, 0]))
        assert opened.values["roof"] == min(ran.meta["peak"], opened.values["intensity"] * ran.meta["near"])
    seconds = ran.track("profile.seconds", phase="decode").latest()
    flops = ran.track("profile.flops", phase="decode").latest()
    assert ran.stack(RATE)[2, 0, 0] == pytest.approx(flops[1] / seconds[1])


def test_attention_shares_nothing_in_a_batch_and_weights_are_shared(ran):
    intensity = ran.stack(roofline.INTENSITY)[:, 0]
    assert intensity[:, POINTS.index("attention")] == pytest.approx(intensity[0, POINTS.index("attention")])
    assert intensity[:, POINTS.index("ffn")] == pytest.approx(np.array([1, 2, 3]) / 2)  # 2 FLOPs and 4 bytes a weight


def test_the_turn_is_where_products_with_weights_reach_the_ridge(ran):
    f = roofline.facts(ran)
    assert f["turn"] * 2 / ran.meta["value_bytes"] >= f["ridge"] > (f["turn"] - 1) * 2 / ran.meta["value_bytes"]
    assert f["bound"] == ran.meta["near"] / ran.meta["weights"]
    assert ran.meta["weights"] == sum(p.nbytes for p in checkpoints.load(TOY)[0].parameters())


def test_a_cell_of_the_roofline_opens_by_batch_phase_and_operation(ran):
    chosen = lesson("roofline")
    view = chosen.scenes[0].views[0]
    (found,) = cell(ran, view, chosen.knobs(), {"batch": 1, "phase": 0, "operation": 2}, request=1, index=0)
    assert found["title"] == "out, decode: 2 × one token each"
    for at in ({"batch": 3, "phase": 0, "operation": 0}, {"batch": 0, "phase": 2, "operation": 0}):
        (refused,) = cell(ran, view, chosen.knobs(), at, request=1, index=0)
        assert "error" in refused


@pytest.mark.parametrize(("opener", "tensor"), [(key_cell, "attention.k"), (value_cell, "attention.v")])
def test_a_redrawn_cell_adds_up_to_what_the_engine_made(opener, tensor):
    recording = execute("latent", {})
    knobs = lesson("latent").knobs(layer=2)
    drawn = recording.stack(tensor, layer=2)[0]  # head token width
    for head, token, place in ((0, 0, 0), (7, 35, 11), (3, 20, drawn.shape[-1] - 1)):
        opened = opener(recording, knobs, {"head": head, "key": token, "width": place})
        assert opened.values["sum"] == pytest.approx(float(drawn[head, token, place]), abs=1e-5)


@pytest.mark.browser
def test_a_larger_batch_moves_the_points_and_a_point_opens(server, chromium_page):
    open_done(chromium_page, address(server, "roofline", batch=4, prompt=8))
    canvas = f"{INSIDE}.querySelector('canvas[aria-roledescription=chart]')"
    rows = f"{INSIDE}.querySelector('.figure').textContent"
    chromium_page.until(f"{canvas}.getAttribute('aria-label').includes('points')")
    before = chromium_page.page.evaluate(rows)
    chromium_page.page.evaluate(f"{canvas}.focus()")
    for _ in range(2):
        chromium_page.page.keyboard.press("ArrowRight")
    chromium_page.page.keyboard.press("Enter")
    chromium_page.until(f"{INSIDE}.textContent.includes('reached of it')", seconds=60)
    chromium_page.page.keyboard.press("Escape")
    chromium_page.page.keyboard.press("End")
    chromium_page.until("leanscope.step === 2")
    chromium_page.until(f"{rows} !== {before!r}")


@pytest.mark.browser
def test_the_form_of_latents_is_looked_at_without_a_new_run(server, chromium_page):
    open_done(chromium_page, address(server, "latent", beat=7))
    figures = f"[...{INSIDE}.querySelectorAll('.figure')].map((f) => f.textContent).join()"
    naive = chromium_page.page.evaluate(figures)
    run = chromium_page.page.evaluate("leanscope.run ?? ''")
    chromium_page.page.evaluate(
        f"(() => {{ const box = [...{INSIDE}.querySelectorAll('select')].find((s) => s.textContent.includes('Carry')); "
        "box.selectedIndex = 1; box.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    chromium_page.until(f"{figures} !== {naive!r}")
    assert chromium_page.page.evaluate("leanscope.run ?? ''") == run
