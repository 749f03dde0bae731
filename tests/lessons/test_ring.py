"""The ring's lesson: what it shows is whole, what can't be is a sentence, and no process is left behind a page."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.link import Place, encode
from app.runs import execute
from lessons import all_lessons
from lessons.knobs import check
from lessons.ring import CHUNKS, DONE, FRAMES, IDLE, READY, STATE
from tests.support import REAL as COMMAND
from tests.support import Server, Watched, serving

INSIDE = "document.querySelector('#leanscope').firstElementChild.shadowRoot"
LESSON = all_lessons()["ring"]


def test_more_devices_than_tokens_is_a_sentence():
    with pytest.raises(ValueError, match="length must be 8 tokens at least for 8 ranks"):
        execute("ring", {"model": "toy", "ranks": 8, "length": 4})


@pytest.mark.slow
def test_in_the_end_every_piece_is_finished_by_the_device_that_keeps_its_queries():
    recording = execute("ring", {"model": "toy", "ranks": 2, "length": 64})
    assert recording.stack(READY)[-1] == 2
    for layout in ("contiguous", "zigzag"):
        owners = recording.stack(CHUNKS, layout=layout)[0][:, 2]
        for clock in ("own", "here"):
            where = {"layout": layout, "clock": clock}
            matrix = recording.stack(DONE, **where)
            assert len(matrix) == FRAMES
            lower = np.tril(np.ones_like(matrix[-1], bool))
            assert (matrix[-1] == np.where(lower, owners[:, None], -2)).all()
            finished = ((matrix >= 0) & (matrix < 100)).sum((1, 2))
            assert (np.diff(finished) >= 0).all(), "what is finished stays so"
            assert (recording.stack(STATE, **where)[-1] == 3).all()
            assert ((recording.stack(IDLE, **where) >= 0) & (recording.stack(IDLE, **where) < 1)).all()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving("--no-warm", cache=tmp_path, program=COMMAND) as running:
        yield running


def ranks_of(server: Server) -> list[int]:
    """The processes of a ring that this server has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"engine.exact.rank" in words and str(server.process.pid).encode() in words:
            found.append(int(folder.name))
    return found


def wait(wanted, *, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not wanted():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def address(server: Server, **values: object) -> str:
    knobs, problems = check(LESSON.knobs, {"model": "toy", "ranks": 2, "length": 64, **values})
    assert problems == []
    return f"{server.url}/lesson/ring?s={encode(LESSON, Place(knobs, 0, 0))}"


@pytest.mark.browser
@pytest.mark.slow
def test_no_process_is_left_when_the_visitor_leaves_or_a_process_dies(server: Server, chromium_page: Watched) -> None:
    page = chromium_page.page
    chromium_page.open(address(server))
    assert wait(lambda: len(ranks_of(server)) == 2, seconds=60), "two processes start"
    chromium_page.until(f"/Starting 2 processes/.test({INSIDE}.textContent)", seconds=60)
    page.goto("about:blank")
    assert wait(lambda: not ranks_of(server), seconds=60), "the visitor has left in the middle of the run"

    chromium_page.open(address(server, length=80))
    assert wait(lambda: len(ranks_of(server)) == 2, seconds=60)
    os.kill(ranks_of(server)[0], signal.SIGKILL)
    chromium_page.until(f"/rank \\d died \\(signal 9\\)/.test({INSIDE}.textContent)", seconds=60)
    assert wait(lambda: not ranks_of(server), seconds=10), "one of them was killed"

    chromium_page.open(address(server, length=96))
    chromium_page.until(f"leanscope?.steps >= {FRAMES}", seconds=200)
    chromium_page.until(f"{INSIDE}.querySelectorAll('[data-cell]').length === 4")
    page.keyboard.press("End")
    chromium_page.until(f"{INSIDE}.querySelectorAll('.ring-cell.finished').length === 3")
    assert len(ranks_of(server)) == 2, "they wait for the next run"
    server.process.send_signal(signal.SIGTERM)
    assert wait(lambda: not ranks_of(server), seconds=20), "the server has ended"
    chromium_page.forget()
