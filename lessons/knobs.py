"""Knobs: what a learner can turn. Bounds, help and defaults live in `param`, widgets and links come from them."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from typing import Any

import param

from lessons.cells import COLUMNS, MOST, ROWS, Matrix, tidy

TEXT_LIMIT = 4000  # characters a prompt may have


class Knobs(param.Parameterized):
    """Base of every lesson's knobs. Give each parameter a `label` and a `doc`; `param.String` is a text box,
    `Matrix` (cells.py) numbers in rows and columns."""

    def values(self) -> dict[str, Any]:
        """Name to plain value, in the order of declaration."""
        return {name: getattr(self, name) for name in self.names()}

    @classmethod
    def names(cls) -> list[str]:
        """The knobs in the order of declaration, a base class's first."""
        declared = [n for c in reversed(cls.__mro__) for n, p in vars(c).items() if isinstance(p, param.Parameter)]
        return [n for n in dict.fromkeys(declared) if n != "name"]

    @classmethod
    def spec(cls) -> list[dict[str, Any]]:
        """What a page needs to draw the widgets, as plain data."""
        return [_describe(cls.param[name]) for name in cls.names()]


def check(kind: type[Knobs], given: Mapping[str, Any]) -> tuple[Knobs, list[str]]:
    """Knobs with `given` applied, and one plain sentence for each value that does not fit.

    What does not fit is left at its default. Nothing is coerced but whole floats to integers and numeric
    strings, so that a link and a command line are read alike.
    """
    problems: list[str] = []
    good: dict[str, Any] = {}
    names = kind.names()
    for name, value in given.items():
        if name not in names:
            problems.append(f"There is no knob called {_short(name)}; this lesson has {', '.join(names)}.")
            continue
        try:
            good[name] = _fit(kind.param[name], value)
        except ValueError as error:
            problems.append(str(error))
    return kind(**good), problems


def _fit(p: param.Parameter, value: Any) -> Any:
    label = str(p.label or p.name)
    if isinstance(p, param.Boolean):
        if isinstance(value, str) and value.lower() in ("true", "false", "on", "off", "1", "0"):
            return value.lower() in ("true", "on", "1")
        if not isinstance(value, bool):
            raise ValueError(f"{label} must be on or off, not {_short(value)}.")
        return value
    if isinstance(p, param.Selector):
        for option in p.objects:
            if value == option and isinstance(value, bool) == isinstance(option, bool):
                return option
            if isinstance(value, str) and str(option) == value:
                return option
        raise ValueError(f"{label} must be one of {', '.join(map(str, p.objects))}, not {_short(value)}.")
    if isinstance(p, param.Number):
        return _fit_number(p, value, label)
    if isinstance(p, param.String):
        if not isinstance(value, str):
            raise ValueError(f"{label} must be text, not {_short(value)}.")
        if not value.strip():
            raise ValueError(f"{label} is empty; type at least one word.")
        if len(value) > TEXT_LIMIT:
            raise ValueError(f"{label} has {len(value):,} characters; at most {TEXT_LIMIT:,} fit.")
        if any(ord(c) < 32 and c not in "\n\t\r" for c in value) or any(0xD800 <= ord(c) <= 0xDFFF for c in value):
            raise ValueError(f"{label} holds control characters; plain text is expected.")
        return _fit_matrix(value, label) if isinstance(p, Matrix) else value
    raise TypeError(f"knob {p.name!r} is a {type(p).__name__}: use Boolean, Integer, Number, Selector or String")


def _fit_matrix(value: str, label: str) -> str:
    try:
        return tidy(value)
    except ValueError as problem:
        raise ValueError(f"{label}: {problem}") from None


def _fit_number(p: param.Number, value: Any, label: str) -> int | float:
    whole = isinstance(p, param.Integer)
    wanted = "a whole number" if whole else "a number"
    if isinstance(value, str) and len(value) <= 32:
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{label} must be {wanted}, not {_short(value)}.") from None
    nan = isinstance(value, float) and math.isnan(value)
    if nan or isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{label} must be {wanted}, not {_short(value)}.")
    low, high = p.bounds or (None, None)
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{label} must be from {low} to {high}, not {_short(value)}.")
    if whole and value != int(value):
        raise ValueError(f"{label} must be a whole number, not {_short(value)}.")
    return int(value) if whole else float(value)


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = repr(value) if not isinstance(value, str) else f"“{value}”"
    return text if len(text) <= 40 else text[:37] + "…"


def _describe(p: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "name": p.name,
        "label": p.label or p.name,
        "doc": (p.doc or "").strip(),
        "default": p.default,
    }
    if isinstance(p, param.Boolean):
        spec["kind"] = "switch"
    elif isinstance(p, param.Selector):
        spec["kind"] = "choice"
        named = {value: label for label, value in p.names.items()} if p.names else {}
        spec["options"] = [{"value": o, "label": str(named.get(o, o))} for o in p.objects]
    elif isinstance(p, param.Number):
        low, high = typing.cast("tuple[Any, Any]", p.bounds)
        whole = isinstance(p, param.Integer)
        spec |= {"kind": "slider", "low": low, "high": high, "step": p.step or (1 if whole else (high - low) / 100)}
    elif isinstance(p, Matrix):
        spec |= {"kind": "matrix", "rows": ROWS, "columns": COLUMNS, "most": MOST}
    else:
        spec |= {"kind": "text", "limit": TEXT_LIMIT}
    return spec
