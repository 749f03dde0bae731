"""Every lesson in a real Chromium, on the toy: it plays by keyboard, opens a cell, follows a link, is sound for axe."""

import re
from collections.abc import Iterator

import numpy as np
import pytest

from app.link import Place, encode
from app.runs import execute, is_available
from engine import smollm2
from lessons import all_lessons
from lessons.arithmetic import attention_cell
from lessons.knobs import check
from lessons.models import REAL, TOY
from tests.support import REAL as COMMAND
from tests.support import Server, Watched, serving

pytestmark = pytest.mark.browser

INSIDE = "document.querySelector('#leanscope').firstElementChild.shadowRoot"
SLUGS = list(all_lessons())
QUICK = {
    "decode": {"tokens": 12},
    "sinks": {"tokens": 96, "window": 32},
    "heavy-hitters": {"tokens": 96, "steps": 6},
    "heads": {"steps": 10},
    "ring": {"ranks": 2, "length": 64},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real lessons, with this machine's model and a cache of recordings of its own."""
    cache = tmp_path_factory.mktemp("lessons")
    if smollm2.folder().is_dir():
        (cache / smollm2.folder().name).symlink_to(smollm2.folder())
    with serving("--no-warm", cache=cache, program=COMMAND) as running:
        yield running


def address(server: Server, slug: str, *, beat: int = 0, step: int = 0, **values: object) -> str:
    lesson = all_lessons()[slug]
    toy = {"model": TOY} if "model" in lesson.knobs.names() else {}
    knobs, problems = check(lesson.knobs, {**toy, **QUICK.get(slug, {}), **values})
    assert problems == []
    return f"{server.url}/lesson/{slug}?s={encode(lesson, Place(knobs, beat, step))}"


def open_done(page: Watched, url: str) -> None:
    page.open(url)
    page.until("window.leanscope?.ready", seconds=60)
    page.until(f"{INSIDE}.querySelectorAll('[role=tabpanel] table tbody tr').length > 0", seconds=90)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_lesson_is_played_to_its_end_by_keyboard(server: Server, chromium_page: Watched, slug: str) -> None:
    open_done(chromium_page, address(server, slug))
    keyboard = chromium_page.page.keyboard
    beats = len(all_lessons()[slug].beats)
    for n in range(1, beats):
        keyboard.press("Space")
        current = f"[...{INSIDE}.querySelectorAll('.dash')].findIndex((d) => d.getAttribute('aria-current') === 'step')"
        chromium_page.until(f"{current} === {n}")
    keyboard.press("End")
    chromium_page.until("leanscope.step === leanscope.steps - 1 && leanscope.steps > 1", seconds=60)  # a beat may start a run
    keyboard.press("Home")
    chromium_page.until("leanscope.step === 0")
    keyboard.press(".")
    chromium_page.until("leanscope.step === 1")
    keyboard.press("k")
    chromium_page.until("leanscope.step > 3")
    text = chromium_page.page.evaluate(f"{INSIDE}.querySelector('.beat-body').textContent")
    assert "{" not in text, "a fact was not filled in"


@pytest.mark.parametrize("slug", SLUGS)
def test_every_beat_has_its_numbers(server: Server, chromium_page: Watched, slug: str) -> None:
    for beat in range(len(all_lessons()[slug].beats)):
        open_done(chromium_page, address(server, slug, beat=beat))
        text = chromium_page.page.evaluate(f"{INSIDE}.querySelector('.beat-body').textContent")
        assert not re.search(r"\{\w+|…(?!\s*$)|NaN|undefined", text), text


@pytest.mark.parametrize("slug", SLUGS)
def test_the_claims_stand_on_the_page_with_their_verdicts(server: Server, chromium_page: Watched, slug: str) -> None:
    open_done(chromium_page, address(server, slug))
    table = chromium_page.page.evaluate(f"{INSIDE}.querySelector('[role=tabpanel] table').textContent")
    for claim in all_lessons()[slug].claims:
        assert claim.text in table
    assert len(re.findall("agrees|differs|untestable|not testable", table)) >= len(all_lessons()[slug].claims)


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


@pytest.mark.parametrize("slug", SLUGS)
def test_a_shared_link_opens_the_same_place(server: Server, chromium_page: Watched, slug: str) -> None:
    open_done(chromium_page, address(server, slug, beat=1, step=2))
    assert chromium_page.page.evaluate("leanscope.step") == 2
    chromium_page.page.keyboard.press(".")
    chromium_page.until("leanscope.step === 3 && location.search.includes('s=')")
    chromium_page.page.wait_for_timeout(600)
    url = chromium_page.page.url
    open_done(chromium_page, url)
    chromium_page.until("leanscope.step === 3")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("slug", SLUGS)
def test_axe_finds_nothing_serious(server: Server, chromium_page: Watched, slug: str, theme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    chromium_page.page.emulate_media(color_scheme=theme)
    open_done(chromium_page, address(server, slug))
    found = Axe().run(chromium_page.page).response["violations"]
    bad = [f"{v['id']}: {n['html'][:160]}" for v in found if v["impact"] in ("critical", "serious") for n in v["nodes"]]
    assert not bad


@pytest.mark.parametrize("width", [1440, 1024, 390])
@pytest.mark.parametrize("slug", SLUGS)
def test_no_lesson_scrolls_sideways(server: Server, chromium_page: Watched, slug: str, width: int) -> None:
    chromium_page.page.set_viewport_size({"width": width, "height": 844})
    open_done(chromium_page, address(server, slug))
    assert chromium_page.page.evaluate("document.scrollingElement.scrollWidth") <= width


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


def test_a_knob_of_a_toy_lesson_runs_again(server: Server, chromium_page: Watched) -> None:
    open_done(chromium_page, address(server, "decode"))
    slider = f"[...{INSIDE}.querySelectorAll('input[type=range]')].find((i) => i.max === '96')"
    chromium_page.page.evaluate(
        f"(() => {{ const s = {slider}; s.value = 17; s.dispatchEvent(new Event('input', {{bubbles: true}}));"
        "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    chromium_page.until("leanscope.steps === 17", seconds=60)
