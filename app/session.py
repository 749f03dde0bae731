"""One visitor: what the browser says is checked, and what there is to see is sent, at most RATE times a second.

Everything that arrives is taken for hostile: it is bounded, then obeyed, ignored or answered with a notice, and it
never raises. Running, packing and arithmetic happen in threads; this object lives on the server's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from app import answers, ipynb, link
from app.ahead import Ahead
from app.answers import STEPS, Message, notice, whole
from app.picture import Feed, track_id
from app.runs import Findings, Run, Runs, with_available_model
from engine.recording import Recording
from lessons.knobs import Knobs, check
from lessons.lesson import Lesson
from lessons.views import Of

log = logging.getLogger(__name__)

RATE = 30  # batches of rows a second
QUICK = 200  # batches of anything else
TURNS = 60  # turns of a knob, of which the latest counts
JOBS = 32  # answers that a session may have pending
CALLS = 120.0  # messages a second that a browser may send
KNOBS = 64  # knobs in a message

packers = ThreadPoolExecutor(2, "leanscope-pack")


class Session:
    """One open lesson. `send` brings a list of messages to its browser."""

    def __init__(
        self,
        lesson: Lesson,
        place: link.Place,
        runs: Runs,
        send: Callable[[list[Message]], Awaitable[None]],
        *,
        present: bool = False,
        here: str | None = "",
    ) -> None:
        """`here` is this page's name in a link to it, where that is not the lesson's slug; None: it has no address."""
        self.lesson = lesson
        self._here = lesson.slug if here == "" else here
        self.knobs = place.knobs
        self.beat, self.step = place.beat, place.step
        self.scene = lesson.scenes[0].name if lesson.scenes else ""
        if lesson.beats and lesson.beats[self.beat].scene:
            self.scene = lesson.beats[self.beat].scene
        self.run: Run | None = None
        self._known = False  # the run was done before it was asked for
        self._present = present
        self._runs = runs
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()  # a knob was turned: rest no longer
        self._task: asyncio.Task[None] | None = None
        self._packed: list[Message] = []  # what the feed made, in a packer's thread
        self._feed = Feed(lambda message: self._packed.append(message))
        self._outbox: list[Message] = []
        self._jobs: list[Callable[[], list[Message]]] = []
        self._turned: dict[Any, Any] | None = None  # knobs that arrived and are not applied yet
        self._status: Message = {}
        self._told: Findings | None = None
        self._linked = link.encode(lesson, place)
        self._missing = ""  # the sentence about a model that is not here
        self._problem = runs.store.problem
        self._ahead = Ahead(lesson, runs, self._status_of, self._later)
        self._fetching = False  # the page asked for what its beats will show
        self._calls = CALLS
        self._called = time.monotonic()
        self._handlers: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "ready": self._on_ready,
            "knobs": self._on_knobs,
            "scene": self._on_scene,
            "place": self._on_place,
            "stop": self._on_stop,
            "exact": self._on_exact,
            "cell": self._on_cell,
            "calculate": self._on_calculate,
            "code": self._on_code,
            "tensors": self._on_tensors,
            "tensor": self._on_tensor,
            "download": self._on_download,
            "ahead": self._on_ahead,
            "ping": self._on_ping,
        }

    def receive(self, message: Any) -> None:
        """Take one message from the browser, in whatever thread it arrives. Never raises."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._take, message)

    def close(self) -> None:
        """The visitor is gone."""
        self._handlers = {}
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._ahead.stop()
        if self.run is not None:
            self._runs.leave(self.run, self._wake)
            self.run = None

    def _take(self, message: Any) -> None:
        now = time.monotonic()
        self._calls = min(CALLS, self._calls + (now - self._called) * CALLS)
        self._called = now
        if self._calls < 1 or not isinstance(message, dict):
            return
        self._calls -= 1
        kind = message.get("type")
        handler = self._handlers.get(kind) if isinstance(kind, str) else None
        if handler is None:
            return
        try:
            handler(message)
        except Exception:
            log.exception("a %s message could not be handled", kind)

    # What arrives

    def _on_ready(self, message: Mapping[str, Any]) -> None:
        if self._task is None:
            self._task = self._loop.create_task(self._pump())
            self._ask()

    def _on_knobs(self, message: Mapping[str, Any]) -> None:
        values = message.get("values")
        if isinstance(values, dict) and len(values) <= KNOBS:
            self._turned = values  # the latest wins, and is applied by the pump
            self._news.set()
            self._urgent.set()

    def _on_scene(self, message: Mapping[str, Any]) -> None:
        name = message.get("scene")
        if isinstance(name, str) and any(scene.name == name for scene in self.lesson.scenes):
            self.scene = name
            self._news.set()

    def _on_place(self, message: Mapping[str, Any]) -> None:
        beat, step = message.get("beat"), message.get("step")
        if whole(beat, max(0, len(self.lesson.beats) - 1)) and whole(step, STEPS):
            self.beat, self.step = int(beat), int(step)  # type: ignore[arg-type]
            self._news.set()

    def _on_stop(self, message: Mapping[str, Any]) -> None:
        run = self.run
        if run is None or run.finished or self._runs.stop(run, self._wake):
            return
        # Others watch it: it goes on for them, and this page keeps what it has.
        self._runs.leave(run, self._wake)
        kept = Run(run.key, run.lesson, run.knobs, "stopped", "Stopped. What it had is shown.", id=run.id)
        kept.recording = run.so_far()
        self.run = kept
        self._news.set()

    def _on_exact(self, message: Mapping[str, Any]) -> None:
        name, row = message.get("track"), message.get("row")
        tensor, run, recording = self._tensor(name), self.run, self._so_far()
        if tensor is not None and run is not None and recording is not None and whole(row, STEPS):
            ask = functools.partial(answers.exact, recording, tensor, self._seen(run), request=_request(message))
            self._later(functools.partial(ask, track=str(name), row=int(row)))  # type: ignore[arg-type]

    def _on_cell(self, message: Mapping[str, Any]) -> None:
        request, index = _request(message), message.get("view")
        views = self.lesson.scene(self.scene).views if self.lesson.scenes else ()
        run, recording = self.run, self._so_far()
        if isinstance(index, int) and whole(index, len(views) - 1) and run is not None and recording is not None:
            ask = functools.partial(answers.cell, recording, views[index], self._seen(run), message.get("at"))
            step = message.get("step")
            step = step if isinstance(step, int) and whole(step, STEPS) else None
            self._later(functools.partial(ask, request=request, index=index, step=step))
        else:
            self._say({"type": "cell", "request": request, "error": "There is no such cell."})

    def _on_calculate(self, message: Mapping[str, Any]) -> None:
        request, index = _request(message), message.get("view")
        views = self.lesson.scene(self.scene).views if self.lesson.scenes else ()
        view = views[index] if isinstance(index, int) and whole(index, len(views) - 1) else None
        self._later(functools.partial(answers.calculate, view, message.get("values"), request=request, index=index))

    def _on_code(self, message: Mapping[str, Any]) -> None:
        self._later(functools.partial(answers.code, self.lesson.code))

    def _on_tensors(self, message: Mapping[str, Any]) -> None:
        self._later(functools.partial(answers.tensors, self._so_far()))

    def _on_tensor(self, message: Mapping[str, Any]) -> None:
        key, step, recording = message.get("key"), message.get("step"), self._so_far()
        if isinstance(key, str) and (step is None or whole(step, STEPS)) and recording is not None:
            self._later(functools.partial(answers.tensor, recording, key, step))

    def _on_download(self, message: Mapping[str, Any]) -> None:
        what, run = message.get("what"), self.run
        if what == "notebook":
            self._later(functools.partial(ipynb.file, self.lesson, self.knobs))
            return
        if not isinstance(what, str) or what not in answers.KINDS:
            return
        if run is None or run.recording is None:
            self._say(notice("There is nothing to save yet: wait until the run is done.", level="info"))
        else:
            self._later(functools.partial(answers.file, self.lesson.slug, what, run.recording, run.findings))

    def _on_ahead(self, message: Mapping[str, Any]) -> None:
        self._fetching = True
        self._news.set()

    def _on_ping(self, message: Mapping[str, Any]) -> None:
        self._say({"type": "pong"})

    def _apply(self, values: Mapping[Any, Any]) -> None:
        """Turn the knobs that fit; of each other one, say why it stays where it is."""
        fitting = self.knobs.values()
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            checked, problems = check(self.lesson.knobs, {**fitting, **values})  # as a rule all fit
            if not problems:
                self.knobs = checked
                self._ask()
                return
        for name, value in values.items():
            if not isinstance(name, str):
                continue
            try:
                checked, problems = check(self.lesson.knobs, {name: value})
            except (ValueError, TypeError, OverflowError):
                problems = [f"{name[:40]} does not fit."]
            if problems:
                self._say({**notice(problems[0]), "knob": name if name in fitting else ""})
            else:
                fitting[name] = getattr(checked, name)
        self.knobs = self.lesson.knobs(**fitting)
        self._ask()

    def _ask(self) -> None:
        """Watch the run of the knobs as they are; the one before is left, and ends if nobody else watches it."""
        knobs, missing = with_available_model(self.knobs)
        if missing and missing != self._missing:
            self._say(notice(missing))
        self._missing = missing
        old = self.run
        # A run that failed, or was stopped or cancelled, is tried again when asked again.
        again = old is None or old.state in ("failed", "stopped", "cancelled")
        if again or self.lesson.run_values(old.knobs) != self.lesson.run_values(knobs):  # type: ignore[union-attr]
            self.run = self._runs.ask(self.lesson, knobs, self._wake)
            self._known = self.run.finished
            self._told = None
            if old is not None and old is not self.run:
                self._runs.leave(old, self._wake)
        self._news.set()

    # What leaves

    def _say(self, message: Message) -> None:
        if len(self._outbox) < 4 * JOBS:
            self._outbox.append(message)
        self._news.set()

    def _later(self, job: Callable[[], list[Message]]) -> None:
        if len(self._jobs) < JOBS:
            self._jobs.append(job)
        self._news.set()

    def _wake(self) -> None:
        """There is something new; called in a worker's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._news.set)

    async def _pump(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            self._urgent.clear()
            began = self._loop.time()
            rows = False
            try:
                rows = await self._flush()
            except Exception:
                log.exception("a page could not be told the news")
            # A slow browser or a busy machine gets fewer, larger batches.
            took = self._loop.time() - began
            rest = max((1 / RATE if rows else 1 / QUICK) - took, took / 2, 0.001)
            await asyncio.sleep(min(rest, 1 / TURNS))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), max(0.0, rest - 1 / TURNS))

    async def _flush(self) -> bool:
        """Send what there is; returns whether rows of a tensor were among it."""
        if self._turned is not None:
            turned, self._turned = self._turned, None
            self._apply(turned)
        if self._fetching:
            self._fetching = False
            self._ahead.fetch(self.knobs)
        messages, self._outbox = self._outbox, []
        jobs, self._jobs = self._jobs, []
        if self._problem != self._runs.store.problem:
            self._problem = self._runs.store.problem
            messages += [notice(self._problem)] if self._problem else []
        if self.run is not None:
            messages += await self._progress(self.run)
        messages += self._moved()
        for job in jobs:
            messages += await self._in_thread(job)
        if messages:
            await self._send(messages)
        return any(message["type"] == "rows" for message in messages)

    async def _progress(self, run: Run) -> list[Message]:
        """What the browser lacks of the run."""
        # The state is read first: where it says done, the picture that follows is whole.
        status, found = self._status_of(run), run.findings
        recording = run.so_far()
        messages: list[Message] = []
        # A run that has just begun is announced; one that is done is so only once its picture is there.
        begins = not run.finished and status["run"] != self._status.get("run")
        if begins:
            messages.append(status)
        if recording is not None and recording.steps:
            messages += await self._in_thread(functools.partial(self._pack, run, recording, self._seen(run)))
        if status != self._status and not begins:
            messages.append(status)
        self._status = status
        if found is not None and found is not self._told:
            self._told = found
            messages.append({"type": "facts", "run": run.id, **dataclasses.asdict(found)})
        return messages

    def _pack(self, run: Run, recording: Recording, knobs: Knobs) -> list[Message]:
        """In a packer's thread; a session has one such call at a time."""
        self._packed = []
        if self.lesson.scenes:
            steps = max(run.total, recording.steps)
            self._feed.show(run.id, recording, self.lesson.scene(self.scene), knobs, steps=steps)
        return self._packed

    def _moved(self) -> list[Message]:
        """The link, when the place is another."""
        token = link.encode(self.lesson, link.Place(self.knobs, self.beat, self.step))
        if token == self._linked or self._here is None:
            return []
        self._linked = token
        query = "&".join(["present=1"] * self._present + [f"s={token}"] * bool(token))
        return [{"type": "link", "href": f"{self._here}?{query}".rstrip("?")}]

    def _status_of(self, run: Run) -> Message:
        return {
            "type": "run",
            "run": run.id,
            "state": run.state,
            "place": self._runs.place(run),
            "steps": run.steps,
            "total": run.total,
            "message": run.message,
            "cached": run.cached or self._known,
            "seconds": round(run.seconds, 3),
        }

    async def _in_thread(self, job: Callable[[], list[Message]]) -> list[Message]:
        try:
            return await self._loop.run_in_executor(packers, job)
        except Exception:
            log.exception("an answer for a page could not be made")
            return []

    def _so_far(self) -> Recording | None:
        return self.run.so_far() if self.run is not None else None

    def _tensor(self, name: Any) -> Of | None:
        """The tensor that the page calls `name`."""
        if self.run is None:
            return None
        knobs = self._seen(self.run)
        tensors = (tensor for scene in self.lesson.scenes for view in scene.views for tensor in view.tensors())
        return next((tensor for tensor in tensors if track_id(tensor, knobs) == name), None)

    def _seen(self, run: Run) -> Knobs:
        """The knobs that the picture is drawn with: the run's own, and the look knobs as they are now."""
        looks = {name: getattr(self.knobs, name) for name in self.lesson.looks}
        return self.lesson.knobs(**{**run.knobs.values(), **looks})


def _request(message: Mapping[str, Any]) -> int | str:
    """The number by which the page knows its question; only what is small and plain is sent back."""
    request = message.get("request")
    if type(request) is int and abs(request) < 2**53:
        return request
    return request[:64] if isinstance(request, str) else 0
