"""Speculation, pass by pass of the target: what was guessed, what came of it, what it took; and a tree, checked.

"Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192), told by round. Paper -> here:
gamma = `len(Round.draft)`, p(x) = `Round.p`, q(x) = `Round.q`; for trees, SpecInfer's (arXiv:2305.09781) check of
all paths in one pass, beside the paths one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.caches.full import Full
from engine.generate import MULTIPLICATIONS, ROWS
from engine.model import Decoder
from engine.recording import record
from engine.speculate import ROOT, Dice, Draft, Drafter, Verdict, law, sure_of
from engine.speculate.adaptive import LENGTH
from engine.speculate.bild import DISTANCE, big_little
from engine.speculate.feature import Feature
from engine.speculate.lookup import follow
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
from engine.speculate.tree import Branches, verify


class Watched(Drafter):
    """Hands on what another drafter guesses, and remembers it, the verdict and the target's rows."""

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.drafted, self.hidden = Draft(), torch.empty(0)
        self.verdict: Verdict | None = None

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
    target: Decoder, ids: list[int], *, steps: int, guesser: Drafter, temperature: float, seed: int
) -> Iterator[Round]:
    """Guess and check, a round at a time."""
    watch = Watched(guesser)
    told = speculate(target, ids, steps=steps, drafter=watch, temperature=temperature, seed=seed)
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
            natural = law(target.logits(watch.hidden[-1 - len(verdict.accepted) :]), temperature=temperature or 1.0)
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
    target: Decoder, small: Decoder, ids: list[int], *, steps: int, fallback: float, rollback: float, most: int
) -> Iterator[Round]:
    """The big little decoder, a pass of the big model at a time. Its words are not the target's."""
    told = big_little(target, small, ids, steps=steps, fallback=fallback, rollback=rollback, most=most)
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


def laws_at(
    target: Decoder, small: Decoder | Feature | None, ids: list[int], places: Sequence[int], *, temperature: float
) -> tuple[Tensor, Tensor, list[bool]]:
    """p and q [place, V] of the tokens at these places, given those before, and where there was a guess at all."""
    before, where = torch.tensor([place - 1 for place in places]), target.embed.weight.device
    with torch.inference_mode():
        hidden = target.hidden(_row(ids, where))[0]
        p = law(target.logits(hidden[before.to(hidden.device)]), temperature=temperature)
        if small is None:
            guesses = [follow(ids[:place], longest=3, length=1)[0] for place in places]
            rows = [sure_of(guess[0], p.shape[1]) if guess else torch.zeros(p.shape[1]).double() for guess in guesses]
            return p, torch.stack(rows), [bool(guess) for guess in guesses]
        if isinstance(small, Feature):
            # The feature of token t, foretold from that of t - 1 and the token t itself.
            own = small(hidden[None, :-1], _row(ids[1:], where))[0]
            few = law(small.logits(own[(before - 1).to(own.device)]), temperature=temperature)
            q = torch.zeros_like(p).index_copy_(1, small.words.cpu(), few)
        else:
            said = small.hidden(_row(ids, where))[0]
            q = law(small.logits(said[before.to(said.device)]), temperature=temperature)
    return p, q, [True] * len(places)


@dataclass(frozen=True)
class Checked:
    """A tree after its one pass. `off` is how far its logits are from those of the paths, read one after the other."""

    verdict: Verdict
    p: list[float]  # of each node, after its parent
    off: float
    passes: int  # that the paths take without a tree


def check_tree(model: Decoder, ids: list[int], draft: Draft, *, temperature: float, seed: int) -> Checked:
    """One pass over all nodes; and, to compare, each path alone in a pass of its own."""
    cache, where = Full(), model.embed.weight.device
    with torch.inference_mode():
        first = model.hidden(_row(ids, where), cache=cache)[0, -1:]
        nodes = model.hidden(_row(draft.tokens, where), cache=Branches(cache, draft.parents))[0]
        logits = model.logits(torch.cat((first, nodes)))
        verdict = verify(draft, law(logits, temperature=temperature), dice=Dice(seed))
        natural = law(logits, temperature=temperature or 1.0)
        off, leaves = 0.0, [i for i in range(len(draft)) if not draft.children(i)]
        for leaf in leaves:
            path = [leaf]
            while draft.parents[path[0]] != ROOT:
                path.insert(0, draft.parents[path[0]])
            alone = model.hidden(_row([*ids, *(draft.tokens[i] for i in path)], where))[0, -len(path) :]
            off = max(off, float((model.logits(alone) - logits[[i + 1 for i in path]]).abs().max()))
    p = [float(natural[1 + parent, token]) for parent, token in zip(draft.parents, draft.tokens, strict=True)]
    return Checked(verdict, p, off, len(leaves))


def _row(ids: Sequence[int], where: torch.device) -> Tensor:
    """Ids as a model there reads them."""
    return torch.tensor([list(ids)], device=where)
