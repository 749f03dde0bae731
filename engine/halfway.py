"""A training half-way: weights, the optimiser's moments and some facts in one file, to go on from bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def keep(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, **facts: object) -> None:
    """Write all of it to `path` at once: a crash leaves the file that was there before whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": value.contiguous() for name, value in state.items()}
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={name: str(value) for name, value in facts.items()})
    part.replace(path)


def facts(path: Path) -> dict[str, str]:
    """The facts of the file at `path`; none where there is no whole one."""
    try:
        with safe_open(str(path), "pt") as file:
            return dict(file.metadata() or {})
    except (FileNotFoundError, SafetensorError):
        return {}


def take_up(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Load what `keep` wrote into a model and an optimiser made like those before."""
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
