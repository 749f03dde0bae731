"""Lesson lora: what it counts and opens, what a stopped run still has, and merging on its page."""

from typing import Any

import numpy as np
import pytest

from app.runs import Stopped, execute, findings
from engine.recording import Recorder, Recording
from lessons import all_lessons, teaching, trainable
from lessons.knobs import check
from tests.lessons.pages import INSIDE, address, open_done
from tests.support import Server, Watched

LESSON = all_lessons()["lora"]
KNOBS, _ = check(LESSON.knobs, {"steps": 10, "layer": 1, "rank": 3, "alpha": 6})


@pytest.fixture(scope="module")
def stopped() -> Recording:
    """A run that was stopped in the middle of its training."""
    recorders: list[Recorder] = []

    def on_step(recorder: Recorder) -> None:
        if recorder.step == 10:
            recorders.append(recorder)
            raise Stopped("enough")

    with pytest.raises(Stopped):
        execute("lora", LESSON.run_values(KNOBS), on_step)
    return recorders[0].so_far()


def test_a_stopped_run_keeps_what_it_had_and_says_what_is_missing(stopped: Recording) -> None:
    found = findings(LESSON, stopped, whole=False)
    assert found.facts["last"] == 9
    assert 0 <= found.facts["right_lora"] <= 1
    assert "off" not in found.facts  # it was never merged
    assert {claim["why"] for claim in found.claims} == {"the run was stopped before its end"}
    assert len(stopped.stack("tune.loss", method="full")) == 4


def test_towers_count_every_parameter_once(stopped: Recording) -> None:
    total = stopped.meta["total"]
    for method in stopped.meta["methods"]:
        trained, frozen = stopped.track(teaching.COUNTS, method=method).latest().sum((0, 1))
        assert trained == stopped.track(teaching.TRAINED, method=method).latest()
        assert frozen == (0 if method == "full" else total)
        moved = stopped.track(teaching.MOVED, method=method).latest()
        counts = stopped.track(teaching.COUNTS, method=method).latest()
        assert (moved[counts[..., 0] == 0] == 0).all()
        assert moved.max() == 1


def test_a_cell_of_the_product_is_the_sum_over_the_rank(stopped: Recording) -> None:
    at = {"output": 5, "input": 7, "step": 8}
    sums = teaching.product_cell(stopped, KNOBS, at)
    delta = stopped.track("peft.delta", method="lora", layer=1).latest(8)[5, 7]
    np.testing.assert_allclose(sums.values["delta"], delta, rtol=1e-4, atol=1e-8)
    assert delta != 0
    assert len([line for line, _ in sums.lines if line.startswith("B[")]) == 3
    full = teaching.moved_cell(stopped, KNOBS, at)
    assert full.values["delta"] == stopped.track("peft.delta", method="full", layer=1).latest(8)[5, 7]
    values = stopped.track("peft.singular", method="lora", layer=1).latest()
    assert (values > 0).sum() == 3


def test_published_shapes_give_the_lectures_shares(stopped: Recording) -> None:
    for measure in (trainable.bitfit_share, trainable.adapter_share, trainable.lora_count):
        assert measure(stopped).verdict == "agrees"
    shares, glue = trainable.sheets()
    assert (shares.origin, glue.origin) == ("formula", "reported")


@pytest.mark.browser
def test_merging_takes_the_product_away_and_a_cell_opens(server: Server, chromium_page: Watched) -> None:
    page = chromium_page
    open_done(page, address(server, "lora", beat=7))
    page.page.keyboard.press("End")
    work = f"{INSIDE}.querySelector('[data-view=work] .figure').textContent"
    page.until(f"{work} === '471,552'")
    page.page.evaluate(f"[...{INSIDE}.querySelectorAll('[role=switch]')].pop().click()")
    page.until(f"{work} === '442,368'")
    said = f"[...{INSIDE}.querySelectorAll('.saying')].map((row) => row.querySelector('.saying-words').textContent)"
    texts: Any = page.page.evaluate(said)
    assert len(texts) == 8
    assert texts[-1] == texts[5]  # LoRA, merged and not
    page.page.keyboard.press("ArrowLeft")
    page.page.keyboard.press("ArrowLeft")
    canvas = page.page.locator("[data-view=product] canvas")
    canvas.click(position={"x": 100, "y": 100})
    page.until(f"/sum over the rank/.test({INSIDE}.textContent)")
