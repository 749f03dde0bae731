"""The texts that the draft learns from: SmolLM2 writes them itself, after prompts of ours.

So they have the target's own law and nobody's licence. Every second text is drawn, the others are greedy, because the
draft will be asked to foretell both. What the target thought at each token is kept: nothing is read a second time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.caches.full import Full
from engine.model import Decoder
from engine.speculate.seeds import seeds

NEW = 192  # tokens that the target writes after each seed prompt
ROWS = 64  # texts written at a time
WARM = 0.8  # temperature of every second text; the others take the likeliest token


@torch.inference_mode()
def make_data(
    model: Decoder,
    encode: Callable[[str], list[int]],
    folder: Path,
    *,
    seconds: float = 1200.0,
    batches: int = 10**6,
    rows: int = ROWS,
    new: int = NEW,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> int:
    """Let `model` write texts after our seed prompts into `folder`, until `seconds` are up; returns the files there.

    A file holds `ids` [rows, T] and `hidden` [rows, T - 1, W], what the model thought when it had read each of them:
    its logits follow from that. Files that are there already are kept, so that a stopped run goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = _batches([encode(prompt) for prompt in seeds(3000, seed=seed)], rows=rows, seed=seed)[:batches]
    began = time.monotonic()
    done = 0
    for number, prompts in enumerate(plan):
        path = folder / f"{number:04}.safetensors"
        if not path.exists():
            if time.monotonic() - began > seconds:
                break
            ids, hidden = write(model, torch.tensor(prompts), new=new, seed=seed + number)
            part = path.with_suffix(".part")
            save_file({"ids": ids.int(), "hidden": hidden.bfloat16()}, part)
            part.replace(path)
        done += 1
        if progress is not None:
            progress(done, time.monotonic() - began)
    return done


def write(model: Decoder, prompts: Tensor, *, new: int, seed: int) -> tuple[Tensor, Tensor]:
    """Go on from prompts [B, N] of one length: ids [B, N + new] and the hidden rows [B, N + new - 1, W].

    Every second text is drawn at temperature WARM, the others are greedy.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = Full(capacity=prompts.shape[1] + new)
    ids = prompts
    parts: list[Tensor] = []
    for _ in range(new):
        unread = ids if not parts else ids[:, -1:]
        parts.append(model.hidden(unread, cache=cache))
        logits = model.logits(parts[-1][:, -1])  # B V
        noisy = logits[1::2].float() / WARM
        # Gumbel's trick: the largest of logit minus log of an exponential number is a draw from the softmax.
        noisy -= torch.empty_like(noisy).exponential_(generator=generator).log_()
        token = logits.max(-1).indices
        token[1::2] = noisy.max(-1).indices
        ids = torch.cat((ids, token[:, None]), 1)
    return ids, torch.cat(parts, 1)


def _batches(prompts: list[list[int]], *, rows: int, seed: int) -> list[list[list[int]]]:
    """Full batches of prompts of equal length, in mixed order."""
    by_length: dict[int, list[list[int]]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt), []).append(prompt)
    groups = [same[i : i + rows] for same in by_length.values() for i in range(0, len(same) - rows + 1, rows)]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    return [groups[i] for i in order]
