"""One short training loop, what is measured after it, and how a toy gets into the zoo.

AdamW (arXiv:1711.05101) with warm-up and cosine decay, on the texts of a recipe (`engine.recipes`). A checkpoint
holds weights, optimiser moments and the step: a training that was stopped goes on where it was, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine import halfway, hardware
from engine.auxiliary import auxiliary
from engine.card import card
from engine.model import Decoder
from engine.recipes import Recipe
from engine.recording import site, step, tap
from engine.toyland import Grammar, batch
from engine.toyland.stories import ASKING
from engine.weights import read_tensors, sha256
from engine.zoo import RECIPES as RECIPES
from engine.zoo import build as build
from engine.zoo import find

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "assets" / "models"
WORK = ROOT / "train"  # checkpoints of what is being trained; not in git

LOSS = site("train.loss", "mean surprisal of the batch", symbol="L", low=0.0, unit="nats")
FLOOR = site("train.floor", "the same under the grammar itself: no reader does better on average", low=0.0, unit="nats")
RATE = site("train.rate", "learning rate", symbol="η", low=0.0)

Progress = Callable[[int, int, float], None]
"""Called after each step with the steps done, the steps in all and the loss. It may raise to stop."""


def train(
    model: Decoder,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    after: Callable[[Decoder], None] | None = None,
    folder: Path | None = None,
    resume: bool = True,
    every: float = 60.0,
) -> float:
    """Train `model` in place on its own device; returns the seconds that it took, earlier tries included.

    `after` is called with the model after each step of the optimiser, before anything is stored: who prunes masks
    the weights again there, for the optimiser's moments would revive them.

    What parts of the model add to the loss (`engine.auxiliary`: the balance of experts) is trained on too, and is no
    part of the loss that is shown.

    With `folder`, a checkpoint is written there about every `every` seconds and at the end, and `resume` goes on from
    the one that is there. Whatever stops it early (a recorder's on_step that raises, Ctrl-C) loses no more than that.
    """
    model.train().requires_grad_(True)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98))
    path = None if folder is None else folder / "checkpoint.safetensors"
    start, before = _resume(path, model, optimiser, recipe) if path is not None and resume else (0, 0.0)
    device = next(model.parameters()).device
    began = saved = time.monotonic()
    for at in range(start, recipe.steps):
        texts = recipe.text(at)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate_at(at)
        ids = texts.ids.to(device)
        with auxiliary() as extra:
            loss = recipe.loss(model, ids, at)
        optimiser.zero_grad(set_to_none=True)
        sum(extra, loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if after is not None:
            after(model)
        now = time.monotonic()
        if path is not None and (now - saved > every or at + 1 == recipe.steps):
            facts = {"recipe": _identity(recipe), "step": at + 1, "seconds": before + now - began}
            halfway.keep(path, model, optimiser, **facts)
            saved = now
        tap(LOSS, loss, "")
        tap(FLOOR, math.log(texts.floor), "")
        tap(RATE, recipe.rate_at(at), "")
        step()
        if progress is not None:
            progress(at + 1, recipe.steps, loss.item())
    model.eval().requires_grad_(False)
    return before + time.monotonic() - began


def _identity(recipe: Recipe) -> str:
    """What must agree for a checkpoint to be of this recipe: the plan, and the very text of its first step."""
    facts = [[asdict(s) for s in recipe.stages], recipe.rate, recipe.warmup, recipe.decay, recipe.seed, recipe.start]
    return json.dumps([*facts, data_digest(recipe)], sort_keys=True)


def data_digest(recipe: Recipe) -> str:
    """A hash of the texts of the first step: any change to the grammar or its words changes it."""
    return hashlib.sha256(recipe.text(0).ids.numpy().astype("<i8").tobytes()).hexdigest()[:16]


def _resume(path: Path, model: Decoder, optimiser: torch.optim.Optimizer, recipe: Recipe) -> tuple[int, float]:
    """Load the checkpoint at `path`, if there is a whole one of this recipe: the step to go on with, and seconds."""
    facts = halfway.facts(path)
    if facts.get("recipe") != _identity(recipe):
        return 0, 0.0
    halfway.take_up(path, model, optimiser)
    return int(facts["step"]), float(facts["seconds"])


@torch.no_grad()  # not inference mode: the model may go on training, and keeps tables that it made
def measure(model: Decoder, grammar: Grammar, *, rows: int = 96, length: int = 192) -> dict[str, float]:
    """Perplexity, its exact floor on the same texts, and the share of questions' words that come first.

    The texts are never seen in training. A question counts wherever it stands, so some are asked right after the fact.
    """
    device = next(model.parameters()).device
    test = batch(grammar, seed=0, step=0, rows=rows, length=length, stream="test")
    nats, right = 0.0, 0
    for ids, answers in zip(test.ids.split(16), test.answers.split(16), strict=True):
        logp = model(ids[:, :-1].to(device)).float().log_softmax(-1).cpu()  # B T-1 V
        nats -= float(logp.gather(-1, ids[:, 1:, None]).double().sum())
        right += int((logp.argmax(-1) == ids[:, 1:])[answers[:, 1:]].sum())
    loss = nats / (rows * (length - 1))
    recall = right / max(1, int(test.answers.sum()))
    return {"loss": loss, "perplexity": math.exp(loss), "floor": test.floor, "recall": recall}


def figures(model: Decoder, recipe: Recipe) -> dict[str, float]:
    """What the manifest says of a model: `measure` on the whole grammar, and recall in each kind of story that it read.

    On texts as long as the longest that it was trained on.
    """
    grammar, length = recipe.grammar, max(stage.length for stage in recipe.stages)
    asked = [kind for kind in ASKING if grammar.weights[kind]]
    parts = {f"recall_{kind}": measure(model, grammar.only(kind), length=length)["recall"] for kind in asked}
    return {key: round(value, 4) for key, value in {**measure(model, grammar, length=length), **parts}.items()}


def train_to_assets(
    name: str, *, folder: Path = ZOO, work: Path = WORK, progress: Progress | None = None, resume: bool = True
) -> dict[str, Any]:
    """Make the model called `name` again, into `folder`, with checkpoints under `work`; returns its manifest entry."""
    recipe = find(name)
    model = recipe.make(recipe.seed).to(hardware.device())
    if recipe.start:
        before = read_tensors(folder / f"{recipe.start}.safetensors")
        model.load_state_dict({key: value.float() for key, value in before.items()})
    seconds = train(model, recipe, progress=progress, folder=work / name, resume=resume)
    return ship(name, model, seconds=seconds, folder=folder)


def ship(name: str, model: Decoder, *, seconds: float, folder: Path = ZOO) -> dict[str, Any]:
    """Store a trained model as `folder`/`name`.safetensors in float16, and enter it in the manifest there.

    The figures are those of the stored weights. `seconds` is how long training took.
    """
    recipe = find(name)
    stored = {key: value.half().cpu().contiguous() for key, value in model.state_dict().items()}
    model.load_state_dict({key: value.float() for key, value in stored.items()})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file(stored, path)
    path.chmod(0o644)  # safetensors writes for the owner alone
    entry = {
        "recipe": name,
        "about": recipe.about,
        "shape": asdict(model.shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": recipe.seed,
        "start": recipe.start,
        "steps": recipe.steps,
        "tokens": sum(stage.steps * stage.rows * stage.length for stage in recipe.stages),
        **figures(model, recipe),
        "seconds": round(seconds),
        "device": next(model.parameters()).device.type,
        "code": _version(),
        "data": data_digest(recipe),
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
    }
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    entries = dict(sorted({**entries, name: entry}.items()))
    for path, text in (
        (manifest, json.dumps(entries, indent=1, sort_keys=True) + "\n"),
        (folder / "README.md", card(entries)),
    ):
        draft = path.with_suffix(".part")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    return entry


def _version() -> str:
    try:
        return version("leanscope")
    except PackageNotFoundError:
        return "unknown"
