"""For whoever presents: everything that the beats will show, sent before the network may go.

A page is sent what its scene shows, when it shows it. A projector asks for the rest too: all scenes, of the run that is
on the page and of every run that the beats turn the knobs to. They come as the messages of `app/picture.py`, each with
`ahead`: the number of the state that it belongs to; the page keeps them (`app/stage/reel.js`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable

from app.answers import Message
from app.picture import Feed
from app.runs import Run, Runs, with_available_model
from lessons.knobs import Knobs
from lessons.lesson import Lesson

log = logging.getLogger(__name__)

STATES = 12  # settings of the knobs that are fetched ahead
PAUSE = 1.0  # seconds between two fetches of a page, however often it asks
ROOM = 80_000_000  # bytes of pictures that are sent ahead


def states(lesson: Lesson, knobs: Knobs) -> list[Knobs]:
    """The settings that a walk through the beats comes by, the present one first."""
    found = [knobs.values()]
    now = found[0]
    for beat in lesson.beats:
        now = {**now, **{name: value for name, value in beat.knobs.items() if name in now}}
        if now not in found:
            found.append(now)
    return [lesson.knobs(**values) for values in found[:STATES]]


class Ahead:
    """Fetches for one page. `later` takes a function that makes messages, in a thread, to be sent when it is done."""

    def __init__(
        self,
        lesson: Lesson,
        runs: Runs,
        status: Callable[[Run], Message],
        later: Callable[[Callable[[], list[Message]]], None],
    ) -> None:
        self._lesson = lesson
        self._runs = runs
        self._status = status
        self._later = later
        self._task: asyncio.Task[None] | None = None
        self._next = 0.0  # when another fetch may begin

    def fetch(self, knobs: Knobs) -> None:
        """Begin, with the page's knobs as they are; what was being fetched for other knobs is let go."""
        self.stop()
        self._task = asyncio.get_running_loop().create_task(self._fetched(knobs))

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _fetched(self, knobs: Knobs) -> None:
        try:
            await self._fetch(knobs)
        except Exception:
            log.exception("what the beats of %s will show could not be fetched", self._lesson.slug)

    async def _fetch(self, knobs: Knobs) -> None:
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, self._next - now))
        self._next = max(now, self._next) + PAUSE
        wanted = states(self._lesson, knobs)
        pack = _Packing(self._lesson, self._status)
        for number, state in enumerate(wanted):
            run = await self._run(with_available_model(state)[0])
            self._later(pack.state(number, state, run))
        self._later(lambda: [pack.told(len(wanted))])

    async def _run(self, knobs: Knobs) -> Run:
        """The run at `knobs`, once it is finished and its facts are known; others go first."""
        loop, moved = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(moved.set)

        run = self._runs.ask(self._lesson, knobs, wake, patient=True)
        try:
            while not run.finished or (run.recording is not None and run.findings is None):
                await moved.wait()
                moved.clear()
        finally:
            self._runs.leave(run, wake)
        return run


class _Packing:
    """Packs states one after the other; rows that two of them share travel once."""

    def __init__(self, lesson: Lesson, status: Callable[[Run], Message]) -> None:
        self._lesson = lesson
        self._status = status
        self._feeds: dict[str, tuple[Feed, list[Message]]] = {}
        self._sent = 0
        self.kept = 0
        self.left: list[str] = []

    def told(self, wanted: int) -> Message:
        """How much of it the page has now; the last message."""
        return {"type": "ahead", "ahead": wanted, "kept": self.kept, "of": wanted, "left": self.left}

    def state(self, number: int, knobs: Knobs, run: Run) -> Callable[[], list[Message]]:
        """A function that packs all scenes of `run`, seen with `knobs`."""
        return lambda: self._pack(number, knobs, run)

    def _pack(self, number: int, knobs: Knobs, run: Run) -> list[Message]:
        if run.recording is None or run.state != "done":
            self.left.append(run.message or "It could not be run.")
            return []
        if self._sent > ROOM:
            self.left.append("There is too much of it to send ahead.")
            return []
        feed, messages = self._feeds.setdefault(run.id, _feed())
        seen = with_available_model(knobs)[0]
        for scene in self._lesson.scenes:
            feed.show(run.id, run.recording, scene, seen)
        made: list[Message] = [{"type": "state", "run": run.id, "knobs": knobs.values()}, *messages]
        messages.clear()
        made.append(self._status(run))
        if run.findings is not None:
            made.append({"type": "facts", "run": run.id, **dataclasses.asdict(run.findings)})
        self._sent += sum(_bytes(message) for message in made)
        self.kept += 1
        return [{**message, "ahead": number} for message in made]


def _feed() -> tuple[Feed, list[Message]]:
    messages: list[Message] = []
    return Feed(messages.append), messages


def _bytes(message: Message) -> int:
    return sum(int(getattr(value, "nbytes", 0)) for value in message.values())
