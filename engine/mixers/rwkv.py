"""RWKV-4 time mixing: an average of all past values, each weighted by its key and by a decay of its channel.

"RWKV: Reinventing RNNs for the Transformer Era" (arXiv:2305.13048), section 3.1 (token shift, WKV operator, output
gate) and appendix "Time-Mixing Block as an RNN Cell". Version 4 is taken because `transformers` has it as an oracle.
Paper -> here: w = `decay` (above 0, a channel loses a factor e^-w a token), u = `bonus` (of the present token), wkv_t =
the answer of the three forms, r = receptance, mu = `mix`. wkv_t is a softmax average over the past with log weights
k_i - (t-1-i) w, and u + k_t for the token itself; `parallel` is this sentence.

Shapes: k and v [B, T, C], decay and bonus [C]; a state is the average of the past values and the logarithm of their
weight, both [B, C]: what the paper's cell keeps as numerator and denominator (a, b), in a form that cannot overflow.
Deviations: the block's channel mixing is not here (it needs the token before, which a feed-forward of this decoder does
not see): the decoder's own feed-forward stands in its place. RoPE is not used: the decay knows distances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from engine.caches import Cache
from engine.mixers.rope import Rope
from engine.mixers.state import at_least, carried, carry, check_tokens, wide
from engine.recording import recording_on, site, tap

if TYPE_CHECKING:
    from engine.model import Shape

RECEPTANCE = site("rwkv.receptance", "how much of the answer each channel lets through", symbol="σ(r)", grows="query",
                  low=0.0, high=1.0)  # fmt: skip
KEY = site("rwkv.key", "how strongly each token writes, as a logarithm", symbol="k", grows="query")
VALUE = site("rwkv.value", "what each token writes", symbol="v", grows="query")
WKV = site("rwkv.wkv", "the weighted average each token reads", symbol="wkv", grows="query")
AVERAGE = site("rwkv.state", "the weighted average that is carried to the next token", symbol="a / b", grows="query")
MASS = site("rwkv.mass", "the logarithm of the weight of all that came so far", symbol="ln b", grows="query")
KEPT = site("rwkv.decay", "the share of its weight that a channel keeps from a token to the next", symbol="e⁻ʷ",
            low=0.0, high=1.0)  # fmt: skip


class State(NamedTuple):
    """All that is left of the past: its weighted average and the logarithm of its weight."""

    average: Tensor  # B C
    log_mass: Tensor  # B C


def empty_state(k: Tensor) -> State:
    return State(k.new_zeros(k.shape[0], k.shape[2]), k.new_full((k.shape[0], k.shape[2]), -torch.inf))


def log_weights(k: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """The logarithm of the weight of token i for token t, -inf where i > t: [B, T, T, C]."""
    T = k.shape[1]
    n = torch.arange(T, device=k.device)
    back = (n[:, None] - n)[..., None]  # T T 1, how far back i is from t
    past = (k[:, None] - (back - 1) * decay).masked_fill(back < 0, -torch.inf)
    return torch.where(back == 0, (k + bonus)[:, None], past)


def parallel(k: Tensor, v: Tensor, *, decay: Tensor, bonus: Tensor) -> Tensor:
    """wkv of all tokens from the whole matrix of weights, one matrix a channel: [B, T, C]."""
    check_kv(k, v, decay, bonus)
    return (log_weights(k, decay, bonus).softmax(2) * v[:, None]).sum(2)


def recurrent(
    k: Tensor, v: Tensor, state: State | None = None, *, decay: Tensor, bonus: Tensor
) -> tuple[Tensor, State]:
    """The same as an RNN: read with the token's own bonus, then decay and write without it. Returns wkv, state."""
    check_kv(k, v, decay, bonus)
    state = empty_state(k) if state is None else state
    wkv = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
        wkv.append(merge(state, State(v_t, k_t + bonus)).average)
        state = merge(State(state.average, state.log_mass - decay), State(v_t, k_t))
    return torch.stack(wkv, 1), state


def chunked(
    k: Tensor, v: Tensor, state: State | None = None, *, decay: Tensor, bonus: Tensor, chunk: int
) -> tuple[Tensor, State]:
    """The same, `chunk` tokens at a time: the past stands before them as one more token. Returns wkv, state."""
    check_kv(k, v, decay, bonus)
    at_least("chunk", chunk, 1)
    state = empty_state(k) if state is None else state
    wkv = []
    for kc, vc in zip(k.split(chunk, 1), v.split(chunk, 1), strict=True):
        c = kc.shape[1]
        steps = torch.arange(c, device=k.device)[:, None]  # c 1
        past = (state.log_mass[:, None] - steps * decay)[:, :, None]  # B c 1 C
        weights = torch.cat((past, log_weights(kc, decay, bonus)), 2).softmax(2)  # B c c+1 C
        values = torch.cat((state.average[:, None], vc), 1)  # B c+1 C
        wkv.append((weights * values[:, None]).sum(2))
        # What is left of the past and of each token once the chunk is over.
        logs = torch.cat((state.log_mass[:, None] - c * decay, kc - (c - 1 - steps) * decay), 1)  # B c+1 C
        state = State((logs.softmax(1) * values).sum(1), logs.logsumexp(1))
    return torch.cat(wkv, 1), state


def merge(a: State, b: State) -> State:
    """Two weighted averages as one."""
    log_mass = torch.logaddexp(a.log_mass, b.log_mass)
    average = a.average * (a.log_mass - log_mass).exp() + b.average * (b.log_mass - log_mass).exp()
    return State(average, log_mass)


def check_kv(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> None:
    if k.dim() != 3 or k.shape != v.shape or 0 in k.shape:
        raise ValueError(f"k and v must have one shape [batch, tokens, channels], not {list(k.shape)}, {list(v.shape)}")
    for name, value in (("decay", decay), ("bonus", bonus)):
        if value.shape != k.shape[2:]:
            raise ValueError(f"{name} must have shape [{k.shape[2]}], one number a channel, not {list(value.shape)}")


def multiplications(form: str, T: int, C: int, *, chunk: int = 1) -> int:
    """Multiplications for T tokens of C channels, exponentials not counted: a decay by a distance and a weight by a
    value for each pair in "parallel", 2T²C; two merges a token in "recurrent", 4TC; in "chunked" 2(c + 1)²C for each
    chunk of c, the past being one more token to read and the state one more reader."""
    for name, value in (("T", T), ("C", C), ("chunk", chunk)):
        at_least(name, value, 1)
    if form == "parallel":
        return 2 * T * T * C
    if form == "recurrent":
        return 4 * T * C
    if form == "chunked":
        whole, rest = divmod(T, chunk)
        return 2 * C * (whole * (chunk + 1) ** 2 + ((rest + 1) ** 2 if rest else 0))
    raise ValueError(f"form must be parallel, recurrent or chunked, not {form!r}")


class Rwkv(nn.Module):
    """Mixer of one layer. One token: recurrent; more: chunked. The starting values of decay, bonus and mix are those
    of the published code of version 4; they need no seed."""

    def __init__(self, shape: Shape, layer: int, *, chunk: int = 16) -> None:
        super().__init__()
        C = shape.width
        self.layer, self.chunk = layer, at_least("chunk", chunk, 1)
        depth = layer / max(1, shape.layers - 1)  # 0 in the first layer, 1 in the last
        channel = torch.arange(C) / max(1, C - 1)  # 0 to 1
        share = (torch.arange(C) / C) ** (1 - layer / shape.layers)
        self.log_decay = nn.Parameter(-5 + 8 * channel ** (0.7 + 1.3 * depth))  # w = exp(log_decay) is above 0
        self.bonus = nn.Parameter(torch.log(torch.tensor(0.3)) + 0.5 * ((torch.arange(C) + 1) % 3 - 1))
        self.mix = nn.Parameter(torch.stack((share, share + 0.3 * depth, share**0.5)))  # 3 C, of k, v and r
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.out = nn.Linear(C, C, bias=False)

    def forward(
        self, x: Tensor, *, rope: Rope | None = None, cache: Cache | None = None, show: int | None = None
    ) -> Tensor:
        check_tokens(x, self.key.in_features)
        T = x.shape[1]
        last, before = carried(cache, self.layer, x) or (torch.zeros_like(x[:, 0]), None)
        shifted = torch.cat((last[:, None], x[:, :-1]), 1)  # B T C, the token before each
        xk, xv, xr = (x * mix + shifted * (1 - mix) for mix in self.mix)
        r = torch.sigmoid(self.receptance(xr))  # B T C
        k, v = self.key(xk).to(wide(x.dtype)), self.value(xv).to(wide(x.dtype))  # B T C each
        decay, bonus = self.log_decay.to(k.dtype).exp(), self.bonus.to(k.dtype)
        if T == 1:
            wkv, state = recurrent(k, v, before, decay=decay, bonus=bonus)
        else:
            wkv, state = chunked(k, v, before, decay=decay, bonus=bonus, chunk=self.chunk)
        carry(cache, self.layer, (x[:, -1].clone(), state))
        self._show(r, k, v, wkv, before, decay, bonus, T if show is None else show)
        return self.out(r * wkv.to(x.dtype))

    def multiplications(self, *, rows: int, keys: int) -> dict[str, int]:
        """However many keys there were: keys, values and receptance ("qkv"); weights, decays and values ("values")."""
        C = self.out.in_features
        form = "recurrent" if rows == 1 else "chunked"
        return {"qkv": 3 * rows * C * C, "values": multiplications(form, rows, C, chunk=self.chunk)}

    def _show(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        wkv: Tensor,
        before: State | None,
        decay: Tensor,
        bonus: Tensor,
        show: int,
    ) -> None:
        layer = self.layer
        for name, tensor in ((RECEPTANCE, r), (KEY, k), (VALUE, v), (WKV, wkv)):
            if recording_on(name, layer=layer):
                tap(name, tensor[:, -show:], "batch query channel", layer=layer)
        if recording_on(KEPT, layer=layer):
            tap(KEPT, (-decay).exp(), "channel", layer=layer)
        if recording_on(AVERAGE, layer=layer) or recording_on(MASS, layer=layer):
            states = []
            for k_t, v_t in zip(k.split(1, 1), v.split(1, 1), strict=True):
                _, before = recurrent(k_t, v_t, before, decay=decay, bonus=bonus)
                states.append(before)
            tap(AVERAGE, torch.stack([s.average for s in states[-show:]], 1), "batch query channel", layer=layer)
            tap(MASS, torch.stack([s.log_mass for s in states[-show:]], 1), "batch query channel", layer=layer)
