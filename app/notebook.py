"""Lessons under Jupyter: as a page that Panel's preview opens, and as a component in a notebook's cell.

The preview runs a lesson's own file in a kernel; the lesson then shows itself (`lessons/lesson.py`), and lands here.
No server of ours is there: the stage and the fonts go out by Bokeh's extension folders, which Panel's extension of
Jupyter Server hands on. In a cell there is not even that, so that the stage travels inside the component.
"""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bokeh.document import Document
from bokeh.embed.bundle import extension_dirs
from panel.io.state import state
from panel.viewable import Viewable
from tqdm import tqdm

from app import assets, explore, fonts, link, page, serve
from app.answers import Message
from app.arrays import Arrays, Unfit
from app.runs import key_of, perform, with_available_model
from engine.checkpoints import ModelUnavailable
from engine.recording import Recorder, Recording
from lessons import all_lessons
from lessons import lesson as find_lesson
from lessons.knobs import Knobs, check
from lessons.lesson import SERVED, Lesson


def show(lesson: Lesson, knobs: Mapping[str, Any]) -> Viewable | None:
    """Show a lesson where we are: on the page that is being served, or as what a notebook's cell returns."""
    if str(lesson.run.__module__).startswith(SERVED) and state.curdoc is not None:
        preview(state.curdoc, lesson)
        return None
    return cell(lesson, knobs)


def lessons() -> dict[str, str]:
    """The question of every lesson, by slug."""
    return {slug: lesson.question for slug, lesson in all_lessons().items()}


def open_lesson(slug: str, /, **knobs: Any) -> Viewable:
    """A lesson, live, in this cell."""
    return cell(_lesson(slug), knobs)


def run(slug: str, /, **knobs: Any) -> Arrays:
    """Run a lesson with these knobs, or take the run that is known; what it recorded comes back as named arrays."""
    lesson = _lesson(slug)
    asked, missing = with_available_model(_turned(lesson, knobs))
    if missing:
        warnings.warn(missing, stacklevel=2)
    store = serve.begin(warm=False).store
    recording = store.get(key_of(lesson, asked))
    if recording is None:
        recording = _performed(lesson, asked)
        store.put(key_of(lesson, asked), recording)
    return Arrays(recording, lesson, asked)


def load(path: str | Path, slug: str) -> Arrays:
    """A recording that was saved, by `Arrays.save` or from the Tensors tab of the lesson `slug`."""
    if not Path(path).is_file():
        raise Unfit(f"There is no file {path}.")
    try:
        return Arrays(Recording.load(path), _lesson(slug))
    except ValueError as error:
        raise Unfit(str(error)) from None


def _performed(lesson: Lesson, knobs: Knobs) -> Recording:
    with tqdm(desc=lesson.slug, unit=f" {lesson.step_word}s", delay=1, mininterval=0.5, leave=False) as bar:

        def on_step(recorder: Recorder) -> None:
            total = recorder.meta.get("total_steps")
            bar.total = total if isinstance(total, int) else None
            bar.update(recorder.step - bar.n)

        try:
            return perform(lesson, knobs, on_step)
        except (ValueError, ModelUnavailable) as error:
            raise Unfit(f"{lesson.slug}: {error}") from error


def _lesson(slug: str) -> Lesson:
    try:
        return find_lesson(slug)
    except KeyError as error:
        raise Unfit(f"T{str(error.args[0])[1:]}.") from None


def _turned(lesson: Lesson, knobs: Mapping[str, Any]) -> Knobs:
    """The lesson's knobs as asked for; raises Unfit."""
    checked, problems = check(lesson.knobs, knobs)
    if problems:
        raise Unfit(problems[0])
    return checked


def cell(lesson: Lesson, knobs: Mapping[str, Any]) -> Viewable:
    """A lesson as a component, for a cell's output."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise Unfit("A lesson is shown in a notebook; elsewhere `leanscope serve` shows it in a browser.") from None
    place = link.Place(_turned(lesson, knobs))
    runs = serve.begin(warm=False)
    explore.begin()
    stage = assets.stage_file().read_text("utf-8")
    shown = page.lesson_page(lesson, place, runs, stage, {"embedded": True, "fonts": "", "home": None}, address="")

    async def tell(messages: list[Message]) -> None:
        for message in messages:
            shown._send_msg(message)

    shown.session = page.Session(lesson, place, runs, tell, here=None)
    return shown


def preview(doc: Document, made: Lesson) -> None:
    """The page of a lesson whose file is being served, on the document of whoever opened it."""
    lesson = all_lessons().get(made.slug, made)
    file = Path(getattr(made.run, "__globals__", {}).get("__file__", ""))
    # Panel puts the file's folder in front of all others; no lesson shall stand in for a module of its name.
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != os.path.realpath(file.parent)]
    token, present = _asked(doc, "s"), _asked(doc, "present") == "1"
    place, problems = link.decode(lesson, token)
    runs = serve.begin(warm=False)
    shown = page.lesson_page(
        lesson,
        place,
        runs,
        _stage(),
        _places("../app/site.py"),
        linked=bool(token) and not problems,
        notices=problems,
        present=present,
        address="{}.py",
    )
    page.open_on(doc, shown, lesson, place, runs, present=present, here=file.name)


def index(doc: Document) -> None:
    """The index, where no server of ours is; its lessons are their files."""
    home = page.HomePage(_stage(), course=page.course("../lessons/{}.py"), start={}, places=_places("./site.py"))
    home.server_doc(doc, "Leanscope", location=False)


def _stage() -> str:
    file = assets.stage_file()
    return f"{_published('leanscope', file.parent)}{file.name}"


def _places(home: str) -> Message:
    return {"fonts": _published("leanscope-fonts", fonts.folder()), "home": home}


def _asked(doc: Document, name: str) -> str:
    """The value of `name` in the address that was opened; "" without one."""
    context: Any = doc.session_context
    values = getattr(context.request, "arguments", None) or {}
    found = values.get(name) or [b""]
    return bytes(found[0]).decode(errors="replace")


def _published(name: str, folder: Path | None) -> str:
    """The address, ending in a slash, at which the files of `folder` are had; "" where there is none."""
    if folder is None:
        return ""
    extension_dirs[name] = folder
    return f"{state.base_url}static/extensions/{name}/"
