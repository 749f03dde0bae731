"""Prompt tuning: words that no vocabulary has, learned and read before the text; the model itself stays as it was.

Lester et al. (arXiv:2104.08691), section 2: [P; X] with a trained P of n embeddings before the embedded text X.
Paper -> here: P_e = `embed.prompt` [n, W]; the n places have the ids -n..-1, which stand for rows of P; the text's own
positions start at n. Logits come for the text alone.
Law: with the embeddings of n tokens as P it is the model reading these tokens first.
Errors: ValueError for n below 1, and for more ids than fit.
Deviations: P starts at embeddings of words drawn from the vocabulary (the paper's "sampled
vocabulary") or of given ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.caches import Cache
from engine.generate import checked_ids
from engine.model import Decoder
from engine.peft import branch
from engine.recording import recording_on, site, tap

PROMPT = site("prompt.embeddings", "the learned words that are read before the text", symbol="P")


class PromptEmbedding(nn.Embedding):
    """An embedding in which the ids -n..-1 are the rows of the prompt."""

    def __init__(self, weight: Tensor, prompt: Tensor) -> None:
        super().__init__(weight.shape[0], weight.shape[1], device="meta")
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.prompt = nn.Parameter(prompt)  # n W

    def forward(self, ids: Tensor) -> Tensor:
        text = F.embedding(ids.clamp(min=0), self.weight)  # B T W
        learned = self.prompt[(ids + len(self.prompt)).clamp(0, len(self.prompt) - 1)]  # B T W
        return torch.where((ids < 0)[..., None], learned, text)


class Prompted(Decoder):
    """A decoder that reads its prompt before the first token of a text."""

    embed: PromptEmbedding

    def hidden(self, ids: Tensor, *, cache: Cache | None = None, show: int | None = None) -> Tensor:
        """The states of the text's own tokens, [B, T, W]. Taps show the learned words too when they show all rows."""
        if (cache is not None and cache.seen) or (ids.numel() and int(ids[0, 0]) < 0):
            return super().hidden(ids, cache=cache, show=show)
        n = len(self.embed.prompt)
        if recording_on(PROMPT):
            tap(PROMPT, self.embed.prompt, "place width")
        places = torch.arange(-n, 0, device=ids.device).expand(len(ids), n)
        return super().hidden(torch.cat((places, ids), 1), cache=cache, show=show)[:, n:]

    def bare(self) -> Decoder:
        """The model without its prompt."""
        plain = nn.Embedding(self.shape.vocab, self.shape.width, device="meta")
        plain.weight = self.embed.weight
        model = Decoder.__new__(Decoder)
        model.__dict__.update(self.__dict__)
        model._modules = {**self._modules, "embed": plain}
        return model


@torch.no_grad()
def attach(model: Decoder, *, n: int = 8, ids: Sequence[int] | Tensor | None = None, seed: int = 0) -> Decoder:
    """A copy of `model` that reads n learned embeddings first. They start as those of `ids` (n of them), or drawn."""
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n < model.shape.max_positions:
        raise ValueError(f"n must be a whole number from 1 to {model.shape.max_positions - 1}, not {n!r}")
    if ids is None:
        chosen = torch.randint(model.shape.vocab, (n,), generator=torch.Generator().manual_seed(seed))
    else:
        chosen = checked_ids(ids, model.shape.vocab)
        if len(chosen) != n:
            raise ValueError(f"ids must be n={n} tokens, not {len(chosen)}")
    twin = branch(model)
    prompted = Prompted.__new__(Prompted)
    prompted.__dict__.update(twin.__dict__)
    start = twin.embed.weight[chosen.to(twin.embed.weight.device)].clone()
    prompted._modules = {**twin._modules, "embed": PromptEmbedding(twin.embed.weight, start)}
    return prompted
