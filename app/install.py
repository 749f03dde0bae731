"""What `make` runs first: a virtual environment, pinned packages, fonts, the real model, and what the tests drive.

    python -m app.install serve    what the pages need
    python -m app.install check    what linters and quick tests need
    python -m app.install test     everything

Standard library alone: it runs before anything is installed. Each step first looks whether its work is there, so that
a second call takes a tenth of a second.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from app import fonts
from app.browser import get_browser
from app.system import apt_install, say, works

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
EXTRAS = {"serve": ["fonts"], "check": ["fonts", "oracle", "test"], "test": ["fonts", "oracle", "test"]}

TORCH_NOTE = """\
  On Linux, PyTorch's usual package brings several gigabytes of CUDA. If this machine has no NVIDIA card, you may stop
  here (Ctrl-C), set LEANSCOPE_TORCH_INDEX to the address of PyTorch's package index for CPUs, and make again."""


class InstallError(Exception):
    """A step failed; the text is one sentence for the person at the terminal."""


# --- virtual environment ---------------------------------------------------------------------------------------------


def is_whole(venv: Path) -> bool:
    """Whether a virtual environment is there that was made in this place and runs pip on this version of Python."""
    try:
        # A moved one starts, but the programs in its bin folder still name the old place.
        made_here = str(venv) in (venv / "pyvenv.cfg").read_text()
    except OSError:
        return False
    same = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    return made_here and works(venv / "bin" / "python", "-c", same)


def make_venv(venv: Path = VENV) -> None:
    """A virtual environment with pip in it; a broken one is made again."""
    if is_whole(venv):
        return
    say(f"Making {venv} with Python {platform.python_version()}")
    if not works(Path(sys.executable), "-c", "import ensurepip, venv"):
        # Debian and Ubuntu keep this module in a package of its own.
        package = f"python3.{sys.version_info.minor}-venv"
        if not apt_install(package):
            raise InstallError(f"This Python has no venv module: as root, apt-get install {package}; then make again.")
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise InstallError(explain_venv(made.stdout + made.stderr, venv))


def explain_venv(said: str, venv: Path) -> str:
    for sign in ("Permission denied", "Read-only file system", "No space left on device"):
        if sign in said:
            return f"The folder {venv} can't be made ({sign.lower()}): make room there, or copy Leanscope elsewhere."
    last = said.strip().splitlines()[-1:] or ["no reason given"]
    return f"The virtual environment {venv} can't be made: {last[0]}"


# --- packages --------------------------------------------------------------------------------------------------------


def packages_key(root: Path = ROOT) -> str:
    """Changes when the packages should be installed again: other pins, another Python, a moved folder."""
    parts = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    parts += [str(root).encode(), sys.version.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def missing_extras(stamp: Path, key: str, wanted: Iterable[str]) -> list[str]:
    """The extras to install, with those already there; none when all of `wanted` is there for `key`."""
    there: set[str] = set()
    good = False
    try:
        done = json.loads(stamp.read_text())
        there, good = set(done["extras"]), done["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return [] if good and there >= set(wanted) else sorted(there | set(wanted))


def pip_command(extras: Sequence[str], environ: Mapping[str, str], *, terminal: bool) -> list[str]:
    command = [str(BIN / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "2"] + ([] if terminal else ["--quiet", "--progress-bar", "off"])
    if index := environ.get("LEANSCOPE_TORCH_INDEX"):
        command += ["--extra-index-url", index]  # pip takes 2.13.0+cpu from it for the pin 2.13.0
    return [*command, "--constraint", "constraints.txt", "--editable", f".[{','.join(extras)}]"]


def explain_pip(said: str) -> str:
    """One sentence for what pip wrote on its error stream when it failed."""
    if re.search(r"No space left on device|Errno 28", said):
        return "The disk is full: the packages need 2 GB, and several more with CUDA; make room, then make again."
    if re.search(r"Permission denied|Errno 13|Read-only file system", said):
        return "The packages can't be written into .venv (permission denied): remove it, or copy Leanscope elsewhere."
    if re.search(r"name resolution|NewConnection|Timeout|timed out|Connection \w+ed|[Cc]onnection broken|Proxy", said):
        return "The package index can't be reached: check the network (or pip's proxy settings), then make again."
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR")]
    return f"pip could not install the packages: {errors[0] if errors else 'it gave no reason'}."


def install_packages(extras: Iterable[str]) -> None:
    stamp, key = VENV / "leanscope.json", packages_key()
    todo = missing_extras(stamp, key, extras)
    if not todo:
        return
    make_venv()
    say("Installing the packages that constraints.txt pins (the first time takes a few minutes)")
    has_torch = any(VENV.glob("lib/python*/site-packages/torch/__init__.py"))
    if sys.platform == "linux" and not has_torch and not os.environ.get("LEANSCOPE_TORCH_INDEX"):
        say(TORCH_NOTE)
    command = pip_command(todo, os.environ, terminal=sys.stdout.isatty())
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        log = VENV / "pip.log"
        log.write_text(done.stderr)
        raise InstallError(f"{explain_pip(done.stderr)} What pip said is in {log}.")
    stamp.write_text(json.dumps({"key": key, "extras": todo}))


def tell_jupyter(venv: Path = VENV) -> None:
    """Where Jupyter Server looks for what to load: an editable install, unlike a wheel, puts no file there."""
    target = venv / "etc" / "jupyter" / "jupyter_server_config.d" / "leanscope.json"
    wanted = (ROOT / "assets" / "jupyter" / "leanscope.json").read_text()
    if not target.is_file() or target.read_text() != wanted:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(wanted)


# --- what is made once and kept in the cache folder ------------------------------------------------------------------


def make_fonts() -> bool:
    if fonts.folder():
        return True
    say("Cutting the fonts (a quarter of a minute, once)")
    return subprocess.run([BIN / "python", "-m", "app.fonts"], cwd=ROOT, check=False).returncode == 0


def fetch_model() -> bool:
    """SmolLM2, fetched and converted; where it can't be had, the command has said why."""
    if (fonts.cache_folder() / "smollm2" / "about.json").is_file():  # written last: without it there is no model
        return True
    say("Fetching the real model, SmolLM2-135M (93 MB, once)")
    if subprocess.run([BIN / "leanscope", "models", "fetch"], check=False).returncode == 0:
        return True
    say("Leanscope goes on without the real model: every lesson runs on its toys.")
    return False


def get_redis() -> bool:
    """The server by which rooms span processes; only tests and whoever runs several processes need it."""
    if shutil.which("redis-server") or (apt_install("redis-server") and shutil.which("redis-server")):
        return True
    say("There is no Redis and none could be installed (package redis-server). Its tests are left out until then.")
    return False


# --- all together ----------------------------------------------------------------------------------------------------


def prepare(target: str) -> bool:
    """Everything that `target` needs. False when something that it can do without is missing, and was said so."""
    install_packages(EXTRAS[target])
    tell_jupyter()
    if target == "check":
        return True
    whole = [make_fonts(), fetch_model()]
    if target == "test":
        whole += [get_browser(BIN / "python"), get_redis()]
    return all(whole)


def main(words: Sequence[str]) -> int:
    if len(words) != 1 or words[0] not in EXTRAS:
        sys.stderr.write(f"usage: python -m app.install {'|'.join(EXTRAS)}\n")
        return 2
    try:
        whole = prepare(words[0])
    except InstallError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"Set-up stopped at {error.filename or ROOT}: {error.strerror or error}.\n")
        return 1
    if words[0] == "test" and not whole and os.environ.get("CI"):
        sys.stderr.write("A run that leaves tests out must not pass in CI.\n")
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
