"""Retention: linear attention that forgets at a fixed rate, a different one for each head.

"Retentive Network" (arXiv:2307.08621), equations 5 (parallel), 6 (recurrent), 7 (chunkwise) and 8 (multi-scale, gate).
Paper -> here: gamma = `decay` [H], S_n = `S`, D_nm = `decay_mask`, B = chunk, e^(i n theta) = RoPE, W_G = `gate`,
GroupNorm_h = `norm`. The paper's xPos is, once gamma is one number a head (its equations 3 and 4), just this rotation:
what shrinks with distance is gamma^(n-m), and that stands in `decay_mask`. So the decoder's RoPE is used as it is.

Shapes: q and k [..., H, T, D], v [..., H, T, E], S [..., H, D, E], decay [H] in (0, 1]; the forms do not normalise.
Deviations: keys are divided by sqrt(D) as in the paper, but its two other normalisers (the row sums of the decay mask
and of the scores) are left out: they scale a whole row of one head, which GroupNorm divides away again, up to its eps.
Values are as wide as keys (the paper's are twice as wide). kv_heads of the shape is not used: keys have `heads`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.caches import Cache
from engine.mixers.linear import empty_state, split_products
from engine.mixers.rope import Rope
from engine.mixers.softmax import K, Q, V
from engine.mixers.state import at_least, carried, carry, check_qkv, check_tokens, positions, wide
from engine.recording import recording_on, site, tap

if TYPE_CHECKING:
    from engine.model import Shape

STATE = site("retention.state", "the matrix that holds the past after each token, fading", symbol="S", grows="query")
MASK = site("retention.decay", "what is left of a key after so many tokens", symbol="γⁿ⁻ᵐ", grows="query",
            low=0.0, high=1.0)  # fmt: skip
SCORES = site("retention.scores", "query times key times what is left of it; of either sign, not a share",
              symbol="(QKᵀ ⊙ D)", grows="query")  # fmt: skip
GATE = site("retention.gate", "how much of what was found each new token lets through", symbol="swish(x W_G)",
            grows="query")  # fmt: skip


def head_decays(heads: int) -> Tensor:
    """Equation 8: gamma = 1 - 2^(-5 - h), so that half of a memory is left after 22, 44, 88, ... tokens: [H]."""
    at_least("heads", heads, 1)
    return 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64, device="cpu"))


def decay_mask(decay: Tensor, T: int) -> Tensor:
    """D_nm = gamma^(n - m) for n >= m, else 0: [H, T, T]."""
    n = torch.arange(T, device=decay.device)
    back = n[:, None] - n  # T T
    return (decay[:, None, None] ** back.clamp(min=0)) * (back >= 0)


def parallel(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor) -> Tensor:
    """Equation 5: (q kᵀ ⊙ D) v."""
    check_decay(q, k, v, decay)
    return (q @ k.mT * decay_mask(decay, q.shape[-2])) @ v


def recurrent(q: Tensor, k: Tensor, v: Tensor, S: Tensor | None = None, *, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 6: S_n = gamma S_{n-1} + k_nᵀ v_n and y_n = q_n S_n. Returns y, S."""
    check_decay(q, k, v, decay)
    S = empty_state(k, v) if S is None else S
    y = []
    for q_n, k_n, v_n in zip(q.unbind(-2), k.unbind(-2), v.unbind(-2), strict=True):
        S = decay[:, None, None] * S + k_n[..., :, None] @ v_n[..., None, :]  # ... H D E
        y.append(q_n[..., None, :] @ S)  # ... H 1 E
    return torch.cat(y, -2), S


def chunked(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor | None = None, *, decay: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Equation 7: inside a chunk in parallel, across chunks by the state. Any length. Returns y, S."""
    check_decay(q, k, v, decay)
    at_least("chunk", chunk, 1)
    S = empty_state(k, v) if S is None else S
    y = []
    for qc, kc, vc in zip(q.split(chunk, -2), k.split(chunk, -2), v.split(chunk, -2), strict=True):
        c = qc.shape[-2]
        steps = torch.arange(c, device=q.device)
        since = (decay[:, None] ** (steps + 1))[..., None]  # H c 1, what is left of S at each token
        until = (decay[:, None] ** (c - 1 - steps))[..., None]  # H c 1, what is left of each token at the end
        y.append(parallel(qc, kc, vc, decay=decay) + (qc @ S) * since)
        S = decay[:, None, None] ** c * S + (kc * until).mT @ vc
    return torch.cat(y, -2), S


def check_decay(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> None:
    check_qkv(q, k, v)
    if q.dim() < 3 or decay.shape != (q.shape[-3],):
        raise ValueError(f"decay must have one number a head of q {list(q.shape)}, not shape {list(decay.shape)}")


class Retention(nn.Module):
    """Mixer of one layer: multi-scale retention with a swish gate. One token: recurrent; more: chunked.

    `decay` overrides the gammas of the heads (each above 0 and at most 1).
    """

    decay: Tensor

    def __init__(self, shape: Shape, layer: int, *, decay: tuple[float, ...] | None = None, chunk: int = 64) -> None:
        super().__init__()
        self.layer, self.heads = layer, shape.heads
        self.chunk = at_least("chunk", chunk, 1)
        gammas = head_decays(shape.heads) if decay is None else torch.tensor(decay, dtype=torch.float64, device="cpu")
        if gammas.shape != (shape.heads,) or not bool(((gammas > 0) & (gammas <= 1)).all()):
            raise ValueError(f"decay must be {shape.heads} numbers above 0 and at most 1, not {decay}")
        inner = shape.heads * shape.head_width
        self.qkv = nn.Linear(shape.width, 3 * inner, bias=False)
        self.gate = nn.Linear(shape.width, inner, bias=False)
        self.norm = nn.GroupNorm(shape.heads, inner, eps=shape.norm_eps)
        self.out = nn.Linear(inner, shape.width, bias=False)
        self.register_buffer("decay", gammas.to(torch.get_default_dtype()))

    def forward(self, x: Tensor, *, rope: Rope, cache: Cache | None = None, show: int | None = None) -> Tensor:
        check_tokens(x, self.qkv.in_features)
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3 * self.heads, -1).transpose(1, 2)  # B 3H T D
        q, k, v = qkv.chunk(3, 1)  # B H T D each
        places = positions(cache, T)
        q, k, v = (t.to(wide(x.dtype)) for t in (rope.rotate(q, places), rope.rotate(k, places), v))
        k = k / k.shape[-1] ** 0.5
        decay, before = self.decay.to(q.dtype), carried(cache, self.layer, x)
        if T == 1:
            y, S = recurrent(q, k, v, before, decay=decay)
        else:
            y, S = chunked(q, k, v, before, decay=decay, chunk=self.chunk)
        carry(cache, self.layer, S)
        gate = F.silu(self.gate(x))  # B T H*D
        self._show(q, k, v, gate, decay, before, T if show is None else show)
        y = self.norm(y.transpose(1, 2).reshape(B * T, -1).to(x.dtype)).view(B, T, -1)  # a group is a head of a token
        return self.out(gate * y)

    def multiplications(self, *, rows: int, keys: int) -> dict[str, int]:
        """However many keys there were; the gate's product counts beside q, k and v."""
        D = self.out.in_features // self.heads
        gate = rows * self.gate.in_features * self.gate.out_features
        return {"qkv": gate, **split_products(rows, D, D, heads=self.heads, chunk=self.chunk)}

    def _show(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, decay: Tensor, before: Tensor | None, show: int
    ) -> None:
        """Taps of the last `show` tokens. The T by T pictures are those of a pass that nothing came before."""
        layer, T = self.layer, q.shape[2]
        for name, tensor, rows in ((Q, q, "query"), (K, k, "key"), (V, v, "key")):
            if recording_on(name, layer=layer):
                tap(name, tensor[:, :, -show:], f"batch head {rows} width", layer=layer)
        if recording_on(GATE, layer=layer):
            tap(GATE, gate[:, -show:], "batch query width", layer=layer)
        if before is None and (recording_on(MASK, layer=layer) or recording_on(SCORES, layer=layer)):
            mask = decay_mask(decay, T)[:, -show:]
            tap(MASK, mask, "head query key", layer=layer)
            tap(SCORES, q[:, :, -show:] @ k.mT * mask, "batch head query key", layer=layer)
        if recording_on(STATE, layer=layer):
            S = empty_state(k, v) if before is None else before
            states = []
            for k_n, v_n in zip(k.unbind(2), v.unbind(2), strict=True):
                S = decay[:, None, None] * S + k_n[..., :, None] * v_n[..., None, :]
                states.append(S)
            tap(STATE, torch.stack(states[-show:], 2), "batch head query key width", layer=layer)
