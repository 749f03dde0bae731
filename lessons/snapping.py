"""What the lesson on quantisation computes: the lecture's example, every layer's error, and the model, read again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engine.quant import as_matrix, capture_inputs, linears, quantised
from engine.quant.affine import Grid, quantise
from engine.quant.integer import integer_matmul
from engine.quant.integer import recipe as on_a_grid
from engine.quant.kmeans import kmeans
from engine.quant.kmeans import recipe as on_a_codebook
from engine.recording import note, record, site, step, tap
from lessons import microscope as see
from lessons.cells import LECTURE, numbers

LAYER = site("quantise.layer", "the layer that is measured")
ERROR = site("quantise.error", "mean squared error of a layer, in variances of what was rounded", low=0.0)
SPREAD = site("quantise.spread", "standard deviation of each output channel, sorted", low=0.0)
EACH = site("quantise.each", "bits a weight, its share of scales and zero points among them", unit="bits")
MEAN = site("quantise.mean", "mean error of the layers so far, in variances of the weights", low=0.0)
WORK = site("quantise.work", "multiplications: of integers, and by scales and zero points")
SETTINGS = {"float": "as it was", "tensor": "one scale a matrix", "channel": "one a channel", "group": "one a group",
            "k-means": "a codebook a matrix"}  # fmt: skip


def grid_of(knobs: Any, bits: int, grain: str, *, columns: int) -> Grid:
    """The even grid that the knobs ask for; a group is cut to what divides the columns."""
    group = math.gcd(knobs.group, columns) if grain == "group" else None
    whole = knobs.kind != "offset"
    return Grid(bits, symmetric=knobs.kind == "symmetric", granularity=grain, group=group, whole_zero=whole)


def lecture() -> None:
    """The lecture's own example, whatever the knobs say."""
    x = as_matrix(numbers(LECTURE))
    with record(keep={}):
        book, even = kmeans(x, bits=2), quantise(x, Grid(2, symmetric=False))
    printed = round(float(even.scale), 2)  # the lecture rounds its scale before it multiplies
    note(
        codebook=book.centroids[0].tolist(),
        indices=book.codes.tolist(),
        scale=float(even.scale),
        zero=int(even.zero),
        codes=even.codes.tolist(),
        printed_top=float((even.codes - even.zero).max() * printed),
        top=float(even.reconstruct().max()),
    )


def work_of(x: Any) -> None:
    """What a product of four activations with the matrix, in rows of four, takes in integers."""
    flat = x.flatten()
    rows = flat[: len(flat) // 4 * 4].reshape(-1, 4) if len(flat) >= 4 else as_matrix([[0.0] * 4])
    with record(keep={}):
        given, matrix = quantise(as_matrix([[1.0, 2.0, 3.0, 4.0]]), Grid(8)), quantise(rows, Grid(8))
    work = integer_matmul(given, matrix)[1]
    tap(WORK, np.array([work.code_multiplications, work.scale_multiplications + work.zero_multiplications]), "kind")


def measure_layers(model: Any, ids: Any, knobs: Any, chosen: int) -> None:
    """Layer by layer: how much finer scales help, for weights and for what they are given."""
    names = [f"blocks.{i}.{knobs.part}" for i in range(model.shape.layers)]
    weights = linears(model)
    with record(keep={}), capture_inputs(model, names=names, rows=64) as inputs:
        model.hidden(ids[:, :64])
    total: dict[str, float] = {}
    for layer, name in enumerate(names):
        w, a = weights[name].weight.detach(), inputs[name]
        tap(LAYER, layer, "")
        for what, x, grains in (("weights", w, ("tensor", "channel", "group")), ("inputs", a, ("tensor", "token"))):
            for grain in grains:
                grid = grid_of(knobs, knobs.weight_bits, grain, columns=x.shape[1])
                with record(keep={}):
                    done = quantise(x.float(), grid)
                error = (done.reconstruct() - x).double().square().mean() / x.double().var()
                tap(ERROR, float(error), "", what=what, grain=grain)
                if what == "weights":
                    tap(EACH, done.storage_bits / x.numel(), "", grain=grain)
                    total[grain] = total.get(grain, 0.0) + float(error)
                    tap(MEAN, total[grain] / (layer + 1), "", grain=grain)
        if layer == chosen:
            spread = w.double().std(1).sort().values.cpu().numpy()
            tap(SPREAD, spread[np.linspace(0, len(spread) - 1, min(len(spread), 200)).astype(int)], "channel")
            note(spread_low=float(spread[0]), spread_high=float(spread[-1]))
            # Sixteen levels in each group of 32, where somebody stored the weights so.
            back = quantise(w.float(), Grid(4, symmetric=False, granularity="group", group=32, whole_zero=False))
            note(found=float((back.reconstruct() - w).double().square().mean() / w.double().var()))
        step(label="layer")


def read_models(model: Any, tokenizer: Any, ids: Any, knobs: Any) -> None:
    """The whole model, rounded in each of the ways: perplexity on the text, and the next token of one of them."""
    for name in SETTINGS:
        twin = model
        if name == "k-means":
            codebook = on_a_codebook(bits=knobs.weight_bits)
            with record(keep={}):
                twin = quantised(model, codebook)
        elif name != "float":
            twin = quantised(model, lambda n, m, grain=name: on_a_grid(  # type: ignore[misc]
                weights=grid_of(knobs, knobs.weight_bits, grain, columns=m.in_features))(n, m))  # fmt: skip
        see.read_on(twin, ids, chunk=24, method=name)
        if name == knobs.method:
            see.next_token(model, twin, tokenizer, ids)
