"""Endless training text: a batch is a pure function of the grammar, the stream's name, the seed and the step."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.toyland.entropy import Text, write
from engine.toyland.stories import Grammar, text
from engine.toyland.words import VOCABULARY

_IDS = {word: i for i, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Batch:
    """Token ids [B, T] of texts that begin with the start token, and what the grammar knows of each token:
    its surprisal in nats [B, T] (0 where no other could come) and whether it answers a question [B, T]."""

    ids: Tensor
    nats: Tensor
    answers: Tensor

    @property
    def floor(self) -> float:
        """The perplexity that no reader beats on average: e to the mean surprisal of all tokens but the first."""
        return float(self.nats[:, 1:].double().mean().exp())


def batch(grammar: Grammar, *, seed: int, step: int, rows: int, length: int, stream: str = "train") -> Batch:
    """`rows` texts of `length` tokens. Other streams, seeds and steps share no randomness."""
    if rows < 1 or length < 2:
        raise ValueError(f"a batch needs a row and two tokens at least, not {rows} rows of {length}")
    # A string is hashed whole (SHA-512), so that neighbouring seeds give unrelated texts.
    rng = random.Random(f"{stream} {seed} {step}")
    return collate([write(text(grammar), rng, length) for _ in range(rows)])


def collate(texts: list[Text]) -> Batch:
    """Texts of one length as tensors."""
    ids = np.array([[_IDS[word] for word in t.words] for t in texts], np.int64)
    nats = np.array([t.nats for t in texts], np.float64)
    answers = np.array([t.answers for t in texts], bool)
    return Batch(torch.from_numpy(ids), torch.from_numpy(nats), torch.from_numpy(answers))
