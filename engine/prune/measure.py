"""What pruning does to quality and to time: a curve over the share pruned, and products timed against each other.

No paper. `curve` takes any way of pruning and any measure of quality; `timed` asks whether the hardware cares: a dense
product, the same with most weights zero, and a truly smaller one.
Units: quality as its function gives it (perplexity: lower is better), seconds.
Errors: ValueError for no shares, sizes below 1, a share outside 0..1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import train
from engine.evaluate import perplexity, surprisal
from engine.hardware import MEASURING
from engine.model import Decoder
from engine.prune import check_share, zeros
from engine.recording import site, step, tap
from engine.timing import in_turns
from engine.toyland import Grammar

SHARE = site("prune.curve.share", "the share pruned that was asked for", low=0.0, high=1.0)
QUALITY = site("prune.curve.quality", "the measure of quality at that share", low=0.0)


@dataclass(frozen=True)
class Point:
    """One point of a curve: the share asked for, the share of weights really zero, parameters left, the quality."""

    share: float
    zeros: float
    parameters: int
    quality: float


def curve(
    prune: Callable[[float], nn.Module], shares: Sequence[float], quality: Callable[[nn.Module], float]
) -> list[Point]:
    """Prune at each share and measure; one step of the recording each.

    `prune` gives a pruned copy (`apply`, `cut`), so that each share starts from the whole model. Whoever records this
    should keep "prune.*": `quality` runs the whole model, and its attention is tapped too.
    """
    if not len(shares):
        raise ValueError("shares must hold one share at least, and is empty")
    for share in shares:
        check_share(share, name="share")
    points = []
    for share in shares:
        model = prune(share)
        count = sum(p.numel() for p in model.parameters())
        points.append(Point(share, zeros(model), count, quality(model)))
        tap(SHARE, share, "")
        tap(QUALITY, points[-1].quality, "")
        step(label=f"{share:.0%}")
    return points


def text_perplexity(ids: Tensor) -> Callable[[nn.Module], float]:
    """For `curve`: perplexity on the text ids [T] or [B, T]."""

    def quality(model: nn.Module) -> float:
        assert isinstance(model, Decoder)
        return perplexity(surprisal(model, ids))

    return quality


def toyland_perplexity(grammar: Grammar, *, rows: int = 16, length: int = 128) -> Callable[[nn.Module], float]:
    """For `curve`: perplexity on Toyland's test texts."""

    def quality(model: nn.Module) -> float:
        assert isinstance(model, Decoder)
        return train.measure(model, grammar, rows=rows, length=length)["perplexity"]

    return quality


@dataclass(frozen=True)
class Timing:
    """The fewest seconds of x times the weight: whole, with that share of it zero, and with as many rows cut off.

    The fewest, since whatever else a machine does only adds.
    """

    dense: float
    zeros: float
    smaller: float


def timed(
    *,
    out: int,
    width: int,
    rows: int,
    sparsity: float,
    tries: int = 30,
    seed: int = 0,
    where: torch.device | None = None,
) -> Timing:
    """Time three products of `rows` inputs with a weight [out, width], in turn, after a warm-up of three rounds."""
    for name, value in (("out", out), ("width", width), ("rows", rows), ("tries", tries)):
        if value < 1:
            raise ValueError(f"{name} must be a number above 0, not {value}")
    check_share(sparsity, name="sparsity")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    holes = weight.masked_fill(torch.rand(out, width, generator=generator) < sparsity, 0.0)
    few = weight[: max(1, round((1 - sparsity) * out))].clone()
    x = torch.randn(rows, width, generator=generator).to(where)
    with MEASURING:
        products = {
            name: functools.partial(F.linear, x, w.to(where))
            for name, w in (("dense", weight), ("zeros", holes), ("smaller", few))
        }
        times = in_turns(products, rounds=tries, where=x.device, warm_up=3, rotate=True)
    return Timing(**{name: min(took) for name, took in times.items()})
