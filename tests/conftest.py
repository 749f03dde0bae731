"""What all tests share."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from app.browser import find_browser
from tests.support import Watched

# Two busy cores: time is no measure of a strategy here.
settings.register_profile("leanscope", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("leanscope")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what uses the browser or the real model, so that the quick check leaves it out.

    The lessons' pages are one group and all others another, a page at a time in each: as one group, they took twice as
    long as everything else. A lesson's tests stay in one worker, too, for they share recordings.
    """
    for item in items:
        used = getattr(item, "fixturenames", ())
        if "smollm2" in used:
            item.add_marker("real")
        if "chromium" in used:
            item.add_marker("browser")
        if item.get_closest_marker("browser"):
            pages = "lessons" if item.path.parent.name == "lessons" else "app"
            item.add_marker(pytest.mark.xdist_group(f"browser-{pages}"))
        elif item.path.parent.name == "lessons" and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def _one_thread_a_worker() -> None:
    """Two workers with two threads each wait for each other on two cores; the run service sets two for its process."""
    if "PYTEST_XDIST_WORKER" in os.environ and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser for the tests of one file. No longer: while Playwright lives, nobody else can run an event loop."""
    from playwright.sync_api import sync_playwright

    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def chromium_page(chromium: Any) -> Iterator[Watched]:
    """A fresh page; the test fails on any console error, script error, dialog or request to another host."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    watched = Watched(context.new_page())
    yield watched
    context.close()
    assert not watched.wrongs, watched.wrongs
