"""Lesson windows: its masks, fields and cells, against the engine's formulas."""

import numpy as np
import pytest

import lessons.windows as lesson
from app.runs import execute
from engine.mixers.windows import attended_cells, receptive_field
from lessons.knobs import check
from lessons.patterns import PATTERNS, held_of, mask_of, matrix_cell, sizes, sums
from tests.lessons.pages import INSIDE, address, open_done


@pytest.fixture(scope="module", params=["window", "interleaved", "global", "dilated"])
def run(request):
    values = {"pattern": request.param, "window": 12, "tokens": 90}
    knobs, problems = check(lesson.Turn, values)
    assert problems == []
    return knobs, execute("windows", values)


def test_counted_cells_are_those_of_the_formula(run):
    knobs, recording = run
    T = recording.meta["tokens"]
    size = sizes(knobs.pattern, knobs, 0)
    assert recording.stack(lesson.CELLS, of="pattern")[-1] == attended_cells(T, **size)
    assert recording.stack(lesson.CELLS, of="full")[-1] == T * (T + 1) // 2


def test_gradients_reach_as_far_as_the_formula(run):
    knobs, recording = run
    reached, formula = recording.stack(lesson.REACHED), recording.stack(lesson.FORMULA)
    assert reached.tolist() == formula.tolist()
    if knobs.pattern == "window":
        assert reached.tolist() == [receptive_field(d, window=12) for d in range(5)]
    field = recording.stack(lesson.FIELD)
    assert field.shape == (5, recording.meta["tokens"])
    assert (field.max(1) == 1).all()


def test_a_cell_shares_out_anew_what_the_mask_leaves(run):
    knobs, recording = run
    i = recording.meta["asked"]
    cells = [matrix_cell(recording, knobs, {"query": i, "key": j}).values for j in range(i + 1)]
    np.testing.assert_allclose(sum(cell["share"] for cell in cells), 1, rtol=1e-5)
    np.testing.assert_allclose(sum(cell["after"] for cell in cells), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="later"):
        matrix_cell(recording, knobs, {"query": 3, "key": 4})


def test_bytes_of_the_strips_are_those_of_the_caches(run):
    """What is kept by rule is what the tensors weigh: the last token of the question is read, of the answer not."""
    _, recording = run
    for name in PATTERNS.values():
        by_rule = recording.stack(lesson.BYTES, pattern=name)[recording.meta["tokens"] - 2]
        assert by_rule == recording.stack(lesson.CACHE, pattern=name)[-1]


def test_a_mask_and_what_is_held_agree():
    """A token's row of a mask is open where the cache after it holds a key, and the key to be dropped next."""
    size = {"window": 5, "global_tokens": 2}
    held, row = held_of(size, 20) != lesson.EVICTED, mask_of(size, 20)[19].astype(bool)
    assert (row & ~held).nonzero()[0].tolist() == [15]
    assert not (held & ~row).any()


def test_sums_at_any_size():
    lines = dict(sums({"n": 512, "w": 128, "L": 4, "every": 2}).lines)
    assert lines["n² / (n·w)"] == "4.00×"
    assert lines["fewer, cell by cell"] == "2.29×"
    with pytest.raises(ValueError, match="Window must"):
        sums({"n": 10, "w": 11, "L": 1, "every": 1})


CORNER = """(() => {
  const canvas = INSIDE.querySelector('[data-view=matrix] canvas');
  const box = JSON.parse(canvas.dataset.boxes)[0];
  const ratio = canvas.width / canvas.clientWidth;
  const place = (start, cell, n) => Math.floor((start + (n + 0.5) * cell) * ratio);
  const at = (i, j) => [place(box.x, box.cw, j), place(box.y, box.ch, i)];
  const copy = document.createElement('canvas');
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const pen = copy.getContext('2d', { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  return [0, 65].map((j) => [...pen.getImageData(...at(70, j), 1, 1).data].slice(0, 3));
})()"""


@pytest.mark.browser
def test_another_pattern_opens_other_cells(server, chromium_page):
    """What a window leaves out is grey, and darker than what stays open; through "Every cell" nothing is."""
    seen, pixels = [], {}
    for pattern in ("window", "full"):
        open_done(chromium_page, address(server, "windows", beat=1, pattern=pattern, tokens=80))
        chromium_page.page.keyboard.press("End")
        chromium_page.until("leanscope.step === leanscope.steps - 1")
        chromium_page.page.wait_for_timeout(300)
        number = f"{INSIDE}.querySelector('[data-view=counters] .number-value')"
        seen.append(chromium_page.until(f"{number}.textContent"))
        pixels[pattern] = chromium_page.page.evaluate(CORNER.replace("INSIDE", INSIDE))
    opened, all_of_them = (int("".join(c for c in text if c.isdigit())) for text in seen)
    assert opened < all_of_them
    assert pixels["window"][1] == pixels["full"][1], "an open cell looks alike in both"
    assert pixels["window"][0] != pixels["full"][0], "a cell left out is greyed"
