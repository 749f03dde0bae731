"""What a recurrent mixer carries from pass to pass: nested tuples of tensors in `cache.states[layer]`.

A state is replaced and never changed in place, so that a copy of the dict `cache.states` is a checkpoint (a recurrent
state cannot be cropped: speculation goes back to the checkpoint instead). Its size does not depend on how many tokens
came, which `state_bytes` lets a page and a test count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.caches import Cache


def check_tokens(x: Tensor, width: int) -> None:
    """Raise ValueError unless x is [B, T, width] with a token at least."""
    if x.dim() != 3 or x.shape[2] != width or 0 in x.shape:
        raise ValueError(f"x must have shape [batch, tokens, {width}] with a token at least, not {list(x.shape)}")


def at_least(name: str, value: int, low: int) -> int:
    """`value`, or a ValueError that names it when it is no whole number from `low` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be a whole number from {low} on, not {value!r}")
    return value


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q and k are [..., T, D] alike and v is [..., T, E] with the same T, at least 1."""
    if q.shape != k.shape or q.shape[:-1] != v.shape[:-1] or q.dim() < 2 or 0 in q.shape:
        shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        raise ValueError(
            f"q, k and v must have shapes [..., T, D], [..., T, D] and [..., T, E], T from 1, not {shapes}"
        )


def carried(cache: Cache | None, layer: int, x: Tensor) -> Any:
    """The state that this layer left in the cache, or None before the first token.

    Raises ValueError when it belongs to a batch of another size.
    """
    state = None if cache is None else cache.states.get(layer)
    for tensor in tensors(state):
        if tensor.shape[0] != x.shape[0]:
            raise ValueError(f"the state of layer {layer} is of a batch of {tensor.shape[0]}, and x of {x.shape[0]}")
        break
    return state


def carry(cache: Cache | None, layer: int, state: Any) -> None:
    """Leave the state for the next pass."""
    if cache is not None:
        cache.states[layer] = state


def positions(cache: Cache | None, count: int) -> range:
    """The places in the text of the `count` tokens of this pass."""
    start = 0 if cache is None else cache.seen
    return range(start, start + count)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over time are kept: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def tensors(state: Any) -> list[Tensor]:
    """All tensors of a nested state."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [t for inner in state.values() for t in tensors(inner)]
    return [t for inner in state for t in tensors(inner)] if isinstance(state, (tuple, list)) else []


def repeated(state: Any, rows: int) -> Any:
    """The state of one text for a batch of `rows`, each to read on in its own way."""
    if isinstance(state, Tensor):
        return state.expand(rows, *state.shape[1:])
    if isinstance(state, tuple):
        inner = [repeated(part, rows) for part in state]
        return type(state)(*inner) if hasattr(state, "_fields") else tuple(inner)
    return state


def state_bytes(state: Any) -> int:
    """Bytes of the tensors of a state, of a tuple of states, or of a whole `cache.states`."""
    return sum(t.numel() * t.element_size() for t in tensors(state))
