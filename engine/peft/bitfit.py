"""BitFit: train the biases, and nothing else.

Ben Zaken et al. (arXiv:2106.10199), section 3: of Wx + b, every W stays, every b is learned; norms have a bias too.
Paper -> here: b_q, b_k, b_v = `bias` of qkv; b_m1, b_m2, b_m3 and the norms' biases by their place.
Models of the Llama family have no biases: `with_biases` gives them zeros everywhere, which changes no bit of what they
say, so that there is something to train.
Errors: ValueError for a model without biases.
Deviations: no task head is trained, since a language model keeps its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model import Decoder
from engine.norm import RMSNorm
from engine.peft import branch, put


class BiasedLinear(nn.Module):
    """Wx + b, added after the product, so that b = 0 leaves Wx as it was to the bit."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.bias

    def effective_weight(self) -> Tensor:
        return self.weight


class BiasedNorm(nn.Module):
    """RMSNorm and a bias after it."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm
        self.bias = nn.Parameter(torch.zeros_like(norm.weight), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y + self.bias


def with_biases(model: Decoder) -> Decoder:
    """A copy with a bias of zeros wherever a linear layer of the blocks or a norm has none."""
    twin = branch(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Linear) and module.bias is None and name.startswith("blocks."):
            put(twin, name, BiasedLinear(module))
        elif isinstance(module, RMSNorm) and not isinstance(twin.get_submodule(name.rpartition(".")[0]), BiasedNorm):
            put(twin, name, BiasedNorm(module))
    return twin


def attach(model: Decoder) -> Decoder:
    """A copy of `model` whose biases, and only they, are trained. Raises ValueError if there are none."""
    biases = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise ValueError(
            "model must have biases for BitFit to train, and this one has none: give it zeros with with_biases(model)"
        )
    return branch(model, train=biases)
