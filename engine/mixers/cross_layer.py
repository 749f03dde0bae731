"""Layers that share keys and values: most layers only ask, and read what an earlier layer remembered.

CLA, "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention" (arXiv:2405.12981), section 2: the first
layer of each group of `factor` makes keys and values, the others of the group attend to them with queries of their own.
YOCO, "You Only Cache Once" (arXiv:2405.05254), section 2: the first half of the layers looks through a window, its
output becomes one global K and V, and all layers of the second half attend to these.
Paper -> here: CLA2 = `cla(factor=2)`; a layer with key and value projections = `Owner`, one without = `Borrower`;
self-decoder = the first half, cross-decoder = the second, K̂ and V̂ = keys and values of the first `Owner` past the half.
Deviations: YOCO's paper tries gated retention too, here the first half has sliding windows; its first cross layer makes
K̂ and V̂ from its own normed input (the paper's separate norm differs by a gain only, which projections can take up).

What is shared lives in `shared`, the dict of one forward pass, so that two readers of one model never meet.
With any cache: only owners store anything, and the attention of borrowers is observed as paid to their owner's slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.caches import Cache, View, fresh
from engine.mixers.hybrid import Mixer
from engine.mixers.rope import Rope
from engine.mixers.softmax import PATTERN, SCORES, Q, SoftmaxAttention, attend, attention_scores
from engine.mixers.state import at_least, check_tokens
from engine.mixers.windows import WindowAttention
from engine.recording import event, recording_on, tap

if TYPE_CHECKING:
    from engine.model import Decoder, Shape

Shared = dict[int, Any]
"""What layers hand on in one pass: the view of each owner, by its layer."""


class Owner(SoftmaxAttention):
    """Softmax attention that lets later layers read its keys and values; weights are named as there."""

    shares = True

    def forward(
        self,
        x: Tensor,
        *,
        rope: Rope,
        cache: Cache | None = None,
        show: int | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        check_tokens(x, self.qkv.in_features)
        B, T, _ = x.shape
        H, G, D = self.heads, self.kv_heads, self.head_width
        if shared is not None and self.layer in shared:  # the keys are there already, and x has the last rows only
            return _ask(self, F.linear(x, self.qkv.weight[: H * D]), self.layer, rope, cache, show, shared)
        qkv = self.qkv(x).view(B, T, H + 2 * G, D).transpose(1, 2)  # B H+2G T D
        k, v = qkv[:, H : H + G], qkv[:, H + G :]
        view = fresh(k, v, rope) if cache is None else cache.extend(self.layer, k, v, rope)
        if shared is not None:
            shared[self.layer] = view
        q = rope.rotate(qkv[:, :H], view.q_positions)  # B H T D
        y = attend(q, view)  # B H T D
        event("layers.keep", layer=self.layer, values=2 * G * D)
        self._show(q, v, view, cache, T if show is None else show)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))

    def remember(self, x: Tensor, *, rope: Rope, cache: Cache | None = None) -> View:
        """Keys and values of the normed residual [B, T, W], and no answer: what a prompt needs of this layer."""
        check_tokens(x, self.qkv.in_features)
        B, T, _ = x.shape
        G, D = self.kv_heads, self.head_width
        kv = F.linear(x, self.qkv.weight[self.heads * D :]).view(B, T, 2 * G, D).transpose(1, 2)  # B 2G T D
        event("layers.keep", layer=self.layer, values=2 * G * D)
        return (
            fresh(kv[:, :G], kv[:, G:], rope) if cache is None else cache.extend(self.layer, kv[:, :G], kv[:, G:], rope)
        )


class Borrower(nn.Module):
    """Softmax attention of one layer to the keys and values of the layer `owner`. `qkv` makes queries only."""

    shares = True

    def __init__(self, shape: Shape, layer: int, *, owner: int) -> None:
        super().__init__()
        if at_least("owner", owner, 0) >= layer:
            raise ValueError(f"owner must be a layer before layer {layer}, not {owner}")
        self.layer, self.owner = layer, owner
        self.heads, self.head_width = shape.heads, shape.head_width
        self.qkv = nn.Linear(shape.width, shape.heads * shape.head_width, bias=False)
        self.out = nn.Linear(shape.heads * shape.head_width, shape.width, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        rope: Rope,
        cache: Cache | None = None,
        show: int | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        check_tokens(x, self.qkv.in_features)
        if shared is None or self.owner not in shared:
            raise ValueError(
                f"shared must hold what layer {self.owner} remembered, and layer {self.layer} finds nothing"
            )
        return _ask(self, self.qkv(x), self.owner, rope, cache, show, shared)

    def multiplications(self, *, rows: int, keys: int) -> dict[str, int]:
        """As for softmax attention; that keys and values are not made here is seen in the weights."""
        met = rows * keys * self.heads * self.head_width
        return {"scores": met, "values": met}


def _ask(
    mixer: Owner | Borrower, q: Tensor, owner: int, rope: Rope, cache: Cache | None, show: int | None, shared: Shared
) -> Tensor:
    """What queries [B, T, H D], not rotated yet, find in the view of `owner`: [B, T, W]."""
    B, T, _ = q.shape
    view: View = shared[owner]
    q = rope.rotate(q.view(B, T, mixer.heads, -1).transpose(1, 2), view.q_positions)  # B H T D
    y = attend(q, view)  # B H T D
    layer, show = mixer.layer, T if show is None else min(show, T)
    event("layers.read", layer=layer, owner=owner)
    if recording_on(Q, layer=layer):
        tap(Q, q[:, :, -show:], "batch head query width", layer=layer)
    watched = cache is not None and cache.watches
    if watched or recording_on(PATTERN, layer=layer) or recording_on(SCORES, layer=layer):
        scores = attention_scores(q, view, show)  # B H show S
        tap(SCORES, scores, "batch head query key", layer=layer)
        pattern = tap(PATTERN, scores.softmax(-1), "batch head query key", layer=layer)
        if cache is not None and cache.watches:
            cache.observe(owner, pattern)
    return mixer.out(y.transpose(1, 2).reshape(B, T, -1))


def cla(shape: Shape, *, factor: int) -> Mixer:
    """The mixer of each layer when `factor` neighbouring layers share keys and values (1: none do).

    Decoder(shape, mixer=cla(shape, factor=2))
    """
    if shape.layers % at_least("factor", factor, 1):
        raise ValueError(f"factor must divide layers={shape.layers}, and {factor} does not")

    def mixer(layer: int) -> nn.Module:
        owner = layer - layer % factor
        return Owner(shape, layer) if layer == owner else Borrower(shape, layer, owner=owner)

    return mixer


def yoco(shape: Shape, *, window: int) -> Mixer:
    """The mixer of each layer in YOCO: windows in the first half, one global cache read by all layers of the second.

    Decoder(shape, mixer=yoco(shape, window=16))
    """
    at_least("window", window, 1)
    if shape.layers % 2:
        raise ValueError(f"layers must be even, so that it has two halves, not {shape.layers}")
    half = shape.layers // 2

    def mixer(layer: int) -> nn.Module:
        if layer < half:
            return WindowAttention(shape, layer, window=window)
        return Owner(shape, layer) if layer == half else Borrower(shape, layer, owner=half)

    return mixer


def owners(model: Decoder) -> list[int]:
    """Of each layer, the layer whose keys and values it reads: itself, or an earlier one."""
    return [getattr(block.mixer, "owner", layer) for layer, block in enumerate(model.blocks)]


def borrowed(model: Decoder, *, factor: int) -> Decoder:
    """A trained model of softmax attention in which only the first of every `factor` layers keeps its keys and values,
    and the others read theirs, untrained for it. Not CLA, which is trained so: this is what happens without."""
    from engine.model import Decoder

    kinds = {type(block.mixer) for block in model.blocks}
    if kinds != {SoftmaxAttention}:
        raise ValueError(f"model must have softmax attention in all layers, not {sorted(k.__name__ for k in kinds)}")
    shape = model.shape
    with torch.device("meta"):
        other = Decoder(shape, mixer=cla(shape, factor=factor))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for layer, block in enumerate(other.blocks):
        if isinstance(block.mixer, Borrower):
            name = f"blocks.{layer}.mixer.qkv.weight"
            weights[name] = weights[name][: shape.heads * shape.head_width].clone()
    other.load_state_dict(weights, assign=True)
    return other.train(model.training).requires_grad_(model.embed.weight.requires_grad)
