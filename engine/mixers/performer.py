"""FAVOR+: random features whose products are, on average, the softmax kernel, so that linear attention can stand in
for softmax attention.

"Rethinking Attention with Performers" (arXiv:2009.14794): lemma 1 and section 2.3 (positive and trigonometric
features), section 2.4 (orthogonal ones), lemma 2 (their errors), appendix B.1 (causal prefix sums: linear.py).
Paper -> here: SM(x, y) = exp(xᵀy) = `softmax_kernel`, omega = rows of `omega`, m or r = count, h and f = inside `phi`.
The keys and queries of attention go in divided by D^(1/4), so that the kernel is exp(q·k / sqrt(D)).

Shapes: x [..., D], omega [m, D], features [..., m] (positive) or [..., 2m] (trigonometric: cosines, then sines).
Deviations: one draw of omega serves for good, the paper redraws it during training. The reference code adds 1e-4 to
every feature and subtracts a maximum over all keys, which biases it and shows a token its future: here positive
features have a floor of 1e-30, so that no sum is 0, and only queries are rescaled, where the division cancels it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.mixers.linear import LinearAttention
from engine.mixers.state import at_least
from engine.recording import site, tap

if TYPE_CHECKING:
    from engine.model import Shape

ESTIMATE = site("performer.estimate", "the softmax kernel as the first m features see it", symbol="φ(q)·φ(k)",
                grows="features")  # fmt: skip
EXACT = site("performer.kernel", "the softmax kernel itself", symbol="exp(q·k/√d)", low=0.0)

FLOOR = 1e-30


def gaussian_omega(count: int, width: int, *, seed: int) -> Tensor:
    """Independent directions: `count` rows of N(0, I), float64 [m, D]."""
    at_least("count", count, 1)
    at_least("width", width, 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, dtype=torch.float64, device="cpu", generator=generator)


def orthogonal_omega(count: int, width: int, *, seed: int) -> Tensor:
    """Section 2.4: rows orthogonal within each block of `width`, each still N(0, I) by itself, float64 [m, D].

    The directions of a block are those of a random rotation; each row gets the length of a Gaussian row, so the
    estimate stays unbiased.
    """
    lengths = gaussian_omega(count, width, seed=seed).norm(dim=-1, keepdim=True)  # m 1
    generator = torch.Generator().manual_seed(seed + 2**31)
    blocks = []
    for _ in range(0, count, width):
        square = torch.randn(width, width, dtype=torch.float64, device="cpu", generator=generator)
        rotation, upper = torch.linalg.qr(square)
        blocks.append(rotation.mT * upper.diagonal().sign()[:, None])  # the signs make every rotation equally likely
    return torch.cat(blocks)[:count] * lengths


def positive_features(x: Tensor, omega: Tensor, *, free_scale: bool = False) -> Tensor:
    """Lemma 1: phi(x) = exp(omega x - |x|²/2) / sqrt(m), positive. E[phi(x)·phi(y)] = exp(x·y).

    With `free_scale` each row is divided by its largest feature, for callers that divide by the sum anyway.
    """
    check_width(x, omega)
    logs = x @ omega.mT - x.square().sum(-1, keepdim=True) / 2  # ... m
    if free_scale:
        logs = logs - logs.amax(-1, keepdim=True).detach()
    return logs.exp().clamp(min=FLOOR) / omega.shape[0] ** 0.5


def trigonometric_features(x: Tensor, omega: Tensor, *, free_scale: bool = False) -> Tensor:
    """phi(x) = exp(|x|²/2) (cos omega x, sin omega x) / sqrt(m): unbiased too, but of either sign.

    With `free_scale` the first factor, the same for a whole row, is left out.
    """
    check_width(x, omega)
    angles = x @ omega.mT
    waves = torch.cat((angles.cos(), angles.sin()), -1) / omega.shape[0] ** 0.5  # ... 2m
    return waves if free_scale else waves * (x.square().sum(-1, keepdim=True) / 2).exp()


def softmax_kernel(x: Tensor, y: Tensor) -> Tensor:
    """SM(x, y) = exp(x·y) for every pair of rows: [..., T, S]."""
    return (x @ y.mT).exp()


def positive_error(x: Tensor, y: Tensor, *, count: int) -> Tensor:
    """Lemma 2: the mean squared error of the positive estimate with `count` independent features, [...]."""
    plus = (x + y).square().sum(-1)
    return plus.exp() * (2 * (x * y).sum(-1)).exp() * (1 - (-plus).exp()) / count


def trigonometric_error(x: Tensor, y: Tensor, *, count: int) -> Tensor:
    """Lemma 2: the mean squared error of the trigonometric estimate with `count` independent features, [...].

    Where the kernel is near 0 (x = -y) the positive error vanishes with it, and this one grows.
    """
    plus, minus = (x + y).square().sum(-1), (x - y).square().sum(-1)
    return plus.exp() * (-2 * (x * y).sum(-1)).exp() * (1 - (-minus).exp()).square() / (2 * count)


def running_estimates(q: Tensor, k: Tensor, omega: Tensor, *, features: Callable[..., Tensor]) -> Tensor:
    """The estimates of exp(q·k) by the first 1, 2, … m features: [m, T, S], for q [T, D] and k [S, D].

    Taps them feature by feature, and the kernel they approach.
    """
    m = omega.shape[0]
    phi_q, phi_k = features(q, omega), features(k, omega)  # T m or 2m, S m or 2m
    products = phi_q.mT[:, :, None] * phi_k.mT[:, None, :] * m  # m or 2m, T S
    products = products.view(-1, m, *products.shape[1:]).sum(0)  # a cosine and its sine are one feature
    counts = torch.arange(1, m + 1, dtype=q.dtype, device=q.device)
    tap(EXACT, softmax_kernel(q, k), "query key")
    return tap(ESTIMATE, products.cumsum(0) / counts[:, None, None], "features query key")


def check_width(x: Tensor, omega: Tensor) -> None:
    if omega.dim() != 2 or not omega.shape[0] or x.shape[-1] != omega.shape[1]:
        raise ValueError(f"omega must have shape [features, {x.shape[-1]}] to fit x, not {list(omega.shape)}")


class Favor(nn.Module):
    """The feature map of attention: x [..., D] -> features, with one seeded draw of `count` directions."""

    omega: Tensor

    def __init__(
        self,
        width: int,
        *,
        count: int,
        seed: int,
        orthogonal: bool = True,
        features: Callable[..., Tensor] = positive_features,
    ) -> None:
        super().__init__()
        draw = orthogonal_omega if orthogonal else gaussian_omega
        self.features = features
        self.register_buffer("omega", draw(count, width, seed=seed).to(torch.get_default_dtype()))

    def forward(self, x: Tensor, *, query: bool = False) -> Tensor:
        return self.features(x * x.shape[-1] ** -0.25, self.omega.to(x.dtype), free_scale=query)


def performer(
    shape: Shape,
    layer: int,
    *,
    count: int,
    seed: int = 0,
    orthogonal: bool = True,
    features: Callable[..., Tensor] = positive_features,
    chunk: int = 64,
) -> LinearAttention:
    """The mixer of one layer: linear attention whose feature map is FAVOR+ with `count` random features."""
    favor = Favor(shape.head_width, count=count, seed=seed * 1000 + layer, orthogonal=orthogonal, features=features)
    return LinearAttention(shape, layer, features=favor, chunk=chunk)
