"""Techniques on top of each other: one model that is made lean step by step, and what it takes after each step.

No paper: every technique has its own file, and this one puts them together in the only order in which all of them
fit: heads merged or cut, weights pruned, what is left rounded, mended by training, then what the cache keeps, and in
how many bits, then guessing ahead. `Lean` is a model with all that was done to it so far; each function gives a new
one.

    lean = rounded(pruned(Lean(model), share=0.3), bits=4)
    lean = remembering(lean, kind="sinks", budget=64, bits=4)
    weight_bytes(lean), weight_bits(lean, "blocks.0.ffn.down"), multiplications(lean, keys=200)

Storage: a weight has 16 bits until it is rounded. Rounded, each `group` of a row has a scale and a minimum of 16 bits
each beside its codes, as llama.cpp's Q4_1 has; the embedding, which is the head too, gets 8 bits. A pruned matrix is
stored dense, or as a map (a bit a weight; 2:4: two bits for each weight kept) with the weights kept, whichever is
smaller. All is counted as a file would hold it; what runs are the rounded weights as floats, so it runs no faster.
Errors: ValueError, one sentence, for what does not go together or comes in the wrong order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.caches import Cache
from engine.caches.full import Full
from engine.caches.heavy_hitters import HeavyHitters
from engine.caches.quantised import PLAIN, Quantised
from engine.caches.sinks import Sinks
from engine.caches.snapped import Snapped
from engine.caches.window import Window
from engine.generate import PARTS, generate
from engine.generate import multiplications as products
from engine.mixers.pooling import pool
from engine.model import Decoder
from engine.prune import Masks, apply, two_four
from engine.prune.magnitude import magnitude
from engine.prune.structured import cut, heads_of
from engine.quant import check_bits, copied, linears
from engine.quant.affine import Grid, choose, place, snap
from engine.quant.qat import prepare
from engine.recording import recording_on, site, tap
from engine.speculate.lookup import Lookup
from engine.speculate.loop import speculate

FLOAT = 16  # bits of what is not rounded, and of each scale and minimum
GROUP = 32  # weights of a row that share them
EMBEDDING = 8  # bits of the embedding, once weights are rounded
KINDS = ("full", "window", "sinks", "heavy")
SINKS = 4  # first tokens that the kinds with sinks never drop

PARTS_BYTES = site(
    "stack.parts", "bytes of each weight matrix as it is stored, in the model's order", low=0.0, unit="B"
)
ERROR = site("stack.error", "how far rounding moved the weights of each matrix, over their length",
             symbol="‖Ŵ − W‖ / ‖W‖", low=0.0)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """What is remembered: a kind of cache, the tokens that it keeps, and the bits of a value in it."""

    kind: str = "full"
    budget: int = 0
    bits: int = FLOAT

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        least = {"full": 0, "window": 1, "sinks": SINKS + 1, "heavy": SINKS + 2}[self.kind]
        if self.budget < least:
            raise ValueError(
                f"budget must be at least {least} tokens for a cache of kind {self.kind}, not {self.budget}"
            )
        check_bits(self.bits)

    def cache(self, model: Decoder) -> Cache:
        """A new cache for `model`."""
        width = model.shape.head_width
        if self.kind == "full":
            group = min(GROUP, width)
            return Full() if self.bits == PLAIN else Quantised(self.bits, group=group, recent=group, at_once=group)
        free = self.budget - SINKS
        kept: Window | HeavyHitters
        if self.kind == "heavy":
            kept = HeavyHitters(free // 2, recent=free - free // 2, sinks=SINKS)
        else:
            kept = Sinks(SINKS, free) if self.kind == "sinks" else Window(self.budget)
        return kept if self.bits == PLAIN else Snapped(kept, bits=self.bits)


@dataclass(frozen=True)
class Lean:
    """A model and how it is stored. `masks` are true at the weights kept; `fours`: of each four of them two are."""

    model: Decoder
    grid: Grid | None = None
    masks: Masks = field(default_factory=dict)
    fours: bool = False
    memory: Memory = field(default_factory=Memory)
    guesses: int = 0  # tokens guessed at a time, by looking up what followed before

    def cache(self) -> Cache:
        return self.memory.cache(self.model)

    def say(
        self, ids: Tensor | Sequence[int], *, steps: int, temperature: float = 0.0, seed: int = 0
    ) -> Callable[[], int]:
        """A function that gives the next of `steps` tokens after `ids`, each time that it is called. Models that don't
        guess draw by the same dice: where their laws agree, so do their words."""
        how = {"steps": steps, "temperature": temperature, "seed": seed}
        if self.guesses:
            told = speculate(self.model, ids, drafter=Lookup(length=self.guesses), **how)  # type: ignore[arg-type]
        else:
            told = generate(self.model, ids, cache=self.cache(), **how)  # type: ignore[arg-type]
        return lambda: next(told)


# --- the techniques, in their order ------------------------------------------------------------------------------


def merged(lean: Lean, *, groups: int) -> Lean:
    """Key heads pooled into `groups`, without training."""
    _only(lean, "heads must be merged first", masks=False, rounded=False)
    return replace(lean, model=pool(lean.model, groups=groups))


def with_fewer_heads(lean: Lean, ids: Tensor, *, gone: int) -> Lean:
    """In each layer the `gone` query heads that write least on ids [B, T] are cut, and key heads that nobody uses."""
    _only(lean, "heads must be cut before weights are pruned or rounded", masks=False, rounded=False)
    heads = lean.model.shape.heads
    if not 0 < gone < heads:
        raise ValueError(f"gone must be from 1 to {heads - 1} heads, not {gone}")
    return replace(lean, model=cut(lean.model, heads=heads_of(lean.model, ids, keep=heads - gone)))


def pruned(lean: Lean, *, share: float) -> Lean:
    """The `share` of weights that are smallest in their matrix is set to zero."""
    _only(lean, "weights must be pruned before they are rounded", masks=False, rounded=False)
    return _masked(lean, magnitude(lean.model, sparsity=share, scope="layer"), fours=False)


def two_of_four(lean: Lean) -> Lean:
    """Of each four neighbours in a row the two smaller are set to zero."""
    _only(lean, "weights must be pruned before they are rounded", masks=False, rounded=False)
    return _masked(lean, two_four.masks(lean.model), fours=True)


def rounded(lean: Lean, *, bits: int, progress: Callable[[int, int], None] | None = None) -> Lean:
    """Every linear layer but routers on a grid of so many bits, the embedding on one of eight. Zeros stay zeros.

    `progress` is told the matrices done and all of them, and may raise to stop.
    """
    _only(lean, "weights are rounded already", masks=True, rounded=False)
    check_bits(bits, high=FLOAT - 1)
    grid = Grid(bits, symmetric=False, granularity="group", group=GROUP, whole_zero=False)
    twin = copied(lean.model)
    assert isinstance(twin, Decoder)
    names = matrices(lean.model)
    for done, name in enumerate(names):
        weight = weight_of(lean.model, name)
        own = own_grid(weight, grid if name != "embed" else replace(grid, bits=max(bits, EMBEDDING)))
        new = on_grid(weight, own)
        if f"{name}.weight" in lean.masks:
            new = new.masked_fill(~lean.masks[f"{name}.weight"], 0.0)
        if recording_on(ERROR, linear=name):
            tap(ERROR, ((new - weight).norm() / weight.norm()).float(), "", linear=name)
        _put(twin, name, new)
        if progress is not None:
            progress(done + 1, len(names))
    return replace(lean, model=twin, grid=grid)


def mended(lean: Lean, *, steps: int, rate: float = 1e-3, seed: int = 1, before: Decoder | None = None,
           progress: Callable[[int, int, float], None] | None = None) -> Lean:  # fmt: skip
    """Trained on for `steps` on Toyland's texts with the grid on and the pruned weights held at zero.

    `before` is the model as it was before it was rounded: training moves the floats behind the codes, and those of the
    rounded model have forgotten which way they leaned.
    """
    from engine.recipes import Recipe, Stage  # here, since recipes import the model that this file works on
    from engine.train import train

    if steps < 1:
        raise ValueError(f"steps must be above 0, not {steps}")
    start = before or lean.model
    with torch.inference_mode(False), torch.enable_grad():
        twin = copy.deepcopy(start)
        twin._ropes = {}  # tables made in inference mode cannot be trained through
        for p in twin.parameters():
            p.data = p.detach().clone()
        if lean.grid is not None:
            twin = _with_grids(twin, lean.grid)
        stages = (Stage(steps, 16, 96),)
        recipe = Recipe(lambda _: twin, "mending", stages=stages, rate=rate, warmup=max(1, steps // 10), seed=seed)
        _hold(twin, lean.masks)
        try:
            train(twin, recipe, progress=progress, after=lambda model: _hold(model, lean.masks))
        finally:
            twin.eval().requires_grad_(False)
        done = replace(lean, model=_plain(twin, start), grid=None)
    return done if lean.grid is None else rounded(done, bits=lean.grid.bits)


def remembering(lean: Lean, *, kind: str, budget: int = 0, bits: int = FLOAT) -> Lean:
    """What the cache keeps, and in how many bits."""
    memory = Memory(kind, budget, bits)
    if lean.guesses and memory != Memory():
        raise ValueError("guessing ahead needs a full cache in float, since guesses are taken back")
    return replace(lean, memory=memory)


def guessing(lean: Lean, *, length: int) -> Lean:
    """`length` tokens guessed at a time by looking up what followed the last words before: not a word changes."""
    if lean.memory != Memory():
        raise ValueError("guessing ahead needs a full cache in float, since guesses are taken back")
    if length < 1:
        raise ValueError(f"length must be a number of guessed tokens above 0, not {length}")
    return replace(lean, guesses=length)


# --- what it takes -----------------------------------------------------------------------------------------------


def weight_bytes(lean: Lean) -> float:
    """Bytes of all weights as a file would hold them."""
    stored = {f"{name}.weight": weight_bits(lean, name) / 8 for name in matrices(lean.model)}
    if recording_on(PARTS_BYTES):
        tap(PARTS_BYTES, torch.tensor(list(stored.values())), "matrix")
    rest = sum(p.numel() for name, p in lean.model.named_parameters() if name not in stored)
    return sum(stored.values()) + rest * FLOAT / 8


def weight_bits(lean: Lean, name: str) -> int:
    """Bits of the matrix called `name`: codes or floats, scales and minima, and the map of what is kept."""
    weight = weight_of(lean.model, name)
    every, mask = weight.numel(), lean.masks.get(f"{name}.weight")
    each, constants = FLOAT, 0
    if lean.grid is not None:
        each = max(lean.grid.bits, EMBEDDING) if name == "embed" else lean.grid.bits
        constants = every // group_of(weight) * 2 * FLOAT
    if mask is None:
        return every * each + constants
    kept = int(mask.sum())
    told = 2 * kept if lean.fours else every
    return min(every * each, kept * each + told) + constants


def cache_bytes(lean: Lean, cache: Cache, *, rows: int = 1) -> float:
    """Bytes that each of the `rows` texts takes in a `cache` that has read them: floats at 16 bits, codes and all else
    as they are held."""
    mixers: list[Any] = [block.mixer for block in lean.model.blocks]
    layers = [2 * mixer.kv_heads * mixer.head_width for mixer in mixers]  # values of a token
    if isinstance(cache, Full):  # it has slots in store, which do not count
        return sum(layers) * cache.seen * FLOAT / 8
    wide = lean.model.embed.weight.element_size() - FLOAT // 8  # bytes of each float beyond 16 bits
    if isinstance(cache, Quantised):
        floats = cache.whole_values / rows
    elif isinstance(cache, Snapped):
        floats = 0.0
    else:
        floats = sum(values * cache.kept(i).shape[-1] for i, values in enumerate(layers))
    return cache.nbytes / rows - wide * floats


def multiplications(lean: Lean, *, keys: int) -> dict[str, int]:
    """Multiplications of one new token that meets `keys` keys. Zeros are multiplied like all else; but a 2:4 matrix is
    stored without them, for hardware that skips them."""
    count = dict(zip(PARTS, products(lean.model, rows=1, keys=keys), strict=True))
    if lean.fours:
        routers = sum(m.weight.numel() for name, m in linears(lean.model).items() if name.endswith("router"))
        for part in ("qkv", "out", "ffn"):
            dense = routers if part == "ffn" else 0  # routers are never pruned
            count[part] -= (count[part] - dense) // 2
    return count


# --- grids -------------------------------------------------------------------------------------------------------


def matrices(model: Decoder) -> list[str]:
    """The modules whose weights are rounded: linear layers but routers, which choose, and the embedding."""
    return ["embed", *(name for name in linears(model) if not name.endswith("router"))]


def weight_of(model: Decoder, name: str) -> Tensor:
    """The weight of the module called `name`, without its gradient."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def group_of(weight: Tensor) -> int:
    """The largest power of two up to GROUP that divides a row."""
    return min(GROUP, weight.shape[-1] & -weight.shape[-1])


def own_grid(weight: Tensor, grid: Grid) -> Grid:
    """`grid` with groups that divide the rows of this weight."""
    return replace(grid, group=group_of(weight))


@torch.no_grad()
def on_grid(weight: Tensor, grid: Grid) -> Tensor:
    """The weight rounded, its scales and minima in 16 bits."""
    x = weight.float()
    scale, zero = choose(x, replace(grid, scale_dtype=torch.float16))
    zero = zero.half().float()
    return place(snap(x, scale, zero, grid), scale, zero, grid).to(weight.dtype)


def _with_grids(model: Decoder, grid: Grid) -> Decoder:
    """The model with layers that round as they compute, ready to train."""
    groups: dict[int, list[str]] = {}
    for name in matrices(model)[1:]:
        groups.setdefault(group_of(weight_of(model, name)), []).append(name)
    for group, some in groups.items():
        prepared = prepare(model, weights=replace(grid, group=group), names=some)
        assert isinstance(prepared, Decoder)
        model = prepared
    return model


def _plain(trained: Decoder, like: Decoder) -> Decoder:
    """The trained floats in a model of plain layers."""
    twin = copy.deepcopy(like)
    weights = {name: p.detach() for name, p in trained.named_parameters()}
    for name, p in twin.named_parameters():
        p.data = weights[name].clone()
    return twin.eval().requires_grad_(False)


@torch.no_grad()
def _hold(model: Decoder, masks: Masks) -> None:
    """Pruned weights are zero, whatever the optimiser made of them."""
    for name, mask in masks.items():
        layer, _, last = name.rpartition(".")
        getattr(model.get_submodule(layer), last).masked_fill_(~mask, 0.0)


def _put(model: Decoder, name: str, weight: Tensor) -> None:
    model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)


def _masked(lean: Lean, masks: Masks, *, fours: bool) -> Lean:
    masks = {name: mask for name, mask in masks.items() if not name.endswith("router.weight")}
    model = apply(lean.model, masks)
    assert isinstance(model, Decoder)
    return replace(lean, model=model, masks=masks, fours=fours)


def _only(lean: Lean, said: str, *, masks: bool, rounded: bool) -> None:
    """Raise unless the model is without masks and float, where `masks` and `rounded` do not allow them."""
    if (lean.masks and not masks) or (lean.grid is not None and not rounded):
        raise ValueError(said)
