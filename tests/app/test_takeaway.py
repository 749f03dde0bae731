"""What is taken away from a page is what is on it: pictures, animations, tensors, claims, links, opened elsewhere."""

import csv
import io
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app import answers
from app.link import Place, encode
from app.runs import Findings
from engine.recording import Recording
from lessons import lesson as find_lesson
from tests.stage_harness import html
from tests.support import REAL, Server, Watched, grave, serving

EDGE = 16  # pixels around a picture
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"LEANSCOPE_NO_MODELS": "1", "LEANSCOPE_WARM": "0"}
    with serving(cache=tmp_path_factory.mktemp("take"), program=REAL, env=env) as running:
        yield running


@pytest.fixture
def fine(chromium: Any) -> Iterator[Watched]:
    """A page whose screen has two pixels to one of its own, as the pictures that are taken have."""
    context = chromium.new_context(viewport={"width": 1300, "height": 900}, device_scale_factor=2)
    watched = Watched(context.new_page())
    yield watched
    context.close()
    assert not watched.wrongs, watched.wrongs


class Taker:
    """A page and its Take away."""

    def __init__(self, watched: Watched, url: str, inside: str = "document") -> None:
        self.watched, self.page, self.inside = watched, watched.page, inside
        watched.open(url)
        self.until("window.leanscope?.ready && $.querySelector('.claims tbody tr')", seconds=200)

    def until(self, expression: str, *, seconds: float = 60) -> Any:
        return self.watched.until(expression.replace("$", self.inside), seconds=seconds)

    def ask(self, expression: str) -> Any:
        return self.page.evaluate(expression.replace("$", self.inside))

    def go(self, step: int) -> None:
        slider = "const s = $.querySelector('.scrub'); s.value = STEP; s.dispatchEvent(new Event('input'));"
        self.ask(f"(() => {{ {slider.replace('STEP', str(step))} }})()")
        self.until(f"leanscope.step === {step}")
        self.page.wait_for_timeout(100)

    def menu(self) -> None:
        self.page.locator(".more summary").click()
        self.page.get_by_role("button", name="Take away").click()

    def close(self) -> None:
        self.page.get_by_role("dialog").get_by_role("button", name="Close").click()

    def take(self, name: str, *, within: str = "dialog") -> tuple[str, bytes]:
        with self.page.expect_download(timeout=120_000) as info:
            self.page.get_by_role(within).get_by_role("button", name=name, exact=True).click()
        return info.value.suggested_filename, Path(info.value.path()).read_bytes()

    def choose(self, first: int, last: int, every: int) -> None:
        for label, value in (("From token", first), ("to", last), ("every", every)):
            self.page.get_by_label(label, exact=True).fill(str(value))

    def film(self, first: int, last: int, every: int) -> Image.Image:
        self.choose(first, last, every)
        return Image.open(io.BytesIO(self.take("GIF")[1]))

    def canvases(self) -> list[dict[str, Any]]:
        """Each canvas of the stage: where it is in the scene, and its pixels."""
        return self.ask(
            """(() => {
                const grid = $.querySelector('.stage-grid').getBoundingClientRect();
                return [...$.querySelectorAll('.stage canvas')].map((canvas) => {
                    const { left, top, width, height } = canvas.getBoundingClientRect();
                    return { at: [left - grid.left, top - grid.top], size: [width, height], data: canvas.toDataURL() };
                });
            })()"""
        )


def pixels(data: bytes | str) -> np.ndarray:
    """A picture, or a canvas's data URL, as RGBA bytes."""
    if isinstance(data, str):
        import base64

        data = base64.b64decode(data.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int)


def coarse(picture: np.ndarray) -> np.ndarray:
    """Means of eight by eight pixels."""
    h, w = (size // 8 * 8 for size in picture.shape[:2])
    return picture[:h, :w].reshape(h // 8, 8, w // 8, 8, -1).mean((1, 3))


def holds(picture: np.ndarray, canvas: dict[str, Any]) -> float:
    """The share of a canvas's opaque pixels that a picture twice as fine as the page has unchanged."""
    mine = pixels(canvas["data"])
    x, y = (round(2 * (EDGE + at)) for at in canvas["at"])
    there = picture[y : y + len(mine), x : x + len(mine[0])]
    mine = mine[: len(there), : len(there[0])]
    solid = mine[..., 3] == 255
    assert solid.sum() > 500
    return float((mine[solid] == there[solid]).all(-1).mean())


def address(server: Server, slug: str, **place: Any) -> str:
    lesson = find_lesson(slug)
    quick = {"tokens": 96, "window": 24} if slug == "sinks" else {}
    return f"{server.url}/lesson/{slug}?s={encode(lesson, Place(lesson.knobs(model='toy', **quick), **place))}"


LIVE = "document.querySelector('#leanscope').firstElementChild.shadowRoot"


@pytest.mark.browser
@pytest.mark.parametrize(("slug", "beat", "step"), [("decode", 1, 20), ("sinks", 3, 80)])
def test_a_picture_is_the_page(server: Server, fine: Watched, tmp_path: Path, slug: str, beat: int, step: int) -> None:
    taker = Taker(fine, address(server, slug, beat=beat, step=step), LIVE)
    taker.until(f"leanscope.step === {step}")
    taker.page.wait_for_timeout(500)
    taker.menu()
    taker.take("PNG")  # the page is laid out anew: what grew row by row may differ from that in the edges of a line
    before = taker.canvases()
    name, png = taker.take("PNG")
    assert name == f"leanscope-{slug}-{find_lesson(slug).scenes[0].name}-token-{step + 1}.png"
    picture = pixels(png)
    assert before
    for canvas in before:
        assert holds(picture, canvas) > 0.999, "the canvas is in the picture, pixel for pixel"
    assert taker.canvases() == before, "the page is as it was"
    _, data = taker.take("SVG")
    tree = ET.fromstring(data)  # well-formed
    assert not list(tree.iter(f"{SVG}foreignObject")), "any program can open it"
    assert len(list(tree.iter(f"{SVG}image"))) == len(before)
    words = "".join("".join(text.itertext()) for text in tree.iter(f"{SVG}text"))
    for title in taker.ask("[...$.querySelectorAll('.panel-title')].map(title => title.textContent)"):
        assert title.replace(" ", "") in words.replace(" ", "")
    (tmp_path / "scene.svg").write_bytes(data)
    other = taker.page.context.new_page()
    other.set_viewport_size({"width": int(tree.get("width", 0)), "height": int(tree.get("height", 0))})
    other.goto((tmp_path / "scene.svg").as_uri())
    shown = pixels(other.screenshot())
    assert shown.shape == picture.shape
    off = np.abs(coarse(shown) - coarse(picture))
    assert off.mean() < 0.5
    assert (off > 40).mean() < 0.001, "the SVG shows what the PNG shows, but for the edges of letters"


@pytest.mark.browser
def test_an_animation_has_the_frames_asked_for(server: Server, fine: Watched) -> None:
    taker = Taker(fine, address(server, "decode", beat=1, step=30), LIVE)
    taker.until("leanscope.step === 30")
    taker.menu()
    film = taker.film(3, 13, 5)
    assert (film.n_frames, film.info["loop"]) == (3, 0)
    frames, stood = [], []
    for i in range(3):
        film.seek(i)
        stood.append(film.info["duration"])
        frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert stood == [200, 200, 1000]
    assert taker.ask("leanscope.step") == 30
    # Each frame is the page at its step, and at no other.
    pictures = []
    taker.close()
    for step in (2, 7, 12):
        taker.go(step)
        taker.menu()
        png = Image.open(io.BytesIO(taker.take("PNG")[1])).convert("RGB")
        # A text that grows by a line makes the scene taller: the film has room for all of it.
        whole = Image.new("RGB", film.size, png.getpixel((0, 0)))
        whole.paste(png.reduce(2))
        assert png.height <= 2 * film.height
        pictures.append(np.asarray(whole).astype(int))
        taker.close()
    far = np.array([[np.abs(frame - picture).mean() for picture in pictures] for frame in frames])
    assert (far.argmin(1) == [0, 1, 2]).all(), far
    assert far.diagonal().max() < 2, far
    # What can't be filmed is told in a sentence.
    taker.menu()
    assert not grave(taker.page)
    for width in (390, 1300):
        taker.page.set_viewport_size({"width": width, "height": 844})
        assert taker.page.evaluate("document.scrollingElement.scrollWidth") <= width
    for first, last, every, sentence in (
        (5, 3, 1, "must not come before"),
        (1, 999, 1, "There are 40 tokens"),
        (0, 3, 1, "whole numbers from 1"),
    ):
        taker.choose(first, last, every)
        assert sentence in taker.ask("$.querySelector('.take').textContent")
        assert taker.page.get_by_role("button", name="GIF", exact=True).is_disabled()


@pytest.mark.browser
def test_numbers_and_a_link_lead_to_the_same(server: Server, fine: Watched, tmp_path: Path) -> None:
    taker = Taker(fine, address(server, "sinks", beat=2, step=70), LIVE)
    taker.page.get_by_role("tab", name="Tensors").click()
    (tmp_path / "r.safetensors").write_bytes(taker.take("The recording (.safetensors)", within="tabpanel")[1])
    recording = Recording.load(tmp_path / "r.safetensors")
    taker.ask("(() => { const s = $.querySelector('#knob-pinned'); s.click(); })()")  # another run than the link's
    taker.until(
        "$.querySelector('.run-status').textContent.match(/cache|computed/) && $.querySelector('.claims tbody tr')"
    )
    taker.ask("(() => { const s = $.querySelector('#knob-pinned'); s.click(); })()")
    taker.until("location.search.length > 3 && $.querySelector('.run-status').textContent.match(/cache|computed/)")
    taker.page.wait_for_timeout(1000)
    taker.go(83)
    taker.menu()
    name, npz = taker.take("All tensors (.npz)")
    assert name == "leanscope-sinks.npz"
    with np.load(io.BytesIO(npz), allow_pickle=False) as loaded:
        arrays = recording.arrays()
        assert set(loaded.files) == set(arrays)
        for key in loaded.files:
            np.testing.assert_array_equal(loaded[key], arrays[key])
    name, table = taker.take("The claims (.csv)")
    rows = list(csv.DictReader(io.StringIO(table.decode())))
    shown = taker.ask(
        "[...$.querySelectorAll('.claims tbody tr')].map(row => row.querySelector('.claim-text').textContent)"
    )
    assert [row["text"] for row in rows] == shown == [claim.text for claim in find_lesson("sinks").claims]
    assert {row["verdict"] for row in rows} <= {"agrees", "differs", "untestable"}
    link = taker.ask("$.querySelector('.take-link').value")
    other = Watched(taker.page.context.new_page())
    there = Taker(other, link, LIVE)
    assert there.ask("leanscope.step") == 83
    values = "[...$.querySelectorAll('.knob input, .knob select, .knob textarea')].map(i => [i.id, i.value, i.checked])"
    assert there.ask(values) == taker.ask(values)
    current = "[...$.querySelectorAll('.dash')].findIndex(dash => dash.hasAttribute('aria-current'))"
    assert there.ask(current) == taker.ask(current) == 2
    assert not other.wrongs


@pytest.mark.browser
def test_a_page_from_disk_gives_its_pictures_too(fine: Watched, tmp_path: Path) -> None:
    place = tmp_path / "sinks.html"
    place.write_text(html("sinks"))
    taker = Taker(fine, place.as_uri(), "document.getElementById('host').shadowRoot")
    taker.go(20)
    before = taker.canvases()
    taker.menu()
    picture = pixels(taker.take("PNG")[1])
    assert all(holds(picture, canvas) > 0.999 for canvas in before)
    assert taker.film(1, 2, 1).n_frames == 2


@pytest.mark.parametrize(
    ("cell", "safe"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+1+1", "'+1+1"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("-0.5", "-0.5"),
        ("+1,234.5", "+1,234.5"),
        ("3 = 3", "3 = 3"),
        ("", ""),
    ],
)
def test_a_cell_that_begins_a_formula_is_text(cell: str, safe: str) -> None:
    columns = ("text", "source", "formula", "reported", "measured", "unit", "verdict", "why")
    found = Findings({}, [], [dict.fromkeys(columns, cell)])
    (row,) = csv.DictReader(io.StringIO(answers._as_csv(found).decode(), newline=""))
    assert set(row.values()) == {safe}
