"""Train several tuned copies of one model side by side, each on the same texts, a step of the recording a step of all.

AdamW (arXiv:1711.05101) without weight decay, the rate falling in a straight line to nothing, gradients clipped at
length 1. Each method has a rate of its own (`RATES`), since few parameters need longer steps than many.
A recorder's on_step may raise to stop the run; record with keep={"tune.*": {}}, or the attention of every training
pass is kept too. Build the models outside of `torch.inference_mode`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from engine.checkpoints import TextTokens
from engine.model import Decoder
from engine.peft import adapter, bitfit, full, lora, prompt, qlora, trainable, trained_count
from engine.peft.habits import Score, Teaching, score
from engine.recording import recording_on, site, step, tap
from engine.toyland import Batch

LOSS = site("tune.loss", "mean surprisal of the batch of this step, before the step", symbol="L", low=0.0, unit="nats")
FLOOR = site("tune.floor", "the same under the process that wrote the texts", low=0.0, unit="nats")
NEW = site("tune.new", "mean surprisal of unseen texts of the new task", low=0.0, unit="nats")
RIGHT = site("tune.right", "share of the taught words that come first", low=0.0, high=1.0)
OLD = site("tune.old", "mean surprisal of texts of the old task: what rises is forgotten", low=0.0, unit="nats")

METHODS = ("full", "bitfit", "adapter", "prompt", "lora", "qlora")
RATES = {"full": 1e-3, "bitfit": 3e-2, "adapter": 3e-2, "prompt": 1e-1, "lora": 1e-2, "qlora": 1e-2}
"""Learning rates for the toy: best of three on unseen texts of the style "pirate", after 60 steps (LoRA's after 80,
with fused projections). LoRA beside all matrices; beside q and v alone 3e-2 is better (1.64 nats against 1.92)."""
REAL_RATES = {"bitfit": 3e-3, "adapter": 3e-3, "prompt": 1e-1, "lora": 3e-3, "qlora": 3e-3}
"""The same for SmolLM2 and a refrain after plain sentences, 16 steps of two rows, best of two or three; for adapters
and for LoRA beside all matrices no other was tried (it is 4-bit LoRA's). BitFit at 1e-3 read unseen sentences a little
better, and forgot less, but did not speak like a pirate when asked."""


def make(
    name: str,
    model: Decoder,
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    bottleneck: int = 8,
    n: int = 8,
    seed: int = 0,
    store: str = "nf4",
) -> Decoder:
    """A copy of `model` tuned by the method called `name`, ready to train. BitFit is given biases where it has none.
    `targets` None: those that the method takes by itself."""
    beside: dict[str, Any] = {"rank": rank, "alpha": alpha, "seed": seed} | ({"targets": targets} if targets else {})
    makers: dict[str, Callable[[], Decoder]] = {
        "full": lambda: full(model),
        "bitfit": lambda: bitfit.attach(_biased(model)),
        "adapter": lambda: adapter.attach(model, bottleneck=bottleneck, seed=seed),
        "prompt": lambda: prompt.attach(model, n=n, seed=seed),
        "lora": lambda: lora.attach(model, **beside),
        "qlora": lambda: qlora.attach(model, store=store, **beside),
    }
    if name not in makers:
        raise ValueError(f"name must be one of {', '.join(makers)}, not {name!r}")
    return makers[name]()


@dataclass(frozen=True)
class Outcome:
    """What a method made of it: the new task and the old one, before and after."""

    trained: int
    seconds: float
    new_before: Score
    new_after: Score
    old_before: Score
    old_after: Score

    @property
    def forgot(self) -> float:
        """Nats a token that the old task got worse."""
        return self.old_after.loss - self.old_before.loss


def tune(
    models: Mapping[str, Decoder],
    habit: Teaching,
    tokenizer: TextTokens,
    *,
    old: Batch,
    steps: int = 60,
    rows: int = 8,
    length: int = 40,
    seed: int = 0,
    rates: Mapping[str, float] = RATES,
    look: int = 10,
    unseen_rows: int = 16,
    progress: Callable[[int, int], None] | None = None,
    after: Callable[[int], None] | None = None,
) -> dict[str, Outcome]:
    """Train the trainable parameters of every model in place, and measure. `look`: steps between two measurements
    for the curves of unseen texts (while recording; 0: none). `after` is called with the number of each step before
    it ends, and may tap."""
    for name, value in (("steps", steps), ("rows", rows), ("unseen_rows", unseen_rows)):
        if value < 1:
            raise ValueError(f"{name} must be a number above 0, not {value}")
    for name, model in models.items():
        if name not in rates:
            raise ValueError(f"rates must have one for each model, and lack {name!r}")
        if not trainable(model):
            raise ValueError(f"models must have something to train, and {name!r} has nothing")
    unseen = habit.batch(tokenizer, rows=unseen_rows, length=length, seed=seed, step=0, stream="unseen")
    before = {name: (score(model, unseen), score(model, old)) for name, model in models.items()}
    seconds = dict.fromkeys(models, 0.0)
    optimisers = {
        name: torch.optim.AdamW(trainable(model).values(), lr=rates[name], weight_decay=0.0)
        for name, model in models.items()
    }
    with torch.inference_mode(False), torch.enable_grad():
        for at in range(steps):
            texts = habit.batch(tokenizer, rows=rows, length=length, seed=seed, step=at)
            tap(FLOOR, float(texts.nats[:, 1:].mean()), "")
            for name, model in models.items():
                began = time.monotonic()
                if look and at % look == 0:
                    _show(model, unseen, old, name)
                loss = train_step(model, optimisers[name], texts, rate=rates[name] * (1 - at / steps))
                tap(LOSS, loss, "", method=name)
                seconds[name] += time.monotonic() - began
            if at + 1 == steps and look:
                for name, model in models.items():
                    _show(model, unseen, old, name)
            if after is not None:
                after(at)
            step()
            if progress is not None:
                progress(at + 1, steps)
    return {
        name: Outcome(
            trained_count(model),
            seconds[name],
            before[name][0],
            score(model, unseen),
            before[name][1],
            score(model, old),
        )
        for name, model in models.items()
    }


def train_step(model: Decoder, optimiser: torch.optim.Optimizer, texts: Batch, *, rate: float) -> float:
    """One step on the trainable parameters; the loss before it, nats a token."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    ids = texts.ids.to(model.embed.weight.device)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(trainable(model).values()), 1.0)
    optimiser.step()
    return float(loss.detach())


def _show(model: Decoder, unseen: Batch, old: Batch, name: str) -> None:
    """Tapped only: the curves of unseen texts cost a pass each."""
    if recording_on(NEW, method=name) or recording_on(RIGHT, method=name):
        new = score(model, unseen)
        tap(NEW, new.loss, "", method=name)
        tap(RIGHT, new.right, "", method=name)
    if recording_on(OLD, method=name):
        tap(OLD, score(model, old).loss, "", method=name)


def _biased(model: Decoder) -> Decoder:
    own = any(name.rpartition(".")[2] == "bias" for name, _ in model.named_parameters())
    return model if own else bitfit.with_biases(model)
