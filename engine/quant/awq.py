r"""AWQ: before rounding weights to 3 or 4 bits, scale up the columns that meet large activations; which power of the
activations to scale by is searched on a grid.

Lin et al. (arXiv:2306.00978), section 3.1 (keeping 1% of the channels in float), equations 4 and 5:

    s* = argmin_s ‖ Q(W diag(s)) (diag(s)⁻¹ X) - W X ‖,    s = s_X^α,   α in [0, 1]

Paper -> here: s_X = mean|X| of a channel = `importance`; α = ratio, 20 points from 0; Q = groups along the input axis
with a zero point. As in the authors' code, s is divided by the root of its largest times its smallest value.
Shapes: weight [out, in], x [N, in] inputs of this very layer -> s [in], losses [20].
Errors: ValueError for sizes that don't fit, a fraction outside 0..1, empty or non-finite calibration.
Deviations: each layer is searched on its own output (the authors: on the block's); their search for clipping is left
out; 1/s is multiplied at run time unless folded into the layer before (`smoothquant.fold`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.quant import Recipe, check_values
from engine.quant.affine import Grid
from engine.quant.integer import QuantLinear, fake_quantise
from engine.recording import site, tap

POINTS = 20
IMPORTANCE = site("awq.importance", "the mean magnitude of each activation channel", symbol="s_X", low=0.0)
LOSS = site("awq.loss", "mean squared change of the layer's output for each ratio tried", symbol="L(α)", low=0.0)
SCALE = site("awq.scale", "by how much each column of the weight is scaled up before rounding", symbol="s", low=0.0)


@dataclass(frozen=True)
class Search:
    """What the search found: the loss of each ratio, and the scale of the best."""

    ratios: Tensor  # 20
    losses: Tensor  # 20, mean squared error of the output; ratio 0 is plain rounding
    ratio: float
    scale: Tensor  # in


def grid(bits: int, *, group: int) -> Grid:
    """The weights' grid: groups along the input axis, with a zero point."""
    return Grid(bits, symmetric=False, granularity="group", group=group)


def importance(x: Tensor) -> Tensor:
    """mean|X| of each channel of x [N, in]: float64 [in]."""
    check_values(x)
    return x.double().abs().mean(0)


def scale_for(importance: Tensor, ratio: float) -> Tensor:
    """s_X^ratio, centred so that the geometric mean of its ends is 1. Ratio 0 is all ones."""
    scale = importance.clamp(min=1e-4) ** ratio
    return scale / (scale.max() * scale.min()).sqrt()


def scaled_weight(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Q(W diag(s)): what is stored."""
    return fake_quantise(weight * scale.to(weight.dtype), grid)


@torch.no_grad()
def search(weight: Tensor, x: Tensor, grid: Grid, **index: int | str) -> Search:
    """Try 20 ratios, 0 among them, and keep the one that changes the output on `x` least (on a tie the smaller)."""
    _check(weight, x)
    s_x = tap(IMPORTANCE, importance(x), "channel", **index)
    ratios = torch.arange(POINTS) / POINTS
    goal = F.linear(x, weight)  # N out
    losses, scales = [], []
    for ratio in ratios.tolist():
        scale = scale_for(s_x, ratio).to(weight.dtype)
        changed = F.linear(x, scaled_weight(weight, scale, grid) / scale)
        losses.append((changed - goal).double().square().mean())
        scales.append(scale)
    loss = torch.stack(losses)
    best = int(loss.argmin())
    tap(LOSS, loss, "ratio", **index)
    tap(SCALE, scales[best], "channel", **index)
    return Search(ratios, loss, float(ratios[best]), scales[best])


class AWQLinear(nn.Module):
    """A linear layer that stores Q(W diag(s)) and multiplies its input by 1/s."""

    weight: Tensor
    inverse: Tensor

    def __init__(self, linear: nn.Linear, *, scale: Tensor, weights: Grid) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", scaled_weight(linear.weight.detach(), scale, weights))
        self.register_buffer("inverse", 1 / scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.inverse, self.weight, self.bias)


def salient(weight: Tensor, x: Tensor, *, fraction: float = 0.01, by: str = "activation", seed: int = 0) -> Tensor:
    """The channels to keep in float, section 3.1: bool [in], ceil(fraction * in) of them true.

    `by`: mean |activation|, the norm of the weight's column, or at random.
    """
    _check(weight, x)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1, not {fraction}")
    count = -int(-fraction * weight.shape[1] // 1)
    if by == "activation":
        worth = importance(x)
    elif by == "weight":
        worth = weight.double().norm(dim=0)
    elif by == "random":
        worth = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)).to(weight.device)
    else:
        raise ValueError(f'by must be "activation", "weight" or "random", not {by!r}')
    chosen = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    chosen[worth.topk(count).indices] = True
    return chosen


@torch.no_grad()
def kept(linear: nn.Linear, channels: Tensor, *, weights: Grid) -> QuantLinear:
    """The layer with all columns rounded but those of `channels`, which stay as they were."""
    layer = QuantLinear(linear, weights=weights)
    layer.weight = torch.where(channels, linear.weight, layer.weight)
    return layer


def awq(inputs: Mapping[str, Tensor], *, weights: Grid) -> Recipe:
    """For `quantised`: every linear layer by AWQ, searched on its own captured inputs."""

    def replace(name: str, linear: nn.Linear) -> nn.Module:
        found = search(linear.weight.detach(), _of(inputs, name), weights, linear=name)
        return AWQLinear(linear, scale=found.scale, weights=weights)

    return replace


def keeping(inputs: Mapping[str, Tensor], *, weights: Grid, fraction: float = 0.01, by: str = "activation") -> Recipe:
    """For `quantised`: plain rounding, with a fraction of the channels kept in float."""
    return lambda name, linear: kept(
        linear, salient(linear.weight.detach(), _of(inputs, name), fraction=fraction, by=by), weights=weights
    )


def _of(inputs: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in inputs:
        raise ValueError(f"inputs must hold the captured inputs of every layer, and lack {name!r}")
    return inputs[name]


def _check(weight: Tensor, x: Tensor) -> None:
    check_values(weight, name="weight")
    check_values(x)
    if weight.dim() != 2 or x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x and weight must have shapes [N, in] and [out, in], not {list(x.shape)}, {list(weight.shape)}"
        )
