"""The run service: one run for equal asks, none that nobody watches, and no run that takes the others down."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app import runs as module
from app.runs import FULL, NOT_COMPUTED, TROUBLE, Run, Runs, code_version, execute, findings, key_of, perform, plain
from app.store import Store
from engine.recording import Recording, step, tap
from lessons.lesson import Claim, Finding, Lesson
from tests.app.lessons.waves import LESSON, WAVE, WavesKnobs

SLOW = {"steps": 300, "pause": 0.005}


class Watcher:
    """Waits for a run as a page does."""

    def __init__(self) -> None:
        self.woken = threading.Event()
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        self.woken.set()

    def until(self, true: Callable[[], bool], *, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it did not come true"
            self.woken.wait(0.05)
            self.woken.clear()


@pytest.fixture
def runs() -> Iterator[Runs]:
    service = Runs(Store(None), workers=2)
    yield service
    service.close()


def ask(service: Runs, lesson: Lesson = LESSON, **knobs: Any) -> tuple[Run, Watcher]:
    watcher = Watcher()
    return service.ask(lesson, WavesKnobs(**knobs), watcher), watcher


def done(service: Runs, lesson: Lesson = LESSON, **knobs: Any) -> Run:
    run, watcher = ask(service, lesson, **knobs)
    watcher.until(lambda: run.finished and (run.recording is None or run.findings is not None))
    return run


def counting(lesson: Lesson = LESSON) -> tuple[Lesson, list[Any]]:
    """The lesson, and a list that grows with each time it really runs."""
    began: list[Any] = []

    def run(knobs: Any) -> None:
        began.append(knobs.values())
        lesson.run(knobs)

    return dataclasses.replace(lesson, run=run), began


def test_a_run_is_a_pure_function_of_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_lesson", {"waves": LESSON}.__getitem__)
    one, two = execute("waves", {"steps": 6}), execute("waves", {"steps": 6})
    assert one.steps == two.steps == 6
    np.testing.assert_array_equal(one.stack(WAVE), two.stack(WAVE))
    with pytest.raises(ValueError, match="Steps must be from 1 to 400"):
        execute("waves", {"steps": 0})
    with pytest.raises(KeyError):
        execute("nope", {})


def test_a_run_ends_with_its_recording_and_findings(runs: Runs) -> None:
    run = done(runs, steps=6)
    assert (run.state, run.message, run.steps, run.total, run.cached) == ("done", "", 6, 6, False)
    assert run.recording is not None
    assert run.findings is not None
    assert run.findings.facts["steps"] == 6
    assert run.findings.marks == [{"step": 5, "label": "end"}]
    assert not any(chunk.array.flags.writeable for track in run.recording.tracks for chunk in track.chunks)


def test_equal_asks_share_one_run_and_look_knobs_do_not_count(runs: Runs) -> None:
    lesson, began = counting()
    first, watcher = ask(runs, lesson, **SLOW)
    others = [ask(runs, lesson, **SLOW, head=i % 4)[0] for i in range(20)]
    assert all(other is first for other in others)
    watcher.until(lambda: first.finished)
    assert done(runs, lesson, **SLOW) is first
    assert len(began) == 1
    assert done(runs, lesson, **{**SLOW, "steps": 3}) is not first
    assert len(began) == 2


def test_a_run_that_nobody_watches_stops_at_its_next_step(runs: Runs) -> None:
    run, watcher = ask(runs, **SLOW)
    watcher.until(lambda: run.steps > 2)
    runs.leave(run, watcher)
    watcher.until(lambda: run.finished)
    assert run.state == "cancelled"
    assert run.steps < 100
    again, _ = ask(runs, **SLOW)
    assert again is not run


def test_a_run_that_another_watches_goes_on(runs: Runs) -> None:
    run, watcher = ask(runs, **SLOW)
    _, other = ask(runs, **SLOW)
    watcher.until(lambda: run.steps > 2)
    runs.leave(run, watcher)
    other.until(lambda: run.finished)
    assert run.state == "done"


def test_a_stop_keeps_what_there_is_unless_others_watch(runs: Runs) -> None:
    run, watcher = ask(runs, **SLOW)
    watcher.until(lambda: run.steps > 2)
    _, other = ask(runs, **SLOW)
    assert not runs.stop(run, watcher)
    runs.leave(run, other)
    assert runs.stop(run, watcher)
    watcher.until(lambda: run.findings is not None)
    assert run.state == "stopped"
    assert run.recording is not None
    assert 2 < run.recording.steps < 300
    assert run.findings is not None
    assert {row["verdict"] for row in run.findings.claims} == {"untestable"}
    again, _ = ask(runs, **SLOW)
    assert again is not run, "what was stopped must not be shown as a finished run"


def test_rows_can_be_read_while_it_runs(runs: Runs) -> None:
    run, watcher = ask(runs, **SLOW)
    seen: list[int] = []

    def look() -> bool:
        recording = run.so_far()
        if recording is not None and recording.steps:
            matrix = recording.stack(WAVE)
            assert matrix.shape[1] == recording.steps
            seen.append(recording.steps)
        return run.finished

    watcher.until(look)
    assert len(set(seen)) > 10
    assert seen == sorted(seen)
    assert run.total == 300


def test_watchers_are_not_woken_for_every_step(runs: Runs) -> None:
    run, watcher = ask(runs, steps=400, pause=0.001)
    watcher.until(lambda: run.finished)
    assert watcher.count < 100


@pytest.mark.parametrize(
    ("trouble", "state", "message"),
    [
        ("crash", "failed", TROUBLE),
        ("sentence", "failed", "The text has no verb."),
        ("memory", "stopped", "There is not enough memory for it on this machine. What it had is shown."),
    ],
)
def test_a_run_that_fails_says_one_sentence_and_takes_nothing_down(
    runs: Runs, trouble: str, state: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        run = done(runs, trouble=trouble)
        assert (run.state, run.message) == (state, message)
    assert ("Traceback" in caplog.text) == (trouble == "crash")
    assert "script" not in run.message
    assert done(runs).state == "done"


def test_a_run_over_its_time_stops_with_what_it_had(runs: Runs) -> None:
    quick = dataclasses.replace(LESSON, seconds=0.2)
    run = done(runs, quick, **SLOW)
    assert run.state == "stopped"
    assert run.message == "It took longer than 0 seconds and was stopped. What it had is shown."
    assert run.recording is not None
    assert 0 < run.recording.steps < 300


def test_a_run_over_its_memory_stops_with_what_it_had() -> None:
    service = Runs(Store(None), workers=1, run_memory=300_000_000)
    run = done(service, steps=60, pause=0.02, trouble="greedy")
    assert run.state == "stopped"
    assert run.message == "It took more than 0.3 GB and was stopped. What it had is shown."
    assert run.recording is not None
    assert 3 <= run.recording.steps < 30
    assert done(service).state == "done"
    service.close()


def test_waiting_runs_know_their_place_and_a_full_service_refuses() -> None:
    service = Runs(Store(None), workers=1, queue=3)
    asked = [ask(service, **{**SLOW, "steps": 290 + i}) for i in range(4)]
    first, watcher = asked[0]
    watcher.until(lambda: first.state == "running" and service.load()["waiting"] == 3)
    assert [service.place(run) for run, _ in asked] == [0, 0, 1, 2]
    refused, _ = ask(service, steps=280, pause=0.005)
    assert (refused.state, refused.message) == ("failed", FULL)
    service.leave(*asked[1])
    assert asked[1][0].state == "cancelled"
    assert service.place(asked[2][0]) == 0
    service.leave(*asked[0])
    last, watcher = asked[3]
    watcher.until(lambda: service.place(last) == 0)
    service.close()


def test_a_hundred_turns_of_a_knob_leave_only_the_last_run(runs: Runs) -> None:
    watcher = Watcher()
    before: Run | None = None
    for i in range(100):
        run = runs.ask(LESSON, WavesKnobs(steps=200 + i, pause=0.002), watcher)
        if before is not None:
            runs.leave(before, watcher)
        before = run
    watcher.until(lambda: run.finished)
    assert run.state == "done"
    assert runs.load() == {"live": 0, "waiting": 0, "kept": 1}


def test_a_patient_run_rests_while_others_run_until_someone_wants_it(runs: Runs) -> None:
    watcher = Watcher()
    patient = runs.ask(LESSON, WavesKnobs(**SLOW), watcher, patient=True)
    watcher.until(lambda: patient.steps > 2)
    other, its = ask(runs, steps=100, pause=0.005)
    its.until(lambda: other.steps > 2)
    resting = patient.steps
    its.until(lambda: other.steps > 50)
    assert patient.steps <= resting + 1
    its.until(lambda: other.finished)
    watcher.until(lambda: patient.steps > resting + 5)
    third, its = ask(runs, steps=250, pause=0.01)
    its.until(lambda: third.steps > 2)
    resting = patient.steps
    wanted, watcher = ask(runs, **SLOW)
    assert wanted is patient
    watcher.until(lambda: patient.steps > resting + 10)
    assert not third.finished
    watcher.until(lambda: patient.finished)
    assert patient.state == "done"


def test_runs_at_the_same_time_do_not_mix(runs: Runs) -> None:
    both = [ask(runs, steps=120 + i, pause=0.002) for i in range(2)]
    for run, watcher in both:
        watcher.until(lambda run=run: run.finished)  # type: ignore[misc]
        assert run.recording is not None
        alone = perform(LESSON, run.knobs)
        np.testing.assert_array_equal(run.recording.stack(WAVE), alone.stack(WAVE))
        assert run.recording.meta["total_steps"] == alone.meta["total_steps"]


def test_another_server_finds_the_run_on_disk(tmp_path: Path) -> None:
    lesson, began = counting()
    one = Runs(Store(tmp_path))
    first = done(one, lesson)
    end = time.monotonic() + 10
    while not list(tmp_path.rglob("*.val")):
        assert time.monotonic() < end
        time.sleep(0.01)
    one.close()
    two = Runs(Store(tmp_path))
    second = done(two, lesson)
    two.close()
    assert len(began) == 1
    assert (second.state, second.cached, first.cached) == ("done", True, False)
    assert second.recording is not None
    assert first.recording is not None
    assert second.seconds == pytest.approx(first.seconds, abs=1e-3)
    assert second.findings == first.findings
    np.testing.assert_array_equal(second.recording.stack(WAVE), first.recording.stack(WAVE))


def test_what_was_stopped_or_failed_is_not_kept_on_disk(tmp_path: Path) -> None:
    service = Runs(Store(tmp_path))
    done(service, trouble="sentence")
    done(service, dataclasses.replace(LESSON, seconds=0.1), **SLOW)
    service.close()
    assert not list(tmp_path.rglob("*.val"))


def test_memory_keeps_the_newest_runs_within_its_bound() -> None:
    size = perform(LESSON, WavesKnobs(steps=50)).nbytes
    service = Runs(Store(None), memory=4 * size)
    kept = [done(service, steps=50, pause=i / 1e6) for i in range(8)]
    assert service.load()["kept"] <= 4
    assert done(service, steps=50, pause=7 / 1e6) is kept[-1]
    assert done(service, steps=50, pause=0.0) is not kept[0]
    service.close()


def test_a_closed_service_leaves_no_thread_and_refuses() -> None:
    before = threading.active_count()
    service = Runs(Store(None), workers=2)
    run, _ = ask(service, **SLOW)
    time.sleep(0.05)
    service.close()
    assert threading.active_count() == before
    assert ask(service)[0].state == "failed"
    assert run.state in ("queued", "cancelled")


def test_runs_have_no_gradients_unless_the_lesson_trains(runs: Runs) -> None:
    def run(knobs: Any) -> None:
        x = torch.ones(2, requires_grad=not torch.is_inference_mode_enabled())
        tap(
            WAVE,
            torch.tensor([[[float(torch.is_inference_mode_enabled()), float((x * 2).requires_grad)]]]),
            "head query key",
        )
        step()

    plain_lesson = dataclasses.replace(LESSON, run=run, facts=lambda r: {}, marks=lambda r: [], claims=())
    assert perform(plain_lesson, WavesKnobs()).stack(WAVE).ravel().tolist() == [1.0, 0.0]
    trains = dataclasses.replace(plain_lesson, trains=True)
    assert perform(trains, WavesKnobs()).stack(WAVE).ravel().tolist() == [0.0, 1.0]


def test_a_key_tells_apart_what_a_run_depends_on() -> None:
    base = key_of(LESSON, WavesKnobs())
    assert key_of(LESSON, WavesKnobs(head=2)) == base
    assert (
        len({base, key_of(LESSON, WavesKnobs(steps=9)), key_of(dataclasses.replace(LESSON, slug="w"), WavesKnobs())})
        == 3
    )


def test_changed_code_gives_other_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = code_version()
    assert len(before) == 64
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: real(p) + (b" " if p.name == "recording.py" else b""))
    code_version.cache_clear()
    try:
        assert code_version() != before
    finally:
        code_version.cache_clear()


def test_a_claim_that_cannot_be_computed_differs_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    found = findings(LESSON, perform(LESSON, WavesKnobs()))
    good, bad = found.claims
    assert (good["verdict"], good["measured"], good["formula"]) == ("agrees", "8", "n = 8")
    assert (bad["verdict"], bad["why"]) == ("differs", f"{NOT_COMPUTED}: no waves today")
    assert "ZeroDivisionError" in caplog.text


def test_broken_facts_and_marks_do_not_hide_the_claims(caplog: pytest.LogCaptureFixture) -> None:
    def broken(recording: Recording) -> Any:
        raise KeyError("x")

    claim = Claim("a", "b", "c", "d", lambda r: Finding("1", "agrees"))
    lesson = dataclasses.replace(LESSON, facts=broken, marks=broken, claims=(claim,))
    found = findings(lesson, perform(LESSON, WavesKnobs()))
    assert (found.facts, found.marks, len(found.claims)) == ({}, [], 1)
    assert caplog.text.count("could not be computed") == 2


def test_facts_are_plain_data() -> None:
    given = {"a": np.float32(0.5), "b": np.array([1, 2]), "c": (True, None), "d": {"e": np.int64(3)}, "f": Path("x")}
    assert plain(given) == {"a": 0.5, "b": [1, 2], "c": [True, None], "d": {"e": 3}, "f": "x"}
    assert type(plain(np.float32(0.5))) is float
