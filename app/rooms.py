"""Rooms: one browser leads, others follow and vote. Who may do what is decided here, for both stores alike.

A room has a short code, which everybody may know, and a key, which only the browser that opened it has; the server
keeps the key's hash. What arrives is taken for hostile: `Refused` carries the one sentence for whoever sent it.
What students see of a poll before it is revealed is nothing at all; the leader sees how many have voted.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from app.answers import STEPS, whole
from app.room_store import Kept, MemoryStore, RoomStore, StoreError
from lessons import all_lessons
from lessons.knobs import check

log = logging.getLogger(__name__)

LETTERS = "CDFGHJKMNPQRTVWXY34679"  # none that looks like another, and no vowels, which would make words
LENGTH = 6
PEOPLE = 500  # students in a room
KNOBS = 64  # knobs in a message
SPEEDS = (0.5, 1, 2, 4, 8)
PULSE = 10.0  # seconds between two reports of who is here
SOON = 0.25  # seconds in which counts that changed are gathered
SEAT = re.compile(r"[A-Za-z0-9_-]{16,64}")

GONE = "The room has ended."
AWAY = "Rooms can't be reached just now. Please try again in a moment."
NOT_LEADER = "Only the browser that opened the room can do that."
WRONG_KEY = "This is not the key of that room."


class Refused(Exception):  # noqa: N818
    """Why something was not done: one sentence for whoever asked."""


class Member(Protocol):
    """Someone in a room, as the room sees a connection. Messages of one `kind` may replace each other."""

    code: str
    seat: str
    leads: bool

    def say(self, kind: str, text: str) -> None: ...


@dataclass
class Room:
    """A room that someone in this process is in."""

    code: str
    seal: str
    place: dict[str, Any]
    members: set[Member] = field(default_factory=set)
    told: int = -1  # the number of people last told
    pending: set[str] = field(default_factory=set)  # counts that changed and are not told yet


class Rooms:
    """The rooms of this process. `make_store` is given what the store shall call when something happened."""

    def __init__(self, make_store: Callable[[Any], RoomStore], *, clock: Callable[[], float] = time.time) -> None:
        self.store = make_store(self.hear)
        self._clock = clock
        self._rooms: dict[str, Room] = {}
        self._joining = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pulse: asyncio.Task[None] | None = None

    # What a browser may ask for

    async def open(self, member: Member, place: Any) -> str:
        """Begin a room that `member` leads; returns its key, which nobody else gets."""
        checked = place_of(place)
        await self.leave(member)
        key = secrets.token_urlsafe(32)
        for _ in range(20):
            code = "".join(secrets.choice(LETTERS) for _ in range(LENGTH))
            done = await self.store.make(code, Kept(seal_of(key), json.dumps(checked)), self._clock())
            if done == "many":
                raise Refused("There are too many rooms just now. Please try again in a few minutes.")
            if done == "made":
                await self._enter(member, code, leads=True)
                return key
        raise Refused(AWAY)

    async def join(self, member: Member, code: Any, seat: Any, key: Any = None) -> dict[str, Any]:
        """Take `member` in, as the leader if it has the key; returns what it has to know."""
        code = code_of(code)
        kept = await self._find(code)
        leads = key is not None
        if leads and not (isinstance(key, str) and hmac.compare_digest(seal_of(key), kept.seal)):
            raise Refused(WRONG_KEY)
        await self.leave(member)
        member.seat = seat if isinstance(seat, str) and SEAT.fullmatch(seat) else secrets.token_urlsafe(16)
        if not leads and not await self.store.enter(code, member.seat, self._clock(), PEOPLE):
            raise Refused(f"Room {code} is full: {PEOPLE} people are in it.")
        room = await self._enter(member, code, leads=leads)
        mine, revealed = await self.store.polls(code, member.seat)
        self._soon(room, "people")
        return {"code": code, "leads": leads, "place": room.place, "mine": mine, "revealed": revealed}

    async def lead(self, member: Member, place: Any) -> None:
        """The leader is at `place`: everybody shall be there."""
        room = self._led(member)
        checked = place_of(place)
        room.place = checked
        await self.store.put(room.code, json.dumps(checked))
        await self._tell(room.code, {"type": "place", "place": checked})
        if poll_at(checked)[1]:
            self._soon(room, "votes")

    async def vote(self, member: Member, poll: Any, option: Any) -> None:
        """Put in a student's vote, or another in its place."""
        room = self._of(member)
        if member.leads:
            raise Refused("Whoever leads does not vote.")
        here, options = poll_at(room.place)
        if not options or poll != here:
            raise Refused("There is no such poll now: the leader is elsewhere.")
        if not whole(option, options - 1):
            raise Refused("There is no such answer in this poll.")
        done = await self.store.vote(room.code, here, member.seat, option, PEOPLE)
        if done == "over":
            raise Refused("The poll is over: its answers have been revealed.")
        if done == "many":
            raise Refused("As many have voted as fit into a room.")
        self._soon(room, "votes")

    async def reveal(self, member: Member, poll: Any) -> None:
        """Show everybody how the votes fell; from then on they stand."""
        room = self._led(member)
        here, options = poll_at(room.place)
        if not options or poll != here:
            raise Refused("There is no such poll now.")
        counts = await self.store.reveal(room.code, here, options)
        await self._tell(room.code, {"type": "revealed", "poll": here, "counts": counts})

    async def end(self, member: Member) -> None:
        """Close the room for all."""
        room = self._led(member)
        await self.store.end(room.code)
        await self._tell(room.code, {"type": "ended", "text": GONE})

    def left(self, member: Member) -> None:
        """`member` hung up."""
        self._later(self.leave(member))

    async def leave(self, member: Member) -> None:
        """`member` is in its room no more."""
        room = self._rooms.get(member.code)
        if room is None or member not in room.members:
            return
        room.members.discard(member)
        with contextlib.suppress(StoreError):
            if not member.leads and all(other.seat != member.seat for other in room.members):
                await self.store.leave(room.code, member.seat)
            if room.members:
                self._soon(room, "people")
            else:
                count = await self.store.people(room.code, self._clock())
                await self._tell(room.code, {"type": "people", "count": count})
                await self._drop(room)

    async def where(self, code: Any) -> dict[str, Any]:
        """Where the leader of a room is."""
        found: dict[str, Any] = json.loads((await self._find(code_of(code))).place)
        return found

    async def close(self) -> None:
        """Let everything go."""
        tasks = [*self._tasks, *([self._pulse] if self._pulse else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._rooms.clear()
        await self.store.close()

    # What the store tells

    async def hear(self, code: str, text: str) -> None:
        """Something happened in a room, here or in another process. `text` is ours, and goes on as it is."""
        room = self._rooms.get(code)
        if room is None:
            return
        message = json.loads(text)
        kind = message["type"]
        if kind == "place":
            room.place = message["place"]
        for member in tuple(room.members):
            if not (member.leads if kind == "place" else kind == "votes" and not member.leads):
                member.say(f"{kind} {message.get('poll', '')}", text)
        if kind == "ended":
            for member in tuple(room.members):
                member.code = ""
            room.members.clear()
            await self._drop(room)

    # Inside

    async def _find(self, code: str) -> Kept:
        kept = await self.store.find(code, self._clock())
        if kept is None:
            ended = await self.store.has_ended(code)
            raise Refused(f"Room {code} has ended." if ended else f"There is no room {code}: look at the code again.")
        return kept

    async def _enter(self, member: Member, code: str, *, leads: bool) -> Room:
        async with self._joining:  # a room is taken up once, however many come at the same time
            room = self._rooms.get(code)
            if room is None:
                await self.store.listen(code)  # before looking: what happens meanwhile is heard
                kept = await self._find(code)
                room = self._rooms[code] = Room(code, kept.seal, json.loads(kept.place))
        member.code, member.leads = code, leads
        room.members.add(member)
        await self.store.stay(code, [], self._clock())
        if self._pulse is None or self._pulse.done():
            self._pulse = asyncio.create_task(self._beat())
        return room

    async def _drop(self, room: Room) -> None:
        if not room.members and self._rooms.get(room.code) is room:
            del self._rooms[room.code]
            await self.store.ignore(room.code)

    def _of(self, member: Member) -> Room:
        room = self._rooms.get(member.code)
        if room is None:
            raise Refused("You are in no room.")
        return room

    def _led(self, member: Member) -> Room:
        room = self._of(member)
        if not member.leads:
            raise Refused(NOT_LEADER)
        return room

    async def _tell(self, code: str, message: Mapping[str, Any]) -> None:
        await self.store.tell(code, json.dumps(message))

    def _soon(self, room: Room, what: str) -> None:
        """Tell a count in a moment: of many changes at once, only the last matters."""
        if what in room.pending:
            return
        room.pending.add(what)
        self._later(self._count(room, what))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _count(self, room: Room, what: str) -> None:
        await asyncio.sleep(SOON)
        room.pending.discard(what)
        poll, options = poll_at(room.place)
        with contextlib.suppress(StoreError):
            if what == "people":
                room.told = await self.store.people(room.code, self._clock())
                await self._tell(room.code, {"type": "people", "count": room.told})
            elif options:
                count = await self.store.votes(room.code, poll)
                await self._tell(room.code, {"type": "votes", "poll": poll, "count": count})

    async def _beat(self) -> None:
        """Say who is here, and look which rooms have ended, until this process has none."""
        while self._rooms:
            await asyncio.sleep(PULSE)
            try:
                await self.pulse()
            except StoreError:
                log.warning("the rooms' store can't be reached")
            except Exception:
                log.exception("the rooms could not be looked after")

    async def pulse(self) -> None:
        """One round of that."""
        for room in tuple(self._rooms.values()):
            if await self.store.find(room.code, self._clock()) is None:
                await self.hear(room.code, json.dumps({"type": "ended", "text": GONE}))
                continue
            seats = sorted({member.seat for member in room.members if not member.leads})
            await self.store.stay(room.code, seats, self._clock())
            if await self.store.people(room.code, self._clock()) != room.told:
                self._soon(room, "people")  # another process is gone, and its people with it


def store_maker(url: str) -> Callable[[Any], RoomStore]:
    """What makes the store: in the Redis at `url`, or without one in this process's memory. Raises ValueError."""
    if not url:
        return MemoryStore
    from app.room_redis import RedisStore

    return functools.partial(RedisStore, url)


def seal_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def code_of(text: Any) -> str:
    """A code as it may have been typed; raises Refused."""
    code = re.sub(r"[\s-]", "", text[:40]).upper() if isinstance(text, str) else ""
    if len(code) != LENGTH or not set(code) <= set(LETTERS):
        raise Refused(f"A room's code has {LENGTH} letters and digits, like {LETTERS[:3]} {LETTERS[-3:]}.")
    return code


def place_of(given: Any) -> dict[str, Any]:
    """Where a leader is, checked: lesson, knobs, beat, scene, step, and whether it plays. Raises Refused."""
    if not isinstance(given, dict):
        raise Refused("This is no place in a lesson.")
    slug, values, speed = given.get("lesson"), given.get("knobs"), given.get("speed", 1)
    lesson = all_lessons().get(slug) if isinstance(slug, str) else None
    if lesson is None:
        raise Refused("There is no such lesson.")
    if not isinstance(values, dict) or len(values) > KNOBS:
        raise Refused("These are no knobs of this lesson.")
    try:
        knobs, problems = check(lesson.knobs, values)
    except (ValueError, TypeError, OverflowError):
        raise Refused("These are no knobs of this lesson.") from None
    if problems:
        raise Refused(problems[0])
    beat, step, scene = given.get("beat"), given.get("step"), given.get("scene", "")
    if not whole(beat, max(0, len(lesson.beats) - 1)) or not whole(step, STEPS):
        raise Refused("This lesson has no such place.")
    return {
        "lesson": lesson.slug,
        "knobs": knobs.values(),
        "beat": beat,
        "step": step,
        "scene": scene if any(scene == known.name for known in lesson.scenes) else "",
        "playing": given.get("playing") is True,
        "speed": speed if type(speed) in (int, float) and speed in SPEEDS else 1,
    }


def poll_at(place: Mapping[str, Any]) -> tuple[str, int]:
    """The name of the poll at a place, and how many answers it has: 0 where the beat asks nothing."""
    lesson = all_lessons().get(place["lesson"])
    beats = lesson.beats if lesson else ()
    predict = beats[place["beat"]].predict if place["beat"] < len(beats) else None
    return f"{place['lesson']}/{place['beat']}", len(predict.options) if predict else 0
