r"""Expert offloading: a few experts in memory, all of them on disk, and the next layer's fetched before they are asked.

Eliseev and Mazur (arXiv:2312.17238), section 3.1: each layer keeps its k most recently used experts (LRU); section
3.2: the next layer's router, applied to this layer's hidden state, guesses what to load while this layer computes. What
was loaded ahead lies beside the cache, and enters it (for the least recently used) when it is really asked for.
Paper -> here: cache size k = size; experts loaded ahead = ahead; a hit = a request for an expert in the cache or
beside it, even if it is still on its way; recall of speculative loading = `Counts.recall`.

A pass over several tokens asks for an expert once. What lay beside enters the cache just as a miss does, so that what
the cache holds does not depend on `ahead`, and nothing but seconds depends on timing: no load is ever called off.
Memory: (size · layers + ahead) experts, or size + ahead with one cache for all layers; each is one flat buffer that is
made at the start, so that no more can ever be held. Size 0 is an error: the expert at work must lie somewhere.
Deviations: the slow tier is a disk (the paper: main memory, with quantised experts); the hidden state that is guessed
from is the one normed for this layer's experts.

    store_experts(model, path)
    with Offload(model, path, size=2, ahead=2) as shelf:
        for token in generate(shelf.model, ids, steps=20, cache=Full()): ...
    shelf.counts.hit_rate
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from engine.model import Decoder
from engine.moe.experts import Experts, gathered, show
from engine.moe.lru import LRU, Counts, Key, served_first
from engine.moe.tier import Read, Slot, Tier, store
from engine.quant import copied
from engine.recording import event, recording_on, site, tap

RESIDENT = site("offload.resident", "which experts of a layer lie in its cache after it has worked", low=0.0, high=1.0)
GUESS = site("offload.guess", "the next layer's router on this layer's hidden state: mean probability of each expert",
             low=0.0, high=1.0)  # fmt: skip


@dataclass
class _Ahead:
    """A load under way, or done, into a slot beside the cache."""

    key: Key
    slot: Slot
    read: Future[Read]


def _mixtures(model: Decoder) -> dict[int, Experts]:
    found = {i: block.ffn for i, block in enumerate(model.blocks) if isinstance(block.ffn, Experts)}
    if not found:
        raise ValueError("model must have a layer of experts at least, and it has none")
    return found


def store_experts(model: Decoder, path: Path) -> None:
    """Write all experts of `model` to `path`: what `Offload` reads."""
    store({(i, e): m for i, mixture in _mixtures(model).items() for e, m in enumerate(mixture.experts)}, path)


class Offload:
    """`model` is a copy of the given one whose experts stay on disk. One reader at a time; close it, or use `with`.

    `size` experts are kept in each layer, or in all together with `shared`; `ahead` are loaded ahead, 0 for none.
    `counts` tells what happened, and so do the events offload.hit, .miss, .evict, .load, .expert and .others: layer,
    expert, bytes, seconds, and start in seconds since `zero`.
    """

    def __init__(
        self,
        model: Decoder,
        path: Path,
        *,
        size: int,
        shared: bool = False,
        ahead: int = 0,
        cold: bool = True,
        bandwidth: float | None = None,
    ) -> None:
        mixtures = _mixtures(model)
        like = next(iter(mixtures.values())).experts
        if not 0 <= ahead <= len(like):
            raise ValueError(f"ahead must be a number of experts from 0 to {len(like)}, not {ahead}")
        caches = [LRU[Key](size) for _ in range(1 if shared else len(mixtures))]
        self._cache = {i: caches[0 if shared else n] for n, i in enumerate(mixtures)}
        slots = [Slot(like[0]) for _ in range(size * len(caches) + ahead)]
        self.expert_bytes, self.budget = slots[0].flat.nbytes, slots[0].flat.nbytes * len(slots)
        self._free, self._beside = slots[ahead:], slots[:ahead]
        self._held: dict[Key, Slot] = {}
        self._coming: dict[Key, _Ahead] = {}
        self._wasted: list[_Ahead] = []
        self._guess: set[Key] = set()
        self.model = cast(Decoder, copied(model))
        self._shelved = {i: _Shelved(mixture, self) for i, mixture in mixtures.items()}
        for i, part in self._shelved.items():
            self.model.blocks[i].ffn = part
        self._next = dict(zip(mixtures, list(mixtures)[1:], strict=False))
        self._experts, self._sync, self.ahead = len(like), slots[0].flat.is_cuda, ahead
        self.tier = Tier(path, cold=cold, bandwidth=bandwidth)
        self._worker = ThreadPoolExecutor(1, "expert") if ahead else None
        self.counts, self.zero = Counts(), time.perf_counter()
        self._done = self.zero  # when the experts of the layer before were done

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Call off the loads that wait, and close the file."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
        self.tier.close()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the experts in memory, and of those on their way; never above `budget`."""
        return self.expert_bytes * (len(self._held) + len(self._coming))

    def serve(self, layer: int, needed: list[int], x: Tensor) -> Iterator[tuple[int, nn.Module]]:
        """The experts that `layer` needs for its hidden state x [N, W], those in memory first."""
        if layer - 1 in self._next:
            self._tell("others", layer, start=self._done, seconds=self._now() - self._done)
        keys = served_first([(layer, e) for e in needed], self._cache[layer])
        self._judge(layer, keys)
        for n, key in enumerate(keys, 1):
            slot = self._fetch(key)
            if n == len(keys):  # all is loaded: from here on the link is idle
                self._give_up(layer)
                self._look_ahead(layer, x)
            began = self._now()
            yield key[1], slot.module
            self._tell("expert", *key, start=began, seconds=self._now() - began)
        self._give_up(layer)  # for a layer that asked for nobody
        if recording_on(RESIDENT, layer=layer):
            held = [float((layer, e) in self._held) for e in range(self._experts)]
            tap(RESIDENT, torch.tensor(held), "expert", layer=layer)
        self._done = self._now()

    def _fetch(self, key: Key) -> Slot:
        """The expert in memory, loaded if it must be."""
        self.counts.requests += 1
        began = time.perf_counter()
        hit, gone = self._cache[key[0]].use(key)
        if hit:
            self.counts.hits += 1
            self._tell("hit", *key, start=began, seconds=0.0, early=False)
            return self._held[key]
        if gone is not None:
            self.counts.evictions += 1
            self._tell("evict", *gone, start=began, bytes=self.expert_bytes)
        room = self._free.pop() if gone is None else self._held.pop(gone)
        coming = self._coming.pop(key, None)
        if coming is None:
            self.counts.misses += 1
            self.counts.bytes += self.expert_bytes
            read, slot = self.tier.read(key, room.flat), room
        else:
            self.counts.hits += 1
            self.counts.early += 1
            read, slot = coming.read.result(), coming.slot
            self._beside.append(room)
        self._held[key] = slot
        seconds = time.perf_counter() - began
        self.counts.waited += seconds
        self._tell_load(key, read, why="miss" if coming is None else "ahead")
        if coming is None:
            self._tell("miss", *key, start=began, seconds=seconds, bytes=read.bytes)
        else:
            self._tell("hit", *key, start=began, seconds=seconds, early=True)
        return slot

    def _look_ahead(self, layer: int, x: Tensor) -> None:
        """Start loading what the next layer will probably ask for."""
        after = self._next.get(layer)
        if after is None or self._worker is None:
            return
        likely = tap(GUESS, self._shelved[after].router(x).softmax(-1).mean(0), "expert", layer=after)
        self._guess = {(after, e) for e in likely.topk(self.ahead).indices.tolist()}
        for key in sorted(self._guess, key=lambda key: -float(likely[key[1]])):
            if key not in self._cache[after]:
                slot = self._beside.pop(0)
                self.counts.bytes += self.expert_bytes
                self._coming[key] = _Ahead(key, slot, self._worker.submit(self.tier.read, key, slot.flat))

    def _judge(self, layer: int, keys: list[Key]) -> None:
        if any(key[0] == layer for key in self._guess):
            self.counts.guessed += len(self._guess)
            self.counts.right += len(self._guess.intersection(keys))
            self.counts.foreseeable += len(keys)
            self._guess = set()

    def _give_up(self, layer: int) -> None:
        """Free the slots of what was loaded ahead for `layer` and not asked for."""
        for key in [key for key in self._coming if key[0] == layer]:
            late = self._coming.pop(key)
            self._beside.append(late.slot)  # even if it is being filled: the next load into it waits its turn
            self._wasted.append(late)
        for late in [late for late in self._wasted if late.read.done()]:
            self._wasted.remove(late)
            self._tell_load(late.key, late.read.result(), why="wasted")

    def _tell_load(self, key: Key, read: Read, *, why: str) -> None:
        simulated = read.simulated
        self._tell("load", *key, start=read.began, seconds=read.seconds, simulated=simulated, bytes=read.bytes, why=why)

    def _tell(self, name: str, layer: int, expert: int = -1, *, start: float, **facts: object) -> None:
        event(f"offload.{name}", layer=layer, expert=expert, start=start - self.zero, **facts)

    def _now(self) -> float:
        if self._sync:
            torch.cuda.synchronize()
        return time.perf_counter()


class _Shelved(nn.Module):
    """Takes the place of `Experts`: the same router and shared experts, the others from the shelf."""

    def __init__(self, like: Experts, shelf: Offload) -> None:
        super().__init__()
        self.layer, self.route, self._shelf = like.layer, like.route, shelf
        self.router, self.shared = like.router, like.shared
        self._per_token = like.multiplications(rows=1)

    def multiplications(self, *, rows: int) -> int:
        return rows * self._per_token

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # N W
        routing = self.route(self.router(tokens))
        show(routing, self.layer)
        y = gathered(tokens, routing, lambda needed: self._shelf.serve(self.layer, needed, tokens))
        for expert in self.shared:
            y = y + expert(tokens)
        return y.view_as(x)
