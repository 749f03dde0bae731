"""A recording as a notebook wants it: NumPy arrays by name, whose axes have names too.

recording = leanscope.run("sinks", window=64)
pattern = recording["attention.pattern"]          # the only one of that name, else recording.at(…, layer=3)
pattern.axes, pattern.meaning                     # ("head", "query", "key"), "share of attention"
pattern.at(head=2, query=slice(0, 8))             # sliced by name; pattern[2] works too, and is a plain array
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from app import runs
from app.picture import find
from engine.recording import Recording, Track
from lessons.knobs import Knobs
from lessons.lesson import Lesson


class Unfit(ValueError):  # noqa: N818
    """What was asked for does not exist; the text is one sentence, and all of it that a notebook shows."""

    def __str__(self) -> str:
        return str(self.args[0])

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Missing(Unfit, KeyError):  # noqa: N818
    """No tensor of that name."""


class Tensor(np.ndarray):
    """A read-only array that knows what its axes are. What is computed from it is a plain array."""

    key: str = ""
    axes: tuple[str, ...] = ()
    symbol: str = ""
    meaning: str = ""
    unit: str = ""
    steps: np.ndarray | None = None  # the step at which each row appeared

    @classmethod
    def of(cls, track: Track) -> Tensor:
        """A track's rows stacked: along its growing axis, or, where every step has a whole frame, along "step"."""
        found = track.stack()
        axes = track.axes if track.grow_axis is not None or found.ndim == len(track.axes) else ("step", *track.axes)
        return cls._made(found, track.key, axes, track, track.at)

    @classmethod
    def _made(
        cls, array: np.ndarray, key: str, axes: tuple[str, ...], like: Track | Tensor, steps: np.ndarray | None
    ) -> Tensor:
        about = like.site if isinstance(like, Track) else like
        base = np.asarray(array)
        base.setflags(write=False)
        made = base.view(cls)
        made.key, made.axes, made.steps = key, axes, steps
        made.symbol, made.meaning, made.unit = about.symbol, about.meaning, about.unit
        return made

    def at(self, **where: int | slice | list[int]) -> Tensor:
        """A part, by the names of axes: `at(head=2, query=slice(0, 8))`. An axis given a number is gone."""
        unknown = [axis for axis in where if axis not in self.axes]
        if unknown:
            raise Unfit(f"{self.key} has no axis {unknown[0]!r}; its axes are {', '.join(self.axes) or 'none'}.")
        if not where:
            return self
        part = np.asarray(self)
        for i in reversed(range(len(self.axes))):
            wanted, size = where.get(self.axes[i], slice(None)), part.shape[i]
            if isinstance(wanted, int | np.integer) and not -size <= wanted < size:
                raise Unfit(f"The axis {self.axes[i]} of {self.key} goes from 0 to {size - 1}; {wanted} is outside.")
            part = part[(slice(None),) * i + (wanted,)]
        axes = tuple(a for a in self.axes if not isinstance(where.get(a), int | np.integer))
        inner = ",".join(f"{axis}={value}" for axis, value in where.items() if isinstance(value, int | np.integer))
        return self._made(part, f"{self.key}({inner})" if inner else self.key, axes, self, None)

    def __array_finalize__(self, source: Any) -> None:
        """A view is another array: its axes are not ours, and it is not given their names."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [np.asarray(x) if isinstance(x, Tensor) else x for x in inputs]
        return getattr(ufunc, method)(*plain, **options)

    def __getitem__(self, where: Any) -> Any:
        return np.asarray(self)[where]

    def __repr__(self) -> str:
        about = f", {self.meaning}" if self.meaning else ""
        return f"<{self.key or 'Tensor'}: {_shape(self)}{about}>\n{np.asarray(self)!r}"


def _shape(array: Tensor) -> str:
    sizes = [f"{axis} {size}" for axis, size in zip(array.axes, array.shape, strict=False)] or map(str, array.shape)
    return f"{' · '.join(sizes) or 'a number'}, {array.dtype}"


class Arrays(Mapping[str, Tensor]):
    """What one run showed: its tensors by key, with the run's facts and claims.

    It answers whatever the recording itself does (`stack`, `track`, `happened`, `steps`, `meta`), so that a lesson's
    own functions of a recording take it.
    """

    def __init__(self, recording: Recording, lesson: Lesson, knobs: Knobs | None = None) -> None:
        self.recording = recording
        self.lesson = lesson
        self.knobs = knobs.values() if knobs is not None else {}
        self._tracks = {track.key: track for track in recording.tracks}
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        """A tensor by its key (`attention.pattern[layer=3]`), or by its name where only one has it."""
        if key not in self._tracks:
            same = [k for k, track in self._tracks.items() if track.name == key]
            if len(same) != 1:
                raise Missing(self._lacks(key, same))
            key = same[0]
        if key not in self._made:
            self._made[key] = Tensor.of(self._tracks[key])
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tracks)

    def __len__(self) -> int:
        return len(self._tracks)

    def at(self, name: str, **where: Any) -> Tensor:
        """The tensor of that name, or a part: `at("attention.pattern", layer=3, head=2)`.

        What tells tensors of one name apart (a layer, a strategy) picks one; the names of axes slice it.
        """
        same = [track for track in self._tracks.values() if track.name == name]
        labels = {label for track in same for label in track.index}
        fits = [t for t in same if all(t.index.get(k) == v for k, v in where.items() if k in labels)]
        if len(fits) != 1:
            raise Missing(self._lacks(name, [track.key for track in fits or same]))
        return self[fits[0].key].at(**{axis: value for axis, value in where.items() if axis not in labels})

    def pictured(self) -> list[Tensor]:
        """The tensors that the lesson's pictures show, two axes or more first, measured before counted."""
        knobs = self.lesson.knobs(**self.knobs)
        named = [tensor for scene in self.lesson.scenes for view in scene.views for tensor in view.tensors()]
        found = [place[0].key for tensor in named if (place := find(self.recording, tensor, knobs)) is not None]
        return sorted(
            (self[key] for key in dict.fromkeys(found)), key=lambda one: (one.ndim < 2, one.dtype.kind != "f")
        )

    def _lacks(self, name: str, same: list[str]) -> str:
        if same:
            return f"Several tensors are called {name!r}: say which of {_few(same)}."
        return (
            f"This run has no tensor called {name!r}; it has {_few(sorted({t.name for t in self._tracks.values()}))}."
        )

    @functools.cached_property
    def _found(self) -> runs.Findings:
        return runs.findings(self.lesson, self.recording)

    @property
    def facts(self) -> dict[str, Any]:
        """The measured numbers that the lesson's text speaks of."""
        return self._found.facts

    @property
    def claims(self) -> Any:
        """What the sources say beside what this run measured, as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self._found.claims)

    def save(self, path: str | Path) -> None:
        """Write the recording to one file; `leanscope.load` reads it back."""
        self.recording.save(path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "recording":
            raise AttributeError(name)
        return getattr(self.recording, name)

    def __repr__(self) -> str:
        turned = ", ".join(f"{name}={value!r}" for name, value in self.knobs.items())
        lines = [f"  {key}: {_shape(self[key])}  {self[key].meaning}" for key in self]
        head = f"{self.lesson.slug}({turned}): {self.recording.steps} {self.lesson.step_word}s, {len(self)} tensors"
        return "\n".join([head, *lines])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{word}</th>" for word in ("tensor", "symbol", "axes", "type", "meaning"))
        rows = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in self._row(key)) + "</tr>"
            for key in self
        )
        said = f"{self.lesson.title}: {self.recording.steps} {self.lesson.step_word}s, {len(self)} tensors"
        return f"<p>{escape(said)}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def _row(self, key: str) -> tuple[str, ...]:
        one = self[key]
        axes = " · ".join(f"{axis} {size}" for axis, size in zip(one.axes, one.shape, strict=False))
        return key, one.symbol, axes, str(one.dtype), one.meaning


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
