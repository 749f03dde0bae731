"""Contenders take turns, and warming up does not count."""

import time

import pytest

from engine.timing import in_turns


def test_contenders_take_turns_and_the_first_round_does_not_count(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    assert in_turns(works, rounds=2) == {"a": [1.0] * 2, "b": [1.0] * 2, "c": [1.0] * 2}
    assert calls == list("abcabcabc")
    calls.clear()
    assert {len(taken) for taken in in_turns(works, rounds=3, warm_up=0, rotate=True).values()} == {3}
    assert calls == list("abcbcacab")
    for none in (0, -1):
        with pytest.raises(ValueError, match="rounds must be above 0"):
            in_turns({}, rounds=none)
