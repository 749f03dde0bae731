"""Teaching cheaply: one file a method. Here is what they share: a copy to train, what of it is trained, and the key.

`attach(model, ...)` of every method returns a new model. Frozen tensors are those of `model` itself, under Parameters
of their own, so that a big model is tuned for the price of what is trained and `model` stays as it was. Before the
first step the new model says what `model` says, bit for bit (prompt tuning apart: its words are read from the start).

    tuned = lora.attach(model, rank=4, targets=("q", "v"))
    key = key_of(tuned)             # the trained tensors alone: what a task would be stored as
    bare = detach(tuned)            # without what was put in: `model` again, bit for bit
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine.model import Decoder
from engine.recording import event, recording_on, site, tap

COUNT = site("peft.count", "parameters of each module: trained and frozen", low=0.0)
DELTA = site("peft.delta", "what tuning added to a weight", symbol="ΔW")
WEIGHT = site("peft.weight", "the weight before tuning", symbol="W")
SINGULAR = site("peft.singular", "singular values of what tuning added, largest first", symbol="σ(ΔW)", low=0.0)


@dataclass(frozen=True)
class Part:
    """One module that holds parameters of its own, and how many of them are trained."""

    name: str
    trained: int
    frozen: int


def branch(model: Decoder, *, train: Collection[str] = ()) -> Decoder:
    """A copy in which the parameters named in `train` are copies that train; the others are shared and frozen."""
    known = dict(model.named_parameters())
    for name in train:
        if name not in known:
            raise ValueError(f"train must name parameters of the model, and {name!r} is none")
    memo: dict[int, object] = {id(b): b for b in model.buffers()}
    for name, p in known.items():
        trains = name in train
        value = p.detach().clone() if trains else p.detach()
        memo[id(p)] = nn.Parameter(value, requires_grad=trains)
    return copy.deepcopy(model, memo).eval()


def full(model: Decoder) -> Decoder:
    """The baseline: every parameter is trained."""
    return branch(model, train=[name for name, _ in model.named_parameters()])


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set `module` in the place called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def detach(model: Decoder) -> Decoder:
    """A copy without what `attach` put in. Biases of BitFit and full fine-tuning stay: put back an older key."""
    twin = branch(model)
    # Children come after their parents: backwards, what stands inside is bare before what holds it.
    for name, module in reversed(list(twin.named_modules())):
        bare = getattr(module, "bare", None)
        if bare is not None and name:
            put(twin, name, bare())
    whole = getattr(twin, "bare", None)
    return twin if whole is None else whole()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_count(model: nn.Module) -> int:
    return sum(p.numel() for p in trainable(model).values())


def trained_share(model: nn.Module, *, of: nn.Module) -> float:
    """Trained parameters as a share of all parameters of the base model `of`, as the papers count."""
    return trained_count(model) / sum(p.numel() for p in of.parameters())


def parts(model: nn.Module) -> list[Part]:
    """Every module with parameters of its own, in the order of the model."""
    found = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            trained = sum(p.numel() for p in own if p.requires_grad)
            found.append(Part(name, trained, sum(p.numel() for p in own) - trained))
    return found


def key_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the trained tensors: the small key that opens the big lock."""
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def with_key(model: Decoder, key: Mapping[str, Tensor]) -> Decoder:
    """A copy of a tuned `model` with the tensors of `key` in place of its own trained ones."""
    own = trainable(model)
    for name in sorted(own.keys() | key.keys()):
        wanted, given = own.get(name), key.get(name)
        if wanted is None or given is None or wanted.shape != given.shape:
            sizes = ["nothing" if t is None else str(list(t.shape)) for t in (given, wanted)]
            raise ValueError(
                f"key must hold exactly the trained tensors of the model, and {name!r} is {sizes[0]} for {sizes[1]}"
            )
    twin = branch(model, train=list(own))
    with torch.no_grad():
        for name, p in trainable(twin).items():
            p.copy_(key[name])
    return twin


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The matrix that each linear layer of the blocks multiplies with, whatever stands in its place: [out, in]."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        effective = getattr(module, "effective_weight", None)
        if effective is not None:
            found[name] = effective().detach()
        elif isinstance(module, nn.Linear) and name.startswith("blocks."):
            found[name] = module.weight.detach()
    return found


def deltas(tuned: Decoder, base: Decoder, *, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """ΔW of each linear layer that both have, [out, in]: what tuning did to it."""
    after, before = weights(tuned), weights(base)
    for name in names or ():
        if name not in before or name not in after:
            raise ValueError(f"names must be linear layers of both models ({', '.join(before)}), not {name!r}")
    return {n: after[n] - before[n] for n in (names or before) if n in after}


def singular_values(delta: Tensor) -> Tensor:
    """Of ΔW, largest first, float64 [min(out, in)]."""
    if delta.dim() != 2 or not delta.numel():
        raise ValueError(f"delta must have shape [out, in], not {list(delta.shape)}")
    return torch.linalg.svdvals(delta.double())


def rank_of(delta: Tensor, *, tolerance: float = 1e-9) -> int:
    """How many singular values are above `tolerance` times the largest; 0 for a matrix of zeros."""
    values = singular_values(delta)
    return int((values > tolerance * values[0]).sum()) if float(values[0]) else 0


def energy_within(delta: Tensor, rank: int) -> float:
    """The share of ‖ΔW‖² that its best matrix of that rank holds (Eckart and Young 1936); 1 for a matrix of zeros."""
    values = singular_values(delta).square()
    if not 1 <= rank <= len(values):
        raise ValueError(f"rank must be from 1 to {len(values)}, not {rank}")
    total = float(values.sum())
    return float(values[:rank].sum()) / total if total else 1.0


def show(tuned: Decoder, base: Decoder, *, names: Collection[str] = (), **index: int | str) -> None:
    """Tap what is trained in each module, and of the linear layers named W, ΔW and its singular values."""
    if recording_on(COUNT, **index):
        listed = parts(tuned)
        event("peft.modules", names=[p.name for p in listed], **index)
        tap(COUNT, np.array([[p.trained, p.frozen] for p in listed]), "module kind", **index)
    if not names or not (recording_on(DELTA, **index) or recording_on(SINGULAR, **index)):
        return
    before = weights(base)
    for name, delta in deltas(tuned, base, names=names).items():
        tap(WEIGHT, before[name], "output input", matrix=name, **index)
        tap(DELTA, delta, "output input", matrix=name, **index)
        tap(SINGULAR, singular_values(delta), "order", matrix=name, **index)
