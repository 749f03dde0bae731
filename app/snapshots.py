"""The settings of a lesson's knobs that a page without an engine has: as it opens, those that its beats turn or ask
the learner to turn, one for each model, and those that the lesson names (`Lesson.snapshots`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.runs import is_available, model_title
from lessons.knobs import Knobs
from lessons.lesson import Lesson

MOST = 10  # of one lesson
FEW = 5  # options of a choice that are all recorded
ASKED = re.compile(r"\bto (-?\d+(?:\.\d+)?)")  # "Turn Sinks to 1"


@dataclass(frozen=True)
class Snapshot:
    """A setting that is recorded; the first of a lesson is the one that its page opens with."""

    name: str
    knobs: Knobs


def snapshots(lesson: Lesson, *, model: str = "", defaults: bool = False) -> list[Snapshot]:
    """The settings to record, no two of which would run the same. `model` takes the place of the default model where
    a lesson has it; `defaults` leaves all but the first out."""
    offered = list(lesson.knobs.param["model"].objects) if "model" in lesson.knobs.names() else []
    start = lesson.knobs(**({"model": model} if model in offered else {}))
    found = [Snapshot("As it opens", start)]
    known = [lesson.run_values(start)]
    for name, turned in () if defaults else _turns(lesson, start, [] if model else offered):
        knobs = lesson.knobs(**{**start.values(), **turned})
        if lesson.run_values(knobs) not in known and len(found) < MOST:
            known.append(lesson.run_values(knobs))
            found.append(Snapshot(name, knobs))
    return found


def _turns(lesson: Lesson, start: Knobs, models: list[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and knobs turned from the start, the ones that matter most first."""
    yield from lesson.snapshots.items()
    for beat in lesson.beats:
        if beat.knobs:
            yield ", ".join(_named(lesson, *item) for item in beat.knobs.items()), beat.knobs
    for model in models:
        if is_available(model)[0]:
            yield model_title(model), {"model": model}
    for beat in lesson.beats:
        if beat.do is not None and beat.do.knob and beat.do.knob not in lesson.looks | {"model"}:
            for value in _others(lesson, beat.do.knob, beat.do.text, getattr(start, beat.do.knob)):
                yield _named(lesson, beat.do.knob, value), {beat.do.knob: value}


def _others(lesson: Lesson, knob: str, text: str, now: Any) -> list[Any]:
    """Values that a learner who is told `text` may well choose."""
    spec = _spec(lesson, knob)
    if spec["kind"] == "switch":
        return [not now]
    if spec["kind"] == "choice":
        return [option["value"] for option in spec["options"] if option["value"] != now][:FEW]
    if spec["kind"] != "slider":
        return []
    low, high = spec["low"], spec["high"]
    asked = ASKED.search(text)
    wanted = [float(asked[1])] if asked else [now / 2, now * 2] if now > 0 else [(low + high) / 2, high]
    fit = type(spec["default"])
    return [fit(value) for value in dict.fromkeys(wanted) if low <= value <= high and fit(value) != now]


def _named(lesson: Lesson, knob: str, value: Any) -> str:
    spec = _spec(lesson, knob)
    if spec["kind"] == "switch":
        return f"{spec['label']} {'on' if value else 'off'}"
    names = {option["value"]: option["label"] for option in spec.get("options", ())}
    return f"{spec['label']} {names.get(value, value)}"


def _spec(lesson: Lesson, knob: str) -> dict[str, Any]:
    return next(spec for spec in lesson.knobs.spec() if spec["name"] == knob)
