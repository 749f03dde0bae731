"""Linear attention: without a softmax the keys and values of the past add up to one matrix of fixed size.

"Transformers are RNNs" (arXiv:2006.16236), equations 7 (the feature map), 9 to 12 (causal) and 16 to 20 (as an RNN).
Paper -> here: phi = `features`, s_i = `S`, z_i = the last column of `S`, N = T, D = width of a key, M = E, width of a
value. The same sum in three orders: `parallel` (a masked T by T matrix), `recurrent` (a token at a time) and `chunked`
(parallel inside a chunk, recurrent from chunk to chunk; not in the paper: RetNet, arXiv:2307.08621, equation 7).

Shapes: q and k [..., T, D], v [..., T, E], S [..., D, E]; the forms do not normalise. `with_ones` gives each value one
more entry, 1, so that the sum of the weights comes out beside the answer and `divide` can divide by it (z_i).
Deviations: positions come from RoPE, applied before the feature map (the paper adds them to its input), so a weight
depends on where the two tokens are and not only on how far apart. kv_heads of the shape is not used: keys have `heads`.
elu(x) + 1 is computed as exp(x) below 0, the same number: elu rounds to -1, and the weights to 0, from -17 on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.caches import Cache
from engine.mixers.rope import Rope
from engine.mixers.softmax import K, Q, V
from engine.mixers.state import at_least, carried, carry, check_qkv, check_tokens, positions, wide
from engine.recording import recording_on, site, tap

if TYPE_CHECKING:
    from engine.model import Shape

STATE = site("linear.state", "the matrix that holds the past after each token: sum of φ(k) vᵀ", symbol="S",
             grows="query")  # fmt: skip
MASS = site("linear.mass", "the sum of the features of all keys so far", symbol="z", grows="query", low=0.0)
PATTERN = site("linear.pattern", "the share of attention that the state implies", symbol="φ(q)·φ(k) / φ(q)·z",
               grows="query", low=0.0, high=1.0)  # fmt: skip
SOFTMAX = site("linear.softmax", "what softmax attention would pay with the same queries and keys",
               symbol="softmax(q·k/√d)", grows="query", low=0.0, high=1.0)  # fmt: skip


def elu_features(x: Tensor, *, query: bool = False) -> Tensor:
    """Equation 7: phi(x) = elu(x) + 1, positive everywhere. Queries and keys alike."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """y_i = sum over j <= i of (q_i · k_j) v_j, from the whole masked matrix. Equation 9, not normalised."""
    check_qkv(q, k, v)
    return (q @ k.mT).tril() @ v


def recurrent(q: Tensor, k: Tensor, v: Tensor, S: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same, a token at a time: S_i = S_{i-1} + k_i v_iᵀ and y_i = q_i S_i (equations 18 and 20). Returns y, S."""
    check_qkv(q, k, v)
    S = empty_state(k, v) if S is None else S
    y = []
    for q_i, k_i, v_i in zip(q.unbind(-2), k.unbind(-2), v.unbind(-2), strict=True):
        S = S + k_i[..., :, None] @ v_i[..., None, :]  # ... D E
        y.append(q_i[..., None, :] @ S)  # ... 1 E
    return torch.cat(y, -2), S


def chunked(q: Tensor, k: Tensor, v: Tensor, S: Tensor | None = None, *, chunk: int) -> tuple[Tensor, Tensor]:
    """The same, `chunk` tokens at a time: inside a chunk in parallel, the past from S. Any length. Returns y, S."""
    check_qkv(q, k, v)
    at_least("chunk", chunk, 1)
    S = empty_state(k, v) if S is None else S
    y = []
    for qc, kc, vc in zip(q.split(chunk, -2), k.split(chunk, -2), v.split(chunk, -2), strict=True):
        y.append(parallel(qc, kc, vc) + qc @ S)
        S = S + kc.mT @ vc
    return torch.cat(y, -2), S


def empty_state(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:-2], k.shape[-1], v.shape[-1])


def with_ones(v: Tensor) -> Tensor:
    """Values with one more entry, 1: [..., T, E + 1]."""
    return torch.cat((v, torch.ones_like(v[..., :1])), -1)


def divide(y: Tensor) -> Tensor:
    """Answers over the sum of their weights, which `with_ones` made the last entry: [..., T, E]."""
    return y[..., :-1] / y[..., -1:]


def implied_attention(q: Tensor, k: Tensor) -> Tensor:
    """The weights that linear attention never writes down: [..., T, T], rows of sum 1."""
    weights = (q @ k.mT).tril()
    return weights / weights.sum(-1, keepdim=True)


def multiplications(form: str, T: int, D: int, E: int, *, chunk: int = 1) -> int:
    """Multiplications in the products of one head: T tokens, keys of D features, values of E entries.

    "softmax" and "parallel" T²D + T²E, "recurrent" 2TDE, "chunked" the first inside each chunk plus 2TDE. So with
    D = E linear wins over softmax from T = D on, and 2TDE is all that is left as T grows.
    """
    for name, value in (("T", T), ("D", D), ("E", E), ("chunk", chunk)):
        at_least(name, value, 1)
    if form in ("softmax", "parallel"):
        return T * T * (D + E)
    if form == "recurrent":
        return 2 * T * D * E
    if form == "chunked":
        whole, rest = divmod(T, chunk)
        return (whole * chunk * chunk + rest * rest) * (D + E) + 2 * T * D * E
    raise ValueError(f"form must be softmax, parallel, recurrent or chunked, not {form!r}")


def split_products(rows: int, D: int, E: int, *, heads: int, chunk: int, more: int = 0) -> dict[str, int]:
    """`multiplications` of all heads of a layer that is recurrent for one token and chunked for more, by part: "scores"
    (queries with keys, keys written into the state, and `more`) and "values" (weights with values, the state read)."""
    whole, rest = divmod(rows, chunk)
    cells = 0 if rows == 1 else whole * chunk * chunk + rest * rest
    state = rows * D * E
    return {"scores": heads * (cells * D + state) + more, "values": heads * (cells * E + state)}


class LinearAttention(nn.Module):
    """Mixer of one layer. `features(x, query=…)` maps the rotated queries and keys; a module may bring its own
    (FAVOR+ in performer.py). A pass of one token is recurrent, a longer one chunked."""

    def __init__(
        self, shape: Shape, layer: int, *, features: Callable[..., Tensor] = elu_features, chunk: int = 64
    ) -> None:
        super().__init__()
        self.layer, self.heads = layer, shape.heads
        self.chunk = at_least("chunk", chunk, 1)
        self.features = features
        self.qkv = nn.Linear(shape.width, 3 * shape.heads * shape.head_width, bias=False)
        self.out = nn.Linear(shape.heads * shape.head_width, shape.width, bias=False)

    def forward(self, x: Tensor, *, rope: Rope, cache: Cache | None = None, show: int | None = None) -> Tensor:
        check_tokens(x, self.qkv.in_features)
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3 * self.heads, -1).transpose(1, 2)  # B 3H T D
        q, k, v = qkv.chunk(3, 1)  # B H T D each
        places = positions(cache, T)
        q, k, v = (t.to(wide(x.dtype)) for t in (rope.rotate(q, places), rope.rotate(k, places), v))
        phi_q, phi_k = self.features(q, query=True), self.features(k, query=False)  # B H T F each
        before = carried(cache, self.layer, x)
        if T == 1:
            y, S = recurrent(phi_q, phi_k, with_ones(v), before)
        else:
            y, S = chunked(phi_q, phi_k, with_ones(v), before, chunk=self.chunk)
        carry(cache, self.layer, S)
        self._show(q, k, v, phi_q, phi_k, before, T if show is None else show)
        return self.out(divide(y).to(x.dtype).transpose(1, 2).flatten(2))

    def multiplications(self, *, rows: int, keys: int) -> dict[str, int]:
        """However many keys there were. "scores": features, keys written into the state, queries with keys inside a
        chunk; "values": what is read. The column of ones counts as a value."""
        D = self.qkv.out_features // (3 * self.heads)
        omega = getattr(self.features, "omega", None)  # of FAVOR+: a product for the queries and one for the keys
        F = self.features(torch.zeros(1, D, device=self.qkv.weight.device), query=False).shape[-1]
        random = 0 if omega is None else 2 * rows * omega.numel()
        return split_products(rows, F, D + 1, heads=self.heads, chunk=self.chunk, more=self.heads * random)

    def _show(
        self, q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, before: Tensor | None, show: int
    ) -> None:
        """Taps of the last `show` tokens. What attention a state implies is known only from the first token on."""
        layer = self.layer
        for name, tensor, rows in ((Q, q, "query"), (K, k, "key"), (V, v, "key")):
            if recording_on(name, layer=layer):
                tap(name, tensor[:, :, -show:], f"batch head {rows} width", layer=layer)
        if recording_on(STATE, layer=layer) or recording_on(MASS, layer=layer):
            S = (phi_k[..., :, None] * with_ones(v)[..., None, :]).cumsum(2)  # B H T F D+1
            S = (S if before is None else S + before[:, :, None])[:, :, -show:]
            tap(STATE, S[..., :-1], "batch head query feature width", layer=layer)
            tap(MASS, S[..., -1], "batch head query feature", layer=layer)
        if before is None and recording_on(PATTERN, layer=layer):
            tap(PATTERN, implied_attention(phi_q, phi_k)[:, :, -show:], "batch head query key", layer=layer)
        if before is None and recording_on(SOFTMAX, layer=layer):
            later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
            scores = (q @ k.mT / k.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
            tap(SOFTMAX, scores.softmax(-1)[:, :, -show:], "batch head query key", layer=layer)
