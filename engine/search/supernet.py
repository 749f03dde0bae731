"""Once-for-all (Cai et al. 2020, arXiv:1908.09791): one set of weights that holds many smaller decoders.

A subnet keeps the first layers, and of each layer the first heads and the first neurons. It runs inside the supernet
on slices of its weights, or is taken out as a truly smaller model; nothing is trained again.
Paper -> here: elastic depth D = `layers`, elastic width (expand ratio) W = `ffn_width`; channel sorting, section 3.3 =
`sort_channels`; progressive shrinking = the `starts` of `sandwich`. Sandwich rule and in-place distillation: Yu and
Huang, US-Nets (arXiv:1903.05134): each step trains the largest, the smallest and some random subnets, and the largest
teaches the others.

    loss = 1/n · Σ over the n subnets of a step: cross-entropy with the text, or with what the largest expects

Deviations: the papers search convolutional networks; here depth, heads and feed-forward width of a decoder stand for
depth, kernel size and channels. The residual stream keeps its width and embeddings are shared by all. Key heads leave
with their query heads (a group of GQA goes as a whole). The losses of a step are averaged, where the paper adds them.
Errors: ValueError for sizes that the supernet does not have, and mixers or networks that have no heads or neurons.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from engine.caches import Cache
from engine.mixers.softmax import SoftmaxAttention
from engine.model import FFNS, GELU, Decoder, ReLU, Shape, SwiGLU
from engine.recording import site, tap

IMPORTANCE = site("search.importance", "norm of what each neuron or head writes, as far as its weights tell", low=0.0)
SUBNET_LOSS = site("search.subnet.loss", "loss of one subnet of a training step", symbol="L", low=0.0, unit="nats")


@dataclass(frozen=True)
class Subnet:
    """A choice among the decoders in a supernet: how many heads and neurons each of its first layers keeps."""

    heads: tuple[int, ...]
    ffn_width: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, sizes in (("heads", self.heads), ("ffn_width", self.ffn_width)):
            if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
                raise ValueError(f"{name} must be whole numbers above 0, one a layer, not {sizes!r}")
        if len(self.heads) != len(self.ffn_width):
            raise ValueError(f"heads and ffn_width must be as many, not {len(self.heads)} and {len(self.ffn_width)}")

    @classmethod
    def even(cls, layers: int, *, heads: int, ffn_width: int) -> Subnet:
        """The same heads and neurons in each layer."""
        if layers < 1:
            raise ValueError(f"layers must be a number above 0, not {layers}")
        return cls((heads,) * layers, (ffn_width,) * layers)

    @property
    def layers(self) -> int:
        return len(self.heads)


@dataclass(frozen=True)
class Space:
    """The sizes that a subnet may take: every layer chooses its heads and neurons freely."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    ffn_width: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "ffn_width"):
            sizes = getattr(self, name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise ValueError(f"{name} must be rising numbers above 0, one at least, not {sizes!r}")

    @property
    def largest(self) -> Subnet:
        return Subnet.even(self.layers[-1], heads=self.heads[-1], ffn_width=self.ffn_width[-1])

    @property
    def smallest(self) -> Subnet:
        return Subnet.even(self.layers[0], heads=self.heads[0], ffn_width=self.ffn_width[0])

    @property
    def count(self) -> int:
        """How many different subnets there are."""
        return sum((len(self.heads) * len(self.ffn_width)) ** layers for layers in self.layers)

    def draw(self, rng: random.Random) -> Subnet:
        """A depth, then for each layer its heads and neurons, all equally likely."""
        layers = rng.choice(self.layers)
        heads, widths = ([rng.choice(s) for _ in range(layers)] for s in (self.heads, self.ffn_width))
        return Subnet(tuple(heads), tuple(widths))

    def opened(self, phase: int) -> Space:
        """Progressive shrinking: the largest alone (0), then any depth (1), any heads too (2), and all (3)."""
        if not 0 <= phase <= 3:
            raise ValueError(f"phase must be from 0 to 3, not {phase}")
        sizes = [s if phase > i else s[-1:] for i, s in enumerate((self.layers, self.heads, self.ffn_width))]
        return Space(*sizes)


def whole(model: Decoder) -> Subnet:
    """The largest subnet: all of the supernet."""
    return Subnet(
        tuple(_attention(model, i).heads for i in range(len(model.blocks))),
        tuple(_network(model, i).down.in_features for i in range(len(model.blocks))),
    )


def skeleton(shape: Shape, subnet: Subnet, *, device: torch.device | str = "meta") -> Decoder:
    """A decoder of the subnet's sizes; on the meta device it has no weights."""
    group = shape.heads // shape.kv_heads

    def sized(layer: int) -> Shape:
        heads = subnet.heads[layer]
        return replace(shape, heads=heads, kv_heads=heads // group, ffn_width=subnet.ffn_width[layer])

    # A shape has room for one number: where layers differ it tells the most, so that caches sized by it have room.
    heads, width = max(subnet.heads), max(subnet.ffn_width)
    outer = replace(shape, layers=subnet.layers, heads=heads, kv_heads=heads // group, ffn_width=width)
    with torch.device(device):
        return Decoder(
            outer,
            mixer=lambda layer: SoftmaxAttention(sized(layer), layer),
            ffn=lambda layer: FFNS[shape.activation](sized(layer)),
        )


def slices(model: Decoder, subnet: Subnet) -> dict[str, Tensor]:
    """The subnet's weights by name, cut from those of the supernet; gradients flow back to where they were cut."""
    check(model, subnet)
    tensors: dict[str, Tensor] = {"embed.weight": model.embed.weight, "norm.weight": model.norm.weight}
    if model.head is not None:
        tensors["head.weight"] = model.get_parameter("head.weight")
    for layer in range(subnet.layers):
        block, name = model.blocks[layer], f"blocks.{layer}"
        mixer, ffn = _attention(model, layer), _network(model, layer)
        H, G, D, F_ = mixer.heads, mixer.kv_heads, mixer.head_width, ffn.down.in_features
        h, f = subnet.heads[layer], subnet.ffn_width[layer]
        g = h * G // H
        q, k, v = mixer.qkv.weight.split([H * D, G * D, G * D])
        tensors |= {f"{name}.{norm}.weight": block.get_parameter(f"{norm}.weight") for norm in ("norm1", "norm2")}
        tensors[f"{name}.mixer.qkv.weight"] = torch.cat([q[: h * D], k[: g * D], v[: g * D]])  # (h + 2g)·D W
        tensors[f"{name}.mixer.out.weight"] = mixer.out.weight[:, : h * D]  # W h·D
        incoming = "gate_up" if isinstance(ffn, SwiGLU) else "up"
        rows = ffn.get_parameter(f"{incoming}.weight").unflatten(0, (-1, F_))[:, :f].flatten(0, 1)  # f or 2f, W
        tensors[f"{name}.ffn.{incoming}.weight"] = rows
        tensors[f"{name}.ffn.down.weight"] = ffn.down.weight[:, :f]  # W f
    return tensors


def run(model: Decoder, ids: Tensor, subnet: Subnet, *, cache: Cache | None = None) -> Tensor:
    """ids [B, T] -> logits [B, T, V] of the subnet, in place: on slices of the supernet's weights."""
    tensors = slices(model, subnet)
    return functional_call(skeleton(model.shape, subnet), tensors, (ids,), {"cache": cache}, strict=True)


@torch.no_grad()
def extract(model: Decoder, subnet: Subnet) -> Decoder:
    """The subnet as a smaller decoder with memory of its own: all that ran in place, and nothing else."""
    made = skeleton(model.shape, subnet)
    weights = {name: tensor.detach().clone() for name, tensor in slices(model, subnet).items()}
    made.load_state_dict(weights, assign=True)
    return made.train(model.training).requires_grad_(any(p.requires_grad for p in model.parameters()))


@torch.no_grad()
def sort_channels(model: Decoder) -> Decoder:
    """Put the neurons and the head groups that matter most in front, in place; outputs stay as they were.

    A neuron matters as the norm of its input weights times that of its output weights; a head as the norm of the rows
    that make its values times that of its columns of `out`, a group as its heads together. Returns the model.
    """
    for layer in range(len(model.blocks)):
        mixer, ffn = _attention(model, layer), _network(model, layer)
        H, G, D, F_ = mixer.heads, mixer.kv_heads, mixer.head_width, ffn.down.in_features
        q, k, v = mixer.qkv.weight.split([H * D, G * D, G * D])
        q, k, v = q.view(G, -1), k.view(G, -1), v.view(G, -1)
        out = mixer.out.weight.unflatten(1, (G, -1))  # W G H/G·D
        importance = tap(IMPORTANCE, v.norm(dim=1) * out.transpose(0, 1).flatten(1).norm(dim=1), "channel",
                         layer=layer, part="head")  # fmt: skip
        order = importance.argsort(descending=True, stable=True)
        qkv = torch.cat([part[order].reshape(-1, model.shape.width) for part in (q, k, v)])
        mixer.qkv.weight.copy_(qkv)
        mixer.out.weight.copy_(out[:, order].flatten(1))
        incoming = ffn.gate_up if isinstance(ffn, SwiGLU) else ffn.up
        rows = incoming.weight.unflatten(0, (-1, F_))  # 1 or 2, F W
        importance = tap(IMPORTANCE, rows.square().sum((0, 2)).sqrt() * ffn.down.weight.norm(dim=0), "channel",
                         layer=layer, part="neuron")  # fmt: skip
        order = importance.argsort(descending=True, stable=True)
        incoming.weight.copy_(rows[:, order].flatten(0, 1))
        ffn.down.weight.copy_(ffn.down.weight[:, order])
    return model


def sandwich(
    space: Space, *, randoms: int = 2, distil: bool = True, starts: Sequence[int] = (0, 0, 0), seed: int = 0
) -> Callable[[Decoder, Tensor, int], Tensor]:
    """The loss of a step for `engine.train`, as (model, ids [B, T], step) -> scalar.

    Each step: the largest on the text, then the smallest and `randoms` others on the text, or with `distil` on what the
    largest expects. `starts` are the steps at which depth, heads and neurons become elastic; before, only the largest
    is trained. Which subnets a step draws depends on the seed and the step alone.
    """
    if randoms < 0:
        raise ValueError(f"randoms must be 0 or more, not {randoms}")
    if len(starts) != 3 or list(starts) != sorted(starts) or starts[0] < 0:
        raise ValueError(f"starts must be three steps, none before the one in front, not {tuple(starts)}")
    return partial(_sandwich, space=space, randoms=randoms, distil=distil, starts=tuple(starts), seed=seed)


def _sandwich(model: Decoder, ids: Tensor, at: int, *, space: Space, randoms: int, distil: bool,
              starts: tuple[int, ...], seed: int) -> Tensor:  # fmt: skip
    drawn = chosen(space, at, randoms=randoms, starts=starts, seed=seed)
    losses = []
    target = ids[:, 1:].flatten()  # tokens, or from the second subnet on what the largest expects
    for i, subnet in enumerate(drawn):
        logits = run(model, ids[:, :-1], subnet).flatten(0, 1)  # B·(T-1) V
        losses.append(F.cross_entropy(logits, target))
        tap(SUBNET_LOSS, losses[-1], "", subnet=("largest", "smallest")[i] if i < 2 else f"random {i - 1}")
        if i == 0 and distil:
            target = logits.detach().softmax(-1)
    return torch.stack(losses).mean()


def chosen(
    space: Space, at: int, *, randoms: int = 2, starts: Sequence[int] = (0, 0, 0), seed: int = 0
) -> list[Subnet]:
    """The subnets that step `at` trains, each once: the largest, the smallest and those drawn."""
    open_now = space.opened(sum(at >= start for start in starts))
    rng = random.Random(f"{seed} {at}")
    drawn = [space.largest, open_now.smallest, *(open_now.draw(rng) for _ in range(randoms))]
    return list(dict.fromkeys(drawn))


def check(model: Decoder, subnet: Subnet) -> None:
    """Raises ValueError if the supernet does not hold that subnet."""
    if subnet.layers > len(model.blocks):
        raise ValueError(f"layers must be at most {len(model.blocks)}, not {subnet.layers}")
    for layer in range(subnet.layers):
        mixer, ffn = _attention(model, layer), _network(model, layer)
        group, heads, width = mixer.heads // mixer.kv_heads, subnet.heads[layer], subnet.ffn_width[layer]
        if heads > mixer.heads or heads % group:
            raise ValueError(f"heads of layer {layer} must be a multiple of {group} up to {mixer.heads}, not {heads}")
        if width > ffn.down.in_features:
            raise ValueError(f"ffn_width of layer {layer} must be at most {ffn.down.in_features}, not {width}")


def _attention(model: Decoder, layer: int) -> SoftmaxAttention:
    mixer = model.blocks[layer].mixer
    if type(mixer) is not SoftmaxAttention or mixer.qkv.bias is not None:
        raise ValueError(f"layer {layer} must have plain softmax attention, not {type(mixer).__name__}")
    return mixer


def _network(model: Decoder, layer: int) -> SwiGLU | GELU | ReLU:
    ffn = model.blocks[layer].ffn
    if not isinstance(ffn, SwiGLU | GELU | ReLU) or ffn.down.bias is not None:
        raise ValueError(f"layer {layer} must have a SwiGLU, GELU or ReLU without biases, not {type(ffn).__name__}")
    return ffn
