"""Two Titans layers: a short-term window, a long-term memory that learns while reading, and persistent tokens.

"Titans" (arXiv:2501.00663), section 3.3 (persistent memory), 4.1 (memory as a context, equations 21 to 25) and 4.2
(memory as a gate, equations 26 to 28). Paper -> here: p = `persistent`, M = `memory` (the forms are in titans.py),
SW-Attn = attention through `window`, h_t = what M answers before the segment, S^(t) = a segment of `segment` tokens.

Deviations. The gate: the paper says "normalised by learnable vectors, then a non-linearity"; here y ⊗ m is
RMSNorm(y) · sigmoid(RMSNorm(m)), so that a memory without an answer halves and does not silence. Causality: what token
t reads out of the memory, as context or as gate, was written by tokens up to t; equation 25 read as it stands would
show it the rest of its segment. Persistent tokens are keys and values of the attention, without a position; the memory
does not read them. Those of neural_memory.py come on top.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.caches import Cache, View
from engine.mixers.neural_memory import NeuralMemory
from engine.mixers.rope import Rope
from engine.mixers.softmax import PATTERN, attend, attention_scores
from engine.mixers.state import at_least, carried, carry, check_tokens, positions
from engine.mixers.titans import Memory, chunk_parts
from engine.mixers.windows import in_text, kept_positions, may_look, window_view
from engine.recording import recording_on, site, tap

if TYPE_CHECKING:
    from engine.model import Shape

PERSISTENT = site("titans.persistent", "the share of attention that goes to the persistent tokens", grows="query",
                  low=0.0, high=1.0)  # fmt: skip
CONTEXT = site("titans.context", "the share of attention that goes to what the memory answered", grows="query",
               low=0.0, high=1.0)  # fmt: skip


class MemoryAsGate(nn.Module):
    """Mixer of one layer, section 4.2: attention through a window beside a memory, multiplied."""

    def __init__(
        self,
        shape: Shape,
        layer: int,
        *,
        window: int,
        persistent: int = 4,
        depth: int = 1,
        chunk: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        inner = shape.heads * shape.head_width
        self.layer, self.heads, self.window = layer, shape.heads, at_least("window", window, 1)
        self.qkv = nn.Linear(shape.width, 3 * inner, bias=False)
        self.persistent = persistent_tokens(shape, layer, count=persistent, seed=seed)
        self.memory = NeuralMemory(shape, layer, depth=depth, chunk=chunk, seed=seed)
        self.norm_short, self.norm_long = (nn.RMSNorm(inner, eps=shape.norm_eps) for _ in range(2))
        self.out = nn.Linear(inner, shape.width, bias=False)

    def forward(self, x: Tensor, *, rope: Rope, cache: Cache | None = None, show: int | None = None) -> Tensor:
        check_tokens(x, self.qkv.in_features)
        T = x.shape[1]
        show = T if show is None else show
        places = positions(cache, T)
        past, memory = carried(cache, self.layer, x) or (None, self.memory.fresh(x))
        q, k, v = heads(self.qkv(x), self.heads)  # B H T D each
        q, k = rope.rotate(q, places), rope.rotate(k, places)
        found, shares = [], []
        for start in range(0, T, 2 * self.window):  # part by part, so that a long text costs T and not T²
            part = slice(start, min(T, start + 2 * self.window))
            view, k_at, past = window_view(k[:, :, part], v[:, :, part], past, places[part], window=self.window)
            view.mask = may_look(k_at[start - part.stop :], k_at, window=self.window)  # c S
            y, share = self._attend(q[:, :, part], view, k_at)
            found.append(y)
            shares.append(share)
        short = torch.cat(found, 2).transpose(1, 2).flatten(2)  # B T H*D
        show_shares(shares, ((PERSISTENT, "persistent"), (PATTERN, "key")), layer=self.layer, show=show)
        self.memory.show(x, memory, show=show)
        long, memory = self.memory(x, memory)  # B T H*D
        carry(cache, self.layer, (past, memory))
        return self.out(self.norm_short(short) * torch.sigmoid(self.norm_long(long)))

    def multiplications(self, *, rows: int, keys: int) -> dict[str, int]:
        """As `forward` computes it: new tokens by persistent ones, by what the window keeps and themselves, part by
        part; the memory's own products are "qkv" where they are made, and "values" where it learns and answers."""
        W, inner, P = self.qkv.in_features, self.out.in_features, len(self.persistent)
        cells, parts = 0, range(0, rows, 2 * self.window)
        for start in parts:
            c = min(2 * self.window, rows - start)
            cells += c * (P + len(kept_positions(keys - rows + start, window=self.window)) + c)
        made, learnt = self.memory.multiplications(rows, age=(keys - rows) % self.memory.chunk)
        met = cells * inner
        return {"qkv": len(parts) * P * W * 3 * inner + made, "scores": met, "values": met + learnt}

    def _attend(self, q: Tensor, view: View, k_at: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the queries [B, H, c, D] find in persistent tokens and window; with the shares, if they are recorded."""
        view, P = behind_persistent(self.qkv(self.persistent)[None], view, self.heads)
        y = attend(q, view)  # B H c D
        if not any(recording_on(name, layer=self.layer) for name in (PERSISTENT, PATTERN)):
            return y, ()
        pattern = attention_scores(q, view, q.shape[2]).softmax(-1)  # B H c P+S
        return y, (pattern[..., :P], in_text(pattern[..., P:], k_at, fill=0))


class Segment(NamedTuple):
    """The keys and values so far of the segment under way: of the memory's answers, and of its own tokens."""

    context_k: Tensor  # B H n D each
    context_v: Tensor
    own_k: Tensor
    own_v: Tensor


class MemoryAsContext(nn.Module):
    """Mixer of one layer, section 4.1: segment by segment, attention to persistent tokens, to what the memory answers
    to the segment, and to the segment; then the memory learns what attention found, and gates it."""

    def __init__(
        self, shape: Shape, layer: int, *, segment: int, persistent: int = 4, depth: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        inner = shape.heads * shape.head_width
        self.layer, self.heads, self.segment = layer, shape.heads, at_least("segment", segment, 1)
        self.qkv = nn.Linear(shape.width, 3 * inner, bias=False)
        self.persistent = persistent_tokens(shape, layer, count=persistent, seed=seed)
        self.memory = NeuralMemory(shape, layer, depth=depth, chunk=segment, seed=seed)
        self.answer = nn.Linear(inner, shape.width, bias=False)
        self.found = nn.Linear(inner, shape.width, bias=False)
        self.norm_short = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.norm_long = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, *, rope: Rope, cache: Cache | None = None, show: int | None = None) -> Tensor:
        check_tokens(x, self.qkv.in_features)
        T = x.shape[1]
        places = positions(cache, T)
        before = carried(cache, self.layer, x) or (None, self.memory.fresh(x))
        segment, memory = before
        gated, short, shares, start = [], [], [], 0
        while start < T:
            part = slice(start, min(T, start + self.segment - memory.age))
            found, segment, share = self._attend(x[:, part], rope, places[part], segment, memory)
            long, memory = self.memory(found, memory)  # equations 24 and 25
            gated.append(self.norm_short(found) * torch.sigmoid(self.norm_long(self.answer(long))))
            short.append(found)
            shares.append(share)
            start = part.stop
        carry(cache, self.layer, (segment, memory))
        show = T if show is None else show
        sites = ((PERSISTENT, "persistent"), (CONTEXT, "key"), (PATTERN, "key"))
        show_shares(shares, sites, layer=self.layer, show=show)
        self.memory.show(torch.cat(short, 1), before[1], show=show)
        return self.out(torch.cat(gated, 1))

    def multiplications(self, *, rows: int, keys: int) -> dict[str, int]:
        """As `forward` computes it, segment by segment: the memory is asked, its answers and the tokens are met, what
        was found is learned and answered again. Beside `qkv`, all products with weights are in "qkv"."""
        W, inner, P = self.qkv.in_features, self.answer.in_features, len(self.persistent)
        age = (keys - rows) % self.segment
        cells, asked, parts = 0, 0, chunk_parts(rows, age=age, chunk=self.segment)
        for c in parts:
            age += c
            cells += c * (P + 2 * age)
            asked += self.memory.asking(c)
            age %= self.segment
        made, learnt = self.memory.multiplications(rows, age=(keys - rows) % self.segment)
        made += rows * (W * 3 * inner + W * 3 * inner + 3 * inner * W)  # asking, the answers' keys; answer, found, gate
        met = cells * inner
        return {"qkv": made + len(parts) * P * W * 3 * inner, "scores": met, "values": met + asked + learnt}

    def _attend(
        self, x: Tensor, rope: Rope, places: range, past: Segment | None, memory: Memory
    ) -> tuple[Tensor, Segment, tuple[Tensor, ...]]:
        """What the tokens of one segment, or a part of it, find: [B, c, W]. With the segment so far, and, while a
        recording is on, the shares of attention that went to persistent tokens, to the context and to the segment."""
        c = x.shape[1]
        context = self.answer(self.memory.ask(memory, x))  # B c W, equation 21
        _, hk, hv = heads(self.qkv(context), self.heads)
        q, k, v = heads(self.qkv(x), self.heads)
        q, hk, k = (rope.rotate(t, places) for t in (q, hk, k))
        now = Segment(hk, hv, k, v)
        if past is not None and memory.age:
            now = Segment(*(torch.cat(pair, 2) for pair in zip(past, now, strict=True)))
        n = now.own_k.shape[2]
        seen = torch.ones(c, n, dtype=torch.bool, device=x.device).tril(n - c)  # c n
        both = (torch.cat((now.context_k, now.own_k), 2), torch.cat((now.context_v, now.own_v), 2))  # B H 2n D
        view = View(*both, range(2 * n - c, 2 * n), mask=torch.cat((seen, seen), 1))
        view, P = behind_persistent(self.qkv(self.persistent)[None], view, self.heads)
        found = self.found(attend(q, view).transpose(1, 2).flatten(2))  # B c W, equation 23
        if not any(recording_on(name, layer=self.layer) for name in (PERSISTENT, CONTEXT, PATTERN)):
            return found, now, ()
        k_at = torch.arange(places.stop - n, places.stop, device=x.device)
        to_persistent, to_context, to_own = attention_scores(q, view, c).softmax(-1).split((P, n, n), -1)
        return found, now, (to_persistent, in_text(to_context, k_at, fill=0), in_text(to_own, k_at, fill=0))


def behind_persistent(qkv: Tensor, view: View, count: int) -> tuple[View, int]:
    """The view with the persistent tokens [1, P, 3 H D] in front, which every query sees; and P."""
    assert view.mask is not None
    assert isinstance(view.q_positions, range)
    _, k, v = (t.expand(len(view.k), -1, -1, -1) for t in heads(qkv, count))  # B H P D each
    P = k.shape[2]
    places = range(view.q_positions.start + P, view.q_positions.stop + P)
    mask = F.pad(view.mask, (P, 0), value=True)
    return View(torch.cat((k, view.k), 2), torch.cat((v, view.v), 2), places, mask=mask), P


def show_shares(shares: list[tuple[Tensor, ...]], sites: tuple[tuple[str, str], ...], *, layer: int, show: int) -> None:
    """Tap shares of attention that were gathered part by part, [B, H, c, columns] each: a later part may have more
    columns, and where an earlier one has none the share is 0. Nothing was gathered while nothing is recorded."""
    if shares[0]:
        for (name, axis), parts in zip(sites, zip(*shares, strict=True), strict=True):
            width = max(part.shape[-1] for part in parts)
            rows = torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in parts], 2)  # B H T columns
            tap(name, rows[:, :, -show:], f"batch head query {axis}", layer=layer)


def heads(qkv: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, 3 H D] -> queries, keys and values [B, H, T, D]."""
    q, k, v = qkv.unflatten(2, (3 * count, qkv.shape[2] // (3 * count))).transpose(1, 2).chunk(3, 1)
    return q, k, v


def persistent_tokens(shape: Shape, layer: int, *, count: int, seed: int) -> nn.Parameter:
    """Equation 19: learned vectors that stand before every text, [P, W]."""
    at_least("persistent", count, 0)
    random = torch.Generator().manual_seed(seed * 1000 + layer + 500)
    return nn.Parameter(0.02 * torch.randn(count, shape.width, device="cpu", generator=random))
