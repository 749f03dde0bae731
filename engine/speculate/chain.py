"""A chain of guesses: a small model says a few tokens, one pass of the big one checks them all.

"Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192), Algorithm 1; found at the same time in
"Accelerating Large Language Model Decoding with Speculative Sampling" (arXiv:2302.01318). Paper -> here: x_1 … x_gamma
= `draft.tokens`; q_i = `draft.laws[i]`; p_1 … p_(gamma+1) = `laws`; n accepted guesses = `verdict.accepted`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.caches import Cache
from engine.caches.full import Full
from engine.speculate import Dice, Draft, Drafter, Verdict, chance, in_a_row, law, rejected

if TYPE_CHECKING:
    from engine.model import Decoder


def verify(draft: Draft, laws: Tensor, *, dice: Dice) -> Verdict:
    """Check a chain: `laws` [1 + n, V] are what the target says after 0, 1 … n guesses."""
    if not draft.is_chain or len(laws) != len(draft) + 1:
        raise ValueError(f"a chain of {len(draft)} guesses needs {len(draft) + 1} laws, not {len(laws)}")
    for i, token in enumerate(draft.tokens):
        if not dice.accepts(chance(laws[i], token, draft.law_of(i))):
            rest = rejected(laws[i], token, draft.law_of(i))
            return Verdict(list(range(i)), [i], dice.draw(rest), rest)
    return Verdict(list(range(len(draft))), [], dice.draw(laws[-1]), laws[-1])


class Chain(Drafter):
    """`length` tokens by a small model with a cache of its own. Its ids must be those of the target."""

    def __init__(self, model: Decoder, *, length: int) -> None:
        if length < 1:
            raise ValueError(f"length must be a number of drafted tokens above 0, not {length}")
        self.model, self.length = model, length
        self.cache = Full()

    def draft(self, text: Sequence[int], *, room: int, temperature: float, dice: Dice) -> Draft:
        tokens: list[int] = []
        laws: list[Tensor | None] = []
        with guessing(self.cache, len(text)):
            logits = catch_up(self.model, self.cache, text)
            while len(tokens) < min(self.length, room):
                if tokens:
                    logits = read(self.model, tokens[-1:], self.cache)[0]
                q = law(logits, temperature=temperature) if temperature else None
                tokens.append(int(logits.max(-1).indices) if q is None else dice.draw(q))
                laws.append(q)
        return in_a_row(tokens, laws)


class guessing:
    """What the small model reads inside is forgotten at the end: only the text itself stays in its cache.

    The accepted guesses are read again with the next draft's first pass: some rows more in a pass that costs what its
    weights cost to read. So no draft depends on what became of the last one.
    """

    def __init__(self, cache: Cache, length: int) -> None:
        self.cache, self.length = cache, length

    def __enter__(self) -> None:
        if self.cache.seen >= self.length:
            raise ValueError(f"the drafter has read {self.cache.seen} tokens, and the text has only {self.length}")

    def __exit__(self, *error: object) -> None:
        if self.cache.seen > self.length:
            self.cache.crop(self.length)


def catch_up(model: Decoder, cache: Cache, text: Sequence[int]) -> Tensor:
    """Read what is new in `text`; the logits [V] after it."""
    return read(model, text[cache.seen :], cache)[-1]


def read(model: Decoder, tokens: Sequence[int], cache: Cache, *, last: int = 1) -> Tensor:
    """The logits [last, V] after the last of these tokens."""
    ids = torch.tensor([list(tokens)], device=model.embed.weight.device)
    return model.logits(model.hidden(ids, cache=cache)[0, -last:])
