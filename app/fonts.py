"""Our own font files: cut to the characters in use and packed as woff2 once, at set-up.

The sources are the variable fonts of three packages from PyPI, all under the SIL Open Font License, whose text is kept
beside the files. `build()` needs fontTools and brotli; `folder()`, which the server asks, needs nothing.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Face(NamedTuple):
    name: str  # served as /fonts/NAME.woff2
    package: str
    file: str
    axes: dict[str, float | tuple[float, float]]  # a number pins an axis, a pair keeps that range of it
    features: tuple[str, ...]


TEXT = ("calt", "case", "ccmp", "frac", "kern", "liga", "lnum", "locl", "mark", "subs", "sups", "tnum", "zero")
# No ligatures in the mono face: a token must show the characters that it has.
CODE = ("ccmp", "mark", "zero")
WEIGHTS = (400.0, 700.0)

FACES = (
    Face("inter", "fontpkg_inter", "Inter[opsz,wght].ttf", {"opsz": 14.0, "wght": WEIGHTS}, TEXT),
    # Optical sizes stay for the questions, which are set large; below 20 the difference is not worth 40 kB.
    Face(
        "source-serif-4",
        "fontpkg_source_serif_4",
        "SourceSerif4[opsz,wght].ttf",
        {"opsz": (20.0, 60.0), "wght": WEIGHTS},
        TEXT,
    ),
    Face(
        "source-serif-4-italic",
        "fontpkg_source_serif_4",
        "SourceSerif4-Italic[opsz,wght].ttf",
        {"opsz": 20.0, "wght": 400.0},
        TEXT,
    ),
    Face("jetbrains-mono", "fontpkg_jetbrains_mono", "JetBrainsMono[wght].ttf", {"wght": WEIGHTS}, CODE),
)

# First and last code point of each range. A character outside them is drawn by a font of the reader's own.
CHARACTERS = (
    (0x0020, 0x007E),  # ASCII
    (0x00A0, 0x017F),  # Latin-1 and the accented letters of Europe
    (0x0302, 0x0304),  # marks over letters: rounded, ternary, mean
    (0x0384, 0x03CE),  # Greek
    (0x1D2C, 0x1D6A),  # raised and lowered letters
    (0x2010, 0x205E),  # dashes, quotes, dots
    (0x2070, 0x209C),  # raised and lowered digits
    (0x20AC, 0x20AC),  # euro
    (0x2100, 0x214F),  # letter-like signs
    (0x2190, 0x22FF),  # arrows and mathematics
    (0x2300, 0x23FF),  # keys
    (0x2420, 0x2426),  # visible blanks
    (0x2500, 0x25FF),  # boxes, blocks, shapes
    (0x2700, 0x27BF),  # check marks, crosses
)


class FontsError(Exception):
    """The fonts can't be made; the text is one sentence for the person who reads it."""


def cache_folder() -> Path:
    """Where Leanscope keeps what it can make again."""
    if named := os.environ.get("LEANSCOPE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "leanscope"


def _target() -> Path:
    # A changed recipe gets a folder of its own, so that an old set is never served for a new one.
    recipe = hashlib.sha256(repr((FACES, CHARACTERS)).encode()).hexdigest()[:12]
    return cache_folder() / f"fonts-{recipe}"


def folder() -> Path | None:
    """The folder with one NAME.woff2 for each face, or None when they were never built (system fonts serve then)."""
    target = _target()
    try:
        return target if all((target / f"{face.name}.woff2").is_file() for face in FACES) else None
    except OSError:
        return None


def build(say: Callable[[str], None] = lambda text: None) -> Path:
    """Makes the font files where there are none yet, in about 20 seconds, and returns their folder."""
    if made := folder():
        return made
    target = _target()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="fonts-", dir=target.parent))
    except OSError as error:
        raise FontsError(f"The fonts can't be kept in {target.parent} ({error.strerror}).") from error
    try:
        for face in FACES:
            say(face.name)
            _pack(face, work)
        shutil.rmtree(target, ignore_errors=True)
        work.chmod(0o755)
        work.replace(target)
    except OSError as error:
        if made := folder():  # another process was first
            return made
        raise FontsError(f"The fonts can't be kept in {target.parent} ({error.strerror}).") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _pack(face: Face, into: Path) -> None:
    try:
        import brotli  # noqa: F401  (fontTools asks for it only when it writes)
        from fontTools import subset
        from fontTools.ttLib import TTFont
        from fontTools.varLib import instancer

        spec = importlib.util.find_spec(face.package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(name=face.package)
    except ModuleNotFoundError as error:
        raise FontsError(f"The fonts need the package {error.name}, which `make serve` installs.") from error
    source = Path(spec.origin).parent
    # The time stays that of the source, so that the same packages give the same bytes.
    font = TTFont(source / "files" / face.file, recalcTimestamp=False)
    options = subset.Options(layout_features=list(face.features), hinting=False, name_IDs=[0, 1, 2, 4, 5, 6, 13, 14])
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=[code for first, last in CHARACTERS for code in range(first, last + 1)])
    cutter.subset(font)  # first cut, then pin: half as long again the other way round
    font = instancer.instantiateVariableFont(font, face.axes)
    font.flavor = "woff2"
    font.save(into / f"{face.name}.woff2")
    shutil.copyfile(source / "LICENSE", into / f"{face.name}.LICENSE.txt")


def main() -> int:
    try:
        made = build(lambda name: print(f"  font {name}", flush=True))  # noqa: T201
    except FontsError as error:
        print(f"{error} The pages use the system's fonts until then.", file=sys.stderr)  # noqa: T201
        return 1
    size = sum(file.stat().st_size for file in made.glob("*.woff2"))
    print(f"  fonts: {size / 1000:.0f} kB in {made}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
