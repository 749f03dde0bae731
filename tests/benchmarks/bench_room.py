"""A room of 200, with real WebSocket clients: how long students wait for their leader's step, for joining, for a run.

    python -m tests.benchmarks.bench_room [--students 200] [--steps 100] [--pages 200]

Rooms in memory and, where redis-server is installed, in Redis. Server and all clients share this machine, and the
clients' own work is in the figures. `--pages` then opens so many whole pages of a toy lesson, which all ask for one
run when the leader turns a knob: what their pictures cost, not what the room costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from lessons import all_lessons
from tests.rooms import redis_running
from tests.support import REAL, Server, Visitor, serving

SLUG = "decode"
EVERY = 0.1  # seconds between two steps of the leader
ROUNDS = 3  # knobs turned with whole pages open


class Client:
    """One browser's part, with the time at which each message came."""

    def __init__(self) -> None:
        self.got: list[tuple[float, dict[str, Any]]] = []
        self.socket: WebSocketClientConnection | None = None

    async def arrive(self, url: str) -> None:
        parts = urlsplit(url)
        request = HTTPRequest(f"ws://{parts.netloc}/room/ws", headers={"Origin": url})
        self.socket = await websocket_connect(request, on_message_callback=self._heard)

    def _heard(self, text: str | bytes | None) -> None:
        if text is not None:
            self.got.append((time.perf_counter(), json.loads(text)))

    def say(self, kind: str, **fields: Any) -> None:
        assert self.socket is not None
        self.socket.write_message(json.dumps({"type": kind, **fields}))

    def of(self, kind: str) -> list[tuple[float, dict[str, Any]]]:
        return [(at, message) for at, message in self.got if message["type"] == kind]


async def until(test: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.perf_counter() + seconds
    while not test():
        if time.perf_counter() > end:
            raise TimeoutError
        await asyncio.sleep(0.005)


def resident(server: Server) -> float:
    """Megabytes that the server holds."""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def shown(name: str, times: list[float], note: str = "") -> None:
    """Median and 95% of times in seconds, as milliseconds."""
    ordered = sorted(1e3 * t for t in times)
    late = ordered[int(0.95 * (len(ordered) - 1))]
    print(f"  {name:<34}{statistics.median(ordered):8.1f} ms   95%: {late:8.1f}  {note}")


def place(step: int, **knobs: Any) -> dict[str, Any]:
    beats = all_lessons()[SLUG].beats
    asking = next(n for n, beat in enumerate(beats) if beat.predict)
    return {"lesson": SLUG, "knobs": {"model": "toy", **knobs}, "beat": asking, "step": step}


async def room(server: Server, *, students: int, steps: int) -> None:
    """The room alone: join, follow, vote."""
    leader = Client()
    await leader.arrive(server.url)
    leader.say("open", place=place(0))
    await until(lambda: bool(leader.of("opened")))
    code = leader.of("opened")[0][1]["code"]
    people = [Client() for _ in range(students)]
    before, idle = resident(server), server.cpu()

    began = time.perf_counter()
    await asyncio.gather(*(person.arrive(server.url) for person in people))
    for number, person in enumerate(people):
        person.say("join", code=code, seat=f"seat-{number:016d}")
    await until(lambda: all(person.of("joined") for person in people))
    shown("joined, all at once, after", [person.of("joined")[0][0] - began for person in people])
    print(f"  {'memory for one student':<34}{1e3 * (resident(server) - before) / students:8.0f} kB")
    print(f"  {'processor time for one to join':<34}{1e3 * (server.cpu() - idle) / students:8.1f} ms")

    await asyncio.sleep(1)
    idle, sent = server.cpu(), {}
    for step in range(1, steps + 1):
        sent[step] = time.perf_counter()
        leader.say("lead", place=place(step))
        await asyncio.sleep(EVERY)
    await until(
        lambda: all(person.of("place") and person.of("place")[-1][1]["place"]["step"] == steps for person in people)
    )
    took = [at - sent[message["place"]["step"]] for person in people for at, message in person.of("place")]
    missed = students * steps - len(took)
    shown("a step reached a student after", took, f"({len(took):,} messages, {missed} overtaken by newer ones)")
    print(f"  {'processor time for a step':<34}{1e3 * (server.cpu() - idle) / steps:8.1f} ms")

    poll = f"{SLUG}/{place(0)['beat']}"
    began = time.perf_counter()
    for number, person in enumerate(people):
        person.say("vote", poll=poll, option=number % 3)
    await until(lambda: all(person.of("voted") for person in people))
    print(f"  {'votes a second':<34}{students / (time.perf_counter() - began):8.0f}")
    leader.say("reveal", poll=poll)
    await until(lambda: all(person.of("revealed") for person in people))
    assert sum(leader.of("revealed")[0][1]["counts"]) == students, "a vote was lost"
    for client in (leader, *people):
        assert client.socket is not None
        client.socket.close()


class Watcher(Visitor):
    """A whole page, of which only the size of what arrives is read: parsing all of them would be the bottleneck."""

    async def picture(self) -> tuple[float, int]:
        """When the next run's picture was whole, and its bytes."""
        size = 0
        while True:
            part = await self._fragment()
            size += len(part)
            if isinstance(part, str) and '"state"' in part and '"done"' in part:
                return time.perf_counter(), size


async def pages(server: Server, *, count: int) -> None:
    """Whole pages that follow a knob: every one asks its own session for the same run."""
    before, idle = resident(server), server.cpu()
    began = time.perf_counter()

    async def one() -> Watcher:
        url = f"{server.url}/lesson/{SLUG}"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=120).read().decode())
        watcher = await Watcher.arrive(url, text)
        watcher.say({"type": "ready"})
        await watcher.picture()
        return watcher

    gate = asyncio.Semaphore(20)

    async def gated() -> Watcher:
        async with gate:
            return await one()

    watchers = await asyncio.gather(*(gated() for _ in range(count)))
    print(f"  {f'{count} pages open after':<34}{time.perf_counter() - began:8.1f} s")
    print(f"  {'memory for one':<34}{(resident(server) - before) / count:8.2f} MB")
    print(f"  {'processor time for one':<34}{1e3 * (server.cpu() - idle) / count:8.1f} ms")
    for number in range(ROUNDS):
        idle = server.cpu()
        began = time.perf_counter()
        knobs = all_lessons()[SLUG].knobs(model="toy", tokens=20 + number)
        for watcher in watchers:
            watcher.say({"type": "knobs", "values": knobs.values()})  # all of them, as the page does
        seen = await asyncio.gather(*(watcher.picture() for watcher in watchers))
        size = statistics.median(n for _, n in seen)
        shown(f"knob {number + 1}: its picture after", [at - began for at, _ in seen], f"({size / 1e3:.0f} kB each)")
        print(f"  {'processor time for one':<34}{1e3 * (server.cpu() - idle) / count:8.1f} ms")
    for watcher in watchers:
        watcher.socket.close()


@contextlib.contextmanager
def server_with(*options: str) -> Iterator[Server]:
    with (
        tempfile.TemporaryDirectory() as name,
        serving("--no-warm", *options, cache=Path(name), program=REAL) as server,
    ):
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pages", type=int, default=0)
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before")
    with server_with() as server:
        print(f"{options.students} students, rooms in memory")
        asyncio.run(room(server, students=options.students, steps=options.steps))
        if options.pages:
            print(f"{options.pages} whole pages")
            asyncio.run(pages(server, count=options.pages))
    if shutil.which("redis-server"):
        with redis_running() as address, server_with("--redis", address) as server:
            print(f"{options.students} students, rooms in Redis")
            asyncio.run(room(server, students=options.students, steps=options.steps))


if __name__ == "__main__":
    main()
