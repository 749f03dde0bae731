"""The store of rooms that several processes share: Redis, with a channel by which they tell each other what happened.

What has to hold together (a seat is free and taken, a poll is open and gets a vote) is a script, which Redis runs as
one. All keys expire by themselves, so that nothing is left of a room whose processes were all killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from app.room_store import EMPTY, LIFE, PRESENT, ROOMS, Hear, Kept, StoreError

log = logging.getLogger(__name__)

AGAIN = 0.5  # seconds between two attempts to hear again
REMEMBER = 3600  # seconds for which the code of a room that ended is known
TIMEOUT = 5.0  # seconds for an answer
CONNECTIONS = 12

# KEYS: room, ended, all rooms. ARGV: seal, place, now, the time before which a room is over, ROOMS, its life, code
MAKE = """
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', ARGV[4])
if redis.call('EXISTS', KEYS[1], KEYS[2]) > 0 then return 'taken' end
if redis.call('ZCARD', KEYS[3]) >= tonumber(ARGV[5]) then return 'many' end
redis.call('HSET', KEYS[1], 'seal', ARGV[1], 'place', ARGV[2], 'made', ARGV[3], 'seen', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('ZADD', KEYS[3], ARGV[3], ARGV[7])
return 'made'
"""
# KEYS: room. ARGV: place
PUT = "if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'place', ARGV[1]) end"
# KEYS: room, all rooms, seats. ARGV: now, code, seconds to live, limit (-1: none), the time since which people are
# present, seats
ENTER = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', ARGV[5])
if tonumber(ARGV[4]) >= 0 then
  local others = redis.call('ZCARD', KEYS[3])
  if redis.call('ZSCORE', KEYS[3], ARGV[6]) then others = others - 1 end
  if others >= tonumber(ARGV[4]) then return 0 end
end
for i = 6, #ARGV do redis.call('ZADD', KEYS[3], ARGV[1], ARGV[i]) end
redis.call('HSET', KEYS[1], 'seen', ARGV[1])
redis.call('ZADD', KEYS[2], ARGV[1], ARGV[2])
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[3]) end
for _, key in ipairs(redis.call('SMEMBERS', KEYS[1] .. ':polls')) do redis.call('EXPIRE', key, ARGV[3]) end
redis.call('EXPIRE', KEYS[1] .. ':polls', ARGV[3])
redis.call('EXPIRE', KEYS[1] .. ':revealed', ARGV[3])
return 1
"""
# KEYS: room, votes, revealed, polls. ARGV: poll, seat, option, limit, seconds to live
VOTE = """
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('HEXISTS', KEYS[3], ARGV[1]) == 1 then return 'over' end
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 and redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[4]) then
  return 'many'
end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('SADD', KEYS[4], KEYS[2])
redis.call('EXPIRE', KEYS[2], ARGV[5])
redis.call('EXPIRE', KEYS[4], ARGV[5])
return 'in'
"""
# KEYS: room, votes, revealed. ARGV: poll, options, seconds to live
REVEAL = """
local known = redis.call('HGET', KEYS[3], ARGV[1])
if known then return known end
local counts = {}
for i = 1, tonumber(ARGV[2]) do counts[i] = 0 end
for _, option in ipairs(redis.call('HVALS', KEYS[2])) do counts[option + 1] = counts[option + 1] + 1 end
local text = cjson.encode(counts)
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HSET', KEYS[3], ARGV[1], text)
  redis.call('EXPIRE', KEYS[3], ARGV[3])
end
return text
"""

P = ParamSpec("P")
T = TypeVar("T")


def told(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """What goes wrong on the way to Redis is a StoreError."""

    @functools.wraps(method)
    async def tried(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except (RedisError, OSError, TimeoutError) as error:
            raise StoreError(str(error)) from error

    return tried


class RedisStore:
    """Rooms in the Redis at `url`; see RoomStore for what each method does."""

    def __init__(self, url: str, hear: Hear) -> None:
        self._hear = hear
        # A class that comes all at once waits for one of a few connections; unbounded, each would open its own.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=TIMEOUT,
            decode_responses=True,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            health_check_interval=30,
        )
        self._redis = Redis.from_pool(pool)
        # Channels know no databases, so that theirs is part of the name.
        self._root = f"leanscope:{pool.connection_kwargs.get('db', 0)}:room"
        self._scripts = {
            name: self._redis.register_script(text)
            for name, text in {"make": MAKE, "put": PUT, "enter": ENTER, "vote": VOTE, "reveal": REVEAL}.items()
        }
        self._listening: set[str] = set()
        self._reader: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._missed = False  # whether something may have been told while nobody listened

    @told
    async def make(self, code: str, kept: Kept, now: float) -> str:
        keys = [self._key(code), self._key(code, "ended"), f"{self._root}s"]
        return await self._scripts["make"](keys, [kept.seal, kept.place, now, now - EMPTY, ROOMS, _ttl(), code])

    @told
    async def find(self, code: str, now: float) -> Kept | None:
        room = await self._redis.hgetall(self._key(code))
        if not room:
            return None
        if now >= float(room["seen"]) + EMPTY or now >= float(room["made"]) + LIFE:
            await self.end(code)
            return None
        return Kept(str(room["seal"]), str(room["place"]))

    @told
    async def has_ended(self, code: str) -> bool:
        return bool(await self._redis.exists(self._key(code, "ended")))

    @told
    async def put(self, code: str, place: str) -> None:
        await self._scripts["put"]([self._key(code)], [place])

    @told
    async def enter(self, code: str, seat: str, now: float, limit: int) -> bool:
        return bool(await self._scripts["enter"](self._seats(code), [now, code, _ttl(), limit, now - PRESENT, seat]))

    @told
    async def leave(self, code: str, seat: str) -> None:
        await self._redis.zrem(self._key(code, "seats"), seat)

    @told
    async def stay(self, code: str, seats: list[str], now: float) -> None:
        await self._scripts["enter"](self._seats(code), [now, code, _ttl(), -1, now - PRESENT, *seats])

    @told
    async def people(self, code: str, now: float) -> int:
        return int(await self._redis.zcount(self._key(code, "seats"), f"({now - PRESENT}", "+inf"))

    @told
    async def vote(self, code: str, poll: str, seat: str, option: int, limit: int) -> str:
        keys = [self._key(code), self._votes(code, poll), self._key(code, "revealed"), self._key(code, "polls")]
        return await self._scripts["vote"](keys, [poll, seat, option, limit, _ttl()])

    @told
    async def votes(self, code: str, poll: str) -> int:
        return int(await self._redis.hlen(self._votes(code, poll)))

    @told
    async def reveal(self, code: str, poll: str, options: int) -> list[int]:
        keys = [self._key(code), self._votes(code, poll), self._key(code, "revealed")]
        counts: list[int] = json.loads(await self._scripts["reveal"](keys, [poll, options, _ttl()]))
        return counts

    @told
    async def polls(self, code: str, seat: str) -> tuple[dict[str, int], dict[str, list[int]]]:
        names = sorted(await self._redis.smembers(self._key(code, "polls")))
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hget(name, seat)
            pipe.hgetall(self._key(code, "revealed"))
            *chosen, revealed = await pipe.execute()
        start = len(self._votes(code, ""))
        mine = {
            str(name)[start:]: int(option) for name, option in zip(names, chosen, strict=True) if option is not None
        }
        return mine, {poll: json.loads(counts) for poll, counts in revealed.items()}

    @told
    async def end(self, code: str) -> None:
        if not await self._redis.exists(self._key(code)):
            return
        names = await self._redis.smembers(self._key(code, "polls"))
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(self._key(code, "ended"), 1, ex=REMEMBER)
            pipe.zrem(f"{self._root}s", code)
            pipe.delete(self._key(code), *(self._key(code, part) for part in ("seats", "polls", "revealed")), *names)
            await pipe.execute()

    @told
    async def tell(self, code: str, text: str) -> None:
        await self._redis.publish(self._key(code), text)

    @told
    async def listen(self, code: str) -> None:
        self._listening.add(code)
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        await asyncio.wait_for(self._ready.wait(), TIMEOUT)

    async def ignore(self, code: str) -> None:
        self._listening.discard(code)

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()

    async def _read(self) -> None:
        """Hear of all rooms by one channel pattern; after a break, say again where each leader is."""
        while True:
            try:
                async with self._redis.pubsub() as channel:
                    await channel.psubscribe(f"{self._root}:*")
                    await self._hear_all(channel)
            except (RedisError, OSError, TimeoutError) as error:
                if self._ready.is_set():
                    log.warning("Redis is away: %s", error)
                self._ready.clear()
            await asyncio.sleep(AGAIN)

    async def _hear_all(self, channel: PubSub) -> None:
        start = len(self._root) + 1
        async for message in channel.listen():
            if message["type"] == "psubscribe":
                self._ready.set()
                missed, self._missed = self._missed, True
                for code in tuple(self._listening) if missed else ():
                    place = await self._redis.hget(self._key(code), "place")
                    if place is not None:
                        await self._hear(code, json.dumps({"type": "place", "place": json.loads(place)}))
            elif message["type"] == "pmessage" and (code := message["channel"][start:]) in self._listening:
                try:
                    await self._hear(code, message["data"])
                except StoreError:
                    raise
                except Exception:
                    log.exception("a message of a room could not be passed on")

    def _key(self, code: str, part: str = "") -> str:
        return f"{self._root}:{code}:{part}" if part else f"{self._root}:{code}"

    def _votes(self, code: str, poll: str) -> str:
        return self._key(code, f"votes:{poll}")

    def _seats(self, code: str) -> list[str]:
        return [self._key(code), f"{self._root}s", self._key(code, "seats")]


def _ttl() -> int:
    return int(2 * EMPTY)
