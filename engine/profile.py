"""Where the time of a forward pass goes: each operation timed, beside the FLOPs and bytes that were counted for it.

The roofline of Williams et al. 2009 (Communications of the ACM 52(4)) sets an operation's FLOPs a second over its
FLOPs a byte. Paper -> here: operational intensity = `Work.intensity`, attainable FLOP/s = `cost.attainable_flops`.

The pass that is timed is the model's own: its modules are copied with a clock before and after each, its weights are
shared. Attention is what the mixer takes beyond `qkv` and `out`: rotation, cache and the products with keys and values.
Layers are alike, so an operation's time is one layer's times their number. Which one: a machine that does other things
too disturbs some, so it is the time that a quarter of them stay under, over several passes (the roof is a best, too).
Other passes, without clocks between, tell what the whole takes: all their times are kept. On CUDA the clock waits for
the device, so that an operation's time holds its launch.
Deviations: norms, embedding and what joins them have no counted FLOPs. Bytes are weights and cache, not activations.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import cost
from engine.caches.full import Full
from engine.mixers.rope import rope_tables
from engine.mixers.softmax import SoftmaxAttention
from engine.model import Decoder
from engine.recording import site, tap
from engine.timing import now

OPERATIONS = ("embedding", "qkv", "attention", "out", "ffn", "norms", "head")
PHASES = ("decode", "prefill")
MOST = 40  # passes of each kind

SECONDS = site("profile.seconds", f"time of each operation, all layers, least disturbed: {', '.join(OPERATIONS)}",
               low=0.0, unit="s")  # fmt: skip
FLOPS = site("profile.flops", "floating-point operations counted for each of them", low=0.0)
BYTES = site("profile.bytes", "bytes of weights and cache that each of them must move", low=0.0, unit="B")
PASSES = site("profile.passes", "time of each whole pass, without clocks between", low=0.0, unit="s")


@dataclass(frozen=True)
class Profile:
    """One kind of pass: `work` and `seconds` by operation, in the order of OPERATIONS; whole `passes`, in seconds."""

    phase: str
    batch: int
    tokens: int
    work: tuple[cost.Work, ...]
    seconds: tuple[float, ...]
    passes: tuple[float, ...]

    @property
    def whole(self) -> float:
        """The median pass."""
        return statistics.median(self.passes)

    @property
    def best(self) -> float:
        """The quickest pass: the one that was disturbed least, by which a bound is tested."""
        return min(self.passes)

    @property
    def spread(self) -> float:
        """How far the passes lie apart: the slowest over the quickest."""
        return max(self.passes) / min(self.passes)

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.work)

    @property
    def bytes(self) -> float:
        return sum(work.bytes for work in self.work)


def profile(
    model: Decoder, *, phase: str, batch: int, tokens: int, least: int = 3, budget: float = 0.3, seed: int = 0
) -> Profile:
    """Time a pass of `model` for `batch` texts at once, and count it.

    "prefill" reads `tokens` tokens of each text; "decode" reads one more token of each behind `tokens` others. At
    least `least` passes with clocks and as many without are timed, more up to 40 within `budget` seconds.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, not {phase!r}")
    if min(batch, tokens, least) < 1 or tokens >= model.shape.max_positions:
        most = model.shape.max_positions - 1
        raise ValueError(f"batch and least must be above 0, tokens from 1 to {most}, not {batch}, {least}, {tokens}")
    if not all(isinstance(block.mixer, SoftmaxAttention) for block in model.blocks):
        raise ValueError("model must have softmax attention in all layers, for its operations are told apart by name")
    queries, keys = (1, tokens + 1) if phase == "decode" else (tokens, tokens)
    where, size = model.embed.weight.device, model.embed.weight.element_size()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.shape.vocab, (batch, queries), generator=generator).to(where)
    cache = filled(model, batch, tokens, generator) if phase == "decode" else None
    clock, quiet = Clock(where), Clock(where)
    watched = clock.on(model)
    passes: list[float] = []
    with torch.inference_mode():
        _read(model, ids[:1, :1], None, Clock(where))  # weights that were not yet read from disk
        began = time.perf_counter()
        while len(passes) < least or (len(passes) < MOST and time.perf_counter() - began < budget):
            passes.append(_read(model, ids, cache, quiet))
            _read(watched, ids, cache, clock)
    work = cost.forward_work(
        model.shape, queries=queries, keys=keys, batch=batch, logits=1, weight_bytes=size, cache_bytes=size
    )
    taken = clock.operations()
    seconds = tuple(taken[name] / len(passes) for name in OPERATIONS)
    tap(SECONDS, np.array(seconds), "operation", phase=phase)
    tap(FLOPS, np.array([w.flops for w in work], np.float64), "operation", phase=phase)
    tap(BYTES, np.array([w.bytes for w in work], np.float64), "operation", phase=phase)
    tap(PASSES, np.array(passes), "pass", phase=phase)
    return Profile(phase, batch, tokens, tuple(work), seconds, tuple(passes))


class Clock:
    """How long each operation took, layer by layer and pass by pass: `taken`, in seconds."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._began: dict[str, float] = {}
        self.taken: dict[str, list[float]] = {}

    def now(self) -> float:
        return now(self._where)

    def start(self, name: str) -> None:
        self._began[name] = self.now()

    def stop(self, name: str) -> None:
        self.taken.setdefault(name, []).append(self.now() - self._began.pop(name))

    def on(self, model: Decoder) -> Decoder:
        """The same model with this clock at every operation: modules of its own, the weights shared."""
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, shared)
        blocks: list[Any] = list(twin.blocks)
        self._around("embedding", twin.embed)
        self._around("norms", twin.norm)
        for block in blocks:
            for name, module in (("norms", block.norm1), ("norms", block.norm2), ("mixer", block.mixer)):
                self._around(name, module)
            for name, module in (("qkv", block.mixer.qkv), ("out", block.mixer.out), ("ffn", block.ffn)):
                self._around(name, module)
        return twin

    def operations(self) -> dict[str, float]:
        """Seconds by OPERATIONS over all passes, each time taken for the lower quartile.

        What the mixer of a layer took beyond its two products is attention.
        """
        of = self.taken
        parts = zip(of["mixer"], of["qkv"], of["out"], strict=True)
        times = of | {"attention": [mixer - qkv - out for mixer, qkv, out in parts]}
        quick = {name: sorted(times[name])[len(times[name]) // 4] for name in OPERATIONS}
        return {name: quick[name] * len(times[name]) for name in OPERATIONS}

    def _around(self, name: str, module: nn.Module) -> None:
        begin: Callable[..., None] = lambda *_: self.start(name)  # noqa: E731
        end: Callable[..., None] = lambda *_: self.stop(name)  # noqa: E731
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


def filled(model: Decoder, batch: int, tokens: int, generator: torch.Generator) -> Full:
    """A cache that holds `tokens` tokens of `batch` texts: noise, for products take as long with any numbers."""
    s, like = model.shape, model.embed.weight
    rope = rope_tables(s.head_width, base=s.rope_base, count=tokens, dtype=like.dtype, device=like.device)
    size = (batch, s.kv_heads, tokens, s.head_width)
    k, v = (torch.randn(size, generator=generator).to(like) for _ in range(2))
    cache = Full(capacity=tokens + 1)
    with torch.inference_mode():
        for layer in range(s.layers):
            cache.extend(layer, k, v, rope)
        cache.advance(tokens)
    return cache


def _read(model: Decoder, ids: Tensor, cache: Full | None, clock: Clock) -> float:
    """Seconds of one pass with the logits of the last token of each text. Leaves `cache` as it was."""
    memory = Full(capacity=ids.shape[1]) if cache is None else cache
    seen = memory.seen
    began = clock.now()
    x = model.hidden(ids, cache=memory)[:, -1:]  # B 1 W
    clock.start("head")
    model.logits(x)
    clock.stop("head")
    took = clock.now() - began
    memory.crop(seen)
    return took
