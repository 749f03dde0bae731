"""Values in blocks, each scaled by its own largest magnitude: how 4-bit NormalFloat stores weights.

QLoRA (arXiv:2305.14314), section 3 and equation 1. Paper -> here: c, the quantisation constant = `largest`; block 64.
Shapes: x any shape, N * block values -> code [N, block] int64, largest [N, 1]; both ways run along the last axis first.
Errors: ValueError for a block that does not divide the values, and for what is empty or not finite.
Deviations: no double quantisation of the constants; any format of formats.py may take the place of NF4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quant import check_values
from engine.quant.formats import FORMATS, Format, Integer


def to_blocks(x: Tensor, *, form: Format = FORMATS["nf4"], block: int = 64) -> tuple[Tensor, Tensor]:
    """The code of each value and the largest magnitude of its block, which scales the block to -1..1."""
    check_values(x)
    if block < 1 or x.numel() % block:
        raise ValueError(f"block must divide the {x.numel()} values of x, and {block} does not")
    blocks = x.double().reshape(-1, block)  # N block
    largest = blocks.abs().amax(1, keepdim=True)  # N 1
    return form.encode(blocks / torch.where(largest == 0, 1.0, largest) * _unit(form)), largest.to(x.dtype)


def from_blocks(code: Tensor, largest: Tensor, *, form: Format = FORMATS["nf4"]) -> Tensor:
    """The values again, [N, block], in the dtype of `largest`."""
    return (form.decode(code) * (largest.double() / _unit(form))).to(largest.dtype)


def storage_bits(code: Tensor, largest: Tensor, *, form: Format = FORMATS["nf4"]) -> int:
    """What both take when packed: the codes and one constant a block in its own dtype."""
    return code.numel() * form.bits + largest.numel() * largest.element_size() * 8


def _unit(form: Format) -> float:
    """The value that stands for the largest magnitude: 1, or the largest code of an integer format."""
    return 2.0 ** (form.bits - 1) - 1 if isinstance(form, Integer) else 1.0
