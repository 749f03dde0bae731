"""What answers at each address of the site, and the headers that every answer carries.

Panel's own page handler is replaced. It parses the query before anyone can guard it, so that some queries end in its
error page; it sends no security headers; and it takes 40 ms of each visit to find out which scripts a page needs.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bokeh.util.token import generate_jwt_token, generate_session_id, get_session_id
from panel.io.server import DocHandler, WSHandler
from tornado.web import RequestHandler, authenticated

from app import assets, fonts, link, page, shell
from lessons import all_lessons

log = logging.getLogger(__name__)

SESSIONS = 500  # pages open at a time
ANCESTORS = re.compile(r"[A-Za-z0-9 '*:/._-]+")
HOST = re.compile(r"[A-Za-z0-9.\[\]:_-]+")


def policy(host: str) -> str:
    """The Content-Security-Policy: this server alone, no inline script, no eval; frames where the host allows them."""
    ancestors = os.environ.get("LEANSCOPE_FRAME_ANCESTORS", "'self'")
    if not ANCESTORS.fullmatch(ancestors):
        ancestors = "'self'"
    sockets = f" ws://{host} wss://{host}" if HOST.fullmatch(host) else ""
    return "; ".join(
        [
            "default-src 'none'",
            "script-src 'self' blob:",  # blob: Panel makes a module of a few lines at run time
            "style-src 'self' 'unsafe-inline'",  # Bokeh writes style elements
            "img-src 'self' data: blob:",
            "font-src 'self'",
            f"connect-src 'self' blob:{sockets}",
            "base-uri 'none'",
            "form-action 'none'",
            f"frame-ancestors {ancestors}",
        ]
    )


class Headed(RequestHandler):
    """Carries the headers that keep a browser from doing what nobody asked for."""

    def set_default_headers(self) -> None:
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "same-origin")
        self.set_header("Cross-Origin-Opener-Policy", "same-origin")
        self.set_header("Content-Security-Policy", policy(self.request.host))
        self.clear_header("Server")

    @property
    def _prefix(self) -> str:
        """The path that a proxy in front leaves in each address."""
        return str(getattr(self.application, "prefix", ""))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self._tell(status_code, "This did not work.", "The server could not make this page.")

    def _tell(self, status: int, title: str, line: str) -> None:
        self.set_status(status)
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.finish(shell.message(title, line, self.request.path.removeprefix(self._prefix)))


class NotFound(Headed):
    """Any address where there is nothing."""

    def prepare(self) -> None:
        self._tell(404, "There is no such page.", "The address may be mistyped.")


class Slashed(Headed):
    """A slash too many at the end: relative addresses would not hold."""

    def get(self, slug: str) -> None:
        if slug in all_lessons():
            self.redirect(f"../{slug}{'?' if self.request.query else ''}{self.request.query}", permanent=True)
        else:
            self._tell(404, "There is no such lesson.", "The address may be mistyped.")

    head = get


if TYPE_CHECKING:
    _Routed = RequestHandler
else:
    _Routed = object


class Routed(_Routed):
    """Finds the application behind all pages, for the routes that Bokeh did not make itself."""

    def __init__(self, tornado_app: Any, request: Any, **kw: Any) -> None:
        if "application_context" not in kw:
            known = tornado_app.applications
            kw["application_context"] = known.get("/site") or known.get("/") or next(iter(known.values()))
            kw["bokeh_websocket_path"] = f"{request.path.rstrip('/')}/ws"
        super().__init__(tornado_app, request, **kw)


class PageHandler(Routed, Headed, DocHandler):
    """The two pages. HEAD tells whether one is there, and makes no session."""

    explores = False

    @authenticated
    def head(self, slug: str = "") -> None:
        self.set_header("Cache-Control", "no-store")
        if slug and slug not in all_lessons():
            self.set_status(404)

    @authenticated
    async def get(self, slug: str = "", **kwargs: Any) -> None:
        if self._prefix and self.request.path == self._prefix:
            self.redirect(f"{self._prefix.rpartition('/')[2]}/{'?' if self.request.query else ''}{self.request.query}")
            return
        lesson = all_lessons().get(slug) if slug else None
        if slug and lesson is None:
            self._tell(404, "There is no such lesson.", "It may not be written yet, or the address is mistyped.")
            return
        if sum(len(tuple(context.sessions)) for context in self.application.applications.values()) >= SESSIONS:
            self.set_header("Retry-After", "30")
            self._tell(503, "Too many people are here just now.", "Please try again in a minute.")
            return
        session = await self._open(slug)
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Type", "text/html; charset=utf-8")
        root = session.document.roots[0].ref["id"]
        self.finish(self._shell(lesson, session, root, "../" if slug else "./"))

    def _shell(self, lesson: Any, session: Any, root: str, up: str) -> str:
        return shell.page(lesson, session.token, root, up)

    async def _open(self, slug: str) -> Any:
        """A session for this visit. Nothing of the request goes into it but slug, token and presenting."""
        server, query = self.application, self.request.query
        session_id = generate_session_id(secret_key=server.secret_key, signed=server.sign_sessions)
        asked = {"slug": slug, "token": link.first(query, "s"), "present": link.first(query, "present") == "1"}
        asked["explore"] = self.explores
        payload: Any = {"headers": {}, "cookies": {}, "arguments": {}, "page": asked}
        token = generate_jwt_token(
            session_id,
            secret_key=server.secret_key,
            signed=server.sign_sessions,
            expiration=server.session_token_expiration,
            extra_payload=payload,
        )
        self.request.app_path = f"/lesson/{slug}" if slug else "/"  # type: ignore[attr-defined]
        return await self.application_context.create_session_if_needed(session_id, self.request, token)


class ExploreHandler(PageHandler):
    """The page that looks at the tensors of a lesson's run: its plots are roots beside the controls."""

    explores = True

    def _shell(self, lesson: Any, session: Any, root: str, up: str) -> str:
        plots = {figure.ref["id"]: figure.name for figure in session.document.roots if figure.ref["id"] != root}
        return shell.explore(lesson, session.token, root, plots, up)


class PageSocket(Routed, WSHandler):
    """The pages' WebSocket. A session that is not here, being of a server before this one, is not made up again."""

    def open(self, *args: Any, **kwargs: Any) -> None:
        try:
            if self._token is not None and get_session_id(self._token) in self.application_context._sessions:
                self.set_nodelay(True)  # a message is several small frames: held back for company, each costs 40 ms
                super().open(*args, **kwargs)
                return
        except Exception as error:  # a token that is no token, or has expired
            log.debug("a WebSocket was refused: %r", error)
        self.close(4404, "no such session")

    def on_close(self) -> None:
        session = self.connection.session if self.connection is not None else None
        super().on_close()
        if session is not None and session.connection_count == 0:
            session.request_expiration()
            page.abandon(session.document)

    async def on_message(self, fragment: str | bytes) -> None:
        if self.receiver is not None:  # before that, nobody has a reason to speak
            await super().on_message(fragment)


class AssetHandler(Headed):
    """Files whose names hold their hash: kept by the browser for good."""

    def get(self, name: str) -> None:
        asset = assets.find(name)
        if asset is None:
            self._tell(404, "There is no such file.", "It belongs to another version of this site.")
            return
        self.set_header("Content-Type", asset.kind)
        self.set_header("Cache-Control", "public, max-age=31536000, immutable")
        self.set_header("Vary", "Accept-Encoding")
        data = asset.data
        if asset.packed is not None and "gzip" in self.request.headers.get("Accept-Encoding", ""):
            self.set_header("Content-Encoding", "gzip")
            data = asset.packed
        self.finish(data)

    head = get


class FontHandler(Headed):
    """Our own font files."""

    def get(self, name: str) -> None:
        folder = fonts.folder()
        if folder is None or name not in {face.name for face in fonts.FACES}:
            self._tell(404, "There is no such font.", "The fonts are built at set-up.")
            return
        self.set_header("Content-Type", "font/woff2")
        self.set_header("Cache-Control", "public, max-age=604800")
        self.finish((folder / f"{name}.woff2").read_bytes())

    head = get


class HealthHandler(Headed):
    """For whoever watches the server."""

    def initialize(self, load: Callable[[], dict[str, int]]) -> None:
        self._load = load

    def get(self) -> None:
        self.set_header("Cache-Control", "no-store")
        self.finish({"status": "ok", "runs": self._load()})
