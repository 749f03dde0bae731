"""`leanscope export`: pages that play from disk, with the network off, as the live ones do."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinyhtml5.parser import HTMLParser

from app import export
from app.cli import main
from app.link import Place, encode
from app.runs import Runs, perform
from app.snapshots import snapshots
from app.store import Store
from lessons import all_lessons
from tests.app.lessons.waves import LESSON as WAVES
from tests.lessons.pages import INSIDE
from tests.support import REAL, Server, Watched, serving

SMALL = {"decode": {"tokens": 12}, "sinks": {"tokens": 96, "window": 32}}


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' own lesson, exported."""
    target = tmp_path_factory.mktemp("waves") / "new" / "site"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lessons.all_lessons", lambda: {"waves": WAVES})
        write(target, [WAVES], Store(None), export.Options())
    return target


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Decode and sinks on the toy, shorter than they open, with one other setting each."""
    target = tmp_path_factory.mktemp("site") / "site"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANSCOPE_CACHE", str(cache))
        patch.setattr(export, "snapshots", few)
        write(target, [all_lessons()[slug] for slug in SMALL], Store(cache / "runs"), export.Options(model="toy"))
    return target


def write(target: Path, lessons: list[Any], store: Store, options: export.Options) -> None:
    runs = Runs(store, workers=1)
    try:
        export.export(target, lessons, runs, options, quiet)
    finally:
        runs.close()


def few(lesson: Any, *, model: str = "", defaults: bool = False) -> list[Any]:
    """The snapshots of a lesson, of SMALL's size, and not more than two."""
    found = []
    for one in snapshots(lesson, model=model, defaults=defaults)[:2]:
        knobs = lesson.knobs(**{**one.knobs.values(), **SMALL[lesson.slug]})
        found.append(type(one)(one.name, knobs))
    return found


@pytest.fixture(scope="module")
def server(cache: Path, site: Path) -> Iterator[Server]:
    """A live server with the very recordings that were exported."""
    with serving("--no-warm", "--no-models", cache=cache, program=REAL) as running:
        yield running


@pytest.fixture
def disk(chromium: Any) -> Iterator[Watched]:
    """A page without a network."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900}, offline=True)
    watched = Watched(context.new_page())
    yield watched
    context.close()
    assert not watched.wrongs, watched.wrongs


def ready(page: Watched, url: str) -> None:
    page.open(url)
    page.until("window.leanscope?.ready", seconds=90)
    page.until(f"{INSIDE}.querySelectorAll('[role=tabpanel] table tbody tr').length > 0", seconds=60)


def pictures(page: Watched) -> list[str]:
    """All pixels on the stage."""
    return page.page.evaluate(f"[...{INSIDE}.querySelectorAll('.stage canvas')].map(c => c.toDataURL())")


def shown(page: Watched, steps: int) -> list[list[str]]:
    """The stage at some steps, in the middle and at the end."""
    seen = []
    page.page.keyboard.press("Home")
    for step in (0, 1, 3, steps - 1):
        while page.page.evaluate("leanscope.step") < min(step, 3):
            page.page.keyboard.press(".")
        if step == steps - 1:
            page.page.keyboard.press("End")
        page.until(f"leanscope.step === {step}")
        page.page.wait_for_timeout(250)
        seen.append(pictures(page))
    return seen


def test_another_head_from_disk_is_drawn_as_live(
    site: Path, server: Server, disk: Watched, chromium_page: Watched
) -> None:
    """Its rows are taken from the tensors as they were recorded."""
    lesson = all_lessons()["decode"]
    parts = next(i for i, beat in enumerate(lesson.beats) if beat.scene == "parts")
    knobs = lesson.knobs(**{**few(lesson, model="toy")[0].knobs.values(), "head": 5, "layer": 1})
    token = encode(lesson, Place(knobs, beat=parts, step=9))
    seen = []
    for page, address in ((chromium_page, f"{server.url}/lesson/decode"), (disk, f"file://{site}/lesson/decode.html")):
        ready(page, f"{address}?s={token}")
        page.until("leanscope.step === 9")
        page.page.wait_for_timeout(300)
        seen.append(pictures(page))
    assert len(seen[0]) == len(seen[1]) > 2
    assert seen[0] == seen[1]
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(disk.page).response["violations"]
    assert not [rule["id"] for rule in found if rule["impact"] in ("critical", "serious")]


@pytest.mark.parametrize("slug", list(SMALL))
def test_an_exported_page_shows_the_pixels_of_the_live_one(
    slug: str, site: Path, server: Server, disk: Watched, chromium_page: Watched
) -> None:
    lesson = all_lessons()[slug]
    knobs = few(lesson, model="toy")[0].knobs
    ready(chromium_page, f"{server.url}/lesson/{slug}?s={encode(lesson, Place(knobs))}")
    ready(disk, f"file://{site}/lesson/{slug}.html")
    steps = disk.page.evaluate("leanscope.steps")
    assert steps == chromium_page.page.evaluate("leanscope.steps") > 4
    live, mine = shown(chromium_page, steps), shown(disk, steps)
    assert [len(one) for one in mine] == [len(one) for one in live]
    for step, (one, other) in enumerate(zip(mine, live, strict=True)):
        assert one == other, f"stop {step}"
    assert len({json.dumps(one) for one in live}) > 1, "nothing moved"
    text = f"{INSIDE}.querySelector('[role=tabpanel] table').innerText"
    assert disk.page.evaluate(text) == chromium_page.page.evaluate(text)
    sizes = [Path(url[7:]).stat().st_size for url in disk.requests if url.startswith("file:")]
    assert sum(sizes) < export.FIRST


def test_a_page_from_disk_answers_what_is_recorded_and_says_where_the_engine_is(site: Path, disk: Watched) -> None:
    ready(disk, f"file://{site}/lesson/decode.html")
    inside = disk.page.locator("#leanscope")
    disk.page.keyboard.press("End")
    canvas = inside.locator(".view-heatmaps canvas").first
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] * 0.3, "y": box["height"] * 0.45})
    disk.until(f"{INSIDE}.querySelector('.tip')?.innerText.includes('= ')")  # exact, no longer ≈
    canvas.click(position={"x": box["width"] * 0.3, "y": box["height"] * 0.45})
    disk.until(f"{INSIDE}.querySelector('.cell-line strong')")
    assert "looks at token" in inside.locator(".cell-title").inner_text()
    # another layer is in the recording; another temperature is not
    inside.locator("#knob-layer").fill("1")
    disk.until(f"{INSIDE}.querySelector('.stage').innerText.includes('layer 1')")
    inside.locator("#knob-temperature").fill("0.7")
    disk.until(f"{INSIDE}.querySelector('#error-temperature').innerText.includes('not recorded')")
    assert "make serve" in inside.locator("#error-temperature").inner_text()
    assert inside.locator("#knob-temperature").input_value() == "0"
    # the cache switched off is a snapshot of its own
    run = disk.page.evaluate("leanscope.run")
    inside.locator("#knob-cache").click()
    disk.until(f"leanscope.run && leanscope.run !== '{run}'")
    inside.locator("#knob-prompt").fill("my own words")
    inside.get_by_role("button", name="Run").click()
    disk.until(f"{INSIDE}.querySelector('#error-prompt').innerText.includes('not recorded')")
    inside.get_by_role("tab", name="Code").click()
    disk.until(f"{INSIDE}.querySelectorAll('.listing').length > 1")
    inside.get_by_role("tab", name="Tensors").click()
    inside.locator(".tensor-open").first.click()
    disk.until(f"{INSIDE}.querySelectorAll('.value-grid td').length > 10")


def test_the_tensors_come_out_of_a_page_from_disk_as_numpy_has_them(waves: Path, disk: Watched) -> None:
    ready(disk, f"file://{waves}/lesson/waves.html")
    disk.page.locator("#leanscope").get_by_role("tab", name="Tensors").click()
    with disk.page.expect_download() as saved:
        disk.page.locator("#leanscope .tensor-page button", has_text="npz").first.click()
    recording = perform(WAVES, WAVES.knobs())
    with np.load(saved.value.path()) as file:
        assert set(file.files) == set(recording.arrays())
        for key, array in recording.arrays().items():
            np.testing.assert_array_equal(file[key], array)
    disk.page.locator("#leanscope header").get_by_text("More").click()
    with disk.page.expect_download() as saved:
        disk.page.locator("#leanscope header").get_by_text("Open as notebook").click()
    assert json.loads(Path(saved.value.path()).read_text())["nbformat"] == 4


def test_a_link_to_a_place_works_from_disk_and_a_bad_one_says_so(waves: Path, disk: Watched) -> None:
    token = encode(WAVES, Place(WAVES.knobs(head=2), beat=1, step=5))
    ready(disk, f"file://{waves}/lesson/waves.html?s={token}")
    disk.until("leanscope.step === 5")
    assert disk.page.locator("#leanscope #knob-head").input_value() == "2"
    other = encode(WAVES, Place(WAVES.knobs(steps=5)))
    for token, words in (("%%%", "damaged"), (other, "not recorded")):
        ready(disk, f"file://{waves}/lesson/waves.html?s={token}")
        assert words in disk.page.locator("#leanscope .notices").inner_text()


def test_the_index_leads_to_the_lessons_that_are_here(site: Path, disk: Watched) -> None:
    disk.open(f"file://{site}/index.html")
    disk.until("window.leanscope?.ready")
    assert disk.page.locator("#leanscope .card-open").count() == 2
    assert disk.page.locator("#leanscope .card-open:has(canvas)").count() == 2
    assert "not in this copy" in disk.page.locator("#leanscope .parts").inner_text()
    disk.page.locator("#leanscope .card-open a").first.click()
    disk.until("window.leanscope?.ready && leanscope.lesson === 'decode'")
    disk.page.locator("#leanscope .brand").click()
    disk.until("window.leanscope?.ready && leanscope.lesson === ''")


def test_changed_missing_and_foreign_data_get_a_sentence_on_the_page(
    waves: Path, tmp_path: Path, chromium: Any
) -> None:
    context = chromium.new_context(offline=True)
    page = context.new_page()

    def told(change: Any) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(waves, copy)
        html = (copy / "lesson" / "waves.html").read_text()
        files = json.loads(html.split('id="leanscope-files">')[1].split("</script>")[0])["files"]
        change(copy / files["page"][0])
        page.goto(f"file://{copy}/lesson/waves.html")
        page.wait_for_selector("main.plain p", state="attached")
        return str(page.locator("main.plain p").first.inner_text())

    assert "is missing" in told(Path.unlink)
    assert "another" not in told(lambda path: path.write_text("void 0;\n"))
    version = json.dumps(export.version())
    old = told(lambda path: path.write_text(path.read_text().replace(f"({version}", '("0.0.1"')))
    assert "recorded by Leanscope 0.0.1" in old

    def flip(path: Path) -> None:
        head, data, tail = path.read_text().rsplit('"', 2)
        raw = bytearray(base64.b64decode(data))
        raw[len(raw) // 2] ^= 1
        path.write_text(f'{head}"{base64.b64encode(raw).decode()}"{tail}')

    assert "not as it was exported" in told(flip)
    context.close()


def test_exported_pages_are_valid_html(waves: Path) -> None:
    for path in waves.rglob("*.html"):
        text = path.read_text()
        parser = HTMLParser()
        parser.parse(text)
        assert parser.errors == []
        assert "<title>" in text
        assert ' lang="en"' in text
        assert "Content-Security-Policy" in text
        assert "unsafe-eval" not in text
        assert "script-src &#x27;self&#x27; file:;" in text
        assert "http:" not in text
        assert "https:" not in text
        assert f'content="Leanscope {export.version()}"' in text


def test_check_finds_what_changed(waves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(waves, copy)
    assert main(["export", str(copy), "--check"]) == 0
    assert "as it was exported" in capsys.readouterr().out
    changed, gone, *_ = sorted(copy.glob("data/waves/*.js"))
    changed.write_text(changed.read_text().replace("A", "B", 1))
    gone.unlink()
    (copy / "more.txt").write_text("more")
    assert main(["export", str(copy), "--check"]) == 1
    out = capsys.readouterr().out
    assert f"data/waves/{changed.name} is not as it was exported." in out
    assert f"data/waves/{gone.name} is missing." in out
    assert "more.txt does not belong to the export." in out
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "leanscope": "0.0.1"}))
    assert "It was exported by Leanscope 0.0.1" in export.check(copy)[1]
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))
    assert "can't check" in export.check(copy)[0][0]
    (copy / "manifest.json").write_text(json.dumps({**manifest, "files": {"../x": {"sha256": "", "bytes": 0}}}))
    assert "outside" in export.check(copy)[0][0]
    (copy / "manifest.json").write_text("[")
    assert "no export" in export.check(copy)[0][0]


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", str(tmp_path), "decode"]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "mine.txt")]) == 1
    assert main(["export", str(tmp_path / "new"), "nonsense"]) == 2
    assert main(["export", str(tmp_path / "new"), "--engine", "ftp://x"]) == 2
    assert main(["export", str(tmp_path / "new"), "--model", "gpt-9"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "still", broken)
    target = tmp_path / "site"
    target.mkdir()
    with pytest.raises(RuntimeError):
        write(target, [WAVES], Store(None), export.Options())
    assert list(tmp_path.iterdir()) == [target]
    assert list(target.iterdir()) == []


def broken(*arguments: Any) -> Any:
    raise RuntimeError("the disk is on fire")


def test_snapshots_are_what_the_beats_ask_for() -> None:
    sinks = snapshots(all_lessons()["sinks"], model="toy")
    turned = [one.knobs.values() for one in sinks]
    assert [turned[0]["model"], turned[0]["pinned"], turned[0]["sinks"]] == ["toy", True, 4]
    assert any(not one["pinned"] for one in turned)  # "Flip the sink switch"
    assert any(one["sinks"] == 1 for one in turned)  # "Turn Sinks to 1"
    assert len(snapshots(all_lessons()["sinks"], model="toy", defaults=True)) == 1
    for lesson in all_lessons().values():
        runs = [json.dumps(lesson.run_values(one.knobs)) for one in snapshots(lesson, model="toy")]
        assert len(set(runs)) == len(runs)
