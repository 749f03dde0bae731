"""Who calls which expert: words and topics by expert, and how uneven the calls are.

Mixtral (arXiv:2401.04088), section 5, looks for experts of topics and finds experts of syntax; Switch
(arXiv:2101.03961) and GShard (arXiv:2006.16668) balance loads because routers collapse. All is counted from the taps
of `experts`, on texts that are read once. A call is what was asked for: a token that calls two experts counts in both.
Shapes: ids [B, T]; calls [N, E] for the N = B·T tokens; counts [E, C]; loads [..., E].
Errors: ValueError for a model without experts, labels that do not fit, loads with nothing in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.model import Decoder
from engine.moe.experts import CHOSEN
from engine.recording import record
from engine.toyland import Grammar, batch
from engine.toyland.words import TOPICS


def calls(model: Decoder, ids: Tensor) -> dict[int, Tensor]:
    """Which experts each token of ids [B, T] calls, by layer: bool [B·T, E] on the CPU."""
    # A recorder of its own: what is counted is what is tapped, and an outer recording is left alone.
    with torch.inference_mode(), record(keep={CHOSEN: {}}, budget=2**40) as recorder:
        model.hidden(ids)
    tracks = {int(track.index["layer"]): track for track in recorder.freeze().tracks}
    if not tracks:
        raise ValueError("model must have a layer of experts at least, and it has none")
    return {i: torch.from_numpy(np.concatenate([c.array for c in track.chunks])) for i, track in tracks.items()}


def counted(calls: Tensor, labels: Tensor, *, classes: int) -> Tensor:
    """How often each expert was called by tokens of each class: int64 [E, classes], for `labels` of as many tokens.

    With token ids as labels and the vocabulary as classes, these are the words of each expert.
    """
    labels = labels.flatten().cpu()
    if len(labels) != len(calls):
        raise ValueError(f"labels must name a class for each of the {len(calls)} tokens, not for {len(labels)}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels must lie between 0 and {classes - 1}, not {int(labels.min())}..{int(labels.max())}")
    return torch.zeros(calls.shape[1], classes, dtype=torch.long).index_add_(1, labels, calls.T.long())


@dataclass(frozen=True)
class Favourite:
    """A word of an expert: how often it called it, and what share of all the word's calls that is."""

    word: str
    count: int
    share: float


def favourites(counts: Tensor, words: Sequence[str], *, top: int = 8, least: int = 5) -> list[list[Favourite]]:
    """For each expert of counts [E, V] the `top` words that call it most surely, of those that call `least` times."""
    if counts.shape[1] != len(words):
        raise ValueError(f"words must be {counts.shape[1]}, one a column of counts, not {len(words)}")
    if top < 1 or least < 1:
        raise ValueError(f"top and least must be above 0, not {top} and {least}")
    shares = counts / counts.sum(0).clamp(min=1)
    found = []
    for count, share in zip(counts.tolist(), shares.tolist(), strict=True):
        best = sorted((v for v in range(len(words)) if count[v] >= least), key=lambda v: (-share[v], -count[v], v))
        found.append([Favourite(words[v], count[v], share[v]) for v in best[:top]])
    return found


def told_by(counts: Tensor) -> float:
    """How much of the choice of an expert the class alone tells: mutual information over the entropy of the choice.

    0: experts do not care about the class; 1: the class decides. 0 when one expert takes all, for nothing is chosen.
    """
    p = counts.double() / _total(counts.sum())
    expert, label = p.sum(1, keepdim=True), p.sum(0, keepdim=True)
    told = float((p * (p / (expert * label)).log()).nansum())
    free = -float((expert * expert.log()).nansum())
    return told / free if free else 0.0


def evenness(load: Tensor) -> Tensor:
    """The entropy of loads [..., E] over its highest value ln E: 1 when all are called alike, 0 when one alone is."""
    share = load.double() / _total(load.sum(-1, keepdim=True))
    return -torch.special.xlogy(share, share).sum(-1) / math.log(max(2, load.shape[-1]))


def busiest(load: Tensor) -> Tensor:
    """The share of calls that go to the busiest expert of loads [..., E]: 1/E when even, 1 when collapsed."""
    return load.amax(-1).double() / _total(load.sum(-1))


def topic_text(topic: str | None, *, tokens: int, seed: int = 0, rows: int = 1) -> Tensor:
    """Toyland's filler and secrets on one topic, or on a new one in every story (None): ids [rows, tokens]."""
    if topic is not None and topic not in TOPICS:
        raise ValueError(f"topic must be one of {', '.join(TOPICS)}, or None for all, not {topic!r}")
    told = dict(TOPICS) if topic is None else {topic: TOPICS[topic]}
    return batch(Grammar(topics=told).only("secret"), seed=seed, step=0, rows=rows, length=tokens, stream="topic").ids


def by_topic(model: Decoder, *, tokens: int, seed: int = 0) -> Mapping[int, Tensor]:
    """How often each expert is called in texts on each topic, by layer: int64 [E, topics], in the order of TOPICS."""
    texts = torch.cat([topic_text(topic, tokens=tokens, seed=seed) for topic in TOPICS])  # topics T
    labels = torch.arange(len(TOPICS))[:, None].expand(texts.shape)
    found = calls(model, texts.to(model.embed.weight.device))
    return {i: counted(c, labels, classes=len(TOPICS)) for i, c in found.items()}


def _total(total: Tensor) -> Tensor:
    if not bool((total > 0).all()):
        raise ValueError("load must hold a call at least, and one is all 0")
    return total
