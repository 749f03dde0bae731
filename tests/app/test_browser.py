"""The pages in a real Chromium: they load from this server alone, show the run, and outlive their server."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.link import Place, encode
from tests.app.lessons.waves import LESSON, WavesKnobs
from tests.support import Server, Watched, serving

pytestmark = pytest.mark.browser

HTML = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the real stage."""
    with serving(cache=tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the tests' stage, which keeps what arrives in window.waves."""
    with serving(cache=tmp_path_factory.mktemp("bare"), env={"LEANSCOPE_TEST_STAGE": "1"}) as running:
        yield running


def transferred(page: Any) -> list[int]:
    """A list that grows with the bytes of everything that the page loads."""
    sizes: list[int] = []
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    session.on("Network.webSocketFrameReceived", lambda event: sizes.append(len(event["response"]["payloadData"])))
    return sizes


def test_a_lesson_draws_its_first_picture_from_few_bytes_of_this_server(server: Server, chromium_page: Watched) -> None:
    sizes = transferred(chromium_page.page)
    chromium_page.open(f"{server.url}/lesson/waves")
    chromium_page.until("window.leanscope?.ready && window.leanscope.steps === 8")
    assert sum(sizes) < 2_500_000
    assert chromium_page.page.evaluate("leanscope.lesson") == "waves"


def test_the_index_opens(server: Server, chromium_page: Watched) -> None:
    chromium_page.open(server.url)
    chromium_page.until("document.querySelector('#leanscope')?.firstElementChild?.shadowRoot?.querySelector('h1')")
    assert chromium_page.page.title() == "Leanscope"


def test_the_scripts_are_loaded_once_for_all_pages(bare: Server, chromium_page: Watched) -> None:
    chromium_page.open(f"{bare.url}/lesson/waves")
    chromium_page.until("window.waves?.got.length > 3")
    sizes = transferred(chromium_page.page)
    chromium_page.open(bare.url)
    chromium_page.until("window.waves")
    assert sum(sizes) < 60_000


def test_typed_arrays_and_the_order_of_messages_survive_the_way(bare: Server, chromium_page: Watched) -> None:
    chromium_page.open(f"{bare.url}/lesson/waves")
    chromium_page.until("window.waves?.got.some(m => m.type === 'facts')")
    kinds = chromium_page.page.evaluate("waves.got.map(m => m.type)")
    assert kinds == ["picture", "rows", "pieces", "run", "facts"]
    rows = "waves.got.find(m => m.type === 'rows')"
    assert chromium_page.page.evaluate(f"{rows}.data instanceof Float32Array && {rows}.at instanceof Int32Array")
    assert chromium_page.page.evaluate(f"Array.from({rows}.at)") == list(range(8))
    lesson = chromium_page.page.evaluate("waves.lesson")
    assert lesson["knobs"][-1]["look"] is True
    assert lesson["beats"][2]["scene"] == "level"
    assert chromium_page.page.evaluate("waves.places.home") == "../"


def test_html_in_a_link_and_in_a_text_is_shown_and_not_run(server: Server, chromium_page: Watched) -> None:
    token = encode(LESSON, Place(WavesKnobs(text=HTML, steps=5)))
    chromium_page.open(f"{server.url}/lesson/waves?s={token}")
    chromium_page.until("window.leanscope?.ready && window.leanscope.steps === 5")
    inside = "document.querySelector('#leanscope').firstElementChild.shadowRoot"
    assert chromium_page.page.evaluate(f"{inside}.querySelector('textarea').value") == HTML
    assert chromium_page.page.evaluate(f"{inside}.querySelectorAll('img, script').length") == 0
    time.sleep(0.3)  # an onerror would come by now, and chromium_page fails on its dialog


def test_a_bad_link_is_told_on_the_page(server: Server, chromium_page: Watched) -> None:
    chromium_page.open(f"{server.url}/lesson/waves?s=%3Cscript%3Ealert(1)%3C/script%3E")
    text = "document.querySelector('#leanscope').firstElementChild.shadowRoot.textContent"
    chromium_page.until(f"window.leanscope?.ready && {text}.includes('The link could not be followed')")


def test_the_address_follows_a_turned_knob_and_opens_the_same_page(server: Server, chromium_page: Watched) -> None:
    chromium_page.open(f"{server.url}/lesson/waves")
    chromium_page.until("window.leanscope?.ready")
    inside = "document.querySelector('#leanscope').firstElementChild.shadowRoot"
    chromium_page.page.evaluate(
        f"""(() => {{
            const slider = {inside}.querySelector("input[type=range]");
            slider.value = 21;
            for (const kind of ["input", "change"]) slider.dispatchEvent(new Event(kind, {{ bubbles: true }}));
        }})()"""
    )
    chromium_page.until("location.search.startsWith('?s=') && leanscope.steps === 21")
    chromium_page.open(chromium_page.page.url)
    chromium_page.until("window.leanscope?.ready && leanscope.steps === 21")


def test_a_page_finds_its_server_again_after_a_restart(tmp_path: Path, chromium_page: Watched) -> None:
    """The server is killed under an open page and started again: the page comes back, at the place where it was."""
    token = encode(LESSON, Place(WavesKnobs(steps=11)))
    with serving(cache=tmp_path) as server:
        chromium_page.open(f"{server.url}/lesson/waves?s={token}")
        chromium_page.until("window.leanscope?.ready && leanscope.steps === 11")
        chromium_page.page.evaluate("window.before = true")
        port = urlsplit(server.url).port or 0
        server.process.kill()
        server.process.wait()
        text = "document.querySelector('#leanscope').firstElementChild.shadowRoot.textContent"
        chromium_page.until(f"/server/i.test({text})", seconds=25)
        assert chromium_page.page.evaluate("window.before && leanscope.steps === 11"), "what was there must stay"
    with serving(cache=tmp_path, port=port):
        chromium_page.until("!window.before && window.leanscope?.ready && leanscope.steps === 11", seconds=40)
    expected = ("net::ERR_CONNECTION_REFUSED", "WebSocket", "websocket", "Lost", "not connected")
    chromium_page.wrongs[:] = [wrong for wrong in chromium_page.wrongs if not any(word in wrong for word in expected)]


def test_without_scripts_the_page_says_what_it_needs(server: Server, chromium: Any) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{server.url}/lesson/waves")
    assert "needs JavaScript" in page.inner_text("body")
    context.close()
