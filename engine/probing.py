"""Asking a memory in the middle of a text: a copy of it reads the question, and the memory itself reads on.

So one can see a fact being written and forgotten: the same question after every sentence, without the questions
becoming part of what is remembered. Questions of one length travel as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.caches.full import Full
from engine.evaluate import Question, Speaks
from engine.model import Decoder


@torch.inference_mode()
def asked_now(model: Decoder, cache: Full, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """The probabilities [N, V] of what follows each of the N questions ids [N, T], asked after what `cache` holds of
    one text. The cache stays as it is."""
    ids = torch.as_tensor(ids, device=model.embed.weight.device)
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"ids must have shape [questions, tokens] with one of each at least, not {list(ids.shape)}")
    hidden = model.hidden(ids, cache=cache.copies(len(ids)))[:, -1]  # N W
    return model.logits(hidden).float().softmax(-1)


@torch.inference_mode()
def asked_together(model: Decoder, tokenizer: Speaks, questions: Sequence[Question]) -> list[bool]:
    """Which questions the model answers right, all in one pass. Their prompts must be of one length, and an answer one
    token: what `engine.evaluate.ask` finds for each of them, sooner."""
    prompts = [tokenizer.prompt(q.prompt) for q in questions]
    wanted = [tokenizer.encode(q.answer) for q in questions]
    lengths = {len(p) for p in prompts}
    if len(lengths) != 1 or any(len(w) != 1 for w in wanted):
        raise ValueError(
            f"questions must have prompts of one length and answers of one token, not lengths {sorted(lengths)} "
            f"and {sorted({len(w) for w in wanted})}"
        )
    ids = torch.tensor(prompts, device=model.embed.weight.device)  # N T
    said = model.logits(model.hidden(ids)[:, -1]).argmax(-1).tolist()
    return [s == w[0] for s, w in zip(said, wanted, strict=True)]
