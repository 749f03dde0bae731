"""Synthetic text: the teacher writes, the student reads, and no text of the world is needed.

Sequence-level distillation, Kim and Rush (arXiv:1606.07947), section 3.2: train on sequences that the teacher gives.
Paper -> here: ŷ = rows of `ids`; q(s|t) = the teacher's own probabilities, of which each token is a draw.
Shapes: start [P] or [B, P] -> ids [B, T] with the start in front, logp [B, T - P] of each drawn token by
the teacher.
Errors: ValueError for sizes below 1, ids outside the vocabulary, a temperature below 0.
Deviations: texts are drawn rather than found by beam search (temperature 0: the greedy text); `allowed` keeps to part
of the vocabulary, what is left made to sum to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.caches.full import Full
from engine.model import Decoder
from engine.recording import site, tap

CORPUS = site("distil.corpus", "what the teacher wrote: token ids")


@dataclass(frozen=True)
class Corpus:
    """Texts that a teacher wrote. `logits` are its own at each place a token was drawn, if they were kept."""

    ids: Tensor  # B T
    logp: Tensor  # B T-P
    logits: Tensor | None = None  # B T-P V or B T-P allowed

    @property
    def entropy(self) -> float:
        """Mean surprisal under the teacher, nats a token: what a student that copied it would pay."""
        return -float(self.logp.double().mean())


@torch.no_grad()
def write(
    teacher: Decoder,
    start: Tensor,
    *,
    rows: int,
    length: int,
    temperature: float = 1.0,
    seed: int = 0,
    allowed: Tensor | None = None,
    keep_logits: bool = False,
) -> Corpus:
    """`rows` texts of `length` tokens, drawn token by token from the teacher and from nothing else."""
    device = teacher.embed.weight.device
    start = start.to(device)
    ids = start.expand(rows, -1) if start.dim() == 1 else start
    if rows < 1 or not 1 <= ids.shape[1] < length or len(ids) != rows:
        raise ValueError(f"rows and length must be numbers above 0, length above the {ids.shape[-1]} tokens of start, "
                         f"which has a row or rows={rows}, not {list(start.shape)} and length={length}")  # fmt: skip
    if int(ids.min()) < 0 or int(ids.max()) >= teacher.shape.vocab:
        raise ValueError(
            f"start must hold ids from 0 to {teacher.shape.vocab - 1}, not {int(ids.min())}..{int(ids.max())}"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or a number above, not {temperature}")
    if allowed is not None and not len(allowed):
        raise ValueError("allowed must hold a token at least, not none")
    generator = torch.Generator().manual_seed(seed)
    cache, new, logps, kept = Full(), ids, [], []
    for _ in range(length - ids.shape[1]):
        logits = teacher.logits(teacher.hidden(new, cache=cache)[:, -1]).float()  # B V
        if allowed is not None:
            logits = logits[:, allowed.to(device)]  # B allowed
        p = (logits.double() / temperature).softmax(-1) if temperature else None
        chosen = logits.argmax(-1, keepdim=True) if p is None else torch.multinomial(p.cpu(), 1, generator=generator)
        chosen = chosen.to(device)  # B 1
        logps.append(logits.log_softmax(-1).gather(1, chosen))
        if keep_logits:
            kept.append(logits)
        new = chosen if allowed is None else allowed.to(device)[chosen]
        ids = torch.cat((ids, new), 1)
    tap(CORPUS, ids, "text token")
    return Corpus(ids, torch.cat(logps, 1), torch.stack(kept, 1) if keep_logits else None)
