"""Fewer weights at work: one file a technique. Here is what all of them share: masks, and how they get into a model.

A mask is a bool tensor of its weight's shape, true where the weight is kept; `Masks` go by the weight's name. All
linear layers count but the head, which shares its weight with the embedding in most models. `apply` masks a copy, so
that the loaded model stays as it was; `enforce` masks the very model it is given, for who trains a model of his own.

Shapes: weight and mask [out, in]. Errors: ValueError for a mask that fits no weight, and a share outside 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.quant import copied, linears
from engine.recording import recording_on, site, tap

Masks = Mapping[str, Tensor]

CORNER = 32  # rows and columns of each weight that a recording keeps: a whole model has a hundred million
CELLS = 32  # rows and columns of the picture of a whole mask

WEIGHT = site("prune.weight", f"the first {CORNER} rows and columns of the weight before pruning", symbol="W")
KEPT = site("prune.kept", "the same corner after pruning", symbol="W ⊙ m")
MASK = site("prune.mask", "which weights of the corner are kept", symbol="m", low=0.0, high=1.0)
DENSITY = site("prune.density", f"the share kept in each cell of the whole mask, at most {CELLS} by {CELLS}",
               low=0.0, high=1.0)  # fmt: skip
REVIVED = site("prune.revived", "pruned weights that a step of the optimiser left off zero", low=0.0)
LAYER_SPARSITY = site("prune.sparsity", "the share of each layer's weights that is pruned, layers in their order",
                      low=0.0, high=1.0)  # fmt: skip


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights that pruning may touch, by name, detached: those of every linear layer but the head."""
    found = {f"{name}.weight": linear.weight.detach() for name, linear in linears(model).items()}
    if not found:
        raise ValueError("model must have a linear layer to prune, and has none")
    return found


def everything(model: nn.Module) -> dict[str, Tensor]:
    """The masks that keep all."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in matrices(model).items()}


def apply(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of `model` with zeros where the masks say so; all that is not masked is shared with `model`.

    Taps show each weight's corner before and after, and the whole mask in coarse cells.
    """
    known = _checked(model, masks)
    twin = copied(model)
    for name, mask in masks.items():
        layer, _, last = name.rpartition(".")
        old: nn.Parameter = getattr(model.get_submodule(layer), last)
        new = known[name].masked_fill(~mask, 0.0)
        setattr(twin.get_submodule(layer), last, nn.Parameter(new, requires_grad=old.requires_grad))
        _show(layer, known[name], new, mask)
    if masks and recording_on(LAYER_SPARSITY):
        tap(LAYER_SPARSITY, torch.stack([1 - mask.double().mean() for mask in masks.values()]), "layer")
    return twin


@torch.no_grad()
def enforce(model: nn.Module, masks: Masks) -> None:
    """Set the pruned weights of `model` itself to zero."""
    known = _checked(model, masks)
    for name, mask in masks.items():
        known[name].masked_fill_(~mask, 0.0)  # detached, so the storage is the parameter's own


def holding(masks: Masks, *, mask: bool = True) -> Callable[[nn.Module], None]:
    """What to call after each step of an optimiser: sets what it revived to zero again, or without `mask` only counts.

    The tap prune.revived tells how many weights that were.
    """

    def hold(model: nn.Module) -> None:
        if recording_on(REVIVED):
            tap(REVIVED, revived(model, masks), "")
        if mask:
            enforce(model, masks)

    return hold


def revived(model: nn.Module, masks: Masks) -> int:
    """How many pruned weights are not zero (any more)."""
    known = _checked(model, masks)
    return sum(int((known[name][~mask] != 0).sum()) for name, mask in masks.items())


def sparsity(masks: Masks) -> float:
    """The share of weights that the masks prune."""
    total = sum(mask.numel() for mask in masks.values())
    if not total:
        raise ValueError("masks must hold a weight at least, and are empty")
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total


def zeros(model: nn.Module) -> float:
    """The share of the model's prunable weights that are zero."""
    weights = matrices(model).values()
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def check_share(value: object, *, name: str) -> None:
    """Raise ValueError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, not {value!r}")


def _checked(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    known = matrices(model)
    for name, mask in masks.items():
        if name not in known:
            raise ValueError(f"masks must name weights of the model ({', '.join(known)}), not {name!r}")
        if mask.dtype != torch.bool or mask.shape != known[name].shape:
            raise ValueError(
                f"masks[{name!r}] must be bool {list(known[name].shape)}, not {mask.dtype} {list(mask.shape)}"
            )
    return known


def _show(linear: str, before: Tensor, after: Tensor, mask: Tensor) -> None:
    tap(WEIGHT, before[:CORNER, :CORNER], "output input", linear=linear)
    tap(KEPT, after[:CORNER, :CORNER], "output input", linear=linear)
    tap(MASK, mask[:CORNER, :CORNER], "output input", linear=linear)
    if recording_on(DENSITY, linear=linear):
        rows, columns = (min(CELLS, size) for size in mask.shape)
        cells = F.adaptive_avg_pool2d(mask[None].float(), (rows, columns))[0]
        tap(DENSITY, cells, "output input", linear=linear)
