"""A draft that reads the target's mind: one block beside it, fed with the last thing that the target thought.

EAGLE (arXiv:2401.15077). Paper -> here: f_t, the feature of the target's last layer at token t = its normed
hidden row; e_t+1, the embedding of the token after it = the target's own, frozen; the FC layer = `join`; the one
decoder layer = `block`; the frozen LM head = the target's rows of `words`. From f_t and e_t+1 it foretells f_t+1, and
so the law of token t+2; its own f is the next one's input, until the target tells the true ones.

Deviation: it guesses the most frequent words alone (q = 0 elsewhere, which stays lossless), since the head of all
49152 words would cost most of a draft. How it is trained is in `engine.speculate.draft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.caches import Cache
from engine.caches.full import Full
from engine.mixers.rope import rope_tables
from engine.mixers.softmax import SoftmaxAttention
from engine.model import Block, Decoder, SwiGLU
from engine.norm import RMSNorm
from engine.packed import Packed, can_pack
from engine.speculate import ROOT, Dice, Draft, Drafter, Verdict
from engine.speculate.chain import guessing
from engine.speculate.tree import Branches, Guess, grown, siblings

FFN = 1024  # width of its feed-forward part


class Feature(nn.Module):
    """The block, and the frozen rows that it borrows from its target. `words` [R] are the ids that it can say."""

    words: Tensor

    def __init__(self, target: Decoder, words: Tensor, *, ffn_width: int = FFN) -> None:
        super().__init__()
        shape = target.shape
        self.shape = replace(shape, layers=1, ffn_width=ffn_width)
        self.join = nn.Linear(2 * shape.width, shape.width, bias=False)
        mixer, ffn = SoftmaxAttention(self.shape, 0), SwiGLU(self.shape)
        self.block = Block(self.shape, mixer=mixer, ffn=ffn)
        self.norm = RMSNorm(shape.width, eps=shape.norm_eps)
        self.register_buffer("words", words.long())
        self.borrow(target)

    def borrow(self, target: Decoder) -> None:
        """Take embedding and head of the target: shared, never stored, never trained."""
        weight = target.embed.weight
        self._embed = weight.detach()
        head = target.embed if target.shape.tied or target.head is None else target.head
        self._rows = head.get_parameter("weight").detach()  # V W
        self._rope = rope_tables(
            self.shape.head_width, base=self.shape.rope_base, count=self.shape.max_positions, dtype=weight.dtype,
            device=weight.device,
        )  # fmt: skip
        self.take_head()

    def take_head(self) -> None:
        """Copy the target's rows of `words`: again, whenever these have changed."""
        self._head = self._rows[self.words]  # R W
        self._packed_head: nn.Module | None = None

    def forward(self, features: Tensor, ids: Tensor, *, cache: Cache | None = None) -> Tensor:
        """features [B, T, W] of tokens and the ids [B, T] of the tokens after them -> the features of these."""
        x = self.join(torch.cat((features, F.embedding(ids, self._embed)), -1))
        x = self.block(x, rope=self._rope, cache=cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """features [..., W] -> logits of `words` [..., R]."""
        return F.linear(features, self._head) if self._packed_head is None else self._packed_head(features)

    def start_from(self, target: Decoder, *, seed: int = 0) -> None:
        """Begin where little is left to learn: the last block of the target, as wide as there is room."""
        last = target.blocks[-1].state_dict()
        width, wide = self.shape.ffn_width, target.shape.ffn_width
        if width > wide:
            raise ValueError(f"ffn_width must be at most the target's {wide} to start from it, not {width}")
        # The neurons that write most: the norms of their columns.
        neurons = last["ffn.down.weight"].norm(dim=0).topk(width).indices.sort().values
        last["ffn.gate_up.weight"] = last["ffn.gate_up.weight"][torch.cat((neurons, neurons + wide))]
        last["ffn.down.weight"] = last["ffn.down.weight"][:, neurons]
        self.block.load_state_dict(last)
        self.norm.load_state_dict(target.norm.state_dict())
        with torch.no_grad():
            # The next token's embedding, a hint of the feature, and noise to tell their parts apart.
            eye = torch.eye(self.shape.width)
            noise = 0.01 * torch.randn(self.join.weight.shape, generator=torch.Generator().manual_seed(seed))
            self.join.weight.copy_(torch.cat((0.02 * eye, eye), 1) + noise)


def packed(model: Feature) -> Feature:
    """The same with its weights in the layout that the processor reads fastest, where there is one; in place."""
    if can_pack(model._embed):
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Packed(child.weight))
        model._packed_head = Packed(model._head)
    return model


class FeatureDraft(Drafter):
    """Guesses by a `Feature`: a chain of `length` tokens, or a tree of `widths` words a depth; ways as in `Tree`."""

    def __init__(
        self, model: Feature, *, length: int = 3, widths: Sequence[int] | None = None, ways: str = "distinct"
    ) -> None:
        if length < 1 or (widths is not None and (not widths or min(widths) < 1)):
            raise ValueError(f"length and widths must be numbers above 0, not {length} and {widths}")
        self.model, self.length, self.widths, self.ways = model, length, widths, ways
        self.cache = Full()
        self._heard: list[Tensor] = []  # features [n, W] of tokens that the block has not read yet

    def told(self, draft: Draft, verdict: Verdict, hidden: Tensor) -> None:
        self._heard.append(hidden)

    def draft(self, text: Sequence[int], *, room: int, temperature: float, dice: Dice) -> Draft:
        features = torch.cat(self._heard)[None]  # 1 n W
        known = self.cache.seen + features.shape[1]  # the features there are: of all tokens but the last
        if known != len(text) - 1:
            raise ValueError(f"the drafter was told of {known} tokens, and the text has {len(text)}")
        widths = self.widths or (1,) * self.length
        row_of = {ROOT: 0}  # of each node of the level above, its row of `hidden`
        with guessing(self.cache, known):
            hidden = self.model(features, self._ids(text[self.cache.seen + 1 :]), cache=self.cache)[0, -1:]
            self._heard.clear()
            branches = Branches(self.cache) if max(widths) > 1 else self.cache

            def deeper(level: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
                nonlocal hidden, row_of
                if isinstance(branches, Branches):
                    branches.grow(parents)
                above = hidden[[row_of[parent] for parent in parents]]
                hidden = self.model(above[None], self._ids(tokens), cache=branches)[0]
                row_of = {node: row for row, node in enumerate(level)}
                return self.model.logits(hidden)

            def after(row: Tensor, width: int) -> list[Guess]:
                return self._siblings(row, width, temperature, dice)

            return grown(widths[:room], self.model.logits(hidden), deeper=deeper, after=after)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.model.words.device)

    def _siblings(self, logits: Tensor, width: int, temperature: float, dice: Dice) -> list[Guess]:
        """`siblings` over the few words, told in ids and laws of the whole vocabulary."""
        found = siblings(logits, width, ways=self.ways, temperature=temperature, dice=dice)
        return [(int(self.model.words[word]), None if q is None else self._whole(q)) for word, q in found]

    def _whole(self, q: Tensor) -> Tensor:
        return torch.zeros(self.model.shape.vocab, dtype=q.dtype).index_copy_(0, self.model.words.cpu(), q)
