"""Trees of guesses as lesson speculate shows them: the one that a learner draws, and that of every round."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.recording import Recording, site, step, tap
from engine.speculate import ROOT, Draft, Verdict
from engine.speculate.rounds import Checked, Round
from engine.speculate.tree import tree_mask, tree_positions
from lessons.models import name_ids
from lessons.views import Arithmetic, Tree, of

COMING, TEXT, GUESSED, YES, NO, SKIPPED, INSTEAD, MORE = range(8)
WORDS = site("guess.words", "the last word of the text, the guesses after it, and the word that the target adds")
BEHIND = site("guess.parents", "the node that each comes after")
FATES = site("guess.fates", "what became of each guess", low=0.0, high=7.0)
PLACES = site("guess.positions", "the place in the text at which each stands")
P = site("guess.p", "the target’s probability of each guess, at temperature 1 if nothing is drawn", symbol="p", low=0.0)
Q = site("guess.q", "the probability with which it was drawn; 0 for a chosen one", symbol="q", low=0.0)
SEES = site("guess.mask", "which rows of the check see which", low=0.0, high=1.0)
MOST, DEEPEST = 32, 8  # nodes and words a path of a tree that is drawn
FINAL = 3  # steps of a round: grown, checked, pruned


def drawn(text: str, tokenizer: Any, *, follows: str, toy: bool) -> Draft:
    """The tree that a learner wrote, a path a line. Words that paths begin with alike are one node."""
    parents: list[int] = []
    tokens: list[int] = []
    paths = [line.replace(">", " ").split() for line in re.split(r"[\n;]", text)]
    for words in filter(None, paths):
        at, depth = ROOT, 0
        for n, word in enumerate(words):
            for token in _ids(word, tokenizer, first=not n and not follows.strip(" "), toy=toy):
                known = [i for i, said in enumerate(zip(parents, tokens, strict=True)) if said == (at, token)]
                if not known:
                    parents.append(at)
                    tokens.append(token)
                at, depth = known[0] if known else len(tokens) - 1, depth + 1
        if depth > DEEPEST:
            raise ValueError(f"Your tree has a path of {depth} tokens, “{words[0]} …”; at most {DEEPEST} fit.")
    if not tokens:
        raise ValueError("Your tree has no words; write a path a line: It > is > a > good.")
    if len(tokens) > MOST:
        raise ValueError(f"Your tree has {len(tokens)} guesses; at most {MOST} can be drawn.")
    return _in_levels(parents, tokens)


def _ids(word: str, tokenizer: Any, *, first: bool, toy: bool) -> list[int]:
    if toy:
        try:
            return list(tokenizer.encode(word))
        except ValueError:
            raise ValueError(f"Your tree says “{word[:30]}”, no word of Toyland: try anna, ball or attic.") from None
    return list(tokenizer.encode(word if first or not word[0].isalnum() else f" {word}"))


def _in_levels(parents: Sequence[int], tokens: Sequence[int]) -> Draft:
    """The same tree, numbered depth by depth, as the lecture and the drafters do."""
    depths = Draft(tuple(parents), tuple(tokens)).depths
    order = sorted(range(len(tokens)), key=lambda i: depths[i])
    new = {old: n for n, old in enumerate(order)} | {ROOT: ROOT}
    return Draft(tuple(new[parents[i]] for i in order), tuple(tokens[i] for i in order))


def show_tree(tokenizer: Any, last: int, at: int, draft: Draft, checked: Checked, *, q: float) -> tuple[int, int]:
    """The tree grows depth by depth, is checked node by node, and pruned; the steps at which it is grown and pruned."""
    picture = _Picture(tokenizer, last, at, draft, checked.verdict, checked.p, [q] * len(draft), tree="tree")
    deepest = max(draft.depths)
    for depth in range(deepest + 1):
        picture.show(depth=depth)
        step()
    looked = sorted((*checked.verdict.accepted, *checked.verdict.rejected))
    for count in range(1, len(looked) + 1):
        picture.show(looked=looked[:count])
        step()
    picture.show(done=True)
    step()
    return deepest, deepest + 1 + len(looked)


class _Picture:
    """What view Tree shows of one check."""

    def __init__(
        self, tokenizer: Any, last: int, at: int, draft: Draft, verdict: Verdict, p: Sequence[float],
        q: Sequence[float], *, tree: str,
    ) -> None:  # fmt: skip
        self.draft, self.verdict, self.tree = draft, verdict, tree
        end = verdict.accepted[-1] + 1 if verdict.accepted else 0
        parents = [ROOT, *(parent + 1 for parent in draft.parents)]
        places = tree_positions(parents, seen=at).tolist()
        nan = float("nan")
        self.words = np.array([last, *draft.tokens, verdict.token], np.int32)
        self.parents = np.array([*parents, end], np.int32)
        self.places = np.array([*places, places[end] + 1], np.int32)
        self.p = np.array([nan, *p, nan], np.float32)
        self.q = np.array([0.0, *q, 0.0], np.float32)
        self.mask = tree_mask(parents).numpy().astype(np.uint8)
        name_ids(tokenizer, self.words)

    def show(self, *, depth: int = DEEPEST + 1, looked: Sequence[int] = (), done: bool = False) -> None:
        fates = np.full(len(self.words), COMING, np.uint8)
        fates[0] = TEXT
        for node, deep in enumerate(self.draft.depths):
            if deep <= depth:
                fates[1 + node] = SKIPPED if done else GUESSED
        for nodes, fate in ((self.verdict.accepted, YES), (self.verdict.rejected, NO)):
            for node in nodes:
                if done or node in looked:
                    fates[1 + node] = fate
        if done:
            fates[-1] = INSTEAD if self.verdict.corrected else MORE
        for name, values in ((WORDS, self.words), (BEHIND, self.parents), (FATES, fates), (PLACES, self.places),
                             (P, self.p), (Q, self.q)):  # fmt: skip
            tap(name, values, "node", tree=self.tree)
        tap(SEES, self.mask, "row key", tree=self.tree)


def show_round(tokenizer: Any, last: int, at: int, one: Round, *, stage: int) -> None:
    """One of the three steps of a round: 0 grown, 1 checked, 2 pruned."""
    picture = _Picture(tokenizer, last, at, one.draft, one.verdict, one.p, one.q, tree="live")
    looked = (*one.verdict.accepted, *one.verdict.rejected)
    picture.show(looked=looked if stage else (), done=stage == FINAL - 1)


def node_cell(recording: Recording, knobs: Any, at: Mapping[str, int], *, tree: str) -> Arithmetic:
    """Why one guess was kept or not."""
    rows = {name: recording.track(name, tree=tree).latest(at.get("step")) for name in (FATES, PLACES, P, Q, BEHIND)}
    node = at["node"]
    if not 0 < node < len(rows[P]) - 1:
        raise ValueError(f"there is no guess {node}")
    p, q, fate = float(rows[P][node]), float(rows[Q][node]), int(rows[FATES][node])
    was_drawn = q > 0
    known = f"{p:.4f}" if np.isfinite(p) else "not read"
    lines = [("position", str(int(rows[PLACES][node]))), ("p, by the target", known)]
    if was_drawn:
        lines += [("q, by the guesser", f"{q:.4f}"), ("kept with chance min(1, p/q)", f"{min(1.0, p / q):.4f}")]
    outcome = ("to come", "text", "not checked yet", "kept", "rejected", "never looked at")[min(fate, 5)]
    note_ = (
        "At temperature 0 a guess is kept if it is the target’s favourite."
        if not was_drawn
        else ("Siblings are checked in turn, each against what the rejected ones before it left of p.")
    )
    return Arithmetic(title=f"guess {node}: {outcome}", lines=tuple(lines), note=note_, values={"p": p})


def your_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    return node_cell(recording, knobs, at, tree="tree")


def live_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    return node_cell(recording, knobs, at, tree="live")


def tree_view(tree: str, title: str, cell: Any) -> Tree:
    here = {"tree": tree}
    return Tree(
        of(WORDS, **here), of(BEHIND, **here), of(FATES, **here), of(PLACES, **here), p=of(P, **here), q=of(Q, **here),
        mask=of(SEES, **here), name=tree, title=title, cell=cell,
    )  # fmt: skip
