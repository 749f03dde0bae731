"""The files that a page loads: BokehJS, Panel's part of it, the stage and the fonts, all from this server.

Scripts are served under a name that holds their hash, so that a browser keeps them for good, and packed once
rather than for each visitor. Panel's own static routes neither pack nor name them so.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import mimetypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FRESH = 2.0  # seconds for which the stage is taken to be as it was
ICONS = Path(__file__).parent.parent / "assets" / "icons"


@dataclass(frozen=True)
class Asset:
    """One file, ready to send: as it is, and packed with gzip where that makes it smaller."""

    name: str
    kind: str
    data: bytes
    packed: bytes | None


_known: dict[str, Asset] = {}
_by_path: dict[Path, tuple[tuple[int, int], str]] = {}
_lock = threading.Lock()


def publish(path: Path) -> str:
    """Take a file into the list and return the name to ask for it; a file that changed gets a new name."""
    stat = path.stat()
    stamp = (stat.st_mtime_ns, stat.st_size)
    with _lock:
        seen = _by_path.get(path)
        if seen is not None and seen[0] == stamp:
            return seen[1]
    data = path.read_bytes()
    name = f"{path.name.split('.')[0]}-{hashlib.sha256(data).hexdigest()[:16]}{path.suffix}"
    kind = "text/javascript" if path.suffix == ".js" else mimetypes.guess_type(path.name)[0] or "text/plain"
    packed = gzip.compress(data, 9, mtime=0)
    asset = Asset(name, kind, data, packed if len(packed) < 0.9 * len(data) else None)
    with _lock:
        _known[name] = asset
        _by_path[path] = (stamp, name)
    return name


def find(name: str) -> Asset | None:
    """The published file of that name."""
    return _known.get(name)


@functools.cache
def scripts() -> tuple[str, ...]:
    """The names of the scripts every page loads, in order: BokehJS, what Panel's models build on, Panel's models.

    The last one connects the page. It also stands in for es-module-shims, which Panel loads for browsers that have
    no `import()`, and which runs inline scripts to find out: our Content-Security-Policy allows none.
    """
    import bokeh
    import panel

    bokeh_js = Path(bokeh.__file__).parent / "server" / "static" / "js"
    files = [bokeh_js / f"{name}.min.js" for name in ("bokeh", "bokeh-widgets", "bokeh-tables")]
    files.append(Path(panel.__file__).parent / "dist" / "panel.min.js")
    return tuple(publish(path) for path in [*files, Path(__file__).parent / "start.js"])


def stage_file() -> Path:
    """The stage joined into one file. Joining takes milliseconds, so that a change is looked for once in a while."""
    from app.stage import bundle_file

    return _joined(int(time.monotonic() / FRESH), bundle_file)


@functools.lru_cache(maxsize=1)
def _joined(when: int, bundle_file: Callable[[], Path]) -> Path:
    return Path(bundle_file())


def stage() -> str:
    """The name of the stage's module."""
    return publish(stage_file())


def icon() -> str:
    """The name of the page's icon, "" where there is none."""
    path = ICONS / "leanscope.svg"
    return publish(path) if path.is_file() else ""
