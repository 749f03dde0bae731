r"""Affine quantisation: snap values to an even grid, and store which grid line.

Jacob et al. (arXiv:1712.05877), equation 1: r = S (q - Z); group-wise scales: Q-BERT (arXiv:1909.05840), section 3.3.
Paper -> here: S = scale, Z = zero, q = codes, r = what `reconstruct` gives.

    asymmetric   q from -2^(b-1) to 2^(b-1) - 1,   S = (max - min) / (2^b - 1),   Z = round(-2^(b-1) - min / S)
    offset       the same with Z = -2^(b-1) - min / S not rounded: a minimum in float (llama.cpp's Q4_1 is such a grid)
    symmetric    q from -(2^(b-1) - 1) to 2^(b-1) - 1,   S = max|x| / (2^(b-1) - 1),   Z = 0

Every granularity is a cut into blocks with a scale of their own: one for the tensor, one a channel (first axis, the
outputs of a weight), one a token (each row along the last axis), or one for each `group` values along the last axis.
Shapes: x any -> codes as x (int8 or int16), scale and zero [blocks, 1]. Bits: 1 to 16, symmetric 2 to 16.
Errors: ValueError for bits or groups that don't fit, and for tensors that are empty or not finite.
Deviations: the range is stretched to hold 0, so that 0 is exact (not with an offset); -2^(b-1) is left out of symmetric
grids; a block of zeros has scale 1. Scales are worked out in float64 and kept in the dtype of x (float32 at least) or
in `scale_dtype`, rounded up, so that nothing is clipped and the error stays within half a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quant import check_bits, check_values
from engine.recording import recording_on, site, tap

X = site("affine.x", "the values before rounding", symbol="r")
CODES = site("affine.codes", "which line of the grid stands for each value", symbol="q")
SCALE = site("affine.scale", "the distance between two grid lines", symbol="S", low=0.0)
ZERO = site("affine.zero", "the code that stands for zero", symbol="Z")
BACK = site("affine.reconstruction", "the values after rounding", symbol="S(q-Z)")
ERROR = site("affine.error", "what rounding changed", symbol="S(q-Z)-r")

GRANULARITIES = ("tensor", "channel", "group", "token")


@dataclass(frozen=True)
class Grid:
    """How to quantise: bits, symmetric or with a zero point (a whole one or not), and which values share a scale."""

    bits: int
    symmetric: bool = True
    granularity: str = "tensor"
    group: int | None = None
    scale_dtype: torch.dtype | None = None
    whole_zero: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.symmetric and self.bits == 1:
            raise ValueError("bits must be from 2 to 16 on a symmetric grid, where 1 bit leaves no line but 0, not 1")
        if self.symmetric and not self.whole_zero:
            raise ValueError("whole_zero must be True on a symmetric grid, whose zero point is 0")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {self.granularity!r}")
        if (self.granularity == "group") != (self.group is not None) or (self.group is not None and self.group < 1):
            raise ValueError(f'group must be a size above 0 with granularity "group", else None, not {self.group!r}')

    @property
    def low(self) -> int:
        """The lowest code."""
        return 1 - 2 ** (self.bits - 1) if self.symmetric else -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest integers that hold the codes. Packed, they take only `bits` (packing.py)."""
        return torch.int8 if self.bits <= 8 else torch.int16

    def blocks(self, x: Tensor) -> Tensor:
        """`x` cut into the blocks that share a scale: [blocks, values]."""
        if self.granularity == "tensor":
            return x.reshape(1, -1)
        if x.dim() < 1 or not x.numel():
            raise ValueError(f"x must have axes with values for granularity {self.granularity!r}, not {list(x.shape)}")
        if self.granularity == "channel":
            return x.reshape(x.shape[0], -1)
        size = self.group or x.shape[-1]
        if x.shape[-1] % size:
            raise ValueError(f"group must divide the {x.shape[-1]} values of the last axis, and {size} does not")
        return x.reshape(-1, size)


@dataclass(frozen=True)
class Quantised:
    """Codes with the scale and zero point of each block."""

    codes: Tensor  # as x, int8 or int16
    scale: Tensor  # blocks 1
    zero: Tensor  # blocks 1, int32, or float when it is not whole
    grid: Grid
    dtype: torch.dtype

    def reconstruct(self) -> Tensor:
        """S (q - Z), in the dtype that came."""
        return place(self.codes, self.scale, self.zero, self.grid).to(self.dtype)

    def to(self, device: torch.device) -> Quantised:
        """The same on another device."""
        return Quantised(self.codes.to(device), self.scale.to(device), self.zero.to(device), self.grid, self.dtype)

    @property
    def storage_bits(self) -> int:
        """Bits of all codes, of each scale in its dtype, and of each zero point if there are any: those of a code when
        it is whole, else of its dtype."""
        zero = 0 if self.grid.symmetric else self.grid.bits if self.grid.whole_zero else self.zero.element_size() * 8
        blocks = self.scale.numel() * (self.scale.element_size() * 8 + zero)
        return self.codes.numel() * self.grid.bits + blocks


def quantise(x: Tensor, grid: Grid, **index: int | str) -> Quantised:
    """Find scale and zero point of each block of `x`, and the code of each value."""
    scale, zero = choose(x, grid)
    codes = snap(x, scale, zero, grid)
    done = Quantised(codes, scale, zero, grid, x.dtype)
    if recording_on(X, **index):
        tap(X, _rows(x), "row column", **index)
    if recording_on(CODES, **index):
        tap(CODES, _rows(codes), "row column", **index)
    tap(SCALE, scale, "block one", **index)
    tap(ZERO, zero, "block one", **index)
    if recording_on(BACK, **index) or recording_on(ERROR, **index):
        back = done.reconstruct()
        tap(BACK, _rows(back), "row column", **index)
        tap(ERROR, _rows(back - x), "row column", **index)
    return done


def choose(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block, from its least and its largest value: [blocks, 1] each."""
    check_values(x)
    blocks = grid.blocks(x.detach())  # blocks values
    low, high = blocks.amin(1, keepdim=True).double(), blocks.amax(1, keepdim=True).double()
    if grid.whole_zero:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    exact = torch.maximum(-low, high) / grid.high if grid.symmetric else high / _steps(grid) - low / _steps(grid)
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype = grid.scale_dtype or wide
    scale = exact.clamp(min=torch.finfo(dtype).smallest_normal).to(dtype)
    short = scale.double() < exact
    scale = torch.where(short, (exact * (1 + torch.finfo(dtype).eps)).to(dtype), scale)
    scale = torch.where(exact == 0, 1.0, scale).to(dtype)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"scale_dtype must hold scales up to {float(exact.max()):.3g}, and {dtype} does not")
    zero = torch.zeros_like(exact) if grid.symmetric else grid.low - low / scale.double()
    return scale, zero.round().clamp(grid.low, grid.high).int() if grid.whole_zero else zero.to(wide)


def snap(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """q = round(x / S) + Z, or round(x / S + Z) when Z is not whole, clipped to the codes there are: int8 or int16."""
    blocks = grid.blocks(x)
    wide = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    lines = blocks.to(wide) / scale.to(wide)
    lines = lines.round() + zero if grid.whole_zero else (lines + zero).round()
    return lines.clamp(grid.low, grid.high).to(grid.code_dtype).view(x.shape)


def place(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """S (q - Z): where the grid line of each code stands, as codes, in the dtype of the scale (float32 at least)."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    return ((grid.blocks(codes) - zero).to(wide) * scale.to(wide)).view(codes.shape)


def _steps(grid: Grid) -> int:
    return grid.high - grid.low


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
