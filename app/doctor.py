"""What `leanscope doctor` looks at: each thing one line, with what to do when it is not as it should be."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Literal

Line = tuple[Literal["ok", "warn", "fail"], str, str]

NEEDED = ("bokeh", "diskcache", "gguf", "numpy", "panel", "param", "safetensors", "tokenizers", "torch", "tornado")
ROOM = 1_000_000_000  # bytes that the model and the finished runs want


def examine(port: int) -> Iterator[Line]:
    """Look at one thing after the other."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield ("ok", "Python", version) if sys.version_info >= (3, 11) else ("fail", "Python", f"{version}: 3.11 is needed")
    yield from _packages()
    yield from _torch()
    yield from _cache()
    yield from _models()
    yield from _lessons()
    yield _browser()
    yield _fonts()
    yield _port(port)


def _packages() -> Iterator[Line]:
    missing = []
    for name in NEEDED:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield "fail", "packages", f"{', '.join(missing)} not installed: run `make serve`, or `pip install -e .`"
    else:
        panel, bokeh = importlib.metadata.version("panel"), importlib.metadata.version("bokeh")
        yield "ok", "packages", f"all there (panel {panel}, bokeh {bokeh})"


def _torch() -> Iterator[Line]:
    try:
        import torch

        from engine import hardware

        machine = hardware.describe()
        yield "ok", "torch", f"{torch.__version__}, {hardware.threads()} threads"
        yield "ok", "device", f"{machine.gpu} (CUDA)" if machine.gpu else f"{machine.cpu} (no CUDA device)"
    except Exception as error:
        yield "fail", "torch", f"can't be used ({error}): install it again"


def _cache() -> Iterator[Line]:
    from app.fonts import cache_folder

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield "ok", "cache folder", f"{folder} can be written"
    except OSError as error:
        yield "fail", "cache folder", f"{folder} can't be written ({error.strerror}): set LEANSCOPE_CACHE to another"
        return
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free at {folder}"
    yield ("ok", "disk", text) if free > ROOM else ("warn", "disk", f"{text}: the model and finished runs want 1 GB")


def _models() -> Iterator[Line]:
    try:
        from engine import checkpoints

        for entry in checkpoints.catalogue():
            if entry.available:
                yield "ok", f"model {entry.name}", "here"
            elif entry.kind == "real":
                yield "warn", f"model {entry.name}", f"{entry.reason} Until then lessons run on the toys."
            else:
                yield "fail", f"model {entry.name}", entry.reason
    except Exception as error:
        yield "fail", "models", str(error)


def _lessons() -> Iterator[Line]:
    try:
        from lessons import all_lessons

        count = len(all_lessons())
        yield ("ok", "lessons", f"{count} found") if count else ("fail", "lessons", "none found in lessons/")
    except Exception as error:
        yield "fail", "lessons", f"can't be loaded: {error}"


def _browser() -> Line:
    from app.browser import find_browser

    found = find_browser()
    if found:
        return "ok", "browser", found
    return "warn", "browser", "no Chromium found: the tests need one, which `make test` fetches; pages open in any"


def _fonts() -> Line:
    from app import fonts

    folder = fonts.folder()
    if folder is not None:
        return "ok", "fonts", str(folder)
    return "warn", "fonts", "not built: pages use the system's; `make serve` or `python -m app.fonts` builds them"


def _port(port: int) -> Line:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return "warn", "port", f"{port} is in use: `leanscope serve --port 0` takes a free one"
    return "ok", "port", f"{port} is free"
