"""What the lessons on sharing the cache have in common: one calculator, one strip, one way of weighing and judging.

A learner who goes from heads to layers to latents sees the same strip, in the same unit, shrink: the bytes that one
more token adds to the cache, layer by layer, weighed where the layer hands its keys and values to a real cache.

    weigh("mqa", model, ids)                                       # taps BYTES, design="mqa"
    judge("mqa", model)                                            # taps PERPLEXITY and RECALL, design="mqa"
    footprint(("toy", "MHA", "8 key heads"), ("mqa", "MQA", "1"))  # the strips
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from engine import checkpoints, cost
from engine.caches.full import Full
from engine.generate import generate
from engine.model import Shape
from engine.published import PUBLISHED
from engine.recording import note, record, site, tap
from engine.timing import in_turns
from engine.toyland import Grammar, batch
from engine.train import measure
from engine.zoo import build
from lessons.views import Arithmetic, Calculator, Field, Footprint, Holding, Plane, Points, of

BYTES = site("sharing.bytes", "bytes that one more token adds to the cache, layer by layer", low=0.0, unit="B")
PERPLEXITY = site("sharing.perplexity", "e to the mean surprisal, on texts of Toyland that no model was trained on")
RECALL = site("sharing.recall", "share of the questions' words that come first", low=0.0, high=1.0)
MS = site("sharing.milliseconds", "time of one new token, the best of several", unit="ms")
TOTALS = site("sharing.totals", "bytes a token, one for each model", unit="B")
QUALITY = site("sharing.perplexities", "perplexity, one for each model")
TEXTS = {"rows": 16, "length": 128}  # what `judge` reads: 2,048 tokens, the same for all
SERVED = {"rows": 8, "length": 512}  # conversations and tokens of each, for `milliseconds`
MODELS = {
    "llama-2-7b": "Llama-2-7B",
    "llama-3-8b": "Llama-3-8B",
    "mistral-7b": "Mistral-7B",
    "mixtral-8x7b": "Mixtral-8x7B",
    "deepseek-v2": "DeepSeek-V2",
    "smollm2": "SmolLM2-135M",
}


class Weighed(Full):
    """A plain cache that remembers how many bytes each layer gave it for its newest token.

    A layer with a window keeps its own, bounded notes elsewhere and adds nothing here: a token more, a token less.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}

    def extend(self, layer: int, k: Any, v: Any, rope: Any) -> Any:
        self.bytes[layer] = sum(t[:, :, -1:].numel() * t.element_size() for t in (k, v))
        return super().extend(layer, k, v, rope)


def weigh(design: str, model: Any, ids: Sequence[int]) -> np.ndarray:
    """Bytes that one more token adds in each layer of `model`, which reads `ids` for it; taps them."""
    cache = Weighed()
    with record(keep={}):  # the steps of this reading are no steps of the lesson
        list(generate(model, ids, steps=1, cache=cache))
    return tap(BYTES, np.array([cache.bytes.get(i, 0) for i in range(model.shape.layers)], np.int32), "layer",
               design=design)  # fmt: skip


def judge(design: str, model: Any) -> dict[str, float]:
    """Perplexity and recall of a toy on held-out texts; taps them."""
    found = measure(model, Grammar(), **TEXTS)
    tap(PERPLEXITY, found["perplexity"], "", design=design)
    tap(RECALL, found["recall"], "", design=design)
    return found


def milliseconds(models: Sequence[Any], *, tries: int = 9) -> list[float]:
    """Of each model the quickest of some decode steps, for SERVED conversations at once: one alone fits into any cache.

    They take turns, so that a machine with other work slows all of them.
    """
    ids = batch(Grammar(), seed=0, step=0, stream="test", **SERVED).ids
    caches = [Full(capacity=SERVED["length"] + tries) for _ in models]

    def decoding(model: Any, cache: Full) -> Callable[[], object]:
        model.hidden(ids, cache=cache)
        tokens = iter(ids.split(1, dim=1))
        return lambda: model.hidden(next(tokens), cache=cache)

    with record(keep={}):
        steps = {str(i): decoding(*pair) for i, pair in enumerate(zip(models, caches, strict=True))}
        return [min(taken) * 1e3 for taken in in_turns(steps, rounds=tries, warm_up=0).values()]


def compare(designs: Mapping[str, str], ids: Sequence[int]) -> None:
    """Toys trained alike, {name: label}: what they keep, how well they read, how long a new token takes them.

    Notes in `missing` those whose weights are not here: of them only the cache is known.
    """
    kept, quality = [], []
    found = {name: toy(name) for name in designs}
    for name, (model, trained) in found.items():
        kept.append(int(weigh(name, model, ids).sum()))
        quality.append(judge(name, model)["perplexity"] if trained else unknown(name))
    note(missing=[designs[name] for name, (_, trained) in found.items() if not trained])
    tap(TOTALS, np.array(kept, np.float32), "design")
    tap(QUALITY, np.array(quality, np.float32), "design")
    tap(MS, np.array(milliseconds([model for model, _ in found.values()]), np.float32), "design")


def toy(name: str) -> tuple[Any, bool]:
    """The toy called `name`, and whether it is trained: where weights are missing, the shape still tells the cache."""
    if checkpoints.available(name)[0]:
        return checkpoints.load(name)[0], True
    return build(name).eval().requires_grad_(False), False


def unknown(design: str) -> float:
    """In place of `judge`, for a toy whose weights are not here."""
    tap(RECALL, math.nan, "", design=design)
    return tap(PERPLEXITY, math.nan, "", design=design)


def footprint(*designs: tuple[str, str, str], quality: bool = True, **view: Any) -> Footprint:
    """The strips of some designs, each (its name, label, detail), with their perplexity beside them."""
    holdings = tuple(
        Holding(
            label, of(BYTES, design=name), detail,
            figure=of(PERPLEXITY, design=name) if quality else None, figure_label="perplexity", figure_format=".2f",
        )
        for name, label, detail in designs
    )  # fmt: skip
    return Footprint(
        holdings=holdings, **({"name": "footprint", "title": "What one more token costs", "origin": "toy"} | view)
    )


def front(*labels: str, **view: Any) -> Plane:
    """What `compare` found, in its order: bytes a token against perplexity."""
    points = Points("toys trained alike", of(TOTALS), of(QUALITY), colour="key", names=labels)
    shown = {
        "name": "front",
        "title": "Small and good?",
        "note": "lower left is better",
        "origin": "toy",
        "height": 230,
    }
    axes: dict[str, Any] = {
        "x_label": "bytes a token",
        "y_label": "perplexity",
        "log_x": True,
        "x_format": ",.0f",
        "format": ".2f",
    }
    return Plane(points=(points,), **{**axes, **shown, **view})


# --- the calculator -----------------------------------------------------------------------------------------

FIELDS = (
    Field("layers", "Layers", 32, 1, 1000),
    Field("heads", "Query heads", 32, 1, 1024),
    Field("kv_heads", "Key heads", 32, 1, 1024),
    Field("width", "Head width", 128, 2, 4096),
    Field("latent", "Latent note", 0, 0, 65536, unit="values"),
    Field("share", "Layers a cache", 1, 1, 1000),
    Field("window", "Window", 0, 0, 10_000_000, unit="tokens"),
    Field("bits", "Bits a value", 16, 1, 64, whole=False),
    Field("tokens", "Length", 32768, 1, 10_000_000, unit="tokens"),
    Field("memory", "Memory", 80, 0.001, 1_000_000, unit="GB", whole=False),
)


def calculator(**view: Any) -> Calculator:
    """Published shapes or typed-in ones: bytes a token, bytes at a length, tokens that fit."""
    presets = tuple((label, _preset(name)) for name, label in MODELS.items())
    shown = {"name": "calculator", "title": "Work it out for any model"} | view
    return Calculator(fields=FIELDS, presets=presets, compute=compute, **shown)


def _preset(name: str) -> dict[str, float]:
    model = PUBLISHED[name]
    s = model.shape
    return {
        "layers": s.layers, "heads": s.heads, "kv_heads": s.kv_heads, "width": s.head_width,
        "latent": model.latent, "window": model.window, "share": 1, "bits": 16,
    }  # fmt: skip


def compute(typed: Mapping[str, float]) -> Arithmetic:
    """The cache of the shape that was typed in, by the formulas of engine/cost.py."""
    layers, heads, kv_heads, width = (int(typed[name]) for name in ("layers", "heads", "kv_heads", "width"))
    latent, share, window, tokens = (int(typed[name]) for name in ("latent", "share", "window", "tokens"))
    if heads % kv_heads:
        raise ValueError(f"Key heads must divide the {heads} query heads, and {kv_heads} does not.")
    if width % 2:
        raise ValueError(f"Head width must be even, since positions turn pairs of values, and {width} is odd.")
    if layers % share:
        raise ValueError(f"Layers a cache must divide the {layers} layers, and {share} does not.")
    value, memory = typed["bits"] / 8, typed["memory"] * 1e9
    shape = Shape(1, heads * width, layers, heads, kv_heads, width, 1)
    every = Shape(1, heads * width, layers, heads, heads, width, 1)
    if latent:
        values, made = cost.latent_values(layers, rank=latent, rope_width=0) // share, f"{layers} · {latent}"
    else:
        values, made = cost.cla_values(shape, factor=share), f"2 · {layers} · {kv_heads} · {width}"
    a_token = values * value
    held = min(tokens, window) if window else tokens
    made = f"{made}{f' ÷ {share}' if share > 1 else ''} · {value:g} B"
    fit = cost.tokens_that_fit(memory, a_token)
    times = cost.kv_values(every) / values
    lines = (
        ("Bytes a token", size(a_token)),
        (made, f"{a_token:,.0f}"),
        ("Bytes a token, one layer" if share == 1 else "Bytes a token, layers’ mean", size(a_token / layers)),
        (f"One layer at {held:,} tokens", size(a_token * held / layers)),
        (f"All layers at {held:,} tokens", size(a_token * held)),
        (f"Tokens that fit in {typed['memory']:g} GB", "any number" if window and fit >= window else f"{fit:,}"),
        ("Against a key head for every query head", f"{times:,.1f}× smaller"),
    )
    note = f"The window holds the last {window:,} tokens; more take no more room." if window and tokens > window else ""
    return Arithmetic("", lines, note=note, values={"bytes": a_token, "values": values, "fit": fit, "times": times})


def size(count: float) -> str:
    """Bytes for people, in thousands, as the sources have them."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:,.0f} B"
