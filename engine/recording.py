"""Taps, events and steps: how the engine shows its own tensors, and the Recording that keeps them.

A technique marks a tensor worth seeing with `tap`, something that happened with `event`, and the end of a
unit of work (a decoded token, a training step, a tile) with `step`. Without a recorder each of them is one
look at a `ContextVar`; with one, copies go to the CPU, because caches mutate. What is computed is bit-equal
either way.

    with record(keep={"attention.pattern": {"layer": 3}}) as recorder:
        model.generate(ids)
    recording = recorder.freeze()
    recording.track("attention.pattern", layer=3).stack()     # head query key: one lower-triangular matrix
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

FORMAT = 1  # of a saved recording; raised when a reader of the old one would misread the new
BUDGET = 20_000_000  # bytes a recording may hold, unless told otherwise

Value = TypeVar("Value", torch.Tensor, np.ndarray, float, int)
Index = tuple[tuple[str, "int | str"], ...]


@dataclass(frozen=True)
class Site:
    """What a tap's name means: declared once, beside the tap, so that legends and tables are generated.

    `grows` names the axis along which a step adds rows (the query axis of attention, say): the tap of each
    step then holds the new rows only, and a track stacks them. `low` and `high` fix the colour scale where
    the quantity has natural bounds (0 and 1 for a probability).
    """

    name: str
    meaning: str
    symbol: str = ""
    grows: str | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""


SITES: dict[str, Site] = {}


def site(name: str, meaning: str, **fields: Any) -> str:
    """Declare a tap site; returns its name. Declaring it again must say the same."""
    declared = Site(name, meaning, **fields)
    if SITES.setdefault(name, declared) != declared:
        raise ValueError(f"site {name!r} is declared twice with different meanings")
    return name


_ACTIVE: ContextVar[Recorder | None] = ContextVar("leanscope_recorder", default=None)


def tap(name: str, tensor: Value, axes: str, **index: int | str) -> Value:
    """Return `tensor` unchanged; when a recording is on, keep a copy of it.

    `axes` are einops words, one a dimension ("batch head query key"); `index` says which one of several
    such tensors it is (layer=3, strategy="window").
    """
    recorder = _ACTIVE.get()
    if recorder is not None:
        recorder.keep_copy(name, tensor, axes, index)
    return tensor


def event(name: str, **fields: Any) -> None:
    """Record that something happened (a slot evicted, a block freed) rather than a tensor."""
    recorder = _ACTIVE.get()
    if recorder is not None:
        recorder.events.append(Event(recorder.step, name, fields))


def step(count: int = 1, *, label: str = "") -> None:
    """End the current step. With `count` > 1 the work just done was that many steps at once: a growing tap
    with exactly `count` new rows is then spread over them, a row a step."""
    recorder = _ACTIVE.get()
    if recorder is not None:
        recorder.end_step(count, label)


def recording_on(name: str, **index: int | str) -> bool:
    """Whether `tap(name, …, **index)` would keep anything: lets a fast path skip building what nobody sees."""
    recorder = _ACTIVE.get()
    return recorder is not None and recorder.wants(name, index)


def newest(name: str, **index: int | str) -> np.ndarray | None:
    """What the tap of that name kept last in this recording, or None: for who names what a run shows as it goes."""
    recorder = _ACTIVE.get()
    track = recorder.tracks.get((name, tuple(index.items()))) if recorder is not None else None
    return track.chunks[-1].array if track is not None else None


@dataclass(frozen=True)
class Event:
    """Something that happened at a step."""

    step: int
    name: str
    fields: Mapping[str, Any]


@dataclass(slots=True)
class Chunk:
    """What one tap kept: `array` came at `step`, and the work took `span` steps."""

    step: int
    span: int
    array: np.ndarray


@dataclass
class Track:
    """All that one site kept for one index, over the steps, oldest first."""

    name: str
    index: Mapping[str, int | str]
    axes: tuple[str, ...]
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Its name and index in one string: `attention.pattern[layer=3]`."""
        inner = ",".join(f"{k}={v}" for k, v in self.index.items())
        return f"{self.name}[{inner}]" if inner else self.name

    @property
    def site(self) -> Site:
        return SITES.get(self.name, Site(self.name, ""))

    @property
    def grow_axis(self) -> int | None:
        """Where the growing axis is among `axes`, or None when every chunk is a whole frame."""
        grows = self.site.grows
        return self.axes.index(grows) if grows in self.axes else None

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes of one row: `axes` without the growing one."""
        return tuple(a for i, a in enumerate(self.axes) if i != self.grow_axis)

    @property
    def nbytes(self) -> int:
        return sum(chunk.array.nbytes for chunk in self.chunks)

    def rows(self, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Each row from number `start` on, with the step at which it appeared.

        A row is a slice along the growing axis, or a whole frame when nothing grows.
        """
        seen = 0
        axis = self.grow_axis
        for chunk in self.chunks:
            count = 1 if axis is None else chunk.array.shape[axis]
            if seen + count > start:
                spread = count == chunk.span
                for i in range(max(0, start - seen), count):
                    at = chunk.step + (i if spread else 0)
                    yield at, chunk.array if axis is None else chunk.array.take(i, axis)
            seen += count

    @property
    def at(self) -> np.ndarray:
        """The step at which each row appeared, int32 [rows]."""
        return np.fromiter((at for at, _ in self.rows()), np.int32)

    def stack(self, *, fill: float = 0.0) -> np.ndarray:
        """Every row in one array, the growing axis in its place (in front for whole frames).

        Shorter rows are padded with `fill` at the end, so the attention rows of a decode come back as one
        lower-triangular matrix.
        """
        rows = [row for _, row in self.rows()]
        if not rows:
            return np.zeros((0,), np.float32)
        shape = tuple(max(sizes) for sizes in zip(*(r.shape for r in rows), strict=True))
        if all(row.shape == shape for row in rows):
            stacked = np.stack(rows)
        else:
            stacked = np.full((len(rows), *shape), fill, rows[0].dtype)
            for place, row in zip(stacked, rows, strict=True):
                place[tuple(map(slice, row.shape))] = row
        return stacked if self.grow_axis is None else np.moveaxis(stacked, 0, self.grow_axis)

    def latest(self, step: int | None = None) -> np.ndarray:
        """The newest row at or before `step` (the very last by default)."""
        newest = None
        for at, row in self.rows():
            if step is not None and at > step:
                break
            newest = row
        if newest is None:
            raise KeyError(f"{self.key} has nothing at or before step {step}")
        return newest


class Recorder:
    """Keeps what the taps of one run show; made by `record`, turned into a Recording by `freeze`."""

    def __init__(
        self,
        *,
        keep: Mapping[str, Mapping[str, Any]] | None = None,
        budget: int = BUDGET,
        on_step: Callable[[Recorder], None] | None = None,
    ) -> None:
        if budget <= 0:
            raise ValueError(f"budget must be a positive number of bytes, not {budget}")
        self._keep = keep
        self._wanted: dict[tuple[str, Index], bool] = {}
        self._budget = budget
        self._on_step = on_step
        self._context: dict[str, int | str] = {}
        self.step = 0
        self.bytes = 0
        self.tracks: dict[tuple[str, Index], Track] = {}
        self.events: list[Event] = []
        self.labels: list[str] = []
        self.cut: dict[str, int] = {}
        self.meta: dict[str, Any] = {}
        self._open: list[Chunk] = []

    def wants(self, name: str, index: Mapping[str, int | str]) -> bool:
        """Whether the filter keeps this tap. `keep` maps name patterns to the index values wanted."""
        if self._keep is None:
            return True
        key = (name, tuple(index.items()))
        if key not in self._wanted:
            self._wanted[key] = any(
                fnmatch.fnmatchcase(name, pattern)
                and all(_matches(index.get(k), wanted) for k, wanted in filters.items() if k in index)
                for pattern, filters in self._keep.items()
            )
        return self._wanted[key]

    def keep_copy(self, name: str, value: Any, axes: str, index: Mapping[str, int | str]) -> None:
        """Copy `value` to the CPU under (name, index), unless the filter or the budget says no."""
        index = {**self._context, **index}
        if not self.wants(name, index):
            return
        key = (name, tuple(index.items()))
        array = _to_numpy(value)
        words = tuple(axes.split())
        if len(words) != array.ndim:
            raise ValueError(f"tap {name!r} names {len(words)} axes ({axes!r}) for a tensor of shape {array.shape}")
        track = self.tracks.get(key)
        if track is None:
            track = Track(name, dict(index), words)
        if self.bytes + array.nbytes > self._budget:
            self.cut[track.key] = self.cut.get(track.key, 0) + array.nbytes
            return
        self.bytes += array.nbytes
        chunk = Chunk(self.step, 1, array)
        track.chunks.append(chunk)
        self._open.append(chunk)
        self.tracks[key] = track

    def end_step(self, count: int, label: str) -> None:
        if count != 1:
            for chunk in self._open:
                chunk.span = count
        self._open.clear()
        self.labels.extend([label] * count)
        self.step += count
        if self._on_step is not None:
            self._on_step(self)

    def so_far(self) -> Recording:
        """What is recorded up to the last finished step, while the run goes on: shares arrays, copies none."""
        steps = self.step
        tracks = [
            Track(t.name, t.index, t.axes, [c for c in tuple(t.chunks) if c.step < steps])
            for t in tuple(self.tracks.values())
        ]
        events = [e for e in tuple(self.events) if e.step < steps]
        return Recording(steps, tracks, events, self.labels[:steps], dict(self.meta), dict(self.cut))

    def freeze(self) -> Recording:
        """The finished recording. Work after the last `step` counts as one more."""
        if self._open:
            self.end_step(1, "")
        return self.so_far()


@contextmanager
def record(
    *,
    keep: Mapping[str, Mapping[str, Any]] | None = None,
    budget: int = BUDGET,
    on_step: Callable[[Recorder], None] | None = None,
) -> Iterator[Recorder]:
    """Record every tap in this context that `keep` wants.

    `keep` maps name patterns to index filters: {"attention.pattern": {"layer": {3, 4}}, "cache.*": {}};
    None keeps all. `on_step` is called after each step, and may raise to stop the run. Tensors past
    `budget` bytes are left out and listed in `Recording.cut`.
    """
    recorder = Recorder(keep=keep, budget=budget, on_step=on_step)
    token = _ACTIVE.set(recorder)
    try:
        yield recorder
    finally:
        _ACTIVE.reset(token)


@contextmanager
def aside() -> Iterator[None]:
    """Look at something while it trains: what runs inside is not recorded and leaves nothing for gradients."""
    with record(keep={}), torch.no_grad():
        yield


@contextmanager
def labelled(**index: int | str) -> Iterator[None]:
    """Add `index` to every tap inside, so that one run can hold several of a kind (strategy="window")."""
    recorder = _ACTIVE.get()
    if recorder is None:
        yield
        return
    before = recorder._context
    recorder._context = {**before, **index}
    try:
        yield
    finally:
        recorder._context = before


def note(**facts: Any) -> None:
    """Add plain facts (strings, numbers, lists) to the recording's `meta`: the tokens, the model's shape."""
    recorder = _ACTIVE.get()
    if recorder is not None:
        recorder.meta.update(facts)


class Recording:
    """What one run showed: named tracks over ordered steps, events, labels and facts. Its arrays are read-only.

    `cut` tells which tracks lost how many bytes to the size budget.
    """

    def __init__(
        self,
        steps: int,
        tracks: list[Track],
        events: list[Event],
        labels: list[str],
        meta: dict[str, Any],
        cut: dict[str, int],
    ) -> None:
        self.steps = steps
        self.tracks = tuple(tracks)
        self.events = tuple(events)
        self.labels = tuple(labels)
        self.meta = meta
        self.cut = cut
        for track in self.tracks:
            for chunk in track.chunks:
                chunk.array.setflags(write=False)

    @property
    def nbytes(self) -> int:
        return sum(track.nbytes for track in self.tracks)

    def has(self, name: str, **index: int | str) -> bool:
        return any(_found(track, name, index) for track in self.tracks)

    def track(self, name: str, **index: int | str) -> Track:
        """The one track of that name whose index agrees with what is given.

        Raises KeyError, naming what there is, when none or several agree.
        """
        found = [track for track in self.tracks if _found(track, name, index)]
        if len(found) != 1:
            same = [t.key for t in self.tracks if t.name == name] or sorted({t.name for t in self.tracks})
            raise KeyError(f"{len(found)} tracks agree with {name!r} {index}; recorded: {', '.join(same[:12])}")
        return found[0]

    def stack(self, name: str, **index: int | str) -> np.ndarray:
        return self.track(name, **index).stack()

    def arrays(self) -> dict[str, np.ndarray]:
        """Every track stacked, by key: what a notebook or an .npz file gets."""
        return {track.key: track.stack() for track in self.tracks}

    def happened(self, name: str, *, step: int | None = None) -> list[Event]:
        """The events of that name, at `step` or at any."""
        return [e for e in self.events if e.name == name and step in (None, e.step)]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a JSON header; `Recording.load` reads it back identical."""
        header: dict[str, Any] = {
            "format": FORMAT,
            "steps": self.steps,
            "labels": list(self.labels),
            "meta": self.meta,
            "cut": self.cut,
            "events": [[e.step, e.name, dict(e.fields)] for e in self.events],
            "tracks": [],
        }
        tensors = {}
        for i, track in enumerate(self.tracks):
            chunks = track.chunks
            header["tracks"].append(
                {
                    "name": track.name,
                    "index": dict(track.index),
                    "axes": list(track.axes),
                    "chunks": [[c.step, c.span, list(c.array.shape)] for c in chunks],
                }
            )
            if chunks:
                tensors[str(i)] = np.concatenate([c.array.reshape(-1) for c in chunks])
        save_file(tensors, str(path), metadata={"leanscope": json.dumps(header, allow_nan=True)})

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read what `save` wrote. Raises ValueError for another format or a damaged file."""
        try:
            with safe_open(str(path), "numpy") as file:
                header = json.loads(file.metadata()["leanscope"])
                if header["format"] != FORMAT:
                    raise ValueError(f"{path} is a recording of format {header['format']}; this version reads {FORMAT}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tracks = []
            for i, entry in enumerate(header["tracks"]):
                track = Track(entry["name"], entry["index"], tuple(entry["axes"]))
                offset = 0
                for at, span, shape in entry["chunks"]:
                    size = math.prod(shape)
                    array = tensors[str(i)][offset : offset + size].reshape(shape)
                    track.chunks.append(Chunk(at, span, array))
                    offset += size
                tracks.append(track)
            events = [Event(at, name, fields) for at, name, fields in header["events"]]
            return cls(header["steps"], tracks, events, header["labels"], header["meta"], header["cut"])
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a Leanscope recording, or it is damaged: {error}") from error


def _found(track: Track, name: str, index: Mapping[str, Any]) -> bool:
    return track.name == name and all(track.index.get(k) == v for k, v in index.items())


def _matches(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, (set, frozenset, tuple, list, range)) else value == wanted


def _to_numpy(value: Any) -> np.ndarray:
    """A CPU copy. NumPy has no bfloat16, and half precision is kept as float32 so that readers need not care."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        if tensor.dtype in (torch.bfloat16, torch.float16):
            return tensor.to("cpu", torch.float32, copy=True).numpy()
        return tensor.to("cpu", copy=True).contiguous().numpy()
    return np.array(value, copy=True)
