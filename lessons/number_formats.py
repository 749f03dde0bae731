"""What a number costs: the same numbers in 32 bits, 16, 8 and 4: bit by bit, on the number line, in a whole model."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import param

from engine.quant import as_matrix, linears, quantised
from engine.quant.formats import FORMATS, Float, Format, bits_of, ends, level_numbers, losses, number_line, rounded
from engine.quant.nf4 import from_blocks, to_blocks
from engine.quant.stored import recipe, residuals, stored, stored_bits
from engine.recording import Recording, note, site, step, tap
from lessons import microscope
from lessons.cells import LECTURE, Matrix, numbers
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.microscope import PARTS, corner, look_at, next_token, next_views, perplexities, read_on, walk
from lessons.models import TOY, choice, load
from lessons.texts import NAMES, OWN, text_ids
from lessons.views import Bars, BitRow, Bits, Plane, Points, Ruler, Rulers, knob, of

NUMBER = site("formats.number", "the number, as it was typed", symbol="x")
STORED = site("formats.bits", "the bits that a format stores for it, most significant first", symbol="b")
VALUE = site("formats.value", "what these bits stand for", symbol="x̂")
OFF = site("formats.off", "how far that is from the number")
HEAP = site("formats.heap", "share of the values whose size lies from 2^k to 2^(k+1)", low=0.0)
ENDS = site("formats.ends", "smallest above 0, smallest of full precision, largest, bits of the mantissa")
LEVELS = site("formats.levels", "the positive numbers that a format has, times the scale that it needs here")
LOST = site("formats.lost", "share of the values that become 0, and share of those too large", low=0.0)
MEGABYTES = site("formats.megabytes", "what the linear layers' weights take", unit="MB")
SIZES = site("formats.sizes", "the same for all formats so far", unit="MB")
RESULT = site("formats.perplexity", "perplexity on the text, with weights that were stored in the format")
OCTAVES = (-64, 64)
TOKENS = 96  # of the text that is read for a perplexity
SAMPLE = 16_384  # values of a layer that are dropped: as many as tell, as few as are quick
KINDS = {"The model’s weights": "weights", "The residual stream": "residual", "Its squares, for a norm": "squares"}
SHORT = {"fp8 e4m3fn": "fp8 e4m3", "nf4": "NF4"}
COLOURS = dict(zip(FORMATS, ("ink", "query", "value", "key", "sink", "recomputed", "heavy", "recent"), strict=True))
DETAILS = {
    "fp32": "single precision", "fp16": "half precision", "bf16": "brain float", "fp8 e4m3fn": "finer",
    "fp8 e5m2": "wider", "int8": "whole numbers", "int4": "whole numbers", "nf4": "16 levels, −1 to 1",
}  # fmt: skip


CAVEAT = "Mind: these weights came here from a 4-bit grid; others may lose more, or less."


class Turn(Knobs):
    model = choice()
    number = param.String("0.1", label="Number", doc="A number, or a format and its bits: fp16 0011110000000000.")
    form: param.Selector = param.Selector(
        default="fp8 e4m3fn", objects={SHORT.get(name, name): name for name in FORMATS}, label="Format of the matrix"
    )
    source: param.Selector = param.Selector(
        default="cells", objects={"The cells below": "cells", "Weights of a layer": "layer"}, label="Matrix from"
    )
    matrix = Matrix(LECTURE, label="Cells", doc="Type, or paste from a spreadsheet.")
    layer = param.Integer(12, bounds=(0, 29), label="Layer", doc="Whose weights are looked at.")
    part: param.Selector = param.Selector(default="ffn.down", objects=dict(PARTS), label="Which weights")
    dropped: param.Selector = param.Selector(default="weights", objects=dict(KINDS), label="Dropped on the rulers")
    text: param.Selector = param.Selector(
        default="bread",
        objects={label: name for label, name in NAMES.items() if name != OWN},
        label="Text",
        doc="Read.",
    )


def run(knobs: Turn) -> None:
    one, pattern = number_of(knobs.number)
    model, tokenizer = load(knobs.model)
    form = FORMATS[knobs.form]
    _show_bits(one, pattern)
    if knobs.source == "cells":
        x = as_matrix(numbers(knobs.matrix))
    else:
        x = corner(linears(model)[f"blocks.{min(knobs.layer, model.shape.layers - 1)}.{knobs.part}"].weight.detach())
    tap(microscope.TYPED, int(knobs.source == "cells"), "")
    _show_matrix(x, form)
    ids = text_ids(tokenizer, knobs.text, "", toy=knobs.model == TOY, tokens=TOKENS)
    ids = model.embed.weight.new_tensor([ids]).long()
    _drop(model, ids, knobs.dropped)
    _cost(model, tokenizer, ids, form)


def number_of(text: str) -> tuple[float, tuple[str, int] | None]:
    """The number that was typed, and the bits that it was given by, if it was."""
    text = text.strip().replace("−", "-")
    for name, form in FORMATS.items():
        if text.startswith((name + " ", SHORT.get(name, name) + " ")):
            bits = re.sub(r"\s", "", text[len(name if text.startswith(name) else SHORT[name]) :])
            if not re.fullmatch("[01]+", bits) or len(bits) != form.bits:
                raise ValueError(f"Number: {name} has {form.bits} bits, each 0 or 1, not “{bits[:40]}”.")
            value = float(form.decode(as_matrix([[0.0]]).long() + int(bits, 2)))
            return value, (name, int(bits, 2))
    try:
        return float(text), None
    except ValueError:
        raise ValueError(
            f"Number: “{text[:40]}” is no number; 0.1, 1e-8 and inf are, and so is fp16 0011110000000000."
        ) from None


def _show_bits(one: float, pattern: tuple[str, int] | None) -> None:
    x = as_matrix([[one]])
    tap(NUMBER, one, "")
    for name, form in FORMATS.items():
        # Whole numbers and NF4 have no infinity and no NaN: the nearest end stands there, or zero.
        fitting = x if isinstance(form, Float) else x.nan_to_num(0.0, 1e9, -1e9)
        code = form.encode(fitting)
        if pattern and pattern[0] == name:
            code = code * 0 + pattern[1]
        tap(STORED, bits_of(code, form)[0, 0], "bit", form=name)
        value = float(form.decode(code))
        same = value == one or (value != value and one != one)
        tap(VALUE, value, "", form=name)
        tap(OFF, 0.0 if same else value - one, "", form=name)


def _show_matrix(x: Any, form: Format) -> None:
    """The matrix in the format: whole numbers and NF4 are given a scale by the largest value."""
    x = x.double()
    scale = 1.0
    if isinstance(form, Float):
        code, back = form.encode(x), rounded(x, form, what="matrix")
    else:
        code, largest = to_blocks(x, form=form, block=x.numel())
        back = from_blocks(code, largest, form=form).view(x.shape)
        scale = float(largest) / ends(form)[2]
    back = back.nan_to_num(0.0, float(ends(form)[2]), -float(ends(form)[2]))
    steps = level_numbers(code, form).view(x.shape)
    if form.bits <= 8:
        every = number_line(form).double()
        first, last = int(steps.min()) - 1, int(steps.max()) + 1
        zero = int((every < 0).sum())
        low, high = max(0, zero + first), min(len(every), zero + last + 1)
        levels, marks = every[low:high] * scale, (low - zero, high - 1 - zero)
    else:
        levels, marks = back.unique(), (int(steps.min()), int(steps.max()))
    look_at(x, steps, back, levels=levels, ends=marks)
    walk(x, back)


def _drop(model: Any, ids: Any, kind: str) -> None:
    """Layer by layer, values onto the rulers; how many of them a format cannot hold."""
    stream = dict(residuals(model, ids))
    largest = max(float(x.abs().max()) for x in stream.values())
    note(residual_largest=largest, residual_median=float(np.median(stream[len(stream) - 1].abs().float().cpu())))
    low, high = OCTAVES
    heap, lost, count = np.zeros(high - low), {name: np.zeros(2) for name in FORMATS}, 0
    over = 0
    weights = linears(model)
    for layer in range(model.shape.layers):
        x = stream[layer].double().flatten()
        over += losses(x**2, FORMATS["fp16"]).overflow
        if kind == "weights":
            found = [linear.weight.detach().flatten() for n, linear in weights.items() if f"blocks.{layer}." in n]
            every = max(1, sum(map(len, found)) // SAMPLE)
            x = found[0].new_tensor(np.concatenate([w[::every].float().cpu().numpy() for w in found])).double()
        elif kind == "squares":
            x = x**2
        sizes = np.abs(x.cpu().numpy())
        powers = np.floor(np.log2(sizes[sizes > 0])).astype(int).clip(low, high - 1)
        heap += np.bincount(powers - low, minlength=high - low)
        count += len(x)
        tap(HEAP, (heap / count).astype(np.float32), "octave")
        for name, form in FORMATS.items():
            found_lost, scale = _lost(x, form)
            lost[name] += found_lost
            tap(LOST, (lost[name] / count).astype(np.float32), "end", form=name)
            least, normal, most = ends(form)
            mantissa = form.mantissa_bits if isinstance(form, Float) else 0
            tap(ENDS, np.array([least * scale, normal * scale, most * scale, mantissa]), "end", form=name)
            if form.bits <= 8:
                tap(LEVELS, (number_line(form)[number_line(form) > 0] * scale).numpy(), "level", form=name)
        step(label="layer")
    note(lost={name: (lost[name] / count).tolist() for name in FORMATS}, values=count)
    note(squares_over=over)


def _lost(x: Any, form: Format) -> tuple[np.ndarray, float]:
    """How many become 0, and how many are too large; and the scale that the format needs for them."""
    scale = 1.0 if isinstance(form, Float) else float(x.abs().max()) / ends(form)[2] or 1.0
    counted = losses(x / scale, form)
    return np.array([counted.underflow, counted.overflow], float), scale


def _cost(model: Any, tokenizer: Any, ids: Any, chosen: Format) -> None:
    """Every format in the whole model: megabytes, perplexity, the next token."""
    errors, size = {}, {}
    for name, form in FORMATS.items():
        weights = {n: linear.weight.detach() for n, linear in linears(model).items()}
        twin = quantised(model, recipe(form))
        some = next(w for n, w in weights.items() if n.endswith("ffn.down"))
        errors[name] = float(((stored(some, form) - some).double() / some.double().std()).square().mean())
        found = read_on(twin, ids, chunk=32, form=name)
        size[name] = sum(stored_bits(w, form) for w in weights.values()) / 8e6
        tap(MEGABYTES, size[name], "", form=name)
        tap(SIZES, np.array([size.get(n, 0.0) for n in FORMATS], np.float32), "format")
        tap(RESULT, found, "", form=name)
        if form is chosen:
            next_token(model, twin, tokenizer, ids)
        step(label="format")
    note(errors=errors)


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    ppl = perplexities(recording, "form")
    labels = recording.labels
    size = {name: float(recording.track(MEGABYTES, form=name).latest()) for name in FORMATS}
    key = {name: name.split()[-1].replace("fn", "") for name in FORMATS}
    back, x = (recording.track(name).latest() for name in (microscope.BACK, microscope.VALUES))
    spans = {f"largest_{key[name]}": ends(form)[2] for name, form in FORMATS.items()}
    return {
        "name": meta["model"]["name"],
        "walked": max(i for i, label in enumerate(labels) if label == "value"),
        "dropped": max(i for i, label in enumerate(labels) if label == "layer"),
        "last": len(labels) - 1,
        "sixteen": [i for i, label in enumerate(labels) if label == "format"][2],
        **spans,
        **{f"mb_{key[name]}": size[name] for name in FORMATS},
        **{f"ppl_{key[name]}": ppl[name] for name in FORMATS},
        **{f"zero_{key[name]}": meta["lost"][name][0] for name in FORMATS},
        "residual_largest": meta["residual_largest"],
        "square_largest": meta["residual_largest"] ** 2,
        "squares_over": meta["squares_over"],
        "number_now": float(recording.track(NUMBER).latest()),
        "e5m2_factor": ppl["fp8 e5m2"] / ppl["fp32"],
        "caveat": CAVEAT if meta["model"]["kind"] == "real" else "",
        "worst": float(np.abs(back - x).max()),
        "off_16": abs(float(recording.track(OFF, form="fp16").latest())),
        "off_b16": abs(float(recording.track(OFF, form="bf16").latest())),
        "moved": float(recording.track(microscope.MOVED).latest()),
    }


def marks(recording: Recording) -> list[Mark]:
    f = facts(recording)
    return [Mark(f["walked"], "the matrix is through"), Mark(f["dropped"], "all layers are dropped")]


def _halves(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['mb_fp32']:.4g} → {f['mb_fp16']:.4g} → {f['mb_int8']:.4g} → {f['mb_int4']:.4g} MB"
    ratio = f["mb_fp32"] / f["mb_fp16"]
    per_block = "Whole numbers need a scale a block besides: 8 bits become 8.25, 4 become 4.25."
    return Finding(f"{ratio:.2f}× at 16 bits", "agrees" if ratio == 2 else "differs", per_block, filled)


def _range(recording: Recording) -> Finding:
    wide, brain, half = (ends(FORMATS[name]) for name in ("fp32", "bf16", "fp16"))
    same = brain[1] == wide[1] and brain[2] > 0.99 * wide[2]
    filled = f"largest {brain[2]:.3g} of {wide[2]:.3g}; smallest normal {brain[1]:.3g} and {wide[1]:.3g}"
    return Finding(f"{brain[2] / wide[2]:.3f}", "agrees" if same and half[2] < 1e5 else "differs", "", filled)


def _precision(recording: Recording) -> Finding:
    half, brain = (2 ** FORMATS[name].mantissa_bits for name in ("fp16", "bf16"))  # type: ignore[union-attr]
    filled = f"{half:,} and {brain:,} steps from 1 to 2, for the same 16 bits"
    return Finding(f"{half // brain}× finer", "agrees" if half == 8 * brain else "differs", "", filled)


def _eight(recording: Recording) -> Finding:
    fine, wide = (ends(FORMATS[name])[2] for name in ("fp8 e4m3fn", "fp8 e5m2"))
    same = (fine, wide) == (448, 57344)
    return Finding(f"{fine:,.0f} and {wide:,.0f}", "agrees" if same else "differs", "", "all 256 patterns decoded")


def _normal(recording: Recording) -> Finding:
    errors = recording.meta["errors"]
    better = errors["nf4"] < errors["int4"]
    filled = f"mean squared error in variances: NF4 {errors['nf4']:.5f}, int4 {errors['int4']:.5f}"
    why = "" if better else "These weights come off an even 4-bit grid already: its steps suit them, not the normal’s."
    return Finding(f"{errors['int4'] / errors['nf4']:.2f}×", "agrees" if better else "differs", why, filled)


FP8 = "Micikevicius 2022, 2209.05433"
# fmt: off
CLAIMS = (
    Claim("Memory halves with the bits", "lecture; post", "N · bits / 8", "half", _halves),
    Claim("bf16 keeps the range of fp32", "lecture", "largest bf16 / largest fp32", "the same range", _range),
    Claim("fp16 keeps more precision than bf16", "lecture", "steps between 1 and 2", "10 against 7 bits", _precision),
    Claim("The two kinds of fp8 end at 448 and 57,344", FP8, "largest finite value", "448, 57,344", _eight),
    Claim("NF4 fits normally distributed weights better than even steps", "Dettmers 2023, 2305.14314",
          "error int4 / error NF4", "NF4 is better", _normal),
)

BEATS = (
    Beat(
        "Inside a computer a number is a row of switches. ==Each row|bits== stores {number_now:.7g} in a format of its "
        "own: a sign, an [[exponent]] that says between which powers of two it lies, and a [[mantissa]] that says "
        "where between them. **Click a bit** and see what it is worth.",
        scene="bits", step=0, focus="bits", do=Do("Flip a bit", knob="number"),
        notes="Flip the highest exponent bit of fp16, then of bf16.",
    ),
    Beat(
        "Both [[fp16]] and [[bf16]] spend 16 bits. fp16 gives five of them to the exponent and ten to the mantissa, "
        "bf16 eight and seven. So one of them reaches far, and the other is precise: for {number_now:.7g} fp16 is off "
        "by {off_16:.2g}, bf16 by {off_b16:.2g}.",
        scene="bits", step=0, focus="bits",
        predict=Predict("What is the largest number that fp16 can hold?", (127, 2048, 65504, 3.4e38), "largest_fp16",
                        format=".6g"),
    ),
    Beat(
        "Seen as ==rulers|rulers==, on a scale of powers of two: each mark is a number that there is. fp16 ends at "
        "{largest_fp16:,.0f}; bf16 runs on to {largest_bf16:.2g}, as far as fp32, with fewer marks on the way. "
        "Eight and four bits have so few marks that you can count them.",
        scene="range", step="walked", focus="rulers",
    ),
    Beat(
        "Now {name}’s weights fall on them, layer by layer. ==What is red|rulers== cannot be held: in fp8 e4m3, "
        "{zero_e4m3:.1%} become zero. The integers and NF4 are stretched by a [[scale]] until their last mark meets "
        "the largest weight.",
        scene="range", step="dropped", play=True, focus="rulers",
    ),
    Beat(
        "Weights are small. What flows between layers is not: the [[residual stream]] of this text reaches "
        "{residual_largest:,.0f}, and a norm squares it: {square_largest:.2g}. Drop **its squares** on the rulers: "
        "fp16 loses {squares_over:,} numbers to infinity, bf16 none.",
        scene="range", step="dropped", focus="rulers", do=Do("Drop the squares", knob="dropped"),
    ),
    Beat(
        "Store a whole ==matrix|matrix==. Each value falls onto the nearest level that the format has; the largest "
        "error is {worst:.3g}. The cells are yours: type, or paste from a spreadsheet. A click on a value puts it into "
        "the rows of bits above.",
        scene="bits", step="walked", play=True, focus="matrix", do=Do("Choose another format", knob="form"),
    ),
    Beat(
        "What does a whole model lose? Half the bits are half the memory: {mb_fp32:.4g} MB of weights, then "
        "{mb_fp16:.4g}, then {mb_e4m3:.4g}. In 32 bits this text is read at a [[perplexity]] of {ppl_fp32:.2f}, in "
        "bf16 at {ppl_bf16:.2f}.",
        scene="cost", step="sixteen", play=True, focus="plane",
        predict=Predict("By what factor does it grow in fp8 e5m2, with two bits of mantissa?",
                        (1, 1.2, 2, 10), "e5m2_factor", format=".2f", unit="×"),
    ),
    Beat(
        "{ppl_e5m2:.2f}: rough weights, the same words. At four bits it begins to matter where the levels lie: even "
        "steps, int4, {ppl_int4:.2f}; NF4, whose levels lie where weights are frequent, {ppl_nf4:.2f}. {caveat}",
        scene="cost", step="last", play=True, focus="plane",
    ),
    Beat(
        "Break it. Find a number that bf16 keeps and fp16 loses; one that fp8 e4m3 stores exactly and e5m2 does not. "
        "Type a cell of 70000, or of 1e-9. Which formats turn it into infinity, which into nothing?",
        scene="bits", step="walked", focus="matrix",
    ),
)

GLOSSARY = {
    "exponent": "The bits that say between which two powers of two a number lies. More of them: a wider range.",
    "mantissa": "The bits that say where between two powers of two a number lies. More of them: finer steps.",
    "fp16": "IEEE half precision: 1 sign bit, 5 of exponent, 10 of mantissa.",
    "bf16": "The upper half of a 32-bit float: 1 sign bit, 8 of exponent, 7 of mantissa.",
    "scale": "What a stored number is multiplied by to give the real one. Here one for 64 weights, of 16 bits.",
    "residual stream": "What each layer reads from and adds to: one vector a token.",
    "perplexity": "e to the mean surprisal: among how many equally likely tokens the model hesitates.",
}


def _row(name: str) -> BitRow:
    form = FORMATS[name]
    if isinstance(form, Float):
        counts: tuple[tuple[str, int], ...]
        counts = (("sign", 1), ("exponent", form.exponent_bits), ("mantissa", form.mantissa_bits))
        more: dict[str, Any] = {"bias": form.bias, "infinite": form.infinite}
    else:
        counts, more = ((("place", 4),) if name == "nf4" else (("sign", 1), ("magnitude", form.bits - 1))), {}
    bits, value, off = (of(found, form=name) for found in (STORED, VALUE, OFF))
    return BitRow(SHORT.get(name, name), name, bits, value, off, counts, DETAILS[name], **more)


def _ruler(name: str) -> Ruler:
    few = of(LEVELS, form=name) if FORMATS[name].bits <= 8 else None
    return Ruler(SHORT.get(name, name), of(ENDS, form=name), of(LOST, form=name), few, COLOURS[name])


def _points(name: str) -> Points:
    size, result = of(MEGABYTES, form=name), of(RESULT, form=name)
    return Points(SHORT.get(name, name), size, result, COLOURS[name], names=(SHORT.get(name, name),))


SCENES = (
    Scene(
        "bits",
        (
            Bits(name="bits", title="One number, eight formats", note="click a bit", origin="formula",
                 rows=tuple(map(_row, FORMATS)), turn=knob("number")),
            microscope.grid_view(
                title="A matrix in the format you chose", levels=True, edit="", pick=knob("number"),
                labels=("values", "level, counted from zero", "stored", "size of the error"),
                editable=of(microscope.TYPED), cell=None,
            ),
        ),
    ),
    Scene(
        "range",
        (
            Rulers(name="rulers", title="Formats as rulers", note="and what falls on them", tensor=of(HEAP),
                   rulers=tuple(map(_ruler, FORMATS)), low=OCTAVES[0]),
        ),
    ),
    Scene(
        "cost",
        (
            Plane(
                name="plane", title="What the bits buy", note="weights of all linear layers", span=7, log=True,
                log_x=True, points=tuple(map(_points, FORMATS)),
                x_label="megabytes", y_label="perplexity", format=".3f",
            ),
            Bars(
                name="sizes", title="Megabytes of weights", note="with their scales", span=5, values=of(SIZES),
                labels=tuple(SHORT.get(n, n) for n in FORMATS), colour="query", format=",.4g", high=None,
            ),
            *next_views(),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {name: {} for name in ("formats.*", "microscope.*", "format.rounded", "format.bits")}


LESSON = Lesson(
    slug="number-formats",
    title="What a number costs",
    question="What is inside 16 bits?",
    part="Fewer bits",
    order=17,
    sources=("lecture", "post", "Micikevicius 2022, arXiv:2209.05433", "Dettmers 2023, arXiv:2305.14314"),
    knobs=Turn,
    run=run,
    keep=keep,
    beats=BEATS,
    scenes=SCENES,
    claims=CLAIMS,
    code=("engine.quant.formats:Float", "engine.quant.formats:rounded", "engine.quant.stored:stored"),
    facts=facts,
    marks=marks,
    glossary=GLOSSARY,
    bounded_by={"layer": "layers"},
    step_word="step",
    seconds=900,
)
