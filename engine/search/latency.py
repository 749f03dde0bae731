"""How long a subnet takes on this machine: timed for a few, foretold for all the others.

Once-for-all (Cai et al. 2020, arXiv:1908.09791) looks latencies up in a table measured on the target device, and
ProxylessNAS (arXiv:1812.00332) adds them up over operators. Here a sum with four unknowns is fitted to real timings of
some subnets, and what it foretells is compared with timings that it has not seen.

    ms ≈ base + layer · layers + head · Σ heads + neuron · Σ ffn_width

None of the four falls below zero, so that a larger subnet is never foretold to be faster.
Errors: ValueError for too few timings, or any that is not a positive number.
Deviations: whole subnets are timed, not single operators, so the sum also holds what happens between them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from engine.model import Decoder, Shape
from engine.recording import site, tap
from engine.search.supernet import Subnet, extract
from engine.timing import in_turns

PREDICTED = site("search.latency.predicted", "time that the fitted sum foretells", low=0.0, unit="ms")
MEASURED = site("search.latency.measured", "shortest time of the extracted subnet on this machine", low=0.0, unit="ms")


@dataclass(frozen=True)
class Predictor:
    """Milliseconds of a subnet, as a sum over what it has."""

    base: float
    layer: float
    head: float
    neuron: float

    def __call__(self, subnet: Subnet) -> float:
        weights = (self.base, self.layer, self.head, self.neuron)
        return sum(weight * count for weight, count in zip(weights, _counts(subnet), strict=True))


def fit(subnets: Sequence[Subnet], ms: Sequence[float]) -> Predictor:
    """The sum nearest to these timings: least squares over all ways to leave terms out that gives none below zero."""
    if len(subnets) != len(ms) or len(ms) < 4:
        raise ValueError(f"subnets and ms must be as many, four at least, not {len(subnets)} and {len(ms)}")
    if not all(0 < value < float("inf") for value in ms):
        raise ValueError(f"ms must be numbers above 0, not {list(ms)}")
    x = torch.tensor([_counts(subnet) for subnet in subnets], dtype=torch.float64)  # N 4
    y = torch.tensor(list(ms), dtype=torch.float64)  # N
    nearest, best = (0.0,) * 4, float("inf")
    for count in range(1, 5):
        for terms in combinations(range(4), count):
            solved = torch.linalg.lstsq(x[:, terms], y[:, None], driver="gelsd").solution[:, 0]
            error = float((x[:, terms] @ solved - y).square().sum())
            if float(solved.min()) >= 0 and error < best - 1e-12:
                weights = dict(zip(terms, solved.tolist(), strict=True))
                nearest, best = tuple(weights.get(i, 0.0) for i in range(4)), error
    return Predictor(*nearest)


def timings(model: Decoder, subnets: Sequence[Subnet], ids: Tensor, *, repeats: int = 7) -> list[float]:
    """The fewest milliseconds of `repeats` that each subnet, extracted, needs to read ids [B, T].

    Whatever else the machine does only adds time, so the shortest tells most about the subnet.
    """
    return [min(ms) for ms in zip(*laps(model, subnets, ids, repeats=repeats), strict=True)]


def laps(model: Decoder, subnets: Sequence[Subnet], ids: Tensor, *, repeats: int) -> Iterator[list[float]]:
    """The milliseconds of each subnet, extracted, lap by lap: for who looks on while they are timed.

    Subnets take turns, so that a machine that slows down for a while slows down all of them. One lap before warms up.
    """
    if repeats < 1 or not subnets:
        raise ValueError(f"repeats must be 1 or more and subnets not empty, not {repeats} and {len(subnets)}")
    models = [extract(model, subnet).eval() for subnet in subnets]
    where = model.embed.weight.device
    ids = ids.to(where)
    works = {str(i): functools.partial(_read, made, ids) for i, made in enumerate(models)}
    return (
        [1000 * taken for (taken,) in in_turns(works, rounds=1, where=where, warm_up=int(lap == 0)).values()]
        for lap in range(repeats)
    )


@torch.no_grad()
def _read(model: Decoder, ids: Tensor) -> None:
    model(ids)


def compare(predictor: Predictor, subnets: Sequence[Subnet], ms: Sequence[float]) -> float:
    """The rank correlation of what is foretold for these subnets with what was measured."""
    foretold = tap(PREDICTED, torch.tensor([predictor(subnet) for subnet in subnets], dtype=torch.float64), "subnet")
    measured = tap(MEASURED, torch.tensor(list(ms), dtype=torch.float64), "subnet")
    return rank_correlation(foretold, measured)


def rank_correlation(a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing the mean of theirs."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.dim() != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(f"a and b must be as long, two at least, not of shapes {list(a.shape)} and {list(b.shape)}")
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks -= ranks.mean(1, keepdim=True)
    lengths = ranks.norm(dim=1)
    if not float(lengths.min()) > 0:
        raise ValueError("a and b must each hold two different values, for a correlation")
    return float((ranks[0] @ ranks[1]) / lengths.prod())


def parameters(shape: Shape, subnet: Subnet) -> int:
    """How many weights the extracted subnet has."""
    W, D, group = shape.width, shape.head_width, shape.heads // shape.kv_heads
    products = 3 if shape.activation == "swiglu" else 2
    total = W + (1 if shape.tied else 2) * shape.vocab * W
    for heads, width in zip(subnet.heads, subnet.ffn_width, strict=True):
        total += 2 * W + (2 * heads + 2 * (heads // group)) * D * W + products * width * W
    return total


def _counts(subnet: Subnet) -> tuple[int, int, int, int]:
    return 1, subnet.layers, sum(subnet.heads), sum(subnet.ffn_width)


def _ranks(x: Tensor) -> Tensor:
    less = (x[None] < x[:, None]).sum(1)
    same = (x[None] == x[:, None]).sum(1)
    return less + (same + 1).double() / 2
