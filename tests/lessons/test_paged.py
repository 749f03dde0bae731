"""The lesson on paging: its laws at every step, what dropping words frees, and its main interaction in a browser."""

import functools

import numpy as np
import pytest

from app.runs import execute
from lessons.models import TOY
from lessons.paged import LESSON, Turn, entry_cell
from lessons.paging import DROPPED, LIVE
from tests.lessons.pages import INSIDE, address, open_done
from tests.support import Server, Watched


@functools.cache
def ran(**values):
    return execute("paged", {"model": TOY, **values})


@pytest.mark.parametrize("values", [{}, {"shared": True, "copies": 3}, {"memory": 32, "preempt": "swap"}, {"block": 1}])
def test_the_two_laws_hold_at_every_step(values):
    recording = ran(**values)
    blocks = recording.meta["blocks"]
    assert (recording.stack("paged.used") + recording.stack("paged.free") == blocks).all()
    assert (recording.stack("paged.pointers") == recording.stack("paged.references")).all()
    refs = recording.stack("pages.refs")
    for tables, counts in zip(recording.stack("paged.tables"), refs, strict=True):
        assert np.bincount(tables[tables >= 0], minlength=blocks).tolist() == counts.tolist()


@pytest.mark.parametrize("values", [{}, {"shared": True}])
def test_the_slots_drawn_are_those_that_texts_see(values):
    recording = ran(**values)
    codes = recording.stack("paged.slots")
    assert ((codes == LIVE).sum((1, 2)) == recording.stack("paged.held")).all()
    served = recording.meta["served"]
    assert not (codes[:served] == DROPPED).any()
    assert (codes[served:] == DROPPED).any()


def test_a_small_pool_sends_texts_away_and_says_so():
    recording = ran(memory=32)
    assert recording.meta["preempted"] == len(recording.happened("serve.preempt")) > 0
    assert recording.meta["same"]


def test_dropped_words_free_nothing_until_a_block_is_empty():
    scattered, oldest = (LESSON.facts(ran(evict=how)) for how in ("random", "oldest"))
    assert oldest["until_free"] == oldest["block"]
    assert scattered["until_free"] > scattered["block"]
    recording = ran()
    taken, held = recording.stack("paged.taken"), recording.stack("paged.held")
    first, free = scattered["drop_first"], scattered["drop_free"]
    assert len(set(taken[first:free].tolist())) == 1
    assert (np.diff(held[first : free + 1]) == -1).all()
    assert taken[free] == taken[first] - scattered["block"]


def test_a_pool_too_small_for_one_request_is_told_in_a_sentence():
    with pytest.raises(ValueError, match=r"needs \d+ tokens, and the pool of 2 blocks of 16 tokens holds 32"):
        execute("paged", {"model": TOY, "memory": 32, "block": 16, "steps": 32, "shared": True})


def test_an_entry_opens_the_address_of_its_words():
    recording = ran()
    opened = entry_cell(recording, Turn(model=TOY), {"sequence": 0, "entry": 1})
    block = int(opened.values["block"])
    tables = recording.stack("paged.tables")[:, 0, 1]
    assert block == tables[tables >= 0][-1]
    assert opened.lines[0] == ("words 4 to 7 of this text", "entry 1 of its table")


@pytest.mark.browser
def test_a_shared_prompt_is_switched_on_and_a_block_counts_two_readers(server: Server, chromium_page: Watched) -> None:
    page = chromium_page
    open_done(page, address(server, "paged", beat=4, step=4, shared=True))
    refs = f"[...{INSIDE}.querySelectorAll('.blocks-refs.shared')].map((e) => e.textContent)"
    page.until(f"{refs}.length > 0")
    said = page.page.evaluate(f"{INSIDE}.querySelector('.blocks-said').textContent")
    assert said
    free = f"[...{INSIDE}.querySelectorAll('.blocks-refs')].filter((e) => e.textContent === 'free').length"
    before = page.page.evaluate(free)
    page.page.keyboard.press("Home")
    page.until(f"{free} > {before}")
