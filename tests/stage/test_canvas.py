"""The stage in a real Chromium, fed by the real Feed and no server: pixels against tensors, the clock, keys, trust."""

import json

import numpy as np
import pytest
from bokeh.palettes import Cividis256
from colorcet import palette

from engine.recording import event, note, record, site, step, tap
from lessons.lesson import Beat, Scene
from lessons.views import Heatmaps, Slots, Strip, Tokens, of
from tests.stage_harness import CELL, PAGES, html, plain, saved, saved_home

pytestmark = pytest.mark.browser

GROWN = site("pixels.pattern", "a share", grows="query", low=0, high=1)
SIGNED = site("pixels.signed", "a signed frame")
SLOTS = site("pixels.slots", "what the slots hold")
NEAR = 6  # levels of 255 a channel may differ by: one step of a scale, and rounding


def rgb(hexes):
    return np.array([[int(c.lstrip("#")[i : i + 2], 16) for i in (0, 2, 4)] for c in hexes])


@pytest.fixture
def show(chromium_page, tmp_path):
    """Open a page of the harness; returns the watched page."""

    def open_it(name, page=None, *, data=None, width=1440, height=1000, theme="light"):
        data = data or (saved_home() if name == "home" else saved(name, page))
        (tmp_path / f"{name}.html").write_text(html(name, data=data))
        chromium_page.page.set_viewport_size({"width": width, "height": height})
        chromium_page.page.emulate_media(color_scheme=theme)
        chromium_page.open(f"file://{tmp_path}/{name}.html")
        chromium_page.until("window.leanscope && window.leanscope.ready")
        return chromium_page

    return open_it


def readable(watched):
    """Reading a canvas several times makes Chromium warn the page, which is not the page's doing."""
    watched.wrongs[:] = [w for w in watched.wrongs if "willReadFrequently" not in w]


def at_rest(watched):
    """Wait until nothing moves any more, and return the step."""
    watched.until("new Promise(r => { const f = leanscope.frames; setTimeout(() => r(leanscope.frames === f), 150); })")
    return watched.page.evaluate("leanscope.step")


def go(watched, wanted):
    watched.page.locator(".scrub").evaluate(f"e => {{ e.value = {wanted}; e.dispatchEvent(new Event('input')); }}")
    watched.until(f"leanscope.step === {wanted}")
    at_rest(watched)


def cells(watched, index=0):
    """The colour in the middle of every cell of a heatmap's large box: array [row, column, rgb], and its box."""
    canvas = watched.page.locator("canvas.pixels").nth(index)
    box = next(b for b in json.loads(canvas.get_attribute("data-boxes")) if b["large"])
    script = """(canvas, box) => {
      const all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      const rows = [];
      for (let y = box.y + box.ch / 2; y < canvas.height; y += box.ch) {
        const row = [];
        for (let x = box.x + box.cw / 2; x < canvas.width; x += box.cw) {
          const at = 4 * (Math.floor(y) * canvas.width + Math.floor(x));
          row.push([...all.slice(at, at + 3)]);
        }
        rows.push(row);
      }
      return rows;
    }"""
    seen = np.array(canvas.evaluate(script, box))
    readable(watched)
    return seen


def page_of(make, *views):
    first = PAGES["many"]
    return {**first, "make": make, "scene": Scene("pixels", views)}


def triangle(length, heads=1, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.random((heads, length, length)).astype(np.float32)
    return np.where(np.tri(length, dtype=bool), values, np.nan)


def grown(values):
    """A recording in which one row a step appears, each as wide as it is late."""

    def make():
        with record(budget=10**8) as recorder:
            note(model={"name": "noise", "kind": "simulated"})
            for t in range(values.shape[1]):
                tap(GROWN, values[:, t : t + 1, : t + 1], "head query key")
                step()
        return recorder.freeze()

    return make


@pytest.mark.parametrize(("heads", "exact"), [(1, True), (16, False)])
def test_pixels_are_the_colours_of_the_tensor(show, heads, exact):
    """Small rows travel as float32, large ones as codes spaced by squares: both must land on the right colour."""
    values = triangle(40, heads)
    view = Heatmaps(of(GROWN, head=0), rows="query", columns="key", colours="cividis", power=0.5, title="Pixels")
    if not exact:
        view = Heatmaps(of(GROWN), "query", "key", facet="head", focus=0, colours="cividis", power=0.5, title="Pixels")
    watched = show("pixels", page_of(grown(values), view))
    table = rgb(Cividis256)
    for at in (39, 0, 17, 39):  # forwards and back: what is drawn must not depend on the way there
        go(watched, at)
        seen = cells(watched)[:40, :40]
        rows, columns = np.nonzero(np.tri(40, dtype=bool) & (np.arange(40)[:, None] <= at))
        wanted = table[np.rint(255 * values[0][rows, columns] ** 0.5).astype(int)]
        assert np.abs(seen[rows, columns] - wanted).max() <= NEAR
        blank = np.abs(seen - table[0]).max(-1) <= NEAR  # a bounded quantity's ground is its lowest colour
        outside = np.ones((40, 40), bool)
        outside[rows, columns] = False
        assert blank[outside].all()


def test_a_frame_shows_the_newest_at_the_step_and_diverges_about_zero(show):
    frames = np.random.default_rng(4).normal(0, 1, (5, 6, 10)).astype(np.float32)

    def make():
        with record() as recorder:
            for frame in frames:
                tap(SIGNED, frame, "row column")
                step()
        return recorder.freeze()

    view = Heatmaps(of(SIGNED), rows="row", columns="column", colours="diverging", gaps=True, title="Signed")
    watched = show("signed", page_of(make, view))
    table = rgb(palette["CET_CBD1"])
    most = np.abs(frames).max()
    for at in (4, 2, 0):
        go(watched, at)
        wanted = table[np.rint(255 * (frames[at] / most + 1) / 2).astype(int)]
        assert np.abs(cells(watched)[:6, :10] - wanted).max() <= NEAR


def test_strips_show_every_slot_in_the_colour_of_its_state(show):
    codes = np.random.default_rng(2).choice([1, 3, 5], 30).astype(np.uint8)

    def make():
        with record() as recorder:
            for t in range(30):
                tap(SLOTS, codes[: t + 1], "slot")
                step()
        return recorder.freeze()

    watched = show("slots", page_of(make, Slots(strips=(Strip("All", of(SLOTS), "{kept} slots"),), title="Slots")))
    go(watched, 29)
    colours = {1: (0x9A, 0xA4, 0xAE), 3: (0x1E, 0x9A, 0xAA), 5: (0xB5, 0x30, 0x9A)}
    middle = """canvas => { const d = canvas.getContext("2d").getImageData(0, 14, canvas.width, 1).data;
      const out = []; for (let i = 0; i < d.length; i += 4) out.push([d[i], d[i + 1], d[i + 2]]); return out; }"""
    line = [tuple(c) for c in watched.page.locator("canvas.strip-canvas").evaluate(middle)]
    seen = [c for i, c in enumerate(line) if c in colours.values() and (i == 0 or line[i - 1] not in colours.values())]
    assert seen == [colours[c] for c in codes]
    assert watched.page.locator(".strip-detail").text_content() == "30 slots"


def test_frames_count_only_what_is_drawn_and_a_paused_page_is_still(show):
    watched = show("decode")
    before = watched.page.evaluate("leanscope.frames")
    watched.page.keyboard.press("Home")
    watched.page.keyboard.press("k")
    watched.until(f"leanscope.frames > {before} + 5")
    watched.page.keyboard.press("k")
    at_rest(watched)
    frames = watched.page.evaluate("leanscope.frames")
    watched.page.wait_for_timeout(400)
    assert watched.page.evaluate("leanscope.frames") == frames


def test_what_scripts_may_read_they_cannot_change(show):
    watched = show("decode")
    assert watched.page.evaluate("leanscope.lesson") == "decode"
    assert watched.page.evaluate("(() => { try { leanscope.step = 3 } catch {} return leanscope.step })()") == 35


def test_a_lesson_is_played_by_keyboard_alone(show):
    watched = show("decode")
    keyboard, page = watched.page.keyboard, watched.page
    for key, wanted in (("Home", 0), (".", 1), (".", 2), (",", 1), ("End", 35)):
        keyboard.press(key)
        watched.until(f"leanscope.step === {wanted}")
    keyboard.press("Space")
    assert page.locator(".dash[aria-current]").get_attribute("aria-label") == "Part 2 of 3"
    watched.until("leanscope.step === 20")  # the beat plays to its step
    canvas = page.locator("canvas.pixels").first
    canvas.focus()
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "Enter"):
        keyboard.press(key)
    asked = [m for m in page.evaluate("double.sent") if m["type"] == "cell"]
    assert asked[-1]["at"] == {"query": 32, "key": 2, "head": 3}
    assert asked[-1]["step"] == 20
    answer = plain({**CELL, "request": asked[-1]["request"]})
    page.evaluate("answer => double.play(answer)", answer)
    page.get_by_text("30% of this head").wait_for()
    assert page.locator(".do-card.finished").count() == 1
    keyboard.press("Escape")
    keyboard.press("Escape")
    assert page.locator(".cell-card").is_hidden()
    keyboard.press("t")
    page.locator(".view-table").first.locator("tr").nth(30).wait_for()
    keyboard.press("t")
    keyboard.press("Space")
    assert page.locator(".dash[aria-current]").get_attribute("aria-label") == "Part 3 of 3"


def test_someone_who_types_keeps_their_keys(show):
    watched = show("decode")
    page = watched.page
    page.locator("textarea").click()
    page.keyboard.press("End")
    page.keyboard.type(" k.t, ")
    assert page.locator("textarea").input_value().endswith(" k.t, ")
    assert page.evaluate("leanscope.step") == 35
    assert not [m for m in page.evaluate("double.sent") if m["type"] == "knobs"]
    page.get_by_role("button", name="Run").click()
    sent = [m for m in page.evaluate("double.sent") if m["type"] == "knobs"]
    assert sent[-1]["values"]["prompt"].endswith(" k.t, ")


NASTY = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'


def test_markup_from_outside_is_text(show):
    def make():
        with record() as recorder:
            note(model={"name": NASTY, "kind": "toy"})
            for t in range(4):
                event("text.token", piece=NASTY)
                tap(SLOTS, np.full(t + 1, 3, np.uint8), "slot")
                step()
        return recorder.freeze()

    page = page_of(make, Tokens(title=NASTY, codes=of(SLOTS)), Slots(strips=(Strip(NASTY, of(SLOTS), NASTY),)))
    page |= {"question": NASTY, "beats": (Beat(f"**{NASTY}** [[{NASTY}]]", step=0),), "facts": {"x": NASTY}}
    data = saved("nasty", page)
    data["lesson"]["title"] = data["lesson"]["part"] = NASTY
    data["start"]["notices"] = [NASTY]
    data["messages"] += [
        {"type": "notice", "text": NASTY + "!", "level": "warning"},
        {"type": "run", "run": "r1", "state": "failed", "steps": 0, "total": 0, "message": NASTY},
        {"type": "code", "sources": [{"name": NASTY, "file": NASTY, "line": 1, "text": NASTY, "taps": []}]},
    ]
    watched = show("nasty", data=data)
    watched.page.wait_for_timeout(300)
    assert watched.page.evaluate("window.hit") is None
    assert watched.page.locator("img").count() == 0
    assert watched.page.locator(".question h1").text_content() == NASTY


@pytest.mark.parametrize("name", ["sinks", "decode", "home"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(show, name, theme):
    from axe_playwright_python.sync_playwright import Axe

    watched = show(name, theme=theme)
    found = Axe().run(watched.page).response["violations"]
    bad = [f"{v['id']}: {n['html'][:160]}" for v in found if v["impact"] in ("critical", "serious") for n in v["nodes"]]
    assert not bad


@pytest.mark.parametrize("width", [1440, 1024, 390, 320])
@pytest.mark.parametrize("name", ["sinks", "decode"])
def test_no_page_scrolls_sideways(show, name, width):
    watched = show(name, width=width, height=844)
    assert watched.page.evaluate("document.scrollingElement.scrollWidth") <= width


def test_while_rows_stream_the_playhead_follows_until_it_is_taken_in_hand(show):
    data = saved("many", PAGES["many"])
    picture, rows = (next(m for m in data["messages"] if m["type"] == kind) for kind in ("picture", "rows"))
    size = int(np.prod(rows["shape"]))

    def batch(start, stop):
        part = {k: rows[k][start:stop] for k in ("at", "lo", "hi", "widths") if len(rows[k])}
        return plain({**rows, **part, "start": start, "data": rows["data"][start * size : stop * size]})

    running = {"type": "run", "run": "r1", "state": "running", "steps": 10, "total": 128}
    data["messages"] = [running, picture, batch(0, 10)]
    watched = show("stream", data=data)
    page = watched.page
    assert page.evaluate("[leanscope.step, leanscope.steps]") == [9, 10]
    page.evaluate("m => double.play(m)", batch(10, 20))
    watched.until("leanscope.step === 19")
    assert page.locator(".readout").text_content() == "token 20 / 128"
    page.keyboard.press(",")
    page.evaluate("m => double.play(m)", batch(20, 40))
    watched.until("leanscope.steps === 40")
    assert page.evaluate("leanscope.step") == 18
    assert page.get_by_role("button", name="Stop").is_visible()


def test_a_guess_is_scored_against_the_measured_value(show):
    watched = show("sinks")
    watched.page.keyboard.press("Space")
    assert watched.page.locator(".beat-text").text_content().count("41.0") == 1
    watched.page.get_by_role("button", name="30", exact=True).click()
    said = watched.page.locator(".verdict").text_content()
    assert "Measured just now: 20.9" in said
    assert "nearest was 20" in said
    watched.page.get_by_role("button", name="20", exact=True).click()
    assert "nearest of all" in watched.page.locator(".verdict").text_content()


def test_less_motion_means_a_jump_instead_of_a_glide(show, chromium_page):
    chromium_page.page.emulate_media(reduced_motion="reduce")
    watched = show("decode")
    watched.page.keyboard.press("Space")
    watched.page.wait_for_timeout(120)
    assert watched.page.evaluate("leanscope.step") == 20


def test_a_new_run_takes_the_stage_with_its_first_rows_and_keeps_the_step(show):
    """Turning a knob must neither blink nor lose the place: the old picture stays until the new one has something."""
    watched = show("many")
    page = watched.page
    go(watched, 5)
    old = page.locator("canvas.pixels").first.element_handle()
    data = saved("many", PAGES["many"])
    picture, rows = (next(m for m in data["messages"] if m["type"] == kind) for kind in ("picture", "rows"))
    page.evaluate("m => double.play(m)", {"type": "run", "run": "r2", "state": "running", "steps": 0, "total": 128})
    page.evaluate("m => double.play(m)", plain({**picture, "run": "r2"}))
    page.wait_for_timeout(200)
    assert old.evaluate("canvas => canvas.isConnected")
    assert page.evaluate("[leanscope.step, leanscope.steps]") == [5, 128]
    page.evaluate("m => double.play(m)", plain({**rows, "run": "r2"}))
    watched.until("leanscope.step === 5")
    assert not old.evaluate("canvas => canvas.isConnected")
    page.evaluate("m => double.play(m)", plain({**rows, "run": "r1"}))  # too late: nobody looks at that run any more
    assert page.evaluate("leanscope.steps") == 128


def test_a_complaint_stands_at_its_field_and_goes_when_the_knob_is_turned(show):
    page = show("decode").page
    about = {"type": "notice", "text": "Temperature must be from 0 to 2, not 9.", "level": "warning"}
    page.evaluate("m => double.play(m)", {**about, "knob": "temperature"})
    error = page.locator("#error-temperature")
    error.wait_for()
    assert error.text_content() == about["text"]
    assert page.locator("#knob-temperature").get_attribute("aria-invalid") == "true"
    assert page.locator(".notice:not(.away)").count() == 0
    page.locator("#knob-temperature").fill("1.5")
    assert error.is_hidden()
    page.evaluate("m => double.play(m)", {"type": "notice", "text": "SmolLM2 is not here.", "level": "info"})
    page.get_by_text("SmolLM2 is not here.").wait_for()
