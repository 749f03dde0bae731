"""The server: one Bokeh application behind all pages, the process around it, and the two ways to start it.

`leanscope serve` and `panel serve app/site.py --plugins app.plugin` use the same application, handlers and routes.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable
from errno import EADDRINUSE
from pathlib import Path
from typing import Any

from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.server import urls
from panel.io.application import Application
from panel.io.server import Server
from tornado.ioloop import IOLoop

from app import assets, explorer, fonts, handlers, page, room_socket
from app.rooms import Rooms, store_maker
from app.runs import Runs, code_version, with_available_model
from app.store import Store
from lessons import all_lessons

log = logging.getLogger(__name__)

IDLE = 90_000  # milliseconds that a page may be gone before its session is dropped
INCOMING = 1_000_000  # bytes of one message from a browser

_runs: Runs | None = None  # the run service of this process, made by `begin`
_beginning = threading.Lock()
_rooms: Rooms | None = None  # the rooms of this process, made by `rooms`
_redis: str | None = None  # where rooms are kept, if the command line says so
_offers_rooms = False  # whether their addresses are routed here: a page that is shown elsewhere has none


def begin(*, folder: Path | None = None, warm: bool | None = None) -> Runs:
    """The run service of this process; the first call makes it, and warms it up in the background."""
    global _runs
    with _beginning:
        if _runs is None:
            _runs = Runs(Store(folder or fonts.cache_folder() / "runs"))
            wanted = os.environ.get("LEANSCOPE_WARM", "1") != "0" if warm is None else warm
            threading.Thread(target=_warm, args=(_runs, wanted), name="leanscope-warm", daemon=True).start()
        return _runs


def is_asked(doc: Document) -> bool:
    """Whether the document is a visit to our own server: its session tells which page was asked for."""
    return "page" in getattr(doc.session_context, "token_payload", {})


def rooms() -> Rooms:
    """The rooms of this process; the first call, on the server's loop, makes them."""
    global _rooms
    if _rooms is None:
        _rooms = Rooms(store_maker(_redis_url()))
    return _rooms


def _redis_url() -> str:
    return os.environ.get("LEANSCOPE_REDIS", "") if _redis is None else _redis


def check_redis() -> str:
    """A sentence when the Redis that rooms shall live in can't be reached; raises ValueError for no such address."""
    url = _redis_url()
    if not url:
        return ""
    from redis import Redis, RedisError

    try:
        with Redis.from_url(url, socket_connect_timeout=2, socket_timeout=2) as redis:
            redis.ping()
    except ValueError:
        raise ValueError("Redis has an address like redis://localhost:6379/0 or unix:///run/redis.sock.") from None
    except (RedisError, OSError) as error:
        return f"Redis can't be reached ({type(error).__name__}): there are no rooms until it is."
    return ""


def fill(doc: Document) -> None:
    """Build the page that a visitor asked for. What was asked is in the session's token, and is checked again."""
    payload: Any = getattr(doc.session_context, "token_payload", {})
    asked = payload.get("page")
    asked = asked if isinstance(asked, dict) else {}
    slug, token = asked.get("slug"), asked.get("token")
    if asked.get("explore") is True and slug in all_lessons():
        explorer.fill(doc, all_lessons()[slug], token if isinstance(token, str) else "", begin())
        return
    address = page.Address(
        slug if isinstance(slug, str) and slug in all_lessons() else "",
        token if isinstance(token, str) else "",
        asked.get("present") is True,
        _offers_rooms,
    )
    page.build(doc, address, begin())


def install() -> None:
    """Put our page and WebSocket handlers in the place of Panel's, for the server that is made next."""
    urls.per_app_patterns[:] = [(r"/ws", handlers.PageSocket), (r"/?", handlers.PageHandler)]
    assets.scripts()


def routes() -> list[Any]:
    """The addresses besides those of the application itself, as Tornado takes them."""
    global _offers_rooms
    _offers_rooms = True
    return [
        (r"/lesson/(?P<slug>[^/]+)/ws", handlers.PageSocket, {}),
        (r"/lesson/(?P<slug>[^/]+)", handlers.PageHandler, {}),
        (r"/lesson/(?P<slug>[^/]+)/", handlers.Slashed, {}),
        (r"/lesson/.*", handlers.NotFound, {}),
        (r"/room/ws", room_socket.RoomSocket, {"rooms": rooms}),
        (r"/room/([^/]{1,40})/?", room_socket.RoomHandler, {"rooms": rooms}),
        (r"/explore/(?P<slug>[^/]+)/ws", handlers.PageSocket, {}),
        (r"/explore/(?P<slug>[^/]+)", handlers.ExploreHandler, {}),
        (r"/ws", handlers.PageSocket, {}),
        (r"/", handlers.PageHandler, {}),
        (r"/assets/([A-Za-z0-9_-]+\.[a-z0-9]+)", handlers.AssetHandler, {}),
        (r"/fonts/([a-z0-9-]+)\.woff2", handlers.FontHandler, {}),
        (r"/healthz", handlers.HealthHandler, {"load": lambda: begin().load()}),
    ]


class PortError(Exception):
    """An address cannot be had; the text is one sentence for whoever started the server."""


def serve(
    *,
    address: str,
    port: int,
    origins: list[str],
    warm: bool = True,
    prefix: str = "",
    redis: str | None = None,
    say: Callable[[str], None],
) -> None:
    """Serve until interrupted, and tell by `say` where. `origins` are further hosts whose pages may open a WebSocket;
    `prefix` is the path that a proxy in front leaves in each address; `redis` is where rooms are kept that span
    processes. Raises PortError.
    """
    global _redis
    _redis = redis
    _check_address(address, port)
    try:
        trouble = check_redis()
    except ValueError as error:
        raise PortError(str(error)) from None
    install()
    runs = begin(warm=warm)
    loop = IOLoop.current()
    try:
        server = Server(
            {"/": Application(FunctionHandler(fill))},
            address=address,
            port=port,
            io_loop=loop,
            extra_patterns=[*routes(), (r".*", handlers.NotFound, {})],
            prefix=prefix,
            use_index=False,
            keep_alive_milliseconds=25_000,
            unused_session_lifetime_milliseconds=IDLE,
            check_unused_sessions_milliseconds=15_000,
            websocket_max_message_size=INCOMING,
            sign_sessions=True,
            secret_key=secrets.token_bytes(32),
            ico_path="none",
        )
    except OSError as error:
        raise PortError(f"The address {address}:{port} can't be used ({error.strerror}).") from error
    got = server.port or port
    # Bokeh is told the origins here, because only now is the port known when any free one was asked for.
    server._tornado._websocket_origins = _origins(address, got) | {name.lower() for name in origins}
    shown = "localhost" if address in ("127.0.0.1", "0.0.0.0", "") else f"[{address}]" if ":" in address else address
    say(f"Leanscope is at http://{shown}:{got}{prefix}/ (Ctrl-C stops it)")
    for problem in filter(None, (runs.store.problem, trouble)):
        say(problem)
    server.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.add_callback_from_signal(loop.stop))
    try:
        loop.start()
    finally:
        server.stop(wait=False)
        runs.close(timeout=3)


def _origins(address: str, port: int) -> set[str]:
    """The hosts whose pages may open a WebSocket: those by which this address is called, exactly."""
    if address in ("127.0.0.1", "localhost", "0.0.0.0", ""):
        return {f"localhost:{port}", f"127.0.0.1:{port}"}
    return {f"[{address}]:{port}" if ":" in address else f"{address.lower()}:{port}"}


def _check_address(address: str, port: int) -> None:
    """Say in a sentence what Tornado would say in a traceback."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        if error.errno == EADDRINUSE:
            text = f"Port {port} is in use. Choose another with --port, or --port 0 for any that is free."
        else:
            text = f"The address {address}:{port} can't be used ({error.strerror or error})."
        raise PortError(text) from error


def _warm(runs: Runs, lessons: bool) -> None:
    """Run each lesson at its defaults, one after the other, so that the first visitor finds them done."""
    code_version()  # reads all sources once, which no visitor should wait for
    for lesson in all_lessons().values() if lessons else ():
        done = threading.Event()
        run = runs.ask(lesson, with_available_model(lesson.knobs())[0], done.set, patient=True)
        while not run.finished:
            done.wait(1.0)
            done.clear()
        runs.leave(run, done.set)
        if run.state == "done":
            page.preview(lesson, run)
        else:
            log.warning("%s could not be warmed up: %s", lesson.slug, run.message)
    # What is loaded by now stays for good: out of the collector's way, it keeps collections short.
    gc.collect()
    gc.freeze()
