r"""Structured pruning: whole heads, neurons and layers go, so that what is left is a smaller dense model.

Heads: Michel et al., "Are Sixteen Heads Really Better than One?" (arXiv:1905.10650); neurons by norm: Li et al.,
"Pruning Filters for Efficient ConvNets" (arXiv:1608.08710); layers: Men et al., ShortGPT (arXiv:2403.03853).
Paper -> here: a head's score is the norm of what it writes, ‖Y_h W_O,h‖ ("written"), or of Y_h alone ("output"); a
neuron's the norm of its input weights times that of its output weights; a layer's the mean ‖Δx‖ / ‖x‖ of its block.

    relative error = ‖ Σ_all Y_h W_O,h - Σ_kept Y_h W_O,h ‖ / ‖ Σ_all Y_h W_O,h ‖

`cut` builds new dense layers; `cut_masks` are the masks of the same cut, and the masked model gives the same logits.
Query heads that share a key head (GQA) may go in any number: the shared head stays while one query head uses it.

Shapes: outputs [N, H, D] -> scores [H]; neurons [F]; layers [L].
Errors: ValueError for a layer without heads or neurons left, indices that are not there, mixers of another kind.
Deviations: Michel et al. score by gradients of the loss; ShortGPT scores a layer by the cosine of its input and output.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.caches import Cache, fresh
from engine.mixers.rope import Rope
from engine.mixers.softmax import SoftmaxAttention, attend
from engine.model import GELU, Decoder, ReLU, SwiGLU
from engine.prune import check_share
from engine.quant import capture_inputs, copied
from engine.recording import event, recording_on, site, tap

Kept = Mapping[int, Sequence[int]]  # layer -> what stays in it, in rising order; a layer not named stays whole

HEAD_SCORE = site("prune.head.score", "the norm of what each head gives, over the tokens seen", symbol="‖Y_h W_O‖",
                  low=0.0)  # fmt: skip
HEAD_KEPT = site("prune.head.kept", "which heads stay", low=0.0, high=1.0)
HEAD_ERROR = site("prune.head.error", "relative change of the attention's output, for each number of heads kept",
                  symbol="‖full − pruned‖/‖full‖", low=0.0)  # fmt: skip
NEURON_SCORE = site("prune.neuron.score", "norm of a neuron's input weights times that of its output weights", low=0.0)
LAYER_SCORE = site("prune.layer.score", "how much each block adds, as a share of what it is given", symbol="‖Δx‖/‖x‖",
                   low=0.0)  # fmt: skip


class PrunedAttention(SoftmaxAttention):
    """Softmax attention with some of its query heads, and the key heads that these use.

    `groups[h]` is the key head of query head h: where they are no longer equally shared, keys are repeated.
    """

    def __init__(self, full: SoftmaxAttention, kept: Sequence[int]) -> None:
        nn.Module.__init__(self)
        _check_indices(kept, full.heads, name="kept")
        users = key_heads(full)
        used = sorted({users[head] for head in kept})
        self.layer, self.head_width = full.layer, full.head_width
        self.heads, self.kv_heads = len(kept), len(used)
        self.groups = [used.index(users[head]) for head in kept]
        self.qkv = smaller(full.qkv, rows=_qkv_rows(full, kept))
        self.out = smaller(full.out, columns=_spread(kept, full.head_width))

    def forward(self, x: Tensor, *, rope: Rope, cache: Cache | None = None, show: int | None = None) -> Tensor:
        B, T, _ = x.shape
        H, G = self.heads, self.kv_heads
        qkv = self.qkv(x).view(B, T, H + 2 * G, self.head_width).transpose(1, 2)  # B H+2G T D
        q, k, v = qkv[:, :H], qkv[:, H : H + G], qkv[:, H + G :]
        view = fresh(k, v, rope) if cache is None else cache.extend(self.layer, k, v, rope)
        if H % G or self.groups != [head * G // H for head in range(H)]:
            view = replace(view, k=view.k[:, self.groups], v=view.v[:, self.groups])  # rows H S D
        q = rope.rotate(q, view.q_positions)  # B H T D
        y = attend(q, view)  # B H T D
        self._show(q, v, view, cache, T if show is None else show)
        return self.out(y.transpose(1, 2).reshape(B, T, H * self.head_width))


def head_outputs(model: Decoder, ids: Tensor) -> list[Tensor]:
    """What every head of every layer gives for ids [B, T], before the output product: [N, H, D] a layer."""
    mixers = [attention(model, layer) for layer in range(len(model.blocks))]
    names = [f"blocks.{layer}.mixer.out" for layer in range(len(mixers))]
    with torch.no_grad(), capture_inputs(model, names=names) as inputs:
        model(ids)
    return [inputs[name].unflatten(1, (mixer.heads, mixer.head_width))
            for name, mixer in zip(names, mixers, strict=True)]  # fmt: skip


def written(y: Tensor, out: Tensor) -> Tensor:
    """What each head adds to the stream: y [N, H, D] and W_O [W, H·D] -> [N, H, W]. Heads and tokens never mix."""
    _check_outputs(y, out)
    return torch.einsum("nhd,whd->nhw", y, out.unflatten(1, y.shape[1:]))


def head_scores(y: Tensor, out: Tensor, *, by: str = "written", **index: int | str) -> Tensor:
    """The norm of each head over all tokens: [H]."""
    if by not in ("written", "output"):
        raise ValueError(f'by must be "written" or "output", not {by!r}')
    _check_outputs(y, out)
    score = torch.linalg.vector_norm(written(y, out) if by == "written" else y, dim=(0, 2))
    return tap(HEAD_SCORE, score, "head", **index)


def best(scores: Tensor, keep: int) -> list[int]:
    """The `keep` highest, in rising order of their index; on a tie the first."""
    if not 1 <= keep <= len(scores):
        raise ValueError(f"keep must be from 1 to {len(scores)}, not {keep}")
    return sorted(scores.argsort(descending=True, stable=True)[:keep].tolist())


def relative_error(y: Tensor, out: Tensor, kept: Sequence[int]) -> float:
    """‖full - pruned‖ / ‖full‖ of the attention's output on these tokens, with only the heads `kept`."""
    _check_indices(kept, y.shape[1], name="kept")
    parts = written(y, out).double()
    gone = [head for head in range(y.shape[1]) if head not in set(kept)]
    full = parts.sum(1).norm()
    if not float(full) > 0:
        raise ValueError("y must give an output that is not zero, for a relative error")
    return float(parts[:, gone].sum(1).norm() / full)


def head_errors(y: Tensor, out: Tensor, *, keep: Sequence[int] = (8, 6, 4, 2), by: str = "written",
                **index: int | str) -> list[float]:  # fmt: skip
    """The relative error for each number of heads kept, those with the highest score."""
    scores = head_scores(y, out, by=by, **index)
    errors = [relative_error(y, out, best(scores, count)) for count in keep]
    tap(HEAD_ERROR, torch.tensor(errors), "count", **index)
    return errors


@torch.no_grad()
def neuron_scores(model: Decoder, layer: int) -> Tensor:
    """Of each neuron of a feed-forward network: [F]."""
    ffn = feed_forward(model, layer)
    incoming = ffn.gate_up if isinstance(ffn, SwiGLU) else ffn.up
    size = incoming.weight.unflatten(0, (-1, ffn.down.in_features)).square().sum((0, 2)).sqrt()  # F
    return tap(NEURON_SCORE, size * ffn.down.weight.norm(dim=0), "neuron", layer=layer)


@torch.no_grad()
def layer_scores(model: Decoder, ids: Tensor) -> Tensor:
    """The mean ‖Δx‖ / ‖x‖ of each block over the tokens of ids [B, T]: [L]."""
    found: list[Tensor] = []

    def look(block: nn.Module, args: tuple[Tensor, ...], after: Tensor) -> None:
        found.append(((after - args[0]).norm(dim=-1) / args[0].norm(dim=-1)).mean())

    handles = [block.register_forward_hook(look) for block in model.blocks]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return tap(LAYER_SCORE, torch.stack(found), "layer")


def heads_of(model: Decoder, ids: Tensor, *, keep: int, by: str = "written") -> dict[int, list[int]]:
    """For `cut`: the `keep` highest heads of each layer, scored on ids."""
    outputs = head_outputs(model, ids)
    return {
        layer: best(head_scores(y, attention(model, layer).out.weight.detach(), by=by, layer=layer), keep)
        for layer, y in enumerate(outputs)
    }


def neurons_of(model: Decoder, *, share: float) -> dict[int, list[int]]:
    """For `cut`: the `share` of highest neurons of each layer, rounded, one at least."""
    check_share(share, name="share")
    every = [neuron_scores(model, layer) for layer in range(len(model.blocks))]
    return {layer: best(scores, max(1, round(share * len(scores)))) for layer, scores in enumerate(every)}


def cut(model: Decoder, *, heads: Kept | None = None, neurons: Kept | None = None,
        layers: Sequence[int] | None = None) -> Decoder:  # fmt: skip
    """A smaller copy of `model` with the heads, neurons and layers given, numbered as in `model`.

    `model` is not changed, and shares what is not cut. The copy's `shape` counts the layers and, where all layers
    agree, the neurons; heads stay as they were in it, for a shape has room for one number.
    """
    staying = list(range(len(model.blocks))) if layers is None else list(layers)
    _check_indices(staying, len(model.blocks), name="layers")
    _checked(model, heads, neurons)
    twin = copied(model)
    assert isinstance(twin, Decoder)
    for layer, kept in (heads or {}).items():
        twin.blocks[layer].mixer = PrunedAttention(attention(model, layer), list(kept))
        event("prune.heads", layer=layer, kept=list(kept), of=attention(model, layer).heads)
        if recording_on(HEAD_KEPT, layer=layer):
            every = torch.arange(attention(model, layer).heads)
            tap(HEAD_KEPT, torch.isin(every, torch.tensor(kept)), "head", layer=layer)
    for layer, kept in (neurons or {}).items():
        old = feed_forward(model, layer)
        new: Any = copy.copy(twin.blocks[layer].ffn)
        new._modules = dict(new._modules)  # the copy's own, so that the other keeps its layers
        count, kept = old.down.in_features, list(kept)
        new.down = smaller(old.down, columns=kept)
        if isinstance(old, SwiGLU):
            new.gate_up = smaller(old.gate_up, rows=[*kept, *(count + n for n in kept)])
        else:
            new.up = smaller(old.up, rows=kept)
        twin.blocks[layer].ffn = new
        event("prune.neurons", layer=layer, kept=len(kept), of=count)
    twin.blocks = nn.ModuleList(twin.blocks[layer] for layer in staying)
    for place, block in enumerate(twin.blocks):
        if hasattr(block.mixer, "layer"):
            block.mixer.layer = place  # caches count the layers that there are
    ffns: list[Any] = [block.ffn for block in twin.blocks]
    widths = {int(ffn.down.in_features) for ffn in ffns if hasattr(ffn, "down")}
    width = widths.pop() if len(widths) == 1 else model.shape.ffn_width
    twin.shape = replace(model.shape, layers=len(staying), ffn_width=width)
    return twin


def cut_masks(model: Decoder, *, heads: Kept | None = None, neurons: Kept | None = None) -> dict[str, Tensor]:
    """The masks of the same cut, for `engine.prune.apply`: the model stays as big, and gives the same."""
    _checked(model, heads, neurons)
    masks: dict[str, Tensor] = {}
    for layer, kept in (heads or {}).items():
        mixer = attention(model, layer)
        masks[f"blocks.{layer}.mixer.qkv.weight"] = _mask(mixer.qkv, rows=_qkv_rows(mixer, kept))
        masks[f"blocks.{layer}.mixer.out.weight"] = _mask(mixer.out, columns=_spread(kept, mixer.head_width))
    for layer, kept in (neurons or {}).items():
        ffn = feed_forward(model, layer)
        count, gated = ffn.down.in_features, isinstance(ffn, SwiGLU)
        name = "gate_up" if gated else "up"
        rows = [*kept, *(count + n for n in kept)] if gated else list(kept)
        masks[f"blocks.{layer}.ffn.{name}.weight"] = _mask(getattr(ffn, name), rows=rows)
        masks[f"blocks.{layer}.ffn.down.weight"] = _mask(ffn.down, columns=list(kept))
    return masks


def attention(model: Decoder, layer: int) -> SoftmaxAttention:
    """The mixer of that layer, which must be softmax attention."""
    _check_layer(model, layer)
    mixer = model.blocks[layer].mixer
    if not isinstance(mixer, SoftmaxAttention):
        raise ValueError(f"layer {layer} must have softmax attention to prune heads, not {type(mixer).__name__}")
    return mixer


def feed_forward(model: Decoder, layer: int) -> SwiGLU | GELU | ReLU:
    """The feed-forward network of that layer, which must be a plain one."""
    _check_layer(model, layer)
    ffn = model.blocks[layer].ffn
    if not isinstance(ffn, SwiGLU | GELU | ReLU):
        raise ValueError(f"layer {layer} must have a SwiGLU, GELU or ReLU to prune neurons, not {type(ffn).__name__}")
    return ffn


def key_heads(mixer: SoftmaxAttention) -> list[int]:
    """The key head of each query head."""
    groups = getattr(mixer, "groups", None)
    return list(groups) if groups is not None else [h * mixer.kv_heads // mixer.heads for h in range(mixer.heads)]


def smaller(linear: nn.Linear, *, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> nn.Linear:
    """A dense layer of these outputs and inputs alone, in memory of its own."""
    weight = linear.weight.detach()
    weight = weight if rows is None else weight[list(rows)]
    weight = weight if columns is None else weight[:, list(columns)]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        bias = linear.bias.detach() if rows is None else linear.bias.detach()[list(rows)]
        made.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    return made


def _qkv_rows(mixer: SoftmaxAttention, kept: Sequence[int]) -> list[int]:
    """The rows of `qkv` that the query heads kept need: their own, and those of the key heads they use."""
    H, G = mixer.heads, mixer.kv_heads
    users = key_heads(mixer)
    used = sorted({users[head] for head in kept})
    return _spread([*kept, *(H + g for g in used), *(H + G + g for g in used)], mixer.head_width)


def _spread(heads: Sequence[int], width: int) -> list[int]:
    return [head * width + i for head in heads for i in range(width)]


def _mask(linear: nn.Linear, *, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> Tensor:
    mask = torch.zeros(linear.weight.shape, dtype=torch.bool, device=linear.weight.device)
    mask[slice(None) if rows is None else list(rows), slice(None) if columns is None else list(columns)] = True
    return mask


def _checked(model: Decoder, heads: Kept | None, neurons: Kept | None) -> None:
    for layer, kept in (heads or {}).items():
        _check_indices(kept, attention(model, layer).heads, name=f"heads[{layer}]")
    for layer, kept in (neurons or {}).items():
        _check_indices(kept, feed_forward(model, layer).down.in_features, name=f"neurons[{layer}]")


def _check_layer(model: Decoder, layer: int) -> None:
    if not 0 <= layer < len(model.blocks):
        raise ValueError(f"layer must be from 0 to {len(model.blocks) - 1}, not {layer}")


def _check_indices(kept: Sequence[int], count: int, *, name: str) -> None:
    kept = list(kept)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < count:
        raise ValueError(f"{name} must be rising numbers from 0 to {count - 1}, one at least, not {kept[:20]}")


def _check_outputs(y: Tensor, out: Tensor) -> None:
    if y.dim() != 3 or out.dim() != 2 or out.shape[1] != y.shape[1] * y.shape[2] or not len(y):
        raise ValueError(f"y and out must have shapes [N, H, D] and [W, H*D], not {list(y.shape)}, {list(out.shape)}")
