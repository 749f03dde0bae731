"""A matrix that the learner edits: how its cells are written, read, and refused with a sentence that names the cell.

A matrix is text: a row a line, its numbers with blanks between them. What a spreadsheet copies is read, too: columns
by tabs, else semicolons, else commas. Numbers are written with a point.
"""

from __future__ import annotations

import math

import param

ROWS, COLUMNS = 8, 8  # at most: whatever the numbers, a link still holds them
MOST = 1e30  # as large as a number may be
LECTURE = "2.09 -0.98 1.48 0.09\n0.05 -0.14 -1.08 2.12\n-0.91 1.92 0 -1.03\n1.87 0 1.53 1.49"  # of the lecture


class Matrix(param.String):
    """A knob of numbers in rows and columns. Its value is text in the plain form that `tidy` gives."""

    __slots__: list[str] = []


def tidy(text: str) -> str:
    """The matrix in its plain form; ValueError with a sentence, without the knob's name, for what is no matrix."""
    return "\n".join(" ".join(format(x, ".9g") for x in row) for row in numbers(text))


def numbers(text: str) -> list[list[float]]:
    """The rows of a matrix."""
    lines = text.strip(" \r\n").splitlines() or [""]
    if len(lines) > ROWS:
        raise ValueError(f"has {len(lines)} rows; at most {ROWS} fit.")
    between = next((sign for sign in "\t;," if any(sign in line for line in lines)), None)
    rows = [line.split(between) for line in lines]
    wide = max(map(len, rows))
    if wide > COLUMNS:
        raise ValueError(f"has {wide} columns; at most {COLUMNS} fit.")
    return [[_number(row[j] if j < len(row) else "", i, j) for j in range(max(1, wide))] for i, row in enumerate(rows)]


def _number(cell: str, i: int, j: int) -> float:
    where, cell = f"row {i + 1}, column {j + 1}", cell.strip()
    if not cell:
        raise ValueError(f"{where} is empty; a number is expected.")
    try:
        value = float(cell.replace("−", "-"))
    except ValueError:
        raise ValueError(f"{where} holds “{cell[:20]}”, which is no number (2.5 is one).") from None
    if "_" in cell or math.isnan(value):
        raise ValueError(f"{where} holds “{cell[:20]}”, which is no number (2.5 is one).")
    if math.isinf(value):
        raise ValueError(f"{where} is infinite; only finite numbers have a place on a grid.")
    if abs(value) > MOST:
        raise ValueError(f"{where} is larger than {MOST:g}, the most that a cell holds.")
    return value
