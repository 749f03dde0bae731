"""The page on a projector: large, a spotlight, a clicker's keys, notes in a second window, no need of a network."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from app.link import Place, encode
from lessons import lesson as find_lesson
from tests.support import REAL, Server, Watched, grave, serving

pytestmark = pytest.mark.browser

AWAY = ("net::ERR_", "WebSocket", "websocket", "Lost", "not connected")
INSIDE = "document.querySelector('#leanscope').firstElementChild.shadowRoot"


def address(server: Server, slug: str, **turned: Any) -> str:
    lesson = find_lesson(slug)
    return f"{server.url}/lesson/{slug}?present=1&s={encode(lesson, Place(lesson.knobs(model='toy', **turned)))}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"LEANSCOPE_NO_MODELS": "1", "LEANSCOPE_WARM": "0"}
    with serving(cache=tmp_path_factory.mktemp("present"), program=REAL, env=env) as running:
        yield running


class Projector:
    """A presenting page, what is on it, and its notes."""

    def __init__(self, watched: Watched, server: Server, slug: str, **turned: Any) -> None:
        self.watched, self.page = watched, watched.page
        self.lesson = find_lesson(slug)
        watched.open(address(server, slug, **turned))
        self.until("window.leanscope?.ready")

    def until(self, expression: str, *, seconds: float = 60) -> Any:
        return self.watched.until(expression.replace("$", INSIDE), seconds=seconds)

    def ask(self, expression: str) -> Any:
        return self.page.evaluate(expression.replace("$", INSIDE))

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    @property
    def beat(self) -> int:
        return self.ask(
            "[...$.querySelectorAll('.dash')].findIndex(dash => dash.ariaCurrent || dash.hasAttribute('aria-current'))"
        )

    def titles(self) -> list[str]:
        return self.ask("[...$.querySelectorAll('.panel-title')].map(title => title.textContent)")

    def painted(self) -> str:
        """What is on the stage: every canvas's pixels, and all words. A step is drawn in the frame after it."""
        self.ask("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        canvases = "[...$.querySelectorAll('.stage canvas')].map(canvas => canvas.toDataURL()).join()"
        return self.ask(f"{canvases} + $.querySelector('.stage').innerText")

    def notes(self) -> Any:
        with self.page.expect_popup() as opened:
            self.press("n")
        notes = opened.value
        notes.on("pageerror", lambda error: self.watched.wrongs.append(f"notes: {error}"))
        notes.on("console", lambda m: m.type == "error" and self.watched.wrongs.append(f"notes: {m.text}"))
        return notes

    def told(self, notes: Any, where: str, text: str) -> None:
        """Wait until the notes say so."""
        end = time.monotonic() + 200
        while text not in notes.inner_text(where):
            assert time.monotonic() < end, notes.inner_text(where)
            self.page.wait_for_timeout(50)

    def walk(self) -> None:
        """On to the end, beat by beat: each brings its scene and its spotlight, and something is drawn."""
        shown = ""
        for index, beat in enumerate(self.lesson.beats):
            if index:
                self.press("PageDown")
            assert self.beat == index
            shown = beat.scene or shown
            wanted = [view.title or view.name or view.kind for view in self.lesson.scene(shown).views]
            self.until(
                f"[...$.querySelectorAll('.panel-title')].map(t => t.textContent).join() === {','.join(wanted)!r}",
                seconds=10,
            )
            spots = self.ask("[...$.querySelectorAll('.panel.spot')].map(panel => panel.dataset.view)")
            assert spots == ([beat.focus] if beat.focus else []), index
            assert self.ask(
                "![...$.querySelectorAll('.view')].some(view => view.textContent.includes('could not be drawn'))"
            )
            assert self.ask("$.querySelector('.stage').classList.contains('stale')") is False


def test_a_presented_page_is_large_and_follows_a_clicker(server: Server, chromium_page: Watched) -> None:
    show = Projector(chromium_page, server, "sinks")
    page = show.page
    enlarged = min(1440 / 1100, 900 / 640)
    assert show.ask("$.querySelector('.leanscope').currentCSSZoom") == pytest.approx(enlarged)
    text = "parseFloat(getComputedStyle($.querySelector('.beat-text')).fontSize)"
    assert show.ask(text) * enlarged > 28, "letters that the last row can read"
    assert show.ask("getComputedStyle($.querySelector('.leanscope')).color") == "rgb(0, 0, 0)"
    hidden = (
        "['.tabs', '.side-title', '.knob', '.crumbs', '.key-hints'].every(q => !$.querySelector(q).checkVisibility())"
    )
    assert show.ask(hidden), "no clutter"
    # The keys that clickers send.
    for key, beat in (("PageDown", 1), ("PageDown", 2), ("PageUp", 1), ("Enter", 2), (" ", 3), ("ArrowLeft", 2)):
        show.press(key)
        assert show.beat == beat, key
    # Sound for axe, and no wider than any screen.
    show.press("PageUp")
    assert not show.lesson.beats[1].focus, "what steps back is faint, and meant to be"
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        show.until(f"$.querySelector('.leanscope').dataset.theme === '{theme}'")
        page.wait_for_timeout(400)
        assert not grave(page)
    page.emulate_media(color_scheme="light")
    for width in (1024, 390, 1440):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    show.press("PageDown")
    # What the beat doesn't speak of steps back.
    assert show.lesson.beats[2].focus == "curves"
    clear = "(getComputedStyle(panel).opacity === '1') === panel.classList.contains('spot')"
    show.until(f"[...$.querySelectorAll('.panel')].every(panel => {clear})")
    # A black screen: by a clicker's keys, until the next, which does not go on.
    for key in (".", "b"):
        show.press(key)
        assert (
            page.evaluate(f"document.elementFromPoint(700, 400) && {INSIDE}.elementFromPoint(700, 400).className")
            == "blank"
        )
        show.press("PageDown")
        assert show.beat == 2
        assert show.ask("!$.querySelector('.blank').checkVisibility()")
    # A clicker goes on though the scrubber has the focus.
    show.ask("$.querySelector('.scrub').focus()")
    show.press("PageDown")
    assert show.beat == 3
    # The knob that a beat asks for is at hand, the others are not.
    asked = next(i for i, beat in enumerate(show.lesson.beats) if beat.do and beat.do.knob)
    for _ in range(asked - 3):
        show.press("PageDown")
    shown = "[...$.querySelectorAll('.knob')].filter(knob => knob.checkVisibility())"
    assert show.ask(f"{shown}.length") == 1
    assert show.ask(f"{shown}[0].querySelector('#knob-{show.lesson.beats[asked].do.knob}') !== null")
    # And back to a page like any other.
    show.press("P")
    assert "present" not in page.url
    assert show.ask("$.querySelector('.tabs').checkVisibility() && $.querySelector('.leanscope').currentCSSZoom === 1")


def test_a_pointer_finds_its_cell_on_the_enlarged_page(server: Server, chromium_page: Watched) -> None:
    show = Projector(chromium_page, server, "decode")
    show.until("$.querySelector('.view-heatmaps canvas')?.dataset.boxes && leanscope.steps >= 20")
    place = show.ask(
        """(() => {
            const canvas = $.querySelector('.view-heatmaps canvas');
            canvas.scrollIntoView({ block: 'center' });
            const box = JSON.parse(canvas.dataset.boxes)[0];
            const rect = canvas.getBoundingClientRect();
            const by = rect.width / canvas.offsetWidth;
            const [x, y] = [box.x + 2.5 * box.cw, box.y + 7.5 * box.ch];
            return [rect.left + by * x, rect.top + by * y, canvas.width / rect.width];
        })()"""
    )
    show.page.mouse.move(place[0], place[1])
    tip = show.until("$.querySelector('.tip:not([hidden])')?.innerText")
    assert "query 7" in tip
    assert "key 2" in tip
    assert place[2] == pytest.approx(1, abs=0.01), "a canvas has a pixel for each of the screen's"
    box = show.ask("(({ left, top }) => [left, top])($.querySelector('.tip').getBoundingClientRect())")
    assert abs(box[0] - place[0]) < 60
    assert abs(box[1] - place[1]) < 120


def test_notes_show_what_comes_and_the_answer_and_lead_the_page(server: Server, chromium_page: Watched) -> None:
    show = Projector(chromium_page, server, "decode")
    notes = show.notes()
    text = lambda: notes.inner_text("main")  # noqa: E731
    guess = next(i for i, beat in enumerate(show.lesson.beats) if beat.predict)
    chromium_page.until(f"{INSIDE}.querySelector('.run-status').textContent.match(/cache|computed/)", seconds=60)
    assert show.lesson.beats[0].notes.split(".")[0] in text()
    for i in range(guess):
        notes.get_by_role("button", name="Next").click()
        assert show.beat == i + 1, "the notes lead"
    show.press("PageUp")
    show.press("PageDown")
    notes.wait_for_timeout(600)
    said = text()
    assert f"{guess + 1} of {len(show.lesson.beats)}" in said
    measured = notes.inner_text(".notes-guess .measured")
    notes.keyboard.press("PageDown")  # the keys of the notes are the page's
    assert show.beat == guess + 1
    assert f"{measured.split(' ')[0]} times fewer" in show.ask("$.querySelector('.beat-text').innerText")
    assert not grave(notes)
    # The clock: held, and set back.
    notes.get_by_role("button", name="Pause").click()
    held = notes.inner_text(".notes-clock")
    notes.wait_for_timeout(1300)
    assert notes.inner_text(".notes-clock") == held
    notes.get_by_role("button", name="Set back").click()
    notes.wait_for_timeout(400)
    assert notes.inner_text(".notes-clock") == "0:00"
    notes.get_by_role("button", name="Blank").click()
    assert show.ask("$.querySelector('.blank').checkVisibility()")
    show.press("P")
    for _ in range(50):
        if notes.is_closed():
            break
        show.page.wait_for_timeout(50)
    assert notes.is_closed(), "notes go with the projector"


def test_without_a_network_all_beats_go_on(server: Server, chromium_page: Watched) -> None:
    show = Projector(chromium_page, server, "sinks", tokens=96, window=24)
    notes = show.notes()
    show.told(notes, ".notes-status", "Every part is in this page and plays on without the network.")
    show.page.context.set_offline(True)
    try:
        show.walk()
        show.told(notes, ".notes-place", f"{len(show.lesson.beats)} of {len(show.lesson.beats)}")
    finally:
        show.page.context.set_offline(False)
    chromium_page.wrongs[:] = [wrong for wrong in chromium_page.wrongs if not any(word in wrong for word in AWAY)]


def test_with_the_server_killed_beats_scenes_and_steps_go_on(server: Server, chromium_page: Watched) -> None:
    """The last of this file: nobody has a server after it."""
    show = Projector(chromium_page, server, "decode")
    notes = show.notes()
    show.told(notes, ".notes-status", "plays on without the network")
    assert show.titles() == [view.title for view in show.lesson.scenes[0].views], "no other scene was shown yet"
    server.process.kill()
    server.process.wait()
    show.walk()
    show.press("Home")
    show.until("leanscope.step === 0")
    first = show.painted()
    show.press("End")
    show.until("leanscope.step === leanscope.steps - 1 && leanscope.steps > 20")
    assert show.painted() != first
    show.until("$.textContent.includes('The server is away. What you have plays on.')", seconds=30)
    show.ask("(() => { const s = $.querySelector('#knob-cache'); s.click(); })()")
    show.until("$.querySelector('.notices').textContent.includes('this setting was not fetched ahead')")
    assert show.painted(), "the picture stays"
    assert show.ask("location.search").startswith("?present=1"), "the page was not left"
    chromium_page.wrongs[:] = [wrong for wrong in chromium_page.wrongs if not any(word in wrong for word in AWAY)]
