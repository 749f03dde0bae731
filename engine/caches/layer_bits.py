"""Bits by layer: measure what each layer's cache suffers from few bits, then spend a budget where it helps.

KVQuant (arXiv:2401.18079) finds that layers differ in how much precision their keys and values need; here the
sensitivity is measured, not estimated from gradients.
Paper -> here: sensitivity of a layer = mean KL(full || with this layer's cache alone in few bits), in nats a token.
Shapes: ids [B, T]; losses [layers, options], a column for each number of bits in `options`.
Errors: ValueError for bits that don't rise, a budget that not even the fewest bits meet, a text shorter than the cache.
Deviations: the sum over layers is taken for the loss of all together, which it need not be. Cost: layers * options
passes over the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from engine.caches import Cache
from engine.caches.quantised import PLAIN, Quantised
from engine.model import Decoder
from engine.quant import check_bits
from engine.recording import site, tap

SENSITIVITY = site("kv_bits.sensitivity", "how far predictions move when this layer's cache alone has few bits",
                   symbol="KL", low=0.0, unit="nats a token")  # fmt: skip


@torch.no_grad()
def sensitivity(
    model: Decoder,
    ids: Tensor,
    *,
    options: Sequence[int] = (2, 3, 4, 8),
    make: Callable[[Sequence[int]], Cache] | None = None,
) -> Tensor:
    """KL in nats a token of each layer at each option: float64 [layers, options].

    `make` builds the cache for a list of bits; by default groups and tail of 32, 32 tokens at a time.
    """
    return tap(SENSITIVITY, torch.stack(list(by_layer(model, ids, options=options, make=make))), "layer option")


@torch.no_grad()
def by_layer(
    model: Decoder,
    ids: Tensor,
    *,
    options: Sequence[int] = (2, 3, 4, 8),
    make: Callable[[Sequence[int]], Cache] | None = None,
) -> Iterator[Tensor]:
    """The rows of `sensitivity` [options], layer by layer, each as soon as it is measured."""
    _check(options)
    make = make or (lambda bits: Quantised(bits, at_once=32))
    layers = model.shape.layers
    full = _log_probs(model, ids, make([PLAIN] * layers))
    for layer in range(layers):
        caches = (make([bits if i == layer else PLAIN for i in range(layers)]) for bits in options)
        losses = [divergence(full, _log_probs(model, ids, cache)) for cache in caches]
        yield torch.tensor(losses, dtype=torch.float64)


def divergence(full: Tensor, other: Tensor) -> float:
    """Mean KL(full || other) over the tokens, in nats, of log-probabilities [B, T, V]."""
    return float((full.exp() * (full - other)).sum(-1).mean())


def assign(losses: Tensor, *, options: Sequence[int], budget: float) -> list[int]:
    """The bits of each layer that make the summed loss least while their mean stays within `budget`.

    Exact, by dynamic programming over layers and bits spent. A loss is never made to rise with more bits by noise:
    where it does, the fewer bits are simply preferred.
    """
    _check(options)
    layers, columns = losses.shape
    if columns != len(options):
        raise ValueError(f"losses must have a column for each of the {len(options)} options, not {columns}")
    most = int(budget * layers + 1e-9)
    if most < layers * options[0]:
        raise ValueError(f"budget must be at least the fewest bits, {options[0]} a layer, not {budget}")
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # bits spent -> least loss, and how
    for row in losses.tolist():
        longer: dict[int, tuple[float, list[int]]] = {}
        for spent, (loss, chosen) in best.items():
            for bits, more in zip(options, row, strict=True):
                total = spent + bits
                if total <= most and (total not in longer or loss + more < longer[total][0]):
                    longer[total] = (loss + more, [*chosen, bits])
        best = longer
    return min(sorted(best.items()), key=lambda item: item[1][0])[1][1]


def _log_probs(model: Decoder, ids: Tensor, cache: Cache) -> Tensor:
    logits = model(ids, cache=cache)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _check(options: Sequence[int]) -> None:
    for bits in options:
        check_bits(bits, name="options")
    if not options or list(options) != sorted(set(options)):
        raise ValueError(f"options must be rising numbers of bits, not {list(options)}")
