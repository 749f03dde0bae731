"""Rooms in tests: a Redis of their own, someone in a room without a browser, and someone at a room's WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from tests.support import SOCKETS


@contextlib.contextmanager
def redis_running() -> Iterator[str]:
    """The address of an empty Redis, which ends with the test."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server on this machine (Debian's package redis-server)")
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        door = Path(folder) / "door"
        options = ["--port", "0", "--unixsocket", str(door), "--save", "", "--appendonly", "no", "--dir", folder]
        process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 20
            while not door.exists():
                assert process.poll() is None, "redis-server did not start"
                assert time.monotonic() < end, "redis-server takes too long"
                time.sleep(0.02)
            yield f"unix://{door}"
        finally:
            process.terminate()
            process.wait(10)


@dataclass(eq=False)
class Somebody:
    """A connection, as a room sees it."""

    code: str = ""
    seat: str = ""
    leads: bool = False
    got: list[dict[str, Any]] = field(default_factory=list)

    def say(self, kind: str, text: str) -> None:
        self.got.append(json.loads(text))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.got if message["type"] == kind]


@dataclass
class Guest:
    """A browser at a room's WebSocket, without the browser."""

    socket: WebSocketClientConnection
    heard: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    async def arrive(cls, url: str, *, origin: str | None = None) -> Guest:
        parts = urlsplit(url)
        address = f"ws://{parts.netloc}{parts.path.rstrip('/')}/room/ws"
        request = HTTPRequest(address, headers={"Origin": origin or f"http://{parts.netloc}"})
        socket = await websocket_connect(request, max_message_size=1_000_000)
        SOCKETS.append(socket)
        socket.protocol.stream.set_nodelay(True)
        return cls(socket)

    def say(self, kind: str, **fields: Any) -> None:
        self.write(json.dumps({"type": kind, **fields}))

    def write(self, text: str | bytes) -> None:
        self.socket.write_message(text, binary=isinstance(text, bytes))

    async def hear(self, *kinds: str, seconds: float = 20) -> dict[str, Any]:
        """The next message of one of these kinds."""
        end = time.monotonic() + seconds
        while True:
            text = await asyncio.wait_for(self.socket.read_message(), max(0.01, end - time.monotonic()))
            if text is None:
                raise ConnectionError(f"closed with {self.socket.close_code}: {self.socket.close_reason}")
            message: dict[str, Any] = json.loads(text)
            self.heard.append(message)
            if message["type"] in kinds:
                return message

    async def refused(self) -> str:
        text: str = (await self.hear("refused"))["text"]
        return text

    async def join(self, code: str, **fields: Any) -> dict[str, Any]:
        self.say("join", code=code, **fields)
        return await self.hear("joined")
