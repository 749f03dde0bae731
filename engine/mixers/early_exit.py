"""Leaving early: of a prompt only the last token has to pass the layers that keep nothing.

YOCO, "You Only Cache Once" (arXiv:2405.05254), section 2 and its figure of inference: prefill stops before the
cross-decoder, since the global cache K̂, V̂ hangs on the self-decoder alone. Paper -> here: the layer where it stops =
`exit_layer`, which makes K̂ and V̂ of all rows and goes on with one. Any model whose last layers only borrow can do it,
a CLA model too, if for fewer layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.caches import Cache, View
from engine.mixers.cross_layer import Owner, Shared, owners
from engine.mixers.state import at_least
from engine.recording import event

if TYPE_CHECKING:
    from engine.model import Decoder


def exit_layer(model: Decoder) -> int:
    """The last layer that remembers anything: from it on, a prompt needs keys and values, and the last token alone.

    Raises ValueError if it is not an `Owner`.
    """
    last = max(owners(model))
    if not isinstance(model.blocks[last].mixer, Owner):
        raise ValueError(f"model must have layers that share keys and values, and layer {last} shares none")
    return last


def early_exit(model: Decoder, ids: Tensor, *, cache: Cache | None = None, show: int | None = None) -> Tensor:
    """Read a prompt [B, T] and leave early: the normed hidden row of its last token alone, [B, 1, W].

    The rows before it go no further than to the keys and values of `exit_layer`; the cache then holds just what it
    holds after a full pass. A cache that watches sees the attention of the last token only.
    """
    if ids.dim() != 2 or not ids.shape[1]:
        raise ValueError(f"ids must have shape [batch, tokens] with a token at least, not {list(ids.shape)}")
    last = exit_layer(model)
    at_once = ids.shape[1] if cache is None or cache.at_once is None else cache.at_once
    parts = ids.split(at_once, 1)
    for i, part in enumerate(parts):
        shared: Shared = {}
        x = model.through(model.embed(part), range(last), shared=shared, cache=cache, show=show)  # B T W
        block: Any = model.blocks[last]
        view = block.mixer.remember(block.norm1(x), rope=model.rope(x), cache=cache)
        if i + 1 == len(parts):
            shared[last] = of_last_query(view, len(part), part.shape[1])
            x = model.through(x[:, -1:], range(last, model.shape.layers), shared=shared, cache=cache, show=1)  # B 1 W
        if cache is not None:
            cache.advance(part.shape[1])
    event("layers.exit", layer=last, rows=ids.shape[1] - 1)
    return model.norm(x)


def of_last_query(view: View, B: int, T: int) -> View:
    """The view of the last of T queries alone."""
    places, mask = view.q_positions, None if view.causal else view.mask
    places = places[-1:] if isinstance(places, range) or places.dim() == 1 else places[:, -1:]
    if view.k.shape[0] == B:
        mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., -1:, :]
        return View(view.k, view.v, places, mask)
    k, v = (x.unflatten(0, (B, T))[:, -1] for x in (view.k, view.v))  # B H_kv S D
    if mask is not None and mask.shape[0] == B * T:
        mask = mask.unflatten(0, (B, T))[:, -1]
    return View(k, v, places, mask)


def prefill_multiplications(model: Decoder, *, tokens: int) -> tuple[int, int]:
    """Multiplications of reading a prompt without the head: in full, and when leaving early.

    Attention counts as rectangles of queries and keys, those of a window no wider than it is.
    """
    at_least("tokens", tokens, 1)
    last, shape = exit_layer(model), model.shape
    full = early = 0
    block: Any
    for layer, block in enumerate(model.blocks):
        weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
        keys = min(tokens, getattr(block.mixer, "window", tokens))
        a_row = weights + sum(block.mixer.multiplications(rows=1, keys=keys).values())
        full += tokens * a_row
        early += (tokens if layer < last else 1) * a_row
    # The other rows of the layer where it leaves: keys and values alone.
    return full, early + (tokens - 1) * shape.width * 2 * shape.kv_heads * shape.head_width
