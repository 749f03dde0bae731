"""Losses that a part of a model adds to the one it is trained on, without keeping anything in the module.

    with auxiliary() as extra:
        loss = F.cross_entropy(model(ids), targets)
    sum(extra, loss).backward()

A part offers a loss with `add_loss` while it runs. Outside of `auxiliary` nobody collects, `losses_wanted` is false,
and the part need not compute it: inference costs and keeps nothing. A `ContextVar` holds the list, so that two
visitors who train at once never meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_COLLECTED: ContextVar[list[Tensor] | None] = ContextVar("leanscope_auxiliary", default=None)


@contextmanager
def auxiliary() -> Iterator[list[Tensor]]:
    """Collect what is added inside: scalars, already weighted, in the order of the layers."""
    collected: list[Tensor] = []
    token = _COLLECTED.set(collected)
    try:
        yield collected
    finally:
        _COLLECTED.reset(token)


def losses_wanted() -> bool:
    """Whether anybody would take an added loss: lets inference skip computing it."""
    return _COLLECTED.get() is not None


def add_loss(loss: Tensor) -> None:
    """Add a scalar to the loss of this step of training; without a collector it is forgotten."""
    collected = _COLLECTED.get()
    if collected is None:
        return
    if loss.dim():
        raise ValueError(f"loss must be a scalar, not of shape {list(loss.shape)}")
    collected.append(loss)
