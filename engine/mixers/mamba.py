"""Mamba: a state that each token decides how much to overwrite, because step size, input and output depend on it.

"Mamba" (arXiv:2312.00752), equations 1 and 2 (the recurrence), algorithm 2 (selection), section 3.6 (low rank for
Delta), figure 3 (the block). Paper -> here: N = N, D = E channels (W times `expand`), Delta = `delta`, A = -exp(A_log),
h_t = `h`, D of the skip = `skip`, s_Delta through rank R = `to_delta`. A is discretised by equation 4, exp(Delta A); B
by Euler's rule, Delta B, as in the published code: equation 4 would have (exp(Delta A) - 1) / A · B (zero-order hold).

Three orders for h_t = Abar_t h_{t-1} + Bbar_t u_t, y_t = C_t h_t: `recurrent`, `scan` (pairs of steps are joined to
one step, so T steps take log2 T levels) and `chunked` (a scan inside each chunk, the state from chunk to chunk).
With constant Delta, B and C it is a convolution (equation 3): `impulse_response` is its kernel.

Shapes: u and delta [B, T, E], A [E, N], B and C [B, T, N], h [B, E, N]. A state is the last K - 1 inputs of the
convolution, and h. Deviations: none from the published code in what is computed; RoPE is not used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.caches import Cache
from engine.mixers.rope import Rope
from engine.mixers.state import at_least, carried, carry, check_tokens, wide
from engine.recording import recording_on, site, tap

if TYPE_CHECKING:
    from engine.model import Shape

STATE = site("mamba.state", "what each channel remembers after each token", symbol="h", grows="query")
DELTA = site("mamba.delta", "how much of its state a token overwrites: its step size", symbol="Δ", grows="query",
             low=0.0)  # fmt: skip
KEPT = site("mamba.kept", "the share of each state that survives a token", symbol="Ā = exp(ΔA)", grows="query",
            low=0.0, high=1.0)  # fmt: skip
WRITE = site("mamba.write", "where in the state a token writes", symbol="B", grows="query")
READ = site("mamba.read", "where in the state a token reads", symbol="C", grows="query")


def discretise(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Abar = exp(Delta A) and the input Bbar u = Delta B u (Euler): [..., E, N] each."""
    return (delta[..., None] * A).exp(), (delta * u)[..., None] * B[..., None, :]


def recurrent(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equation 2, a token at a time: h = Abar h + Bbar u, y = C h. Returns y [B, T, E] and the last h."""
    check_selective(u, delta, A, B, C)
    h = u.new_zeros(u.shape[0], *A.shape) if h is None else h
    y = []
    for u_t, delta_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, delta, B, C)), strict=True):
        kept, added = discretise(u_t, delta_t, A, B_t)  # B E N each
        h = kept * h + added
        y.append((h @ C_t[..., None])[..., 0])  # B E
    return torch.stack(y, 1), h


def scan(kept: Tensor, added: Tensor) -> Tensor:
    """All h_t = kept_t h_{t-1} + added_t along dimension 1, h before the first being 0.

    Two steps (a, b), (a', b') are one step (a' a, a' b + b'): the odd places are the scan of the pairs, and the even
    ones are one step further.
    """
    T = kept.shape[1]
    if T == 1:
        return added
    first, second = kept[:, 0 : T - 1 : 2], kept[:, 1::2]
    odd = scan(second * first, second * added[:, 0 : T - 1 : 2] + added[:, 1::2])
    even = kept[:, 2::2] * odd[:, : (T - 1) // 2] + added[:, 2::2]
    h = torch.empty_like(added)
    h[:, 0], h[:, 1::2], h[:, 2::2] = added[:, 0], odd, even
    return h


def chunked(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None = None, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """The same by scans of `chunk` tokens each, so that states of one chunk only exist at a time."""
    check_selective(u, delta, A, B, C)
    at_least("chunk", chunk, 1)
    y = []
    parts = (t.split(chunk, 1) for t in (u, delta, B, C))
    for uc, dc, Bc, Cc in zip(*parts, strict=True):
        kept, added = discretise(uc, dc, A, Bc)  # B c E N each
        if h is not None:
            added = torch.cat((added[:, :1] + kept[:, :1] * h[:, None], added[:, 1:]), 1)
        states = scan(kept, added)  # B c E N
        y.append((states @ Cc[..., None])[..., 0])  # B c E
        h = states[:, -1]
    assert h is not None
    return torch.cat(y, 1), h


def impulse_response(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, count: int) -> Tensor:
    """Equation 3 for constant delta [E], B [N] and C [N]: K_n = C Abarⁿ Bbar, [E, count]; y = K * u."""
    n = torch.arange(at_least("count", count, 1), dtype=A.dtype, device=A.device)
    powers = (n * (delta[:, None] * A)[..., None]).exp()  # E N count
    return ((C * B * delta[:, None])[..., None] * powers).sum(1)


def check_selective(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    if u.dim() != 3 or u.shape != delta.shape or 0 in u.shape:
        raise ValueError(
            f"u and delta must have one shape [batch, tokens, E], not {list(u.shape)}, {list(delta.shape)}"
        )
    if A.dim() != 2 or A.shape[0] != u.shape[2]:
        raise ValueError(f"A must have shape [{u.shape[2]}, N], not {list(A.shape)}")
    for name, value in (("B", B), ("C", C)):
        if value.shape != (*u.shape[:2], A.shape[1]):
            raise ValueError(f"{name} must have shape {[*u.shape[:2], A.shape[1]]}, not {list(value.shape)}")


def multiplications(form: str, T: int, E: int, N: int) -> int:
    """Multiplications for T tokens of E channels with N states each, exponentials not counted.

    "recurrent": Delta A, Delta u, times B, Abar h and C h: 4TEN + TE. "scan": the same four, but the products of
    Abar and h are made pair by pair: 2 more for each pair of every level and 1 for each even place. Both O(T).
    """
    for name, value in (("T", T), ("E", E), ("N", N)):
        at_least(name, value, 1)
    if form == "recurrent":
        return 4 * T * E * N + T * E
    if form == "scan":
        joins, length = 0, T
        while length > 1:
            joins += 2 * (length // 2) + (length - 1) // 2
            length //= 2
        return 3 * T * E * N + T * E + joins * E * N
    raise ValueError(f"form must be recurrent or scan, not {form!r}")


class Mamba(nn.Module):
    """Mixer of one layer: the block of figure 3 without its norm. Recurrent for one token, and on a CPU for any number;
    else by chunked scans.

    What the decoder does not fill starts as in the paper: A_n = -n, a skip of 1, Delta between 0.001 and 0.1.
    """

    def __init__(
        self, shape: Shape, layer: int, *, state: int = 16, expand: int = 2, conv: int = 4, rank: int | None = None,
        chunk: int = 32, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        N, E, K = at_least("state", state, 1), at_least("expand", expand, 1) * shape.width, at_least("conv", conv, 1)
        R = math.ceil(shape.width / 16) if rank is None else at_least("rank", rank, 1)
        self.layer, self.chunk = layer, at_least("chunk", chunk, 1)
        self.sizes = (R, N, N)
        random = torch.Generator().manual_seed(seed * 1000 + layer)

        def uniform(*size: int, low: float, high: float) -> Tensor:
            return torch.empty(size, device="cpu").uniform_(low, high, generator=random)

        self.inp = nn.Linear(shape.width, 2 * E, bias=False)
        self.conv = nn.Parameter(uniform(E, 1, K, low=-(K**-0.5), high=K**-0.5))
        self.conv_bias = nn.Parameter(uniform(E, low=-(K**-0.5), high=K**-0.5))
        self.select = nn.Linear(E, R + 2 * N, bias=False)
        self.to_delta = nn.Parameter(uniform(E, R, low=-(R**-0.5), high=R**-0.5))
        step = uniform(E, low=math.log(0.001), high=math.log(0.1)).exp()
        self.delta_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is `step`
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1, device="cpu").log().repeat(E, 1))
        self.skip = nn.Parameter(torch.ones(E, device="cpu"))
        self.out = nn.Linear(E, shape.width, bias=False)

    def forward(
        self, x: Tensor, *, rope: Rope | None = None, cache: Cache | None = None, show: int | None = None
    ) -> Tensor:
        check_tokens(x, self.inp.in_features)
        T, K = x.shape[1], self.conv.shape[2]
        u, gate = self.inp(x).chunk(2, -1)  # B T E each
        tail, before = carried(cache, self.layer, x) or (u.new_zeros(u.shape[0], K - 1, u.shape[2]), None)
        u = torch.cat((tail, u), 1)  # B K-1+T E
        tail = u[:, T:].clone()
        u = F.silu(F.conv1d(u.mT, self.conv, self.conv_bias, groups=u.shape[2]).mT)  # B T E
        rank, B, C = self.select(u).split(self.sizes, -1)
        exact = wide(x.dtype)
        delta = F.softplus(F.linear(rank, self.to_delta, self.delta_bias)).to(exact)  # B T E
        B, C, A = B.to(exact), C.to(exact), -self.A_log.to(exact).exp()
        # A loop of small steps stays in a CPU's cache: on two cores it trains 2 to 3 times faster than the scan, which
        # saves launches on other devices.
        if T == 1 or u.device.type == "cpu":
            y, h = recurrent(u.to(exact), delta, A, B, C, before)
        else:
            y, h = chunked(u.to(exact), delta, A, B, C, before, chunk=self.chunk)
        carry(cache, self.layer, (tail, h))
        self._show(u.to(exact), delta, A, B, C, before, T if show is None else show)
        return self.out((y.to(x.dtype) + self.skip * u) * F.silu(gate))

    def multiplications(self, *, rows: int, keys: int) -> dict[str, int]:
        """However many keys there were: the products that lead to the states, convolution included ("qkv"), and what
        the states take ("values"), in the recurrent form of a CPU."""
        E, N = self.A_log.shape
        before = self.inp.in_features * 2 * E + E * self.select.out_features + self.to_delta.numel() + self.conv.numel()
        return {"qkv": rows * before, "values": multiplications("recurrent", rows, E, N)}

    def _show(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, before: Tensor | None, show: int
    ) -> None:
        layer = self.layer
        for name, tensor, axis in ((DELTA, delta, "channel"), (WRITE, B, "state"), (READ, C, "state")):
            if recording_on(name, layer=layer):
                tap(name, tensor[:, -show:], f"batch query {axis}", layer=layer)
        if recording_on(STATE, layer=layer) or recording_on(KEPT, layer=layer):
            kept, added = discretise(u, delta, A, B)
            if before is not None:
                added = torch.cat((added[:, :1] + kept[:, :1] * before[:, None], added[:, 1:]), 1)
            tap(KEPT, kept[:, -show:], "batch query channel state", layer=layer)
            tap(STATE, scan(kept, added)[:, -show:], "batch query channel state", layer=layer)
