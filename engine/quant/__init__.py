"""Fewer bits: one file a technique. Here is how a technique gets into a model, and sees what the model feeds it.

A recipe is a function (name, linear) -> module. `quantised` puts a module in the place of every linear layer of a
copy, so that no model class knows of quantisation; the tied embedding, which is also the head, stays in float, as
in all the papers. `capture_inputs` keeps what each linear layer is given: pair a layer's input with its own weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.recording import recording_on, site, tap

INPUT = site("linear.input", "what a linear layer is given", symbol="X")

Recipe = Callable[[str, nn.Linear], nn.Module]


def as_matrix(rows: Sequence[Sequence[float]]) -> Tensor:
    """Numbers that somebody typed, as a float64 matrix."""
    return torch.tensor(rows, dtype=torch.float64)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name, the head left out: it stays in float."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"}


def copied(model: nn.Module, *, fresh: Collection[str] = ()) -> nn.Module:
    """A copy whose tensors are those of `model`, but for the parameters of the modules named in `fresh`.

    A big model is so copied for the price of what changes. Training the copy would train the original too.
    """
    changing = {id(p) for name in fresh for p in model.get_submodule(name).parameters()}
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in shared if id(t) not in changing})


def quantised(model: nn.Module, recipe: Recipe, *, names: Collection[str] | None = None) -> nn.Module:
    """A copy of `model` with recipe(name, linear) in the place of each linear layer named (all: None).

    What is not replaced is shared with `model`, which stays as it was.
    """
    known = linears(model)
    for name in names or ():
        if name not in known:
            raise ValueError(f"names must be linear layers of the model ({', '.join(known)}), not {name!r}")
    twin = copied(model)
    for name in known if names is None else names:
        parent, _, last = name.rpartition(".")
        setattr(twin.get_submodule(parent), last, recipe(name, known[name]))
    return twin


@contextmanager
def capture_inputs(
    model: nn.Module, *, names: Collection[str] | None = None, rows: int | None = None
) -> Iterator[Mapping[str, Tensor]]:
    """Keep the inputs of linear layers, [N, in], row upon row, while the context lasts; at most `rows` of each.

    with capture_inputs(model) as inputs:
        model(ids)
    inputs["blocks.3.ffn.down"]
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be a number of rows above 0, not {rows}")
    known = linears(model)
    kept: dict[str, Tensor] = {}
    handles = []
    for name in known if names is None else names:
        if name not in known:
            raise ValueError(f"names must be linear layers of the model ({', '.join(known)}), not {name!r}")

        def look(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            x = args[0].detach().flatten(0, -2)  # N in
            if recording_on(INPUT, linear=name):
                tap(INPUT, x, "token channel", linear=name)
            # A copy, so that nothing that runs later in place can change it.
            kept[name] = torch.cat((kept[name], x))[:rows] if name in kept else x[:rows].clone()

        handles.append(known[name].register_forward_pre_hook(look))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def check_bits(bits: object, *, name: str = "bits", low: int = 1, high: int = 16) -> None:
    """Raise ValueError unless `bits` is a whole number in low..high."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not low <= bits <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, not {bits!r}")


def check_values(x: Tensor, *, name: str = "x") -> None:
    """Raise ValueError unless `x` is a floating-point tensor with at least one value, and all of them finite."""
    if not x.is_floating_point():
        raise ValueError(f"{name} must hold floating-point values, not {x.dtype}")
    if not x.numel():
        raise ValueError(f"{name} must hold a value at least, and its shape is {list(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite, and {int((~torch.isfinite(x)).sum())} of its values are not")
