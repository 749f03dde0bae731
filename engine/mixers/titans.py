"""Titans' neural memory: a small network inside the layer that goes on training while it reads.

"Titans" (arXiv:2501.00663), equations 8 to 15 (surprise, momentum, forgetting, reading) and 16 to 18 (chunks). No
official code exists; this was written from the equations, and its gradients are held against autograd.
Paper -> here: M_t = `weights`, S_t = `surprise` (the momentum), theta_t = `rate`, eta_t = `momentum`, alpha_t =
`forgetting`, b = chunk, loss l(M; x) = |M(k) - v|² (equation 12), L_M = depth, y_t = M_t(q_t).

    S_t = eta_t S_{t-1} - theta_t grad l(M_{t-1}; x_t)          M_t = (1 - alpha_t) M_{t-1} + S_t

`sequential` is this loop. `chunked` takes the gradients of a chunk of tokens at the weights that the chunk started with
(the paper's equation 16), which makes everything inside it matrix products; a chunk of 1 is the loop. `surprise` of a
token is the length of its gradient.

Shapes: q, k, v [B, H, T, D]; rate, momentum and forgetting [B, H, T]; a network is a tuple of weights [B, H, D, D],
with SiLU between them. The module is in neural_memory.py, the layers that hold it in titans_layers.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.mixers.state import at_least

Network = tuple[Tensor, ...]  # B H D D each


class Memory(NamedTuple):
    """A memory between two tokens. `anchor` is the network at the start of the chunk it is in, `age` tokens ago."""

    weights: Network
    surprise: Network
    anchor: Network
    age: int

    @classmethod
    def fresh(cls, weights: Network) -> Memory:
        return cls(weights, tuple(torch.zeros_like(w) for w in weights), weights, 0)


def recall(weights: Network, q: Tensor) -> Tensor:
    """Equation 15: M(q), with SiLU between the layers: [..., T, D]."""
    for w in weights[:-1]:
        q = F.silu(q @ w)
    return q @ weights[-1]


def gradients(weights: Network, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What backpropagation of |M(k) - v|² finds, token by token: inputs a and errors e of each layer, [..., T, D].

    The gradient of layer l by token t is the outer product a_t e_tᵀ, so that of many tokens is aᵀ e. The last error is
    2 (M(k) - v).
    """
    inputs, before = [k], []
    for w in weights[:-1]:
        before.append(inputs[-1] @ w)
        inputs.append(F.silu(before[-1]))
    errors = [2 * (inputs[-1] @ weights[-1] - v)]
    for z, w in zip(reversed(before), reversed(weights[1:]), strict=True):
        slope = torch.sigmoid(z)
        errors.append(errors[-1] @ w.mT * slope * (1 + z * (1 - slope)))
    return inputs, errors[::-1]


def sequential(
    memory: Memory, q: Tensor, k: Tensor, v: Tensor, *, rate: Tensor, momentum: Tensor, forgetting: Tensor
) -> tuple[Tensor, Memory]:
    """Equations 13 to 15, a token at a time: learn (k_t, v_t), then answer q_t. Returns y [B, H, T, D], memory."""
    check_memory(memory, q, k, v, rate, momentum, forgetting)
    weights, surprise = memory.weights, memory.surprise
    y = []
    for t in range(q.shape[2]):
        theta, eta, alpha = (x[:, :, t, None, None] for x in (rate, momentum, forgetting))  # B H 1 1
        a, e = gradients(weights, k[:, :, t : t + 1], v[:, :, t : t + 1])
        surprise = tuple(eta * s - theta * (al.mT @ el) for s, al, el in zip(surprise, a, e, strict=True))
        weights = tuple((1 - alpha) * w + s for w, s in zip(weights, surprise, strict=True))
        y.append(recall(weights, q[:, :, t : t + 1]))
    return torch.cat(y, 2), Memory(weights, surprise, weights, 0)


class Shares(NamedTuple):
    """What the two lines of the docstring come to after t tokens: M_t = old M + drift S - sum over i of new_i g_i."""

    old: Tensor  # B H T, what is left of the weights at the start
    drift: Tensor  # B H T, what the surprise at the start has added
    new: Tensor  # B H T T, what the gradient of token i has taken away after token t
    carried: Tensor  # B H, what is left of the surprise at the start
    last: Tensor  # B H T, what the gradient of token i has taken from the surprise at the end


def shares(rate: Tensor, momentum: Tensor, forgetting: Tensor) -> Shares:
    """Unrolls the two linear recurrences; [B, H, T] each in."""
    fade = running_products(momentum)  # B H T T, S_j holds fade[j, i] of what came in at i
    hold = running_products(1 - forgetting)  # B H T T, M_t holds hold[t, j] of S_j
    from_start = momentum.cumprod(-1)  # B H T
    return Shares(
        old=(1 - forgetting).cumprod(-1),
        drift=(hold @ from_start[..., None])[..., 0],
        new=(hold @ fade) * rate[..., None, :],
        carried=from_start[..., -1],
        last=fade[..., -1, :] * rate,
    )


def running_products(x: Tensor) -> Tensor:
    """The product of x from i + 1 to t, for every t and i <= t, else 0: [..., T] -> [..., T, T]."""
    T = x.shape[-1]
    later = torch.ones(T, T, dtype=torch.bool, device=x.device).tril(-1)
    return torch.where(later, x[..., :, None], torch.ones_like(x[..., :1, None])).cumprod(-2).tril()


def chunked(
    memory: Memory, q: Tensor, k: Tensor, v: Tensor, *, rate: Tensor, momentum: Tensor, forgetting: Tensor, chunk: int
) -> tuple[Tensor, Memory]:
    """Equations 16 to 18: gradients at the start of each chunk. Any length; a chunk may go on in the next call."""
    check_memory(memory, q, k, v, rate, momentum, forgetting)
    if memory.age >= at_least("chunk", chunk, 1):
        raise ValueError(
            f"chunk must be above the {memory.age} tokens that the memory's chunk has already, not {chunk}"
        )
    y, start = [], 0
    while start < q.shape[2]:
        part = slice(start, start + chunk - memory.age)
        found, memory = within_chunk(
            memory, *(x[:, :, part] for x in (q, k, v, rate, momentum, forgetting)), chunk=chunk
        )
        y.append(found)
        start = part.stop
    return torch.cat(y, 2), memory


def within_chunk(
    memory: Memory, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, momentum: Tensor, forgetting: Tensor, *, chunk: int
) -> tuple[Tensor, Memory]:
    """The tokens of one chunk, or a part of it. No D by D matrix is made for a single token."""
    s = shares(rate, momentum, forgetting)
    a, e = gradients(memory.anchor, k, v)
    x, weights, surprise = q, [], []
    for layer, (w, m, al, el) in enumerate(zip(memory.weights, memory.surprise, a, e, strict=True)):
        x = F.silu(x) if layer else x
        x = s.old[..., None] * (x @ w) + s.drift[..., None] * (x @ m) - (x @ al.mT * s.new) @ el
        weights.append(at_end(s.old) * w + at_end(s.drift) * m - (al * s.new[..., -1, :, None]).mT @ el)
        surprise.append(s.carried[..., None, None] * m - (al * s.last[..., None]).mT @ el)
    age = memory.age + q.shape[2]
    anchor = tuple(weights) if age == chunk else memory.anchor
    return x, Memory(tuple(weights), tuple(surprise), anchor, age % chunk)


def at_end(x: Tensor) -> Tensor:
    return x[..., -1, None, None]


def check_memory(
    memory: Memory, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, momentum: Tensor, forgetting: Tensor
) -> None:
    B, H, D = memory.weights[0].shape[:3]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape != q.shape or x.shape[:2] != (B, H) or x.shape[3] != D or not x.shape[2]:
            raise ValueError(f"{name} must have shape [{B}, {H}, tokens, {D}], a token at least, not {list(x.shape)}")
    for name, x in (("rate", rate), ("momentum", momentum), ("forgetting", forgetting)):
        if x.shape != q.shape[:3]:
            raise ValueError(f"{name} must have shape {list(q.shape[:3])}, a number a token, not {list(x.shape)}")


def chunk_parts(rows: int, *, age: int, chunk: int) -> list[int]:
    """How `rows` tokens fall into chunks, the first of which has `age` tokens already."""
    first = min(rows, chunk - age)
    whole, rest = divmod(rows - first, chunk)
    return [first] + [chunk] * whole + [rest] * (rest > 0)


def multiplications(form: str, T: int, D: int, *, depth: int = 1, chunk: int = 1) -> int:
    """Multiplications in the products of one head with `depth` matrices of D by D, over T tokens.

    Both: forward and backward for the gradient, (2 depth - 1) TD². "sequential": outer product and answer, 2 depth TD².
    "chunked": answers from weights and surprise, both updated, 4 depth TD², and 2 depth c²D + c³ + c² in a chunk of c.
    """
    for name, value in (("T", T), ("D", D), ("depth", depth), ("chunk", chunk)):
        at_least(name, value, 1)
    gradient = (2 * depth - 1) * T * D * D
    if form == "sequential":
        return gradient + 2 * depth * T * D * D
    if form == "chunked":
        whole, rest = divmod(T, chunk)
        inside = [c * c * (2 * depth * D + c + 1) for c in [chunk] * whole + [rest]]
        return gradient + 4 * depth * T * D * D + sum(inside)
    raise ValueError(f"form must be sequential or chunked, not {form!r}")
