"""`leanscope`: serve the pages, run a lesson without a screen, check its claims, fetch and train models, measure.

Wrong use gets one line and exit code 2; what fails for another reason gets one line and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from engine.recording import Recorder
    from lessons.knobs import Knobs
    from lessons.lesson import Lesson

PORT = 5006
DRAFT = "draft"
WORK = Path(__file__).parent.parent / "train"  # where a training keeps its checkpoints until it is done


class Wrong(Exception):  # noqa: N818
    """Wrong use: one line for whoever typed it, exit code 2."""


class Failed(Exception):  # noqa: N818
    """It did not work: one line, exit code 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        options = _parser().parse_args(arguments)
        code = options.do(options)
        sys.stdout.flush()
        return int(code or 0)
    except Wrong as error:
        return _fail(error, 2)
    except Failed as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # `leanscope claims | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(error: Exception, code: int) -> int:
    print(f"leanscope: {error}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Wrong(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="leanscope", description="See how language models are made cheap to run.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, do: Callable[[argparse.Namespace], int | None], about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        made.set_defaults(do=do)
        return made

    serving = command("serve", _serve, "Serve the pages.")
    serving.add_argument(
        "--port", type=_port, default=_port(os.environ.get("PORT", str(PORT))), help="0 takes a free one"
    )
    serving.add_argument("--address", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    serving.add_argument(
        "--allow-origin", action="append", default=[], metavar="HOST[:PORT]", help="a name under which others reach it"
    )
    serving.add_argument(
        "--prefix", type=_prefix, default="", metavar="/PATH", help="the path under which a proxy in front shows it"
    )
    serving.add_argument("--no-warm", action="store_true", help="run no lesson before someone asks")
    serving.add_argument("--redis", metavar="URL", help="where rooms are kept that span processes")
    serving.add_argument("--no-models", action="store_true", help="run all lessons on the toys")

    listing = command("lessons", _lessons, "List the lessons.")
    listing.add_argument("--json", action="store_true")

    running = command("run", _run, "Run a lesson without a screen; its facts go to the output.")
    running.add_argument("slug", metavar="SLUG")
    running.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", dest="knobs")
    running.add_argument("--model", metavar="M", help="a model's name, or a folder in the Hugging Face layout")
    running.add_argument(
        "-o", "--output", nargs="?", const="", metavar="FILE", help="save the recording (leanscope-SLUG.safetensors)"
    )

    exporting = command("export", _export, "Write the pages as files that play from anywhere, without a server.")
    exporting.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    exporting.add_argument("slugs", nargs="*", metavar="SLUG", help="some lessons; all by default")
    exporting.add_argument("--model", default="", metavar="M", help="record this model instead of the default one: toy")
    exporting.add_argument("--defaults", action="store_true", help="record the defaults, and no other snapshot")
    exporting.add_argument("--engine", default="", metavar="URL", help="where a server runs what is not recorded")
    exporting.add_argument("--check", action="store_true", help="write nothing: compare DIR with its checksums")

    claiming = command("claims", _claims, "Run lessons at their defaults and check what their sources say.")
    claiming.add_argument("slugs", nargs="*", metavar="SLUG")
    claiming.add_argument("--json", action="store_true")

    modelling = command("models", _models, "List the models, fetch SmolLM2, or check the files of all.")
    modelling.add_argument("what", nargs="?", choices=["list", "fetch", "verify"], default="list")

    training = command("train", _train, f"Make toys, or {DRAFT}, SmolLM2's draft, again from their seeds.")
    training.add_argument("names", nargs="*", metavar="NAME")
    training.add_argument("--all", action="store_true")

    benching = command("bench", _bench, "Measure how fast this machine decodes, reads, records, guesses and trains.")
    benching.add_argument("--json", action="store_true")
    benching.add_argument("--quick", action="store_true", help="once, on the toy, at tiny sizes: to see that it works")
    benching.add_argument("--model", metavar="M", help="SmolLM2 where it is here, else the toy")
    benching.add_argument("--rounds", type=int, metavar="N", help="turns of each contender that count (5)")

    command("doctor", _doctor, "Look whether everything that Leanscope needs is there.")
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text[:40]!r}")
    return int(text)


def _prefix(text: str) -> str:
    path = "/" + text.strip("/") if text.strip("/") else ""
    if not re.fullmatch(r"[A-Za-z0-9/._~@-]*", path) or "//" in path or "/.." in path:
        raise argparse.ArgumentTypeError(f"a prefix is a path such as /user/ann/leanscope, not {text[:40]!r}")
    return path


def _serve(options: argparse.Namespace) -> None:
    from app.serve import PortError, serve

    named = os.environ.get("LEANSCOPE_ALLOW_ORIGIN", "")
    if options.no_models:
        os.environ["LEANSCOPE_NO_MODELS"] = "1"
    try:
        serve(
            address=options.address,
            port=options.port,
            origins=[*options.allow_origin, *(name.strip() for name in named.split(",") if name.strip())],
            warm=not options.no_warm,
            prefix=options.prefix,
            redis=options.redis,
            say=lambda text: print(text, flush=True),
        )
    except PortError as error:
        raise Wrong(str(error)) from None
    except KeyboardInterrupt:  # before the server had taken over the signals
        _leave(130)
        raise
    _leave(0)


def _leave(code: int) -> None:
    """End the process here if a thread still runs a lesson or imports torch: Python's own end would take the ground
    from under its feet, and torch answers that with an abort."""
    if any(thread.daemon and thread.name.startswith("leanscope") for thread in threading.enumerate()):
        if code:
            print(file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _lessons(options: argparse.Namespace) -> None:
    from lessons import all_lessons

    rows = [
        {name: getattr(lesson, name) for name in ("slug", "title", "question", "part")}
        for lesson in all_lessons().values()
    ]
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        print(f"{row['slug']:<16} {row['title']}: {row['question']}")


def _run(options: argparse.Namespace) -> None:
    from app import runs

    lesson = _lesson(options.slug)
    knobs = _knobs(lesson, options)
    target = None
    if options.output is not None:
        target = Path(options.output or f"leanscope-{lesson.slug}.safetensors")
        _check_writable(target)
    started = time.monotonic()
    recording = _perform(lesson, knobs)
    took = time.monotonic() - started
    found = runs.findings(lesson, recording)
    _progress(f"{recording.steps} {lesson.step_word}s in {took:.1f} s\n")
    for name, value in found.facts.items():
        print(f"{name}: {_shown(value)}")
    for key, size in recording.cut.items():
        print(f"{key} was cut by {size:,} bytes", file=sys.stderr)
    if target is not None:
        try:
            recording.save(target)
        except Exception as error:
            raise Failed(f"{target} could not be written: {error}") from error
        print(f"saved {target} ({target.stat().st_size / 1e6:.1f} MB)", file=sys.stderr)


def _export(options: argparse.Namespace) -> int:
    from app import export, fonts
    from app.runs import Runs
    from app.store import Store
    from lessons import all_lessons

    if options.check:
        wrong, note = export.check(options.folder)
        for line in [*wrong, note] if note else wrong:
            print(line)
        if not wrong:
            print(f"{options.folder} is as it was exported.")
        return int(bool(wrong))
    if options.engine and not options.engine.startswith(("http://", "https://")):
        raise Wrong(f"--engine takes an address that begins with http:// or https://, not {options.engine[:60]!r}")
    chosen = [_lesson(slug) for slug in dict.fromkeys(options.slugs)] or list(all_lessons().values())
    models = {str(m) for one in chosen if "model" in one.knobs.names() for m in one.knobs.param["model"].objects}
    if options.model and options.model not in models:
        raise Wrong(f"--model is one of {', '.join(sorted(models))}, not {options.model[:60]!r}")
    asked = export.Options(options.model, options.defaults, options.engine)
    runs = Runs(Store(fonts.cache_folder() / "runs"), workers=1)
    try:
        manifest = export.export(options.folder, chosen, runs, asked, _progress)
    except export.ExportError as error:
        raise Failed(str(error)) from error
    finally:
        runs.close(timeout=1)
    size = sum(about["bytes"] for about in manifest["files"].values())
    count = len(manifest["files"])
    print(f"{options.folder} has {len(chosen)} lessons in {count} files, {size / 1e6:.0f} MB; open index.html")
    return 0


def _claims(options: argparse.Namespace) -> int:
    from app import runs
    from lessons import all_lessons

    chosen = [_lesson(slug) for slug in dict.fromkeys(options.slugs)] or list(all_lessons().values())
    table = []
    failed = False
    for lesson in chosen:
        try:
            recording = _perform(lesson, lesson.knobs())
        except Failed as error:
            failed = True
            _fail(error, 1)
            continue
        _progress(f"{lesson.slug}: {recording.steps} {lesson.step_word}s\n")
        for row in runs.claims(lesson, recording):
            table.append({"lesson": lesson.slug, "claim": row.pop("text"), **row})
    if options.json:
        print(json.dumps(table, indent=2, ensure_ascii=False))
    else:
        for row in table:
            print(f"{row['lesson']}: {row['claim']} ({row['source']})")
            print(f"  reported {row['reported']}, measured {row['measured'] or 'nothing'} {row['unit']}".rstrip())
            print(f"  {row['formula']}")
            print(f"  {row['verdict']}{': ' if row['why'] else ''}{row['why']}")
    return int(failed or any(row["why"].startswith(runs.NOT_COMPUTED) for row in table))


def _models(options: argparse.Namespace) -> int:
    from engine import checkpoints

    try:
        entries = checkpoints.catalogue()
    except checkpoints.ModelUnavailable as error:
        raise Failed(str(error)) from None
    if options.what == "list":
        for entry in entries:
            print(f"{entry.name:<16} {entry.kind:<5} {'here' if entry.available else f'not here: {entry.reason}'}")
        return 0
    if options.what == "fetch":
        try:
            folder = checkpoints.fetch_smollm2(progress=_fetching)
        except checkpoints.ModelUnavailable as error:
            _progress("")
            raise Failed(str(error)) from None
        _progress("")
        print(f"SmolLM2 is in {folder}")
        return 0
    bad = 0
    for entry in entries:
        try:
            checkpoints.verify(entry.name)
            print(f"ok    {entry.name}")
        except checkpoints.ModelUnavailable as error:
            bad += 1
            print(f"fail  {entry.name}: {error}")
    return 1 if bad else 0


def _train(options: argparse.Namespace) -> None:
    if bool(options.names) == options.all:
        raise Wrong("name the models to train, or say --all (see leanscope train --help)")
    from engine import train

    known = [*train.RECIPES, DRAFT]
    unknown = [name for name in options.names if name not in known]
    if unknown:
        raise Wrong(f"there is no recipe called {unknown[0][:60]!r}; there are {', '.join(known)}")
    for name in dict.fromkeys(options.names or known):
        entry = _train_draft() if name == DRAFT else _train_one(name)
        print(json.dumps({name: entry}, indent=2, ensure_ascii=False))


def _train_one(name: str) -> dict[str, Any]:
    """Train one model into the zoo; returns its entry in the manifest."""
    from engine import checkpoints, train

    def work(tell: Callable[..., None]) -> dict[str, Any]:
        def progress(done: int, total: int, loss: float) -> None:
            tell("step", done, total, f", loss {loss:.3f}")

        return train.train_to_assets(name, folder=checkpoints.ZOO, work=WORK, progress=progress)

    return _trained(name, work)


def _train_draft() -> dict[str, Any]:
    """Make SmolLM2's draft: let SmolLM2 write, then learn from what it wrote; returns what its file says of it."""
    from engine.speculate import draft

    def work(tell: Callable[..., None]) -> dict[str, Any]:
        draft.make(WORK / DRAFT, progress=tell)
        return dict(draft.about())

    return _trained(DRAFT, work)


def _trained(name: str, work: Callable[[Callable[..., None]], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns. It is given `tell(stage, done, total)`, which shows how far it is and what is left."""
    from engine import checkpoints

    before = time.monotonic()  # when what was told last was done
    began: dict[str, tuple[float, int]] = {}  # of each stage; this call may go on where an earlier one was stopped

    def tell(stage: str, done: int, total: int, more: str = "") -> None:
        nonlocal before
        since, first = began.setdefault(stage, (before, done - 1))
        before = time.monotonic()
        left = (before - since) / (done - first) * (total - done) / 60
        _progress(f"{name}: {stage} {done} of {total}{more}, {left:.0f} min left")

    try:
        made = work(tell)
    except (OSError, ValueError, checkpoints.ModelUnavailable) as error:
        raise Failed(f"{name} could not be trained: {error}") from error
    except KeyboardInterrupt:
        _progress(f"{name} was stopped; the same command goes on where it was\n")
        raise
    _progress("")
    return made


def _bench(options: argparse.Namespace) -> None:
    import dataclasses

    from app import bench
    from engine.checkpoints import ModelUnavailable

    settings = bench.QUICK if options.quick else bench.Settings()
    try:
        if options.rounds is not None:
            settings = dataclasses.replace(settings, rounds=options.rounds)
        name, model = bench.choose(options.model or ("toy" if options.quick else None))
    except (ValueError, ModelUnavailable) as error:
        raise Wrong(str(error)) from None
    machine = bench.machine()
    rows = []
    for row in bench.measure(model, settings, say=lambda group: _progress(f"measuring {group}")):
        rows.append(row)
    _progress("")
    if options.json:
        about = {"model": name, "dtype": str(model.embed.weight.dtype).removeprefix("torch."), "machine": machine,
                 "settings": dataclasses.asdict(settings)}  # fmt: skip
        print(json.dumps({**about, "rows": [dataclasses.asdict(row) for row in rows]}, indent=2, ensure_ascii=False))
        return
    reach = ", ".join(f"{flops / 1e9:.0f} GFLOP/s in {dtype}" for dtype, flops in machine["flops_per_second"].items())
    print(f"{name} on {machine['gpu'] or machine['cpu']}, {machine['threads']} threads")
    print(f"it reads {machine['bytes_per_second'] / 1e9:.1f} GB/s and computes {reach}")
    for group in dict.fromkeys(row.group for row in rows):
        print(f"\n{group:<38}{'median':>10}{'best':>10}{'at most':>10}{'MB kept':>9}")
        for row in rows:
            if row.group == group:
                limit = f"{row.limit:10.1f}" if row.limit else f"{'':10}"
                kept = f"{row.cache_bytes / 1e6:9.2f}" if row.cache_bytes is not None else ""
                print(f"  {row.name:<36}{row.median:10.1f}{row.best:10.1f}{limit}{kept}  {row.unit}/s".rstrip())


def _doctor(options: argparse.Namespace) -> int:
    from app.doctor import examine

    worst = 0
    for grade, name, text in examine(PORT):
        print(f"{grade:<5} {name}: {text}", flush=True)
        worst = max(worst, grade == "fail")
    return int(worst)


def _lesson(slug: str) -> Lesson:
    from lessons import lesson

    try:
        return lesson(slug)
    except KeyError as error:
        raise Wrong(str(error.args[0])) from None


def _knobs(lesson: Lesson, options: argparse.Namespace) -> Knobs:
    """The knobs that the command line asks for."""
    from lessons.knobs import check

    given: dict[str, Any] = {}
    for pair in options.knobs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise Wrong(f"--set takes KNOB=VALUE, and {pair[:60]!r} has no =")
        given[name.strip()] = value
    own = None
    if options.model is not None:
        if "model" not in lesson.knobs.names():
            raise Wrong(f"{lesson.slug} has no knob called model")
        if options.model in map(str, lesson.knobs.param["model"].objects):
            given["model"] = options.model
        else:
            own = Path(options.model).expanduser()
            if not own.is_dir():
                names = ", ".join(map(str, lesson.knobs.param["model"].objects))
                raise Wrong(f"--model is one of {names} or a folder, and {options.model[:80]!r} is neither")
    knobs, problems = check(lesson.knobs, given)
    if problems:
        raise Wrong(" ".join(problems))
    if own is not None:
        choice = knobs.param["model"]  # this instance's own copy
        choice.objects = [*choice.objects, str(own)]
        knobs.model = str(own)  # type: ignore[attr-defined]
    return knobs


def _perform(lesson: Lesson, knobs: Knobs) -> Any:
    from app import runs
    from engine.checkpoints import ModelUnavailable

    if not Path(str(getattr(knobs, "model", ""))).is_dir():
        knobs, missing = runs.with_available_model(knobs)
        if missing:
            print(missing, file=sys.stderr)
    shown = 0.0

    def on_step(recorder: Recorder) -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.1:
            shown = time.monotonic()
            total = recorder.meta.get("total_steps")
            _progress(f"{lesson.slug}: {lesson.step_word} {recorder.step}{f' of {total}' if total else ''}")

    try:
        return runs.perform(lesson, knobs, on_step)
    except (ValueError, ModelUnavailable) as error:
        raise Failed(f"{lesson.slug}: {error}") from error
    except Exception as error:
        logging.getLogger(__name__).exception("%s failed", lesson.slug)
        raise Failed(f"{lesson.slug}: Something went wrong in the engine ({type(error).__name__}).") from error


def _check_writable(target: Path) -> None:
    """Say before a long run, rather than after, that its result can't be kept."""
    if target.is_dir():
        raise Wrong(f"{target} is a folder; -o takes a file")
    existed = target.exists()
    try:
        with target.open("ab"):
            pass
        if not existed:
            target.unlink()
    except OSError as error:
        raise Wrong(f"{target} can't be written ({error.strerror})") from None


def _progress(text: str) -> None:
    """One line that replaces the one before, on a terminal; only finished lines elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text.endswith("\n"):
        print(text, end="", file=sys.stderr, flush=True)


def _fetching(stage: str, done: int, total: int) -> None:
    share = f"{done / total:4.0%} of {total / 1e6:.0f} MB" if total > 1e6 else f"{done} of {total}" if total else ""
    _progress(f"SmolLM2: {stage} {share}")


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
