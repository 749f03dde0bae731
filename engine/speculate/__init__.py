"""Guess with something cheap, check with the model: what all ways of guessing share.

"Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192), section 2. Paper -> here: M_p = the
target and p = its law; M_q = the drafter and q = its law; norm(max(0, p - q)) = `residual`; E(min(p, q)) =
`acceptance`; gamma = how many tokens are drafted. Laws are vectors over the vocabulary, float64, on the CPU.

One rule serves chains and trees, drawn and given tokens: a guess x that came from q is accepted with probability
min(1, p(x) / q(x)), and when it is rejected the next guess is checked against the residual in place of p. What
comes out then has law p, whatever q is. A guess that was chosen and not drawn (the likeliest token, a word looked up)
came from the law that is sure of it, written q = None. Temperature bends p and q alike, and at 0 both are sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT = -1  # the parent of a guess that follows the text itself


def law(logits: Tensor, *, temperature: float) -> Tensor:
    """logits [..., V] -> the law that tokens are drawn from, in float64 on the CPU; at temperature 0 it is sure."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or a number above, not {temperature}")
    if temperature == 0.0:
        # max, because argmax is five times slower on the CPU in bfloat16
        sure = torch.zeros(logits.shape, dtype=torch.float64)
        return sure.scatter_(-1, logits.max(-1).indices.cpu()[..., None], 1.0)
    return (logits.double() / temperature).softmax(-1).cpu()


def sure_of(token: int, size: int) -> Tensor:
    """The law [V] of a token that was chosen and not drawn."""
    certain = torch.zeros(size, dtype=torch.float64)
    certain[token] = 1.0
    return certain


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """The chance that a token drawn from q is accepted: sum of min(p, q), which is 1 - TV(p, q)."""
    return torch.minimum(p, q).sum(-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What is left to draw from when a token of q was rejected: max(0, p - q), scaled to a law.

    Where p never exceeds q the two are equal up to rounding, nothing is ever rejected, and p itself is returned.
    """
    rest = (p - q).clamp_min(0.0)
    left = rest.sum(-1, keepdim=True)
    return torch.where(left > 0, rest / left.clamp_min(torch.finfo(p.dtype).tiny), p)


def chance(p: Tensor, token: int, q: Tensor | None) -> float:
    """The probability with which a guess is accepted: min(1, p / q) at that token."""
    given = 1.0 if q is None else float(q[token])
    if given <= 0.0:
        raise ValueError(f"token {token} was drafted, and its own q gives it probability {given}")
    return min(1.0, float(p[token]) / given)


def rejected(p: Tensor, token: int, q: Tensor | None) -> Tensor:
    """The law that takes the place of p once this guess was rejected."""
    return residual(p, sure_of(token, len(p)) if q is None else q)


def emitted(p: Tensor, tokens: Sequence[int], laws: Sequence[Tensor | None]) -> Tensor:
    """The law of the token that one position gives when these guesses, in this order, are checked there.

    Averaged over the guesses that a drafter may make it is p: that is what "lossless" means.
    """
    out, left = torch.zeros_like(p), 1.0
    for token, q in zip(tokens, laws, strict=True):
        accepted = chance(p, token, q)
        out[token] += left * accepted
        left *= 1.0 - accepted
        if left <= 0.0:
            return out
        p = rejected(p, token, q)
    return out + left * p


class Dice:
    """All that is left to chance, from one seed. A test puts its own in its place and goes through every outcome."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def accepts(self, probability: float) -> bool:
        """True with this probability."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator)) < probability

    def draw(self, p: Tensor) -> int:
        """A token by its law [V]."""
        upto = p.cumsum(0)  # where a uniform number falls; eight times as fast as torch.multinomial
        at = torch.rand((), dtype=torch.float64, generator=self._generator) * upto[-1]
        at = torch.minimum(at, torch.nextafter(upto[-1], torch.zeros_like(at)))  # a rounded-up product is no token
        return int(torch.searchsorted(upto, at, right=True))


@dataclass(frozen=True)
class Draft:
    """Guesses that hang together as a tree: node i says `tokens[i]`, and comes after node `parents[i]`.

    A parent stands before its children, ROOT means the end of the text. Siblings are checked in their order, and
    `laws[i]` is what node i was drawn from *given* the siblings before it; None where it was chosen. Whoever edits a
    tree by hand gives parents and tokens alone: every guess is then a chosen one.
    """

    parents: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    laws: tuple[Tensor | None, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.tokens) or (self.laws is not None and len(self.laws) != len(self.tokens)):
            raise ValueError(f"a draft needs a parent for each token, not {len(self.parents)} for {len(self.tokens)}")
        for node, parent in enumerate(self.parents):
            if not ROOT <= parent < node:
                raise ValueError(f"the parent of node {node} must be {ROOT} or a node before it, not {parent}")
        said = list(zip(self.parents, self.tokens, strict=True))
        if self.laws is None and len(set(said)) < len(said):
            raise ValueError("two children of one parent are the same token, and the second can never be accepted")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(ROOT, len(self) - 1))

    @property
    def depths(self) -> list[int]:
        """How far each node is from the text, from 1 on."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def children(self, node: int) -> list[int]:
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def law_of(self, node: int) -> Tensor | None:
        return None if self.laws is None else self.laws[node]


def in_a_row(tokens: Sequence[int], laws: Sequence[Tensor | None] | None = None) -> Draft:
    """The draft in which each token follows the one before."""
    return Draft(tuple(range(ROOT, len(tokens) - 1)), tuple(tokens), None if laws is None else tuple(laws))


@dataclass(frozen=True)
class Verdict:
    """What one check came to: the accepted nodes in the order of the text, those rejected, and the token after them.

    `rest` is the law [V] that `token` was drawn from: p itself (`corrected` is False) or what rejections left of it.
    """

    accepted: list[int]
    rejected: list[int]
    token: int
    rest: Tensor

    @property
    def corrected(self) -> bool:
        """Whether the last token stands in for rejected guesses, rather than being one more."""
        return bool(self.rejected) and (not self.accepted or max(self.rejected) > self.accepted[-1])


class Drafter:
    """Makes guesses, and is told what came of them. One serves one text."""

    def draft(self, text: Sequence[int], *, room: int, temperature: float, dice: Dice) -> Draft:
        """Guesses of what follows `text`, at most `room` tokens deep; none at all if it has nothing to say."""
        raise NotImplementedError

    def told(self, draft: Draft, verdict: Verdict, hidden: Tensor) -> None:
        """What the target made of the last draft; `hidden` [n, W] are its rows of the tokens that it has newly read
        and keeps. Called after each pass of the target, the one that read the prompt included."""
