r"""Routers: from a token's logits over the experts to which of them it calls, and with what weight.

Switch (arXiv:2101.03961), section 2.1 and 2.2: the best expert alone, times its probability; capacity and the balance
loss. GShard (arXiv:2006.16668), section 2.2: two experts, first choices placed before second ones. Mixtral
(arXiv:2401.04088), section 2.1: softmax over the logits of the chosen k. Expert choice (arXiv:2202.09368), section 3.2:
each expert takes the tokens that want it most. ST-MoE (arXiv:2202.08906): the router z-loss.
Paper -> here: p(x) = probabilities; E or N experts = E, T tokens = N (the batch's, flattened); f_i, P_i of Switch =
the shares in `balance_loss`; expert capacity C = places; capacity factor = capacity.

    L_balance = E Σ_i f_i P_i        f_i: share of choices that fell on expert i, P_i: mean probability of i

It is 1 when choices and probabilities are even, at any k, because f sums to 1; references that let f sum to k
(`transformers`) have k there.
Deviations: no noise on the logits (GShard draws its second expert, Switch jitters the input), so that runs can be
repeated; GShard's groups are the whole batch.
Errors: ValueError for k outside 1..E, a capacity or tokens a choice not above 0, logits that are not [tokens, experts].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Who is called for whom: all [N, E] for N tokens and E experts.

    `chosen` is what was asked for, `sent` what found a place; the gate of a pair that is not sent is 0.
    """

    probabilities: Tensor  # N E, of all experts before any choice
    chosen: Tensor  # N E bool
    sent: Tensor  # N E bool
    gates: Tensor  # N E

    @property
    def dropped(self) -> Tensor:
        """Choices that found no place, bool [N, E]."""
        return self.chosen & ~self.sent

    @property
    def load(self) -> Tensor:
        """Tokens that asked for each expert, int64 [E]."""
        return self.chosen.sum(0)


class Router(Protocol):
    @property
    def per_token(self) -> float:
        """Experts that a token calls, on average."""

    def __call__(self, logits: Tensor) -> Routing: ...

    def check(self, experts: int) -> None:
        """Raises ValueError when there are too few experts for it."""


@dataclass(frozen=True)
class TopK:
    """Every token calls its k likeliest experts.

    With `renormalise` the gates of a token are a softmax over its chosen logits and sum to 1 (Mixtral, GShard);
    without, they are the probabilities themselves (Switch: with k=1 a gate of 1 would leave the router no gradient).
    With a `capacity` factor each expert has ceil(capacity · k · N / E) places; first choices take theirs before second
    ones, earlier tokens before later ones, and who finds none is dropped. Places then depend on all tokens of the
    pass, so that reading a text at once and word by word may differ; None drops nobody and is the same either way.
    """

    k: int = 2
    renormalise: bool = True
    capacity: float | None = None

    @property
    def per_token(self) -> float:
        return self.k

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be a number of experts above 0, not {self.k}")
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(f"capacity must be a factor above 0, or None for no limit, not {self.capacity}")

    def check(self, experts: int) -> None:
        if self.k > experts:
            raise ValueError(f"k must be at most the number of experts, {experts}, not {self.k}")

    def places(self, tokens: int, experts: int) -> int:
        """How many tokens an expert takes at most."""
        if self.capacity is None or math.isinf(self.capacity):
            return tokens
        return min(tokens, math.ceil(self.capacity * self.k * tokens / experts))

    def __call__(self, logits: Tensor) -> Routing:
        N, E = _sizes(logits)
        self.check(E)
        probabilities = logits.softmax(-1)  # N E
        best = logits.topk(self.k, -1)  # N k
        weights = best.values.softmax(-1) if self.renormalise else probabilities.gather(-1, best.indices)
        gates = torch.zeros_like(probabilities).scatter(-1, best.indices, weights.to(probabilities.dtype))
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, best.indices, True)
        places = self.places(N, E)
        if places >= N:
            return Routing(probabilities, chosen, chosen, gates)
        # One queue before each expert: all first choices in the order of the text, then all second ones.
        queue = F.one_hot(best.indices.T, E)  # k N E
        place = queue.flatten(0, 1).cumsum(0).view_as(queue)
        sent = ((queue > 0) & (place <= places)).any(0)  # N E
        return Routing(probabilities, chosen, sent, gates * sent)


@dataclass(frozen=True)
class ExpertChoice:
    """Every expert takes the tokens that are likeliest to want it: loads are even by construction.

    Each takes ceil(per_token · N / E) tokens (the paper's capacity factor c = per_token); a token may be called by
    many or by none. SEES THE FUTURE: whether a token is taken depends on the tokens after it, and on the other rows
    of the batch, so that a decoder trained so cheats, and cannot decode word by word as it was trained.
    """

    per_token: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.per_token < math.inf:
            raise ValueError(f"per_token must be a number of experts above 0, not {self.per_token}")

    def check(self, experts: int) -> None:
        if self.per_token > experts:
            raise ValueError(f"per_token must be at most the number of experts, {experts}, not {self.per_token}")

    def __call__(self, logits: Tensor) -> Routing:
        N, E = _sizes(logits)
        self.check(E)
        probabilities = logits.softmax(-1)  # N E
        taken = probabilities.topk(math.ceil(self.per_token * N / E), 0).indices  # C E
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(0, taken, True)
        return Routing(probabilities, chosen, chosen, probabilities * chosen)


def balance_loss(routing: Routing) -> Tensor:
    """E Σ f_i P_i, a scalar: 1 when even, E when all choices and all probability are on one expert.

    The gradient flows through P alone, for f is a count. Dropped choices count as chosen.
    """
    E = routing.probabilities.shape[1]
    load = routing.load.to(routing.probabilities.dtype)
    return E * (load / load.sum() * routing.probabilities.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """The mean squared logsumexp of logits [N, E]: keeps them small, and their softmax far from rounding."""
    return logits.logsumexp(-1).square().mean()


def _sizes(logits: Tensor) -> tuple[int, int]:
    if logits.dim() != 2 or not logits.numel():
        raise ValueError(f"logits must have shape [tokens, experts] with a value at least, not {list(logits.shape)}")
    return logits.shape[0], logits.shape[1]
