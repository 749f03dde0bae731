"""Fewer key/value heads from a trained model: adjacent heads are pooled into one, and a short training mends the rest.

GQA (arXiv:2305.13245), sections 2.1 (uptraining: pool, then train on with a small share of the steps) and 2.2 (groups);
what is compared here is in its figure on checkpoint conversion. Paper -> here: G = `groups`, H = heads, alpha = the
share of the original steps that `uptrain` takes; Mean, First, Random = `how`.
What is pooled are the projection matrices W^K and W^V, not keys and values: linear, so a mean of matrices is a mean of
keys. The heads of a group are neighbours, as `repeat_interleave` puts them and not as `repeat` does.
Deviation: "random" draws new heads as a fresh decoder does, normal and 0.02 wide.

    small = pool(load("toy"), groups=2)          # worse at first
    losses = uptrain(small, steps=100)           # and mended
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.mixers.softmax import SoftmaxAttention
from engine.mixers.state import at_least
from engine.model import Decoder
from engine.recording import recording_on, site, tap

if TYPE_CHECKING:
    from engine.train import Progress

WIRING = site("pooling.share", "how much of each old key head is in each new one", low=0.0, high=1.0)
LOST = site("pooling.distance", "how far an old head is from the one that it now shares, over its own length",
            symbol="‖W - W'‖ / ‖W‖", low=0.0)  # fmt: skip

HOW = ("mean", "first", "random")


@torch.no_grad()
def pool(model: Decoder, *, groups: int, how: str = "mean", seed: int = 0) -> Decoder:
    """A new decoder of `groups` key/value heads; all weights but these are copies of the old ones.

    `seed` is for "random" alone. Raises ValueError unless `groups` divides the key/value heads that there are.
    """
    shape = _softmax(model).shape
    if shape.kv_heads % at_least("groups", groups, 1):
        raise ValueError(f"groups must divide the {shape.kv_heads} key/value heads, and {groups} does not")
    if how not in HOW:
        raise ValueError(f"how must be one of {', '.join(HOW)}, not {how!r}")
    tap(WIRING, shares(shape.kv_heads, groups=groups, how=how), "group head")
    generator = torch.Generator().manual_seed(seed)

    def pooled(heads: Tensor, layer: int, of: str) -> Tensor:
        grouped = heads.unflatten(0, (groups, -1))  # g K/g D W
        if how == "random":
            new = torch.empty(groups, *heads.shape[1:]).normal_(0.0, 0.02, generator=generator).to(heads)
        else:
            # From the first one on, so that the mean of equal heads is that head to the last bit.
            first = grouped[:, 0]
            new = first + (grouped - first[:, None]).mean(1) if how == "mean" else first
        if recording_on(LOST, layer=layer, of=of):
            away = (grouped - new[:, None]).flatten(2).norm(dim=-1) / grouped.flatten(2).norm(dim=-1)
            tap(LOST, away.flatten(), "head", layer=layer, of=of)
        return new  # g D W

    return _with_heads(model, groups, pooled)


def repeat(model: Decoder) -> Decoder:
    """The same function with a key/value head for every query head (MHA): each is repeated, side by side."""
    times = _softmax(model).shape.heads // model.shape.kv_heads
    return _with_heads(model, model.shape.heads, lambda heads, layer, of: heads.repeat_interleave(times, 0))


def shares(kv_heads: int, *, groups: int, how: str = "mean") -> Tensor:
    """How much of each old head is in each new one: [groups, kv_heads]."""
    size = kv_heads // groups
    share = torch.eye(groups).repeat_interleave(size, 1)  # g K
    if how == "mean":
        return share / size
    return share * (torch.arange(kv_heads) % size == 0) if how == "first" else torch.zeros_like(share)


def _softmax(model: Decoder) -> Decoder:
    kinds = {type(block.mixer) for block in model.blocks}
    if kinds != {SoftmaxAttention}:
        raise ValueError(f"model must have softmax attention in all layers, not {sorted(k.__name__ for k in kinds)}")
    return model


def _with_heads(model: Decoder, kv_heads: int, change: Callable[[Tensor, int, str], Tensor]) -> Decoder:
    shape = model.shape
    H, K, D = shape.heads, shape.kv_heads, shape.head_width
    # Made in inference mode, its weights could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            new = Decoder(replace(shape, kv_heads=kv_heads))
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        for layer in range(shape.layers):
            name = f"blocks.{layer}.mixer.qkv.weight"
            q, k, v = weights[name].split((H * D, K * D, K * D))
            k, v = (change(w.unflatten(0, (K, D)), layer, of).flatten(0, 1) for w, of in ((k, "k"), (v, "v")))
            weights[name] = torch.cat((q, k, v))
        new.load_state_dict(weights, assign=True)
    return new.eval().requires_grad_(False)


def uptrain(
    model: Decoder,
    *,
    steps: int,
    rate: float = 5e-4,
    rows: int = 16,
    length: int = 64,
    seed: int = 1,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[float]:
    """Train on in place, on texts that the zoo never read (`seed`); returns the loss of each step that was done.

    Each step taps what `engine.train.train` taps. `stop` is asked after every step, and `progress` or a recorder may
    raise: either way the model is whole, and as good as the steps made it.
    """
    from engine.recipes import Recipe, Stage  # here, since the zoo may name converted models in turn
    from engine.train import train

    at_least("steps", steps, 1)
    if not 0 < rate < float("inf"):
        raise ValueError(f"rate must be a number above 0, not {rate!r}")
    stages = (Stage(steps, rows, length),)
    recipe = Recipe(lambda _: model, "uptraining", stages=stages, rate=rate, warmup=max(1, steps // 10), seed=seed)
    losses: list[float] = []

    def after(done: int, of: int, loss: float) -> None:
        losses.append(loss)
        if progress is not None:
            progress(done, of, loss)
        if stop is not None and stop():
            raise _StopError

    try:
        with torch.inference_mode(False), torch.enable_grad():
            train(model, recipe, progress=after)
    except _StopError:
        pass
    finally:
        model.eval().requires_grad_(False)
    return losses


class _StopError(Exception):
    """The learner has seen enough."""
