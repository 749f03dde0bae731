"""A task small enough to prune and train again twenty times on a page: which digit is drawn here?

No paper: it stands where the lottery ticket paper has MNIST. Ten digits of 3 by 5 pixels, somewhere on 6 by 6, of
uneven strength and with noise on every pixel.
Shapes: pictures [N, 36], float32; digits [N], int64.
Errors: ValueError for a count below 1.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 6
NOISE = 0.1  # of a pixel; the strokes are 0.4 to 1 strong
# The rows of each digit, from the top, as three bits.
DIGITS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71122", "75757", "75717")

After = Callable[[nn.Module], None]


def pictures(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """`count` pictures and what they show."""
    if count < 1:
        raise ValueError(f"count must be a number above 0, not {count}")
    generator = torch.Generator().manual_seed(seed)
    font = torch.tensor([[[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in rows] for rows in DIGITS])  # 10 5 3
    digits = torch.randint(10, (count,), generator=generator)
    top = torch.randint(SIDE - 5 + 1, (count,), generator=generator)[:, None, None] + torch.arange(5)[:, None]
    left = torch.randint(SIDE - 3 + 1, (count,), generator=generator)[:, None, None] + torch.arange(3)
    strength = 0.4 + 0.6 * torch.rand(count, 1, 1, generator=generator)
    x = NOISE * torch.randn(count, SIDE, SIDE, generator=generator)
    x[torch.arange(count)[:, None, None], top, left] += strength * font[digits]
    return x.flatten(1), digits


def network(seed: int, *, hidden: tuple[int, ...] = (64, 32)) -> nn.Module:
    """A plain network of linear layers and ReLU, Glorot's normal weights from `seed`, no biases."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (SIDE * SIDE, *hidden, 10)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        linear = nn.Linear(before, after, bias=False, device="meta")
        std = (2 / (before + after)) ** 0.5
        linear.weight = nn.Parameter(std * torch.randn(after, before, generator=generator))
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.inference_mode(False)
def trainer(
    *, steps: int = 300, rows: int = 64, count: int = 4000, rate: float = 5e-3, seed: int = 0
) -> Callable[[nn.Module, After | None], None]:
    """A function that trains a network in place with Adam, always on the same pictures in the same order."""
    if steps < 1:
        raise ValueError(f"steps must be a number above 0, not {steps}")
    x, digits = pictures(count, seed=2 * seed)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def train(model: nn.Module, after: After | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        model.requires_grad_(True)
        optimiser = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(steps):
            chosen = torch.randint(count, (rows,), generator=generator)
            loss = F.cross_entropy(model(x[chosen]), digits[chosen])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if after is not None:
                after(model)
        model.requires_grad_(False)

    return train


@torch.no_grad()
def accuracy(model: nn.Module, *, count: int = 4000, seed: int = 0) -> float:
    """The share of unseen pictures that are named right."""
    x, digits = pictures(count, seed=2 * seed + 1)
    return float((model(x).argmax(-1) == digits).double().mean())
