"""Hybrids: a few layers of one mixer among many of another, so that each does what the other cannot.

Jamba (arXiv:2403.19887), section 2 and figure 1: one attention layer in each group of 8, the others Mamba;
Mamba-2-Hybrid (arXiv:2406.07887), section 3: 7 to 8% attention layers, evenly dispersed; Gemma 2 (arXiv:2408.00118),
section 2: every other layer looks through a window.
Paper -> here: a : m = how many layers are in `at` and how many are not.
Deviation: the feed-forward after each mixer is the decoder's own (Jamba has MoE in every other layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from engine.mixers.state import at_least
from engine.weights import settle, unfilled

if TYPE_CHECKING:
    from engine.model import Decoder, Shape

Mixer = Callable[[int], nn.Module]


def hybrid(shape: Shape, most: Mixer, some: Mixer, *, at: Iterable[int]) -> Mixer:
    """The mixer of each layer: `some(layer)` in the layers `at`, `most(layer)` in all others.

    Decoder(shape, mixer=hybrid(shape, lambda i: Mamba(shape, i), lambda i: SoftmaxAttention(shape, i), at={2}))
    """
    chosen = frozenset(at)
    if not chosen <= set(range(shape.layers)):
        raise ValueError(f"at must name layers from 0 to {shape.layers - 1}, not {sorted(chosen)}")
    return lambda layer: some(layer) if layer in chosen else most(layer)


def spread(layers: int, count: int) -> list[int]:
    """`count` of `layers` layers, evenly spread: the middle one of each group, as in Jamba (1 of 8: layer 4)."""
    at_least("layers", layers, 1)
    if at_least("count", count, 0) > layers:
        raise ValueError(f"count must be at most layers={layers}, not {count}")
    return [(2 * i + 1) * layers // (2 * count) for i in range(count)]


def remixed(model: Decoder, mixer: Mixer, *, layers: int | None = None) -> Decoder:
    """The weights of `model` under other mixers, converted without retraining: nothing is copied, names must agree.

    `layers` keeps the first so many layers only, whose output the last norm then reads.
    """
    count = model.shape.layers if layers is None else at_least("layers", layers, 1)
    if count > model.shape.layers:
        raise ValueError(f"layers must be at most the {model.shape.layers} of the model, not {count}")
    tensors = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) < count
    }
    made = unfilled(lambda: type(model)(replace(model.shape, layers=count), mixer=mixer))
    return settle(made, tensors, dtype=None, device=next(model.parameters()).device)


def layer_stack(model: Decoder) -> list[str]:
    """The name of each layer's mixer, from the first layer to the last."""
    return [type(block.mixer).__name__ for block in model.blocks]
