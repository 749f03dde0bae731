"""The arithmetic of a view's cells, opened ahead of time and written small.

A cell's arithmetic is computed by the lesson from the recording, in Python. For a page without an engine every cell
that can be clicked is opened here once, by the very function that answers a live page. The answers are then taken
apart: texts and vectors that stand in several are kept once, and a vector that is the product of two others of its
cell is not kept at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from app.picture import find
from engine.recording import Recording, Track
from lessons.knobs import Knobs
from lessons.views import Arithmetic, Heatmaps, Routes, View, knob

TRIED = 64  # cells opened to see what their arithmetic reads


class Remembered(Recording):
    """The same recording for whoever reads it thousands of times."""

    def __init__(self, recording: Recording) -> None:
        tracks: list[Track] = [_Remembered(t.name, t.index, t.axes, t.chunks) for t in recording.tracks]
        super().__init__(
            recording.steps, tracks, list(recording.events), list(recording.labels), recording.meta, recording.cut
        )
        self._found: dict[Any, Track] = {}

    def track(self, name: str, **index: int | str) -> Track:
        key = (name, *index.items())
        if key not in self._found:
            self._found[key] = super().track(name, **index)
        return self._found[key]


class _Remembered(Track):
    def rows(self, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        kept = self.__dict__.get("_rows")
        if kept is None:
            kept = self.__dict__["_rows"] = list(super().rows())
        return iter(kept if not start else kept[start:])

    def stack(self, *, fill: float = 0.0) -> np.ndarray:
        kept = self.__dict__.setdefault("_stacks", {})
        if fill not in kept:
            kept[fill] = super().stack(fill=fill)
            kept[fill].setflags(write=False)
        return kept[fill]


class _Watched(dict[str, Any]):
    """A place that remembers whether its step was read."""

    step_read = False

    def __getitem__(self, key: str) -> Any:
        self.step_read |= key == "step"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.step_read |= key == "step"
        return super().get(key, default)


class _WatchedKnobs(SimpleNamespace):
    """Knobs that remember which of them were read."""

    def __init__(self, knobs: Knobs) -> None:
        super().__init__(known=knobs, reads=set())

    def __getattr__(self, name: str) -> Any:
        self.reads.update([name] if name in self.known.values() else self.known.names())
        return getattr(self.known, name)


@dataclass(frozen=True)
class Cells:
    """`data` is the piece; `reads` names the knobs that the arithmetic looked at."""

    data: dict[str, Any]
    reads: set[str]
    count: int


def cells(recording: Recording, view: View, knobs: Knobs, *, most: int, stops: Sequence[int] = ()) -> Cells | None:
    """At most `most` cells of `view`; of one that shows another frame at each step, those at `stops` first. None
    where the view has no tensor in this recording."""
    found = find(recording, view.tensor, knobs)  # type: ignore[attr-defined]
    if found is None or not found[0].chunks:
        return None
    track, picks = found
    axes, sizes = _extent(view, track, picks)
    watched = _WatchedKnobs(knobs)
    frames: list[int] = []
    if track.grow_axis is None and _reads_step(recording, view, watched, axes, sizes, track.at):
        frames = [int(at) for at in dict.fromkeys(track.at.tolist())]
    all_cells = math.prod(sizes)
    places = _in_order(view, knobs, axes, sizes)
    chosen = _chosen(frames, stops, max(1, most // max(1, all_cells))) if frames else [-1]
    thin = max(1, math.ceil(all_cells * len(chosen) / most))
    taken = _Taken()
    for at in places[::thin]:
        row = dict(zip(axes, at, strict=True))
        first = frames[0] if frames else _appears(track, row)
        for place in chosen:
            step = frames[place] if place >= 0 else first
            answer = _opened(recording, view, watched, {**row, "step": step})
            if answer is not None:
                number = 0
                for position, size in zip(at, sizes, strict=True):
                    number = number * size + position
                taken.add(number * max(1, len(frames)) + max(0, place), answer)
    whole = thin == 1 and len(chosen) == max(1, len(frames))
    data = {"axes": axes, "sizes": sizes, "frames": frames, "whole": whole, **taken.data()}
    return Cells(data, watched.reads, len(taken.keys))


def _extent(view: View, track: Track, picks: Mapping[str, int]) -> tuple[list[str], list[int]]:
    """The axes that a click names, and how long they are."""
    rows = [row for _, row in track.rows()]
    shape = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    lengths = dict(zip(track.row_axes, shape, strict=True))
    if track.grow_axis is not None:
        lengths = {track.axes[track.grow_axis]: len(rows), **lengths}
    free = [axis for axis in lengths if axis not in picks]
    if isinstance(view, Heatmaps):
        free = [axis for axis in (view.facet, view.rows, view.columns) if axis in free]
    elif isinstance(view, Routes):
        free = free[:1]
    return free, [lengths[axis] for axis in free]


def _in_order(view: View, knobs: Knobs, axes: list[str], sizes: list[int]) -> list[tuple[int, ...]]:
    """Every cell, those of the facet in focus first."""
    places = list(itertools.product(*map(range, sizes)))
    if isinstance(view, Heatmaps) and view.facet and axes and axes[0] == view.facet:
        focus = getattr(knobs, view.focus.name) if isinstance(view.focus, knob) else view.focus or 0
        focus = min(int(focus), sizes[0] - 1)
        places.sort(key=lambda at: at[0] != focus)
    return places


def _appears(track: Track, row: Mapping[str, int]) -> int:
    """A step at which the cell stands: where its row appears, or the last one."""
    if track.grow_axis is None:
        return int(track.at[-1])
    number = row.get(track.axes[track.grow_axis], 0)
    return next((at for at, _ in track.rows(number)), 0)


def _chosen(frames: list[int], stops: Sequence[int], most: int) -> list[int]:
    """Numbers of at most `most` frames: those that the beats show, the last, and others evenly between."""
    if len(frames) <= most:
        return list(range(len(frames)))
    shown = [max((i for i, at in enumerate(frames) if at <= stop), default=0) for stop in stops]
    even = np.linspace(0, len(frames) - 1, most).round().astype(int).tolist()
    return sorted(list(dict.fromkeys([*shown, len(frames) - 1, *even]))[:most])


def _reads_step(
    recording: Recording, view: View, knobs: Any, axes: list[str], sizes: list[int], at: np.ndarray
) -> bool:
    """Whether any of some cells, spread over the view, looked at the step."""
    count = math.prod(sizes)
    for number in range(0, count, max(1, count // TRIED)):
        row = dict(zip(axes, map(int, np.unravel_index(number, sizes)), strict=True))
        place = _Watched({**row, "step": int(at[-1])})
        _opened(recording, view, knobs, place)
        if place.step_read:
            return True
    return False


def _opened(recording: Recording, view: View, knobs: Any, at: Mapping[str, Any]) -> Arithmetic | None:
    """The answer; None for a place that has none, as behind a mask."""
    try:
        return view.cell(recording, knobs, at)  # type: ignore[attr-defined]
    except Exception:
        return None


class _Taken:
    """Answers taken apart."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self._texts: dict[str, int] = {}
        self._forms: dict[tuple[int, int], int] = {}
        self._form: list[int] = []
        self._words: list[int] = []
        self._vectors: dict[bytes, int] = {}
        self._rows: list[np.ndarray] = []
        self._bars: list[int] = []

    def add(self, key: int, answer: Arithmetic) -> None:
        self.keys.append(key)
        form = (len(answer.lines), len(answer.vectors))
        self._form.append(self._forms.setdefault(form, len(self._forms)))
        texts = [answer.title, answer.note, *(str(part) for line in answer.lines for part in line)]
        texts += [str(name) for name, _ in answer.vectors]
        self._words += [self._texts.setdefault(text, len(self._texts)) for text in texts]
        own: list[np.ndarray] = []
        for _, numbers in answer.vectors:
            row = np.asarray(numbers, np.float64)
            self._bars.append(self._product(row, own) or self._vector(row))
            own.append(row)

    def _product(self, row: np.ndarray, own: list[np.ndarray]) -> int:
        """-1 and less: 1 + 16 i + j below zero is the product of this cell's vectors i and j; 0 if it is none."""
        for (i, a), (j, b) in itertools.combinations(enumerate(own), 2):
            if a.shape == b.shape == row.shape and row.size > 1 and np.allclose(a * b, row, rtol=1e-6, atol=0):
                return -(1 + 16 * i + j)
        return 0

    def _vector(self, row: np.ndarray) -> int:
        small = row.astype(np.float32)
        number = self._vectors.setdefault(small.tobytes(), len(self._rows))
        if number == len(self._rows):
            self._rows.append(small)
        return number

    def data(self) -> dict[str, Any]:
        flat = np.concatenate(self._rows) if self._rows else np.zeros(0, np.float32)
        return {
            "keys": np.array(self.keys, np.int32),
            "forms": [list(form) for form in self._forms],
            "form": np.array(self._form, np.uint8),
            "words": np.array(self._words, np.int32),
            "bars": np.array(self._bars, np.int32),
            "texts": list(self._texts),
            "lengths": np.array([row.size for row in self._rows], np.int32),
            "numbers": flat,
        }
