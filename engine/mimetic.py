"""A head start for small models: begin a little as trained ones look, and skip the long wait for induction.

In trained language models some heads of the first layers look one token back, and later ones find what followed this
token before ("In-context Learning and Induction Heads", Olsson et al., arXiv:2209.11895). The second kind cannot form
before the first, and a word must not drown in what the first kind writes. With plain random weights 0.02 wide a toy
waits thousands of steps for that. Mamba's short convolution could look one token back and does not find out by itself:
`mixers.head_start` helps it. RWKV's token shift looks back by construction.
"Mimetic Initialization of Self-Attention Layers" (Trockman and Kolter, arXiv:2305.09828), section 3: start where
trained weights end up, here with W_V W_proj near a multiple of the identity. Paper -> here: W_V = rows of `qkv`,
W_proj = `out`, beta_2 = `gain`.
Deviations: the product is low-rank (out = gain vᵀ) and positive, so that a head copies what it looks at; the paper's
W_Q W_Kᵀ is left out; heads that look back, in the first layer only, and embeddings of length 1 are not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.mixers.softmax import SoftmaxAttention
from engine.model import Decoder

# Of the fastest four of RoPE's frequencies, the share of each: the sum of cosines is high at one distance only.
SHARES = (4 / 9, 2 / 9, 2 / 9, 1 / 9)


@torch.no_grad()
def mimetic(
    model: Decoder, *, seed: int, offsets: Sequence[int] = (1, 2, 3), sharpness: float = 20.0, gain: float = 0.1
) -> Decoder:
    """Stretch the embeddings of `model` to length 1 and refill its softmax attention, in place; returns the model.

    Every head copies what it looks at, `gain` times. In the first layer, head i looks `offsets[i]` tokens back, with a
    score of `sharpness`. For that all embeddings share one direction, as long as an embedding is: tied or not,
    logits do not notice a shift that all tokens share. Other mixers than softmax attention stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = model.shape
    if model.embed.weight.is_meta:
        return model
    model.embed.weight /= model.embed.weight.norm(dim=1).mean()
    common = torch.randn(shape.width, generator=generator)
    common /= common.norm()
    looks = torch.zeros(shape.head_width)
    shares = torch.tensor(SHARES[: shape.head_width // 2])  # a narrow head has fewer frequencies
    looks[: len(shares)] = (shares / shares.sum()).sqrt()
    # A normed embedding has length √W, and half of its square lies along `common`.
    looks *= (sharpness * shape.head_width**0.5 / (shape.width / 2)) ** 0.5
    for layer, block in enumerate(model.blocks):
        mixer = block.mixer
        if not isinstance(mixer, SoftmaxAttention):
            continue
        H, G, D = mixer.heads, mixer.kv_heads, mixer.head_width
        v = torch.randn(G, D, shape.width, generator=generator) / shape.width**0.5
        mixer.qkv.weight[-G * D :] = v.flatten(0, 1)
        mixer.out.weight.copy_(gain * v.repeat_interleave(H // G, 0).flatten(0, 1).T)
        if layer == 0 and offsets:
            model.embed.weight += common
            rows = mixer.qkv.weight[: (H + G) * D].view(H + G, D, shape.width)
            for head, offset in zip(range(H), offsets, strict=False):
                rows[head] += turned_back(looks, offset, base=shape.rope_base)[:, None] * common
            rows[H:] += looks[:, None] * common
    return model


def turned_back(x: Tensor, positions: int, *, base: float) -> Tensor:
    """x [D] as RoPE would turn it at `-positions`: a query turned so meets the keys of so many tokens before."""
    half = len(x) // 2
    angle = positions * base ** (-torch.arange(half) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()])
