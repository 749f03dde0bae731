"""Saying one more word, again and again: with a cache, or by reading everything anew.

    for token in generate(model, ids, steps=20, cache=Full()): ...

A recording gets one step a new token: what it took to choose it. The whole prompt is read in step 0; the last new
token is never read. A step ends when the caller asks for the next token, so that what the caller taps about a
token belongs to the same step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.caches import Cache
from engine.caches.recompute import Recompute
from engine.recording import recording_on, site, step, tap

if TYPE_CHECKING:
    from engine.model import Decoder

TOP = 10
ROWS_AT_ONCE = 64  # a row of logits is as long as the vocabulary
PARTS = ("qkv", "scores", "values", "out", "ffn", "head")

TOKEN = site("next.token", "the token that follows each position: of the prompt, then chosen", grows="query")
TOP_IDS = site("next.top.ids", "the ten likeliest next tokens, likeliest first", grows="query")
TOP_PROBABILITY = site("next.top.probability", "their probabilities, at temperature 1", symbol="p", grows="query",
                       low=0.0, high=1.0)  # fmt: skip
ROWS = site("work.rows", "positions computed in this step, in every layer")
MULTIPLICATIONS = site("work.multiplications", f"multiplications of this step's matrix products: {', '.join(PARTS)}")


def generate(
    model: Decoder,
    ids: Tensor | Sequence[int],
    *,
    steps: int,
    cache: Cache | Recompute | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield `steps` new tokens after the prompt `ids`, [N] or [1, N], each as soon as it is chosen.

    `cache` is continued if it has seen tokens; None keeps nothing, and every token costs the whole text again.
    Temperature 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature) by `seed`.
    Raises ValueError at the call, not at the first token.
    """
    prompt = checked_ids(ids, model.shape.vocab).to(model.embed.weight.device)
    if steps < 1:
        raise ValueError(f"steps must be a number of tokens above 0, not {steps}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or a number above, not {temperature}")
    memory = Recompute() if cache is None else cache
    before = memory.seen if isinstance(memory, Cache) else 0
    positions = before + len(prompt) + steps - 1
    if memory.bound is not None:
        positions = min(memory.bound, positions)
    if positions > model.shape.max_positions:
        raise ValueError(
            f"{before + len(prompt)} tokens and {steps} new ones need {positions} positions, "
            f"and the model has max_positions={model.shape.max_positions}"
        )
    return _tokens(model, prompt[None], steps, memory, temperature, torch.Generator().manual_seed(seed))


def checked_ids(ids: Tensor | Sequence[int], vocab: int) -> Tensor:
    """The ids of one text as [N], int64. Raises ValueError for an empty text and for ids outside the vocabulary."""
    ids = torch.as_tensor(ids)
    ids = ids[0] if ids.dim() == 2 and ids.shape[0] == 1 else ids
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be whole numbers, [tokens] with one at least, not {list(ids.shape)} {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"ids must lie between 0 and {vocab - 1}, and run from {low} to {high}")
    return ids.long()


def _tokens(
    model: Decoder, ids: Tensor, steps: int, memory: Cache | Recompute, temperature: float, generator: torch.Generator
) -> Iterator[int]:
    text, count = ids, ids.shape[1]
    for _ in range(steps):
        # Not around the yield: inference mode belongs to the thread, and would leak to whoever asks for tokens.
        with torch.inference_mode():
            logits, hidden = _read(model, text, count, memory)
            token = _choose(logits, temperature, generator)
            text = torch.cat((text, text.new_tensor([[token]])), 1)
            _show(model, text[0, -len(hidden) :], logits, hidden)
        yield token
        step()
        count = 1


def _read(model: Decoder, text: Tensor, count: int, memory: Cache | Recompute) -> tuple[Tensor, Tensor]:
    """The logits [V] after `text` [1, N], and the hidden rows of its new tokens, at most `count`: [rows, W]."""
    if isinstance(memory, Cache):
        hidden = model.hidden(text[:, -count:], cache=memory)[0]
        rows, keys = count, memory.kept(0).shape[-1] if recording_on(MULTIPLICATIONS) else 0
    else:
        rows = keys = memory.rows(text.shape[1])
        hidden = memory.hidden(model, text, show=min(count, rows))[0]
    tap(ROWS, rows, "")
    if recording_on(MULTIPLICATIONS):
        tap(MULTIPLICATIONS, np.array(multiplications(model, rows=rows, keys=keys), np.float64), "part")
    return model.logits(hidden[-1:])[0], hidden


def _show(model: Decoder, following: Tensor, logits: Tensor, hidden: Tensor) -> None:
    tap(TOKEN, following, "query")
    if recording_on(TOP_IDS) or recording_on(TOP_PROBABILITY):
        # The last row comes from the very logits that chose; the others, of a prompt, are computed for show alone.
        top = [_top(model.logits(part)) for part in hidden[:-1].split(ROWS_AT_ONCE)] if len(hidden) > 1 else []
        ids, probability = zip(*top, _top(logits[None]), strict=True)
        tap(TOP_IDS, torch.cat(ids), "query rank")
        tap(TOP_PROBABILITY, torch.cat(probability), "query rank")


def _top(logits: Tensor) -> tuple[Tensor, Tensor]:
    top = logits.float().softmax(-1).topk(min(TOP, logits.shape[-1]), -1)
    return top.indices.int(), top.values


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits.max(-1).indices)  # argmax, five times as fast on the CPU in bfloat16
    probability = (logits.double() / temperature).softmax(-1).cpu()
    return int(torch.multinomial(probability, 1, generator=generator))


def multiplications(model: Decoder, *, rows: int, keys: int) -> list[int]:
    """Multiplications of one pass by PARTS: `rows` positions that each meet `keys` keys, logits for one.

    Counted from the products that the model really has. Of attention the whole rectangle counts, as in the
    formula N²H of the sources; a causal kernel skips up to half of it. Parts that use some of their weights only (a
    mixer's keys, experts) count themselves.
    """
    count = dict.fromkeys(PARTS, 0)
    for block in model.blocks:
        own = getattr(block.ffn, "multiplications", None)
        count["ffn"] += own(rows=rows) if own else 0
        for name, module in block.named_modules():
            if own and name.startswith("ffn."):
                continue
            part = "ffn" if name.startswith("ffn.") else name.removeprefix("mixer.")
            if part in count and hasattr(module, "in_features"):
                count[part] += rows * int(module.in_features) * int(module.out_features)
        meet = getattr(block.mixer, "multiplications", None)
        for part, products in (meet(rows=rows, keys=keys) if meet else {}).items():
            count[part] += products
    count["head"] = model.shape.width * model.shape.vocab
    return [count[part] for part in PARTS]
