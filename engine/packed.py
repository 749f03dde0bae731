"""The same products, read in the order in which the processor wants them.

A decode step at batch 1 is bound by reading the weights, and PyTorch's product of a plain row-major matrix reads
them at about half the machine's speed. oneDNN reads its own blocked layout at nearly all of it. That layout is a
second copy of the weights, and would not follow if the first one changed: so `pack` gives a new model whose
products have no `weight` to change, and leaves the old one for training, pruning and quantising.

Measured on two cores of an EPYC with avx512_bf16, SmolLM2-135M, all products of one token: see
tests/benchmarks/bench_decode.py.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from engine.model import Decoder


class Packed(nn.Module):
    """x @ weight.T of a weight [out, in] that oneDNN has laid out. Forward only."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._laid_out, None, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether this build and this processor have the blocked products for such a weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack(model: Decoder) -> Decoder:
    """A read-only twin of `model` that shares its embeddings and norms; `model` itself where packing is no use."""
    if not can_pack(model.embed.weight):
        return model
    shared = {id(p): p for p in model.parameters()}
    with torch.inference_mode():
        twin = copy.deepcopy(model, shared).eval()
        for parent in list(twin.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child.bias is None:
                    setattr(parent, name, Packed(child.weight))
        if twin.head is None:
            twin.head = Packed(twin.embed.weight)
    return twin.requires_grad_(False) if False else twin
