r"""Decoding with only the neurons and heads that a token needs: their rows are gathered, the others never multiplied.

Liu et al., Deja Vu (arXiv:2310.17157); the names are in `contextual`. A chooser is a function x [N, W] -> bool [N, F]
(or [N, H]): a trained `Predictor`; the truth, which computes everything first, to show what prediction could reach; the
same ones for every token. Everything chosen, or with ReLU every non-zero, gives the dense answer.

    contextual(model, choosers, share=0.3)    # a copy; `model` stays as it was, and shares its weights

Shapes: x [B, T, W] as in the dense modules. Errors: ValueError for a share that is not above 0 and at most 1.
Deviations: keys and values are made for all heads, for a later token may choose any (the paper keeps the input of those
it left out). Rows are gathered for one token at a time; several at once (a prompt) are computed densely and masked,
which gives the same. The predictors run in turn, not beside the layers: what lookahead gains in time is not shown.
`engine.generate` counts the dense layers' multiplications; `work` counts what is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.caches import Cache, View, fresh
from engine.mixers.rope import Rope
from engine.mixers.softmax import PATTERN, SoftmaxAttention, attend, attention_scores
from engine.model import GELU, Decoder, SwiGLU
from engine.prune.contextual import Predictor, top
from engine.prune.structured import attention, feed_forward, key_heads
from engine.quant import copied
from engine.recording import recording_on, site, tap

CHOSEN = site("contextual.chosen", "which neurons are computed for a token", low=0.0, high=1.0, grows="query")
CHOSEN_HEADS = site("contextual.chosen.heads", "which heads are computed for a token", low=0.0, high=1.0, grows="query")

Choose = Callable[[Tensor], Tensor]
"""x [N, W], what the layer reads -> bool [N, F] or [N, H], true where it is to be computed."""


def by_predictor(predictor: Predictor, *, share: float) -> Choose:
    """Those with the highest logits: `share` of all, rounded, one at least."""
    keep = count_of(predictor.second.out_features, share)
    return lambda x: top(predictor(x), keep)


def by_truth(ffn: nn.Module, *, share: float | None = None) -> Choose:
    """The truly largest activations (`share` of all), or (None) all that are not exactly zero."""
    keep = None if share is None else count_of(ffn.down.in_features, share)  # type: ignore[union-attr, arg-type]

    def choose(x: Tensor) -> Tensor:
        a = activations(ffn, x).abs()
        return a > 0 if keep is None else top(a, keep)

    return choose


def by_habit(values: Tensor, *, share: float) -> Choose:
    """The same ones for every token: those with the largest mean magnitude in `values` [N, F], seen before."""
    if values.dim() != 2 or not len(values):
        raise ValueError(f"values must have shape [N, F] with a row at least, not {list(values.shape)}")
    chosen = top(values.abs().mean(0, keepdim=True), count_of(values.shape[1], share))
    return lambda x: chosen.to(x.device).expand(len(x), -1)


def everything(count: int) -> Choose:
    """All `count` of them."""
    return lambda x: x.new_ones((len(x), count), dtype=torch.bool)


def count_of(count: int, share: float) -> int:
    """`share` of `count`, rounded, one at least."""
    if isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share!r}")
    return max(1, round(share * count))


def activations(ffn: nn.Module, x: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    """The activations [..., F] of a feed-forward network, or of those of its neurons that `rows` names."""
    if isinstance(ffn, SwiGLU):
        gate, up = (F.linear(x, half[rows]) for half in ffn.gate_up.weight.chunk(2))
        return F.silu(gate) * up
    up = F.linear(x, ffn.up.weight[rows])  # type: ignore[union-attr, index]
    return F.gelu(up) if isinstance(ffn, GELU) else F.relu(up)


class Ahead:
    """What the layer before read: owned by one copy of a model, so that layer l can be predicted from it."""

    def __init__(self) -> None:
        self.read: dict[int, Tensor] = {}  # layer -> x N W


class ContextualFFN(nn.Module):
    """A feed-forward network that computes the neurons chosen. With `ahead`, they are chosen by what layer - 1 read."""

    def __init__(self, ffn: nn.Module, choose: Choose, *, layer: int, ahead: Ahead | None = None) -> None:
        super().__init__()
        self.dense, self.choose, self.layer, self.ahead = ffn, choose, layer, ahead

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # N W
        asked = flat
        if self.ahead is not None:
            self.ahead.read[self.layer] = flat
            asked = self.ahead.read.pop(self.layer - 1, flat)
        chosen = self.choose(asked)  # N F
        if recording_on(CHOSEN, layer=self.layer):
            tap(CHOSEN, chosen, "query neuron", layer=self.layer)
        if len(flat) == 1:
            rows = chosen[0].nonzero().flatten()
            y = F.linear(activations(self.dense, flat, rows), self.dense.down.weight[:, rows])  # type: ignore[union-attr, index]
        else:
            y = F.linear(activations(self.dense, flat) * chosen, self.dense.down.weight)  # type: ignore[union-attr, arg-type]
        return y.view(x.shape)


class ContextualAttention(SoftmaxAttention):
    """Softmax attention that asks, attends and writes with the chosen heads alone."""

    def __init__(self, full: SoftmaxAttention, choose: Choose) -> None:
        nn.Module.__init__(self)
        self.layer, self.heads, self.kv_heads, self.head_width = full.layer, full.heads, full.kv_heads, full.head_width
        self.qkv, self.out, self.users, self.choose = full.qkv, full.out, key_heads(full), choose

    def forward(self, x: Tensor, *, rope: Rope, cache: Cache | None = None, show: int | None = None) -> Tensor:
        B, T, _ = x.shape
        H, G, D = self.heads, self.kv_heads, self.head_width
        chosen = self.choose(x.flatten(0, 1))  # N H
        if recording_on(CHOSEN_HEADS, layer=self.layer):
            tap(CHOSEN_HEADS, chosen, "query head", layer=self.layer)
        few = chosen[0].nonzero().flatten() if B * T == 1 else torch.arange(H, device=x.device)
        wq, wkv = self.qkv.weight.split((H * D, 2 * G * D))
        q = F.linear(x, wq.unflatten(0, (H, D))[few].flatten(0, 1)).view(B, T, -1, D).transpose(1, 2)  # B few T D
        k, v = F.linear(x, wkv).view(B, T, 2 * G, D).transpose(1, 2).chunk(2, 1)  # B G T D each
        view = fresh(k, v, rope) if cache is None else cache.extend(self.layer, k, v, rope)
        users = torch.tensor(self.users, device=x.device)[few]
        met = replace(view, k=view.k[:, users], v=view.v[:, users])  # rows few S D
        q = rope.rotate(q, view.q_positions)
        y = attend(q, met).transpose(1, 2)  # B T few D
        if B * T == 1:
            self._show_one(q, met, cache, few)
        else:
            self._show(q, v, met, cache, T if show is None else show)
            y = y * chosen.view(B, T, H, 1)
        return F.linear(y.flatten(2), self.out.weight.unflatten(1, (H, D))[:, few].flatten(1))

    def _show_one(self, q: Tensor, met: View, cache: Cache | None, few: Tensor) -> None:
        """The pattern of one token, with zeros for the heads that were left out."""
        watched = cache is not None and cache.watches
        if watched or recording_on(PATTERN, layer=self.layer):
            pattern = attention_scores(q, met, 1).softmax(-1)  # 1 few 1 S
            whole = pattern.new_zeros(1, self.heads, 1, pattern.shape[-1]).index_copy(1, few, pattern)
            tap(PATTERN, whole, "batch head query key", layer=self.layer)
            if cache is not None and cache.watches:
                cache.observe(self.layer, whole)


def contextual(
    model: Decoder,
    *,
    neurons: Mapping[int, Choose] | None = None,
    heads: Mapping[int, Choose] | None = None,
    ahead: bool = False,
) -> Decoder:
    """A copy of `model` that computes in each layer named what its chooser says.

    With `ahead`, a layer's neurons are chosen by what the feed-forward network of the layer before read (the first
    layer's by its own): its choosers must be trained on that.
    """
    twin = copied(model)
    assert isinstance(twin, Decoder)
    for layer, choose in (heads or {}).items():
        twin.blocks[layer].mixer = ContextualAttention(attention(model, layer), choose)
    before = Ahead() if ahead else None
    for layer in range(len(model.blocks)) if ahead and neurons else neurons or {}:
        ffn = feed_forward(model, layer)
        # Looking ahead, every layer tells what it read, also one that computes everything.
        choose = (neurons or {}).get(layer) or everything(ffn.down.in_features)
        twin.blocks[layer].ffn = ContextualFFN(ffn, choose, layer=layer, ahead=before)
    return twin


def work(model: Decoder, *, neurons: float = 1.0, heads: float = 1.0, rank: int = 0) -> float:
    """The share of the blocks' multiplications with weights that is left for one token, predictors of `rank` included.

    Keys and values are made for all heads.
    """
    dense = done = 0
    for layer in range(len(model.blocks)):
        mixer, ffn = attention(model, layer), feed_forward(model, layer)
        width, count = ffn.down.out_features, ffn.down.in_features
        D, few = mixer.head_width, count_of(mixer.heads, heads)
        matrices = 3 if isinstance(ffn, SwiGLU) else 2
        dense += width * (2 * (mixer.heads + mixer.kv_heads) * D + matrices * count)
        done += width * (2 * (few + mixer.kv_heads) * D + matrices * count_of(count, neurons))
        done += rank * (width + count) * (neurons < 1) + rank * (width + mixer.heads) * (heads < 1)
    return done / dense
