"""The two pages: what each is told when it opens, and how messages reach its browser.

A page is one JSComponent drawn by `app/stage`; CONTRIBUTING.md lists what it is told. Building one builds the shell
alone: everything else is the session's (`app/session.py`), later and in threads.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import param
from bokeh.document import Document
from bokeh.document.events import MessageSentEvent
from bokeh.model import Model
from panel.custom import JSComponent
from panel.models.esm import ESMEvent

from app import assets, fonts, link
from app.answers import Message
from app.picture import Feed
from app.runs import Run, Runs, is_available, model_title
from app.session import Session
from lessons import all_lessons
from lessons.lesson import PARTS, Lesson

BATCH = 2_000_000  # bytes of one WebSocket message, about; one message of ours may be larger
PREVIEW = 300_000  # bytes of a small moving picture on the index


@dataclasses.dataclass(frozen=True)
class Address:
    """What was asked for: the lesson's slug ("" is the index), its `?s=` token, and presenting or not."""

    slug: str
    token: str = ""
    present: bool = False
    rooms: bool = False  # whether this server has any

    @property
    def up(self) -> str:
        """The way from this page to the root of the site."""
        return "../" if self.slug else "./"


class Receiver(Protocol):
    def receive(self, data: Any) -> None: ...


class Page(JSComponent):
    """What all pages share: the stage, and nothing synced back from the browser.

    `stage` is the address of the stage's module; or its text, where no server gives out files (in a notebook's cell).
    """

    start = param.Dict(default={}, doc="Where it begins.")
    places = param.Dict(default={}, doc="Where other files are.")

    __abstract = True
    session: Receiver | None = None  # who hears what the browser says; the index has nobody

    def __init__(self, stage: str, **params: Any) -> None:
        super().__init__(sizing_mode="stretch_width", margin=0, **params)
        self._stage = stage

    def _handle_msg(self, data: Any) -> None:
        if self.session is not None:
            self.session.receive(data)

    def _render_esm(self, compiled: Any = True, server: bool = False) -> str:  # type: ignore[override]
        return self._stage

    @property
    def _linked_properties(self) -> tuple[str, ...]:
        return ()

    def _get_properties(self, doc: Document | None) -> dict[str, Any]:
        # Panel's own style sheets would come from another host, and the stage brings its own.
        known = "url" if self._stage.endswith(".js") else hashlib.sha256(self._stage.encode()).hexdigest()
        return {**super()._get_properties(doc), "stylesheets": [], "bundle": known}


class LessonPage(Page):
    """A lesson."""

    lesson = param.Dict(default={}, doc="What the lesson is; never changes.")

    session: Session | None = None

    def _cleanup(self, root: Model | None = None) -> None:
        super()._cleanup(root)
        if self.session is not None and not self._models:
            self.session.close()


class HomePage(Page):
    """The index."""

    course = param.List(default=[], doc="Part by part, every lesson with its question.")


def build(doc: Document, address: Address, runs: Runs) -> None:
    """Put the page for `address` on `doc`. Runs on the server's loop, and does as little as it can."""
    doc.config.notify_connection_status = False  # the page says it itself
    doc.config.reconnect_session = False  # a server that restarted does not know this session: the page loads anew
    places = {"fonts": f"{address.up}fonts/" if fonts.folder() is not None else "", "home": address.up}
    if address.rooms:
        places["rooms"] = f"{address.up}room"
    stage = f"{address.up}assets/{assets.stage()}"
    lesson = all_lessons().get(address.slug) if address.slug else None
    if lesson is None:
        home = HomePage(
            stage, course=course(f"{address.up}lesson/{{}}"), start={"present": address.present}, places=places
        )
        home.server_doc(doc, "Leanscope", location=False)
        return
    place, problems = link.decode(lesson, address.token)
    linked = bool(address.token) and not problems
    places["explore"] = f"{address.up}explore/{lesson.slug}"
    page = lesson_page(lesson, place, runs, stage, places, linked=linked, notices=problems, present=address.present)
    open_on(doc, page, lesson, place, runs, present=address.present)


def lesson_page(
    lesson: Lesson,
    place: link.Place,
    runs: Runs,
    stage: str,
    places: Message,
    *,
    linked: bool = False,
    notices: Sequence[str] = (),
    present: bool = False,
    address: str = "{}",
) -> LessonPage:
    """The page of a lesson, without its session. `address` is where other lessons are, {} standing for the slug."""
    problem = [runs.store.problem] if runs.store.problem else []
    start = {
        "knobs": place.knobs.values(),
        "beat": place.beat,
        "step": place.step if linked else None,  # None: the beat says where
        "notices": [*notices, *problem],
        "present": present,
    }
    told = {**about(lesson), "lessons": menu(address) if address else [], "models": models(lesson)}
    return LessonPage(stage, lesson=told, start=start, places=places)


def open_on(
    doc: Document,
    page: LessonPage,
    lesson: Lesson,
    place: link.Place,
    runs: Runs,
    *,
    present: bool = False,
    here: str = "",
) -> None:
    """Put the page on a server's document, and open its session. `here` is this page's name in links, else its slug."""
    page.server_doc(doc, f"{lesson.title} · Leanscope", location=False)
    session = Session(lesson, place, runs, functools.partial(post, doc, doc.roots[0]), present=present, here=here)
    page.session = session
    _sessions[doc] = session
    doc.on_session_destroyed(lambda context: session.close())


_sessions: weakref.WeakKeyDictionary[Document, Session] = weakref.WeakKeyDictionary()


def abandon(doc: Document) -> None:
    """Its browser is gone, and does not come back to this session: end it now rather than when Bokeh looks."""
    if doc in _sessions:
        _sessions.pop(doc).close()


async def post(doc: Document, root: Model, messages: list[Message]) -> None:
    """Send messages to the browser, in order, in as few WebSocket messages as their size allows.

    Bokeh's own way is one WebSocket message for each, and a running lesson has dozens of tracks to tell of.
    """
    session = getattr(doc.session_context, "session", None)
    if session is None or session.destroyed:
        return
    for batch in batches(messages):
        events = [MessageSentEvent(doc, "bokeh_event", ESMEvent(root, data=message)) for message in batch]
        for connection in tuple(session._subscribed_connections):
            await connection._socket.send_message(connection.protocol.create("PATCH-DOC", events))


def batches(messages: Iterable[Message]) -> Iterable[list[Message]]:
    """The messages in order, as many in one go as BATCH allows."""
    batch: list[Message] = []
    room = BATCH
    for message in messages:
        if batch and size(message) > room:
            yield batch
            batch, room = [], BATCH
        batch.append(message)
        room -= size(message)
    if batch:
        yield batch


def size(message: Message) -> int:
    """About how many bytes a message takes on its way."""
    return 500 + sum(value.nbytes for value in message.values() if isinstance(value, np.ndarray))


def menu(address: str) -> list[Message]:
    """All lessons, for the menu of each."""
    return [
        {
            "slug": other.slug,
            "title": other.title,
            "part": other.part,
            "order": other.order,
            "href": address.format(other.slug),
        }
        for other in all_lessons().values()
    ]


_about: dict[str, tuple[Lesson, Message]] = {}


def about(lesson: Lesson) -> Message:
    """What of a lesson never changes while the server runs."""
    known = _about.get(lesson.slug)
    if known is None or known[0] is not lesson:
        known = _about[lesson.slug] = (lesson, _describe(lesson))
    return known[1]


def _describe(lesson: Lesson) -> Message:
    return {
        "slug": lesson.slug,
        "title": lesson.title,
        "question": lesson.question,
        "part": lesson.part,
        "order": lesson.order,
        "sources": list(lesson.sources),
        "step_word": lesson.step_word,
        "footnote": lesson.footnote,
        "glossary": dict(lesson.glossary),
        "beats": [dataclasses.asdict(beat) for beat in lesson.beats],
        "knobs": [
            {**spec, "look": spec["name"] in lesson.looks, "bounded_by": lesson.bounded_by.get(spec["name"], "")}
            for spec in lesson.knobs.spec()
        ],
    }


def models(lesson: Lesson) -> list[Message]:
    """The models that the lesson's `model` knob offers, and whether they are here."""
    if "model" not in lesson.knobs.names():
        return []
    knob = lesson.knobs.param["model"]
    named = {value: label for label, value in (knob.names or {}).items()}
    found = []
    for value in knob.objects:
        here, why = is_available(value)
        found.append({"value": value, "label": named.get(value, model_title(value)), "available": here, "why": why})
    return found


def course(address: str) -> list[Message]:
    """The whole course, part by part, for the index; a lesson is at `address` with its slug."""
    parts: dict[str, Message] = {part: {"part": part, "lessons": []} for part in PARTS}
    for slug, lesson in all_lessons().items():
        card: Message = {"slug": slug, "title": lesson.title, "question": lesson.question, "href": address.format(slug)}
        if slug in _previews:
            card["preview"] = _previews[slug]
        parts[lesson.part]["lessons"].append(card)
    return list(parts.values())


_previews: dict[str, list[Message]] = {}  # the same for all visitors, and made for none of them: see `preview`


def preview(lesson: Lesson, run: Run) -> None:
    """Keep the first view of a lesson's default run for the index, unless it is too large for a small picture.

    Text says little in a small picture: the first matrix or strip goes before it."""
    scene = lesson.scenes[0] if lesson.scenes else None
    if scene is None or not scene.views or run.recording is None or not run.recording.steps:
        return
    messages: list[Message] = []
    view = next((view for view in scene.views if view.kind in ("heatmaps", "slots")), scene.views[0])
    small = dataclasses.replace(scene, views=(view,))
    Feed(messages.append).show(run.id, run.recording, small, run.knobs)
    if sum(map(size, messages)) <= PREVIEW:
        _previews[lesson.slug] = messages
