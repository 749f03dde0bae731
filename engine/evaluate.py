"""How good a model is at reading: surprisal and perplexity, recall, and a passkey hidden in filler.

Surprisal of a token is −ln p(token | those before), in nats; perplexity is e to its mean. All measures take a
cache, so that one question can be put to a model that remembers everything and to one that forgets.

Passkey: Mohtashami and Jaggi 2023 (arXiv:2305.16300), appendix; the words are theirs, the depth is a parameter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.caches import Cache
from engine.caches.recompute import Recompute
from engine.model import Decoder
from engine.recording import site, tap

SURPRISAL = site(
    "surprisal", "how little the model expected this token (NaN: nothing came before)", symbol="−ln p", grows="query",
    low=0.0, unit="nats",
)  # fmt: skip

Reader = Cache | Recompute | None
"""How a text is read: with a cache, by recomputing a window for every token, or (None) all in one pass."""


class Speaks(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def prompt(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@torch.inference_mode()
def states(model: Decoder, ids: Tensor, *, cache: Reader = None, chunk: int = 256, start: int = 0) -> Iterator[Tensor]:
    """The last hidden states of ids [B, T] from token `start` on, [B, tokens, W] at a time.

    With a cache, `chunk` tokens are read at a time; without one, all in one pass; recomputing, every token after
    the first window has a pass of its own (a batch row each). Whatever lies before `start` is read if it must be.
    """
    B, T = ids.shape
    if isinstance(cache, Cache):
        for at in range(0, T, chunk):
            hidden = model.hidden(ids[:, at : at + chunk], cache=cache)[:, max(0, start - at) :]
            if hidden.shape[1]:
                yield hidden
        return
    size = T if cache is None or cache.size is None else min(cache.size, T)
    if start < size:
        # Reading the first window anew for each of its tokens gives the rows of reading it once.
        yield from model.hidden(ids[:, :size])[:, start:].split(chunk, 1)
    windows = ids.unfold(1, size, 1)[:, max(1, start - size + 1) :]  # B N L
    for part in windows.split(max(1, chunk // size), 1) if size < T else ():
        yield model.hidden(part.reshape(-1, size))[:, -1].view(B, part.shape[1], -1)


@torch.inference_mode()
def surprisals(model: Decoder, ids: Tensor, *, cache: Reader = None, chunk: int = 256) -> Iterator[Tensor]:
    """Read ids [B, T] and yield, about `chunk` tokens at a time, the surprisal [B, tokens] of each token read.

    The first token of a text, which nothing predicts, is NaN.
    """
    if ids.dim() != 2 or not ids.shape[1]:
        raise ValueError(f"ids must have shape [batch, tokens] with a token at least, not {list(ids.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be a number of tokens above 0, not {chunk}")
    before = None  # the hidden state of the last token read, B 1 W: it predicts the next
    at = 0
    for hidden in states(model, ids, cache=cache, chunk=chunk):
        count = hidden.shape[1]
        predicting = hidden[:, :-1] if before is None else torch.cat([before, hidden[:, :-1]], 1)
        targets = ids[:, at + count - predicting.shape[1] : at + count]  # B C, or B C-1 the first time
        logits = model.logits(predicting)  # B C V
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = wide.logsumexp(-1) - wide.gather(-1, targets[..., None])[..., 0]
        if before is None:
            nats = torch.cat([nats.new_full((len(ids), 1), torch.nan), nats], 1)
        before = hidden[:, -1:]
        at += count
        yield tap(SURPRISAL, nats, "batch query")


def surprisal(model: Decoder, ids: Tensor, *, cache: Reader = None, chunk: int = 256) -> Tensor:
    """Nats of each token of ids [T] or [B, T] given those before: [T-1] or [B, T-1], the first token left out."""
    rows = ids if ids.dim() == 2 else ids[None]
    nats = torch.cat(list(surprisals(model, rows, cache=cache, chunk=chunk)), 1)[:, 1:]
    return nats if ids.dim() == 2 else nats[0]


def perplexity(nats: Tensor) -> float:
    """e to the mean surprisal: how many equally likely tokens the model hesitates between."""
    if not nats.numel():
        raise ValueError("perplexity needs the surprisal of one token at least")
    return float(nats.double().mean().exp())


def running_perplexity(nats: Tensor) -> Tensor:
    """The perplexity of all tokens up to each, along the last axis."""
    counts = torch.arange(1, nats.shape[-1] + 1, device=nats.device)
    return (nats.double().cumsum(-1) / counts).exp()


@dataclass(frozen=True)
class Question:
    """A prompt and the continuation that answers it.

    `fact` is the range of the prompt's tokens that hold the answer, where known: a cache that has evicted them
    can only guess.
    """

    prompt: str
    answer: str
    fact: range | None = None


@dataclass(frozen=True)
class Answer:
    """What a model said. `nats` is the surprisal of the right answer, summed over its tokens."""

    text: str
    right: bool
    nats: float


@torch.inference_mode()
def ask(model: Decoder, tokenizer: Speaks, question: Question, *, cache: Reader = None, chunk: int = 256) -> Answer:
    """Let the model continue the prompt greedily, for as many tokens as the right answer has.

    The right answer is fed whatever the model says, so that one pass does: `right` is exactly what free greedy
    decoding would find, and after a first slip `text` is what the model says given the truth so far.
    """
    prompt, wanted = tokenizer.prompt(question.prompt), tokenizer.encode(question.answer)
    if not prompt or not wanted:
        raise ValueError(f"a question needs a prompt and an answer, not {question.prompt!r} and {question.answer!r}")
    ids = torch.tensor([prompt + wanted[:-1]], device=next(model.parameters()).device)  # 1 T
    hidden = torch.cat(list(states(model, ids, cache=cache, chunk=chunk, start=len(prompt) - 1)), 1)  # 1 A W
    scores = model.logits(hidden)[0].float().log_softmax(-1)  # A V
    said = scores.argmax(-1).tolist()
    nats = -float(scores.gather(-1, torch.tensor(wanted, device=ids.device)[:, None]).sum())
    return Answer(tokenizer.decode(said), said == wanted, nats)


def recall(
    model: Decoder, tokenizer: Speaks, questions: Iterable[Question], *, cache: Callable[[], Reader] | None = None
) -> float:
    """The share of questions that the model answers word for word, each with a new cache."""
    answers = [ask(model, tokenizer, q, cache=cache() if cache else None) for q in questions]
    if not answers:
        raise ValueError("recall needs one question at least")
    return sum(answer.right for answer in answers) / len(answers)


def passkey(tokenizer: Speaks, *, tokens: int, depth: float, seed: int, digits: int = 5) -> Question:
    """A number told at `depth` (0: start, 1: end) of about `tokens` tokens of filler, and asked for at the end.

    `fact` are the tokens that tell it, so that one can see whether a cache still holds any. The question ends with
    the space before the number: only digits are judged.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be between 0 and 1, not {depth}")
    if digits < 1:
        raise ValueError(f"digits must be a number above 0, not {digits}")
    key = str(random.Random(seed).randrange(10 ** (digits - 1), 10**digits))
    told = f" The pass key is {key}. Remember it. {key} is the pass key."
    begin = "There is important info hidden inside a lot of irrelevant text. Find it and memorize it."
    filler = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    end = " What is the pass key? The pass key is "
    fixed = sum(len(tokenizer.encode(part)) for part in (begin, told, end))
    repeats = (tokens - fixed) // len(tokenizer.encode(filler))
    if repeats < 1:
        raise ValueError(f"tokens must be at least {fixed + len(tokenizer.encode(filler))}, not {tokens}")
    above = round(depth * repeats)
    head = begin + filler * above
    fact = range(len(tokenizer.prompt(head)), len(tokenizer.prompt(head + told)))
    return Question(head + told + filler * (repeats - above) + end, key, fact)
