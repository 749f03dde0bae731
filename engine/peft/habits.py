"""What to teach, as texts for any tokenizer: a way of speaking or a set of facts, with the floor that no reader beats.

The processes are Toyland's (engine/toyland/habits.py). For a model of plain English the same words are encoded one by
one, a space before each, as byte-level BPE splits text anyway; a word's surprisal stands at its first token, so that
the mean over a text is exact but for a word that the end of the text cuts.

    habit = speaking(Grammar(), "pirate")
    batch = habit.batch(tokenizer, rows=16, length=48, seed=0, step=0)
    batch.ids, batch.floor, batch.answers                  # answers: the tokens that the habit is about

`refraining` is the same for sentences of real English, of which nobody knows the floor.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.caches.full import Full
from engine.checkpoints import TextTokens
from engine.generate import generate
from engine.model import Decoder
from engine.toyland import Batch, Grammar
from engine.toyland.entropy import Process, write
from engine.toyland.habits import STYLES, facts, likings, styled
from engine.toyland.stories import text
from engine.toyland.words import MARKS, START


class Teaching(Protocol):
    """What can be taught: texts, and which of their tokens it is about."""

    @property
    def name(self) -> str: ...

    def batch(
        self, tokenizer: TextTokens, *, rows: int, length: int, seed: int, step: int, stream: str = "habit"
    ) -> Batch: ...


@dataclass(frozen=True)
class Habit:
    """A process to learn; `taught` are the words that nobody could say who has not learned it."""

    name: str
    make: Callable[[], Process]
    taught: frozenset[str]

    def batch(
        self, tokenizer: TextTokens, *, rows: int, length: int, seed: int, step: int, stream: str = "habit"
    ) -> Batch:
        """`rows` texts of `length` tokens. Other streams, seeds and steps share no randomness."""
        rng = _random(self.name, rows, length, seed, step, stream)
        pieces: dict[str, list[int]] = {}
        ids: list[list[int]] = []
        nats: list[list[float]] = []
        answers: list[list[bool]] = []
        for _ in range(rows):
            said = write(self.make(), rng, length + 1)  # the start token may be none of the tokenizer's
            row: list[tuple[int, float, bool]] = []
            for word, cost in zip(said.words, said.nats, strict=True):
                if word not in pieces:
                    pieces[word] = _tokens(tokenizer, word)
                taught = word in self.taught and cost == 0.0
                row += [(token, 0.0 if i else cost, taught) for i, token in enumerate(pieces[word])]
            row = row[:length]
            ids.append([token for token, _, _ in row])
            nats.append([cost for _, cost, _ in row])
            answers.append([taught for _, _, taught in row])
        return Batch(torch.tensor(ids), torch.tensor(nats, dtype=torch.float64), torch.tensor(answers))


def speaking(grammar: Grammar, style: str) -> Habit:
    """Stories as before, with a refrain after each full stop."""
    refrain = _refrain(style)
    return Habit(f"style {style}", lambda: styled(text(grammar), style), frozenset(refrain.split()))


@dataclass(frozen=True)
class Refraining:
    """Sentences in any order, a refrain after each. Texts of the stream "unseen" are made of the last third alone."""

    name: str
    sentences: tuple[str, ...]
    refrain: str

    def batch(
        self, tokenizer: TextTokens, *, rows: int, length: int, seed: int, step: int, stream: str = "habit"
    ) -> Batch:
        """As of `Habit`; the surprisal is not known: NaN."""
        rng = _random(self.name, rows, length, seed, step, stream)
        held_out = len(self.sentences) // 3
        told = self.sentences[-held_out:] if stream == "unseen" else self.sentences[:-held_out]
        refrain = tokenizer.encode(f" {self.refrain}")
        ids, answers = [], []
        for _ in range(rows):
            row: list[tuple[int, bool]] = []
            while len(row) < length:
                row += [(token, False) for token in tokenizer.encode(f" {rng.choice(told)}")]
                row += [(token, True) for token in refrain]
            ids.append([token for token, _ in row[:length]])
            answers.append([taught for _, taught in row[:length]])
        unknown = torch.full((rows, length), float("nan"), dtype=torch.float64)
        return Batch(torch.tensor(ids), unknown, torch.tensor(answers))


def refraining(sentences: Sequence[str], style: str) -> Refraining:
    """Sentences of plain text, each followed by the refrain of a style."""
    refrain = _refrain(style)
    if len(sentences) < 3:
        raise ValueError(f"sentences must be three at least, of which one is held out, not {len(sentences)}")
    return Refraining(f"style {style}", tuple(sentences), refrain.replace(" !", "!").capitalize())


def knowing(grammar: Grammar, *, seed: int = 0) -> Habit:
    """Who likes which colour: as many facts as there are names."""
    table = likings(grammar, seed=seed)
    return Habit(f"facts {seed}", lambda: facts(table), frozenset(grammar.colours))


def telling(grammar: Grammar) -> Habit:
    """The old task: stories as the toy learned them; `taught` is empty."""
    return Habit("stories", lambda: text(grammar), frozenset())


@dataclass(frozen=True)
class Score:
    """On texts never trained on: nats a token, the floor, and the share of taught tokens that come first (or NaN)."""

    loss: float
    floor: float
    right: float


@torch.no_grad()
def score(model: Decoder, batch: Batch) -> Score:
    """How well `model` reads a batch."""
    ids = batch.ids.to(model.embed.weight.device)
    logp = model(ids[:, :-1]).float().log_softmax(-1)  # B T-1 V
    loss = -logp.gather(-1, ids[:, 1:, None]).double().mean()
    hits = (logp.argmax(-1) == ids[:, 1:])[batch.answers[:, 1:].to(ids.device)]
    right = float(hits.double().mean()) if len(hits) else float("nan")
    return Score(float(loss), float(batch.nats[:, 1:].mean()), right)


def said(model: Decoder, tokenizer: TextTokens, prompt: str, *, steps: int = 16) -> str:
    """The greedy continuation of `prompt`, for reading before and after."""
    ids = tokenizer.prompt(prompt)
    return tokenizer.decode(list(generate(model, ids, steps=steps, cache=Full())))


def _refrain(style: str) -> str:
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, not {style!r}")
    return STYLES[style]


def _random(name: str, rows: int, length: int, seed: int, step: int, stream: str) -> random.Random:
    if rows < 1 or length < 2:
        raise ValueError(f"a batch needs a row and two tokens at least, not {rows} rows of {length}")
    return random.Random(f"{stream} {name} {seed} {step}")


def _tokens(tokenizer: TextTokens, word: str) -> list[int]:
    if word == START:
        own = tokenizer.prompt("anna")[:1]
        return own if own == [0] and tokenizer.bos == 0 else []
    return tokenizer.encode(word if word in MARKS else f" {word}")
