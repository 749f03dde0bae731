"""A head start for attention: begin as a trained model looks, so that like finds like from the first step.

"Mimetic Initialization of Self-Attention Layers" (Trockman and Kolter, arXiv:2305.09828), section 3: in trained
models W_Q W_Kᵀ is close to a multiple of the identity plus noise, and so is W_V W_proj; start there.
Paper -> here: W_Q, W_K, W_V = the rows of `qkv`; W_proj = `out`; beta_1 = `sharpness`, beta_2 = `gain`.
Deviations: both products are low-rank and drawn once (q = k, out = vᵀ) instead of factored by an SVD, and the second
is positive: a head then copies what it looks at. Then a head that looks one token back makes the next layer's
"find what followed this word" a matter of a few hundred steps on Toyland rather than thousands.
"""

from __future__ import annotations

import torch

from engine.mixers.softmax import SoftmaxAttention
from engine.model import Decoder


@torch.no_grad()
def mimetic(model: Decoder, *, seed: int, sharpness: float = 3.0, gain: float = 0.5) -> Decoder:
    """Refill the softmax attention of `model` in place, on top of what is there; returns the model.

    `sharpness` is the score (in nats, before RoPE) of a token for a key of its own kind, where others score about 0.
    Query heads that share a key head differ by what the model was filled with before.
    """
    generator = torch.Generator().manual_seed(seed)
    for mixer in model.modules():
        if not isinstance(mixer, SoftmaxAttention) or mixer.qkv.weight.is_meta:
            continue
        H, G, D = mixer.heads, mixer.kv_heads, mixer.head_width
        W = mixer.qkv.in_features
        std = (sharpness / (D**0.5 * W)) ** 0.5  # |k x|² / √D = sharpness for a normed x, whose length is √W
        k = torch.randn(G, D, W, generator=generator) * std
        v = torch.randn(G, D, W, generator=generator) / W**0.5
        shared = torch.cat([k.repeat_interleave(H // G, 0), k, v]).reshape(-1, W)
        mixer.qkv.weight += shared
        mixer.out.weight += gain * v.repeat_interleave(H // G, 0).reshape(-1, W).T
    return model
