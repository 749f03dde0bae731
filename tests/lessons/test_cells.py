"""A matrix to edit: what is read, and the sentence that names the cell which cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.link import LIMIT, Place, encode, fits
from lessons import all_lessons
from lessons.cells import COLUMNS, LECTURE, MOST, ROWS, Matrix, numbers, tidy
from lessons.knobs import Knobs, check


class Turn(Knobs):
    matrix = Matrix(LECTURE, label="Matrix", doc="Cells.")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("1 2\n3 4", [[1, 2], [3, 4]]),
        ("2.09\t-0.98\r\n1.48\t0.09\r\n", [[2.09, -0.98], [1.48, 0.09]]),  # as a spreadsheet copies
        ("1;2\n3;4", [[1, 2], [3, 4]]),
        ("1, 2\n 3, 4", [[1, 2], [3, 4]]),
        ("−1", [[-1]]),
        ("1e-3 .5", [[0.001, 0.5]]),
    ],
)
def test_what_people_type_and_paste_is_read(text, rows):
    assert numbers(text) == rows
    assert numbers(tidy(text)) == rows


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1 2\n3 red", "Matrix: row 2, column 2 holds “red”, which is no number (2.5 is one)."),
        ("1\t\t3", "Matrix: row 1, column 2 is empty; a number is expected."),
        ("1 2\n3", "Matrix: row 2, column 2 is empty; a number is expected."),
        ("2,09;1,48", "Matrix: row 1, column 1 holds “2,09”, which is no number (2.5 is one)."),
        ("inf", "Matrix: row 1, column 1 is infinite; only finite numbers have a place on a grid."),
        ("1 -1e999", "Matrix: row 1, column 2 is infinite; only finite numbers have a place on a grid."),
        ("nan", "Matrix: row 1, column 1 holds “nan”, which is no number (2.5 is one)."),
        ("1_0", "Matrix: row 1, column 1 holds “1_0”, which is no number (2.5 is one)."),
        ("1e31", "Matrix: row 1, column 1 is larger than 1e+30, the most that a cell holds."),
        ("1\n" * 9, "Matrix: has 9 rows; at most 8 fit."),
        ("1 2 3 4 5 6 7 8 9", "Matrix: has 9 columns; at most 8 fit."),
        ("<b>", "Matrix: row 1, column 1 holds “<b>”, which is no number (2.5 is one)."),
        (" ", "Matrix is empty; type at least one word."),
        ([[1]], "Matrix must be text, not [[1]]."),
    ],
)
def test_what_is_no_matrix_is_refused_at_its_cell(text, sentence):
    knobs, problems = check(Turn, {"matrix": text})
    assert problems == [sentence]
    assert knobs.matrix == LECTURE


@given(st.text(max_size=60))
def test_no_text_breaks_it(text):
    knobs, problems = check(Turn, {"matrix": text})
    assert numbers(knobs.matrix)
    assert len(problems) <= 1
    assert not problems or knobs.matrix == LECTURE


@given(st.lists(st.lists(st.floats(-MOST, MOST), min_size=COLUMNS, max_size=COLUMNS), min_size=ROWS, max_size=ROWS))
def test_the_largest_matrix_fits_into_a_link(rows):
    text = "\n".join(" ".join(map(repr, row)) for row in rows)
    knobs, problems = check(Turn, {"matrix": text})
    assert problems == []
    assert tidy(knobs.matrix) == knobs.matrix  # the plain form of the plain form
    lesson = all_lessons()["quantise"]
    place = Place(lesson.knobs(matrix=knobs.matrix))
    assert fits(lesson, place)
    assert len(encode(lesson, place)) <= LIMIT
