"""A lesson as a notebook to go on from: the lesson with these knobs, its tensors, a picture, a claim to recompute."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import nbformat
import numpy as np

from lessons.knobs import Knobs
from lessons.lesson import Claim, Lesson

Message = dict[str, Any]


def file(lesson: Lesson, knobs: Knobs) -> list[Message]:
    """The notebook as a file that the page offers for saving."""
    data = np.frombuffer(text(lesson, knobs).encode(), np.uint8)
    return [
        {"type": "file", "name": f"leanscope-{lesson.slug}.ipynb", "mime": "application/x-ipynb+json", "data": data}
    ]


def text(lesson: Lesson, knobs: Knobs) -> str:
    """The notebook, in Jupyter's format. It needs a kernel in which Leanscope is installed."""
    made = nbformat.v4.new_notebook()
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made.metadata.language_info = {"name": "python"}
    for number, (kind, source) in enumerate(_cells(lesson, knobs)):
        cell = (nbformat.v4.new_markdown_cell if kind == "text" else nbformat.v4.new_code_cell)(source)
        cell["id"] = f"{lesson.slug}-{number}"[:64]  # the same lesson and knobs make the same file
        made.cells.append(cell)
    nbformat.validate(made)
    return str(nbformat.writes(made))


def _cells(lesson: Lesson, knobs: Knobs) -> Iterator[tuple[str, str]]:
    turned = {n: v for n, v in knobs.values().items() if v != lesson.knobs.param[n].default}
    given = "".join(f", {name}={value!r}" for name, value in turned.items())
    yield "text", f"# {lesson.title}\n\n{lesson.question}\n\nThe lesson, live, with the knobs that you had turned."
    yield "code", f"import leanscope\n\nleanscope.show({lesson.slug!r}{given})"
    yield "text", "The same run as NumPy arrays. Each knows its axes and what it means."
    yield "code", f"recording = leanscope.run({lesson.slug!r}{given})\nrecording"
    yield "code", "recording.facts"
    yield "text", "One tensor, from all sides: choose what the sliders hold still, zoom, point at a value."
    yield (
        "code",
        "tensor = recording.pictured()[0]\nprint(tensor.key, tensor.axes, tensor.meaning)\nleanscope.explore(tensor)",
    )
    yield "text", "What the sources say, beside what this run measured."
    yield "code", "recording.claims"
    if lesson.claims:
        claim = lesson.claims[0]
        yield (
            "text",
            f"One claim again: **{claim.text}** ({claim.source}). This function measured it: change it, and "
            "see what that does.",
        )
        yield "code", _recomputed(claim, lesson)


def _recomputed(claim: Claim, lesson: Lesson) -> str:
    """The source of a claim's function, an import of what it uses from its module, and a call."""
    measure = claim.measure
    if not inspect.isfunction(measure) or measure.__closure__ or measure.__name__ == "<lambda>":
        number = lesson.claims.index(claim)
        return f"from lessons import lesson\n\nlesson({lesson.slug!r}).claims[{number}].measure(recording)"
    source = textwrap.dedent(inspect.getsource(measure))
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)} - {measure.__name__}
    known = measure.__globals__
    modules = sorted(f"import {known[n].__name__} as {n}" for n in names if inspect.ismodule(known.get(n)))
    others = sorted(n for n in names if n in known and not inspect.ismodule(known[n]))
    needed = "\n".join([*modules, f"from {measure.__module__} import {', '.join(others)}"] if others else modules)
    return f"{needed}\n\n\n{source}\n\n{measure.__name__}(recording)"
