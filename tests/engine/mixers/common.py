"""What the tests of the mixers share: a small decoder in float64, and a counter of multiplications."""

from math import prod

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.caches import Cache
from engine.model import Decoder, Shape

SHAPE = Shape(vocab=17, width=12, layers=2, heads=2, kv_heads=1, head_width=6, ffn_width=16, max_positions=128)


def decoder(mixer, *, shape: Shape = SHAPE, seed: int = 0) -> Decoder:
    """A decoder in float64 whose parameters are all far from their starting values, the zeros among them too."""
    torch.manual_seed(seed)
    model = Decoder(shape, mixer=mixer, seed=seed).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(count: int, *, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(0, SHAPE.vocab, (batch, count), generator=torch.Generator().manual_seed(seed))


def rand(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def in_parts(model: nn.Module, ids: Tensor, sizes: list[int], cache: Cache) -> Tensor:
    """The logits of a text read in passes of these sizes."""
    return torch.cat([model(part, cache=cache) for part in ids.split(sizes, 1)], 1)


class Multiplications(TorchDispatchMode):
    """Counts what is multiplied inside it: products of matrices and of single numbers."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("bmm", "mm"):
            self.total += out.numel() * args[0].shape[-1]
        elif name.startswith("_scaled_dot_product"):
            self.total += 2 * args[0].numel() * args[1].shape[-2]
        elif name == "mul":
            self.total += prod(out.shape)
        return out


def multiplied(work) -> int:
    with torch.no_grad(), Multiplications() as counter:
        work()
    return counter.total
