"""Several caches on one prompt: how far each one's predictions move, where its text parts, what it still knows.

The measures of lesson 13 for H2O (arXiv:2306.14048) and its like. Divergence: KL(full || policy) of the next-token
distribution, both after the same text, so that the cache alone makes the difference. The text is the prompt and what
the full cache says after it; while a policy would say the same it writes the same text, so that the first token where
it would not is where the texts part. From there on it also writes its own text, with a copy of its cache.

All caches read in one `Lockstep` pass a token, prompt and all. One step a token read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.caches import Cache
from engine.caches.lockstep import Lockstep
from engine.evaluate import Answer, Question, Reader, Speaks, ask
from engine.generate import checked_ids
from engine.model import Decoder
from engine.recording import labelled, site, step, tap

KL = site("compare.kl", "how far the next-token distribution is from that of the full cache after the same text",
          symbol="KL(full‖policy)", low=0.0, unit="nats")  # fmt: skip
SAYS = site("compare.token", "the token a cache would say next after the text of the full cache")
OWN = site("compare.own", "the token that follows in a cache's own text (the prompt's while it is read)")
HELD = site("compare.held", "tokens held by a head, layer by layer")


@dataclass(frozen=True)
class Course:
    """What one policy did: `kl` in nats after each token read, its own greedy `text`, and `parts`, the first place
    in it where it differs from the full one's (None: nowhere)."""

    kl: list[float]
    text: list[int]
    parts: int | None


@torch.inference_mode()
def compare(
    model: Decoder,
    ids: Tensor | Sequence[int],
    policies: Mapping[str, Cache],
    *,
    steps: int,
    full: str = "full",
    on_token: Callable[[int], None] | None = None,
) -> dict[str, Course]:
    """Read the prompt `ids` [N] with every cache, then decode `steps` tokens greedily.

    `policies[full]` is the yardstick. `on_token(t)` is called at the end of each step, and may tap into it. The last
    new token is never read.
    """
    ids = checked_ids(ids, model.shape.vocab).to(model.embed.weight.device)
    _check(model, len(ids), policies, steps, full)
    prompt: list[int] = ids.tolist()
    rows = dict(policies)  # row -> cache; own texts come later
    for name, cache in rows.items():
        cache.name = name
    coming = dict.fromkeys(rows, prompt[0])  # row -> the token that it reads next
    kl: dict[str, list[float]] = {name: [] for name in policies}
    texts: dict[str, list[int]] = {name: [] for name in policies}
    parts: dict[str, int | None] = dict.fromkeys(policies)
    lockstep = Lockstep(list(rows.values()))
    for t in range(len(prompt) + steps - 1):
        column = ids.new_tensor([[token] for token in coming.values()])  # rows 1
        wide = torch.promote_types(model.embed.weight.dtype, torch.float32)
        logits = model.logits(model.hidden(column, cache=lockstep)[:, -1]).to(wide)  # rows V
        says = dict(zip(rows, logits.argmax(-1).tolist(), strict=True))
        nats = dict(zip(rows, logits.log_softmax(-1), strict=True))
        coming = dict.fromkeys(rows, prompt[t + 1] if t + 1 < len(prompt) else says[full])
        for name in policies:
            own = _own(name) if _own(name) in rows else name
            kl[name].append(_divergence(nats[full], nats[name]))
            if t + 1 >= len(prompt):
                if parts[name] is None and says[name] != says[full]:
                    parts[name] = len(texts[name])
                    rows[_own(name)] = copy.deepcopy(policies[name])
                    rows[_own(name)].name = _own(name)
                texts[name].append(says[own])
                if _own(name) in rows:
                    coming[_own(name)] = says[own]
            with labelled(strategy=name):
                tap(KL, kl[name][-1], "")
                tap(SAYS, says[name], "")
                tap(OWN, texts[name][-1] if texts[name] else prompt[t + 1], "")
                tap(HELD, torch.tensor([policies[name].kept(i).shape[-1] for i in range(model.shape.layers)]), "layer")
        if len(rows) > len(lockstep.caches):
            lockstep = Lockstep(list(rows.values()))
        if on_token is not None:
            on_token(t)
        step()
    return {name: Course(kl[name], texts[name], parts[name]) for name in policies}


@dataclass(frozen=True)
class Found:
    """What a policy answered, and the share of the fact's tokens that its heads still held when asked."""

    answer: Answer
    held: float


def ask_each(
    model: Decoder, tokenizer: Speaks, question: Question, policies: Mapping[str, Callable[[], Reader]]
) -> dict[str, Found]:
    """Put one question (a passkey, say) to each policy, each with a new cache."""
    if not policies:
        raise ValueError("policies must name at least one policy, and it is empty")
    found = {}
    for name, make in policies.items():
        cache = make()
        answer = ask(model, tokenizer, question, cache=cache)
        held = torch.nan
        if isinstance(cache, Cache) and question.fact is not None:
            held = sum(held_share(cache.kept(i), question.fact) for i in range(model.shape.layers)) / model.shape.layers
        found[name] = Found(answer, held)
    return found


def held_share(kept: Tensor, fact: range) -> float:
    """The share of the positions `fact` among those kept, [S] or [H_kv, S], head by head."""
    if not len(fact):
        raise ValueError("fact must hold a position at least, and it is empty")
    heads = kept if kept.dim() > 1 else kept[None]
    return float(((heads >= fact.start) & (heads < fact.stop)).sum()) / (len(fact) * len(heads))


def _own(name: str) -> str:
    return f"{name}, own text"


def _divergence(full: Tensor, other: Tensor) -> float:
    """KL(full || other) of two rows of log-probabilities, in nats. Rounding makes none below 0."""
    # A token that even the full cache rules out adds nothing, and -inf - -inf would be no number.
    return max(0.0, float(torch.where(full.exp() > 0, full.exp() * (full - other), 0.0).double().sum()))


def _check(model: Decoder, count: int, policies: Mapping[str, Cache], steps: int, full: str) -> None:
    if full not in policies:
        raise ValueError(f"policies must name {full!r}, the yardstick, and names {', '.join(policies) or 'nothing'}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a number of tokens above 0, not {steps!r}")
    for name, cache in policies.items():
        if cache.seen:
            raise ValueError(f"policies[{name!r}] must come with a fresh cache, and it has seen {cache.seen} tokens")
        need, limit = count + steps - 1, model.shape.max_positions
        need = need if cache.bound is None else min(cache.bound, need)
        if need > limit:
            raise ValueError(f"policies[{name!r}] needs {need} positions, and the model has max_positions={limit}")
