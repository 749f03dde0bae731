"""The slow tier: every expert of a model in one file on disk, read one expert at a time with the real wait timed.

Eliseev and Mazur (arXiv:2312.17238), section 3.3: an expert is one contiguous piece, so that one read brings it all.
Paper -> here: system memory behind PCIe = a file behind a memory map; the expert's buffer = a flat tensor.

The operating system keeps pages of files that it has read, and would answer a second read from memory. With `cold`,
each read first tells it to drop the expert's pages (posix_fadvise, where there is one: not on macOS or Windows), so
that every read goes to the disk again; a disk may still have a cache of its own. `bandwidth` makes the tier slower
than it is, to stand for another: each read then takes bytes / bandwidth seconds at least, and says so (`simulated`).
Errors: ValueError for a bandwidth not above 0, a file that is not of this model.
"""

from __future__ import annotations

import copy
import json
import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CAN_DROP = hasattr(os, "posix_fadvise")
ALIGN = 64  # bytes: where a tensor of its own would start, so that kernels take the same path


def flat_size(module: nn.Module) -> int:
    """Values of the flat tensor that holds all parameters of `module`, each starting at a multiple of ALIGN bytes."""
    return sum(_padded(p) for p in module.parameters())


def flattened(module: nn.Module) -> Tensor:
    """The parameters of `module` one after the other, on the CPU: [flat_size]."""
    flat = torch.zeros(flat_size(module), dtype=next(module.parameters()).dtype)
    at = 0
    for p in module.parameters():
        flat[at : at + p.numel()] = p.detach().flatten().cpu()
        at += _padded(p)
    return flat


def view_into(module: nn.Module, flat: Tensor) -> None:
    """Make the parameters of `module` views of `flat`: whatever is copied into it is then what the module computes."""
    at = 0
    for p in module.parameters():
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += _padded(p)


def _padded(p: Tensor) -> int:
    values = ALIGN // p.element_size()
    return -(-p.numel() // values) * values


def store(experts: dict[tuple[int, int], nn.Module], path: Path) -> None:
    """Write experts by (layer, number) to one safetensors file, each as one flat tensor."""
    save_file({_name(key): flattened(module) for key, module in experts.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # what is not on the disk yet cannot be dropped from memory


class Slot:
    """Memory for one expert: a flat buffer, and a network whose weights are views of it."""

    def __init__(self, like: nn.Module) -> None:
        p = next(like.parameters())
        with torch.inference_mode(False):  # else another thread could not fill what a run in that mode made
            self.module = copy.deepcopy(like).eval().requires_grad_(False)
            self.flat = torch.zeros(flat_size(like), dtype=p.dtype, device=p.device)
            view_into(self.module, self.flat)


@dataclass(frozen=True)
class Read:
    """One read: when it began and ended on `time.perf_counter`, the bytes, and the seconds of it that were made up."""

    began: float
    ended: float
    bytes: int
    simulated: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Tier:
    """The file of `store`. One read at a time: it stands for one link to one disk. Close it when done."""

    def __init__(self, path: Path, *, cold: bool = True, bandwidth: float | None = None) -> None:
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"bandwidth must be a number of bytes a second above 0, not {bandwidth}")
        self.cold, self.bandwidth = cold and CAN_DROP, bandwidth
        self._lock = Lock()
        self._file = path.open("rb")
        length = struct.unpack("<Q", self._file.read(8))[0]
        header: dict[str, Any] = json.loads(self._file.read(length))
        self._where = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        self._start = 8 + length

    def read(self, key: tuple[int, int], into: Tensor) -> Read:
        """Copy an expert into the flat tensor `into` and wait until it is there."""
        if _name(key) not in self._where:
            raise ValueError(f"the file holds no expert {key[1]} of layer {key[0]}")
        low, high = self._where[_name(key)]
        if high - low != into.nbytes:
            raise ValueError(f"an expert in the file has {high - low} bytes, and the model's have {into.nbytes}")
        with self._lock:
            began = time.perf_counter()
            self._copy(self._start + low, high - low, into)
            real = time.perf_counter() - began
            made_up = 0.0
            if self.bandwidth is not None and real < (high - low) / self.bandwidth:
                made_up = (high - low) / self.bandwidth - real
                time.sleep(made_up)
            return Read(began, time.perf_counter(), high - low, made_up)

    def _copy(self, at: int, count: int, into: Tensor) -> None:
        number = self._file.fileno()
        if self.cold:
            os.posix_fadvise(number, at, count, os.POSIX_FADV_DONTNEED)
        first = at - at % mmap.ALLOCATIONGRANULARITY
        # A map of its own for each read: pages that are mapped anywhere cannot be dropped.
        with mmap.mmap(number, at - first + count, offset=first, access=mmap.ACCESS_READ) as pages:
            source = np.frombuffer(pages, np.uint8, count, at - first)
            goal = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
            np.copyto(goal.view(torch.uint8).numpy(), source)
            del source  # the map cannot be closed while an array looks into it
        if goal is not into:
            into.copy_(goal)

    def close(self) -> None:
        self._file.close()


def _name(key: tuple[int, int]) -> str:
    return f"layer{key[0]:03d}.expert{key[1]:04d}"  # sorted as read: by layer, then by expert
