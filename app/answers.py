"""What a page asks of a recording: a cell's arithmetic, exact rows, the engine's source, the list of tensors, files.

Pure functions from a recording to a message (CONTRIBUTING.md lists them). They run in a thread, and what they are
given has come from a browser: they bound it, and answer with a sentence rather than raise.
"""

from __future__ import annotations

import csv
import functools
import importlib
import inspect
import io
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from app.picture import exact_row, find, pick
from app.runs import Findings
from engine.recording import Recording, Track
from lessons.knobs import Knobs
from lessons.views import Calculator, Of, View

log = logging.getLogger(__name__)

Message = dict[str, Any]

STEPS = 1_000_000  # no recording has so many
SHOWN = 4096  # values of a tensor that the page may look at in one piece
KINDS = {  # what can be saved: the ending of the file's name, and its type
    "npz": (".npz", "application/octet-stream"),
    "recording": (".safetensors", "application/octet-stream"),
    "claims": ("-claims.csv", "text/csv"),
}


def notice(text: str, *, level: str = "warning") -> Message:
    return {"type": "notice", "text": text, "level": level}


def whole(value: Any, high: int) -> bool:
    """Whether a value from a browser is a whole number from 0 to `high`."""
    return type(value) is int and 0 <= value <= high


def exact(recording: Recording, tensor: Of, knobs: Knobs, *, request: Any, track: str, row: int) -> list[Message]:
    """A row that travelled as codes, as it was."""
    values = exact_row(recording, tensor, knobs, row)
    if values is None:
        return []
    return [{"type": "exact", "request": request, "track": track, "row": row, "data": values.reshape(-1)}]


def cell(
    recording: Recording, view: View, knobs: Knobs, at: Any, *, request: Any, index: int, step: int | None = None
) -> list[Message]:
    """The arithmetic behind one cell of a view, as it stands at `step`."""
    answer: Message = {"type": "cell", "request": request, "view": index}
    opener, tensor = getattr(view, "cell", None), getattr(view, "tensor", None)
    if opener is None or tensor is None:
        return [{**answer, "error": "This picture has no arithmetic behind it."}]
    found = find(recording, tensor, knobs)
    if found is None or not isinstance(at, dict) or not _within(*found, at, step):
        return [{**answer, "error": "There is no such cell."}]
    try:
        opened = opener(recording, knobs, dict(at) if step is None else {**at, "step": step})
    except Exception:
        log.exception("a cell of %s could not be opened at %s", tensor.name, at)
        return [{**answer, "error": "This cell's arithmetic could not be computed."}]
    return [
        {
            **answer,
            "title": opened.title,
            "lines": [[str(symbols), str(value)] for symbols, value in opened.lines],
            "note": opened.note,
            "vectors": [[str(name), [float(x) for x in row]] for name, row in opened.vectors],
        }
    ]


def calculate(view: View | None, values: Any, *, request: Any, index: Any) -> list[Message]:
    """What a calculator's formulas make of the numbers typed in; or a sentence, and the field that it is about."""
    answer: Message = {"type": "calculated", "request": request, "view": index}
    if not isinstance(view, Calculator) or not isinstance(values, dict):
        return [{**answer, "error": "There is no such calculator."}]
    numbers: dict[str, float] = {}
    for field in view.fields:
        value: Any = values.get(field.name)
        number = type(value) in (int, float)
        if not number or not field.low <= value <= field.high or (field.whole and value % 1):
            kind = "a whole number" if field.whole else "a number"
            error = f"{field.label} must be {kind} from {field.low:,g} to {field.high:,g}."
            return [{**answer, "error": error, "field": field.name}]
        numbers[field.name] = int(value) if field.whole else float(value)
    try:
        opened = view.compute(numbers)
    except ValueError as error:
        text = str(error)
        about = next((f.name for f in view.fields if text.startswith((f.label, f.name))), "")
        return [{**answer, "error": text[:1].upper() + text[1:], "field": about}]
    lines = [[str(label), str(value)] for label, value in opened.lines]
    return [{**answer, "title": opened.title, "lines": lines, "note": opened.note}]


def _within(track: Track, picks: Mapping[str, int], at: Mapping[Any, Any], step: int | None) -> bool:
    """Whether `at` names a cell that exists: known axes, whole positions, inside the row that it names."""
    if not at or not all(isinstance(axis, str) and whole(where, STEPS) for axis, where in at.items()):
        return False
    if not at.keys() <= {*track.axes} - {*picks}:
        return False
    try:
        if track.grow_axis is None:
            row = track.latest(step)
        else:
            _, row = next(track.rows(at.get(track.axes[track.grow_axis], 0)))
    except (KeyError, StopIteration):
        return False
    sizes = dict(zip((a for a in track.row_axes if a not in picks), pick(track, row, picks).shape, strict=True))
    return all(at[axis] < sizes[axis] for axis in at if axis in sizes)


@functools.cache
def sources(references: tuple[str, ...]) -> tuple[Message, ...]:
    """The engine's functions that a lesson shows ("engine.caches.sinks:Sinks"), with the numbers of lines that tap."""
    found = []
    for reference in references:
        module_name, _, path = reference.partition(":")
        module = importlib.import_module(module_name)
        thing: Any = module
        for part in filter(None, path.split(".")):
            thing = getattr(thing, part)
        text = inspect.getsource(thing)
        first = 1 if thing is module else inspect.getsourcelines(thing)[1]
        taps = [first + i for i, line in enumerate(text.splitlines()) if "tap(" in line.split("#")[0]]
        file = f"{module_name.replace('.', '/')}.py"
        found.append({"name": path or module_name, "file": file, "line": first, "text": text, "taps": taps})
    return tuple(found)


def code(references: tuple[str, ...]) -> list[Message]:
    """The Code tab."""
    return [{"type": "code", "sources": list(sources(references))}]


def tensors(recording: Recording | None) -> list[Message]:
    """The Tensors tab: every track, and what the budget cut."""
    if recording is None:
        return [{"type": "tensors", "tensors": [], "cut": []}]
    cut = [{"key": key, "bytes": size} for key, size in recording.cut.items()]
    return [{"type": "tensors", "tensors": [_described(track) for track in recording.tracks], "cut": cut}]


def _described(track: Track) -> Message:
    chunks = [chunk.array for chunk in track.chunks if chunk.array.size]
    count = sum(array.size for array in chunks)
    first = chunks[0] if chunks else np.zeros(0, np.float32)
    shape = [max(sizes) for sizes in zip(*(array.shape for array in chunks), strict=True)]
    if track.grow_axis is not None and shape:
        shape[track.grow_axis] = sum(array.shape[track.grow_axis] for array in chunks)
    return {
        "key": track.key,
        "symbol": track.site.symbol,
        "meaning": track.site.meaning,
        "axes": list(track.axes),
        "shape": shape,
        "dtype": str(first.dtype),
        "bytes": track.nbytes,
        "unit": track.site.unit,
        "low": float(min(array.min() for array in chunks)) if chunks else 0.0,
        "high": float(max(array.max() for array in chunks)) if chunks else 0.0,
        "mean": float(sum(array.sum(dtype=np.float64) for array in chunks) / count) if count else 0.0,
    }


def tensor(recording: Recording, key: str, step: int | None) -> list[Message]:
    """One tensor's values at a step, as many as a page can show."""
    track = next((track for track in recording.tracks if track.key == key), None)
    if track is None:
        return [notice("There is no such tensor in this run.")]
    try:
        row = track.latest(step)
    except KeyError:
        return [notice("That tensor has no values yet at this step.", level="info")]
    flat = np.ascontiguousarray(row, np.float32).reshape(-1)
    shape = list(row.shape)
    return [{"type": "tensor", "key": key, "shape": shape, "data": flat[:SHOWN].copy(), "more": flat.size > SHOWN}]


def file(slug: str, what: str, recording: Recording, findings: Findings | None) -> list[Message]:
    """A run as a file to save: every tensor, the recording, or the claim table."""
    if what == "npz":
        data = _as_npz(recording)
    elif what == "recording":
        data = _as_saved(recording)
    elif findings is not None:
        data = _as_csv(findings)
    else:
        return [notice("The claims are still being computed.", level="info")]
    ending, kind = KINDS[what]
    return [{"type": "file", "name": f"leanscope-{slug}{ending}", "mime": kind, "data": np.frombuffer(data, np.uint8)}]


def _as_npz(recording: Recording) -> bytes:
    made = io.BytesIO()
    np.savez_compressed(made, **recording.arrays())  # type: ignore[arg-type]
    return made.getvalue()


def _as_saved(recording: Recording) -> bytes:
    with tempfile.TemporaryDirectory(prefix="leanscope-") as folder:
        path = Path(folder) / "recording.safetensors"
        recording.save(path)
        return path.read_bytes()


def _as_csv(findings: Findings) -> bytes:
    made = io.StringIO()
    columns = ["text", "source", "formula", "reported", "measured", "unit", "verdict", "why"]
    writer = csv.DictWriter(made, columns)
    writer.writeheader()
    writer.writerows({name: _as_text(value) for name, value in row.items()} for row in findings.claims)
    return made.getvalue().encode()


def _as_text(cell: str) -> str:
    """A cell that a spreadsheet would take for a formula, with the apostrophe that makes it text; numbers stay."""
    try:
        float(cell.replace(",", ""))
    except ValueError:
        return f"'{cell}" if cell[:1] in tuple("=+-@\t\r\n") else cell
    return cell
