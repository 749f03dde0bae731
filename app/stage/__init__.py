"""The stage: what draws the page in the browser, as ES modules, and the joiner that makes one file of them.

No build step and no package from outside: each module is plain JavaScript, and a browser could load them as they
are. A page loads faster from one file, and Panel serves one, so `bundle` writes them one after another. To stay that
simple it holds the modules to a few rules, and refuses what breaks them:

- imports stand at the start of a line and read `import { a, b } from "./file.js";` (they may span lines); no renaming,
  no default import, no import of side effects, nothing from outside this folder;
- exports are `export function`, `export class`, `export const`, `export let` (or async), at the start of a line; the
  entry alone has an `export default`, which the bundle keeps;
- names at the top level are unique over all modules, since joined they share one scope; they are declared one at a
  time, at the start of a line;
- no circles.

`styles.js` is not a file: it exports STYLES, the text of `assets/styles/*.css`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
STYLES = FOLDER.parents[1] / "assets" / "styles"
ENTRY = "page.js"
PLAYER = "still.js"
KEPT = 86_400  # seconds that an older bundle is left for servers that still serve it

_IMPORT = re.compile(r'^import\s*\{([^}]*)\}\s*from\s*"\./([\w-]+\.js)";\n?', re.M)
_ANY_IMPORT = re.compile(r"^import\b.*", re.M)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const|let)\b)", re.M)
_ANY_EXPORT = re.compile(r"^export\b(?! default).*", re.M)
_NAME = re.compile(r"^(export )?(?:async )?(?:function\*?|class|const|let|var) +([\w$]+)", re.M)
_PATTERN = re.compile(r"^(?:export )?(?:const|let|var) *[\[{].*", re.M)


class BundleError(ValueError):
    """The modules cannot be joined; the message says which file and why."""


def styles(folder: Path = STYLES) -> str:
    """The text of all style sheets, in the order of their names."""
    return "\n".join(path.read_text("utf-8") for path in sorted(folder.glob("*.css")))


def bundle(folder: Path = FOLDER, entry: str = ENTRY, *, css: str | None = None) -> str:
    """All modules that `entry` needs, joined in the order of their dependencies into one ES module."""
    sheets = f"export const STYLES = {json.dumps(styles() if css is None else css, ensure_ascii=False)};\n"
    modules: dict[str, str] = {}
    _collect(folder, entry, sheets, modules, ())
    _refuse_clashes(modules)
    parts = [f"// {name}\n{_joined(name, text, entry)}" for name, text in modules.items()]
    return "\n".join(parts)


def script(folder: Path = FOLDER) -> str:
    """The page and what plays files to it (PLAYER) as one plain script: a page opened from disk may load no module."""
    modules: dict[str, str] = {}
    for name in (ENTRY, PLAYER):
        _collect(folder, name, f"export const STYLES = {json.dumps(styles(), ensure_ascii=False)};\n", modules, ())
    _refuse_clashes(modules)
    parts = [f"// {name}\n{_joined(name, text, ENTRY)}" for name, text in modules.items()]
    joined = "\n".join(parts).replace("export default { render };", "")
    return f'(() => {{\n"use strict";\n{joined}\nplayFiles(render);\n}})();\n'


def bundle_file(folder: Path = FOLDER) -> Path:
    """The bundle as a file, for Panel's `_bundle`: beside the modules, or in a temporary folder where that is
    read-only. Written only when it changed, so that several processes may ask at once."""
    text = bundle(folder)
    name = f"leanscope-{hashlib.sha256(text.encode()).hexdigest()[:12]}.js"
    failure: OSError | None = None
    for place in (folder / ".build", Path(tempfile.gettempdir()) / "leanscope-stage"):
        try:
            return _written(place / name, text)
        except OSError as error:
            failure = error
    raise BundleError(f"the stage cannot be written anywhere: {failure}")


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (path.exists() and path.read_text("utf-8") == text):
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)
    for other in path.parent.glob("leanscope-*.js"):
        if other != path and other.stat().st_mtime < time.time() - KEPT:
            other.unlink(missing_ok=True)
    return path


def _collect(folder: Path, name: str, sheets: str, modules: dict[str, str], above: tuple[str, ...]) -> None:
    """Put `name` into `modules` after all that it imports."""
    if name in above:
        raise BundleError(f"a circle of imports: {' → '.join((*above[above.index(name) :], name))}")
    if name in modules:
        return
    text = sheets if name == "styles.js" else _read(folder, name, above)
    for names, needed in _IMPORT.findall(text):
        _collect(folder, needed, sheets, modules, (*above, name))
        offered = {n for exported, n in _NAME.findall(modules[needed]) if exported}
        for wanted in filter(None, (n.strip() for n in names.split(","))):
            if not re.fullmatch(r"[\w$]+", wanted):
                raise BundleError(f"{name}: import {wanted!r} from {needed} renames; the joiner cannot")
            if wanted not in offered:
                raise BundleError(f"{name}: {needed} does not export {wanted}; it has {', '.join(sorted(offered))}")
    modules[name] = text


def _read(folder: Path, name: str, above: tuple[str, ...]) -> str:
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{above[-1] if above else 'the entry'}: there is no {name} in {folder}")
    return path.read_text("utf-8")


def _refuse_clashes(modules: dict[str, str]) -> None:
    owner: dict[str, str] = {}
    for name, text in modules.items():
        if pattern := _PATTERN.search(text):
            raise BundleError(f"{name}: {pattern.group().strip()!r} declares several names at once at the top level")
        for _, declared in _NAME.findall(text):
            if declared in owner:
                raise BundleError(f"{name} and {owner[declared]} both declare {declared} at the top level; rename one")
            owner[declared] = name


def _joined(name: str, text: str, entry: str) -> str:
    """A module without its imports and exports."""
    text = _IMPORT.sub("", text)
    if left := _ANY_IMPORT.search(text):
        raise BundleError(f'{name}: {left.group()!r} is not of the form import {{ a, b }} from "./file.js";')
    text = _EXPORT.sub("", text)
    if left := _ANY_EXPORT.search(text):
        raise BundleError(f"{name}: {left.group()!r} is no export of a function, class, const or let")
    if name != entry and re.search(r"^export default", text, re.M):
        raise BundleError(f"{name}: only {entry} may have an export default")
    return text.strip() + "\n"
