"""A student of a real model, trained while one waits: it knows only the few hundred words that a subject needs.

With the whole vocabulary a small student is mostly embedding: 49,152 rows of SmolLM2 are more than all its own
layers. So the teacher is asked to speak within `allowed` words, writes a small corpus, and its softened answers over
those words are the labels (synthetic text, arXiv:1606.07947, with soft labels, arXiv:1503.02531).
Shapes: allowed [K], sorted ids of the teacher; the student counts 0..K-1.
Errors: ValueError for a size outside 2..V and a start that is not allowed.
Deviations: student and teacher are compared on the teacher's distribution over `allowed`, made to sum to 1: a narrower
task than the teacher's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.distil.logits import Terms, loss
from engine.distil.synthetic import write
from engine.model import Decoder


@dataclass(frozen=True)
class Lesson:
    """What the teacher wrote, in the student's ids, and what it thought at each place."""

    allowed: Tensor  # K
    ids: Tensor  # B T, 0..K-1
    logits: Tensor  # B T-P K
    start: int  # P
    entropy: float  # nats a token that the teacher itself pays

    def terms(self, student: Decoder, rows: slice, *, temperature: float, alpha: float) -> Terms:
        """The loss of a student on some of the texts, at the places that the teacher wrote."""
        ids = self.ids[rows]
        said = student(ids[:, :-1])[:, self.start - 1 :]  # B T-P K
        return loss(said, self.logits[rows], ids[:, self.start :], temperature=temperature, alpha=alpha)


@torch.no_grad()
def choose(teacher: Decoder, ids: Tensor, *, size: int) -> Tensor:
    """The words that occur in the text ids [N], then those that the teacher finds likeliest in it: sorted [size]."""
    own = ids.unique()
    if not max(2, len(own)) <= size <= teacher.shape.vocab:
        raise ValueError(f"size must be from {max(2, len(own))} (its words) to {teacher.shape.vocab}, not {size}")
    device = teacher.embed.weight.device
    likely = teacher(ids[None].to(device))[0].float().softmax(-1).mean(0).cpu()  # V
    likely[own] = 2.0  # above any probability
    return likely.topk(size).indices.sort().values


def lesson(
    teacher: Decoder, allowed: Tensor, start: Tensor, *, rows: int, length: int, temperature: float = 1.0, seed: int = 0
) -> Lesson:
    """Let the teacher write `rows` texts of `length` tokens that begin with `start` [P], in allowed words alone."""
    if not bool(torch.isin(start, allowed).all()):
        raise ValueError(f"start must be of allowed words, and {start[~torch.isin(start, allowed)].tolist()} are not")
    corpus = write(
        teacher, start, rows=rows, length=length, temperature=temperature, seed=seed, allowed=allowed, keep_logits=True
    )
    assert corpus.logits is not None
    ids = torch.searchsorted(allowed.to(corpus.ids.device), corpus.ids.contiguous())
    return Lesson(allowed, ids, corpus.logits, len(start), corpus.entropy)
