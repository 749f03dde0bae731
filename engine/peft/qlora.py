"""QLoRA: LoRA beside weights of four bits, whose rounding the products learn to live with.

Dettmers et al. (arXiv:2305.14314), section 3: W is stored as 4-bit NormalFloat in blocks of 64 with a constant each,
and read back for every product; gradients pass through the stored weight into A and B, and never into it.
Paper -> here: doubleDequant(W) = `base()`; L₁, L₂ = A, B of `LoRALinear`; block = 64.
Every linear layer of the blocks is stored so; those that are targets have a product beside them.
Shapes: weight [out, in] -> codes packed two a byte, uint8, and a constant a block.
Errors: those of lora.py and nf4.py (a block that does not divide the values).
Deviations: no double quantisation of the constants and no paged optimiser. The values are kept decoded beside the codes
for speed, as in quant/integer.py: what a chip would hold is `stored_bits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from engine.model import Decoder
from engine.peft import put
from engine.peft.lora import LoRALinear, Store
from engine.peft.lora import attach as beside
from engine.quant import linears
from engine.quant.affine import Grid, quantise
from engine.quant.nf4 import from_blocks, storage_bits, to_blocks
from engine.quant.packing import pack, unpack


class NF4(nn.Module):
    """A frozen weight as 4-bit NormalFloat in blocks."""

    codes: Tensor
    largest: Tensor
    decoded: Tensor

    def __init__(self, weight: Tensor, *, block: int = 64) -> None:
        super().__init__()
        code, largest = to_blocks(weight, block=block)
        self.shape, self.stored_bits = weight.shape, storage_bits(code, largest)
        self.register_buffer("codes", pack(code, 4))  # blocks block/2
        self.register_buffer("largest", largest)  # blocks 1
        self.register_buffer("decoded", self.decode())

    def decode(self) -> Tensor:
        """The values again, from the packed codes: [out, in]."""
        block = self.shape.numel() // len(self.largest)
        return from_blocks(unpack(self.codes, 4, block).long(), self.largest).view(self.shape)

    def forward(self) -> Tensor:
        return self.decoded


class Affine(nn.Module):
    """A frozen weight on an even 4-bit grid in groups: SmolLM2 (Q4_1, groups of 32) fits it to rounding."""

    codes: Tensor
    decoded: Tensor

    def __init__(self, weight: Tensor, *, group: int = 32) -> None:
        super().__init__()
        done = quantise(weight, Grid(4, symmetric=False, granularity="group", group=group, whole_zero=False))
        self.shape, self.stored_bits = weight.shape, done.storage_bits
        self.register_buffer("codes", pack(done.codes.int() - done.grid.low, 4))  # out in/2
        self.register_buffer("decoded", done.reconstruct())

    def forward(self) -> Tensor:
        return self.decoded


STORES: dict[str, Store] = {"nf4": NF4, "affine": Affine}


@torch.no_grad()
def attach(
    model: Decoder,
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] = ("qkv", "out", "gate_up", "down"),
    seed: int = 0,
    store: Store | str = "nf4",
) -> Decoder:
    """A copy of `model` with every linear layer of the blocks in 4 bits, and a product beside each target."""
    if isinstance(store, str):
        if store not in STORES:
            raise ValueError(f"store must be one of {', '.join(STORES)}, not {store!r}")
        store = STORES[store]
    twin = beside(model, rank=rank, alpha=alpha, targets=targets, seed=seed, store=store)
    for name, linear in linears(twin).items():
        put(twin, name, LoRALinear(linear, {}, rank=1, alpha=1.0, generator=torch.Generator(), store=store))
    return twin


def stored_bits(model: nn.Module) -> int:
    """Bits of the frozen weights of the linear layers as they would be stored, constants included."""
    found = [m.base for m in model.modules() if isinstance(m, LoRALinear)]
    return sum(
        cast(int, base.stored_bits)
        if hasattr(base, "stored_bits")
        else sum(p.numel() * p.element_size() * 8 for p in base.parameters())
        for base in found
    )
