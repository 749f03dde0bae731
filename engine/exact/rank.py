"""One process of the ring: `python -m engine.exact.rank PARENT`, started by `workers.Pool`, speaks through its pipes.

It computes its queries against the block that it holds while the next comes in (Ring Attention, arXiv:2310.01889), and
merges what it found by log-sum-exp: with L, o so far and L', o' of the new tile

    o <- o - σ(L' - L) (o - o'),   L <- log(e^L + e^L')

It ends by itself when its pipe closes or its parent is another than it was: no process is left behind.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import struct
import sys
import threading
import time
from datetime import timedelta
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

Message = tuple[dict[str, Any], dict[str, Tensor]]


def write(pipe: BinaryIO, header: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
    """One message: two lengths, JSON, safetensors."""
    head, body = json.dumps(header).encode(), save(tensors) if tensors else b""
    data = memoryview(struct.pack("<QQ", len(head), len(body)) + head + body)
    while data:
        data = data[pipe.write(data) :]


def read(pipe: BinaryIO) -> Message:
    """The next message. EOFError when the other side is gone."""
    head, body = struct.unpack("<QQ", _exactly(pipe, 16))
    header = json.loads(_exactly(pipe, head))
    return header, load(_exactly(pipe, body)) if body else {}


def _exactly(pipe: BinaryIO, count: int) -> bytes:
    parts = []
    while count:
        part = pipe.read(min(count, 2**24))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def partial(q: Tensor, k: Tensor, v: Tensor, *, offset: int | None) -> tuple[Tensor, Tensor]:
    """Attention to these keys alone, and its log-sum-exp. `offset`: first query's place less first key's; None: all."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if offset is not None:
        rows = torch.arange(q.shape[-2], device=q.device)[:, None] + offset
        scores = scores.masked_fill(torch.arange(k.shape[-2], device=q.device) > rows, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v, lse


def merge(o: Tensor, lse: Tensor, o_new: Tensor, lse_new: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial answers as one. Rows that have met no key yet have lse = -inf; the new ones have met some."""
    share = torch.sigmoid(lse_new - lse)[..., None]
    return o - share * (o - o_new), torch.logaddexp(lse, lse_new)


def travel(job: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Message:
    """This rank's part of one ring: every block comes by once."""
    rank, size, kept, causal = job["rank"], job["ranks"], job["blocks"], job["causal"]
    cuda = job["backend"] == "nccl"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    store = dist.FileStore(job["store"], size)
    dist.init_process_group(
        job["backend"], store=store, rank=rank, world_size=size, timeout=timedelta(seconds=job["timeout"])
    )
    try:
        q, kv = q.to(device), torch.stack((k, v)).to(device)  # B H Tr D, 2 B H Tr D
        o, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
        events: list[dict[str, Any]] = []
        sent = computed = skipped = scores = incoming = 0
        dist.barrier()
        for step in range(size):
            block = (rank - step) % size
            carry = None
            if step < size - 1:
                coming = (block - 1) % size
                length = sum(stop - start for start, stop in kept[coming])
                nxt = kv.new_empty(*kv.shape[:3], length, kv.shape[-1])
                carry = _Carry(kv, nxt, rank, size, job["link"])
                sent, incoming = sent + kv.nbytes, max(incoming, nxt.nbytes + kv.nbytes)
                if not job["overlap"]:
                    carry.join()
            begin, used = time.monotonic_ns(), time.thread_time_ns()
            place_q = 0
            for queries in kept[rank]:
                rows = slice(place_q, place_q := place_q + queries[1] - queries[0])
                place_k = 0
                for keys in kept[block]:
                    columns = slice(place_k, place_k := place_k + keys[1] - keys[0])
                    if causal and keys[0] >= queries[1]:
                        skipped += 1
                        continue
                    offset = queries[0] - keys[0] if causal and keys[1] - 1 > queries[0] else None
                    found = partial(q[..., rows, :], kv[0, ..., columns, :], kv[1, ..., columns, :], offset=offset)
                    o[..., rows, :], lse[..., rows] = merge(o[..., rows, :], lse[..., rows], *found)
                    computed += 1
                    scores = max(scores, found[1].numel() * (keys[1] - keys[0]) * q.element_size())
            if cuda:
                torch.cuda.synchronize(device)
            end = time.monotonic_ns()
            work = end - begin if cuda else time.thread_time_ns() - used  # without the time that others had the core
            events.append({**_event("compute", step, block, begin, end), "work": work})
            if carry is not None:
                carry.join()
                events.append(_event("send", step, block, carry.begin, carry.sent))
                events.append(_event("recv", step, coming, carry.begin, carry.received))
                kv = nxt
        dist.barrier()
    finally:
        dist.destroy_process_group()
    memory = q.nbytes + o.nbytes + lse.nbytes + max(incoming, kv.nbytes)
    counted = {"sent": sent, "computed": computed, "skipped": skipped, "memory": memory, "scores": scores}
    return {"rank": rank, "events": events, **counted}, {"output": o.cpu(), "lse": lse.cpu()}


class _Carry:
    """One block out and one in, behind the computing. With `link` bytes a second it is held up to that speed."""

    def __init__(self, out: Tensor, into: Tensor, rank: int, size: int, link: float | None) -> None:
        self.begin = self.sent = self.received = time.monotonic_ns()
        ops = [
            dist.P2POp(dist.isend, out, (rank + 1) % size),
            dist.P2POp(dist.irecv, into, (rank - 1) % size),
        ]
        self._works = dist.batch_isend_irecv(ops)
        self._sizes = (out.nbytes, into.nbytes)
        self._link, self._device = link, out.device
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            for work in self._works:
                work.wait()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.sent = self.received = time.monotonic_ns()
            if self._link:
                out, into = (self.begin + int(1e9 * size / self._link) for size in self._sizes)
                time.sleep(max(0, max(out, into) - self.sent) / 1e9)
                self.sent, self.received = max(self.sent, out), max(self.received, into)
        except Exception as error:
            self._error = error

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def _event(kind: str, step: int, block: int, begin: int, end: int) -> dict[str, Any]:
    return {"kind": kind, "step": step, "block": block, "begin": begin, "end": end}


def _watch(parent: int) -> None:
    """The pipe tells first, as a rule; a process forked from the parent may hold it open, though."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os._exit(1)


def _listen(pipe: BinaryIO, jobs: queue.SimpleQueue[Message]) -> None:
    try:
        while True:
            jobs.put(read(pipe))
    except (EOFError, OSError):
        os._exit(0)


def main() -> None:
    """Answer jobs until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    out = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # what libraries print is no message
    jobs: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_watch, args=(int(sys.argv[1]),), daemon=True).start()
    threading.Thread(target=_listen, args=(os.fdopen(os.dup(0), "rb", 0), jobs), daemon=True).start()
    torch.set_num_threads(1)
    write(out, {"ready": True})
    while True:
        job, tensors = jobs.get()
        try:
            with torch.no_grad():
                answer, found = travel(job, **tensors)
        except Exception as error:
            answer, found = {"error": f"{type(error).__name__}: {error}"}, {}
        write(out, answer, found)


if __name__ == "__main__":
    main()
