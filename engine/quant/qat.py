r"""Quantisation-aware training: round the weights going forward, and let the gradient pass as if nothing happened.

Jacob et al. (arXiv:1712.05877), section 3; the straight-through gradient: Bengio et al. (arXiv:1308.3432);
learned scales: LSQ, Esser et al. (arXiv:1902.08153), equations 1 to 3 and section 2.2.
Paper -> here: v = x; s = scale; -Q_N, Q_P = grid.low, grid.high; v̂ = what `fake_quantise` gives.

    v̂ = s (clip(round(v/s) + Z, -Q_N, Q_P) - Z)
    ∂v̂/∂v = 1 inside the range, 0 outside
    ∂v̂/∂s = round(v/s) - v/s inside, -Q_N - Z or Q_P - Z outside, times 1/√(N Q_P)

Shapes: x any, scale and zero [blocks, 1] as in affine.py.
Errors: ValueError as in affine.py; a learned scale needs a symmetric grid.
Deviations: LSQ starts its scale at 2 mean|v| / √Q_P; this starts at the observed range, so that training begins at PTQ.
The gradient of a scale shared by a block is divided by the number of values of the block.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.quant import quantised
from engine.quant.affine import Grid, choose, place, snap
from engine.quant.integer import QuantLinear, recipe
from engine.recording import recording_on, site, tap

WEIGHT = site("qat.weight", "the float weights that training moves", symbol="W")
LINES = site("qat.lines", "each weight in steps of its grid: whole numbers are grid lines", symbol="W/s")
ROUNDED = site("qat.rounded", "the weights that the forward pass uses", symbol="Ŵ")


class StraightThrough(torch.autograd.Function):
    """Rounding forward, the identity back inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.grid = grid
        return place(snap(x, scale, zero, grid), scale, zero, grid).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, scale, zero = ctx.saved_tensors
        grid: Grid = ctx.grid
        lines = grid.blocks(x) / scale  # blocks values
        codes = lines.round() + zero
        inside = (codes >= grid.low) & (codes <= grid.high)
        g = grid.blocks(grad)
        to_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, lines.round() - lines, codes.clamp(grid.low, grid.high) - zero)
            to_scale = (g * slope).sum(1, keepdim=True) / (lines.shape[1] * grid.high) ** 0.5
        return (g * inside).view(x.shape), to_scale, None, None


def straight_through(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """`x` on its grid, differentiable in `x` and `scale`."""
    out: Tensor = StraightThrough.apply(x, scale, zero, grid)
    return out


def staircase(grid: Grid, *, beyond: float = 1.0, points: int = 241) -> tuple[Tensor, Tensor, Tensor]:
    """Rounding as a figure: v/s from the first code to the last and `beyond`, what it becomes, and the slope that the
    gradient is told: 1 inside the range and 0 outside, where the true slope is 0 all along."""
    plain = Grid(grid.bits, grid.symmetric)
    with torch.inference_mode(False), torch.enable_grad():
        v = torch.linspace(grid.low - beyond, grid.high + beyond, points, dtype=torch.float64, requires_grad=True)
        stairs = straight_through(v, v.new_ones(1, 1), v.new_zeros(1, 1), plain)
        (slope,) = torch.autograd.grad(stairs.sum(), v)
    return v.detach(), stairs.detach(), slope


class QATLinear(nn.Module):
    """A linear layer that trains float weights and computes with rounded ones.

    The scale is observed (from the weights as they are at each pass) or learned. Activations, if quantised, are by
    their observed range.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        weights: Grid,
        activations: Grid | None = None,
        learned: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        if learned and not weights.symmetric:
            raise ValueError("weights must be symmetric for a learned scale, not with a zero point")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weights, self.activations, self.name = weights, activations, name
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.scale = nn.Parameter(choose(self.weight, weights)[0]) if learned else None

    def grid_of_weights(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they are now; a learned scale is kept above 0."""
        if self.scale is None:
            return choose(self.weight, self.weights)
        scale = self.scale.clamp(min=torch.finfo(self.scale.dtype).smallest_normal)
        return scale, torch.zeros_like(self.scale, dtype=torch.int32)

    def rounded(self) -> Tensor:
        """The weights that the forward pass uses."""
        scale, zero = self.grid_of_weights()
        return straight_through(self.weight, scale, zero, self.weights)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.rounded()
        if recording_on(LINES, linear=self.name):
            lines = self.weights.blocks(self.weight) / self.grid_of_weights()[0]
            tap(LINES, lines.view(self.weight.shape), "output input", linear=self.name)
        tap(WEIGHT, self.weight, "output input", linear=self.name)
        tap(ROUNDED, weight, "output input", linear=self.name)
        if self.activations is not None:
            x = straight_through(x, *choose(x, self.activations), self.activations)
        return F.linear(x, weight, self.bias)


def prepare(
    model: nn.Module,
    *,
    weights: Grid,
    activations: Grid | None = None,
    learned: bool = False,
    names: Collection[str] | None = None,
) -> nn.Module:
    """A copy of its own of `model`, ready to train with the grid on."""
    return quantised(
        copy.deepcopy(model),
        lambda name, linear: QATLinear(linear, weights=weights, activations=activations, learned=learned, name=name),
        names=names,
    )


@torch.no_grad()
def converted(model: nn.Module) -> nn.Module:
    """A copy of a trained model with its weights rounded for good: each QATLinear becomes a QuantLinear."""
    twin = copy.deepcopy(model)
    for name, layer in [(n, m) for n, m in twin.named_modules() if isinstance(m, QATLinear)]:
        plain = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(layer.weight.detach())
        plain.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(twin.get_submodule(parent), last, QuantLinear(
            plain, weights=layer.weights, activations=layer.activations, scales=layer.grid_of_weights()
        ))  # fmt: skip
    return twin


def after_training(
    model: nn.Module, *, weights: Grid, activations: Grid | None = None, names: Collection[str] | None = None
) -> nn.Module:
    """PTQ, for comparison: the same grids put on a model that never trained with them."""
    return quantised(model, recipe(weights=weights, activations=activations), names=names)
