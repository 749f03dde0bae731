"""Finished recordings on disk, bounded and shared by all processes of this machine.

`diskcache` keeps the order and the bound; the values are the bytes of `Recording.save` in files of their own. Its
own serialisation would unpickle what it finds, so `Files` stores and reads plain bytes and refuses the rest.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import MODE_BINARY, UNKNOWN
from safetensors import SafetensorError

from engine.recording import Recording

log = logging.getLogger(__name__)

SIZE = 2_000_000_000  # bytes kept on disk, the least recently used go first
WAIT = 2.0  # seconds to wait for another process that writes
FULL = ("no space", "too large", "quota", "is full")  # how a full disk reads in an error


class Files(diskcache.Disk):
    """Keys are text, values are files of bytes. Nothing is ever pickled or unpickled."""

    def put(self, key: Any) -> tuple[str, bool]:
        if not isinstance(key, str):
            raise TypeError(f"a key must be text, not {type(key).__name__}")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        if not raw or not isinstance(key, str):
            raise ValueError("the cache holds a key that is no text")
        return key

    def store(self, value: Any, read: Any, key: Any = UNKNOWN) -> tuple[int, int, str, None]:
        if not isinstance(value, bytes):
            raise TypeError(f"a value must be bytes, not {type(value).__name__}")
        filename, full_path = self.filename(key, value)
        self._write(full_path, io.BytesIO(value), "xb")
        return len(value), MODE_BINARY, filename, None

    def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> Any:
        folder = os.path.realpath(self._directory)
        if mode != MODE_BINARY or not isinstance(filename, str):
            raise ValueError("the cache holds a value that is no file")
        path = os.path.realpath(os.path.join(folder, filename))
        if not path.startswith(folder + os.sep):
            raise ValueError("the cache names a file outside its folder")
        return open(path, "rb") if read else Path(path).read_bytes()


class Store:
    """`get` and `put` never raise: a disk that fails costs time, not pictures. `problem` says what is wrong with it."""

    def __init__(self, folder: Path | None, *, size: int = SIZE) -> None:
        self.problem = ""
        self._folder = folder
        self._size = size
        self._cache: diskcache.Cache | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            self._cache = diskcache.Cache(
                str(folder), timeout=WAIT, disk=Files, size_limit=size, eviction_policy="least-recently-used"
            )
        except (OSError, sqlite3.Error, diskcache.Timeout, ValueError) as error:
            self._fail(f"The folder {folder} can't be written", error)

    def get(self, key: str) -> Recording | None:
        """The recording kept under `key`, or None; a damaged one is dropped."""
        if self._cache is None:
            return None
        try:
            file = self._cache.get(key, read=True)
        except (OSError, sqlite3.Error, diskcache.Timeout, ValueError, TypeError) as error:
            log.warning("the cache could not be read: %s", error)
            return None
        if file is None:
            return None
        with file:
            try:
                return Recording.load(file.name)
            except (ValueError, OSError) as error:
                log.warning("a damaged recording is dropped from the cache: %s", error)
        with contextlib.suppress(OSError, sqlite3.Error, diskcache.Timeout, ValueError):
            self._cache.delete(key)
        return None

    def put(self, key: str, recording: Recording) -> None:
        """Keep `recording`. A full disk sets `problem` and loses nothing else."""
        if self._cache is None or recording.nbytes > self._size // 4:
            return
        try:
            with tempfile.TemporaryDirectory(prefix="run-", dir=self._folder) as work:
                path = Path(work) / "recording"
                recording.save(path)
                self._cache.set(key, path.read_bytes())
            self.problem = ""
        except (OSError, sqlite3.Error, diskcache.Timeout, SafetensorError) as error:
            full = any(word in str(error).lower() for word in FULL)
            self._fail(f"There is no room in {self._folder}" if full else f"{self._folder} can't be written", error)
        except Exception:  # a recording that cannot be saved is a defect of its lesson, not of the disk
            log.exception("a recording could not be kept")

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def _fail(self, what: str, error: Exception) -> None:
        self.problem = f"{what}: finished runs are kept in memory only, until the server stops."
        log.warning("%s (%s)", self.problem, error)
