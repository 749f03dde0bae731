r"""SmoothQuant: divide each activation channel by a factor and multiply the weight's column by it, so that what is hard
to round moves from the activations, which have outliers, to the weights, which have none.

Xiao et al. (arXiv:2211.10438), equations 3 and 4:  Y = (X diag(s)⁻¹) (diag(s) W),  s_j = max|X_j|^α / max|W_j|^(1-α).
Paper -> here: alpha = `alpha` (0.5); j = input channel; X = calibration inputs of that very layer; W = its weight.
The division is free: it is folded into the gain of the RMSNorm before the layer, and, with `down`, into the rows of
`up` before `down` (as AWQ does). `out` has no place to fold into under grouped queries, and is left as it is.
Shapes: largest [in], weight [out, in], scale s [in].
Errors: ValueError for an alpha outside 0..1, a layer without calibration, a block of other parts than these.
Deviations: where a channel of X or W is all zero s is 1. Folding into `up` is not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.quant import check_values, copied
from engine.recording import site, tap

X_RANGE = site("smoothquant.x_range", "the largest activation of each channel", symbol="max|Xⱼ|", low=0.0)
W_RANGE = site("smoothquant.w_range", "the largest weight that each channel meets", symbol="max|Wⱼ|", low=0.0)
SCALE = site("smoothquant.scale", "by how much each channel is divided", symbol="s", low=0.0)
X_AFTER = site("smoothquant.x_after", "the largest activation of each channel, smoothed", symbol="max|Xⱼ|/s", low=0.0)
W_AFTER = site(
    "smoothquant.w_after", "the largest weight that each channel meets, smoothed", symbol="s max|Wⱼ|", low=0.0
)

FOLDS = (("norm1", "mixer.qkv"), ("norm2", "ffn.gate_up"), ("norm2", "ffn.up"))  # what feeds what, in a block


def largest(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """max|X_j| of each layer's captured inputs [N, in]: [in]."""
    return {name: x.abs().amax(0) for name, x in inputs.items()}


def migration(x_range: Tensor, w_range: Tensor, *, alpha: float = 0.5, **index: int | str) -> Tensor:
    """The factor s of each channel, equation 4: [in], float64."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 (all difficulty stays in X) to 1 (all moves to W), not {alpha}")
    check_values(x_range, name="x_range")
    check_values(w_range, name="w_range")
    if x_range.shape != w_range.shape:
        raise ValueError(
            f"x_range and w_range must have equal shapes, not {list(x_range.shape)}, {list(w_range.shape)}"
        )
    x, w = x_range.double(), w_range.double()
    scale = torch.where((x > 0) & (w > 0), x**alpha / w ** (1 - alpha), 1.0)
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(f"x_range and w_range must leave finite factors, and reach {float(x.max())}, {float(w.max())}")
    tap(X_RANGE, x, "channel", alpha=str(alpha), **index)
    tap(W_RANGE, w, "channel", alpha=str(alpha), **index)
    tap(SCALE, scale, "channel", alpha=str(alpha), **index)
    tap(X_AFTER, x / scale, "channel", alpha=str(alpha), **index)
    tap(W_AFTER, w * scale, "channel", alpha=str(alpha), **index)
    return scale


@torch.no_grad()
def smoothed(model: nn.Module, x_ranges: Mapping[str, Tensor], *, alpha: float = 0.5, down: bool = False) -> nn.Module:
    """A copy of a decoder with every scale folded in: the same function in float, easier to quantise.

    `x_ranges` is what `largest` made of a calibration run of this model.
    """
    blocks = [name for name, module in model.named_modules() if hasattr(module, "norm1") and hasattr(module, "norm2")]
    pairs = [pair for block in blocks for pair in _pairs(model, block, down)]
    twin = copied(model, fresh={name for pair in pairs for name in pair})
    for before, name in pairs:
        if name not in x_ranges:
            raise ValueError(f"x_ranges must hold the calibrated range of every layer smoothed, and lacks {name!r}")
        linear = twin.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        scale = migration(x_ranges[name], linear.weight.abs().amax(0), alpha=alpha, linear=name)
        fold(twin.get_submodule(before), linear, scale)
    return twin


@torch.no_grad()
def fold(before: nn.Module, linear: nn.Linear, scale: Tensor) -> None:
    """Divide what `before` gives by `scale` and multiply the columns of `linear` by it, in place.

    `before` is an RMSNorm, or a linear layer whose last rows (the `up` half of `gate_up`) are multiplied into it.
    """
    if scale.shape != (linear.in_features,):
        raise ValueError(f"scale must have shape [{linear.in_features}], not {list(scale.shape)}")
    weight = before.weight
    assert isinstance(weight, Tensor)
    if isinstance(before, nn.Linear):
        rows = weight[-linear.in_features :]
        rows.copy_(rows.double() / scale[:, None])
    else:
        weight.copy_(weight.double() / scale)
    linear.weight.copy_(linear.weight.double() * scale)


def _pairs(model: nn.Module, block: str, down: bool) -> list[tuple[str, str]]:
    """The parts of a block that a scale is folded between, by name."""
    here = {name for name, module in model.get_submodule(block).named_modules() if isinstance(module, nn.Linear)}
    pairs = [(f"{block}.{norm}", f"{block}.{name}") for norm, name in FOLDS if name in here]
    if len(pairs) != 2:
        raise ValueError(
            f"model must have blocks with mixer.qkv and ffn.gate_up or ffn.up, and {block} has {sorted(here)}"
        )
    if down:
        if "ffn.gate_up" not in here or "ffn.down" not in here:
            raise ValueError(f"down must be False where no product feeds ffn.down, and {block} has {sorted(here)}")
        pairs.append((f"{block}.ffn.gate_up", f"{block}.ffn.down"))
    return pairs
