"""The head start of engine.mimetic for mixers that it does not know: latent attention and layers that borrow keys.

Paper -> here, as there; gain = how much of what a head looks at it copies. A latent layer's values are W^UV W^DKV x and
its answers go out through gain times the transpose, as far as its rank reaches; in the first layer the rope key alone
knows who stands `offset` tokens back. A borrower copies through the values of its owner.

`scan_start` does it for Mamba, after "Mimetic Initialization Helps State Space Models Learn to Recall" (Trockman et
al., arXiv:2410.11135): B and C start as one projection, and A remembers for long. Deviations: one half of the channels
sees this token and the other half the one before, so that a state is written under the name of the token before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.mimetic import SHARES, mimetic, turned_back
from engine.mixers.cross_layer import Borrower, Owner
from engine.mixers.latent import Latent
from engine.mixers.mamba import Mamba
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


@torch.no_grad()
def scan_start(model: Decoder, *, seed: int, step: float = 0.7, gain: float = 0.1) -> Decoder:
    """Refill the `Mamba` mixers of `model`, in place, so that each writes a token under the one before it.

    Channel i and channel i + E/2 read the same of the stream: the first now, the second one token late. B reads the
    late half and C the other through one projection, so that a token asks for what followed it before. Ā is near 1,
    Δ about `step`, and what is read is copied out `gain` times.
    """
    if model.embed.weight.is_meta:
        return model
    generator = torch.Generator().manual_seed(seed)
    width = model.shape.width
    for block in model.blocks:
        mixer = block.mixer
        if not isinstance(mixer, Mamba):
            continue
        E, N = mixer.A_log.shape
        half, rank = E // 2, mixer.sizes[0]
        reads = 2 * torch.randn(half, width, generator=generator) / width**0.5
        mixer.inp.weight[:E] = reads.repeat(2, 1)
        mixer.conv.zero_()
        mixer.conv[:half, 0, -1] = 1
        mixer.conv[half:, 0, -2] = 1
        mixer.conv_bias.zero_()
        asks = 2 * torch.randn(N, half, generator=generator) / half**0.5
        mixer.select.weight[rank:].zero_()
        mixer.select.weight[rank : rank + N, half:] = asks  # B, of the token before
        mixer.select.weight[rank + N :, :half] = asks  # C, of this one
        mixer.A_log.copy_(torch.linspace(-5, -2, N).repeat(E, 1))
        mixer.delta_bias.fill_(float(torch.expm1(torch.tensor(step)).log()))
        mixer.to_delta.mul_(0.1)
        mixer.out.weight.zero_()
        mixer.out.weight[:, :half] = gain * reads.T
    return model
