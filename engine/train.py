"""One short training loop, and the recipes of the zoo: every toy that ships can be made again from its name.

AdamW (arXiv:1711.05101) with warm-up and cosine decay; texts grow longer from stage to stage, because a model finds
out how to look things up much sooner in short texts. Data, weights and order follow from the seed. A checkpoint holds
weights, optimiser moments and the step, so a stopped training goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine import hardware
from engine.model import Decoder, Shape
from engine.recording import site, step, tap
from engine.toyland import Grammar, batch
from engine.toyland.words import SIZE

LOSS = site("train.loss", "mean surprisal of the batch", symbol="L", unit="nats")
RATE = site("train.rate", "learning rate", symbol="η")

TEST_SEEDS = range(10**6, 10**6 + 64)  # never drawn in training
TOY = Shape(
    vocab=SIZE, width=128, layers=4, heads=4, kv_heads=4, head_width=32, ffn_width=344, max_positions=1024
)  # fmt: skip

Progress = Callable[[int, int, float], None]  # steps done, steps in all, loss


@dataclass(frozen=True)
class Stage:
    """So many steps on batches of so many texts of so many tokens."""

    steps: int
    batch: int
    length: int


@dataclass(frozen=True)
class Recipe:
    """How one model of the zoo is made. `make(seed)` builds it untrained."""

    make: Callable[[int], Decoder]
    about: str
    stages: tuple[Stage, ...] = (Stage(900, 64, 64), Stage(600, 32, 128), Stage(500, 16, 256))
    rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.1
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


RECIPES: dict[str, Recipe] = {
    "toy": Recipe(lambda seed: Decoder(TOY, seed=seed), "softmax attention, as many key heads as query heads (MHA)"),
}


def recipe(name: str) -> Recipe:
    try:
        return RECIPES[name]
    except KeyError:
        raise ValueError(f"there is no recipe called {name!r}; there are {', '.join(RECIPES)}") from None


def build(name: str) -> Decoder:
    """The model of that name, untrained."""
    made = recipe(name)
    return made.make(made.seed)


def batches(recipe: Recipe, *, start: int = 0) -> Iterator[Tensor]:
    """Token ids [B, T] of each step from `start` on. A text's seed is its place in the order, so any step can be redone."""
    first = 0
    for stage in recipe.stages:
        for at in range(max(first, start), first + stage.steps):
            yield batch(Grammar(), seed=recipe.seed, step=at, rows=stage.batch, length=stage.length).ids
        first += stage.steps


def rate_at(recipe: Recipe, at: int) -> float:
    """The learning rate of step `at`: straight up, then a cosine down to a tenth."""
    up = min(1.0, (at + 1) / recipe.warmup)
    return recipe.rate * up * (0.55 + 0.45 * math.cos(math.pi * at / recipe.steps))


def train(
    model: Decoder,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    folder: Path | None = None,
    every: float = 60.0,
) -> list[float]:
    """Train `model` in place; returns the loss of each step made here. With `folder`, goes on from its checkpoint and
    writes one about every `every` seconds. Whatever ends it early (an on_step that raises, Ctrl-C) loses at most those."""
    model.train().requires_grad_(True)
    plain = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98))
    start = _resume(folder, model, optimiser, recipe) if folder is not None else 0
    device, saved, losses = next(model.parameters()).device, time.monotonic(), []
    for at, ids in enumerate(batches(recipe, start=start), start):
        for group in optimiser.param_groups:
            group["lr"] = rate_at(recipe, at)
        ids = ids.to(device)
        logits = model(ids[:, :-1])  # B T-1 V
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        tap(LOSS, losses[-1], "")
        tap(RATE, rate_at(recipe, at), "")
        if progress is not None:
            progress(at + 1, recipe.steps, losses[-1])
        if folder is not None and (time.monotonic() - saved > every or at + 1 == recipe.steps):
            _checkpoint(folder, model, optimiser, recipe, at + 1)
            saved = time.monotonic()
        step()
    model.eval().requires_grad_(False)
    return losses


def _identity(recipe: Recipe) -> str:
    facts = [[asdict(stage) for stage in recipe.stages], recipe.rate, recipe.warmup, recipe.decay, recipe.seed]
    return json.dumps(facts, sort_keys=True)


def _checkpoint(folder: Path, model: Decoder, optimiser: torch.optim.Optimizer, recipe: Recipe, at: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": value for name, value in state.items()}
    draft = folder / "checkpoint.part"
    save_file(tensors, draft, metadata={"recipe": _identity(recipe), "step": str(at)})
    draft.replace(folder / "checkpoint.safetensors")


def _resume(folder: Path, model: Decoder, optimiser: torch.optim.Optimizer, recipe: Recipe) -> int:
    """Load the checkpoint in `folder`, if it is of this recipe; the step to go on with."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(str(path), "pt") as file:
        facts = file.metadata()
        if facts["recipe"] != _identity(recipe):
            return 0
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return int(facts["step"])


@torch.inference_mode()
def measure(model: Decoder, *, length: int = 256, rows: int = 64) -> dict[str, float]:
    """Perplexity against the exact floor on texts never seen, and the share of determined words that are right."""
    device = next(model.parameters()).device
    test = batch(Grammar(), seed=0, step=0, rows=rows, length=length, stream="test")
    nats, right = 0.0, 0
    for ids, answers in zip(test.ids.split(16), test.answers.split(16), strict=True):
        logp = model(ids[:, :-1].to(device)).float().log_softmax(-1).cpu()  # B T-1 V
        nats -= float(logp.gather(-1, ids[:, 1:, None]).double().sum())
        right += int((logp.argmax(-1) == ids[:, 1:])[answers[:, 1:]].sum())
    return {
        "perplexity": math.exp(nats / (rows * (length - 1))),
        "floor": test.floor,
        "recall": right / int(test.answers.sum()),
    }


def train_to_assets(name: str, *, folder: Path, work: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Make the model called `name` again, into `folder`/`name`.safetensors, and enter it in the manifest there."""
    made = recipe(name)
    began = time.monotonic()
    device = hardware.device()
    model = made.make(made.seed).to(device)
    losses = train(model, made, progress=progress, folder=work / name)
    entry = {
        "recipe": name,
        "about": made.about,
        "shape": asdict(model.shape),
        "seed": made.seed,
        "steps": made.steps,
        "tokens": sum(stage.steps * stage.batch * stage.length for stage in made.stages),
        "loss": round(sum(losses[-50:]) / max(1, len(losses[-50:])), 4),
        **{key: round(value, 4) for key, value in measure(model).items()},
        "seconds": round(time.monotonic() - began),
        "device": str(device),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file({n: t.half().cpu().contiguous() for n, t in model.state_dict().items()}, path)
    entry |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text()) if manifest.exists() else {}
    manifest.write_text(json.dumps({**entries, name: entry}, indent=1, sort_keys=True) + "\n")
    return entry
