"""RoPE: a query and a key are turned by angles that grow with their positions, so that their product knows only
how far apart they are.

RoFormer (arXiv:2104.09864), equation 34. Paper -> here: d = width of a head, theta_i = base^(-2i/d), m = position.
Deviation: the halves of a head are paired (i with i + d/2), as in Hugging Face's Llama, not neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

Positions = range | Tensor


def rope_tables(width: int, *, base: float, count: int, dtype: torch.dtype, device: torch.device) -> Rope:
    """The angles of `count` positions, computed in float64 and rounded once."""
    # A table made in inference mode could never be used in training, and this one is kept for both.
    with torch.inference_mode(False):
        theta = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)  # D/2
        angle = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * theta  # P D/2
        cos = torch.cat((angle.cos(), angle.cos()), -1)  # P D
        sin = torch.cat((-angle.sin(), angle.sin()), -1)  # P D, the sign of rotate_half inside
        return Rope(cos.to(device, dtype), sin.to(device, dtype))


class Rope:
    """The tables for one head width, one dtype and one device. Positions are a `range` (sliced, free of charge)
    or a tensor [T] or [B, T]."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._cos = cos  # P D
        self._sin = sin  # P D
        self._last = (range(0), cos[:0], sin[:0])  # all layers of a pass ask for the same slice

    @property
    def count(self) -> int:
        return self._cos.shape[0]

    def at(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """cos and sin at these positions, [T, D] or [B, 1, T, D]."""
        if isinstance(positions, range):
            last, cos, sin = self._last
            if last != positions:
                if positions.stop > self.count:
                    raise ValueError(f"position {positions.stop - 1} is past max_positions={self.count}")
                cos, sin = self._cos[positions.start : positions.stop], self._sin[positions.start : positions.stop]
                self._last = (positions, cos, sin)
            return cos, sin
        cos, sin = self._cos[positions], self._sin[positions]
        return (cos, sin) if positions.dim() == 1 else (cos[:, None], sin[:, None])

    def rotate(self, x: Tensor, positions: Positions) -> Tensor:
        """Turn x [B, H, T, D] to its positions: x cos + (halves swapped, the first negated) sin."""
        cos, sin = self.at(positions)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
