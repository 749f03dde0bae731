"""Big Little Decoder: the small model writes, and the big one is asked only when the small one is unsure. Not lossless.

"Speculative Decoding with Big Little Decoder" (arXiv:2302.07863), section 3, Algorithm 1. Paper -> here: fallback
policy, threshold alpha_FB = `fallback`: the big model takes over when the small one's largest probability is below it;
rollback policy, alpha_RB = `rollback`: where the big model finds one of the small one's words too unlikely, the text
goes back there. Distance d(p_S, p_L) = cross-entropy between the small model's choice and p_L, that is -log p_L(x).

What comes out is the text of neither model: words of the small one stay although the big one would have said another.
rollback = 0 keeps only words of which the big model is sure, infinity keeps all. Deviations: greedy, as in the
experiments; the small model is stopped after `most` words, because a batch of guesses has an end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.caches.full import Full
from engine.generate import TOKEN, checked_ids
from engine.recording import event, labelled, site, step, tap
from engine.speculate.chain import catch_up, guessing, read
from engine.speculate.loop import DRAFT_SECONDS, GIVEN, NODES, OUTCOME, TARGET_SECONDS

if TYPE_CHECKING:
    from engine.model import Decoder

LOSSLESS = False  # told on the page

CONFIDENCE = site("bild.confidence", "largest probability of the small model, word by word", low=0.0, high=1.0)
DISTANCE = site("bild.distance", "surprise of the big model at each word of the small one", symbol="−log p_L(x)",
                low=0.0, unit="nats")  # fmt: skip
SAID_BY = site("bild.by", "who said each token: 0 the small model, 1 the big one", grows="query", low=0.0, high=1.0)


def big_little(
    big: Decoder,
    small: Decoder,
    ids: Tensor | Sequence[int],
    *,
    steps: int,
    fallback: float = 0.6,
    rollback: float = 3.0,
    most: int = 10,
) -> Iterator[int]:
    """Yield `steps` tokens after the prompt `ids`, greedily. A step is one pass of the big model.

    Raises ValueError at the call, not at the first token.
    """
    prompt = checked_ids(ids, min(big.shape.vocab, small.shape.vocab)).tolist()
    if steps < 1:
        raise ValueError(f"steps must be a number of tokens above 0, not {steps}")
    if not 0.0 <= fallback <= 1.0:
        raise ValueError(f"fallback must be a probability, not {fallback}")
    if not rollback >= 0.0:
        raise ValueError(f"rollback must be a distance of 0 nats or above, not {rollback}")
    if most < 1:
        raise ValueError(f"most must be a number of the small model's words above 0, not {most}")
    room = min(big.shape.max_positions, small.shape.max_positions)
    if len(prompt) + steps - 1 > room:
        raise ValueError(f"{len(prompt)} tokens and {steps} new ones do not fit into max_positions={room}")
    return _tokens(big, small, prompt, steps, fallback, rollback, most)


def _tokens(
    big: Decoder, small: Decoder, text: list[int], steps: int, fallback: float, rollback: float, most: int
) -> Iterator[int]:
    seen, aware = Full(), Full()
    left = steps
    while left:
        with torch.inference_mode():
            start = time.perf_counter()
            with labelled(by="draft"):
                words, sure = _small(small, text, aware, fallback=fallback, most=min(most, left - 1))
            drafted = time.perf_counter()
            unread = text[seen.seen :]
            before = len(text)
            with labelled(by="target"):
                rows = read(big, [*unread, *words], seen, last=1 + len(words)).float().log_softmax(-1)
            far = [-float(rows[i, word]) for i, word in enumerate(words)]
            kept = next((i for i, distance in enumerate(far) if distance > rollback), len(words))
            token = int(rows[kept].argmax())
            seen.crop(before + kept)
            tap(DRAFT_SECONDS, drafted - start, "")
            tap(TARGET_SECONDS, time.perf_counter() - drafted, "")
        new = [*words[:kept], token]
        if words:
            tap(NODES, np.array(words, np.int32), "node")
            tap(CONFIDENCE, np.array(sure, np.float32), "node")
            tap(DISTANCE, np.array(far, np.float32), "node")
            tap(OUTCOME, np.array([1] * kept + [2] * (len(words) - kept), np.int8), "node")
        tap(TOKEN, np.array([*unread[1:], *new], np.int64), "query")
        tap(SAID_BY, np.array([0] * kept + [1], np.int8), "query")
        tap(GIVEN, len(new), "")
        event("bild.round", kept=words[:kept], rolled_back=words[kept:], token=token)
        text += new
        left -= len(new)
        yield from new
        step()


def _small(
    model: Decoder, text: Sequence[int], cache: Full, *, fallback: float, most: int
) -> tuple[list[int], list[float]]:
    """What the small model says until it is unsure, and how sure it was of each word."""
    words: list[int] = []
    sure: list[float] = []
    with guessing(cache, len(text)):
        while len(words) < most:
            logits = read(model, words[-1:], cache)[0] if words else catch_up(model, cache, text)
            confidence, word = logits.float().softmax(-1).max(-1)
            if float(confidence) < fallback:
                break
            words.append(int(word))
            sure.append(float(confidence))
    return words, sure
