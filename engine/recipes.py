"""What a recipe is: all that a model's training follows from. The recipes themselves are in `engine.zoo`.

Weights, texts and their order follow from the seed. Models read the same texts, so that what differs between two of
them is what their recipes say. Texts grow longer from stage to stage, because a model finds out how to look things up
much sooner in short texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from engine.model import Decoder
from engine.toyland import Batch, Grammar, batch


@dataclass(frozen=True)
class Stage:
    """So many steps, each on so many texts of so many tokens, written by `grammar`."""

    steps: int
    rows: int
    length: int
    grammar: Grammar = field(default_factory=Grammar)

    def __post_init__(self) -> None:
        for name, value, low in (("steps", self.steps, 1), ("rows", self.rows, 1), ("length", self.length, 2)):
            if value < low:
                raise ValueError(f"{name} of a stage must be at least {low}, not {value}")


# First nothing but lists and songs: in them, looking up what followed a word pays at once.
DRILL = Grammar(home=0.0, few=0.6, many=0.0, song=0.4, secret=0.0)


def surprise(model: Decoder, ids: Tensor, at: int) -> Tensor:
    """Mean nats of each token of ids [B, T] given those before: what a model is trained to lower, at any step."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@dataclass(frozen=True)
class Recipe:
    """How one model of the zoo is made. `make(seed)` builds it untrained, `about` says what it is for.

    `loss(model, ids, step)` is what a step lowers: a supernet trains several of its subnets at once. `start` names the
    model of the zoo whose weights it goes on from, instead of beginning anew.
    """

    make: Callable[[int], Decoder]
    about: str
    stages: tuple[Stage, ...] = (
        Stage(500, 16, 64, DRILL),
        Stage(1300, 16, 64),
        Stage(800, 16, 128),
        Stage(1400, 16, 192),
    )
    rate: float = 1.5e-3
    warmup: int = 100
    decay: float = 0.1
    seed: int = 0
    grammar: Grammar = field(default_factory=Grammar)
    loss: Callable[[Decoder, Tensor, int], Tensor] = surprise
    start: str = ""

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def text(self, at: int) -> Batch:
        """The texts of step `at`: a function of the seed and the step alone, so that any step can be done again."""
        left = at
        for stage in self.stages:
            if left < stage.steps:
                return batch(stage.grammar, seed=self.seed, step=at, rows=stage.rows, length=stage.length)
            left -= stage.steps
        raise ValueError(f"step must be below {self.steps}, not {at}")

    def rate_at(self, at: int) -> float:
        """The learning rate of step `at`: straight up, then a cosine down to nothing."""
        up = min(1.0, (at + 1) / self.warmup)
        return self.rate * up * (0.5 + 0.5 * math.cos(math.pi * at / self.steps))
