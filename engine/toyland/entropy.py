"""Texts whose true probabilities are known: a story is a process that chooses nothing but visible words.

A process is a Python generator. It yields either a word that must come, or an offer: groups of words, each group
with its probability, shared evenly by its words; and it is sent the word that came. What it offers depends on the
words before and on nothing hidden, so an offer *is* the conditional distribution of the next word given the text:
no latent variable has to be summed over. The same process is driven three ways: `write` draws a text, `follow`
reads one and says what was possible at each place, `continuations` enumerates them all (the brute-force proof).

The surprisal of a word under the process, −ln p, is what the best possible reader pays for it (Shannon 1948,
section 6: cross-entropy is never below entropy). e to its mean over a text is that text's perplexity floor.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Offer = list[tuple[float, tuple[str, ...]]]
Process = Generator[str | Offer, str, Any]


class Answer(str):
    """A word that a question asks for: the text before says which one it must be."""

    __slots__ = ()


@dataclass(frozen=True)
class Text:
    """Words as a process wrote them, with what each cost in nats and whether it answers a question."""

    words: list[str]
    nats: list[float]
    answers: list[bool]


def offer(*groups: tuple[float, Sequence[str]]) -> Offer:
    """The groups that have words, their weights made to sum to 1. No word may stand in two groups."""
    kept = [(weight, tuple(words)) for weight, words in groups if words and weight > 0]
    total = sum(weight for weight, _ in kept)
    if not kept:
        raise ValueError("an offer needs a word at least")
    return [(weight / total, words) for weight, words in kept]


def any_of(words: Sequence[str]) -> Offer:
    """All words alike."""
    return offer((1.0, words))


def probability(said: str | Offer, word: str) -> float:
    """The probability that a process which yielded `said` goes on with `word`."""
    if isinstance(said, str):
        return float(said == word)
    return sum(weight / len(words) for weight, words in said if word in words)


def _draw(offered: Offer, u: float) -> tuple[str, float]:
    """The word at `u` (0 to 1) along the offer, and its surprisal: one random number a word."""
    i = 0
    while i + 1 < len(offered) and u >= offered[i][0]:
        u -= offered[i][0]
        i += 1
    weight, group = offered[i]
    return group[min(int(u / weight * len(group)), len(group) - 1)], math.log(len(group) / weight)


def write(process: Process, rng: random.Random, length: int) -> Text:
    """The first `length` words of a draw from `process`, or fewer if it ends."""
    if length < 1:
        raise ValueError(f"length must be a number of words above 0, not {length}")
    words: list[str] = []
    nats: list[float] = []
    answers: list[bool] = []
    said = next(process)
    while True:
        if isinstance(said, list):
            word, cost = _draw(said, rng.random())
            nats.append(cost)
        else:
            word = said
            nats.append(0.0)
        words.append(word)
        answers.append(type(said) is Answer)
        if len(words) == length:
            return Text(words, nats, answers)
        try:
            said = process.send(word)
        except StopIteration:
            return Text(words, nats, answers)


def follow(process: Process, words: Sequence[str]) -> Iterator[str | Offer]:
    """What the process yields before each of `words`, and once more after the last (unless it ends there).

    Raises ValueError at a word that the process would never write.
    """
    said = next(process)
    for i, word in enumerate(words):
        if not probability(said, word):
            expected = said if isinstance(said, str) else said[0][1][0]
            raise ValueError(f"Toyland never says {word!r} after {' '.join(words[max(0, i - 5) : i])!r}: "
                             f"{expected!r} would do")  # fmt: skip
        yield said
        try:
            said = process.send(word)
        except StopIteration:
            if i + 1 < len(words):
                raise ValueError(f"the text goes on after its end at word {i}") from None
            return
    yield said


def surprisal(process: Process, words: Sequence[str]) -> np.ndarray:
    """−ln p of each word given those before, in nats, float64 [words]."""
    offers = zip(follow(process, words), words, strict=False)
    return np.array([0.0 if isinstance(said, str) else -math.log(probability(said, word)) for said, word in offers])


def distributions(process: Process, words: Sequence[str], index: dict[str, int]) -> np.ndarray:
    """The true probability of every next word, float64 [words, vocabulary]: row t is what follows words[: t + 1].

    The same places as a model's logits, so that a model can be compared with the truth token by token.
    """
    rows = np.zeros((len(words), len(index)))
    for t, said in enumerate(follow(process, words)):
        groups = [(1.0, (said,))] if isinstance(said, str) else said
        for weight, group in groups if t else ():
            rows[t - 1, [index[word] for word in group]] += weight / len(group)
    return rows


def continuations(start: Callable[[], Process], length: int) -> Iterator[tuple[list[str], float]]:
    """Every text of `length` words (or fewer, where the process ends) with its probability. For tiny grammars."""

    def grow(words: list[str], p: float) -> Iterator[tuple[list[str], float]]:
        offers = list(follow(start(), words))
        if len(words) == length or len(offers) == len(words):
            yield words, p
            return
        said = offers[-1]
        options = [said] if isinstance(said, str) else [word for _, group in said for word in group]
        for word in options:
            yield from grow([*words, str(word)], p * probability(said, word))

    yield from grow([], 1.0)
