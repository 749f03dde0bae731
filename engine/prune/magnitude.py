r"""Magnitude pruning: the weights nearest to zero go, and training goes on with those that stay.

Han et al. (arXiv:1506.02626), section 3: train, prune below a threshold, retrain the survivors.
Paper -> here: threshold = the magnitude that separates pruned from kept, a figure that follows from `sparsity`, over
the whole model ("global") or in each layer ("layer"). Contrast: as many weights at random.

    pruned = the round(sparsity · n) smallest |w|;  on a tie the first in the weight's own order go first

Shapes: weights [out, in] -> masks bool [out, in], true where kept.
Errors: ValueError for a sparsity outside 0..1, an unknown scope, weights that are not finite.
Deviations: the paper sets each layer's threshold to a multiple of its standard deviation; here the share is set. It
prunes and retrains several times; `retrain` is one turn, to be repeated at will.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.model import Decoder
from engine.prune import Masks, check_share, enforce, holding, matrices
from engine.quant import check_values
from engine.recipes import Recipe
from engine.recording import event, recording_on, site, step, tap
from engine.train import Progress, train

SCOPES = ("global", "layer")
THRESHOLD = site("prune.threshold", "the magnitude of the largest weight pruned in each layer", symbol="τ", low=0.0)
REVIVAL = site("prune.revival", "eight weights trained on after four were pruned; strategy says what held them")


def magnitude(model: nn.Module, *, sparsity: float, scope: str = "global") -> dict[str, Tensor]:
    """Masks that prune the smallest weights."""
    weights = _weights(model, sparsity, scope)
    sizes = {name: weight.abs() for name, weight in weights.items()}
    masks = lowest_pruned(sizes, sparsity=sparsity, scope=scope)
    _show(sizes, masks)
    return masks


def by_chance(model: nn.Module, *, sparsity: float, seed: int, scope: str = "global") -> dict[str, Tensor]:
    """Masks that prune as many weights, drawn at random."""
    weights = _weights(model, sparsity, scope)
    generator = torch.Generator().manual_seed(seed)
    worth = {n: torch.rand(w.shape, generator=generator).to(w.device) for n, w in weights.items()}
    return lowest_pruned(worth, sparsity=sparsity, scope=scope)


def lowest_pruned(worth: Masks, *, sparsity: float, scope: str) -> dict[str, Tensor]:
    """Masks that prune the lowest values of `worth`, over all tensors together or in each alone."""
    if scope == "layer":
        return {n: ~lowest(w.flatten(), round(sparsity * w.numel())).view(w.shape) for n, w in worth.items()}
    flat = torch.cat([w.flatten() for w in worth.values()])
    gone = lowest(flat, round(sparsity * len(flat))).split([w.numel() for w in worth.values()])
    return {name: ~part.view(w.shape) for (name, w), part in zip(worth.items(), gone, strict=True)}


def lowest(values: Tensor, count: int) -> Tensor:
    """Which `count` of values [n] are lowest: bool [n], exactly `count` true, ties decided by position.

    No sort: a rounded model has thousands of equal weights and a hundred million in all.
    """
    if not 0 <= count <= len(values):
        raise ValueError(f"count must be from 0 to {len(values)}, not {count}")
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    edge = values.kthvalue(count).values
    below = values < edge
    level = (values == edge).nonzero().flatten()
    below[level[: count - int(below.sum())]] = True
    return below


def thresholds(model: nn.Module, masks: Masks) -> dict[str, float]:
    """The magnitude of the largest weight that each mask prunes (0 where it prunes none)."""
    known = matrices(model)
    return {name: _threshold(known[name].abs(), mask) for name, mask in masks.items()}


def retrain(
    model: Decoder,
    masks: Masks,
    recipe: Recipe,
    *,
    hold: bool = True,
    progress: Callable[[Decoder, int, int, float], None] | None = None,
) -> Decoder:
    """A copy of `model`, pruned and trained by `recipe` with the pruned weights held at zero.

    Every step's revived weights are set to zero right after the optimiser, so that neither its moments nor its decay
    can leave anything in them; without `hold` they stay as it left them. `progress` is told the copy as it is now, the
    steps done, all steps and the loss.
    """
    twin = copy.deepcopy(model)
    enforce(twin, masks)
    tell: Progress | None = None if progress is None else lambda *figures: progress(twin, *figures)
    train(twin, recipe, after=holding(masks, mask=hold), progress=tell)
    return twin


@torch.inference_mode(False)
@torch.enable_grad()
def revival(
    *, hold: str, steps: int = 20, prune_at: int = 10, sparsity: float = 0.5, decay: float = 0.1, seed: int = 0
) -> Tensor:
    """A regression on eight weights with Adam, pruned in the middle: the weights after each step, [steps, 8].

    `hold` "weights": masked again after each step. "gradients": only their gradient is masked, and what momentum was
    left moves them on. "nothing": their gradient too. Decay alone moves no zero: 0 · (1 - ηλ) = 0.
    """
    if hold not in ("weights", "gradients", "nothing"):
        raise ValueError(f'hold must be "weights", "gradients" or "nothing", not {hold!r}')
    if not 0 < prune_at <= steps:
        raise ValueError(f"prune_at must be from 1 to steps={steps}, not {prune_at}")
    check_share(sparsity, name="sparsity")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=generator)
    y = x @ torch.randn(8, generator=generator)
    weight = nn.Parameter(torch.randn(8, generator=generator) / 2)
    optimiser = torch.optim.AdamW([weight], lr=0.02, weight_decay=decay)
    mask = torch.ones(8, dtype=torch.bool)
    rows = []
    for at in range(steps):
        optimiser.zero_grad()
        (x @ weight - y).square().mean().backward()
        if hold != "nothing" and weight.grad is not None:
            weight.grad.mul_(mask)
        optimiser.step()
        if at + 1 == prune_at:
            mask = ~lowest(weight.detach().abs(), round(sparsity * 8))
        if at + 1 == prune_at or hold == "weights":
            weight.data.mul_(mask)
        rows.append(weight.detach().clone())
        tap(REVIVAL, rows[-1], "weight", strategy=hold)
        step()
    return torch.stack(rows)


def _weights(model: nn.Module, sparsity: float, scope: str) -> dict[str, Tensor]:
    check_share(sparsity, name="sparsity")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not {scope!r}")
    weights = matrices(model)
    for name, weight in weights.items():
        check_values(weight, name=name)
    return weights


def _threshold(sizes: Tensor, mask: Tensor) -> float:
    return 0.0 if bool(mask.all()) else float(sizes[~mask].max())


def _show(sizes: Masks, masks: Masks) -> None:
    if recording_on(THRESHOLD):
        found = {name: _threshold(size, masks[name]) for name, size in sizes.items()}
        tap(THRESHOLD, torch.tensor(list(found.values())), "layer")
        for name, value in found.items():
            event("prune.threshold", linear=name.removesuffix(".weight"), value=value)
