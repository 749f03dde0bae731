"""Cells and bits in a browser: what is typed, pasted or flipped reaches the engine; what is no number is told there."""

from collections.abc import Iterator

import pytest

from app.runs import execute
from lessons.microscope import BACK, CODES, VALUES
from lessons.models import TOY
from lessons.number_formats import number_of
from tests.lessons.pages import INSIDE, address, open_done
from tests.support import REAL as COMMAND
from tests.support import Server, Watched, serving


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.1", 0.1), ("−2", -2.0), ("1e-8", 1e-8), ("inf", float("inf")), ("fp16 0111101111111111", 65504.0),
     ("fp8 e4m3 01111110", 448.0), ("int4 1000", -8.0), ("nf4 1111", 1.0)],
)  # fmt: skip
def test_a_number_is_typed_or_given_by_its_bits(text, value):
    assert number_of(text)[0] == value


@pytest.mark.parametrize(
    ("text", "words"),
    [("many", "“many” is no number"), ("fp16 01", "fp16 has 16 bits"), ("int4 1002", "each 0 or 1"), ("", "no number")],
)
def test_what_is_no_number_gets_a_sentence(text, words):
    with pytest.raises(ValueError, match=words):
        number_of(text)


def test_a_typed_matrix_is_quantised_as_the_lecture_does():
    recording = execute("quantise", {"model": TOY, "matrix": "1 2\n3 4", "bits": 2, "kind": "symmetric"})
    assert recording.track(VALUES, method="linear").latest().tolist() == [[1, 2], [3, 4]]
    assert recording.track(CODES, method="linear").latest().tolist() == [[0, 0], [1, 1]]  # 2 / 4 is a tie: to even
    assert recording.track(BACK, method="linear").latest().tolist() == [[0, 0], [4, 4]]
    assert recording.track(BACK, method="k-means").latest().tolist() == [[1, 2], [3, 4]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving("--no-warm", cache=tmp_path_factory.mktemp("cells"), program=COMMAND) as running:
        yield running


@pytest.mark.browser
def test_cells_are_typed_pasted_and_refused_where_they_stand(server: Server, chromium_page: Watched) -> None:
    open_done(chromium_page, address(server, "quantise", beat=3))
    page = chromium_page.page
    cell = page.get_by_label("Cells, row 2, column 3", exact=True)
    cell.fill("red")
    page.get_by_text("Row 2, column 3 holds “red”, which is no number (2.5 is one).").wait_for()
    assert cell.get_attribute("aria-invalid") == "true"
    before = page.evaluate("leanscope.run")
    cell.fill("20")
    chromium_page.until(f"leanscope.run !== {before!r}", seconds=60)
    assert cell.get_attribute("aria-invalid") == "false"
    pasted = "(text) => { const data = new DataTransfer(); data.setData('text', text); " \
        f"{INSIDE}.querySelector('.cell-input').dispatchEvent(new ClipboardEvent('paste', " \
        "{clipboardData: data, bubbles: true, cancelable: true})); }"  # fmt: skip
    page.evaluate(pasted, "1\t2\n3\tinf\n")
    page.get_by_text("Row 2, column 2 is infinite; only finite numbers have a place on a grid.").wait_for()
    page.evaluate(pasted, "1\t2\t3\n4\t5\t6\n")
    chromium_page.until(f"{INSIDE}.querySelectorAll('.cell-input').length === 6")
    chromium_page.until("location.search.includes('s=')", seconds=30)
    page.evaluate(pasted, "1\t" * 9)
    page.get_by_text("at most 8 by 8 fit").wait_for()


@pytest.mark.browser
def test_a_flipped_bit_is_another_number(server: Server, chromium_page: Watched) -> None:
    open_done(chromium_page, address(server, "number-formats"))
    page = chromium_page.page
    sign = page.get_by_label("fp16, bit 15, sign: 0. Flip it.")
    sign.click()
    page.get_by_label("fp16, bit 15, sign: 1. Flip it.").wait_for(timeout=60_000)
    chromium_page.until(f"/−0.09997559/.test({INSIDE}.querySelector('.bits').textContent)", seconds=60)
    assert page.get_by_label("Number", exact=True).input_value() == "fp16 1010111001100110"
