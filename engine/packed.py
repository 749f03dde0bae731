"""The same products, with the weights laid out as the processor wants to read them.

A decode step at batch 1 is bound by reading the weights, and PyTorch's product of a plain row-major matrix reads
them at about half the machine's speed; oneDNN reads its own blocked layout at nearly all of it. That layout is a
second copy, and would not follow if the first one changed. So `pack` gives a new model whose products have no
`weight` to change, and the old one stays for training, pruning and quantising.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from engine.model import Decoder


class Packed(nn.Module):
    """x @ weight.T for a weight [out, in] in oneDNN's layout. Forward only."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._blocks, None, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether this build and this processor have blocked products for such a weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack(model: Decoder) -> Decoder:
    """A twin of `model` for inference that shares its embeddings and norms; `model` itself where it is no use."""
    if not can_pack(model.embed.weight):
        return model
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    with torch.no_grad():
        for parent in list(twin.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child.bias is None:
                    setattr(parent, name, Packed(child.weight))
        if twin.head is None:
            twin.head = Packed(twin.embed.weight)
    return twin
