"""A pool of processes for `ring`: started once, used again, and gone with whoever started it.

Each is `python -m engine.exact.rank`, a fresh interpreter that imports torch and the engine and nothing else of the
caller's. Whatever goes wrong (a rank dies, is silent too long, the caller gives up) ends all of them; the next call
starts anew. One call at a time; others wait their turn.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from engine.exact.rank import Message, read, write

ROOT = Path(__file__).parents[2]
LOOPBACK = Path("/sys/class/net/lo")
MOST = 16  # processes; each holds a Python with torch
START = 120.0  # seconds that a process may take to import torch: on a busy machine twenty were seen
TICK = 0.05  # seconds between two calls of `progress`
Progress = Callable[[str, int, int], None]
"""Told the stage ("waiting", "starting", "running"), how many ranks are done, of how many. May raise to stop it."""


class RankDied(RuntimeError):  # noqa: N818
    """A process of the ring ended or fell silent; the text says which."""


class Pool:
    """`run` jobs on as many processes as there are jobs. Close it, use it in `with`, or let `idle` seconds pass."""

    def __init__(self, *, timeout: float = 60.0, idle: float = 300.0) -> None:
        if timeout <= 0 or idle <= 0:
            raise ValueError(f"timeout and idle must be seconds above 0, not {timeout} and {idle}")
        self.timeout, self.idle = timeout, idle
        self._lock = threading.Lock()
        self._workers: list[subprocess.Popen[bytes]] = []
        self._folder: Path | None = None
        self._ready = 0  # of the workers, those that have said so
        self._count = 0
        self._timer: threading.Timer | None = None
        self._folders: list[Path] = []
        weakref.finalize(self, _end, self._workers, self._folders)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The processes that live now, by rank."""
        return [worker.pid for worker in self._workers if worker.poll() is None]

    def close(self) -> None:
        """End every process and remove their files. The pool can be used again."""
        with self._lock:
            self._close()

    def run(
        self, jobs: list[tuple[dict[str, Any], dict[str, Tensor]]], *, progress: Progress | None = None
    ) -> list[Message]:
        """Job i on rank i; the answers in the order of ranks. Raises RankDied, or what `progress` raises."""
        if not 1 <= len(jobs) <= MOST:
            raise ValueError(f"ranks must be from 1 to {MOST}, not {len(jobs)}")
        while not self._lock.acquire(timeout=TICK):
            if progress is not None:
                progress("waiting", 0, len(jobs))
        try:
            self._stop_timer()
            try:
                self._start(len(jobs), progress)
                self._count += 1
                store = str(self._home() / f"store-{self._count}")
                for worker, (job, tensors) in zip(self._workers, jobs, strict=False):
                    # A thread, because a stopped process would not empty its pipe.
                    arguments = (worker, {**job, "store": store, "timeout": self.timeout}, tensors)
                    threading.Thread(target=_hand, args=arguments, daemon=True).start()
                answers = self._gather(range(len(jobs)), "running", progress, self.timeout)
                with contextlib.suppress(OSError):
                    os.unlink(store)
            except BaseException:
                self._close()
                raise
            self._timer = threading.Timer(self.idle, _close_idle, (weakref.ref(self),))
            self._timer.daemon = True
            self._timer.start()
            return answers
        finally:
            self._lock.release()

    def _home(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="leanscope-ring-"))
            self._folders.append(self._folder)
        return self._folder

    def _start(self, count: int, progress: Progress | None) -> None:
        if any(worker.poll() is not None for worker in self._workers):
            self._close()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        if LOOPBACK.exists():
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # the ring is on this machine, whatever its name resolves to
        for rank in range(len(self._workers), count):
            with open(self._home() / f"rank-{rank}.log", "wb") as log:
                self._workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "engine.exact.rank", str(os.getpid())],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        bufsize=0,
                        env=environment,
                        cwd=ROOT,
                    )
                )
        self._gather(range(self._ready, len(self._workers)), "starting", progress, START)
        self._ready = len(self._workers)

    def _gather(self, ranks: range, stage: str, progress: Progress | None, timeout: float) -> list[Message]:
        """One message of each of these ranks."""
        answers: dict[int, Message] = {}
        end = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for rank in ranks:
                selector.register(_pipe(self._workers[rank].stdout), selectors.EVENT_READ, rank)
            while len(answers) < len(ranks):
                if progress is not None:
                    progress(stage, len(answers), len(ranks))
                for ready, _ in selector.select(TICK):
                    try:
                        answers[ready.data] = read(_pipe(self._workers[ready.data].stdout))
                    except (EOFError, OSError):
                        raise RankDied(self._obituary(ready.data)) from None
                    selector.unregister(ready.fileobj)
                    if error := answers[ready.data][0].get("error"):
                        raise RankDied(self._who_died(ready.data, error))
                if time.monotonic() > end:
                    silent = ", ".join(str(rank) for rank in ranks if rank not in answers)
                    raise RankDied(f"The ring was ended: rank {silent} did not answer in {timeout:g} seconds.")
        if progress is not None:
            progress(stage, len(ranks), len(ranks))
        return [answers[rank] for rank in ranks]

    def _who_died(self, rank: int, error: str) -> str:
        """A rank complains: of its own trouble, or because a neighbour is gone, who is then named."""
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            for other, worker in enumerate(self._workers):
                if worker.poll() is not None:
                    return self._obituary(other)
            time.sleep(0.02)
        return f"The ring was ended: rank {rank} failed ({error.splitlines()[0][:300]})."

    def _obituary(self, rank: int) -> str:
        worker = self._workers[rank]
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(1.0)
        code = worker.returncode
        if code is None:
            return f"The ring was ended: rank {rank} closed its pipe."
        return f"The ring was ended: rank {rank} died ({f'signal {-code}' if code < 0 else f'exit code {code}'})."

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._stop_timer()
        _end(self._workers, self._folders)
        self._folder, self._ready = None, 0


def _hand(worker: subprocess.Popen[bytes], job: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    with contextlib.suppress(OSError, ValueError):  # it died: its pipe tells `_gather`
        write(_pipe(worker.stdin), job, tensors)


def _pipe(pipe: IO[bytes] | None) -> Any:
    assert pipe is not None  # all were asked for
    return pipe


def _close_idle(pool: weakref.ref[Pool]) -> None:
    living = pool()
    if living is not None and living._lock.acquire(blocking=False):  # busy: its run sets a timer of its own
        try:
            living._close()
        finally:
            living._lock.release()


def _end(workers: list[subprocess.Popen[bytes]], folders: list[Path]) -> None:
    """Kill, reap, close the pipes, remove the files. Called too when the pool is collected or Python ends."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            with contextlib.suppress(OSError):
                _pipe(pipe).close()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    workers.clear()
    folders.clear()
