"""How browsers reach rooms: a WebSocket beside the page's own, and the short address that students type or scan.

Messages are small JSON objects with a `type`; CONTRIBUTING.md lists them. Neither code nor key stands in the
WebSocket's address, so that no log of addresses holds them. Every wrong message is answered with one sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import segno
from bokeh.server.views.auth_request_handler import AuthRequestHandler
from bokeh.server.views.ws import WSHandler
from tornado.web import authenticated
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from app import link
from app.handlers import Headed
from app.room_store import StoreError
from app.rooms import AWAY, Refused, Rooms
from lessons import all_lessons
from lessons.knobs import check

log = logging.getLogger(__name__)

SOCKETS = 1200  # browsers in rooms of this process
LARGEST = 32_768  # bytes of a message: a long prompt fits
CALLS = 30.0  # messages a second that a browser may send
BURST = 60.0
PATIENCE = 600  # messages too many, after which a browser is hung up on
TRIES = 10  # rooms that a connection may ask for in vain
PING = 20.0  # seconds
IDLE = 60.0  # seconds in which a browser that opened the way has to be in a room
BASE = re.compile(r"https?://[A-Za-z0-9.\[\]:_-]+(/[A-Za-z0-9._~/-]*)?")

if TYPE_CHECKING:
    _Socket = WebSocketHandler
else:

    class _Socket(AuthRequestHandler, WebSocketHandler):
        """Behind the same login as the pages, and open to the same origins as the pages' own WebSocket."""


class RoomSocket(_Socket):
    """One browser's way into rooms."""

    check_origin = WSHandler.check_origin
    get = authenticated(WebSocketHandler.get)  # type: ignore[assignment]
    open_now = 0

    def initialize(self, rooms: Callable[[], Rooms]) -> None:
        self.rooms = rooms()
        self.code, self.seat, self.leads = "", "", False
        self._calls, self._called, self._over, self._tries = BURST, time.monotonic(), 0, 0
        self._waiting: OrderedDict[str, str] = OrderedDict()
        self._flushing: asyncio.Task[None] | None = None
        self._counted = False
        self._handlers: dict[str, Callable[[Mapping[str, Any]], Awaitable[None]]] = {
            "open": self._on_open,
            "join": self._on_join,
            "lead": lambda message: self.rooms.lead(self, message.get("place")),
            "vote": self._on_vote,
            "reveal": lambda message: self.rooms.reveal(self, message.get("poll")),
            "end": lambda message: self.rooms.end(self),
        }

    @property
    def max_message_size(self) -> int:
        return LARGEST

    @property
    def ping_interval(self) -> float:
        return PING

    def open(self, *args: str, **kwargs: str) -> None:
        if RoomSocket.open_now >= SOCKETS:
            self._send({"type": "refused", "about": "", "text": "Too many people are in rooms just now."})
            self.close(4503, "too many people")
            return
        RoomSocket.open_now += 1
        self._counted = True
        self.set_nodelay(True)
        asyncio.get_running_loop().call_later(IDLE, self._look)

    def _look(self) -> None:
        """Whoever is in no room by now has no reason to be here."""
        if not self.code:
            self.close(4408, "in no room")

    def on_close(self) -> None:
        if self._counted:
            RoomSocket.open_now -= 1
        if self._flushing is not None:
            self._flushing.cancel()
        self.rooms.left(self)

    async def on_message(self, message: str | bytes) -> None:
        """One at a time: the next is read when this one is done with."""
        if not self._may_speak():
            return
        kind = ""
        try:
            said = _read(message)
            kind = said["type"]
            await self._handlers[kind](said)
        except Refused as refused:
            self._send({"type": "refused", "about": kind, "text": str(refused)})
        except StoreError:
            self._send({"type": "refused", "about": kind, "text": AWAY, "again": True})
        except Exception:
            log.exception("a message to a room could not be handled")
            self._send({"type": "refused", "about": kind, "text": "The server could not do that."})

    def say(self, kind: str, text: str) -> None:
        """Send what a room has to tell. To a browser that is slow to take it, the newest of each kind alone."""
        connection = self.ws_connection
        if connection is None or connection.is_closing() or connection.stream is None:
            return
        if self._waiting or connection.stream.writing():
            self._waiting[kind] = text
            self._waiting.move_to_end(kind)
            if self._flushing is None or self._flushing.done():
                self._flushing = asyncio.ensure_future(self._flush())
        else:
            self._write(text)

    async def _flush(self) -> None:
        with contextlib.suppress(WebSocketClosedError):
            while self._waiting:
                _, text = self._waiting.popitem(last=False)
                await self.write_message(text)

    async def _on_open(self, message: Mapping[str, Any]) -> None:
        self._try()
        key = await self.rooms.open(self, message.get("place"))
        told = {"type": "opened", "code": self.code, "key": key, **self._invitation(message.get("base"))}
        self._send(told)

    async def _on_join(self, message: Mapping[str, Any]) -> None:
        self._try()
        told = await self.rooms.join(self, message.get("code"), message.get("seat"), message.get("key"))
        self._tries -= 1
        self._send({"type": "joined", **told, **self._invitation(message.get("base"))})

    async def _on_vote(self, message: Mapping[str, Any]) -> None:
        poll, option = message.get("poll"), message.get("option")
        await self.rooms.vote(self, poll, option)
        self._send({"type": "voted", "poll": poll, "option": option})

    def _try(self) -> None:
        self._tries += 1
        if self._tries > TRIES:
            raise Refused("Too many attempts: load the page again.")

    def _invitation(self, base: Any) -> dict[str, str]:
        """The room's link and its QR code, where the page said truly where the site begins."""
        origin = self.request.headers.get("Origin", "")
        if not isinstance(base, str) or len(base) > 200 or not BASE.fullmatch(base):
            return {}
        if urlsplit(base)[:2] != urlsplit(origin)[:2]:
            return {}
        url = f"{base.rstrip('/')}/room/{self.code}"
        if not self.leads:
            return {"link": url}
        code = segno.make(url, error="m", micro=False)
        return {"link": url, "qr": code.svg_data_uri(border=3, dark="#1b1f24", light="#ffffff", omitsize=True)}

    def _may_speak(self) -> bool:
        now = time.monotonic()
        self._calls = min(BURST, self._calls + (now - self._called) * CALLS)
        self._called = now
        if self._calls >= 1:
            self._calls -= 1
            return True
        self._over += 1
        if self._over == 1:
            self._send({"type": "refused", "about": "", "text": "That was too much at once: some of it was left out."})
        if self._over > PATIENCE:
            self.close(4429, "too many messages")
        return False

    def _send(self, message: Mapping[str, Any]) -> None:
        self._write(json.dumps(message))

    def _write(self, text: str) -> None:
        with contextlib.suppress(WebSocketClosedError):
            self.write_message(text).add_done_callback(_forget)


class RoomHandler(Headed, AuthRequestHandler):
    """`/room/CODE`: to where its leader is."""

    def initialize(self, rooms: Callable[[], Rooms]) -> None:
        self._rooms = rooms

    @authenticated
    async def get(self, code: str) -> None:
        self.set_header("Cache-Control", "no-store")
        try:
            place = await self._rooms().where(code)
        except Refused as refused:
            self._tell(404, "This room is not open.", str(refused))
            return
        except StoreError:
            self.set_header("Retry-After", "5")
            self._tell(503, "Please try again.", AWAY)
            return
        lesson = all_lessons()[place["lesson"]]
        knobs, _ = check(lesson.knobs, place["knobs"])
        token = link.encode(lesson, link.Place(knobs, place["beat"], place["step"]))
        query = f"?room={re.sub('[^A-Za-z0-9]', '', code).upper()}{f'&s={token}' if token else ''}"
        up = "../../" if self.request.path.endswith("/") else "../"
        self.redirect(f"{up}lesson/{lesson.slug}{query}")

    head = get


def _read(message: str | bytes) -> dict[str, Any]:
    """A message as a dict with a type that is a text; raises Refused."""
    try:
        said = json.loads(message, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refused("This is no message that a room knows.") from None
    if not isinstance(said, dict) or said.get("type") not in ("open", "join", "lead", "vote", "reveal", "end"):
        raise Refused("This is no message that a room knows.")
    return said


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number that JSON knows")


def _forget(written: asyncio.Future[None]) -> None:
    """Whether it arrived is nobody's business: who hung up is told of elsewhere."""
    if not written.cancelled():
        written.exception()
