"""Weights after a stay in a number format: what a model is that was stored in fewer bits and loaded again.

Floats are cast by torch, whose casts are those of formats.py (its tests hold all patterns equal); whole numbers and
NF4, which know only -1 to 1 or small numbers, store blocks scaled by their largest magnitude (nf4.py).
Shapes: x any -> the same. Errors: ValueError for values that are empty or not finite.
Deviations: the constant of a block is counted as 16 bits and kept in full; the block is the largest power of two up to
`BLOCK` that divides the values; what is too large for an 8-bit float becomes its largest finite value.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.quant import Recipe, check_values
from engine.quant.formats import Float, Format, number_line
from engine.quant.nf4 import from_blocks, to_blocks
from engine.recording import site, tap

BACK = site("stored.back", "the values after a stay in the format", symbol="x̂")

BLOCK = 64
CONSTANT = 16  # bits of a block's constant
CASTS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8 e4m3fn": torch.float8_e4m3fn,
    "fp8 e5m2": torch.float8_e5m2,
}


def stored(x: Tensor, form: Format, **index: int | str) -> Tensor:
    """What is left of `x`, in its dtype."""
    check_values(x)
    if form.name in CASTS:
        if form.bits <= 8:
            largest = float(number_line(form)[-1])
            x = x.clamp(-largest, largest)
        back = x.to(CASTS[form.name]).to(x.dtype)
    else:
        code, constants = to_blocks(x, form=form, block=block_of(x))
        back = from_blocks(code, constants, form=form).to(x.dtype).view(x.shape)
    tap(BACK, back.flatten(), "value", **index)
    return back


def stored_bits(x: Tensor, form: Format) -> int:
    """What `x` takes in the format: with the constants of its blocks, where it needs them."""
    constants = 0 if isinstance(form, Float) else x.numel() // block_of(x) * CONSTANT
    return x.numel() * form.bits + constants


def block_of(x: Tensor) -> int:
    """How many values share a constant."""
    return min(BLOCK, x.numel() & -x.numel())


def recipe(form: Format) -> Recipe:
    """For `quantised`: every linear layer with weights that were stored in this format."""

    def load(name: str, linear: nn.Linear) -> nn.Module:
        twin = copy.copy(linear)  # shares the bias; the weight is replaced below
        twin._parameters = dict(linear._parameters)
        twin.weight = nn.Parameter(stored(linear.weight.detach(), form), requires_grad=False)
        return twin

    return load


@torch.no_grad()
def residuals(model: nn.Module, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The residual stream as it enters each block, [tokens, width]: (layer, values), for ids [1, tokens]."""
    seen: list[Tensor] = []
    handles = [
        block.norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()[0]))
        for block in model.blocks  # type: ignore[union-attr]
    ]
    try:
        model.hidden(ids)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    yield from enumerate(seen)
