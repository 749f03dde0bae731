"""The run service: lessons run in a few worker threads, once for equal knobs, and whoever asks watches.

`execute` is the run itself, a pure function of plain values. `Runs` executes: a bounded queue, few workers, the
finished recordings in memory and on disk. Asking is instant; a watcher's `wake` is called from a worker's thread
whenever there is something new to read from the run. A run that nobody watches any more is cancelled at its next step.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from app.store import Store
from engine import checkpoints, hardware
from engine.recording import FORMAT, Recorder, Recording, record
from lessons import lesson as find_lesson
from lessons.knobs import Knobs, check
from lessons.lesson import Lesson

log = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "cancelled", "stopped", "failed"]
Wake = Callable[[], None]

QUEUE = 24  # runs that may wait
MEMORY = 400_000_000  # bytes of finished recordings kept in memory
RUN_MEMORY = 4_000_000_000  # bytes by which a run may make the process grow
PATIENCE = 5  # times its lesson's seconds that a run may take for which nobody waits
BEAT = 0.015  # seconds between two wakes of the watchers while a run goes on
FULL = "Too many people are running lessons just now. Please try again in a minute."
TROUBLE = "Something went wrong in the engine. The details are in the server's log."


class Cancelled(Exception):  # noqa: N818  it is no error: nobody watches any more
    """Raised at a step of a run that nobody watches any more."""


class Stopped(Exception):  # noqa: N818
    """Raised at a step of a run that is over its time or memory, or that its only watcher stopped."""


def execute(slug: str, values: Mapping[str, Any], on_step: Callable[[Recorder], None] | None = None) -> Recording:
    """Run the lesson `slug` with the knobs `values` and return what it showed.

    A pure function of plain values, for any process: a worker thread, a cluster, a notebook. Raises KeyError for
    an unknown lesson, ValueError for a knob that does not fit, ModelUnavailable, and what `on_step` raises.
    """
    chosen = find_lesson(slug)
    knobs, problems = check(chosen.knobs, values)
    if problems:
        raise ValueError(" ".join(problems))
    return perform(chosen, knobs, on_step)


def perform(lesson: Lesson, knobs: Knobs, on_step: Callable[[Recorder], None] | None = None) -> Recording:
    """Run `lesson` in this thread and return what it showed."""
    with (
        torch.inference_mode(not lesson.trains),
        record(keep=lesson.keep(knobs), budget=lesson.budget, on_step=on_step) as recorder,
    ):
        lesson.run(knobs)
        return recorder.freeze()


@dataclass(frozen=True)
class Findings:
    """What a finished run came to, as plain data: numbers for the beats, ticks for the transport, the claim table."""

    facts: dict[str, Any]
    marks: list[dict[str, Any]]
    claims: list[dict[str, str]]


def findings(lesson: Lesson, recording: Recording, *, whole: bool = True) -> Findings:
    """Facts, marks and claims of a recording. Never raises: what cannot be computed is logged and says so.

    Of a run that was stopped (`whole` is False) no claim can be tested.
    """
    facts: dict[str, Any] = {}
    marks: list[dict[str, Any]] = []
    try:
        facts = {name: plain(value) for name, value in lesson.facts(recording).items()}
    except Exception:
        (log.exception if whole else log.debug)("the facts of %s could not be computed", lesson.slug)
    try:
        marks = [{"step": int(mark.step), "label": mark.label} for mark in lesson.marks(recording)]
    except Exception:
        (log.exception if whole else log.debug)("the marks of %s could not be computed", lesson.slug)
    return Findings(facts, marks, claims(lesson, recording, whole=whole))


def claims(lesson: Lesson, recording: Recording, *, whole: bool = True) -> list[dict[str, str]]:
    """The claim table of a recording; a claim that cannot be computed differs, and says why."""
    table = []
    for claim in lesson.claims:
        row = {
            "text": claim.text,
            "source": claim.source,
            "formula": claim.formula,
            "reported": claim.reported,
            "measured": "",
            "unit": claim.unit,
            "verdict": "untestable",
            "why": "the run was stopped before its end",
        }
        if whole:
            try:
                found = claim.measure(recording)
                row |= {"measured": str(found.measured), "verdict": found.verdict, "why": found.why}
                row["formula"] = found.formula or claim.formula
            except Exception as error:
                log.exception("a claim of %s could not be computed: %s", lesson.slug, claim.text)
                row |= {"verdict": "differs", "why": f"{NOT_COMPUTED}: {error or type(error).__name__}"}
        table.append(row)
    return table


NOT_COMPUTED = "could not be computed"


def plain(value: Any) -> Any:
    """A fact as JSON can carry it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def with_available_model(knobs: Knobs) -> tuple[Knobs, str]:
    """The knobs to run, and one sentence when they name a model that is not here: then a toy takes its place."""
    wanted = getattr(knobs, "model", None)
    if not isinstance(wanted, str):
        return knobs, ""
    here, why = is_available(wanted)
    if here:
        return knobs, ""
    names = list(type(knobs).param["model"].objects)
    other = next((name for name in names if name != wanted and is_available(name)[0]), None)
    if other is None:
        return knobs, ""  # the run itself says what is missing
    sentence = f"{model_title(wanted)} is not here, so this runs on the toy. {_sentence(why)}"
    return type(knobs)(**{**knobs.values(), "model": other}), sentence.strip()


def is_available(name: str) -> tuple[bool, str]:
    """Whether the model is here, and if not why; never raises."""
    if name == "smollm2" and os.environ.get("LEANSCOPE_NO_MODELS"):
        return False, "this server runs all lessons on the toys."
    try:
        return checkpoints.available(name)
    except checkpoints.ModelUnavailable as error:
        return False, str(error)


def model_title(name: str) -> str:
    return "SmolLM2-135M" if name == "smollm2" else name


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] if text else ""


@functools.cache
def code_version() -> str:
    """A hash of all that decides what a run shows besides its knobs: the code, the zoo, torch, the device."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256(f"{FORMAT} {torch.__version__} {hardware.device().type}".encode())
    sources = [p for folder in ("engine", "lessons") for p in sorted((root / folder).rglob("*.py"))]
    for path in [*sources, checkpoints.ZOO / "manifest.json"]:
        if path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def key_of(lesson: Lesson, knobs: Knobs) -> str:
    """The identity of a run: equal keys give equal recordings."""
    told = [lesson.slug, lesson.run_values(knobs), code_version()]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


_numbers = itertools.count(1)


@dataclass(eq=False)
class Run:
    """One run of a lesson. Read it from any thread; only the service changes it."""

    key: str
    lesson: Lesson
    knobs: Knobs
    state: State = "queued"
    message: str = ""
    cached: bool = False  # it came from the disk
    seconds: float = 0.0  # what computing it took
    recording: Recording | None = None
    findings: Findings | None = None
    patient: bool = False  # it rests while others run
    id: str = field(default_factory=lambda: f"run-{next(_numbers)}")
    _recorder: Recorder | None = None
    _watchers: list[Wake] = field(default_factory=list)
    _order: Stopped | Cancelled | None = None  # what its next step shall raise
    _waked: float = 0.0

    @property
    def finished(self) -> bool:
        return self.state not in ("queued", "running")

    @property
    def steps(self) -> int:
        if self.recording is not None:
            return self.recording.steps
        return self._recorder.step if self._recorder is not None else 0

    @property
    def total(self) -> int:
        """How many steps it will have, where the lesson noted `total_steps`; 0 when nobody knows."""
        if self.recording is not None:
            return self.recording.steps
        total = self._recorder.meta.get("total_steps", 0) if self._recorder is not None else 0
        return total if isinstance(total, int) else 0

    def so_far(self) -> Recording | None:
        """What there is to see: the whole recording, or what it has up to the last finished step."""
        if self.recording is not None:
            return self.recording
        return self._recorder.so_far() if self._recorder is not None else None


class Runs:
    """Executes runs. `store` keeps finished ones on disk."""

    def __init__(
        self,
        store: Store,
        *,
        workers: int | None = None,
        queue: int = QUEUE,
        memory: int = MEMORY,
        run_memory: int = RUN_MEMORY,
    ) -> None:
        self.store = store
        # A GPU takes one run at a time. On a CPU a second worker lets a toy overtake a long run.
        self._count = workers or (1 if hardware.device().type == "cuda" else 2)
        self._limit = queue
        self._memory = memory
        self._run_memory = run_memory
        self._lock = threading.Condition()
        self._live: dict[str, Run] = {}
        self._waiting: deque[Run] = deque()
        self._finished: OrderedDict[str, Run] = OrderedDict()
        self._errands: deque[Callable[[], None]] = deque()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def ask(self, lesson: Lesson, knobs: Knobs, wake: Wake, *, patient: bool = False) -> Run:
        """The run of `lesson` at `knobs`, old or new; `wake` is called when it moves, until `leave`.

        A `patient` run rests while any other runs; it stops being so when someone impatient asks for it too.
        """
        key = key_of(lesson, knobs)
        with self._lock:
            run = self._finished.get(key) or self._live.get(key)
            if run is None:
                run = Run(key, lesson, knobs, patient=patient)
                if self._closed or len(self._live) >= self._limit + self._count:
                    run.state, run.message = "failed", FULL
                    return run
                self._live[key] = run
                self._send(functools.partial(self._look_up, run))
            elif run.finished:
                self._finished.move_to_end(key)
            run.patient = run.patient and patient
            run._watchers.append(wake)
            return run

    def leave(self, run: Run, wake: Wake) -> None:
        """Stop watching. A run that nobody watches is cancelled."""
        with self._lock:
            if wake in run._watchers:
                run._watchers.remove(wake)
            if run._watchers or run.finished:
                return
            run._order = Cancelled()
            self._forget(run)
            if run in self._waiting:
                self._waiting.remove(run)
                run.state = "cancelled"

    def stop(self, run: Run, wake: Wake) -> bool:
        """Stop the run for good and keep what it has; False when others watch it, so that it goes on for them."""
        with self._lock:
            if run.finished or any(other is not wake for other in run._watchers):
                return False
            run._order = Stopped("Stopped. What it had is shown.")
            self._forget(run)
            if run in self._waiting:
                self._waiting.remove(run)
                run.state, run.message = "stopped", "Stopped before it began."
                self._wake(run)
            return True

    def place(self, run: Run) -> int:
        """How many runs go first, 0 when it is its turn."""
        with self._lock:
            return self._waiting.index(run) if run in self._waiting else 0

    def load(self) -> dict[str, int]:
        """How busy it is."""
        with self._lock:
            return {"live": len(self._live), "waiting": len(self._waiting), "kept": len(self._finished)}

    def close(self, *, timeout: float = 5.0) -> None:
        """Cancel everything and wait for the workers."""
        with self._lock:
            self._closed = True
            for run in self._live.values():
                run._order = Cancelled()
            self._waiting.clear()
            self._lock.notify_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.store.close()

    # Everything below runs in the service's own threads, or under its lock.

    def _send(self, errand: Callable[[], None]) -> None:
        if not self._threads:
            bodies = [self._errand_thread] + [self._worker] * self._count
            self._threads = [threading.Thread(target=body, name="leanscope", daemon=True) for body in bodies]
            for thread in self._threads:
                thread.start()
        self._errands.append(errand)
        self._lock.notify_all()

    def _forget(self, run: Run) -> None:
        if self._live.get(run.key) is run:
            del self._live[run.key]

    def _wake(self, run: Run) -> None:
        run._waked = time.monotonic()
        for wake in tuple(run._watchers):
            wake()

    def _errand_thread(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._errands or self._closed)
                if self._closed:
                    return
                errand = self._errands.popleft()
            try:
                errand()
            except Exception:
                log.exception("an errand failed")

    def _worker(self) -> None:
        torch.set_num_threads(hardware.threads())
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                run = self._waiting.popleft()
                run.state = "running"
                others = tuple(self._waiting)
            for waiting in (run, *others):
                self._wake(waiting)
            try:
                self._perform(run)
            except Exception:
                log.exception("a worker failed, and goes on")
                self._settle(run, None, "failed", TROUBLE)

    def _look_up(self, run: Run) -> None:
        """From the disk if it is there, else into the queue."""
        recording = self.store.get(run.key)
        if recording is None:
            with self._lock:
                if run._order is not None:
                    run.state = "stopped" if isinstance(run._order, Stopped) else "cancelled"
                else:
                    self._waiting.append(run)
                    self._lock.notify_all()
            self._wake(run)
            return
        with self._lock:
            run.cached = True
        self._settle(run, recording, "done", "")

    def _perform(self, run: Run) -> None:
        started = time.monotonic()
        limit = run.lesson.seconds * (PATIENCE if run.patient else 1)
        rested = 0.0
        grown = _resident()

        def on_step(recorder: Recorder) -> None:
            nonlocal rested
            run._recorder = recorder
            rested += self._rest(run)
            if run._order is not None:
                raise run._order
            now = time.monotonic()
            if now - started - rested > limit:
                raise Stopped(f"It took longer than {limit:.0f} seconds and was stopped. What it had is shown.")
            if now - run._waked > BEAT or recorder.step == 1:
                if _resident() - grown > self._run_memory:
                    raise Stopped(
                        f"It took more than {self._run_memory / 1e9:.1f} GB and was stopped. What it had is shown."
                    )
                self._wake(run)

        recording: Recording | None = None
        state: State = "done"
        message = ""
        try:
            recording = perform(run.lesson, run.knobs, on_step)
        except Cancelled:
            state = "cancelled"
        except Stopped as stopped:
            state, message = "stopped", str(stopped)
        except (ValueError, checkpoints.ModelUnavailable) as error:
            state, message = "failed", _sentence(str(error))
            log.info("%s failed: %s", run.lesson.slug, error)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            state, message = "stopped", "There is not enough memory for it on this machine. What it had is shown."
        except Exception as error:
            if "can't allocate memory" in str(error):
                state, message = "stopped", "There is not enough memory for it on this machine. What it had is shown."
            else:
                state, message = "failed", TROUBLE
                log.exception("%s failed with %s", run.lesson.slug, run.lesson.run_values(run.knobs))
        run.seconds = time.monotonic() - started - rested
        if recording is None and state == "stopped" and run._recorder is not None:
            recording = run._recorder.so_far()
        if recording is not None and state == "done":
            recording.meta["run_seconds"] = round(run.seconds, 3)
        self._settle(run, recording, state, message)

    def _rest(self, run: Run) -> float:
        """Let others go first, if the run is patient; returns the seconds that it rested."""
        if not run.patient or self._count == 1:  # a single worker that rested would let nobody go first
            return 0.0
        began = time.monotonic()
        with self._lock:
            while run.patient and run._order is None and any(not other.patient for other in self._live.values()):
                self._lock.wait(0.1)
        return time.monotonic() - began

    def _settle(self, run: Run, recording: Recording | None, state: State, message: str) -> None:
        """Publish the end of a run: first the picture, then what it came to, then to disk."""
        if recording is not None and run.cached:
            seconds = recording.meta.get("run_seconds", 0.0)
            run.seconds = seconds if isinstance(seconds, int | float) else 0.0
        with self._lock:
            run.recording, run.message, run.state = recording, message, state
            run._recorder = None
            self._forget(run)
            if state == "done" and recording is not None:
                self._finished[run.key] = run
                self._trim()
            self._lock.notify_all()
        self._wake(run)
        if recording is None:
            return
        run.findings = findings(run.lesson, recording, whole=state == "done")
        self._wake(run)
        if state == "done" and not run.cached:
            with self._lock:
                self._send(functools.partial(self.store.put, run.key, recording))

    def _trim(self) -> None:
        size = sum(run.recording.nbytes for run in self._finished.values() if run.recording is not None)
        while size > self._memory and len(self._finished) > 1:
            _, oldest = self._finished.popitem(last=False)
            size -= oldest.recording.nbytes if oldest.recording is not None else 0


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
