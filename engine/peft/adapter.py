"""Adapters: a narrow detour after each sublayer, so small at first that nothing changes.

Houlsby et al. (arXiv:1902.00751), section 2.1 and figure 2: h + W_up f(W_down h), between a sublayer's projection and
the skip-connection around it, after attention and after the feed-forward.
Paper -> here: m = bottleneck; the two layers = `down`, `up`, both with biases; f = GELU.
Shapes: [B, T, W] -> [B, T, m] -> [B, T, W]. Parameters of one adapter: 2 m W + m + W.
Errors: ValueError for a bottleneck below 1.
Deviations: `up` starts at zero, not near it, so that the start is the identity to the bit; norms are trained only on
demand (the paper trains them), since adapters alone are what is counted here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model import Block, Decoder
from engine.peft import branch, put
from engine.recording import recording_on, site, tap

DETOUR = site("adapter.detour", "length of what the adapter adds to each token", symbol="‖W_up f(W_down h)‖", low=0.0)


class Adapter(nn.Module):
    """h + up(gelu(down(h)))."""

    def __init__(self, width: int, *, bottleneck: int, like: Tensor, generator: torch.Generator, name: str) -> None:
        super().__init__()
        self.name = name
        self.down = nn.Linear(width, bottleneck, device="meta")
        self.up = nn.Linear(bottleneck, width, device="meta")
        narrow = torch.randn(bottleneck, width, generator=generator) * 1e-2
        self.down.weight = nn.Parameter(narrow.to(like))
        self.down.bias = nn.Parameter(like.new_zeros(bottleneck))
        self.up.weight = nn.Parameter(like.new_zeros(width, bottleneck))
        self.up.bias = nn.Parameter(like.new_zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        detour = self.up(F.gelu(self.down(h)))  # B T W
        if recording_on(DETOUR, place=self.name):
            tap(DETOUR, torch.linalg.vector_norm(detour, dim=-1), "batch query", place=self.name)
        y: Tensor = h + detour
        return y


class AdaptedBlock(nn.Module):
    """A block with an adapter after each of its two sublayers; its own parts keep their names."""

    def __init__(self, block: Block, after_mixer: Adapter, after_ffn: Adapter) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.ffn = block.norm1, block.mixer, block.norm2, block.ffn
        self.after_mixer, self.after_ffn = after_mixer, after_ffn

    def forward(self, x: Tensor, *, shared: dict[int, Any] | None = None, **context: Any) -> Tensor:
        if getattr(self.mixer, "shares", False):
            context["shared"] = shared
        x = x + self.after_mixer(self.mixer(self.norm1(x), **context))
        y: Tensor = x + self.after_ffn(self.ffn(self.norm2(x)))
        return y

    def bare(self) -> Block:
        """The block without its adapters."""
        block = Block.__new__(Block)
        nn.Module.__init__(block)
        block.norm1, block.mixer, block.norm2, block.ffn = self.norm1, self.mixer, self.norm2, self.ffn
        return block


@torch.no_grad()
def attach(model: Decoder, *, bottleneck: int = 8, norms: bool = False, seed: int = 0) -> Decoder:
    """A copy of `model` with two adapters in each block; `norms` are trained with them as in the paper, if wanted."""
    if not isinstance(bottleneck, int) or isinstance(bottleneck, bool) or bottleneck < 1:
        raise ValueError(f"bottleneck must be a whole number above 0, not {bottleneck!r}")
    generator = torch.Generator().manual_seed(seed)
    named = [n for n, _ in model.named_parameters() if n.split(".")[-2] in ("norm1", "norm2")] if norms else []
    twin = branch(model, train=named)
    for layer, block in enumerate(twin.blocks):
        if not isinstance(block, Block):
            raise ValueError(f"model must have plain blocks to put adapters in, and block {layer} is another kind")
        made = [
            Adapter(model.shape.width, bottleneck=bottleneck, like=model.embed.weight.detach(), generator=generator,
                    name=f"{layer}.{place}")
            for place in ("mixer", "ffn")
        ]  # fmt: skip
        put(twin, f"blocks.{layer}", AdaptedBlock(block, *made))
    return twin
