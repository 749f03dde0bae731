"""The long-term memory of a Titans layer: queries, keys and values, and how strongly each token is learned.

"Titans" (arXiv:2501.00663), section 3.1 and, for the projections, 4.4. Paper -> here: theta_t, eta_t, alpha_t =
`control`, W_Q, W_K, W_V = `qkv`, M_0 = `start`, M*(q) (reading without learning) = `ask`. The forms are in titans.py.

Deviations: each head of head_width has its own memory (the paper has one of full width); no convolution after q, k and
v; rate, momentum and forgetting are one number a token and head, the rate at most 1/2: with keys of length 1 a larger
step would overshoot. M_0, which the paper leaves open, is learned; its last matrix starts at 0, an answer of nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.mixers.state import at_least, wide
from engine.mixers.titans import (
    Memory,
    chunk_parts,
    chunked,
    gradients,
    multiplications,
    recall,
    shares,
    within_chunk,
)
from engine.recording import recording_on, site, tap

if TYPE_CHECKING:
    from engine.model import Shape

SURPRISE = site("titans.surprise", "how much each token would change the memory: the length of its gradient",
                symbol="‖∇ℓ‖", grows="query", low=0.0)  # fmt: skip
ERROR = site("titans.error", "how far the memory's answer to each key is from the value", symbol="‖M(k) − v‖²",
             grows="query", low=0.0)  # fmt: skip
WEIGHTS = site("titans.weights", "the memory's first matrix after each token", symbol="M", grows="query")
RATE = site("titans.rate", "how big a step each token makes", symbol="θ", grows="query", low=0.0, high=0.5)
MOMENTUM = site("titans.momentum", "how much of the surprise before it each token carries on", symbol="η",
                grows="query", low=0.0, high=1.0)  # fmt: skip
FORGETTING = site("titans.forgetting", "how much of the memory each token lets go", symbol="α", grows="query",
                  low=0.0, high=1.0)  # fmt: skip

MAX_RATE = 0.5
START = (-3.0, 0.0, -4.0)  # before their sigmoids: a rate of 0.02, a momentum of 0.5, a forgetting of 0.02


@dataclass(frozen=True)
class Steering:
    """What a learner sets by hand. None: what the layer computes. `learning` off: the memory stays as it started."""

    rate: float | None = None
    momentum: float | None = None
    forgetting: float | None = None
    learning: bool = True


HANDS_OFF = Steering()
_STEERING: ContextVar[Steering] = ContextVar("leanscope_titans", default=HANDS_OFF)


@contextmanager
def steering(
    *,
    rate: float | None = None,
    momentum: float | None = None,
    forgetting: float | None = None,
    learning: bool = True,
) -> Iterator[None]:
    """Set rate, momentum and forgetting of all memories inside this context by hand, or switch their learning off.

    A `ContextVar`, as the recorder is one: models are shared by visitors, and a knob of one must not turn for all.
    """
    for name, value in (("rate", rate), ("momentum", momentum), ("forgetting", forgetting)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value}")
    token = _STEERING.set(Steering(rate, momentum, forgetting, learning))
    try:
        yield
    finally:
        _STEERING.reset(token)


class NeuralMemory(nn.Module):
    """The long-term memory of one layer: x [B, T, W] -> answers [B, T, H * D], learning as it goes."""

    def __init__(self, shape: Shape, layer: int, *, depth: int, chunk: int, seed: int) -> None:
        super().__init__()
        H, D = shape.heads, shape.head_width
        at_least("depth", depth, 1)
        self.layer, self.heads, self.chunk = layer, H, at_least("chunk", chunk, 1)
        self.qkv = nn.Linear(shape.width, 3 * H * D, bias=False)
        self.controls = nn.Linear(shape.width, 3 * H)
        with torch.no_grad():
            self.controls.bias.copy_(torch.tensor(START).repeat_interleave(H))
        random = torch.Generator().manual_seed(seed * 1000 + layer)
        hidden = [torch.randn(H, D, D, device="cpu", generator=random) / D**0.5 for _ in range(depth - 1)]
        self.start = nn.ParameterList([*hidden, torch.zeros(H, D, D, device="cpu")])

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Learn each token, then answer it."""
        rate, momentum, forgetting = self.control(x)  # B H T each
        y, memory = chunked(
            memory, *self.project(x), rate=rate, momentum=momentum, forgetting=forgetting, chunk=self.chunk
        )
        return y.transpose(1, 2).flatten(2).to(x.dtype), memory

    def fresh(self, x: Tensor) -> Memory:
        """The memory before the first token."""
        return Memory.fresh(tuple(w.to(wide(x.dtype)).expand(x.shape[0], *w.shape) for w in self.start))

    def ask(self, memory: Memory, x: Tensor) -> Tensor:
        """What the memory, as it was when its chunk began, answers to x: [B, T, H * D]. It learns nothing."""
        return recall(memory.anchor, self.project(x)[0]).transpose(1, 2).flatten(2).to(x.dtype)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Section 4.4: queries, keys and values through SiLU, queries and keys of length 1."""
        B, T, _ = x.shape
        qkv = F.silu(self.qkv(x).to(wide(x.dtype))).view(B, T, 3 * self.heads, -1).transpose(1, 2)
        q, k, v = qkv.chunk(3, 1)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v

    def control(self, x: Tensor) -> list[Tensor]:
        """theta, eta and alpha of each token and head, [B, H, T] each."""
        found = torch.sigmoid(self.controls(x).to(wide(x.dtype))).transpose(1, 2).chunk(3, 1)
        steer = _STEERING.get()
        if not steer.learning:
            return [torch.zeros_like(value) for value in found]
        by_hand = (steer.rate, steer.momentum, steer.forgetting)
        computed = (found[0] * MAX_RATE, found[1], found[2])
        return [c if s is None else torch.full_like(c, s) for c, s in zip(computed, by_hand, strict=True)]

    def multiplications(self, rows: int, *, age: int) -> tuple[int, int]:
        """Of reading `rows` tokens in a chunk that has `age` already: those with weights of the layer, and those of
        learning and answering."""
        H, D = self.start[0].shape[:2]
        made = rows * (self.qkv.in_features * self.qkv.out_features + self.qkv.in_features * 3 * H)
        parts = chunk_parts(rows, age=age, chunk=self.chunk)
        return made, H * sum(multiplications("chunked", c, D, depth=len(self.start), chunk=c) for c in parts)

    def asking(self, rows: int) -> int:
        """Multiplications of asking without learning, those with weights of the layer not counted."""
        H, D = self.start[0].shape[:2]
        return rows * H * len(self.start) * D * D

    def show(self, x: Tensor, memory: Memory, *, show: int) -> None:
        """Taps of the last `show` tokens of x, which `memory` has not read yet."""
        layer = self.layer
        if not any(recording_on(name, layer=layer) for name in (RATE, MOMENTUM, FORGETTING, SURPRISE, ERROR, WEIGHTS)):
            return
        q, k, v = self.project(x)
        controls = self.control(x)
        for name, value in zip((RATE, MOMENTUM, FORGETTING), controls, strict=True):
            if recording_on(name, layer=layer):
                tap(name, value[..., -show:], "batch head query", layer=layer)
        if not any(recording_on(name, layer=layer) for name in (SURPRISE, ERROR, WEIGHTS)):
            return
        surprise, error, weights, start = [], [], [], 0
        while start < q.shape[2]:
            part = slice(start, start + self.chunk - memory.age)
            qc, kc, vc, *now = (t[:, :, part] for t in (q, k, v, *controls))
            a, e = gradients(memory.anchor, kc, vc)
            lengths = [x.square().sum(-1) * y.square().sum(-1) for x, y in zip(a, e, strict=True)]
            surprise.append(torch.stack(lengths).sum(0).sqrt())  # B H c
            error.append(e[-1].square().sum(-1) / 4)
            s = shares(*now)
            M = s.old[..., None, None] * memory.weights[0][:, :, None]
            M = M + s.drift[..., None, None] * memory.surprise[0][:, :, None]
            weights.append(M - torch.einsum("bhti,bhid,bhie->bhtde", s.new, a[0], e[0]))
            _, memory = within_chunk(memory, qc, kc, vc, *now, chunk=self.chunk)
            start = part.stop
        tap(SURPRISE, torch.cat(surprise, 2)[..., -show:], "batch head query", layer=layer)
        tap(ERROR, torch.cat(error, 2)[..., -show:], "batch head query", layer=layer)
        tap(WEIGHTS, torch.cat(weights, 2)[:, :, -show:], "batch head query in out", layer=layer)
