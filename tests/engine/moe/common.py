"""What the tests of experts share: small models and random numbers by seed."""

import torch

from engine.model import Decoder, Shape
from engine.moe.experts import Experts
from engine.moe.router import TopK

SHAPE = Shape(vocab=256, width=16, layers=3, heads=2, kv_heads=2, head_width=8, ffn_width=12, max_positions=128)
SWITCH = TopK(1, renormalise=False)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def experts(count: int = 6, *, seed: int = 0, **options) -> Experts:
    """One layer in float64, its weights large enough that experts differ visibly."""
    layer = Experts(SHAPE, 0, count=count, **options).double()
    for i, p in enumerate(layer.parameters()):
        p.data = randn(*p.shape, seed=1000 * seed + i) / 3
    return layer.requires_grad_(False)


def decoder(count: int = 6, *, seed: int = 0, **options) -> Decoder:
    model = Decoder(SHAPE, ffn=lambda layer: Experts(SHAPE, layer, count=count, **options), seed=seed).double()
    for name, p in model.named_parameters():
        if "router" in name:
            p.data *= 50  # 0.02 wide, a router would hardly tell one token from another
    return model.eval().requires_grad_(False)


def ids(count: int = 20, *, rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 190, (rows, count), generator=torch.Generator().manual_seed(seed))
