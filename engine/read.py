"""Reading a text word by word under several cache policies at once, to see what each of them costs in surprise.

The comparison of StreamingLLM (arXiv:2309.17453), figure 1 and table 1. Paper -> here: dense, window, sliding window
with re-computation, StreamingLLM = policies over `Full`, `Window`, `Recompute`, `Sinks`; log PPL = the mean of
`surprisal`; "4"\\n"+1020" of table 2 = a policy with an `opening` of line breaks.

The text is given (teacher forcing): each policy is asked for the next token and then told. All caches read in one
`Lockstep` pass; recomputation reads its window anew, and is the slow one. One step a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.caches import Cache, View
from engine.caches.full import Full
from engine.caches.lockstep import Lockstep
from engine.caches.recompute import Recompute
from engine.evaluate import SURPRISAL
from engine.generate import checked_ids
from engine.mixers.rope import Rope
from engine.model import Decoder
from engine.recording import labelled, recording_on, site, step, tap

KEPT = site("cache.kept", "text positions of the tokens that can be seen, slot by slot")
FIRST = site("attention.first", "attention paid to the oldest token that can be seen", low=0.0, high=1.0)
RESIDUAL_FIRST = site("residual.first", "length of the residual of the first token, entering each block", low=0.0)
RESIDUAL_NOW = site("residual.now", "length of the residual of the token being read, entering each block", low=0.0)
READ_ROWS = site("read.rows", "positions computed to read this token")
READ_SCORES = site("read.scores", "query-key products of one head of one layer to read this token")


@dataclass(frozen=True)
class Policy:
    """What is remembered while reading; `opening` takes the place of the text's first tokens."""

    memory: Cache | Recompute
    opening: tuple[int, ...] = ()


class _Watch(Cache):
    """Passes all to the cache inside, and keeps what a picture of attention sinks needs from one pass."""

    def __init__(self, inside: Cache, *, watches: bool) -> None:
        super().__init__()
        self.inside, self.shows = inside, watches
        self.watches = watches or inside.watches
        self.first: list[Tensor] = []  # per layer: N H
        self.residual_first: list[Tensor] = []  # per layer: N
        self.residual_now: list[Tensor] = []  # per layer: N

    def extend(self, layer: int, k: Tensor, v: Tensor, rope: Rope) -> View:
        return self.inside.extend(layer, k, v, rope)

    def observe(self, layer: int, pattern: Tensor) -> None:
        if self.inside.watches:
            self.inside.observe(layer, pattern)
        if self.shows:
            self.first.append(pattern[:, :, -1, 0])

    def observe_residual(self, layer: int, x: Tensor) -> None:
        if self.inside.watches:
            self.inside.observe_residual(layer, x)
        if not self.shows:
            return
        wide = torch.promote_types(x.dtype, torch.float32)
        self.residual_first.append(torch.linalg.vector_norm(x[:, 0], dim=-1, dtype=wide))
        self.residual_now.append(torch.linalg.vector_norm(x[:, -1], dim=-1, dtype=wide))

    def advance(self, count: int) -> None:
        self.inside.advance(count)

    def show(self, row: int, *, first: bool) -> None:
        """Tap what row `row` saw. `first` tells whether the pass held the first token itself."""
        if not self.shows:
            return
        tap(FIRST, torch.stack(self.first, 1)[row], "layer head")
        tap(RESIDUAL_NOW, torch.stack(self.residual_now, 1)[row], "layer")
        if first:
            tap(RESIDUAL_FIRST, torch.stack(self.residual_first, 1)[row], "layer")


def read(
    model: Decoder,
    ids: Tensor | Sequence[int],
    policies: Mapping[str, Policy],
    *,
    on_token: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """The surprisal in nats of tokens 1, 2, ... of `ids` [T] under each policy; the first token has none.

    At step t each policy reads token t: `surprisal` says how little that token was expected (NaN at step 0), the
    other taps what reading it looked like. `residual.first` is tapped where the first token is read: at step 0,
    and at every step by recomputation, whose window starts with a new first token each time.
    Tokens of an opening count as the text that came; compare policies after it. `on_token(t)` is called at the end
    of each step, and may tap into it.
    """
    ids = checked_ids(ids, model.shape.vocab)
    texts = _texts(model, ids, policies)  # policy -> T
    cached = {name: policy.memory for name, policy in policies.items() if isinstance(policy.memory, Cache)}
    for name, cache in cached.items():
        cache.name = name
    lockstep = Lockstep(list(cached.values())) if cached else None
    surprisals: dict[str, list[float]] = {name: [] for name in policies}
    for t in range(len(ids)):
        logits: dict[str, Tensor] = {}
        with torch.inference_mode():
            if lockstep is not None:
                column = torch.stack([texts[name][t : t + 1] for name in cached])  # N 1
                logits.update(_read_cached(model, column, cached, lockstep, t))
            for name, policy in policies.items():
                if isinstance(policy.memory, Recompute):
                    logits[name] = _read_anew(model, texts[name][None, : t + 1], name, policy.memory)
            for name, row in logits.items():
                with labelled(strategy=name):
                    tap(SURPRISAL, np.array([surprisals[name][-1] if t else np.nan], np.float32), "query")
                if t + 1 < len(ids):
                    surprisals[name].append(-float(row.float().log_softmax(-1)[texts[name][t + 1]]))
        if on_token is not None:
            on_token(t)
        step()
    return surprisals


def _texts(model: Decoder, ids: Tensor, policies: Mapping[str, Policy]) -> dict[str, Tensor]:
    """The tokens [T] that each policy reads, checked."""
    if len(ids) < 2:
        raise ValueError("ids must hold two tokens at least: the first has no surprisal")
    if not policies:
        raise ValueError("policies must name at least one policy, and it is empty")
    texts = {}
    for name, policy in policies.items():
        memory, limit = policy.memory, model.shape.max_positions
        if isinstance(memory, Cache) and memory.seen:
            raise ValueError(f"policies[{name!r}] must come with a fresh cache, and it has seen {memory.seen} tokens")
        bound = len(ids) if memory.bound is None else min(memory.bound, len(ids))
        if bound > limit:
            raise ValueError(f"policies[{name!r}] needs {bound} positions, and the model has max_positions={limit}")
        if len(policy.opening) >= len(ids):
            raise ValueError(f"policies[{name!r}].opening must be shorter than the text of {len(ids)} tokens")
        text = torch.cat((ids.new_tensor(policy.opening), ids[len(policy.opening) :]))
        texts[name] = checked_ids(text, model.shape.vocab).to(model.embed.weight.device)
    return texts


def _read_cached(
    model: Decoder, column: Tensor, cached: Mapping[str, Cache], lockstep: Lockstep, t: int
) -> dict[str, Tensor]:
    """The logits [V] of each cached policy after its next token, `column` [N, 1]."""
    watch = _Watch(lockstep, watches=_wanted(cached))
    rows = model.logits(model.hidden(column, cache=watch)[:, -1])  # N V
    for i, (name, cache) in enumerate(cached.items()):
        with labelled(strategy=name):
            watch.show(i, first=t == 0)
            kept = cache.kept(0)
            tap(KEPT, kept.int(), "slot" if kept.dim() == 1 else "head slot")
            tap(READ_ROWS, 1, "")
            tap(READ_SCORES, kept.shape[-1], "")
    return dict(zip(cached, rows, strict=True))


def _read_anew(model: Decoder, text: Tensor, name: str, memory: Recompute) -> Tensor:
    """The logits [V] after `text` [1, t + 1], reading its last tokens from scratch."""
    count = text.shape[1]
    rows = memory.rows(count)
    watch = _Watch(Full(capacity=rows), watches=_wanted([name]))
    hidden = memory.hidden(model, text, cache=watch)  # 1 1 W
    with labelled(strategy=name):
        watch.show(0, first=True)
        tap(KEPT, torch.arange(count - rows, count, dtype=torch.int32), "slot")
        tap(READ_ROWS, rows, "")
        tap(READ_SCORES, rows * (rows + 1) // 2, "")
    return model.logits(hidden[:, -1])[0]


def _wanted(names: Mapping[str, Cache] | list[str]) -> bool:
    sites = (FIRST, RESIDUAL_FIRST, RESIDUAL_NOW)
    return any(recording_on(name, strategy=strategy) for name in sites for strategy in names)
