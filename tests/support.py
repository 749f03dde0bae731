"""Servers and visitors for tests: a server on a free port, a visitor by WebSocket, a page in a real Chromium."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

ROOT = Path(__file__).parent.parent
OWN = ("-m", "tests.app.server")  # leanscope with the tests' own lesson
REAL = ("-m", "app.cli")  # leanscope as people start it


@dataclass
class Server:
    """A server in a process of its own."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def cpu(self) -> float:
        """Seconds of processor time it has used."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def said(self) -> str:
        return self.log.read_text()


def environment(cache: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a test's process: its own cache folder, and nothing of ours that would change it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LEANSCOPE_", "BOKEH_", "PANEL_"))}
    return {**kept, "LEANSCOPE_CACHE": str(cache), "PYTHONUNBUFFERED": "1", **(more or {})}


@contextlib.contextmanager
def serving(
    *arguments: str,
    cache: Path,
    program: tuple[str, ...] = OWN,
    env: Mapping[str, str] | None = None,
    port: int = 0,
    seconds: float = 240,  # a busy machine takes long to import torch
) -> Iterator[Server]:
    """A running server, stopped at the end. `arguments` go after `serve --port …`."""
    cache.mkdir(parents=True, exist_ok=True)
    log = cache / f"server-{time.monotonic_ns()}.log"
    command = [sys.executable, *program, "serve", "--port", str(port), *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(cache, env), stdout=out, stderr=out, text=True)
    try:
        deadline = time.monotonic() + seconds
        while not (
            found := re.search(r"(?:is at|running at:) (http://\S+?)(?:/site)?/?(?: |$)", log.read_text(), re.M)
        ):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield Server(found[1], process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass
class Visitor:
    """Someone who talks to a page's session by WebSocket, without a browser. `heard` holds all messages."""

    socket: WebSocketClientConnection
    root: str
    document: dict[str, Any]
    heard: list[dict[str, Any]] = field(default_factory=list)
    closed: bool = False

    @classmethod
    async def arrive(cls, url: str, page: str, *, origin: str | None = None) -> Visitor:
        """Open the session of a page that was fetched from `url`."""
        found = re.search(r'data-item="([^"]*)"', page)
        assert found, page[:500]
        item = json.loads(html.unescape(found[1]))
        parts = urlsplit(url)
        request = HTTPRequest(
            f"ws://{parts.netloc}{parts.path.rstrip('/')}/ws",
            headers={"Origin": origin or f"http://{parts.netloc}"},
        )
        socket = await websocket_connect(request, subprotocols=["bokeh", item["token"]])
        SOCKETS.append(socket)
        socket.protocol.stream.set_nodelay(True)  # as browsers do: a message is three small frames
        visitor = cls(socket, item["root"], {})
        assert (await visitor._message())["header"]["msgtype"] == "ACK"
        visitor._send("PULL-DOC-REQ", {})
        visitor.document = (await visitor._message())["content"]["doc"]
        return visitor

    def say(self, message: Any) -> None:
        """Send one message as the stage would."""
        values = {"type": "map", "entries": [["model", {"id": self.root}], ["data", encoded(message)]]}
        event = {"type": "event", "name": "data_event", "values": values}
        self._send("PATCH-DOC", {"events": [{"kind": "MessageSent", "msg_type": "bokeh_event", "msg_data": event}]})

    async def hear(self, wanted: Callable[[dict[str, Any]], bool], *, seconds: float = 20) -> dict[str, Any]:
        """The first message, of those not heard yet, that is `wanted`."""
        end = time.monotonic() + seconds
        while True:
            message = await asyncio.wait_for(self._message(), max(0.01, end - time.monotonic()))
            if message["header"]["msgtype"] != "PATCH-DOC":
                continue
            news = [event["msg_data"]["values"]["data"] for event in message["content"]["events"]]
            self.heard += news
            for one in news:
                if wanted(one):
                    return one

    async def hear_type(self, kind: str, *, seconds: float = 20) -> dict[str, Any]:
        return await self.hear(lambda message: message["type"] == kind, seconds=seconds)

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.heard if message["type"] == kind]

    def _send(self, kind: str, content: Any) -> None:
        for part in ({"msgid": f"{time.monotonic_ns()}", "msgtype": kind}, {}, content):
            self.socket.write_message(json.dumps(part))

    async def _message(self) -> dict[str, Any]:
        header = json.loads(await self._fragment())
        await self._fragment()
        content = json.loads(await self._fragment())
        buffers = {}
        for _ in range(header.get("num_buffers", 0)):
            name = json.loads(await self._fragment())["id"]
            buffers[name] = await self._fragment()
        return {"header": header, "content": decoded(content, buffers)}

    async def _fragment(self) -> Any:
        fragment = await self.socket.read_message()
        if fragment is None:
            self.closed = True
            raise ConnectionError(f"closed with {self.socket.close_code}: {self.socket.close_reason}")
        return fragment


SOCKETS: list[WebSocketClientConnection] = []


def tried(story: Callable[[], Awaitable[None]]) -> None:
    """Run what visitors do, and see them off."""

    async def whole() -> None:
        try:
            await story()
        finally:
            for socket in SOCKETS:
                socket.close()
            end = time.monotonic() + 2
            while any(socket.protocol is not None for socket in SOCKETS) and time.monotonic() < end:
                await asyncio.sleep(0.01)
            SOCKETS.clear()

    asyncio.run(whole())


def encoded(value: Any) -> Any:
    """Plain data as Bokeh's protocol writes it."""
    if isinstance(value, dict):
        return {"type": "map", "entries": [[encoded(k), encoded(v)] for k, v in value.items()]}
    if isinstance(value, list):
        return [encoded(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"type": "number", "value": {"inf": "+inf"}.get(str(value), str(value))}
    return value


def decoded(value: Any, buffers: Mapping[str, bytes]) -> Any:
    """What Bokeh's protocol wrote as plain data and arrays."""
    if isinstance(value, list):
        return [decoded(item, buffers) for item in value]
    if not isinstance(value, dict):
        return value
    match value.get("type"):
        case "map":
            return {decoded(k, buffers): decoded(v, buffers) for k, v in value.get("entries", [])}
        case "number":
            return float(value["value"])
        case "bytes":
            data = value["data"]
            return buffers[data["id"]] if isinstance(data, dict) else base64.b64decode(data)
        case "ndarray":
            array = decoded(value["array"], buffers)
            return np.frombuffer(array, value["dtype"]).reshape(value["shape"])
    return {k: decoded(v, buffers) for k, v in value.items()}


class Watched:
    """A page in Chromium that remembers everything that a good page never does."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.wrongs: list[str] = []
        self.requests: list[str] = []
        self.host = ""
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.wrongs.append(f"error: {error}"))
        page.on("request", self._request)
        page.on("dialog", self._dialog)

    def open(self, url: str, **options: Any) -> Any:
        self.host = urlsplit(url).netloc
        return self.page.goto(url, **options)

    def forget(self) -> None:
        """Leave out what went wrong so far: a test that stops the server expects complaints."""
        self.wrongs.clear()

    def until(self, expression: str, *, seconds: float = 20) -> Any:
        """Wait until a JavaScript expression is true, and return it. The page's policy forbids wait_for_function."""
        from playwright.sync_api import Error

        end = time.monotonic() + seconds
        while True:
            try:
                value = self.page.evaluate(expression)
            except Error as error:  # a page that loads anew has nothing to evaluate in for a moment
                if "context was destroyed" not in str(error):
                    raise
                value = None
            if value:
                return value
            if time.monotonic() > end:
                raise AssertionError(f"{expression} did not come true in {seconds} s; wrong so far: {self.wrongs}")
            time.sleep(0.05)  # each look costs the page and us some milliseconds

    def _console(self, message: Any) -> None:
        # Bokeh's client says so when a ping meets a server that is just then away; the page tells its visitor itself.
        if message.type in ("error", "warning") and "not connected so cannot send" not in message.text:
            self.wrongs.append(f"console {message.type}: {message.text}")

    def _request(self, request: Any) -> None:
        self.requests.append(request.url)
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob", "about") and parts.netloc != self.host:
            self.wrongs.append(f"another host: {request.url}")

    def _dialog(self, dialog: Any) -> None:
        self.wrongs.append(f"dialog: {dialog.message}")
        dialog.dismiss()


def grave(page: Any) -> list[str]:
    """What axe finds wrong on a page, where it is serious."""
    from axe_playwright_python.sync_playwright import Axe

    found = [v for v in Axe().run(page).response["violations"] if v["impact"] in ("critical", "serious")]
    return [f"{v['id']}: {node['html'][:160]}" for v in found for node in v["nodes"]]
