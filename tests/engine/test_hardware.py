"""Laws of a machine: nearer memory is smaller and not slower, and nothing computes faster than it is measured to."""

import os
import time
from pathlib import Path

import pytest
import torch

from engine import hardware


def test_the_device_is_cuda_when_there_is_one():
    assert hardware.device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_threads_are_the_cores_of_this_process_and_of_its_quota(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(hardware, "CGROUP_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert hardware.threads() == 8
    for text, count in (("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("", 8)):
        quota.write_text(text)
        assert hardware.threads() == count
    for asked, count in (("1", 1), ("3", 3), (" 4,2", 4), ("99", 8), ("0", 8), ("-2", 8), ("many", 8), ("", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert hardware.threads() == count


def test_the_devices_that_are_here_begin_with_the_one_that_is_chosen():
    found = hardware.devices()
    assert found[0] == hardware.device().type
    assert "cpu" in found
    assert ("cuda" in found) == torch.cuda.is_available()


def test_the_machine_describes_itself():
    machine = hardware.describe()
    assert machine.cpu
    assert machine.cores == hardware.threads() >= 1
    assert machine.memory > 2**28
    assert (machine.gpu is not None) == torch.cuda.is_available()
    assert machine.torch == torch.__version__


def test_memory_levels_are_read_from_the_system(tmp_path, monkeypatch):
    def cache(cpu: int, index: int, level: int, kind: str, size: str, shared: str) -> None:
        folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in {"level": level, "type": kind, "size": size, "shared_cpu_list": shared}.items():
            (folder / name).write_text(f"{text}\n")

    for cpu in (0, 1):
        cache(cpu, 0, 1, "Data", "48K", str(cpu))
        cache(cpu, 1, 1, "Instruction", "32K", str(cpu))
        cache(cpu, 2, 2, "Unified", "1024K", str(cpu))
        cache(cpu, 3, 3, "Unified", "32768K", "0-1")
    (tmp_path / "cpu1" / "cache" / "index9").mkdir()  # a level that tells nothing is left out
    monkeypatch.setattr(hardware, "CPU_CACHES", tmp_path)
    monkeypatch.setattr(hardware, "threads", lambda: 2)
    levels = hardware.memory_levels()
    assert [(level.name, level.size, level.count) for level in levels[:-1]] == [
        ("L1", 48 * 1024, 2), ("L2", 1024 * 1024, 2), ("L3", 32 * 1024 * 1024, 1)
    ]  # fmt: skip
    assert levels[-1] == hardware.Level("memory", hardware.describe().memory)
    holders = {1: "L1", 96 * 1024: "L1", 96 * 1024 + 1: "L2", 33_000_000: "L3", 34_000_000: "memory", 10**15: "memory"}
    assert {size: hardware.holder(size).name for size in holders} == holders
    monkeypatch.setattr(hardware, "threads", lambda: 1)  # one thread fills one core's caches
    assert [hardware.holder(size).name for size in (48 * 1024, 96 * 1024, 2**20, 2**20 + 1)] == ["L1", "L2", "L2", "L3"]
    monkeypatch.setattr(hardware, "CPU_CACHES", tmp_path / "none")
    assert [level.name for level in hardware.memory_levels()] == ["memory"]


@pytest.fixture
def unmeasured():
    hardware._bandwidth.cache_clear()
    hardware._flops.cache_clear()


@pytest.mark.usefixtures("unmeasured")
def test_what_is_measured_is_a_bound_and_is_measured_once():
    cpu = torch.device("cpu")
    read = hardware.bandwidth(cpu)
    assert 1e8 < read < 1e13
    assert hardware.bandwidth(cpu) == read
    peak = hardware.flops(torch.float32, cpu)
    assert 1e8 < peak < 1e14
    assert hardware.flops(torch.float32, cpu) == peak
    assert hardware.flops(torch.float64, cpu) < 4 * peak


def test_the_best_time_is_the_shortest_of_three_at_least(monkeypatch):
    clock = iter([0.0, 5.0, 5.0, 7.0, 7.0, 10.0, *range(20, 38)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls = []
    assert hardware._best(lambda: calls.append(1), torch.device("cpu"), seconds=1.0) == 2.0
    assert len(calls) == 4  # one to warm up
    assert hardware._best(lambda: calls.append(1), torch.device("cpu"), seconds=0.0, least=9) == 1.0
    assert len(calls) == 4 + 10


@pytest.mark.usefixtures("unmeasured")
def test_bytes_and_flops_are_those_of_the_work_timed(monkeypatch):
    # A clock by which every try takes a quarter of a second makes the counts visible.
    monkeypatch.setattr(hardware, "_best", lambda work, where, *, seconds, least=3: (work(), 0.25)[1])
    assert hardware.bandwidth(torch.device("cpu"), size=2**20) == 4 * 2**20
    assert hardware.bandwidth(torch.device("cpu"), size=2**25) == 4 * hardware.PIECE  # read piece by piece
    assert hardware.flops(torch.float32, torch.device("cpu")) == 4 * 2 * 256**3
    hardware._bandwidth.cache_clear()
    hardware._flops.cache_clear()


def test_the_fast_dtype_is_native_here():
    """bfloat16 only where the CPU says that it multiplies it, and always on a GPU."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    native = "avx512_bf16" in flags or "amx_bf16" in flags
    assert hardware.fast_dtype(torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
    assert hardware.fast_dtype(torch.device("cuda")) == torch.bfloat16
