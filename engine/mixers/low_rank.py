"""Why a sketch is enough: the keys and values of all heads of a layer lie close to a space of few dimensions.

The bet of DeepSeek-V2 (arXiv:2405.04434), section 2.1: keys and values are up-projections of one latent of d_c values.
Eckart and Young (1936): of all matrices of rank r, the one that keeps the r largest singular values is closest, and
what it misses is the sum of the squares of the others. Keys are taken before RoPE, for rotation spreads them, which is
why MLA keeps the rotated part apart. Paper -> here: d_c = r; k^C and v^C side by side = "kv".
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.mixers.softmax import SoftmaxAttention
from engine.model import Decoder
from engine.recording import site, tap

SINGULAR = site("latent.singular", "singular values of the keys and values of all heads over all tokens, largest first",
                symbol="σ", low=0.0)  # fmt: skip


def keys_and_values(model: Decoder, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each layer of softmax attention, the keys before rotation and the values of texts: [B, T, H_kv D] each."""
    made: dict[int, Tensor] = {}
    handles = []
    for layer, block in enumerate(model.blocks):
        if isinstance(block.mixer, SoftmaxAttention):
            handles.append(
                block.mixer.qkv.register_forward_hook(lambda _, args, y, layer=layer: made.__setitem__(layer, y))
            )
    if not handles:
        raise ValueError("model must have a layer of softmax attention, and it has none")
    try:
        with torch.no_grad():
            model.hidden(ids, show=1)
    finally:
        for handle in handles:
            handle.remove()
    width = model.shape.kv_heads * model.shape.head_width
    return {layer: (y[..., -2 * width : -width], y[..., -width:]) for layer, y in made.items()}


def singular_values(x: Tensor) -> Tensor:
    """Of x [..., tokens, values] as one matrix, a row a token: [min(tokens, values)], float64, largest first."""
    if x.dim() < 2 or 0 in x.shape:
        raise ValueError(f"x must have shape [..., tokens, values] with one of each at least, not {list(x.shape)}")
    return torch.linalg.svdvals(x.flatten(0, -2).double())


def spectra(model: Decoder, ids: Tensor) -> dict[tuple[int, str], Tensor]:
    """The singular values of each layer's keys "k", values "v" and both side by side "kv", by (layer, which)."""
    found = {}
    for layer, (k, v) in keys_and_values(model, ids).items():
        for of, x in (("k", k), ("v", v), ("kv", torch.cat((k, v), -1))):
            found[layer, of] = tap(SINGULAR, singular_values(x), "rank", layer=layer, of=of)
    return found


def kept_share(values: Tensor) -> Tensor:
    """The share of the squares that the first 1, 2, ... singular values keep: [rank], up to 1."""
    squares = values.double() ** 2
    return squares.cumsum(-1) / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def rank_for(values: Tensor, share: float) -> int:
    """How many singular values keep that share of the squares: the latent size that an ideal sketch would need."""
    if not 0 < share <= 1:
        raise ValueError(f"share must lie above 0 and up to 1, not {share!r}")
    enough = kept_share(values) >= share - 1e-12  # the last sum may round to a hair below 1
    return int(enough.int().argmax()) + 1
