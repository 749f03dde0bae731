"""One decoder for all lessons: blocks of a mixer and a feed-forward network, composed and never flagged.

Llama (arXiv:2302.13971), section 2.2: RMSNorm before each part, RoPE, SwiGLU, no biases; GELU or ReLU on demand.
Paper -> here: dim = width, n heads = heads, n layers = layers, W_gate and W_up = `gate_up` (gate rows first).

    model = Decoder(Shape(vocab=256, width=64, layers=2, heads=4, kv_heads=2, head_width=16, ffn_width=128))
    logits = model(ids)                                   # B T V
    for token in generate(model, ids, steps=20, cache=Full()): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.caches import Cache
from engine.generate import generate as generate
from engine.mixers.rope import Rope, rope_tables
from engine.mixers.softmax import SoftmaxAttention
from engine.norm import RMSNorm
from engine.recording import recording_on, site, tap

NORM = site("residual.norm", "length of the residual stream entering a block", symbol="‖x‖₂", grows="query", low=0.0)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder. `max_positions` bounds positions, not what a cache with slots may read."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True
    activation: str = "swiglu"
    max_positions: int = 8192

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{f.name} must be a whole number above 0, not {value!r}")
            if f.type == "float" and not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise ValueError(f"{f.name} must be a number above 0, not {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads={self.heads}, and {self.kv_heads} does not")
        if self.head_width % 2:
            raise ValueError(f"head_width must be even, since RoPE turns pairs, not {self.head_width}")
        if self.activation not in FFNS:
            raise ValueError(f"activation must be one of {', '.join(FFNS)}, not {self.activation!r}")


class SwiGLU(nn.Module):
    """GLU Variants (arXiv:2002.05202), equation 6: down(silu(gate x) * up x), gate and up in one product."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.width, 2 * shape.ffn_width, bias=False)
        self.down = nn.Linear(shape.ffn_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)  # B T F each
        return self.down(F.silu(gate) * up)


class GELU(nn.Module):
    """The feed-forward network of GPT-2: down(gelu(up x)), gelu exact."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.ffn_width, bias=False)
        self.down = nn.Linear(shape.ffn_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class ReLU(nn.Module):
    """down(relu(up x)): every neuron that does not fire is an exact zero (OPT, arXiv:2205.01068; Deja Vu needs it)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.ffn_width, bias=False)
        self.down = nn.Linear(shape.ffn_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


FFNS: dict[str, Callable[[Shape], nn.Module]] = {"swiglu": SwiGLU, "gelu": GELU, "relu": ReLU}
"""The feed-forward network of each activation that a `Shape` may name."""


class Block(nn.Module):
    """x + mixer(norm x), then x + ffn(norm x). Any mixer, any ffn.

    `shared` is a dict that lives for one pass: what one layer hands to later ones. Only a mixer with a true attribute
    `shares` is given it, all others need not know.
    """

    def __init__(self, shape: Shape, *, mixer: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1 = RMSNorm(shape.width, eps=shape.norm_eps)
        self.mixer = mixer
        self.norm2 = RMSNorm(shape.width, eps=shape.norm_eps)
        self.ffn = ffn

    def forward(self, x: Tensor, *, shared: dict[int, Any] | None = None, **context: Any) -> Tensor:
        if getattr(self.mixer, "shares", False):
            context["shared"] = shared
        x = x + self.mixer(self.norm1(x), **context)
        return x + self.ffn(self.norm2(x))


class Decoder(nn.Module):
    """`mixer(layer)` and `ffn(layer)` make the parts of each block; the defaults are those of `shape`.

    Weights come from `seed` alone: normal, 0.02 wide, the two products that write to the residual stream
    narrower by sqrt(2 layers), as in GPT-2. Only `nn.Linear` and `nn.Embedding` are filled; a part with other
    parameters fills them itself. On the meta device nothing is filled.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        mixer: Callable[[int], nn.Module] | None = None,
        ffn: Callable[[int], nn.Module] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        mixer = mixer or (lambda layer: SoftmaxAttention(shape, layer))
        ffn = ffn or (lambda layer: FFNS[shape.activation](shape))
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape, mixer=mixer(i), ffn=ffn(i)) for i in range(shape.layers))
        self.norm = RMSNorm(shape.width, eps=shape.norm_eps)
        self.head: nn.Module | None = None if shape.tied else nn.Linear(shape.width, shape.vocab, bias=False)
        self._ropes: dict[tuple[torch.dtype, torch.device], Rope] = {}
        self._fill(seed)

    @torch.no_grad()
    def _fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
                narrower = (2 * self.shape.layers) ** 0.5 if name.endswith((".out", ".down")) else 1.0
                values = torch.empty(module.weight.shape, device="cpu").normal_(
                    0.0, 0.02 / narrower, generator=generator
                )
                module.weight.copy_(values)

    def forward(self, ids: Tensor, *, cache: Cache | None = None) -> Tensor:
        """ids [B, T] -> logits [B, T, V] in the dtype of the weights. A cache makes `ids` the next T tokens."""
        return self.logits(self.hidden(ids, cache=cache))

    def hidden(self, ids: Tensor, *, cache: Cache | None = None, show: int | None = None) -> Tensor:
        """The residual stream after the last block, normed: [B, T, W]. Taps keep the last `show` rows (None: all)."""
        if ids.dim() != 2 or not ids.shape[1]:
            raise ValueError(f"ids must have shape [batch, tokens] with a token at least, not {list(ids.shape)}")
        if cache is not None and cache.at_once is not None and ids.shape[1] > cache.at_once:
            parts = ids.split(cache.at_once, 1)
            return torch.cat([self.hidden(part, cache=cache) for part in parts], 1)
        x = self.through(self.embed(ids), range(self.shape.layers), shared={}, cache=cache, show=show)  # B T W
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)

    def through(
        self, x: Tensor, layers: range, *, shared: dict[int, Any], cache: Cache | None = None, show: int | None = None
    ) -> Tensor:
        """The residual stream [B, T, W] after these layers. Layers of one pass share one fresh dict, `shared`."""
        rope = self.rope(x)
        watched = cache is not None and cache.watches
        for layer in layers:
            if recording_on(NORM, layer=layer):
                norm = torch.linalg.vector_norm(
                    x[:, -(show or 0) :], dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)
                )
                tap(NORM, norm, "batch query", layer=layer)
            if watched and cache is not None:
                cache.observe_residual(layer, x)
            x = self.blocks[layer](x, shared=shared, rope=rope, cache=cache, show=show)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """hidden [..., W] -> logits [..., V]."""
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)

    def rope(self, x: Tensor) -> Rope:
        """The tables by which queries and keys are turned, for x's dtype and device."""
        key = (x.dtype, x.device)
        if key not in self._ropes:
            s = self.shape
            self._ropes[key] = rope_tables(
                s.head_width, base=s.rope_base, count=s.max_positions, dtype=x.dtype, device=x.device
            )
        return self._ropes[key]
