"""What lesson speculate lets guess and check: who guesses for whom, a tree that a learner draws, round after round."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import checkpoints
from engine.caches.full import Full
from engine.generate import MULTIPLICATIONS, ROWS, generate
from engine.packed import pack
from engine.recording import record
from engine.speculate import ROOT, Dice, Draft, Drafter, Verdict, law, sure_of
from engine.speculate import draft as shipped
from engine.speculate.adaptive import LENGTH, Adaptive
from engine.speculate.bild import DISTANCE, big_little
from engine.speculate.chain import Chain
from engine.speculate.feature import Feature, FeatureDraft
from engine.speculate.lookup import Lookup, follow
from engine.speculate.loop import (
    ACCEPTED,
    DRAFT_SECONDS,
    GIVEN,
    NODE_Q,
    NODES,
    OUTCOME,
    PARENTS,
    REJECTED,
    TARGET_SECONDS,
    speculate,
)
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


def as_row(ids: Sequence[int], model: Any) -> Tensor:
    """Ids as the model reads them."""
    return torch.tensor([list(ids)], device=model.embed.weight.device)


# --- round after round -----------------------------------------------------------------------------------------


class Watched(Drafter):
    """Hands on what another drafter guesses, and remembers it, the verdict and the target's rows."""

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.drafted, self.verdict, self.hidden = Draft(), None, torch.empty(0)

    def draft(self, text: Sequence[int], *, room: int, temperature: float, dice: Dice) -> Draft:
        return self.inner.draft(text, room=room, temperature=temperature, dice=dice)

    def told(self, draft: Draft, verdict: Verdict, hidden: Tensor) -> None:
        self.drafted, self.verdict, self.hidden = draft, verdict, hidden
        self.inner.told(draft, verdict, hidden)


@dataclass(frozen=True)
class Round:
    """One pass of the target: what was guessed, what came of it, and what it took."""

    draft: Draft
    verdict: Verdict
    p: list[float]
    q: list[float]
    new: list[int]
    seconds: float
    draft_seconds: float
    asked: float  # tokens that an adaptive drafter was asked for
    flops: float
    rows: int


KEEP = (NODES, PARENTS, OUTCOME, NODE_Q, GIVEN, ROWS, MULTIPLICATIONS, DRAFT_SECONDS, TARGET_SECONDS, LENGTH, DISTANCE)


def rounds(
    pair: Pair, ids: list[int], *, steps: int, guesser: Drafter, temperature: float, seed: int
) -> Iterator[Round]:
    """Guess and check, a round at a time."""
    watch = Watched(guesser)
    told = speculate(pair.target, ids, steps=steps, drafter=watch, temperature=temperature, seed=seed)
    left = steps
    while left:
        with record(keep={name: {} for name in KEEP}) as recorder:
            new = [next(told)]
        seen = {t.name: t.latest() for t in recorder.freeze().tracks}
        new += [next(told) for _ in range(int(seen[GIVEN]) - 1)]
        left -= len(new)
        draft, verdict = watch.drafted, watch.verdict
        assert verdict is not None  # the loop tells after every pass
        with torch.inference_mode():
            natural = law(
                pair.target.logits(watch.hidden[-1 - len(verdict.accepted) :]), temperature=temperature or 1.0
            )
        rows = {ROOT: 0} | {node: 1 + i for i, node in enumerate(verdict.accepted)}
        p = [
            float(natural[rows[parent], token]) if parent in rows else float("nan")
            for parent, token in zip(draft.parents, draft.tokens, strict=True)
        ]
        q = [0.0] * len(draft) if not temperature or not len(draft) else seen[NODE_Q].tolist()
        parts, count = seen[MULTIPLICATIONS], int(seen[ROWS])
        yield Round(
            draft, verdict, p, q, new,
            float(seen[DRAFT_SECONDS] + seen[TARGET_SECONDS]), float(seen[DRAFT_SECONDS]),
            float(seen.get(LENGTH, np.float32("nan"))),
            2 * float(parts.sum() + len(draft) * parts[-1]), count,  # a check needs the logits of all its rows
        )  # fmt: skip


def little_rounds(
    pair: Pair, ids: list[int], *, steps: int, fallback: float, rollback: float, most: int
) -> Iterator[Round]:
    """The big little decoder, a pass of the big model at a time. Its words are not the target's."""
    told = big_little(pair.target, pair.small, ids, steps=steps, fallback=fallback, rollback=rollback, most=most)
    left = steps
    while left:
        with record(keep={name: {} for name in KEEP}) as recorder:
            new = [next(told)]
        seen = {t.name: t.latest() for t in recorder.freeze().tracks}
        new += [next(told) for _ in range(int(seen[GIVEN]) - 1)]
        left -= len(new)
        words = seen.get(NODES, np.zeros(0, np.int32)).tolist()
        outcome = seen.get(OUTCOME, np.zeros(0, np.int8))
        draft = Draft(tuple(range(ROOT, len(words) - 1)), tuple(words))
        kept = [int(i) for i in np.flatnonzero(outcome == ACCEPTED)]
        gone = [int(i) for i in np.flatnonzero(outcome == REJECTED)]
        p = np.exp(-seen.get(DISTANCE, np.zeros(0, np.float32))).tolist()
        yield Round(
            draft, Verdict(kept, gone, new[-1], torch.empty(0)), p, [0.0] * len(words), new,
            float(seen[DRAFT_SECONDS] + seen[TARGET_SECONDS]), float(seen[DRAFT_SECONDS]),
            float("nan"), 0.0, 1 + len(words),
        )  # fmt: skip


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


# --- one place, and all lengths --------------------------------------------------------------------------------


def laws_at(
    pair: Pair, ids: list[int], places: Sequence[int], *, temperature: float
) -> tuple[Tensor, Tensor, list[bool]]:
    """p and q [place, V] of the tokens at these places, given those before, and where there was a guess at all."""
    before = torch.tensor([place - 1 for place in places])
    with torch.inference_mode():
        hidden = pair.target.hidden(as_row(ids, pair.target))[0]
        p = law(pair.target.logits(hidden[before.to(hidden.device)]), temperature=temperature)
        if pair.small is None:
            guesses = [follow(ids[:place], longest=3, length=1)[0] for place in places]
            rows = [sure_of(guess[0], p.shape[1]) if guess else torch.zeros(p.shape[1]).double() for guess in guesses]
            return p, torch.stack(rows), [bool(guess) for guess in guesses]
        if isinstance(pair.small, Feature):
            # The feature of token t, foretold from that of t - 1 and the token t itself.
            own = pair.small(hidden[None, :-1], as_row(ids[1:], pair.target))[0]
            few = law(pair.small.logits(own[(before - 1).to(own.device)]), temperature=temperature)
            q = torch.zeros_like(p).index_copy_(1, pair.small.words.cpu(), few)
        else:
            said = pair.small.hidden(as_row(ids, pair.small))[0]
            q = law(pair.small.logits(said[before.to(said.device)]), temperature=temperature)
    return p, q, [True] * len(places)
