"""Where rooms are kept: what a store can do, and the one that lives in this process's memory.

A store knows nothing of lessons, browsers or rights. It keeps texts and counts, and tells every process that listens
what happened. `now` is given with each call, so that all agree on it; someone is present who was seen PRESENT
seconds ago, and a room that saw nobody for EMPTY seconds has ended.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

PRESENT = 35.0  # seconds: a process says every ten who is with it
EMPTY = 600.0
LIFE = 12 * 3600.0  # seconds after which any room has ended
REMEMBERED = 1000  # codes of rooms that have ended
ROOMS = 200  # rooms at a time

Hear = Callable[[str, str], Awaitable[None]]


class StoreError(Exception):
    """The store can't be reached."""


@dataclass(frozen=True)
class Kept:
    """What is kept of a room: the hash of its leader's key, and where the leader is (JSON)."""

    seal: str
    place: str


class RoomStore(Protocol):
    """What both stores can do. Each method may raise StoreError."""

    async def make(self, code: str, kept: Kept, now: float) -> str:
        """Begin a room: "made", "taken" when the code is in use, "many" when there are ROOMS already."""

    async def find(self, code: str, now: float) -> Kept | None:
        """The room, unless there is none or it has ended."""

    async def has_ended(self, code: str) -> bool:
        """Whether there was such a room not long ago."""

    async def put(self, code: str, place: str) -> None:
        """The leader is elsewhere."""

    async def enter(self, code: str, seat: str, now: float, limit: int) -> bool:
        """Take a seat; False when `limit` others are present. Who is present already stays so."""

    async def leave(self, code: str, seat: str) -> None:
        """Give a seat up."""

    async def stay(self, code: str, seats: list[str], now: float) -> None:
        """The room is in use, and these seats too."""

    async def people(self, code: str, now: float) -> int:
        """How many seats are taken."""

    async def vote(self, code: str, poll: str, seat: str, option: int, limit: int) -> str:
        """Put a seat's vote in the place of its last: "in", "over" once revealed, "many" beyond `limit` seats."""

    async def votes(self, code: str, poll: str) -> int:
        """How many have voted."""

    async def reveal(self, code: str, poll: str, options: int) -> list[int]:
        """Close a poll: how many chose each option, the same whenever it is asked again."""

    async def polls(self, code: str, seat: str) -> tuple[dict[str, int], dict[str, list[int]]]:
        """What a seat voted for in each poll, and the counts of those that were revealed."""

    async def end(self, code: str) -> None:
        """The room is gone, with all in it."""

    async def tell(self, code: str, text: str) -> None:
        """Let every process that listens to the room hear this, this one too."""

    async def listen(self, code: str) -> None:
        """Hear of a room from now on."""

    async def ignore(self, code: str) -> None:
        """Hear of it no more."""

    async def close(self) -> None:
        """Let go of what the store holds."""


@dataclass
class _Room:
    kept: Kept
    made: float
    seen: float
    seats: dict[str, float] = field(default_factory=dict)
    votes: dict[str, dict[str, int]] = field(default_factory=dict)
    revealed: dict[str, list[int]] = field(default_factory=dict)


class MemoryStore:
    """Rooms of one process; they end with it."""

    def __init__(self, hear: Hear) -> None:
        self._hear = hear
        self._rooms: dict[str, _Room] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._listening: set[str] = set()

    async def make(self, code: str, kept: Kept, now: float) -> str:
        for other in [other for other in self._rooms if not self._lives(other, now)]:
            self._forget(other)
        if code in self._rooms or code in self._ended:
            return "taken"
        if len(self._rooms) >= ROOMS:
            return "many"
        self._rooms[code] = _Room(kept, now, now)
        return "made"

    async def find(self, code: str, now: float) -> Kept | None:
        if code in self._rooms and not self._lives(code, now):
            self._forget(code)
        room = self._rooms.get(code)
        return room.kept if room else None

    async def has_ended(self, code: str) -> bool:
        return code in self._ended

    async def put(self, code: str, place: str) -> None:
        if room := self._rooms.get(code):
            room.kept = Kept(room.kept.seal, place)

    async def enter(self, code: str, seat: str, now: float, limit: int) -> bool:
        room = self._rooms.get(code)
        if room is None:
            return False
        others = sum(seen > now - PRESENT for other, seen in room.seats.items() if other != seat)
        if others >= limit:
            return False
        room.seats[seat] = room.seen = now
        return True

    async def leave(self, code: str, seat: str) -> None:
        if room := self._rooms.get(code):
            room.seats.pop(seat, None)

    async def stay(self, code: str, seats: list[str], now: float) -> None:
        if room := self._rooms.get(code):
            room.seen = now
            room.seats.update(dict.fromkeys(seats, now))

    async def people(self, code: str, now: float) -> int:
        room = self._rooms.get(code)
        if room is None:
            return 0
        room.seats = {seat: seen for seat, seen in room.seats.items() if seen > now - PRESENT}
        return len(room.seats)

    async def vote(self, code: str, poll: str, seat: str, option: int, limit: int) -> str:
        room = self._rooms.get(code)
        if room is None or poll in room.revealed:
            return "over"
        votes = room.votes.setdefault(poll, {})
        if seat not in votes and len(votes) >= limit:
            return "many"
        votes[seat] = option
        return "in"

    async def votes(self, code: str, poll: str) -> int:
        room = self._rooms.get(code)
        return len(room.votes.get(poll, ())) if room else 0

    async def reveal(self, code: str, poll: str, options: int) -> list[int]:
        room = self._rooms.get(code)
        if room is None:
            return [0] * options
        if poll not in room.revealed:
            chosen = list(room.votes.get(poll, {}).values())
            room.revealed[poll] = [chosen.count(option) for option in range(options)]
        return room.revealed[poll]

    async def polls(self, code: str, seat: str) -> tuple[dict[str, int], dict[str, list[int]]]:
        room = self._rooms.get(code)
        if room is None:
            return {}, {}
        return {poll: votes[seat] for poll, votes in room.votes.items() if seat in votes}, dict(room.revealed)

    async def end(self, code: str) -> None:
        if code in self._rooms:
            self._forget(code)

    async def tell(self, code: str, text: str) -> None:
        if code in self._listening:
            await self._hear(code, text)

    async def listen(self, code: str) -> None:
        self._listening.add(code)

    async def ignore(self, code: str) -> None:
        self._listening.discard(code)

    async def close(self) -> None:
        self._rooms.clear()

    def _lives(self, code: str, now: float) -> bool:
        room = self._rooms[code]
        return now < room.seen + EMPTY and now < room.made + LIFE

    def _forget(self, code: str) -> None:
        del self._rooms[code]
        self._ended[code] = None
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
