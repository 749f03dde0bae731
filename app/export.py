"""`leanscope export`: the course as files that play from any web host or from disk, without Python.

    index.html              the course
    lesson/SLUG.html        a lesson: a page that loads the stage and its first piece
    stage-HASH.js           the stage as one plain script: files opened from disk may not load modules
    fonts/, leanscope.svg
    data/SLUG/HASH.js       pieces (`app/pieces.py`) of the recordings of its snapshots (`app/snapshots.py`)
    manifest.json           version, and the hash and size of every other file

A folder is written beside its place and takes it at the end, so that what fails leaves nothing half.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from app import answers, fonts, page, shell, stage
from app.assets import ICONS
from app.pieces import piece
from app.runs import Run, Runs, with_available_model
from app.snapshots import snapshots
from app.still import FULL, LESS, still
from lessons.lesson import Lesson

FORMAT = 1
FIRST = 2_000_000  # bytes that a page may need for its first picture
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self' file:",  # file: some browsers know no 'self' there
        "style-src 'unsafe-inline'",  # an SVG to take away has styles of its own
        "img-src 'self' file: data: blob:",
        "font-src 'self' file:",
        "connect-src 'self'",  # fonts for that SVG; a page needs no connection
        "base-uri 'none'",
        "form-action 'none'",
    ]
)

Say = Callable[[str], None]


class ExportError(Exception):
    """One sentence for whoever exports."""


def version() -> str:
    """The project's."""
    return metadata.version("leanscope")


@dataclass
class Folder:
    """The files of an export, as they are written."""

    place: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, name: str, data: str | bytes) -> None:
        raw = data.encode() if isinstance(data, str) else data
        target = self.place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(raw)
        self.files[name] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}


@dataclass(frozen=True)
class Options:
    """What is exported besides the lessons' names."""

    model: str = ""  # in place of the default one
    defaults: bool = False  # no snapshot but the first of each lesson
    engine: str = ""  # the address of a server that runs what is not recorded


def export(target: Path, lessons: Sequence[Lesson], runs: Runs, options: Options, say: Say) -> dict[str, Any]:
    """Write `lessons` to the folder `target`, which must be empty or not there yet; returns the manifest.

    Raises ExportError; then nothing is left behind.
    """
    _check_empty(target)
    with _beside(target) as part:
        folder = Folder(part)
        script = stage.script()
        name = f"stage-{hashlib.sha256(script.encode()).hexdigest()[:12]}.js"
        folder.write(name, script)
        _write_fonts(folder)
        for lesson in lessons:
            _Lesson(folder, lesson, lessons, runs, options, say).write(name)
        course = {"page": {"course": _course(lessons)}}
        _write_page(folder, "index.html", name, "Leanscope", shell.MOTTO, course, "index")
        manifest = {"leanscope": version(), "format": FORMAT, "files": dict(sorted(folder.files.items()))}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def check(target: Path) -> tuple[list[str], str]:
    """What is wrong with an exported folder, a sentence each; and one about the version, "" where it is this one."""
    try:
        manifest = json.loads((target / "manifest.json").read_text("utf-8"))
        files = {str(name): (str(about["sha256"]), int(about["bytes"])) for name, about in manifest["files"].items()}
        written, form = str(manifest["leanscope"]), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{target} is no export of Leanscope, or its manifest.json is damaged."], ""
    if form != FORMAT:
        return [f"{target} was exported by Leanscope {written[:40]}, whose files this version can't check."], ""
    wrong = []
    for name, (sha256, size) in files.items():
        path = target / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            wrong.append(f"manifest.json names {name[:80]}, which is outside of the folder.")
        elif not path.is_file():
            wrong.append(f"{name} is missing.")
        elif path.stat().st_size != size or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            wrong.append(f"{name} is not as it was exported.")
    present = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    wrong += [f"{name} does not belong to the export." for name in sorted(present - files.keys() - {"manifest.json"})]
    same = written == version()
    return wrong, "" if same else f"It was exported by Leanscope {written[:40]}; this is {version()}."


class _Lesson:
    """One lesson on its way into the folder."""

    def __init__(
        self, folder: Folder, lesson: Lesson, all_lessons: Sequence[Lesson], runs: Runs, options: Options, say: Say
    ) -> None:
        self.folder = folder
        self.lesson = lesson
        self.menu = {other.slug for other in all_lessons}
        self.runs = runs
        self.options = options
        self.say = say
        self.pieces: dict[str, Any] = {}

    def write(self, script: str) -> None:
        """Run it, write its page and pieces."""
        told: list[dict[str, Any]] = []
        known: list[dict[str, Any]] = []
        missing = ""
        first: Run | None = None
        for snapshot in snapshots(self.lesson, model=self.options.model, defaults=self.options.defaults):
            knobs, sentence = with_available_model(snapshot.knobs)
            if self.lesson.run_values(knobs) in known:  # a model that is not here gave way to one that is recorded
                continue
            known.append(self.lesson.run_values(knobs))
            missing = missing or sentence
            run = self._run(snapshot.name, knobs)
            if run.recording is None or not run.recording.steps:
                if first is None:
                    raise ExportError(f"{self.lesson.slug} could not be recorded: {run.message}")
                self.say(f"{self.lesson.slug}: {snapshot.name} is left out: {run.message}\n")
                continue
            run.id = f"{self.lesson.slug}-{len(told)}"
            made = still(self.lesson, snapshot.name, run, f"s{len(told)}-", LESS if told else FULL)
            told.append(made.told)
            self.pieces |= made.pieces
            first = first or run
        assert first is not None
        page.preview(self.lesson, first)
        self._write(script, told, missing)

    def _run(self, name: str, knobs: Any) -> Run:
        """The run at these knobs, old or new."""
        news = threading.Event()
        run = self.runs.ask(self.lesson, knobs, news.set)
        while not run.finished or (run.recording is not None and run.findings is None):
            news.wait(0.5)
            news.clear()
            of = f" of {run.total}" if run.total else ""
            self.say(f"{self.lesson.slug}: {name}, {self.lesson.step_word} {run.steps}{of}")
        self.runs.leave(run, news.set)
        return run

    def _write(self, script: str, told: list[dict[str, Any]], missing: str) -> None:
        lesson, options = self.lesson, self.options
        offered = {str(one["values"].get("model")) for one in told}
        models = [
            {**model, "available": here, "why": "" if here else "It is not recorded on this page."}
            for model in page.models(lesson)
            for here in [str(model["value"]) in offered]
        ]
        menu = [one for one in page.menu("{}.html") if one["slug"] in self.menu]
        about = {**page.about(lesson), "lessons": menu, "models": models}
        start = {"knobs": told[0]["values"], "beat": 0, "step": None, "notices": [missing] if missing else []}
        engine = {"version": version(), "address": options.engine}
        self.pieces["code"] = answers.code(lesson.code)
        self.pieces["page"] = {"lesson": about, "start": start, "snapshots": told, "engine": engine}
        title = f"{lesson.title} · Leanscope"
        _write_page(self.folder, f"lesson/{lesson.slug}.html", script, title, lesson.question, self.pieces, lesson.slug)
        size = sum(about["bytes"] for name, about in self.folder.files.items() if f"data/{lesson.slug}/" in name)
        self.say(f"{lesson.slug}: {len(told)} recordings, {size / 1e6:.1f} MB\n")


def _write_page(
    folder: Folder, name: str, script: str, title: str, description: str, pieces: dict[str, Any], slug: str
) -> None:
    """A page, and the pieces that it may load."""
    up = "../" * name.count("/") or "./"
    files: dict[str, list[Any]] = {}
    for key, value in pieces.items():
        made = piece(version(), value)
        path = f"data/{slug}/{made.sha256[:16]}.js"
        folder.write(path, made.script)  # equal pieces of two recordings are one file
        files[key] = [path, made.sha256]
    about = {"version": version(), "up": up, "fonts": _has_fonts(folder), "files": files}
    head = shell.head(title, description, icon=f"{up}leanscope.svg", policy=POLICY)
    told = json.dumps(about, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    folder.write(
        name,
        f'{head}<meta name="generator" content="Leanscope {html.escape(version())}">\n'
        f'<link rel="preload" as="script" href="{up}{files["page"][0]}">\n'
        f'<script defer src="{up}{script}"></script>\n</head>\n'
        f'<body>\n<div id="leanscope"></div>\n<script type="application/json" id="leanscope-files">{told}</script>\n'
        f'<noscript><main class="plain"><h1>{html.escape(description)}</h1>'
        "<p>Leanscope draws its pictures in the browser, and needs JavaScript for that.</p></main></noscript>\n"
        "</body>\n</html>\n",
    )


def _write_fonts(folder: Folder) -> None:
    built = fonts.folder()
    for path in sorted(built.iterdir()) if built is not None else ():
        if path.is_file():
            folder.write(f"fonts/{path.name}", path.read_bytes())
    folder.write("leanscope.svg", (ICONS / "leanscope.svg").read_bytes())


def _has_fonts(folder: Folder) -> bool:
    return any(name.startswith("fonts/") for name in folder.files)


def _course(lessons: Sequence[Lesson]) -> list[dict[str, Any]]:
    """The course, with the exported lessons open."""
    here = {lesson.slug for lesson in lessons}
    parts = page.course("lesson/{}.html")
    for part in parts:
        for card in part["lessons"]:
            if card["slug"] not in here:
                card.pop("preview", None)
                card |= {"href": None, "soon": "not in this copy"}
    return parts


def _check_empty(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target} is no folder; an export takes a new or empty one. Nothing was written.")
    if target.is_dir() and any(target.iterdir()):
        raise ExportError(f"{target} is not empty; an export takes a new or empty folder. Nothing was written.")


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder next to `target` that takes its place at the end, or goes."""
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ExportError(f"{target} can't be written ({error.strerror or error}). Nothing was written.") from error
    try:
        yield part
        part.chmod(0o755)
        os.replace(part, target)  # an empty folder gives way
    except OSError as error:
        raise ExportError(f"{target} could not be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
