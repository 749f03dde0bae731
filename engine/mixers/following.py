"""The memory of Titans alone, on the words of a text: it learns what follows what, and every word tells how surprised.

"Titans" (arXiv:2501.00663), equations 8 to 15, as in titans.py, with one linear memory and no layer around it: the key
of a token is the vector of the word before it, its value the vector of the word itself. So what the memory holds can be
read: asked with a word it answers with the word that followed. Without momentum and forgetting this is the delta rule
with a step of 2 theta (section 3.1 of "Linear Transformers Are Secretly Fast Weight Programmers", arXiv:2102.11174).

Shapes: vectors [V, D] of length 1, weights [D, D]. Deviation: rate, momentum and forgetting are the same for every
token, where Titans computes them from it (neural_memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.mixers.titans import Memory, gradients, recall, sequential
from engine.model import Decoder
from engine.recording import site, tap

SURPRISE = site("following.surprise", "how much this word would change the memory: the length of its gradient",
                symbol="‖∇ℓ‖", low=0.0)  # fmt: skip
GUESS = site("following.guess", "how near the memory’s answer to the word before is to each word", symbol="M(k)·v")
WEIGHTS = site("following.weights", "the memory’s matrix after this word", symbol="M")
WRITE = site("following.write", "what this word changed in it", symbol="M − M before")
CHANGE = site("following.change", "how far this word moved the matrix", symbol="‖M − M before‖", low=0.0)


@dataclass(frozen=True)
class Moment:
    """The memory after one word."""

    memory: Memory
    surprise: float
    change: float

    def answers(self, vectors: Tensor, words: Sequence[int]) -> Tensor:
        """How near its answers to these words are to every word: [words, V]; 1 where it is the word itself."""
        return recall((self.memory.weights[0][0, 0],), vectors[list(words)]) @ vectors.T


def word_vectors(model: Decoder, count: int) -> Tensor:
    """The embeddings of the first `count` words without what all have in common, of length 1, in float64: [V, D]."""
    if not 2 <= count <= model.shape.vocab:
        raise ValueError(f"count must be from 2 to {model.shape.vocab} words, not {count}")
    words = model.embed.weight[:count].detach().double()
    return torch.nn.functional.normalize(words - words.mean(0), dim=1)


def following(
    vectors: Tensor, ids: Sequence[int], *, rate: float, momentum: float, forgetting: float, learning: bool = True
) -> Iterator[Moment]:
    """Read the words `ids` one after the other, learning from the second on; a moment for each of them."""
    for name, value in (("rate", rate), ("momentum", momentum), ("forgetting", forgetting)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value}")
    V, D = vectors.shape
    if not ids or not all(0 <= i < V for i in ids):
        raise ValueError(f"ids must be numbers of words from 0 to {V - 1}, one at least, not {list(ids)}")
    theta, eta, alpha = (vectors.new_full((1, 1, 1), x if learning else 0.0) for x in (rate, momentum, forgetting))
    memory = Memory.fresh((vectors.new_zeros(1, 1, D, D),))
    for t, word in enumerate(ids):
        surprise = change = 0.0
        if t:
            k, v = vectors[ids[t - 1]].view(1, 1, 1, D), vectors[word].view(1, 1, 1, D)
            a, e = gradients(memory.weights, k, v)
            surprise = float(a[0].norm() * e[0].norm())  # the gradient is the outer product of the two
            tap(GUESS, (recall(memory.weights, k)[0, 0, 0] @ vectors.T).float(), "word")
            before = memory.weights[0]
            _, memory = sequential(memory, k, k, v, rate=theta, momentum=eta, forgetting=alpha)
            write = memory.weights[0][0, 0] - before[0, 0]
            change = float(write.norm())
            tap(WRITE, write.float(), "in out")
        else:
            tap(WRITE, torch.zeros(D, D), "in out")
        tap(SURPRISE, surprise, "")
        tap(CHANGE, change, "")
        tap(WEIGHTS, memory.weights[0][0, 0].float(), "in out")
        yield Moment(memory, surprise, change)
