"""The explorer: any tensor of a run, sliced, plotted once and then only given other numbers; without eval."""

import asyncio
from collections.abc import Iterator
from typing import Any

import holoviews as hv
import numpy as np
import pytest
from bokeh.document import Document
from bokeh.events import SelectionGeometry, Tap
from bokeh.models import CustomJS

from app import explore, explorer
from app.arrays import Arrays
from app.link import Place, encode
from app.runs import Runs, perform
from app.store import Store
from tests.app.lessons.waves import LESSON, WAVE, WavesKnobs
from tests.support import Server, Watched, serving

RECORDING = perform(LESSON, WavesKnobs())
WAVES = Arrays(RECORDING, LESSON, WavesKnobs())  # head 4 · query 8 · key 8
INSIDE = "document.querySelector('#leanscope').firstElementChild.shadowRoot"


def test_a_cut_shows_two_axes_and_holds_the_others() -> None:
    wave = np.asarray(WAVES[WAVE])
    made = explore.cut(WAVES[WAVE], "query", "key", {"head": 2})
    np.testing.assert_array_equal(made.values, wave[2])
    np.testing.assert_array_equal(explore.cut(WAVES[WAVE], "key", "head", {"query": 3}).values, wave[:, 3].T)
    for down, across, held in (("", "", {}), ("nope", "nope", {"head": -5}), ("key", "key", {"nope": 1})):
        made = explore.cut(WAVES[WAVE], down, across, held)
        assert made.down != made.across
        assert made.whole
    assert explore.cut(WAVES[WAVE], "query", "key", {"head": 10**9}).held == {"head": 3}
    line = explore.cut(WAVES["waves.level"], "", "", {})
    assert (line.down, line.values.shape) == ("", (1, 8))


def test_colours_are_two_sided_only_around_zero() -> None:
    assert explore.scale(np.array([[0.0, 2.0]]))[:2] == (0.0, 2.0)
    low, high, palette = explore.scale(np.array([[-1.0, 3.0]]))
    assert (low, high) == (-3.0, 3.0)
    assert palette != explore.scale(np.array([[0.0, 1.0]]))[2]
    assert explore.scale(np.full((2, 2), np.nan))[:2] == (0.0, 1.0)
    assert explore.scale(np.zeros((2, 2)))[1] > 0


def test_every_value_is_counted_once() -> None:
    values = np.random.default_rng(1).normal(size=(40, 50)).astype(np.float32)
    values[0, 0] = np.nan
    counts, edges = explore.distribution(values)
    assert counts.sum() == values.size - 1
    part, same = explore.distribution(values[:5], values)
    assert part.sum() == 250 - 1
    np.testing.assert_array_equal(edges, same)


def test_a_notebook_gets_holoviews_objects() -> None:
    shown = explore.explore(WAVES[WAVE])
    assert isinstance(shown, hv.DynamicMap)
    assert [d.label for d in shown.kdims] == ["head"]
    np.testing.assert_allclose(shown[2].dimension_values(2, flat=False)[::-1].sum(), np.asarray(WAVES[WAVE])[2].sum())
    assert isinstance(explore.explore(WAVES, "waves.level"), hv.Curve)
    assert isinstance(explore.explore(WAVES[WAVE].at(head=1)), hv.Image)


class Page:
    """An explorer without a browser."""

    def __init__(self, doc: Document, runs: Runs) -> None:
        self.heard: list[dict[str, Any]] = []
        self.plots = explorer.Plots(doc)
        for figure in self.plots.roots.values():
            doc.add_root(figure)
        self.explorer = explorer.Explorer(doc, LESSON, Place(WavesKnobs()), runs, self.plots, self._take)
        self.explorer._apply = lambda change: change()  # type: ignore[method-assign]

    async def _take(self, messages: list[dict[str, Any]]) -> None:
        self.heard += messages

    async def hear(self, kind: str, count: int = 1) -> dict[str, Any]:
        for _ in range(500):
            found = [message for message in self.heard if message["type"] == kind]
            if len(found) >= count:
                return found[count - 1]
            await asyncio.sleep(0.02)
        raise AssertionError([message["type"] for message in self.heard])


def test_plots_are_made_once_and_given_other_numbers() -> None:
    async def story() -> None:
        doc, runs = Document(), Runs(Store(None), workers=1)
        page = Page(doc, runs)
        before = {figure.id for root in doc.roots for figure in root.references()}
        page.explorer.receive({"type": "ready"})
        listed = await page.hear("tensors")
        assert {t["key"] for t in listed["tensors"]} >= {WAVE, "waves.level"}
        first = await page.hear("cut")
        assert first["key"] == WAVE, "the one that the lesson shows"
        wave, image, plots = np.asarray(WAVES[WAVE]), page.plots.image, page.plots
        np.testing.assert_allclose(image.handles["source"].data["image"][0], wave[0])
        odd = {"held": {"head": -1, "x": "y", 3: 4}, "down": {}, "across": []}
        for hostile in (
            None,
            [],
            {"type": "choose"},
            {"type": "choose", "key": "../etc"},
            {"type": "choose", "key": WAVE, **odd},
            {"type": "colours", "colours": {"ink": "url(evil)"}},
            {"type": ["ready"]},
        ):
            page.explorer.receive(hostile)
        page.explorer.receive({"type": "choose", "key": WAVE, "down": "key", "across": "head", "held": {"query": 5}})
        while page.heard[-1].get("held") != {"query": 5}:
            await asyncio.sleep(0.02)
        np.testing.assert_allclose(image.handles["source"].data["image"][0], wave[:, 5].T)
        # A click sends lines through its cell; a box counts what it holds.
        figure = image.state
        doc.callbacks.trigger_event(Tap(figure, x=2.3, y=4.4))
        across = plots.across.handles["source"].data[plots.across.handles["glyph"].y]
        np.testing.assert_allclose(across, wave[:, 5, 4])
        box = {"type": "rect", "x0": -0.4, "x1": 1.4, "y0": 0.6, "y1": 2.4}
        doc.callbacks.trigger_event(SelectionGeometry(figure, geometry=box, final=True))
        counted = plots.counts.handles["source"].data[plots.counts.handles["glyph"].top]
        assert counted.sum() == 4
        for wrong in ({}, {"x0": None}, {"x0": 1e300, "x1": 0, "y0": 0, "y1": 0}):
            doc.callbacks.trigger_event(SelectionGeometry(figure, geometry=wrong, final=True))
        doc.callbacks.trigger_event(Tap(figure, x=1e6, y=-1e6))
        doc.callbacks.trigger_event(Tap(figure, x=None, y=None))
        after = {figure.id for root in doc.roots for figure in root.references()}
        assert after == before, "no model was made or dropped"
        assert not [model for root in doc.roots for model in root.select({"type": CustomJS})]
        page.explorer.close()
        runs.close()

    asyncio.run(story())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving("--no-warm", cache=tmp_path_factory.mktemp("explore")) as running:
        yield running


def pixels(page: Watched) -> int:
    """How many cells of the picture are drawn in colour: counted on Bokeh's own canvas."""
    return page.page.evaluate(
        """(() => {
            const inner = (e) => (e.shadowRoot ? all(e.shadowRoot) : []);
            const all = (node) => [node, ...[...node.querySelectorAll("*")].flatMap(inner)];
            const roots = all(document.querySelector("#plot-image"));
            const canvases = roots.flatMap((root) => [...root.querySelectorAll("canvas")]);
            const seen = new Set();
            for (const canvas of canvases) {
                if (!canvas.width) continue;
                const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                for (let i = 0; i < data.length; i += 4 * 37) seen.add(`${data[i]},${data[i + 1]},${data[i + 2]}`);
            }
            return seen.size;
        })()"""
    )


def test_the_page_explores_a_run_without_eval_and_for_everyone(server: Server, chromium_page: Watched) -> None:
    token = encode(LESSON, Place(WavesKnobs(steps=9)))
    chromium_page.open(f"{server.url}/lesson/waves?s={token}")
    chromium_page.until("window.leanscope?.ready && leanscope.steps === 9")
    chromium_page.page.evaluate(f"{INSIDE}.querySelector('#tab-Tensors').click()")
    chromium_page.page.evaluate(
        f"""(() => {{
            const link = {INSIDE}.querySelector("a[href*='explore/waves']");
            link.dispatchEvent(new Event("pointerdown"));
            link.click();
        }})()"""
    )
    chromium_page.until("location.pathname.endsWith('/explore/waves') && window.leanscope?.ready", seconds=40)
    assert f"s={token}" in chromium_page.page.url, "the very run of the page"
    text = f"{INSIDE}.querySelector('.explore-state').textContent"
    assert "head 4 · query 9 · key 9" in chromium_page.page.evaluate(text)
    chromium_page.until("document.querySelector('#plot-image').firstElementChild?.shadowRoot")
    for _ in range(100):
        if (drawn := pixels(chromium_page)) > 8:
            break
        chromium_page.page.wait_for_timeout(100)
    assert drawn > 8, "the matrix is drawn in many colours"
    # Another tensor, by keyboard.
    select = chromium_page.page.get_by_label("Tensor", exact=True)
    select.select_option("waves.level")
    chromium_page.until(f"{text}.includes('step 9')")
    select.select_option(WAVE)
    head = chromium_page.page.get_by_role("slider", name="head")
    head.focus()
    head.press("ArrowRight")
    chromium_page.until(f"{INSIDE}.querySelector('.explore-sliders output').textContent === '1 of 3'")
    chromium_page.page.wait_for_timeout(600)
    from axe_playwright_python.sync_playwright import Axe

    for theme in ("light", "dark"):
        chromium_page.page.emulate_media(color_scheme=theme)
        chromium_page.page.wait_for_timeout(400)
        found = Axe().run(chromium_page.page).response["violations"]
        assert not [v for v in found if v["impact"] in ("critical", "serious")], found
    chromium_page.page.set_viewport_size({"width": 390, "height": 844})
    chromium_page.page.wait_for_timeout(400)
    assert chromium_page.page.evaluate("document.documentElement.scrollWidth <= 390"), "it fits a phone"
