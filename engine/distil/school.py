"""A teacher and what its students read: texts that come again are taught from memory, and others are kept back.

Hinton et al. (arXiv:1503.02531) keep the teacher's soft targets with the texts; so does `School`, for as many batches
as `KNOWN`. Where students know few words, the teacher speaks within them: see restricted.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from engine.caches.full import Full
from engine.distil import layers, restricted, synthetic
from engine.distil.run import Plan, Texts
from engine.model import Decoder, Shape
from engine.recording import aside, record
from engine.toyland import Batch, Grammar
from engine.toyland.entropy import distributions
from engine.toyland.stories import text
from engine.toyland.words import VOCABULARY

KNOWN = 64  # batches whose reading by the teacher is kept


@dataclass(frozen=True)
class School:
    """A teacher, the texts that its students read, and texts that nobody has read. Ids are the students' own."""

    teacher: Decoder
    shape: Shape  # of the students
    plan: Plan
    texts: Texts
    unseen: Batch
    names: tuple[int, ...]  # the tokenizer's id of each of the students' words
    grammar: Grammar | None = None  # that the texts come from, if one does
    count: int = 0  # of the texts that are read, over and over; 0 for ever new ones
    allowed: Tensor | None = None  # the teacher's ids of the students' words, where these are a part of them
    start: int = 2  # words of the prompt that the teacher writes from
    _known: dict[bytes, layers.Trace] = field(default_factory=dict)
    _newest: dict[bytes, layers.Trace] = field(default_factory=dict)

    def teach(self, ids: Tensor) -> layers.Trace:
        """What the teacher makes of ids [B, T]; texts that come again are not read again."""
        key = _key(ids)
        if key in self._known:
            return self._known[key]
        found = self.read(ids)
        if len(self._known) == KNOWN:
            self._known.pop(next(iter(self._known)))
        self._known[key] = found
        return found

    def answer(self, ids: Tensor) -> layers.Trace:
        """What soft labels need of it, for the texts of one step: all seeds read the same."""
        key = _key(ids)
        if key not in self._newest:
            self._newest.clear()
            with aside():
                self._newest[key] = layers.Trace(self.teacher(ids), [], [])
        return self._newest[key]

    def read(self, ids: Tensor) -> layers.Trace:
        """The same, anew."""
        with aside():
            if self.allowed is None:
                return layers.trace(self.teacher, ids)
            seen = layers.trace(self.teacher, self.allowed[ids])
            return replace(seen, logits=seen.logits[..., self.allowed])

    def expects(self, ids: Tensor, *, rows: int) -> Tensor:
        """The teacher's logits [B, T, V] after each of ids, read `rows` texts at a time."""
        return torch.cat([self.read(part).logits.float() for part in ids.split(rows)])

    def write(self, seed: int) -> Tensor:
        """Texts [N, T] of the teacher's own, from the first words that all texts share."""
        start, plan = self.unseen.ids[0, : self.start].to(self.teacher.embed.weight.device), self.plan
        with record(keep={}):
            if self.allowed is None:
                return synthetic.write(self.teacher, start, rows=plan.corpus, length=plan.length, seed=seed).ids
            return restricted.lesson(
                self.teacher, self.allowed, self.allowed[start], rows=plan.corpus, length=plan.length, seed=seed
            ).ids

    def on(self, ids: Tensor, model: Decoder, *, words: int, whole: bool = False) -> list[int]:
        """How `model` goes on from ids [T], always with the likeliest of the students' words.

        `whole` says that the model knows the teacher's whole vocabulary.
        """
        allowed = self.allowed if whole else None
        said, new = [], ids[None].to(model.embed.weight.device)
        with aside():
            cache = Full()
            for _ in range(words):
                found = model.logits(model.hidden(new if allowed is None else allowed[new], cache=cache)[:, -1])
                new = (found if allowed is None else found[:, allowed]).argmax(-1, keepdim=True)
                said.append(int(new))
        return said

    def story(self) -> tuple[int, int]:
        """The unseen text to look at, and after how many of its words to let others go on: the question that is
        answered latest, or half of the first text."""
        answered = self.unseen.answers.int()
        if not answered.any():
            return 0, self.unseen.ids.shape[1] // 2
        firsts = torch.where(answered.any(1), answered.argmax(1), -1)
        row = int(firsts.argmax())
        asked = [i for i in range(int(firsts[row])) if VOCABULARY[int(self.unseen.ids[row, i])] in ("?", ":")]
        return row, asked[-1] + 1 if asked else int(firsts[row])

    def odds(self, ids: Tensor) -> np.ndarray:
        """Toyland's own odds [T, V] of the word after each of ids; NaN where the text is not Toyland's."""
        if self.grammar is None:
            return np.full((len(ids), len(self.names)), np.nan)
        index = {word: i for i, word in enumerate(VOCABULARY)}
        return distributions(text(self.grammar), [VOCABULARY[i] for i in ids.tolist()], index)


def recall(logits: Tensor, texts: Batch) -> float:
    """The share of the questions of `texts` whose word comes first in logits [B, T - 1, V]; NaN without questions."""
    asked = texts.answers[:, 1:].to(logits.device)
    if not asked.any():
        return float("nan")
    return float((logits.argmax(-1) == texts.ids[:, 1:].to(logits.device))[asked].float().mean())


def of_texts(
    teacher: Decoder, shape: Shape, plan: Plan, ids: Sequence[Sequence[int]], *, most: int = 0, start: int = 8
) -> School:
    """A school of stretches [plan.length] of real texts: every fourth is kept back, and students know no other words.

    `ids` are the teacher's, text by text; `most` bounds the stretches that are read, 0 for all of them.
    """
    rows = torch.tensor(
        [part[i : i + plan.length] for part in ids for i in range(0, len(part) - plan.length + 1, plan.length)]
    )
    if len(rows) < 4:
        raise ValueError(f"ids must hold four stretches of {plan.length} tokens at least, not {len(rows)}")
    allowed = rows.unique()
    rows = torch.searchsorted(allowed, rows)
    unseen, read = rows[3::4], torch.cat([rows[i::4] for i in range(3)])
    read = read[: most or len(read)]
    nothing = torch.zeros_like(read[:1], dtype=torch.float64)

    def batched(part: Tensor) -> Batch:
        return Batch(part, nothing.expand(part.shape), torch.zeros_like(part, dtype=torch.bool))

    def told(seed: int, at: int) -> Batch:
        order = torch.randperm(len(read), generator=torch.Generator().manual_seed(seed))
        batches = max(1, len(read) // plan.rows)
        return batched(read[order[(at % batches) * plan.rows :][: plan.rows]])

    return School(
        teacher, replace(shape, vocab=len(allowed)), plan, told, batched(unseen), tuple(allowed.tolist()),
        count=len(read), allowed=allowed.to(teacher.embed.weight.device), start=start,
    )  # fmt: skip


def _key(ids: Tensor) -> bytes:
    return bytes(str(tuple(ids.shape)), "ascii") + ids.cpu().numpy().tobytes()
