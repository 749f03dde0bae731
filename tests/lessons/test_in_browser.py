"""Every lesson in a real Chromium, on the toy: it plays by keyboard, opens a cell, follows a link, is sound for axe.

A lesson's page is opened once and looked at by one test after the other, since opening costs more than looking: first
by those that leave it as it is, then it is played to its end, then left for a link to where it stands.
"""

import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from app.link import decode, first
from app.runs import execute, is_available
from lessons import all_lessons
from lessons.arithmetic import attention_cell
from lessons.knobs import check
from lessons.models import REAL, TOY
from tests.lessons.pages import INSIDE, address, open_done
from tests.support import Server, Watched

pytestmark = pytest.mark.browser

SIZE = {"width": 1440, "height": 844}
CURRENT = f"[...{INSIDE}.querySelectorAll('.dash')].findIndex((d) => d.getAttribute('aria-current') === 'step')"
BEAT = f"{INSIDE}.querySelector('.beat-body').textContent"
UNTOLD = r"\{|…(?!\s*$)"  # a fact that has not come; a text may end in three dots
# Tests with parameters of their own would have every page opened once more for each of them.
every_lesson = pytest.mark.parametrize("opened", all_lessons(), indirect=True, scope="module")


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest, server: Server, chromium: Any) -> Iterator[tuple[str, Watched]]:
    """A lesson and its page, opened at its first beat, its run done: for all tests of this lesson."""
    context = chromium.new_context(viewport=SIZE, color_scheme="light")
    page = Watched(context.new_page())
    open_done(page, address(server, request.param))
    yield request.param, page
    context.close()


@pytest.fixture
def lesson(opened: tuple[str, Watched]) -> Iterator[tuple[str, Watched]]:
    """The page for one test, which fails when anything went wrong on the page meanwhile."""
    _, page = opened
    yield opened
    wrongs = list(page.wrongs)
    page.forget()
    page.page.set_viewport_size(SIZE)
    page.page.emulate_media(color_scheme="light")
    assert not wrongs, wrongs


@every_lesson
def test_the_claims_stand_on_the_page_with_their_verdicts(lesson: tuple[str, Watched]) -> None:
    slug, page = lesson
    table = page.page.evaluate(f"{INSIDE}.querySelector('[role=tabpanel] table').textContent")
    for claim in all_lessons()[slug].claims:
        assert claim.text in table
    assert len(re.findall("agrees|differs|untestable|not testable", table)) >= len(all_lessons()[slug].claims)


@every_lesson
def test_axe_finds_nothing_serious(lesson: tuple[str, Watched]) -> None:
    from axe_playwright_python.sync_playwright import Axe

    _, page = lesson
    for theme in ("light", "dark"):
        page.page.emulate_media(color_scheme=theme)
        page.until(f"{INSIDE}.querySelector('.leanscope').dataset.theme === '{theme}'")
        # axe looks at colours that stand still
        page.until(f"{INSIDE}.getAnimations().every((one) => !(one instanceof CSSTransition))")
        found = Axe().run(page.page).response["violations"]
        hard = [v for v in found if v["impact"] in ("critical", "serious")]
        assert not [f"{theme}, {v['id']}: {n['html'][:160]}" for v in hard for n in v["nodes"]]


@every_lesson
def test_no_lesson_scrolls_sideways(lesson: tuple[str, Watched]) -> None:
    _, page = lesson
    for width in (1440, 1024, 390):
        page.page.set_viewport_size({**SIZE, "width": width})
        page.until(f"document.scrollingElement.scrollWidth <= {width}", seconds=5)


@every_lesson
def test_a_lesson_is_played_to_its_end_by_keyboard_and_every_beat_has_its_numbers(lesson: tuple[str, Watched]) -> None:
    slug, page = lesson
    keyboard = page.page.keyboard
    for n in range(len(all_lessons()[slug].beats)):
        if n:
            keyboard.press("Space")
        page.until(f"{CURRENT} === {n}")
        page.until(f"!/{UNTOLD}/.test({BEAT})", seconds=90)  # a beat may start a run
        text = page.page.evaluate(BEAT)
        assert not re.search(rf"{UNTOLD}|NaN|undefined", text), f"beat {n}: {text}"
    keyboard.press("End")
    page.until("leanscope.step === leanscope.steps - 1 && leanscope.steps > 1", seconds=60)
    keyboard.press("Home")
    page.until("leanscope.step === 0")
    keyboard.press(".")
    page.until("leanscope.step === 1")
    keyboard.press("k")
    page.until("leanscope.step > 3")


@every_lesson
def test_a_shared_link_opens_the_same_place(lesson: tuple[str, Watched]) -> None:
    """The address follows the learner; opened on a phone it leads to the same beat and step."""
    slug, page = lesson
    for key in (",", "Home", ".", ".", "."):
        page.page.keyboard.press(key)
    page.until("leanscope.step === 3")
    beat = page.page.evaluate(CURRENT)
    end = time.monotonic() + 20
    while place_of(slug, page) != (beat, 3):
        assert time.monotonic() < end, f"the address says {place_of(slug, page)}, not {(beat, 3)}"
        time.sleep(0.05)
    url = page.page.evaluate("location.href")
    page.page.set_viewport_size({**SIZE, "width": 390})
    page.page.goto("about:blank")
    open_done(page, url)
    page.until("leanscope.step === 3")
    assert page.page.evaluate(CURRENT) == beat
    assert page.page.evaluate("document.scrollingElement.scrollWidth") <= 390


def place_of(slug: str, page: Watched) -> tuple[int, int]:
    """Beat and step of the page's address."""
    place, problems = decode(all_lessons()[slug], first(page.page.evaluate("location.search.slice(1)"), "s"))
    assert problems == []
    return place.beat, place.step


def test_a_cells_arithmetic_has_the_runs_numbers(server: Server, chromium_page: Watched) -> None:
    """Clicked on the canvas, computed here from a run of the same knobs."""
    values = {"model": TOY, "tokens": 12, "layer": 2, "head": 1}
    recording = execute("decode", values)
    knobs, _ = check(all_lessons()["decode"].knobs, values)
    open_done(chromium_page, address(server, "decode", layer=2, head=1, beat=2, step=11))
    chromium_page.page.keyboard.press("End")
    canvas = chromium_page.page.locator(".view canvas").first
    box = canvas.bounding_box()
    assert box
    chromium_page.page.mouse.click(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.55)
    chromium_page.until(f"/looks at token/.test({INSIDE}.textContent)")
    shown = chromium_page.page.evaluate(f"{INSIDE}.querySelector('.cell, .cell-card, aside')?.textContent || ''")
    whole = chromium_page.page.evaluate(f"{INSIDE}.textContent")
    found = re.search(r"layer (\d+), head (\d+): token (\d+) looks at token (\d+)", whole)
    assert found, shown
    layer, head, query, key = map(int, found.groups())
    assert layer == 2
    sums = attention_cell(recording, knobs, {"query": query, "key": key, "head": head})
    for _, value in sums.lines:
        assert value in whole or value.replace("-", "−") in whole
    pattern = recording.stack("attention.pattern", layer=layer)[0, head, query, key]
    np.testing.assert_allclose(sums.values["share"], pattern, rtol=1e-3, atol=1e-5)


@pytest.mark.real
def test_the_real_model_streams_its_words(server: Server, chromium_page: Watched) -> None:
    there, why = is_available(REAL)
    if not there:
        pytest.skip(why)
    chromium_page.open(address(server, "decode", model=REAL, tokens=8, prompt="The capital of France is"))
    chromium_page.until("window.leanscope?.ready", seconds=60)
    chromium_page.until(f"/Paris/.test({INSIDE}.textContent)", seconds=60)
    chromium_page.until("leanscope.steps === 8", seconds=60)


def test_the_index_shows_the_course_and_leads_to_a_lesson(server: Server, chromium_page: Watched) -> None:
    chromium_page.open(f"{server.url}/")
    chromium_page.until("window.leanscope?.ready")
    text = chromium_page.page.evaluate(f"{INSIDE}.textContent")
    assert all(lesson.question in text for lesson in all_lessons().values())
    href = chromium_page.page.evaluate(f"{INSIDE}.querySelector('a[href*=\"lesson/sinks\"]').href")
    assert href == f"{server.url}/lesson/sinks"


def test_past_the_last_beat_space_leads_to_the_next_lesson(server: Server, chromium_page: Watched) -> None:
    last = len(all_lessons()["linear"].beats) - 1
    open_done(chromium_page, address(server, "linear", beat=last))
    title = all_lessons()["ssm"].title
    chromium_page.until(f"{INSIDE}.querySelector('button.next').textContent.includes({title!r})")
    chromium_page.page.keyboard.press("Space")  # takes the button in hand
    chromium_page.until(f"{INSIDE}.activeElement?.matches('button.next')")
    chromium_page.page.keyboard.press("Space")
    chromium_page.until("location.pathname.endsWith('/lesson/ssm')")
    chromium_page.open(address(server, "build", beat=len(all_lessons()["build"].beats) - 1))
    chromium_page.until("window.leanscope?.ready")
    chromium_page.until(f"{INSIDE}.querySelector('button.next').textContent.startsWith('The end')")


def test_a_knob_of_a_toy_lesson_runs_again(server: Server, chromium_page: Watched) -> None:
    open_done(chromium_page, address(server, "decode"))
    slider = f"[...{INSIDE}.querySelectorAll('input[type=range]')].find((i) => i.max === '96')"
    chromium_page.page.evaluate(
        f"(() => {{ const s = {slider}; s.value = 17; s.dispatchEvent(new Event('input', {{bubbles: true}}));"
        "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    chromium_page.until("leanscope.steps === 17", seconds=60)
