"""Asking several models the same questions, one after the other: how much each has found so far, and what it holds.

Shared by lessons that compare memories: a code told long ago (windows), one pair of many (linear, ssm).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine import checkpoints
from engine.caches.full import Full
from engine.evaluate import Question, ask, passkey
from engine.mixers.state import state_bytes
from engine.probing import asked_together
from engine.recording import note, site, tap
from engine.toyland import Grammar
from engine.toyland.questions import pairs_question, passkey_question

BEFORE = 2  # sentences of filler before a code
PAIRS = (3, 4, 6, 8, 12, 16, 24, 32)
ASKED = 16  # questions for each number of pairs

FOUND = site("recall.found", "share of pairs recalled", low=0.0, high=1.0)
TOLD = site("recall.pairs", "pairs told before one is asked for")


@dataclass(frozen=True)
class Standing:
    """One model after so many questions."""

    right: float  # share of answers that were right
    held: int  # bytes of keys, values and states after the last question, from the tensors
    said: str  # its last answer


def code(tokenizer: Any, *, toy: bool, tokens: int, seed: int) -> Question:
    """A code near the start of about so many tokens, asked for at the end."""
    if not toy:
        return passkey(tokenizer, tokens=tokens, depth=0.1, seed=seed)
    grammar = Grammar()
    shortest = len(tokenizer.prompt(passkey_question(grammar, before=BEFORE, after=0, seed=seed).prompt))
    return passkey_question(grammar, before=BEFORE, after=max(0, tokens - 4 - shortest) // 6, seed=seed)


def one_pair(count: int, *, seed: int, grammar: Grammar | None = None) -> Question:
    """Which value belongs to one key among `count` pairs, each told once."""
    return pairs_question(grammar or Grammar(), pairs=count, seed=seed)


def standings(
    models: Mapping[str, Any], tokenizer: Any, questions: Iterable[Question]
) -> Iterator[dict[str, Standing]]:
    """After each question, where every model stands. Each reads it with a new cache."""
    right = dict.fromkeys(models, 0)
    for count, question in enumerate(questions, 1):
        now = {}
        for name, model in models.items():
            cache = Full()
            answer = ask(model, tokenizer, question, cache=cache)
            right[name] += answer.right
            now[name] = Standing(right[name] / count, cache.nbytes + state_bytes(cache.states), answer.text.strip())
        yield now


def here(names: Iterable[str]) -> dict[str, Any]:
    """Those models of the zoo that are trained and shipped, by name."""
    return {name: checkpoints.load(name)[0] for name in names if checkpoints.available(name)[0]}


def asked_for_pairs(models: Mapping[str, Any], tokenizer: Any, count: int, *, questions: int) -> dict[str, float]:
    """The share of questions that each model answers right, one pair of `count` a question."""
    made = [one_pair(count, seed=1000 * count + n) for n in range(questions)]
    return {name: sum(asked_together(model, tokenizer, made)) / questions for name, model in models.items()}


def recall_points(names: Iterable[str], tokenizer: Any, *, questions: int = ASKED) -> Iterator[None]:
    """A point a turn: how many pairs were told, and the share that each model of the zoo gives back.

    A model that is not here (yet) has one point that is no number, so that its line is empty. Notes who was asked.
    """
    names = list(names)
    models = here(names)
    note(recalled=list(models), asked=questions)
    for name in names:
        if name not in models:
            tap(FOUND, float("nan"), "", model=name)
    for count in PAIRS:
        tap(TOLD, float(count), "")
        for name, right in asked_for_pairs(models, tokenizer, count, questions=questions).items():
            tap(FOUND, right, "", model=name)
        yield
