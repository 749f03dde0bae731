"""A finished run as data that plays without a server: all that a page can ask of it, answered ahead of time.

`still(...)` gives what the page is told at once, and the pieces that it loads when they are asked for: the rows that
each scene shows, the same at other settings of the look knobs, every recorded tensor as it was, and the arithmetic
of the cells (`app/opened.py`). Everything is made by the functions that answer a live page.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from app import answers, ipynb, opened
from app.picture import Feed, about, find, packed, plain, track_id
from app.runs import Run
from engine.recording import Recording, Track
from lessons.lesson import Lesson
from lessons.views import Calculator, Of, knob

MOST_VALUES = 64  # of a look knob
BIN = 500_000  # bytes of recorded tensors in a piece


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much of one run is kept, in bytes of plain numbers and in cells."""

    looks: int = 24_000_000  # rows at other settings of the look knobs
    tensors: int = 12_000_000  # tensors as they were recorded
    cells: int = 40_000  # of one view, at one setting of the look knobs
    all_cells: int = 60_000  # of one view


FULL = Limits()
LESS = Limits(looks=2_000_000, tensors=2_000_000, cells=4_000, all_cells=4_000)  # of all settings but the first


@dataclasses.dataclass(frozen=True)
class Still:
    """`told`: what the page knows of the run from the start; `pieces`: the rest, by name."""

    told: dict[str, Any]
    pieces: dict[str, Any]


def still(lesson: Lesson, name: str, run: Run, prefix: str, limits: Limits = FULL) -> Still:
    """A run as data. `prefix` begins the names of its pieces."""
    recording = run.recording
    assert recording is not None
    found = run.findings
    pieces: dict[str, Any] = {}
    looks = {knob: _look_values(lesson, run, knob) for knob in sorted(lesson.looks)}
    tensors = _Tensors(recording, pieces, f"{prefix}x", limits.tensors)
    tracks = _tracks(lesson, run, looks, tensors, pieces, prefix, limits.looks)
    tensors.rest()
    told = {
        "name": name,
        "values": run.knobs.values(),
        "run": _status(run),
        "facts": {"type": "facts", "run": run.id, **dataclasses.asdict(found)} if found else None,
        "texts": _texts(lesson, run),
        "looks": {knob: [[value, str(value)] for value in values] for knob, values in looks.items()},
        "scenes": [_scene(lesson, run, index) for index in range(len(lesson.scenes))],
        "tracks": tracks,
        "tensors": {"list": answers.tensors(recording)[0], "at": tensors.at},
        "cells": _cells(lesson, run, looks, pieces, prefix, limits),
        "files": {
            "claims": answers.file(lesson.slug, "claims", recording, found)[0],
            "notebook": ipynb.file(lesson, run.knobs)[0],
        },
    }
    return Still(told, pieces)


def _status(run: Run) -> dict[str, Any]:
    about = {"type": "run", "run": run.id, "state": run.state, "place": 0, "steps": run.steps, "total": run.total}
    return {**about, "message": run.message, "cached": False, "seconds": round(run.seconds, 3)}


def _look_values(lesson: Lesson, run: Run, name: str) -> list[Any]:
    """The settings of a look knob that are kept, the run's own first, then the nearest."""
    now = getattr(run.knobs, name)
    spec = next(spec for spec in lesson.knobs.spec() if spec["name"] == name)
    values: list[Any] = []
    if spec["kind"] == "switch":
        values = [False, True]
    elif spec["kind"] == "choice":
        values = [option["value"] for option in spec["options"]]
    elif spec["kind"] == "slider" and isinstance(now, int) and isinstance(spec["step"], int):
        assert run.recording is not None
        count = run.recording.meta.get("model", {}).get(lesson.bounded_by.get(name, ""))
        last = min(spec["high"], count - 1) if count else spec["high"]
        values = sorted(range(spec["low"], last + 1, spec["step"]), key=lambda value: abs(value - min(now, last)))
    return list(dict.fromkeys([now, *values]))[:MOST_VALUES]


def _named(looks: Mapping[str, Any]) -> dict[str, Any]:
    """Look knobs that stand for themselves: ⟨layer⟩ in the name of a track is put in by the page."""
    return {name: f"⟨{name}⟩" for name in looks}


def _scene(lesson: Lesson, run: Run, index: int) -> dict[str, Any]:
    """The picture of a scene, for whatever the look knobs say."""
    scene = lesson.scenes[index]
    knobs: Any = SimpleNamespace(**{**run.knobs.values(), **_named(dict.fromkeys(lesson.looks))})
    assert run.recording is not None
    return {
        "scene": scene.name,
        "views": plain(scene.views, knobs),
        "steps": max(run.total, run.recording.steps),
        "model": run.recording.meta.get("model", {}),
        "calculators": {str(i): _calculated(i, v) for i, v in enumerate(scene.views) if isinstance(v, Calculator)},
    }


def _calculated(index: int, view: Calculator) -> list[list[Any]]:
    """A calculator's presets, each with the answer."""
    fields = {field.name: field.value for field in view.fields}
    asked = [{**fields, **preset} for _, preset in view.presets] or [fields]
    return [[values, answers.calculate(view, values, request=0, index=index)[0]] for values in asked]


def _texts(lesson: Lesson, run: Run) -> list[dict[str, Any]]:
    """The messages about the run's text."""
    sent: list[dict[str, Any]] = []
    assert run.recording is not None
    if lesson.scenes:
        bare = dataclasses.replace(lesson.scenes[0], views=())
        Feed(sent.append).show(run.id, run.recording, bare, run.knobs)
    return [message for message in sent if message["type"] in ("pieces", "words")]


def _settings(looks: Mapping[str, list[Any]], names: set[str]) -> Iterator[dict[str, Any]]:
    """Every setting of the look knobs `names`, the run's own first."""
    chosen = sorted(names & looks.keys())
    for values in itertools.product(*(looks[name] for name in chosen)):
        yield dict(zip(chosen, values, strict=True))


def _tracks(
    lesson: Lesson,
    run: Run,
    looks: Mapping[str, list[Any]],
    tensors: _Tensors,
    pieces: dict[str, Any],
    prefix: str,
    room: int,
) -> dict[str, Any]:
    """Every track that a scene can show: where its rows are packed, and where it is as it was."""
    recording = run.recording
    assert recording is not None
    tracks: dict[str, Any] = {}
    rows: dict[tuple[str, tuple[Any, ...]], list[Any] | None] = {}
    asked = [(number, t) for number, scene in enumerate(lesson.scenes) for v in scene.views for t in v.tensors()]
    turns = [
        (place, number, tensor, setting)
        for number, tensor in asked
        for place, setting in enumerate(_settings(looks, _reads(tensor)))
    ]
    for place, number, tensor, setting in sorted(turns, key=lambda turn: turn[0]):
        knobs: Any = SimpleNamespace(**{**run.knobs.values(), **setting})
        name = track_id(tensor, knobs)
        found = find(recording, tensor, knobs) if name not in tracks else None
        if found is None:
            continue
        track, picks = found
        same = (track.key, tuple(sorted(picks.items())))
        tensors.keep(track)
        if same not in rows:
            messages = list(packed(track, picks))
            size = sum(value.nbytes for message in messages for value in message.values() if hasattr(value, "nbytes"))
            # What a scene opens with lies together; what the look knobs bring lies with the tensor that it is of.
            home = f"{prefix}{number}" if not place else f"{prefix}t{recording.tracks.index(track)}"
            if place and track.key in tensors.at and not any(len(message["lo"]) for message in messages):
                rows[same] = None  # it travels as it was recorded: the page takes it from there
            elif place and size > room:
                tracks[name] = None
                continue
            else:
                room -= size if place else 0
                pieces.setdefault(home, []).append(messages)
                rows[same] = [home, len(pieces[home]) - 1]
        tracks[name] = {"about": about(track, picks), "rows": rows[same], "key": track.key, "picks": picks}
    return tracks


def _reads(tensor: Of) -> set[str]:
    return {value.name for _, value in tensor.where if isinstance(value, knob)}


class _Tensors:
    """Recorded tensors as they were, several to a piece. `at`: where each is, by key."""

    def __init__(self, recording: Recording, pieces: dict[str, Any], prefix: str, room: int) -> None:
        self.at: dict[str, list[Any]] = {}
        self._recording = recording
        self._pieces = pieces
        self._prefix = prefix
        self._room = room
        self._size = 0
        self._number = 0

    def keep(self, track: Track) -> None:
        """Keep it, if there is room. Those that the scenes show come first."""
        if track.key in self.at or track.nbytes > self._room or not track.chunks:
            return
        self._room -= track.nbytes
        if self._size and self._size + track.nbytes > BIN:
            self._number, self._size = self._number + 1, 0
        self._size += track.nbytes
        home = self._pieces.setdefault(f"{self._prefix}{self._number}", [])
        rows = [row for _, row in track.rows()]
        shapes = np.array([row.shape for row in rows], np.int32).reshape(len(rows), -1)
        home.append(
            {
                "axes": list(track.row_axes),
                "grows": track.grow_axis,
                "at": track.at,
                "shapes": shapes,
                "data": np.concatenate([np.ascontiguousarray(row).reshape(-1) for row in rows]),
            }
        )
        self.at[track.key] = [f"{self._prefix}{self._number}", len(home) - 1]

    def rest(self) -> None:
        for track in sorted(self._recording.tracks, key=lambda track: track.nbytes):
            self.keep(track)


def _cells(
    lesson: Lesson,
    run: Run,
    looks: Mapping[str, list[Any]],
    pieces: dict[str, Any],
    prefix: str,
    limits: Limits,
) -> dict[str, Any]:
    """The arithmetic of every view that has one: which look knobs it reads, and the piece of each of their settings."""
    assert run.recording is not None
    recording = opened.Remembered(run.recording)
    kept: dict[str, Any] = {}
    stops = sorted({beat.step for beat in lesson.beats if isinstance(beat.step, int)})
    named = run.findings.facts if run.findings else {}
    stops += [named[beat.step] for beat in lesson.beats if isinstance(beat.step, str) and beat.step in named]
    for number, scene in enumerate(lesson.scenes):
        for index, view in enumerate(scene.views):
            if getattr(view, "cell", None) is None or getattr(view, "tensor", None) is None:
                continue
            known: dict[str, Any] = {"looks": [], "pieces": {}}
            room = limits.all_cells
            for place, setting in enumerate(_settings(looks, set(looks))):
                seen = lesson.knobs(**{**run.knobs.values(), **setting})
                key = "|".join(str(setting[name]) for name in known["looks"])
                if (place and key in known["pieces"]) or room <= 0:
                    continue
                most = min(limits.cells, room) if not place else min(limits.cells // 8, room)
                made = opened.cells(recording, view, seen, most=most, stops=stops)
                if made is None:
                    break
                if not place:  # which knobs it reads is known once it has been opened
                    known["looks"] = sorted(looks.keys() & (made.reads | _reads(view.tensor)))  # type: ignore[attr-defined]
                    key = "|".join(str(setting[name]) for name in known["looks"])
                room -= made.count
                name = f"{prefix}c{number}-{index}-{len(known['pieces'])}"
                pieces[name] = made.data
                known["pieces"][key] = name
            if known["pieces"]:
                kept[f"{scene.name}/{index}"] = known
    return kept
