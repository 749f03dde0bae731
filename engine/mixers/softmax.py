"""Softmax attention, with as many key/value heads as you like: MHA, GQA and MQA are one module.

"Attention Is All You Need" (arXiv:1706.03762), equation 1; grouped queries: GQA (arXiv:2305.13245), section 2.2.
Paper -> here: Q, K, V = q, k, v; d_k = head_width; h = heads; g groups = kv_heads (1: MQA, heads: MHA).
Adjacent query heads share a key/value head. The scale is 1 / sqrt(head_width), in nats.

The answer always comes from one fused kernel. What is tapped as scores and pattern is computed beside it in
float32 or better from the same q and k, so that logits are bit-equal with recording on and off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.caches import Cache, View, fresh
from engine.mixers.rope import Rope
from engine.recording import recording_on, site, tap

if TYPE_CHECKING:
    from engine.model import Shape

Q = site("attention.q", "what each new token asks, after rotation", symbol="q", grows="query")
K = site("attention.k", "what each new token offers, after rotation at the place it had then", symbol="k", grows="key")
V = site("attention.v", "what each new token hands over when it is attended to", symbol="v", grows="key")
SCORES = site("attention.scores", "query times key over the root of the head width", symbol="q·k/√d", grows="query")
PATTERN = site("attention.pattern", "the share of attention that a query pays to a key", symbol="softmax(q·k/√d)",
               grows="query", low=0.0, high=1.0)  # fmt: skip


class SoftmaxAttention(nn.Module):
    """Mixer of one layer. `qkv` makes all queries, then all keys, then all values in one product."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_width = layer, shape.heads, shape.kv_heads, shape.head_width
        self.qkv = nn.Linear(shape.width, (shape.heads + 2 * shape.kv_heads) * shape.head_width, bias=False)
        self.out = nn.Linear(shape.heads * shape.head_width, shape.width, bias=False)

    def forward(self, x: Tensor, *, rope: Rope, cache: Cache | None = None, show: int | None = None) -> Tensor:
        B, T, _ = x.shape
        H, G = self.heads, self.kv_heads
        qkv = self.qkv(x).view(B, T, H + 2 * G, self.head_width).transpose(1, 2)  # B H+2G T D
        q, k, v = qkv[:, :H], qkv[:, H : H + G], qkv[:, H + G :]
        view = fresh(k, v, rope) if cache is None else cache.extend(self.layer, k, v, rope)
        q = rope.rotate(q, view.q_positions)  # B H T D
        y = attend(q, view)  # B H T D
        self._show(q, v, view, cache, T if show is None else show)
        return self.out(y.transpose(1, 2).reshape(B, T, H * self.head_width))

    def multiplications(self, *, rows: int, keys: int) -> dict[str, int]:
        """Of queries with keys, and of the pattern with values; those of `qkv` and `out` are seen in their weights."""
        met = rows * keys * self.heads * self.head_width
        return {"scores": met, "values": met}

    def _show(self, q: Tensor, v: Tensor, view: View, cache: Cache | None, show: int) -> None:
        layer = self.layer
        watched = cache is not None and cache.watches
        if recording_on(Q, layer=layer):
            tap(Q, q[:, :, -show:], "batch head query width", layer=layer)
        if recording_on(K, layer=layer):
            tap(K, own_keys(view, q.shape[0], q.shape[2])[:, :, -show:], "batch head key width", layer=layer)
        if recording_on(V, layer=layer):
            tap(V, v[:, :, -show:], "batch head key width", layer=layer)
        if watched or recording_on(PATTERN, layer=layer) or recording_on(SCORES, layer=layer):
            scores = attention_scores(q, view, show)  # B H show S
            tap(SCORES, scores, "batch head query key", layer=layer)
            pattern = tap(PATTERN, scores.softmax(-1), "batch head query key", layer=layer)
            if cache is not None and cache.watches:
                cache.observe(layer, pattern)


def attend(q: Tensor, view: View) -> Tensor:
    """What q [B, H, T, D] finds in the view: [B, H, T, D], or as wide as its values are."""
    B, H, T, D = q.shape
    rows, G = view.k.shape[:2]
    if T > 1 and rows == B:
        return F.scaled_dot_product_attention(
            q, view.k, view.v, attn_mask=view.mask, is_causal=view.causal, enable_gqa=H != G
        )
    # One query a row: the H/G heads that share keys stand as queries of one head, and no key is repeated.
    q = q.transpose(1, 2).reshape(rows, G, H // G, D)
    y = F.scaled_dot_product_attention(q, view.k, view.v, attn_mask=view.mask)
    return y.view(B, T, H, view.v.shape[-1]).transpose(1, 2)


def attention_scores(q: Tensor, view: View, show: int) -> Tensor:
    """The scaled scores of the last `show` queries: [B, H, show, S], -inf where a query may not look."""
    B, H, T, D = q.shape
    rows, G, S, _ = view.k.shape
    mask = view.mask
    if view.causal and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()  # T S
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q[:, :, -show:].to(wide) / D**0.5, view.k.to(wide)
    if rows == B:
        scores = (q.reshape(B, G, -1, D) @ k.mT).view(B, H, show, S)
        mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., -show:, :]
    else:
        q = q.transpose(1, 2).reshape(B, show, G, H // G, D)
        k = k.view(B, T, G, S, D)[:, -show:]
        scores = (q @ k.mT).view(B, show, H, S).transpose(1, 2)
        mask = mask if mask is None else mask.view(B, T, S)[:, None, -show:]
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def own_keys(view: View, batch: int, count: int) -> Tensor:
    """The key of each query's own token, as the view holds it: [B, H_kv, T, D]."""
    places = view.q_positions
    if isinstance(places, range):
        places = torch.arange(places.start, places.stop, device=view.k.device)
    places = places.expand(batch, count)  # B T
    rows, G, _, D = view.k.shape
    if rows == batch:
        return view.k.gather(2, places[:, None, :, None].expand(batch, G, count, D))
    k = view.k.gather(2, places.reshape(rows, 1, 1, 1).expand(rows, G, 1, D))  # B*T G 1 D
    return k.view(batch, count, G, D).transpose(1, 2)
