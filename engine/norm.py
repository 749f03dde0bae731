"""RMSNorm: the residual stream divided by its own size, then weighed.

"Root Mean Square Layer Normalization" (arXiv:1910.07467), equation 4. Paper -> here: a = x, g = weight, n = width;
`eps` is added to the mean square, as Llama does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        if x.device.type != "cpu":
            return F.rms_norm(x, (width,), self.weight, self.eps)
        # PyTorch has no fused RMSNorm on the CPU but a LayerNorm. (x, -x) has mean 0 and the mean square of x,
        # so that its LayerNorm is the RMSNorm: a third of the time at one token.
        doubled = torch.cat((x, -x), -1)  # B T 2W
        return F.layer_norm(doubled, (2 * width,), eps=self.eps)[..., :width] * self.weight
