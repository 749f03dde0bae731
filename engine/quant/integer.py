r"""Matrix products in integers: multiply codes, add in 32 bits, scale once at the end; and linear layers that do so.

Jacob et al. (arXiv:1712.05877), equations 4 and 7. Paper -> here: q1, Z1, S1 = codes, zero and scale of `a`, the
activations; q2, Z2, S2 = those of `w`, the weights; N = K, the axis summed over.

    Y = S1 S2 [ Σ q1 q2 - Z1 Σ q2 - Z2 Σ q1 + K Z1 Z2 ]

With groups along K there is one such sum for each group, each scaled by its own S1 S2.
Shapes: a [..., K], per tensor, token or group; w [out, K], per tensor, channel or group -> Y [..., out].
Errors: ValueError for sizes that don't fit, groups that differ, sums that could leave 32 bits.
Deviations: S1 S2 is multiplied in floating point; the paper turns it into an integer multiplier and a shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.quant import Recipe
from engine.quant.affine import Grid, Quantised, choose, place, quantise, snap
from engine.recording import site, tap

ACCUMULATOR = site("integer.accumulator", "the sum of products of codes, before any scale", symbol="Σ q₁q₂")


@dataclass(frozen=True)
class Work:
    """What one product took. Multiplications by scales and zero points are counted apart from those of codes."""

    code_multiplications: int
    zero_multiplications: int
    scale_multiplications: int


def integer_matmul(a: Quantised, w: Quantised) -> tuple[Tensor, Work]:
    """The product of two quantised matrices, a wᵀ, and what it took."""
    check_matmul(a, w)
    size = max(q.grid.group for q in (a, w) if q.grid.group) if a.grid.group or w.grid.group else w.codes.shape[1]
    qa = a.codes.reshape(-1, a.codes.shape[-1] // size, size).transpose(0, 1)  # G M g
    qw = w.codes.reshape(-1, w.codes.shape[-1] // size, size).transpose(0, 1)  # G N g
    (G, M, K), N = qa.shape, qw.shape[1]
    total = accumulate(qa, qw)  # G M N
    if not a.codes.dim() > 2:
        tap(ACCUMULATOR, total, "group token output")
    sa, za = (_spread(part, G, M) for part in (a.scale, a.zero))  # G M 1
    sw, zw = (_spread(part, G, N).mT for part in (w.scale, w.zero))  # G 1 N
    corrections = 0
    if not a.grid.symmetric:
        total = total - za * qw.sum(2, dtype=torch.int32)[:, None]
        corrections += G * M * N
    if not w.grid.symmetric:
        total = total - zw * qa.sum(2, dtype=torch.int32)[..., None]
        corrections += G * M * N
    if not a.grid.symmetric and not w.grid.symmetric:
        total = total + za * zw * K
        corrections += 2 * G * M * N
    wide = torch.promote_types(torch.promote_types(a.scale.dtype, w.scale.dtype), torch.float32)
    y = (total.to(wide) * (sa.to(wide) * sw.to(wide))).sum(0)  # M N
    work = Work(
        code_multiplications=G * M * N * K, zero_multiplications=corrections, scale_multiplications=2 * G * M * N
    )
    return y.view(*a.codes.shape[:-1], N).to(a.dtype), work


def accumulate(qa: Tensor, qw: Tensor) -> Tensor:
    """Σ q1 q2 in 32 bits: [G, M, K] and [G, N, K] -> [G, M, N] int32. CUDA has no such product of int32, so there it
    is taken in float64, which holds every sum that fits 32 bits exactly."""
    if qa.device.type == "cpu":
        return qa.int() @ qw.int().mT
    return (qa.double() @ qw.double().mT).round().int()


def check_matmul(a: Quantised, w: Quantised) -> None:
    """Raise ValueError unless a wᵀ can be summed in integers."""
    if w.codes.dim() != 2 or a.codes.dim() < 1 or a.codes.shape[-1] != w.codes.shape[1]:
        raise ValueError(
            f"a and w must have shapes [..., K] and [out, K], not {list(a.codes.shape)} and {list(w.codes.shape)}"
        )
    if not (a.grid.whole_zero and w.grid.whole_zero):
        raise ValueError("whole_zero must be True in a and w to multiply in integers")
    if a.grid.granularity not in ("tensor", "token", "group") or w.grid.granularity == "token":
        raise ValueError(
            "a must be quantised per tensor, token or group and w per tensor, channel or group, since a scale inside "
            f"the sum would be lost; not {a.grid.granularity!r} and {w.grid.granularity!r}"
        )
    if a.grid.group and w.grid.group and a.grid.group != w.grid.group:
        raise ValueError(f"group must be the same in a and w, not {a.grid.group} and {w.grid.group}")
    most = w.codes.shape[1] * max(abs(a.grid.low), a.grid.high) * max(abs(w.grid.low), w.grid.high)
    # With zero points the four terms together are at most the square of the code ranges.
    span = w.codes.shape[1] * (a.grid.high - a.grid.low) * (w.grid.high - w.grid.low)
    if max(most, span) > 2**31 - 1:
        raise ValueError(
            f"bits must leave {w.codes.shape[1]} products within 32 bits; "
            f"{a.grid.bits} and {w.grid.bits} bits reach {max(most, span)}"
        )


def _spread(part: Tensor, G: int, rows: int) -> Tensor:
    """A scale or zero point for every group and row, [G, rows, 1], from the blocks as affine.py counts them."""
    if part.numel() == 1:
        return part.view(1, 1, 1).expand(G, rows, 1)
    if part.numel() == rows:
        return part.view(1, rows, 1).expand(G, rows, 1)
    return part.view(rows, G).mT[..., None]


def fake_quantise(x: Tensor, grid: Grid) -> Tensor:
    """`x` put on its grid and taken back: the values that integers would have stood for, in the dtype of `x`."""
    scale, zero = choose(x, grid)
    return place(snap(x, scale, zero, grid), scale, zero, grid).to(x.dtype)


class QuantLinear(nn.Module):
    """A linear layer on n-bit weights and m-bit activations, WnAm; None leaves either in float.

    `forward` multiplies the reconstructed values in float (fake quantisation: fast everywhere, same answer up to
    rounding); `integer_forward` multiplies the codes. Activations are quantised by the range of what comes; `scales`
    are the scale and zero point of the weights where they are known already.
    """

    weight: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        *,
        weights: Grid | None,
        activations: Grid | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weights, self.activations = weights, activations
        self.codes: Quantised | None = None
        if weights is not None:
            weight = linear.weight.detach()
            scale, zero = scales or choose(weight, weights)
            self.codes = Quantised(snap(weight, scale, zero, weights), scale, zero, weights, weight.dtype)
        # Kept beside the codes for speed; what the layer would weigh is `storage_bits`.
        self.register_buffer("weight", self.codes.reconstruct() if self.codes else linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x if self.activations is None else fake_quantise(x, self.activations), self.weight, self.bias)

    def integer_forward(self, x: Tensor) -> Tensor:
        """The same answer by integer products. Needs both grids."""
        if self.activations is None or self.codes is None:
            raise ValueError("weights and activations must both have a grid to multiply in integers")
        y, _ = integer_matmul(quantise(x, self.activations), self.codes.to(x.device))
        return y if self.bias is None else y + self.bias

    @property
    def storage_bits(self) -> int:
        """Bits of the weights as they would be stored, with scales and zero points."""
        return self.codes.storage_bits if self.codes else self.weight.numel() * self.weight.element_size() * 8


def recipe(*, weights: Grid | None, activations: Grid | None = None) -> Recipe:
    """For `quantised`: every linear layer becomes a QuantLinear on these grids."""
    return lambda name, linear: QuantLinear(linear, weights=weights, activations=activations)
