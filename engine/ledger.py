"""What a lean model takes, and what it still can: the figures of one row of a ledger, measured on the model itself.

Shapes: ids [B, T]; `answers` bool [B, T], true at tokens that answer a question. Perplexity is over all tokens but the
first of each text, read with the lean model's own cache; recall is the share of answers that come first. Bytes are
counted as a file would hold the weights, and as the cache really holds one text after reading it (engine/stack.py).
Paces are measured in turns, so that other work slows all alike.
Errors: ValueError where nothing is asked, and what `engine.stack` raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from engine.evaluate import states
from engine.recording import site, tap
from engine.stack import Lean, cache_bytes
from engine.timing import in_turns

HELD = site("ledger.held", "bytes that the cache holds of one text, after reading it", unit="B", low=0.0)
NATS = site("ledger.nats", "mean surprisal of the texts", symbol="−ln p", unit="nats", low=0.0)
RIGHT = site("ledger.right", "share of the answers that come first", low=0.0, high=1.0)


@dataclass(frozen=True)
class Judged:
    """What reading came to; `keys` are the tokens that the last one met, `bytes` what the cache held of each text."""

    perplexity: float
    recall: float
    bytes: float
    keys: int


@torch.inference_mode()
def judge(lean: Lean, ids: Tensor, *, answers: Tensor | None = None, chunk: int = 64) -> Judged:
    """Read ids with a new cache, `chunk` tokens at a time. Recall is not a number without `answers`."""
    if ids.dim() != 2 or ids.shape[1] < 2:
        raise ValueError(f"ids must have shape [texts, tokens] with two tokens at least, not {list(ids.shape)}")
    if answers is not None and not bool(answers[:, 1:].any()):
        raise ValueError("answers must name a token at least that something comes before")
    ids = ids.to(lean.model.embed.weight.device)
    cache = lean.cache()
    nats, hits, at = 0.0, [], 0
    before: Tensor | None = None
    for hidden in states(lean.model, ids, cache=cache, chunk=chunk):
        predicting = hidden[:, :-1] if before is None else torch.cat((before, hidden[:, :-1]), 1)  # B C W
        before, at = hidden[:, -1:], at + hidden.shape[1]
        if not predicting.shape[1]:
            continue
        logits = lean.model.logits(predicting).float()  # B C V
        targets = ids[:, at - predicting.shape[1] : at]
        nats += float((logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]).double().sum())
        hits.append(logits.argmax(-1) == targets)
    right = torch.cat(hits, 1).cpu()  # B T-1
    mean = nats / right.numel()
    recall = math.nan
    if answers is not None:
        recall = float(right[answers[:, 1:].cpu()].double().mean())
    tap(NATS, mean, "")
    tap(RIGHT, recall, "")
    held = tap(HELD, cache_bytes(lean, cache, rows=len(ids)), "")
    return Judged(math.exp(mean), recall, held, cache.kept(0).shape[-1])


def paces(leans: Mapping[str, Lean], ids: Sequence[int], *, chunk: int = 8, rounds: int = 3) -> dict[str, float]:
    """Tokens a second of each after the prompt `ids`, `chunk` tokens a turn; the first turn, which reads it, does not
    count."""

    def turn(lean: Lean) -> Callable[[], object]:
        said = lean.say(ids, steps=chunk * (rounds + 1))
        return lambda: [said() for _ in range(chunk)]

    taken = in_turns({name: turn(lean) for name, lean in leans.items()}, rounds=rounds, rotate=True)
    return {name: chunk / median(seconds) for name, seconds in taken.items()}
