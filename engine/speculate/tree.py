"""A tree of guesses: several words for each place, all of them checked in one pass.

SpecInfer (arXiv:2305.09781): tree attention and multi-step speculative sampling; Medusa (arXiv:2401.10774): trees
of the likeliest words; EAGLE (arXiv:2401.15077): siblings drawn without replacement. Paper -> here: token tree =
`Draft`; topology-aware causal mask = `tree_mask`; position ids = `tree_positions`.

A node sees the text, its ancestors and itself. Its position is the text's length plus its depth, so that all words
that stand for one place stand at one place: every path then reads as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.caches import Cache, View
from engine.caches.full import Full
from engine.mixers.rope import Rope
from engine.speculate import ROOT, Dice, Draft, Drafter, Verdict, chance, law, rejected
from engine.speculate.chain import catch_up, guessing, read

if TYPE_CHECKING:
    from engine.model import Decoder

MOST = 256  # nodes of a tree: the mask and the rows of logits grow with them
WAYS = ("likeliest", "replaced", "distinct")

# The tree of the lecture: two words may follow the text, and so on. Parents are numbers of nodes.
LECTURE_WORDS = ("It", "is", "has", "a", "the", "to", "good", "be")
LECTURE_PARENTS = (ROOT, 0, 0, 1, 1, 2, 3, 5)


def tree_mask(parents: Sequence[int], *, seen: int = 0) -> Tensor:
    """bool [n, seen + n]: node i sees the `seen` tokens of the text, its ancestors and itself."""
    among = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            among[node] |= among[parent]
    return torch.cat((torch.ones(len(parents), seen, dtype=torch.bool), among), 1)


def tree_positions(parents: Sequence[int], *, seen: int = 0) -> Tensor:
    """int64 [n]: the place of each node in the text that it would make."""
    return torch.tensor(Draft(tuple(parents), tuple(range(len(parents)))).depths, dtype=torch.long) + (seen - 1)


class Branches(Cache):
    """Lends a `Full` cache to a tree: what is read while it is on are nodes, told of by `grow` before they are read.

    They lie in the next slots of the inner cache, in their order. `inner.keep(start, path)` makes a path part of the
    text afterwards, `inner.crop(start)` none.
    """

    def __init__(self, inner: Full, parents: Sequence[int] = ()) -> None:
        super().__init__()
        if inner.states:
            raise ValueError("a recurrent state reads one text and no tree: draft a chain for such a model")
        self.inner, self.start = inner, inner.seen
        self.seen = inner.seen
        self._parents: list[int] = []
        self.grow(parents)

    def grow(self, parents: Sequence[int]) -> None:
        """Announce the nodes that are read next."""
        self._parents += parents
        self._mask = tree_mask(self._parents, seen=self.start)
        self._positions = tree_positions(self._parents, seen=self.start)

    def extend(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> View:
        first = self.inner.seen - self.start
        stop = first + k.shape[2]
        if stop > len(self._parents):
            raise ValueError(f"{stop} nodes are read, and only {len(self._parents)} were announced")
        view = self.inner.place(layer, k, v, rope, positions=self._positions[first:stop].to(k.device))
        view.mask = self._mask[first:stop, : self.start + stop].to(k.device)
        return view

    def advance(self, count: int) -> None:
        self.inner.advance(count)
        self.seen = self.inner.seen

    def kept(self, layer: int) -> Tensor:
        return torch.cat((torch.arange(self.start), self._positions[: self.seen - self.start]))

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes


def verify(draft: Draft, laws: Tensor, *, dice: Dice) -> Verdict:
    """Check a tree from the text downwards: `laws[0]` [V] is what the target says after the text, `laws[1 + i]` after
    node i. Siblings are checked in turn, each against what the rejected ones before it left of p."""
    if len(laws) != len(draft) + 1:
        raise ValueError(f"a tree of {len(draft)} nodes needs {len(draft) + 1} laws, not {len(laws)}")
    accepted: list[int] = []
    turned_down: list[int] = []
    at, p = ROOT, laws[0]
    while True:
        for node in draft.children(at):
            if dice.accepts(chance(p, draft.tokens[node], draft.law_of(node))):
                accepted.append(node)
                at, p = node, laws[1 + node]
                break
            turned_down.append(node)
            p = rejected(p, draft.tokens[node], draft.law_of(node))
        else:
            return Verdict(accepted, turned_down, dice.draw(p), p)


class Tree(Drafter):
    """`widths[d]` words after each node of depth d, by a small model with a cache of its own: (3, 2) has 3 + 6 nodes.

    `ways` is how siblings come about: "likeliest" takes the top words; "distinct" draws without replacement;
    "replaced" draws each anew, so that a word may come twice. All three are lossless. At temperature 0 both draws
    are sure of one word, so the likeliest ones are taken.
    """

    def __init__(self, model: Decoder, *, widths: Sequence[int], ways: str = "distinct") -> None:
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be numbers of siblings above 0, one a depth, not {list(widths)}")
        if ways not in WAYS:
            raise ValueError(f"ways must be one of {', '.join(WAYS)}, not {ways!r}")
        if node_count(widths) > MOST:
            raise ValueError(f"widths {list(widths)} make {node_count(widths)} nodes, and at most {MOST} are checked")
        self.model, self.widths, self.ways = model, tuple(widths), ways
        self.cache = Full()

    def draft(self, text: Sequence[int], *, room: int, temperature: float, dice: Dice) -> Draft:
        with guessing(self.cache, len(text)):
            logits = catch_up(self.model, self.cache, text)[None]
            branches = Branches(self.cache)

            def deeper(level: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
                branches.grow(parents)
                return read(self.model, tokens, branches, last=len(level))

            def after(row: Tensor, width: int) -> list[Guess]:
                return siblings(row, width, ways=self.ways, temperature=temperature, dice=dice)

            return grown(self.widths[:room], logits, deeper=deeper, after=after)


Guess = tuple[int, Tensor | None]
"""A word, and the law that it was drawn from."""


def grown(
    widths: Sequence[int],
    logits: Tensor,
    *,
    deeper: Callable[[Sequence[int], Sequence[int], Sequence[int]], Tensor],
    after: Callable[[Tensor, int], list[Guess]],
) -> Draft:
    """A tree, level by level, of at most so many words after each node of a depth.

    `logits` has the one row after the text; `deeper(nodes, parents, tokens)` reads the nodes of a level and gives a
    row for each; `after(row, width)` is what may follow a node.
    """
    parents: list[int] = []
    tokens: list[int] = []
    laws: list[Tensor | None] = []
    level = [ROOT]
    for depth, width in enumerate(widths):
        if depth:
            logits = deeper(level, [parents[node] for node in level], [tokens[node] for node in level])
        below = []
        for node, row in zip(level, logits, strict=True):
            for token, q in after(row, width):
                below.append(len(tokens))
                parents.append(node)
                tokens.append(token)
                laws.append(q)
        level = below
    return Draft(tuple(parents), tuple(tokens), tuple(laws))


def siblings(logits: Tensor, width: int, *, ways: str, temperature: float, dice: Dice) -> list[Guess]:
    """At most `width` words after one node, each with the law that it was drawn from, given those before it."""
    if ways == "likeliest" or temperature == 0.0:
        return [(token, None) for token in logits.topk(min(width, len(logits))).indices.tolist()]
    q = law(logits, temperature=temperature)
    found: list[Guess] = []
    for _ in range(width):
        token = dice.draw(q)
        found.append((token, q))
        if ways == "distinct":
            q = q.clone()
            q[token] = 0.0
            if float(q.sum()) <= 0.0:  # nothing else can be drawn
                break
            q /= q.sum()
    return found


def node_count(widths: Sequence[int]) -> int:
    """Nodes of a tree with so many words after each node, depth by depth."""
    count, level = 0, 1
    for width in widths:
        level *= width
        count += level
    return count
