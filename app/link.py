"""What a link carries: one token, `?s=`, that holds the knobs, the beat and the step of a lesson.

The token is base64url of JSON with sorted keys, versioned, at most LIMIT characters. Whoever wrote it may mean harm:
it is read here and nowhere else, checked as a whole against the lesson's knobs, and what does not fit gives one plain
sentence and all defaults. `decode` never raises.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import parse_qsl

from lessons.knobs import Knobs, check
from lessons.lesson import Lesson

VERSION = 1
LIMIT = 2048  # characters of a token
STEPS = 1_000_000  # a step beyond is no place in a lesson
ALPHABET = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Place:
    """Where someone is in a lesson: its knobs, the beat, and the player's step."""

    knobs: Knobs
    beat: int = 0
    step: int = 0


def encode(lesson: Lesson, place: Place) -> str:
    """The token of a place; "" for the beginning at its defaults. Knobs at their defaults are left out.

    Where a long text would make it longer than LIMIT, texts are left out: see `fits`.
    """
    values = _turned(lesson, place.knobs)
    token = _pack(values, place)
    if len(token) > LIMIT:
        token = _pack({k: v for k, v in values.items() if not isinstance(v, str) or len(v) <= 64}, place)
    return token


def fits(lesson: Lesson, place: Place) -> bool:
    """Whether the whole place goes into a link: a long text may not."""
    return len(_pack(_turned(lesson, place.knobs), place)) <= LIMIT


def decode(lesson: Lesson, token: str) -> tuple[Place, list[str]]:
    """The place that `token` means, and one plain sentence for the visitor when it could not be used."""
    start = Place(lesson.knobs())
    if not token:
        return start, []
    try:
        return _unpack(lesson, token), []
    except _Unfit as reason:
        return start, [f"The link could not be followed: {reason} Everything is at its defaults."]


def first(query: str, name: str) -> str:
    """The first value of `name` in a URL's query, "" without one; never raises, whatever the query is."""
    try:
        pairs = parse_qsl(query[: 8 * LIMIT], keep_blank_values=True, errors="replace", max_num_fields=64)
    except ValueError:
        return ""
    return next((value for key, value in pairs if key == name), "")


class _Unfit(Exception):  # noqa: N818
    """Why a token cannot be used, as one sentence."""


def _turned(lesson: Lesson, knobs: Knobs) -> dict[str, Any]:
    return {name: value for name, value in knobs.values().items() if value != lesson.knobs.param[name].default}


def _pack(values: dict[str, Any], place: Place) -> str:
    state: dict[str, Any] = {"v": VERSION}
    if values:
        state["knobs"] = values
    if place.beat:
        state["beat"] = place.beat
    if place.step:
        state["step"] = place.step
    if len(state) == 1:
        return ""
    text = json.dumps(state, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _unpack(lesson: Lesson, token: str) -> Place:
    if len(token) > LIMIT:
        raise _Unfit(f"it is longer than {LIMIT:,} characters.")
    if not ALPHABET.fullmatch(token):
        raise _Unfit("it holds characters that no link of ours has.")
    try:
        text = base64.b64decode(token + "=" * (-len(token) % 4), b"-_", validate=True).decode()
        state = json.loads(text, object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except (binascii.Error, ValueError, RecursionError):
        raise _Unfit("it is damaged.") from None
    if not isinstance(state, dict) or not state.keys() <= {"v", "knobs", "beat", "step"}:
        raise _Unfit("it is damaged.")
    if type(state.get("v")) is not int or state["v"] != VERSION:
        raise _Unfit("it was made by another version.")
    values = state.get("knobs", {})
    if not isinstance(values, dict):
        raise _Unfit("it is damaged.")
    try:
        knobs, problems = check(lesson.knobs, values)
    except (ValueError, TypeError, OverflowError):
        raise _Unfit("its knobs do not fit this lesson.") from None
    if problems:
        raise _Unfit(problems[0])
    return Place(
        knobs,
        _whole(state.get("beat", 0), max(0, len(lesson.beats) - 1), "beat"),
        _whole(state.get("step", 0), STEPS, "step"),
    )


def _whole(value: Any, high: int, what: str) -> int:
    if type(value) is not int or not 0 <= value <= high:
        raise _Unfit(f"this lesson has no such {what}.")
    return value


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON knows")
