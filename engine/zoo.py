"""The zoo: every toy that ships, by name, each made as the others are but for what its name says.

All toys of the main list have as many parameters as `toy`, within 5%: the feed-forward is made wider or narrower until
they do (the experts and the supernet alone are larger, and `little` is smaller). They read the same texts, in the same
order. The recall series is a series of smaller models that read nothing but lists of pairs, so that their memory is all
that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from engine.mixers.cross_layer import cla, yoco
from engine.mixers.head_start import head_start, scan_start
from engine.mixers.hybrid import Mixer, hybrid, spread
from engine.mixers.latent import Latent
from engine.mixers.linear import LinearAttention
from engine.mixers.mamba import Mamba
from engine.mixers.performer import performer
from engine.mixers.retention import Retention
from engine.mixers.rwkv import Rwkv
from engine.mixers.softmax import SoftmaxAttention
from engine.mixers.titans_layers import MemoryAsGate
from engine.mixers.windows import WindowAttention, interleaved
from engine.model import Decoder, Shape
from engine.moe.experts import Experts
from engine.moe.router import TopK
from engine.quant.affine import Grid
from engine.quant.bitnet import bitnet
from engine.quant.qat import prepare
from engine.recipes import Recipe, Stage
from engine.search.supernet import Space, sandwich
from engine.toyland import Grammar
from engine.toyland.words import SIZE
from engine.weights import unfilled

Make = Callable[[int], Decoder]
Mix = Callable[[Shape], Mixer]

TOY = Shape(vocab=SIZE, width=96, layers=4, heads=8, kv_heads=8, head_width=12, ffn_width=256, max_positions=1024)
PARAMETERS = 467_808  # of a decoder of that shape
WINDOW = 32  # tokens that a windowed layer sees; what a question asks for was often told before them
SPACE = Space(layers=(2, 3, 4), heads=(2, 4, 6, 8), ffn_width=(64, 128, 256, 384))

SWITCH = TopK(1, renormalise=False)

SMALL = Shape(vocab=SIZE, width=64, layers=2, heads=4, kv_heads=4, head_width=16, ffn_width=128, max_positions=1024)
SMALL_PARAMETERS = 98_624
FEW = Grammar(home=0.0, few=1.0, many=0.0, song=0.0, secret=0.0)
MANY = Grammar(home=0.0, few=0.3, many=0.7, song=0.0, secret=0.0)
LISTS = (Stage(300, 16, 48, FEW), Stage(500, 16, 96, MANY), Stage(300, 16, 160, MANY))
SEEDS = (0, 1, 2)


def toy(
    *,
    mixer: Mix | None = None,
    ffn: Callable[[Shape, int], nn.Module] | None = None,
    like: Shape = TOY,
    parameters: int | None = PARAMETERS,
    **changes: Any,
) -> Make:
    """How a toy with that mixer and that feed-forward is made from a seed: `like`, with `changes` of its shape.

    The feed-forward is as wide as brings the parameters nearest to `parameters`, in steps of 4; None leaves it.
    """
    shape = replace(like, **changes)

    def build(seed: int, ffn_width: int) -> Decoder:
        sized = replace(shape, ffn_width=ffn_width)
        return Decoder(
            sized, mixer=mixer and mixer(sized), ffn=ffn and (lambda layer: ffn(sized, layer)), seed=seed
        )  # fmt: skip

    def count(ffn_width: int) -> int:
        return sum(p.numel() for p in unfilled(lambda: build(0, ffn_width)).parameters())

    def make(seed: int) -> Decoder:
        width = shape.ffn_width
        if parameters is not None:
            few, more = count(4), count(8)
            width = 4 + 4 * max(0, round((parameters - few) / (more - few)))
        return head_start(build(seed, width), seed=seed)

    return make


def each(mixer: Callable[..., nn.Module], **arguments: Any) -> Mix:
    """The same mixer in every layer."""
    return lambda shape: lambda layer: mixer(shape, layer, **arguments)


def mixed(most: Mix, some: Mix, *, count: int) -> Mix:
    """`count` layers of `some`, evenly spread among those of `most`."""
    return lambda shape: hybrid(shape, most(shape), some(shape), at=spread(shape.layers, count))


def experts(route: TopK, *, balance: float) -> Make:
    """Eight narrow experts in every layer: more parameters than the toy, and fewer at work for each token."""
    return toy(
        ffn=lambda shape, layer: Experts(shape, layer, count=8, route=route, balance=balance),
        parameters=None,
        ffn_width=96,
    )


def grown(bits: int) -> Make:
    """The toy with its weights on a grid of so many bits, a scale for each row; 16 leaves them in float."""
    plain = toy()
    return plain if bits == 16 else lambda seed: prepare(plain(seed), weights=Grid(bits, granularity="channel"))  # type: ignore[return-value]


def _main() -> dict[str, Recipe]:
    attention, scan = each(SoftmaxAttention), each(Mamba)
    near = each(WindowAttention, window=WINDOW)
    recipes = {
        "toy": Recipe(toy(), "softmax attention with a key head for every query head (MHA)"),
        "gqa4": Recipe(toy(kv_heads=4), "grouped queries: 4 key heads for 8 query heads (GQA)"),
        "gqa2": Recipe(toy(kv_heads=2), "grouped queries: 2 key heads for 8 query heads (GQA)"),
        "mqa": Recipe(toy(kv_heads=1), "one key head for all 8 query heads (MQA)"),
        "mla32": Recipe(toy(mixer=each(Latent, rank=32, rope_width=16)), "latent attention: notes of 32 values (MLA)"),
        "mla8": Recipe(toy(mixer=each(Latent, rank=8, rope_width=16)), "latent attention: notes of 8 values (MLA)"),
        "cla2": Recipe(toy(mixer=lambda s: cla(s, factor=2)), "every second layer reads the cache below it (CLA-2)"),
        "cla2-mqa": Recipe(toy(mixer=lambda s: cla(s, factor=2), kv_heads=1), "CLA-2, with one key head in each layer"),
        "yoco": Recipe(toy(mixer=lambda s: yoco(s, window=WINDOW)), "two layers of windows, two that read one cache"),
        "window": Recipe(toy(mixer=near), f"all layers see the last {WINDOW} tokens"),
        "interleaved": Recipe(
            toy(mixer=lambda s: interleaved(s, window=WINDOW, every=2)), "windows and full attention in turns"
        ),
        "linear": Recipe(toy(mixer=each(LinearAttention)), "linear attention, features elu + 1"),
        "performer": Recipe(toy(mixer=each(performer, count=32)), "FAVOR+ with 32 positive orthogonal features a head"),
        "retnet": Recipe(toy(mixer=each(Retention)), "retention: linear attention that decays"),
        "rwkv": Recipe(toy(mixer=each(Rwkv)), "RWKV-4: a decaying average for each channel"),
        "mamba": Recipe(toy(mixer=scan), "selective state spaces, 16 states a channel"),
        "hybrid": Recipe(toy(mixer=mixed(scan, attention, count=1)), "Mamba, and attention in one layer of four"),
        "titans": Recipe(
            toy(mixer=each(MemoryAsGate, window=WINDOW)), f"a window of {WINDOW} and a memory that learns while reading"
        ),
        "relu": Recipe(toy(activation="relu"), "softmax attention, and neurons that fall silent (ReLU)"),
        "little": Recipe(
            toy(like=SMALL, parameters=None, layers=1), "one narrow layer: a small model that guesses for the toy"
        ),
        "bitnet": Recipe(lambda seed: bitnet(toy()(seed)), "weights -1, 0 and 1 from the start (BitNet b1.58)"),  # type: ignore[arg-type,return-value]
        "experts": Recipe(experts(SWITCH, balance=0.01), "eight experts, one for each token, kept in balance (Switch)"),
        "experts-free": Recipe(experts(SWITCH, balance=0.0), "eight experts, one for each token, no balance loss"),
        "experts-top2": Recipe(experts(TopK(2), balance=0.01), "eight experts, two for each token (as Mixtral)"),
        "supernet": Recipe(
            toy(ffn_width=max(SPACE.ffn_width), parameters=None),
            "many decoders in one: 2 to 4 layers, 2 to 8 heads, 64 to 384 neurons",
            loss=sandwich(SPACE, randoms=1, starts=(500, 500, 500)),
        ),
    }  # fmt: skip
    for bits in (16, 8, 4, 3, 2):
        about = (
            "the toy, trained on for as long"
            if bits == 16
            else f"the toy, trained on with weights of {bits} bits (QAT)"
        )
        recipes[f"qat{bits}"] = Recipe(
            grown(bits), about, stages=(Stage(400, 16, 192),), rate=3e-4, warmup=20, start="toy"
        )
    return recipes


def _looking_back(make: Make) -> Make:
    """The same, with Mamba's layers set to look one token back as the first layer of attention is."""
    return lambda seed: scan_start(make(seed), seed=seed)


def _recall() -> dict[str, Recipe]:
    attention = each(SoftmaxAttention)
    mixers = {
        "softmax": attention,
        "linear": each(LinearAttention),
        "rwkv": each(Rwkv),
        "mamba4": each(Mamba, state=4),
        "mamba16": each(Mamba, state=16),
        "hybrid": lambda shape: hybrid(shape, each(Mamba, state=4)(shape), attention(shape), at=[1]),
    }
    return {
        f"recall-{name}-{seed}": Recipe(
            _looking_back(toy(mixer=mixer, like=SMALL, parameters=SMALL_PARAMETERS)),
            f"{name} on lists of pairs, seed {seed}",
            stages=LISTS, rate=3e-3, seed=seed, grammar=MANY,
        )
        for name, mixer in mixers.items()
        for seed in SEEDS
    }  # fmt: skip


RECIPES: dict[str, Recipe] = {**_main(), **_recall()}


def find(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError, naming what there is."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}: take one of {', '.join(RECIPES)}")
    return RECIPES[name]


def build(name: str) -> Decoder:
    """The model of that name, untrained."""
    recipe = find(name)
    return recipe.make(recipe.seed)
