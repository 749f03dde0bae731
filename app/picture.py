"""What of a recording travels to the browser, and how it is packed.

The browser is fed once and draws by itself. For a scene it gets one `picture` message (the views as plain data,
and a description of each track), then `rows` messages that append rows to tracks, while the engine runs or all
at once when the run is cached. The same messages, saved, are a static page.

    picture   run, scene, views [plain dicts; a tensor is {"track": id}, a knob {"knob": name}], tracks {id: about},
              steps, model, knobs {name: value}: those of the run
    rows      run, track, start (number of the first row), at (int32 [rows]: the step at which each appeared),
              shape (of one row), data, lo, hi, widths
    pieces    run, start, at, pieces: the text's tokens as they read (events "text.token")
    words     run, words {token id: how it reads}: for views that show ids (events "text.words")

`data` is uint8, int32 or float32, rows after another in C order. Floats larger than EXACT values a row come as
uint8 codes c of the value lo + (hi - lo) * (c / 255) ** power, `lo` and `hi` float32 [rows]; `lo` is empty for
plain numbers. `widths` (int32 [rows], or empty) says how much of the last axis a row really has: a decode's
attention rows are padded to equal width. What was packed to codes is exact on request (`exact_row`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from engine.recording import Recording, Track
from lessons.knobs import Knobs
from lessons.lesson import Scene
from lessons.views import Of, View, knob

EXACT = 512  # a row of at most so many floats travels as float32
MESSAGE = 3_000_000  # bytes of data in one message


def plain(value: Any, knobs: Knobs) -> Any:
    """A view, or any part of one, as JSON-ready data."""
    if isinstance(value, Of):
        return {"track": track_id(value, knobs)}
    if isinstance(value, knob):
        return {"knob": value.name}
    if isinstance(value, tuple | list):
        return [plain(item, knobs) for item in value]
    if isinstance(value, Mapping):
        return {str(k): plain(v, knobs) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        data = {f.name: plain(getattr(value, f.name), knobs) for f in dataclasses.fields(value)}
        return {"kind": value.kind, **data} if isinstance(value, View) else data
    if callable(value):
        return True
    return value


def where(tensor: Of, knobs: Knobs) -> dict[str, Any]:
    """The index and positions that `tensor` asks for, knobs put in."""
    return {k: getattr(knobs, v.name) if isinstance(v, knob) else v for k, v in tensor.where}


def track_id(tensor: Of, knobs: Knobs) -> str:
    inner = ",".join(f"{k}={v}" for k, v in where(tensor, knobs).items())
    return f"{tensor.name}[{inner}]" if inner else tensor.name


def find(recording: Recording, tensor: Of, knobs: Knobs) -> tuple[Track, dict[str, int]] | None:
    """The track that `tensor` names and the positions to pick along its axes; None when nothing is there yet.

    A number past what the run has (layer 16 of a toy with four) means the nearest that it has.
    """
    asked = where(tensor, knobs)
    best: tuple[int, Track] | None = None
    for track in recording.tracks:
        if track.name == tensor.name:
            off = [_distance(track.index.get(k), v) for k, v in asked.items() if k not in track.axes]
            if None not in off and (best is None or sum(off) < best[0]):  # type: ignore[arg-type]
                best = sum(off), track  # type: ignore[arg-type]
    if best is None:
        return None
    track = best[1]
    sizes = dict(zip(track.axes, track.chunks[0].array.shape, strict=True)) if track.chunks else {}
    return track, {axis: min(int(v), sizes.get(axis, 1) - 1) for axis, v in asked.items() if axis in track.axes}


def _distance(have: Any, asked: Any) -> int | None:
    """How far a track's index is from the one asked for; None when they cannot stand for each other."""
    if have == asked:
        return 0
    if isinstance(have, int) and isinstance(asked, int):
        return abs(have - asked)
    return None


def pick(track: Track, row: np.ndarray, picks: Mapping[str, int]) -> np.ndarray:
    """`row` at the picked positions, those axes gone."""
    selection = tuple(picks.get(axis, slice(None)) for axis in track.row_axes)
    return row[selection]


def about(track: Track, picks: Mapping[str, int]) -> dict[str, Any]:
    """What the browser is told of a track: its axes, bounds and meaning."""
    site = track.site
    return {
        "name": track.key,
        "axes": [axis for axis in track.row_axes if axis not in picks],
        "grows": site.grows if track.grow_axis is not None else None,
        "low": site.low,
        "high": site.high,
        "power": 2.0 if (site.low, site.high) == (0, 1) else 1.0,
        "symbol": site.symbol,
        "meaning": site.meaning,
        "unit": site.unit,
    }


def exact_row(recording: Recording, tensor: Of, knobs: Knobs, row: int) -> np.ndarray | None:
    """Row number `row` of the tensor as float32, not packed; None when there is no such row."""
    found = find(recording, tensor, knobs)
    if found is None or row < 0:
        return None
    track, picks = found
    for _, values in track.rows(row):
        return np.ascontiguousarray(pick(track, values, picks), np.float32)
    return None


class Feed:
    """Sends one browser what it lacks of the run that it watches. Remembers how much of each track it has sent."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self._run = ""
        self._sent: dict[str, int] = {}
        self._pieces = 0
        self._words = 0
        self._shown: tuple[Any, ...] = ()

    def show(self, run: str, recording: Recording, scene: Scene, knobs: Knobs, *, steps: int | None = None) -> None:
        """Send the picture when it changed, and all rows not sent yet."""
        if run != self._run:
            self._run, self._sent, self._pieces, self._words, self._shown = run, {}, 0, 0, ()
        tensors = {track_id(t, knobs): t for view in scene.views for t in view.tensors()}
        found = {name: place for name, t in tensors.items() if (place := find(recording, t, knobs)) is not None}
        shown = (scene.name, tuple(found), tuple(tensors))
        if shown != self._shown:
            self._shown = shown
            self._send(
                {
                    "type": "picture",
                    "run": run,
                    "scene": scene.name,
                    "views": plain(scene.views, knobs),
                    "tracks": {name: about(*place) for name, place in found.items()},
                    "steps": steps or recording.steps,
                    "model": recording.meta.get("model", {}),
                    "knobs": knobs.values(),
                }
            )
        for name, (track, picks) in found.items():
            for message in packed(track, picks, start=self._sent.get(name, 0)):
                self._send({"type": "rows", "run": run, "track": name, **message})
                self._sent[name] = message["start"] + len(message["at"])
        pieces = recording.happened("text.token")
        if len(pieces) > self._pieces:
            new = pieces[self._pieces :]
            message = {"at": np.array([e.step for e in new], np.int32), "pieces": [e.fields["piece"] for e in new]}
            self._send({"type": "pieces", "run": run, "start": self._pieces, **message})
            self._pieces = len(pieces)
        words = recording.happened("text.words")
        if len(words) > self._words:
            new_words = {token: word for e in words[self._words :] for token, word in e.fields["words"].items()}
            self._send({"type": "words", "run": run, "words": new_words})
            self._words = len(words)


def packed(track: Track, picks: Mapping[str, int], *, start: int = 0) -> Iterator[dict[str, Any]]:
    """The rows from number `start` on, packed for messages of at most MESSAGE bytes of data."""
    batch: list[tuple[int, np.ndarray]] = []
    size = 0
    for at, row in track.rows(start):
        row = pick(track, row, picks)
        if batch and size + row.size * 4 > MESSAGE:
            yield _pack(track, batch, start)
            start, batch, size = start + len(batch), [], 0
        batch.append((at, row))
        size += row.size * 4
    if batch:
        yield _pack(track, batch, start)


def _pack(track: Track, batch: list[tuple[int, np.ndarray]], start: int) -> dict[str, Any]:
    rows = [row for _, row in batch]
    shape = tuple(max(sizes) for sizes in zip(*(r.shape for r in rows), strict=True))
    widths = np.zeros(0, np.int32)
    if any(row.shape != shape for row in rows) and shape:
        widths = np.array([row.shape[-1] for row in rows], np.int32)
        rows = [np.pad(row, [(0, full - have) for full, have in zip(shape, row.shape, strict=True)]) for row in rows]
    values = np.stack(rows)
    lo = hi = np.zeros(0, np.float32)
    if values.dtype.kind in "biu":
        small = values.size == 0 or (values.min() >= 0 and values.max() < 256)
        values = values.astype(np.uint8 if small else np.int32)
    elif values[0].size <= EXACT:
        values = values.astype(np.float32)
    else:
        values, lo, hi = _to_codes(values, track)
    return {
        "start": start,
        "at": np.array([at for at, _ in batch], np.int32),
        "shape": list(shape),
        "data": np.ascontiguousarray(values).reshape(-1),
        "lo": lo,
        "hi": hi,
        "widths": widths,
    }


def _to_codes(values: np.ndarray, track: Track) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 codes with bounds a row. Probabilities are spaced by squares, so that small ones stay apart."""
    site = track.site
    flat = np.nan_to_num(values.reshape(len(values), -1).astype(np.float32), posinf=0.0, neginf=0.0)
    lo = np.full(len(flat), site.low, np.float32) if site.low is not None else flat.min(1)
    hi = np.full(len(flat), site.high, np.float32) if site.high is not None else flat.max(1)
    share = (flat - lo[:, None]) / np.maximum(hi - lo, 1e-30)[:, None]
    power = about(track, {})["power"]
    codes = np.rint(np.clip(share, 0, 1) ** (1 / power) * 255).astype(np.uint8)
    return codes, lo, hi
