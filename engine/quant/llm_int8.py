r"""LLM.int8(): the few activation channels with outliers are multiplied in float, all others in int8.

Dettmers et al. (arXiv:2208.07339), section 3.1 (vector-wise quantisation) and 3.2, equation 8:

    X W ≈ Σ_{h in O} X^h W^h  +  S · Σ_{h not in O} Q(X)^h Q(W)^h,    S = c_x c_w / 127²

Paper -> here: alpha = threshold (6.0); O = the channels where any token reaches it; c_x = the largest magnitude of a
token among the other channels; c_w = that of an output row of the weight; h = channel.
Shapes: x [..., in], weight [out, in] -> [..., out]. The threshold is in units of the activations: it suits normed ones.
Errors: ValueError for a threshold below 0 or NaN, for x empty or not finite.
Deviations: weights are quantised once, c_w taken over all channels, and the float columns are those of the float
weight (bitsandbytes: of the int8 one). Threshold 0 moves every channel to float, so the answer is exact (in
bitsandbytes 0 turns decomposition off: here that is infinity). What is kept "16-bit" is in the dtype of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.quant import Recipe, check_values
from engine.quant.affine import Grid, choose, place, quantise, snap
from engine.quant.integer import integer_matmul
from engine.recording import recording_on, site, tap

LANDSCAPE = site("llm_int8.landscape", "how large each activation is", symbol="|X|", low=0.0)
OUTLIERS = site("llm_int8.outliers", "the channels that go to the float side", symbol="O", low=0, high=1)
FLOAT_PART = site("llm_int8.float_part", "what the outlier channels add to the answer", symbol="Σ XʰWʰ, h∈O")
INT8_PART = site("llm_int8.int8_part", "what the other channels add to the answer", symbol="S Σ Q(X)ʰQ(W)ʰ, h∉O")

ROWS = Grid(8, granularity="token")  # a scale a token of the activations
OUTPUTS = Grid(8, granularity="channel")  # a scale an output row of the weights


@dataclass(frozen=True)
class Parts:
    """The two halves of the answer and which channels went where."""

    outliers: Tensor  # in, bool
    float_part: Tensor  # ... out
    int8_part: Tensor  # ... out


def outlier_channels(x: Tensor, *, threshold: float) -> Tensor:
    """The channels in which any token's activation reaches the threshold: bool [in]."""
    if not threshold >= 0:
        raise ValueError(f"threshold must be 0 or above, not {threshold}")
    check_values(x)
    return (x.abs() >= threshold).flatten(0, -2).any(0)


def llm_int8_matmul(x: Tensor, weight: Tensor, *, threshold: float = 6.0) -> Parts:
    """The clear form: split the channels, quantise token by token and output by output, multiply integers."""
    check_values(weight, name="weight")
    outliers = outlier_channels(x, threshold=threshold)
    float_part = F.linear(x[..., outliers], weight[:, outliers])
    if bool(outliers.all()):
        return Parts(outliers, float_part, torch.zeros_like(float_part))
    rest = x.masked_fill(outliers, 0.0)  # a zero channel adds nothing and widens no scale
    int8_part, _ = integer_matmul(quantise(rest, ROWS), quantise(weight, OUTPUTS))
    return Parts(outliers, float_part, int8_part)


class LLMInt8Linear(nn.Module):
    """A linear layer by LLM.int8(). The int8 side is multiplied on reconstructed values, the same up to rounding."""

    weight: Tensor
    int8_weight: Tensor

    def __init__(self, linear: nn.Linear, *, threshold: float = 6.0, name: str = "") -> None:
        super().__init__()
        if not threshold >= 0:
            raise ValueError(f"threshold must be 0 or above, not {threshold}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.threshold, self.name = threshold, name
        self.register_buffer("weight", linear.weight.detach())  # the float columns are taken from here
        self.codes = quantise(linear.weight.detach(), OUTPUTS)
        self.register_buffer("int8_weight", self.codes.reconstruct())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        outliers = outlier_channels(x, threshold=self.threshold)
        rest = x.masked_fill(outliers, 0.0)
        scale, zero = choose(rest, ROWS)
        int8_part = F.linear(place(snap(rest, scale, zero, ROWS), scale, zero, ROWS).to(x.dtype), self.int8_weight)
        float_part = F.linear(x[..., outliers], self.weight[:, outliers])
        self._show(x, outliers, float_part, int8_part)
        y = int8_part + float_part
        return y if self.bias is None else y + self.bias

    def _show(self, x: Tensor, outliers: Tensor, float_part: Tensor, int8_part: Tensor) -> None:
        if recording_on(LANDSCAPE, linear=self.name):
            tap(LANDSCAPE, x.abs().flatten(0, -2), "token channel", linear=self.name)
        tap(OUTLIERS, outliers, "channel", linear=self.name)
        if recording_on(FLOAT_PART, linear=self.name):
            tap(FLOAT_PART, float_part.flatten(0, -2), "token output", linear=self.name)
        if recording_on(INT8_PART, linear=self.name):
            tap(INT8_PART, int8_part.flatten(0, -2), "token output", linear=self.name)

    def storage_bits(self, outliers: Tensor) -> int:
        """Bits to store: int8 codes and scales, and 16 a value for the columns of the outlier channels."""
        return self.codes.storage_bits + 16 * int(outliers.sum()) * self.weight.shape[0]


def recipe(*, threshold: float = 6.0) -> Recipe:
    """For `quantised`: every linear layer by LLM.int8()."""
    return lambda name, linear: LLMInt8Linear(linear, threshold=threshold, name=name)
