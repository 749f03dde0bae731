"""K-means quantisation: a codebook of 2^bits values, each weight the number of its nearest.

Deep Compression (arXiv:1510.00149), section 3, equation 2; Lloyd's algorithm (IEEE Trans. Inf. Theory 28(2), 1982);
k-means++ (Arthur & Vassilvitskii, SODA 2007), algorithm 1.
Paper -> here: k = 2^bits; C = {c_1..c_k} = centroids; W = {w_1..w_n} = values; equation 2 = `distortion`.
Shapes: x any; each block (affine.py's granularities) has its codebook: centroids [blocks, k] rising, codes as x.
The arithmetic is in float64; the codebook is kept in the dtype of x.
Errors: ValueError for bits that leave more centroids than values, an unknown start, values empty or not finite.
Deviations: a centroid without values stays where it is (scikit-learn moves it to the farthest value); k-means++ draws
one candidate a centroid, as in the paper (scikit-learn: several); Deep Compression's fine-tuning is not part of this.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.quant import Recipe, check_bits, check_values
from engine.quant.affine import GRANULARITIES, Grid
from engine.recording import event, site, step, tap

CENTROIDS = site("kmeans.centroids", "the values of the codebook", symbol="c")
CODES = site("kmeans.codes", "the centroid nearest to each value", symbol="argmin|w-c|")
DISTORTION = site(
    "kmeans.distortion", "the sum of squared distances to the nearest centroid", symbol="Σ|w-c|²", low=0.0
)


@dataclass(frozen=True)
class Codebook:
    """Which centroid stands for each value, and how the centroids came to lie there."""

    codes: Tensor  # as x, int64
    centroids: Tensor  # blocks k, rising
    history: tuple[
        tuple[Tensor, float], ...
    ]  # (centroids [blocks, k] float64, distortion) before each step and at last
    grid: Grid
    converged: bool

    def reconstruct(self) -> Tensor:
        """The centroid of each value."""
        return self.centroids.gather(1, self.grid.blocks(self.codes)).view(self.codes.shape)

    @property
    def distortion(self) -> float:
        return self.history[-1][1]

    @property
    def storage_bits(self) -> int:
        """Bits of all codes and of every centroid in its dtype."""
        return self.codes.numel() * self.grid.bits + self.centroids.numel() * self.centroids.element_size() * 8


def kmeans(
    x: Tensor,
    *,
    bits: int,
    granularity: str = "tensor",
    group: int | None = None,
    start: str | Tensor = "linear",
    seed: int = 0,
    most_steps: int = 100,
) -> Codebook:
    """Lloyd's algorithm until no value changes its centroid, or for `most_steps`; a tap and a step for each.

    `start`: "linear" (evenly from the least to the largest value), "k-means++" (drawn from `seed`), or centroids.
    """
    check_bits(bits)
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}")
    if most_steps < 1:
        raise ValueError(f"most_steps must be a number above 0, not {most_steps}")
    check_values(x)
    grid = Grid(bits, symmetric=False, granularity=granularity, group=group)
    blocks = grid.blocks(x.detach()).double()  # blocks values
    if 2**bits > blocks.shape[1]:
        raise ValueError(
            f"bits must leave no more centroids than the {blocks.shape[1]} values of a block; {bits} bits are {2**bits}"
        )
    centroids = _start(blocks, 2**bits, start, seed)  # blocks k
    codes, history, converged = nearest(blocks, centroids), [], False
    for _ in range(most_steps):
        history.append((centroids, _show(blocks, codes, centroids, x)))
        step(label="k-means")
        centroids = means(blocks, codes, centroids)
        before, codes = codes, nearest(blocks, centroids)
        if converged := bool((before == codes).all()):
            break
    history.append((centroids, _show(blocks, codes, centroids, x)))
    event("kmeans.end", steps=len(history) - 1, converged=converged)
    return Codebook(codes.view(x.shape), centroids.to(x.dtype), tuple(history), grid, converged)


def recipe(*, bits: int, sample: int = 65_536, most_steps: int = 20) -> Recipe:
    """For `quantised`: every linear layer with a codebook of its own, found on every n-th of its weights so that at
    most `sample` take part in the search; all of them snap to it."""
    if sample < 2**bits:
        raise ValueError(f"sample must be at least the {2**bits} centroids of {bits} bits, not {sample}")

    def snapped(name: str, linear: nn.Linear) -> nn.Module:
        weight = linear.weight.detach()
        every = -(-weight.numel() // sample)
        book = kmeans(weight.flatten()[::every], bits=bits, most_steps=most_steps).centroids  # 1 k
        codes = nearest(weight.reshape(1, -1), book)
        twin = copy.copy(linear)
        twin._parameters = dict(linear._parameters)
        twin.weight = nn.Parameter(book.gather(1, codes).view_as(weight), requires_grad=False)
        return twin

    return snapped


def nearest(blocks: Tensor, centroids: Tensor) -> Tensor:
    """The number of the nearest centroid of each value; on a tie the lower one. In one dimension the border between
    two neighbours is their midpoint, so a value's number is how many borders it has passed."""
    borders = (centroids[:, 1:] + centroids[:, :-1]) / 2
    return torch.searchsorted(borders.contiguous(), blocks.contiguous())


def means(blocks: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """The mean of the values of each centroid; a centroid without values stays. Their order never changes."""
    count = torch.zeros_like(centroids).scatter_add_(1, codes, torch.ones_like(blocks))
    total = torch.zeros_like(centroids).scatter_add_(1, codes, blocks)
    return torch.where(count > 0, total / count.clamp(min=1), centroids)


def distortion(blocks: Tensor, codes: Tensor, centroids: Tensor) -> float:
    """The sum over all values of the squared distance to their centroid."""
    return float((blocks - centroids.gather(1, codes)).square().sum())


def _start(blocks: Tensor, k: int, start: str | Tensor, seed: int) -> Tensor:
    if isinstance(start, Tensor):
        if start.shape not in ((k,), (blocks.shape[0], k)):
            raise ValueError(f"start must have shape [{k}] or [{blocks.shape[0]}, {k}], not {list(start.shape)}")
        check_values(start, name="start")
        return start.to(blocks).expand(blocks.shape[0], k).sort(1).values
    if start == "linear":
        low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        return low + (high - low) * torch.linspace(0, 1, k, dtype=blocks.dtype, device=blocks.device)
    if start == "k-means++":
        return _spread(blocks, k, seed)
    raise ValueError(f'start must be "linear", "k-means++" or centroids, not {start!r}')


def _spread(blocks: Tensor, k: int, seed: int) -> Tensor:
    """k-means++: each new centroid is a value drawn with the square of its distance to the nearest one so far."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.ones_like(blocks)
    chosen: list[Tensor] = []
    for _ in range(k):
        # A block all of whose values are centroids already has no distance left: any value will do.
        weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, 1.0)
        reach = weight.cumsum(1)  # drawing by the running sum takes blocks of any size
        aim = torch.rand(blocks.shape[0], 1, generator=generator, dtype=torch.float64).to(reach) * reach[:, -1:]
        pick = torch.searchsorted(reach, aim, right=True).clamp(max=blocks.shape[1] - 1)
        chosen.append(blocks.gather(1, pick))
        distance = (blocks - chosen[-1]).square()
        weight = distance if len(chosen) == 1 else torch.minimum(weight, distance)
    return torch.cat(chosen, 1).sort(1).values


def _show(blocks: Tensor, codes: Tensor, centroids: Tensor, x: Tensor) -> float:
    tap(CENTROIDS, centroids, "block centroid")
    tap(CODES, codes.view(-1, x.shape[-1] if x.dim() else 1).to(torch.int32), "row column")
    total = distortion(blocks, codes, centroids)
    tap(DISTORTION, torch.tensor([total]), "one")
    return total
