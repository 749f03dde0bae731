r"""Contextual sparsity: each token needs few of the neurons and heads, and a small network can tell which beforehand.

Liu et al., Deja Vu (arXiv:2310.17157): sparsity per token, its prediction from a layer's input, and prediction one
layer ahead, since the stream changes little from layer to layer.
Paper -> here: y (input of a layer) = x, S_M, S_A = the neurons and heads chosen, SP (sparse predictor) = `Predictor`,
two products through `rank` values; asynchronous lookahead = `ahead`: layer l is predicted from what layer l - 1 read.

    MLP_S(x) = W_down[:, S] · act(W_up[S] x);    MHA_S(x) = Σ_{h in S} Y_h W_O,h

A neuron is active where |a| > threshold · max|a| of the token. Threshold 0 means not exactly zero: with ReLU the
sparsity is then true, and choosing all active ones gives the dense answer. SwiGLU and GELU give no exact zeros: state
the threshold.

Shapes: x [N, W]; activations [N, F]; masks bool [N, F] or [N, H].
Errors: ValueError for shares outside 0..1, thresholds outside 0..1, a rank below 1, records of unequal length.
Deviations: the paper trains its predictors on many more tokens; here on those of one text. What is chosen is computed
in `contextual_decoding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model import Decoder, SwiGLU
from engine.prune.structured import attention, feed_forward
from engine.quant import capture_inputs
from engine.recording import recording_on, site, tap

ACTIVE = site("contextual.active", "which neurons fire for a token", low=0.0, high=1.0, grows="query")
SPARSITY = site("contextual.sparsity", "the share of neurons that do not fire", low=0.0, high=1.0, grows="query")
HEADS = site("contextual.heads", "the norm of what each head adds for a token", symbol="‖Y_h W_O‖", low=0.0,
             grows="query")  # fmt: skip
SIMILARITY = site("contextual.similarity", "cosine of the stream entering a layer and entering the next",
                  symbol="cos(x_l, x_l+1)", low=-1.0, high=1.0, grows="query")  # fmt: skip
LOSS = site("contextual.loss", "of a predictor in training: binary cross-entropy", low=0.0, unit="nats")


@dataclass(frozen=True)
class Seen:
    """What one layer did with N tokens."""

    stream: Tensor  # N W, entering the block
    mixer_in: Tensor  # N W, normed: what attention reads
    heads: Tensor  # N H, the norm of what each head adds
    ffn_in: Tensor  # N W, normed: what the feed-forward network reads
    neurons: Tensor  # N F, its activations


@torch.no_grad()
def observe(model: Decoder, ids: Tensor) -> list[Seen]:
    """Read ids [B, T] and keep what every layer did."""
    layers = range(len(model.blocks))
    first = ["gate_up" if isinstance(feed_forward(model, layer), SwiGLU) else "up" for layer in layers]
    streams: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: streams.append(args[0].flatten(0, 1))) for block in model.blocks
    ]
    try:
        with capture_inputs(model) as seen:
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for layer in layers:
        mixer, at = attention(model, layer), f"blocks.{layer}."
        outputs = seen[at + "mixer.out"].unflatten(1, (mixer.heads, mixer.head_width))  # N H D
        weight = mixer.out.weight.unflatten(1, (mixer.heads, mixer.head_width))  # W H D
        found.append(Seen(
            streams[layer],
            seen[at + "mixer.qkv"],
            torch.stack([(outputs[:, h] @ weight[:, h].mT).norm(dim=-1) for h in range(mixer.heads)], 1),
            seen[at + "ffn." + first[layer]],
            seen[at + "ffn.down"],
        ))  # fmt: skip
    return found


def active(values: Tensor, *, threshold: float = 0.0) -> Tensor:
    """Where |value| > threshold · the row's largest: bool [N, F]. Threshold 0: where it is not exactly zero."""
    if isinstance(threshold, bool) or not 0 <= threshold < 1:
        raise ValueError(f"threshold must be a number from 0 to below 1, not {threshold!r}")
    if values.dim() != 2 or not values.numel():
        raise ValueError(f"values must have shape [N, F] with a value at least, not {list(values.shape)}")
    sizes = values.abs()
    return sizes > threshold * sizes.amax(1, keepdim=True)


def top(values: Tensor, keep: int) -> Tensor:
    """Where each row has its `keep` largest values: bool, exactly `keep` a row."""
    if not 1 <= keep <= values.shape[-1]:
        raise ValueError(f"keep must be from 1 to {values.shape[-1]}, not {keep}")
    chosen = torch.zeros_like(values, dtype=torch.bool)
    return chosen.scatter(-1, values.topk(keep, -1).indices, True)


def needed(values: Tensor, *, share: float) -> Tensor:
    """The fewest values of each row whose squares make up `share` of all squares: [N]."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share}")
    squares = values.double().square().sort(-1, descending=True).values.cumsum(-1)
    return (squares < share * squares[:, -1:]).sum(-1) + (squares[:, -1] > 0)


def show(seen: Sequence[Seen], *, threshold: float = 0.0) -> dict[str, Tensor]:
    """The three claims measured: sparsity [L, N], head shares [L, N, H], similarity [L - 1, N]; tapped layer by layer.

    A head's share is its norm over the sum of all heads' norms.
    """
    similarity = similarities(seen)
    sparsity, shares = [], []
    for layer, one in enumerate(seen):
        fired = tap(ACTIVE, active(one.neurons, threshold=threshold), "query neuron", layer=layer)
        sparsity.append(tap(SPARSITY, 1 - fired.double().mean(1), "query", layer=layer))
        tap(HEADS, one.heads, "query head", layer=layer)
        shares.append(one.heads / one.heads.sum(1, keepdim=True).clamp(min=torch.finfo(one.heads.dtype).tiny))
        if layer < len(similarity):
            tap(SIMILARITY, similarity[layer], "query", layer=layer)
    even = len({share.shape for share in shares}) == 1
    return {"sparsity": torch.stack(sparsity), "heads": torch.stack(shares) if even else shares[0][None],
            "similarity": similarity}  # fmt: skip


def similarities(seen: Sequence[Seen]) -> Tensor:
    """Cosine of the stream entering each layer and entering the next, token by token: [L - 1, N]."""
    if len(seen) < 2:
        raise ValueError(f"seen must hold two layers at least, not {len(seen)}")
    return torch.stack([F.cosine_similarity(a.stream, b.stream, dim=-1) for a, b in pairwise(seen)])


class Predictor(nn.Module):
    """Which neurons (or heads) a token will use: logits [N, out] from x [N, W], through `rank` values."""

    def __init__(self, width: int, out: int, *, rank: int, seed: int = 0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be a number above 0, not {rank}")
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(width, rank, bias=False)
        self.second = nn.Linear(rank, out)
        with torch.no_grad():
            for weight in (self.first.weight, self.second.weight):
                std = weight.shape[1] ** -0.5
                weight.copy_(std * torch.randn(weight.shape, generator=generator))
            self.second.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@torch.inference_mode(False)
@torch.enable_grad()
def train_predictor(
    x: Tensor, target: Tensor, *, rank: int = 32, steps: int = 200, rows: int = 256, rate: float = 1e-2, seed: int = 0,
    **index: int | str,
) -> Predictor:  # fmt: skip
    """Learn to tell the bool `target` [N, out] from x [N, W], by Adam on binary cross-entropy."""
    if x.dim() != 2 or target.dtype != torch.bool or target.dim() != 2 or len(x) != len(target) or not len(x):
        raise ValueError(f"x and target must be [N, W] and bool [N, out], not {list(x.shape)} and "
                         f"{target.dtype} {list(target.shape)}")  # fmt: skip
    if steps < 1 or rows < 1:
        raise ValueError(f"steps and rows must be numbers above 0, not {steps} and {rows}")
    x, goal = x.detach().clone(), target.to(x.dtype)  # clones may be trained on, tensors of inference may not
    predictor = Predictor(x.shape[1], target.shape[1], rank=rank, seed=seed).to(x)
    optimiser = torch.optim.Adam(predictor.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for at in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - at / steps)
        chosen = torch.randint(len(x), (min(rows, len(x)),), generator=generator).to(x.device)
        loss = F.binary_cross_entropy_with_logits(predictor(x[chosen]), goal[chosen])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if recording_on(LOSS, **index):
            tap(LOSS, loss, "", **index)
    return predictor.requires_grad_(False)


def recall(predicted: Tensor, true: Tensor) -> float:
    """The share of what was truly active that was predicted."""
    return _share_of(predicted, true, true, name="true")


def precision(predicted: Tensor, true: Tensor) -> float:
    """The share of what was predicted that was truly active."""
    return _share_of(predicted, true, predicted, name="predicted")


def _share_of(predicted: Tensor, true: Tensor, base: Tensor, *, name: str) -> float:
    if predicted.shape != true.shape or predicted.dtype != torch.bool or true.dtype != torch.bool:
        raise ValueError(f"predicted and true must be bool of one shape, not {predicted.dtype} {list(predicted.shape)} "
                         f"and {true.dtype} {list(true.shape)}")  # fmt: skip
    if not bool(base.any()):
        raise ValueError(f"{name} must have something active, and has nothing")
    return int((predicted & true).sum()) / int(base.sum())
