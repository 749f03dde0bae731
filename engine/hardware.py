"""What this machine is and what it can do: the device, its memory levels, its measured bandwidth and FLOP/s.

Every bound that a lesson draws (roofline, tokens a second) rests on the two measured numbers here. They are
the best of several tries, taken once a process: the ceiling of the machine, not what it gives under load.
The device is chosen in this file and nowhere else.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import RLock

import torch

from engine.timing import now

CPU_CACHES = Path("/sys/devices/system/cpu")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
PIECE = 2**23  # bytes of one timed read
TRIES = 60  # at least, of short work: more than other work on the machine can all disturb
MEASURING = RLock()  # two measurements at a time would halve each other


@dataclass(frozen=True)
class Machine:
    """What runs the models. `memory` and `gpu_memory` are in bytes; `gpu` is None without one."""

    cpu: str
    cores: int
    memory: int
    gpu: str | None
    gpu_memory: int
    torch: str


@dataclass(frozen=True)
class Level:
    """One level of memory, nearest first: `size` bytes in each of `count` places (a core's own cache, say)."""

    name: str
    size: int
    count: int = 1

    @property
    def capacity(self) -> int:
        return self.size * self.count


def device() -> torch.device:
    """Where models run: CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def threads() -> int:
    """How many CPU threads a run may use: the cores given to this process, no more than its quota allows, and no more
    than OMP_NUM_THREADS says, where it is set to a number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # OpenMP takes a list, one a nested level
    if asked.isascii() and asked.isdigit() and int(asked) > 0:
        cores = min(cores, int(asked))
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
        # A container may see 64 cores and own two: threads past the quota only stall each other.
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


@cache
def describe() -> Machine:
    """The machine in words and numbers."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return Machine(
        cpu=_cpu_name(),
        cores=threads(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=gpu.name if gpu else None,
        gpu_memory=gpu.total_memory if gpu else 0,
        torch=torch.__version__,
    )


def devices() -> tuple[str, ...]:
    """The kinds of device that are here, the one that `device` chooses first."""
    return ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)


def memory_levels(where: torch.device | None = None) -> tuple[Level, ...]:
    """A device's data caches and its memory, nearest first; memory alone where the system does not tell.

    Without `where` the CPU's. Of a GPU the cache that all its units share is told.
    """
    if where is not None and where.type == "cuda":
        gpu = torch.cuda.get_device_properties(where)
        return (Level("L2", gpu.L2_cache_size), Level("memory", gpu.total_memory))
    places: dict[str, dict[str, int]] = {}  # level name → the cores that share one place → its bytes
    for folder in CPU_CACHES.glob("cpu[0-9]*/cache/index*"):
        try:
            kind, number, size, cores = (
                (folder / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
            if kind != "Instruction":
                places.setdefault(f"L{number}", {})[cores] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    caches = [Level(name, max(found.values()), len(found)) for name, found in sorted(places.items())]
    return (*caches, Level("memory", describe().memory))


def holder(nbytes: int, where: torch.device | None = None) -> Level:
    """The nearest level that holds `nbytes` for the threads that work: where the weights of a small model come to sit.

    Of a level that each core has to itself only those of `threads` cores count.
    """
    levels = memory_levels(where)
    used = threads()
    return next((level for level in levels if level.size * min(level.count, used) >= nbytes), levels[-1])


def bandwidth(where: torch.device | None = None, *, size: int | None = None) -> float:
    """Bytes a second that a streaming read reaches: the best of many sums over pieces of one big tensor.

    `size` is how many bytes are read over and over: by default eight times the caches, so that they come
    from memory; smaller than a cache, it measures that cache. Pieces are short, so that a machine that does other
    things too leaves some of them alone.
    """
    where = where or device()
    if size is None:
        caches = sum(level.capacity for level in memory_levels()[:-1])
        size = 2**30 if where.type == "cuda" else max(2**28, min(8 * caches, 2**30))
    return _bandwidth(where, size)


def flops(dtype: torch.dtype, where: torch.device | None = None) -> float:
    """Floating-point operations a second of a big square matmul in `dtype`, multiply and add counted as two.

    The side grows until one product takes half a millisecond: a dtype without fast kernels is not waited for, and a
    machine that does other things too leaves some products alone.
    """
    return _flops(dtype, where or device())


@cache
def _bandwidth(where: torch.device, size: int) -> float:
    with MEASURING:
        data = torch.ones(size // 4, device=where)
        pieces = data.split(len(data) if where.type == "cuda" else PIECE // 4)
        pieces = [piece for piece in pieces if len(piece) == len(pieces[0])]
        turn = itertools.cycle(pieces)
        return pieces[0].nbytes / _best(lambda: next(turn).sum(), where, seconds=0.3, least=TRIES)


@cache
def _flops(dtype: torch.dtype, where: torch.device) -> float:
    with MEASURING:
        side = 256
        while True:
            a = torch.ones(side, side, dtype=dtype, device=where)
            took = _best(lambda a=a: a @ a, where, seconds=0.0)  # type: ignore[misc]
            if took > 0.0005 or side >= (16384 if where.type == "cuda" else 4096):
                break
            side *= 2
        return 2 * side**3 / min(took, _best(lambda: a @ a, where, seconds=0.2, least=TRIES))


def _best(work: Callable[[], object], where: torch.device, *, seconds: float, least: int = 3) -> float:
    """The shortest time of `work` in at least `least` tries after a warm-up, trying for about `seconds`."""
    work()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        began = now(where)
        work()
        times.append(now(where) - began)
    return min(times)


def fast_dtype(where: torch.device | None = None) -> torch.dtype:
    """bfloat16 where its products are native (CUDA, or a CPU that lists avx512_bf16 or amx_bf16), else float32.

    Where they are not, bfloat16 is emulated, and slower than float32.
    """
    if (where or device()).type == "cuda":
        return torch.bfloat16
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return torch.bfloat16
    return torch.float32


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
