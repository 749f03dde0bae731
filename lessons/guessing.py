"""What lesson speculate lets guess and check: who guesses for whom, a tree that a learner draws, round after round."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

from engine import checkpoints
from engine.caches.full import Full
from engine.generate import generate
from engine.packed import pack
from engine.recording import record
from engine.speculate import Drafter
from engine.speculate import draft as shipped
from engine.speculate.adaptive import Adaptive
from engine.speculate.chain import Chain
from engine.speculate.feature import Feature, FeatureDraft
from engine.speculate.lookup import Lookup
from engine.speculate.tree import Tree
from engine.weights import ModelUnavailable
from lessons.models import REAL, TOY, load

SMALL, LOOKUP, BILD = "small", "lookup", "bild"


@dataclass(frozen=True)
class Pair:
    """A target, and who guesses for it. `missing` is a sentence where that is not whom the learner asked for."""

    target: Any
    tokenizer: Any
    small: Any  # a Decoder, a Feature, or None: then words are looked up
    toy: bool
    missing: str = ""

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return int(self.target.embed.weight.element_size())


@functools.lru_cache(maxsize=2)
def packed(model: Any) -> Any:
    """The quickest twin of a real model: whoever claims seconds compares with the best plain loop there is."""
    return pack(model)


@functools.lru_cache(maxsize=2)
def _draft_of(target: Any) -> Feature:
    return shipped.load(target)


def pair(name: str, guesser: str, *, dtype: str) -> Pair:
    """Target and guesser. Looks words up where the asked one is not on this machine, and says so."""
    model, tokenizer = load(name, dtype=dtype)
    if guesser == LOOKUP:
        return Pair(model if name == TOY else packed(model), tokenizer, None, name == TOY)
    if name == REAL:
        if guesser == BILD:
            raise ValueError("A big little decoder needs a small model that speaks alone; only Toyland has one here.")
        target = packed(model)
        try:
            return Pair(target, tokenizer, _draft_of(target), toy=False)
        except ModelUnavailable:
            return Pair(target, tokenizer, None, False, "SmolLM2’s small draft is not on this machine.")
    try:
        little = checkpoints.load("little", dtype=checkpoints.DTYPES[dtype])[0]
    except ModelUnavailable:
        return Pair(model, tokenizer, None, True, "The little toy is not on this machine.")
    return Pair(model, tokenizer, little, toy=True)


def widths_of(width: int, depth: int) -> tuple[int, ...]:
    """One sibling fewer at each depth: (3, 2, 1, 1)."""
    return tuple(max(1, width - d) for d in range(depth))


def drafter(pair: Pair, *, length: int, width: int = 1, adaptive: bool = False) -> Drafter:
    """A fresh guesser: a chain of `length`, or a tree that is `width` wide and as deep as that."""
    if pair.small is None:
        chain: Any = Lookup(length=length)
    elif width > 1 and not adaptive:
        wide = widths_of(width, length)
        if isinstance(pair.small, Feature):
            return FeatureDraft(pair.small, widths=wide)
        return Tree(pair.small, widths=wide)
    else:
        chain = (FeatureDraft if isinstance(pair.small, Feature) else Chain)(pair.small, length=length)
    return Adaptive(chain) if adaptive else chain


class Plain:
    """The plain loop beside it: as many words at a time as a round gave."""

    def __init__(self, pair: Pair, ids: list[int], *, steps: int, temperature: float, seed: int) -> None:
        self._said = generate(pair.target, ids, steps=steps, cache=Full(), temperature=temperature, seed=seed)

    def say(self, count: int) -> tuple[list[int], float]:
        """The next words, and the seconds that they took."""
        with record(keep={}):
            began = time.perf_counter()
            words = [next(self._said) for _ in range(count)]
            return words, time.perf_counter() - began
