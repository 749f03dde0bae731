"""The head start of engine.mimetic for mixers that it does not know: latent attention and layers that borrow keys.

Paper -> here, as there; gain = how much of what a head looks at it copies. A latent layer's values are W^UV W^DKV x and
its answers go out through gain times the transpose, as far as its rank reaches; in the first layer the rope key alone
knows who stands `offset` tokens back. A borrower copies through the values of its owner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.mimetic import SHARES, mimetic, turned_back
from engine.mixers.cross_layer import Borrower, Owner
from engine.mixers.latent import Latent
from engine.model import Decoder


@torch.no_grad()
def head_start(
    model: Decoder, *, seed: int, offsets: Sequence[int] = (1, 2, 3), sharpness: float = 20.0, gain: float = 0.1
) -> Decoder:
    """`mimetic`, and the same for `Latent` and `Borrower`, in place; returns the model. The seed alone decides."""
    mimetic(model, seed=seed, offsets=offsets, sharpness=sharpness, gain=gain)
    if model.embed.weight.is_meta:
        return model
    generator = torch.Generator().manual_seed(seed)
    width = model.shape.width
    common = torch.randn(width, generator=generator)  # the direction that mimetic gave to a first layer of its own
    common /= common.norm()
    for layer, block in enumerate(model.blocks):
        mixer = block.mixer
        owner = model.blocks[mixer.owner].mixer if isinstance(mixer, Borrower) else None
        if isinstance(mixer, Borrower) and isinstance(owner, Owner):
            H, G, D = owner.heads, owner.kv_heads, owner.head_width
            v = owner.qkv.weight[-G * D :].view(G, D, width)
            mixer.out.weight.copy_(gain * v.repeat_interleave(H // G, 0).flatten(0, 1).T)
        if isinstance(mixer, Latent):
            H, D, R = mixer.heads, mixer.head_width, mixer.rope_width
            down = torch.randn(mixer.rank, width, generator=generator) / width**0.5
            up = torch.randn(H, D, mixer.rank, generator=generator) / mixer.rank**0.5
            mixer.compress.weight[: mixer.rank] = down
            mixer.rebuild.weight.view(H, 2 * D, mixer.rank)[:, D:] = up
            mixer.out.weight.copy_(gain * (up @ down).flatten(0, 1).T)
            if layer == 0 and offsets and mixer.q_compress is None:
                model.embed.weight += common
                shares = torch.tensor(SHARES[: R // 2])
                looks = torch.zeros(R)
                looks[: len(shares)] = (shares / shares.sum()).sqrt()
                looks *= (sharpness * (D + R) ** 0.5 / (width / 2)) ** 0.5
                rows = mixer.q.weight.view(H, D + R, width)
                for head, offset in zip(range(H), offsets, strict=False):
                    rows[head, D:] += turned_back(looks, offset, base=model.shape.rope_base)[:, None] * common
                mixer.compress.weight[mixer.rank :] += looks[:, None] * common
    return model
