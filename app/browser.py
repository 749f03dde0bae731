"""A Chromium for the browser tests: the system's, else Debian's package (as root), else Playwright's own."""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from app.system import apt_install, say, works

NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
NONE = (
    "There is no Chromium and none could be installed: install the package chromium, or name a Chromium or Chrome "
    "with LEANSCOPE_BROWSER."
)


def find_browser(
    which: Callable[[str], str | None] = shutil.which, environ: Mapping[str, str] = os.environ
) -> str | None:
    """The program to drive, or None. LEANSCOPE_BROWSER, a path or a name, goes before all else."""
    if named := environ.get("LEANSCOPE_BROWSER"):
        return which(named)
    for name in NAMES:
        # Ubuntu's chromium-browser may be a script that only says "install the snap".
        if (path := which(name)) and works(Path(path), "--version"):
            return path
    cache = environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path(environ.get("HOME", "/"), ".cache", "ms-playwright")
    fetched = sorted(Path(cache).glob("chromium-*/chrome-linux*/chrome"))
    return str(fetched[-1]) if fetched else None


def get_browser(python: Path) -> bool:
    """Finds or installs one; `python` has Playwright."""
    if find_browser():
        return True
    say("Getting a browser for the tests")
    if apt_install("chromium") and find_browser():
        return True
    subprocess.run([python, "-m", "playwright", "install", "chromium"], capture_output=True, check=False)
    if find_browser():
        return True
    say(f"{NONE} The browser tests are left out until then.")
    return False
