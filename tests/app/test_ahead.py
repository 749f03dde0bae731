"""What the beats will show, sent ahead: which states, all their scenes, each row once."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

from app.ahead import STATES, Ahead, states
from app.runs import Runs
from app.store import Store
from lessons.lesson import Beat
from tests.app.lessons.waves import LESSON, WavesKnobs


def lesson_with(*turns: dict[str, Any]) -> Any:
    beats = (LESSON.beats[0], *(Beat("Turned.", scene="level", knobs=knobs) for knobs in turns))
    return dataclasses.replace(LESSON, beats=beats)


def test_states_are_those_that_a_walk_comes_by() -> None:
    turned = lesson_with({"steps": 5}, {}, {"head": 2}, {"steps": 8, "head": 0})
    found = [(state.steps, state.head) for state in states(turned, WavesKnobs())]
    assert found == [(8, 0), (5, 0), (5, 2)], "the present one first, each once, knobs stay where they were turned"
    many = lesson_with(*({"steps": n} for n in range(20, 60)))
    assert len(states(many, WavesKnobs())) == STATES


def test_all_scenes_of_all_states_are_sent_ahead(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []

    async def story() -> None:
        runs = Runs(Store(tmp_path))
        lesson = lesson_with({"steps": 5}, {"head": 2}, {"trouble": "crash"})
        done = asyncio.Event()

        def later(job: Any) -> None:
            made = job()
            told.extend(made)
            if made and made[-1]["type"] == "ahead":
                done.set()

        ahead = Ahead(lesson, runs, lambda run: {"type": "run", "run": run.id, "state": run.state}, later)
        for _ in range(50):  # as a page might that means harm
            ahead.fetch(WavesKnobs())
            await asyncio.sleep(0.002)
        await asyncio.wait_for(done.wait(), 60)
        assert runs.load()["live"] == 0, "nothing is watched any more"
        ahead.stop()
        runs.close()

    asyncio.run(story())
    assert [m["type"] for m in told].count("state") < 9, "it is fetched once a second at most"
    last = told[-1]
    begun = max(i for i, m in enumerate(told) if m["type"] == "state" and m["ahead"] == 0)
    rest = told[begun:-1]
    assert (last["kept"], last["of"], len(last["left"])) == (3, 4, 1), "a run that fails is told of"
    assert [m["knobs"]["steps"] for m in rest if m["type"] == "state"] == [8, 5, 5]
    for number in range(3):
        mine = [m for m in rest if m["ahead"] == number]
        assert {m["scene"] for m in mine if m["type"] == "picture"} == {"all", "level"}
        assert {"run", "facts"} <= {m["type"] for m in mine}
    rows = [(m["run"], m["track"], m["start"]) for m in rest if m["type"] == "rows"]
    assert len(rows) == len(set(rows)), "rows that two states share travel once"
    assert len({run for run, _, _ in rows}) == 2
