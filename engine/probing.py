"""Asking a memory in the middle of a text: a copy of it reads the question, and the memory itself reads on.

So one can see a fact being written and forgotten: the same question after every sentence, without the questions
becoming part of what is remembered. Questions of one length travel as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.caches import Cache
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
def asked_together(
    model: Decoder, tokenizer: Speaks, questions: Sequence[Question], *, cache: Cache | None = None
) -> list[bool]:
    """Which questions the model answers right, all in one pass: what `engine.evaluate.ask` finds for each, sooner.
    Their prompts must be of one length, and so must their answers."""
    prompts = [tokenizer.prompt(q.prompt) for q in questions]
    wanted = [tokenizer.encode(q.answer) for q in questions]
    lengths = {(len(p), len(w)) for p, w in zip(prompts, wanted, strict=True)}
    if len(lengths) != 1 or not all(map(min, lengths)):
        raise ValueError(f"questions must have prompts and answers of one length each, not {sorted(lengths)} tokens")
    ids = torch.tensor([p + w[:-1] for p, w in zip(prompts, wanted, strict=True)], device=model.embed.weight.device)
    said = model.logits(model.hidden(ids, cache=cache)[:, -len(wanted[0]) :]).argmax(-1)  # N answer
    return (said == torch.tensor(wanted, device=said.device)).all(1).tolist()
