"""The few that spoil the scale: loud activation channels, and three ways to live with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine.generate import checked_ids
from engine.quant import Recipe, capture_inputs, llm_int8, quantised
from engine.quant.affine import Grid
from engine.quant.awq import grid as weight_grid
from engine.quant.awq import keeping
from engine.quant.integer import recipe as integers
from engine.quant.smoothquant import largest, smoothed
from engine.recording import Recording, event, note, site, tap
from lessons import loud, microscope
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.loud import PARTS, Ear
from lessons.models import TOY, choice, load
from lessons.texts import NAMES, TEXTS, text_ids
from lessons.views import Bars, Curves, Heatmaps, Line, Number, Numbers, Plane, Points, Stack, knob, of

ALPHA = site("outliers.alpha", "the alpha that the whole model was smoothed with", symbol="α")
SMOOTHED = site("outliers.alpha.perplexity", "perplexity of W8A8 with one scale each, after smoothing by alpha")
LEVEL = site("outliers.level", "the same without smoothing")

WAYS = {
    "float": "float", "tensor": "one scale", "rows": "row scales", "int8": "LLM.int8()", "smooth": "smooth+row",
    "smooth_tensor": "smooth+one", "rounded": "rounded", "kept": "1% kept", "awq": "AWQ",
}  # fmt: skip
COLOURS = ("ink", "alarm", "key", "value", "recent", "query", "heavy", "sink", "recomputed")
ONE, ROW, TOKEN = Grid(8), Grid(8, granularity="channel"), Grid(8, granularity="token")
TRIED, BEST = (0.25, 0.75), 0.5  # alphas of the sweep; the one of the paper
CALIBRATED = 96  # tokens of each of the other texts: never of the one that is read


class Turn(Knobs):
    model = choice()
    part: param.Selector = param.Selector(
        default="mixer.qkv", objects=dict(PARTS), label="Input of", doc="Which linear layer’s input you look at."
    )
    threshold = param.Number(6.0, bounds=(0.0, 20.0), step=0.5, label="Threshold", doc="LLM.int8(): outlier from here.")
    alpha = param.Integer(
        50, bounds=(0, 100), step=10, label="α of SmoothQuant, %", doc="How much moves to the weights."
    )
    layer = param.Integer(12, bounds=(0, 29), label="Layer to smooth", doc="Whose ranges are drawn (every third).")
    bits: param.Selector = param.Selector(
        default=3, objects={"4 bits": 4, "3 bits": 3}, label="Weights alone", doc="Bits of W4A16 or W3A16."
    )
    text: param.Selector = param.Selector(default="bread", objects=dict(NAMES), label="Text", doc="What is read.")
    own = param.String("Once upon a time", label="Your own text", doc="Read when Text is “Your own”.")
    tokens = param.Integer(160, bounds=(64, 240), label="Tokens read", doc="How much of the text is read.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model, dtype="float32")
    toy = knobs.model == TOY
    ids = text_ids(tokenizer, knobs.text, knobs.own, toy=toy, tokens=knobs.tokens)
    if len(ids) < 24:
        raise ValueError(f"The text has {len(ids)} tokens; at least 24 are needed to compare ways of rounding.")
    others = [text_ids(tokenizer, n, "", toy=toy, tokens=CALIBRATED) for n in TEXTS if n != knobs.text]
    text, *calibration = (checked_ids(i, model.shape.vocab)[None].to(model.embed.weight.device) for i in (ids, *others))
    layers = len(model.blocks)
    note(total_steps=2 * layers + len(WAYS), threshold=knobs.threshold, weight_bits=knobs.bits, tokens=len(ids))
    inputs, logp = loud.survey(model, text, threshold=knobs.threshold)
    _phase("ways")
    ear = Ear(text, tuple(WAYS), tokenizer)
    loud.migrate(model, inputs)
    note(bytes=loud.weigh(model, inputs, threshold=knobs.threshold), ppl={"float": ear.hear("float", logp)})
    with capture_inputs(model) as known:
        for other in calibration:
            model(other)
    _eight_bits(model, ear, known, knobs.threshold, text)
    _few_bits(model, ear, known, knobs.bits, group=32 if toy else 64)


def _phase(name: str) -> None:
    event("outliers.phase", phase=name)


def _hear(ear: Ear, name: str, model: Any, recipe: Recipe) -> float:
    return ear.hear(name, loud.logprobs(quantised(model, recipe), ear.ids))


def _eight_bits(model: Any, ear: Ear, known: Mapping[str, Any], threshold: float, text: Any) -> None:
    """Weights and activations in 8 bits."""
    ppl = {"tensor": _hear(ear, "tensor", model, integers(weights=ONE, activations=ONE))}
    ppl["rows"] = _hear(ear, "rows", model, integers(weights=ROW, activations=TOKEN))
    ppl["int8"] = _hear(ear, "int8", model, llm_int8.recipe(threshold=threshold))
    ranges, swept = largest(known), {}
    for alpha in (*TRIED, BEST):
        ready = smoothed(model, ranges, alpha=alpha, down=True)
        if alpha == BEST:
            same = loud.logprobs(ready, text)
            note(float_moved=float((same - ear.base).abs().max()), float_smoothed=ear.perplexity(same))
            ppl["smooth"] = _hear(ear, "smooth", ready, integers(weights=ROW, activations=TOKEN))
            swept[alpha] = _hear(ear, "smooth_tensor", ready, integers(weights=ONE, activations=ONE))
        else:
            logp = loud.logprobs(quantised(ready, integers(weights=ONE, activations=ONE)), text)
            swept[alpha] = ear.perplexity(logp)
    ppl["smooth_tensor"] = swept[BEST]
    order = sorted(swept)
    tap(ALPHA, np.array(order, np.float32), "point")
    tap(SMOOTHED, np.array([swept[a] for a in order], np.float32), "point")
    tap(LEVEL, np.full(len(order), ppl["tensor"], np.float32), "point")
    note(eight=ppl)


def _few_bits(model: Any, ear: Ear, known: Mapping[str, Any], bits: int, *, group: int) -> None:
    """Weights alone, in 3 or 4 bits."""
    _phase("weights")
    weights = weight_grid(bits, group=group)
    ppl = {"rounded": _hear(ear, "rounded", model, integers(weights=weights))}
    ppl["kept"] = _hear(ear, "kept", model, keeping(known, weights=weights))
    _phase("search")
    found = loud.search(model, known, bits=bits, group=group)
    ppl["awq"] = _hear(ear, "awq", model, found)
    note(few=ppl, group=group)


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    ppl = meta["ppl"] | meta["eight"] | meta["few"]
    stats = np.array(meta["stats"])  # layer and part: spread of X, of W, share of the loudest channel, flagged
    found = np.array(meta["found"])
    moved = recording.track(loud.MOVED).latest()
    # fmt: off
    return {
        **{f"ppl_{name}": value for name, value in ppl.items()},
        "name": meta["model"]["name"], "threshold": meta["threshold"], "bits": meta["weight_bits"],
        "x_spread": float(np.median(stats[:, 0])), "x_most": float(stats[:, 0].max()),
        "w_spread": float(np.median(stats[:, 1])), "fixed": float(np.median(stats[:, 2])),
        "flagged": int(found.sum()), "loud_layers": int((found > 0).sum()), "layers": len(found),
        "residual": meta["residual"][0], "usual": meta["residual"][1],
        "too_much": float(recording.track(SMOOTHED).latest()[-1]),
        "worse": ppl["tensor"] / ppl["float"], "awq_ratio": meta["awq_ratio"], "awq_loss": meta["awq_loss"],
        "kl_tensor": float(moved[list(WAYS).index("tensor")]), "kl_int8": float(moved[list(WAYS).index("int8")]),
        "lighter": meta["bytes"][0] / meta["bytes"][1], "grid": _grid_note(meta), "best": _best(ppl),
        "middle": len(found) // 2, "read": len(found) - 1, "one": len(found) + 1, "eight": len(found) + 3,
        "smooth": len(found) + 5, "few": len(found) + 7, "last": recording.steps - 1,
    }
    # fmt: on


def _grid_note(meta: Mapping[str, Any]) -> str:
    if meta["model"]["kind"] != "real":
        return "These weights were never rounded before."
    return "Beware: these weights came off a 4-bit grid, groups of 32, so four bits are kinder to them than to others."


def _best(ppl: Mapping[str, float]) -> str:
    if ppl["kept"] < ppl["awq"]:
        return "On this model keeping wins; the paper’s models found both alike."
    return "Here scaling wins, and no weight needs another format."


def marks(recording: Recording) -> list[Mark]:
    said = {"ways": "8 bits", "weights": "weights alone", "search": "AWQ searches"}
    return [Mark(e.step, said[e.fields["phase"]]) for e in recording.happened("outliers.phase")]


def _fixed(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"loudest ÷ median channel: X {f['x_spread']:.1f} (at most {f['x_most']:.0f}), W {f['w_spread']:.1f}"
    measured = f"{f['x_spread']:.1f} vs {f['w_spread']:.1f}"
    why = f"The loudest channel is the same one in {f['fixed']:.0%} of the tokens (median over all inputs)."
    if f["x_spread"] > 2 * f["w_spread"] and f["fixed"] > 0.3:
        return Finding(measured, "agrees", why, filled)
    return Finding(measured, "differs", f"In this model no channel is much louder than the others. {why}", filled)


def _breaks(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['ppl_float']:.2f} → {f['ppl_tensor']:.2f}, {f['worse']:.2f}×"
    if f["worse"] > 1.1:
        why = f"So outliers do harm far below 6.7B. Here {f['loud_layers']} of {f['layers']} layers have some."
        return Finding(f"{f['ppl_tensor']:.1f}", "agrees", why, filled)
    return Finding(f"{f['ppl_tensor']:.2f}", "differs", "The loud channels of this model do no harm.", filled)


def _restored(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"one scale {f['ppl_tensor']:.2f}, a scale a row {f['ppl_rows']:.2f}, LLM.int8() {f['ppl_int8']:.2f}"
    good = f["ppl_int8"] < 1.03 * f["ppl_float"]
    why = f"In float {f['ppl_float']:.2f}. On this model a scale a row and a token does most of it already."
    if not good:
        why = f"In float {f['ppl_float']:.2f}: with a threshold of {f['threshold']:g} too much stays in int8."
    return Finding(f"{f['ppl_int8']:.2f}", "agrees" if good else "differs", why, filled)


def _systematic(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['loud_layers']} of {f['layers']} layers have a channel that reaches {f['threshold']:g}"
    why = "One size of model cannot show where a share begins to be all; that outliers begin at 6.7B is a misreading."
    return Finding(f"{f['loud_layers'] / f['layers']:.0%} of layers", "untestable", why, filled)


def _same(recording: Recording) -> Finding:
    f, meta = facts(recording), recording.meta
    filled = f"largest change of a log probability {meta['float_moved']:.1e}"
    close = abs(meta["float_smoothed"] / f["ppl_float"] - 1) < 1e-3
    measured = f"{meta['float_smoothed']:.3f} vs {f['ppl_float']:.3f}"
    why = "" if close else "Folding the factors in changed more than float32 rounds."
    return Finding(measured, "agrees" if close else "differs", why, filled)


def _smooth(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"one scale: {f['ppl_tensor']:.2f} → {f['ppl_smooth_tensor']:.2f}; a row: {f['ppl_rows']:.2f} → "
    good = f["ppl_smooth"] < 1.03 * f["ppl_float"]
    why = f"The scales do most of it: with one scale each, smoothing alone reaches {f['ppl_smooth_tensor']:.1f}."
    if not good:
        why = f"In float {f['ppl_float']:.2f}. {why}"
    return Finding(f"{f['ppl_smooth']:.2f}", "agrees" if good else "differs", why, f"{filled}{f['ppl_smooth']:.2f}")


def _salient(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"W{f['bits']}, groups of {recording.meta['group']}: {f['ppl_rounded']:.2f} → {f['ppl_kept']:.2f}"
    good = f["ppl_kept"] < f["ppl_rounded"]
    why = "" if good else "Of this model no hundredth of the channels matters more than the rest."
    return Finding(f"{f['ppl_rounded']:.1f} → {f['ppl_kept']:.1f}", "agrees" if good else "differs", why, filled)


def _awq(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"rounded {f['ppl_rounded']:.2f}, 1% kept {f['ppl_kept']:.2f}, AWQ {f['ppl_awq']:.2f}"
    measured = f"{f['ppl_rounded']:.1f} → {f['ppl_awq']:.1f}"
    slow = "That mixed formats are slow is theirs: nothing is timed here."
    if f["ppl_awq"] < min(f["ppl_rounded"], 1.05 * f["ppl_kept"]):
        return Finding(measured, "agrees", slow, filled)
    less = f"The search leaves {f['awq_loss']:.0%} of each layer’s error"
    if f["ppl_awq"] < f["ppl_rounded"]:
        return Finding(measured, "differs", f"{less}: better than rounding, but keeping 1% wins here. {slow}", filled)
    return Finding(measured, "differs", f"{less}, but the text does not show it. {slow}", filled)


def _memory(recording: Recording) -> Finding:
    whole, small = recording.meta["bytes"]
    why = "Speed is not claimed: for small models the paper measures LLM.int8() slower than 16 bits."
    verdict = "agrees" if whole / small > 1.8 else "differs"
    if verdict == "differs":
        why = f"With this threshold so many columns stay in 16 bits beside the codes. {why}"
    filled = f"{whole:,.0f} B / {small:,.0f} B, the first layer’s matrices"
    return Finding(f"{whole / small:.2f}× smaller", verdict, why, filled)  # type: ignore[arg-type]


INT8, SMOOTH, AWQ = "Dettmers 2022, 2208.07339", "lecture; Xiao 2022, 2211.10438", "lecture; Lin 2023, 2306.00978"
# fmt: off
CLAIMS = (
    Claim("Outliers sit in fixed channels, while weights are flat", f"{SMOOTH}; {INT8}",
          "largest / median of the channels’ ranges, X vs W", "X far more", _fixed),
    Claim("One scale a tensor breaks even a model of 125M", INT8, "ppl(float) → ppl(W8A8)", "25.65 → 87.76 *", _breaks),
    Claim("Taking the outliers out restores it", f"lecture; {INT8}", "ppl(scale a row) vs ppl(LLM.int8())",
          "35.84 vs 25.83 *", _restored),
    Claim("From 6.7B on outliers are in every layer", INT8, "layers with outliers", "65% → 100% *", _systematic),
    Claim("It halves the memory", INT8, "bytes(16 bits) / bytes(LLM.int8())", "2× *", _memory),
    Claim("Smoothing leaves the float output unchanged", SMOOTH, "(X diag(s)⁻¹)(diag(s) W)", "equal", _same),
    Claim("Smoothed, 8 bits cost next to nothing", SMOOTH, "ppl(W8A8, smoothed)", "5.474 → 5.515 **", _smooth),
    Claim("Keeping 1% of the weights, chosen by the activations, saves most", AWQ, "ppl(rounded) → ppl(1% kept)",
          "23.54 → 11.39 ***", _salient),
    Claim("Scaling does as well, and needs no slow mix of formats", AWQ, "ppl(rounded) → ppl(AWQ)",
          "23.54 → 11.92 ***", _awq),
)

BEATS = (
    Beat(
        "{name} reads a text. This is what one layer’s matrices are fed: ==a row a token, a column a channel|all==. "
        "Look for columns that stand out: a few [[channel]]s are loud in token after token. Step on, layer by layer.",
        scene="landscape", step=0, focus="all",
    ),
    Beat(
        "Half way. ==Sorted by loudness|ranges==, the channels are far from even: in the usual input the loudest is "
        "{x_spread:.1f} times the middle one, in weights only {w_spread:.1f} times. Behind it stands the [[residual]] "
        "stream: at token 0 it reaches {residual:,.0f}, where {usual:.1f} is usual.", scene="landscape", step="middle",
        play=True, focus="ranges",
    ),
    Beat(
        "In the end {loud_layers} of {layers} ==layers|layers== have outliers. Eight bits are 255 levels. If one scale "
        "serves all, the loudest value sets it, and a quiet channel gets ==a level or two|close==. In float, "
        "perplexity is {ppl_float:.1f}.", scene="landscape", step="read", play=True, focus="close",
        predict=Predict("Weights and activations in 8 bits, one scale each:", (44, 55, 90, 1000), "ppl_tensor"),
        do=Do("Open a quiet cell", cell="close"),
    ),
    Beat(
        "{ppl_tensor:.1f}. LLM.int8() cures it: channels that reach {threshold:g} ==move to the float side"
        "|ways_close==, drawn grey; the rest share a scale a token and a row. ==Perplexity|ppl== {ppl_int8:.1f}. But "
        "look: scales for rows and tokens alone reach {ppl_rows:.1f}.", scene="ways", step="eight", play=True,
        focus="ppl",
    ),
    Beat(
        "SmoothQuant moves the difficulty instead: divide a loud channel of X by s, multiply the weights that it meets "
        "by s: the product is the same. ==Turn α|smooth==: one curve flattens, ==the other|smooth_w== steepens.",
        scene="smooth", step="eight", focus="smooth", do=Do("Turn α up and down", knob="alpha"),
        notes="Each layer’s inputs are paired with that very layer’s weights.",
    ),
    Beat(
        "Does it help? With scales for rows, {ppl_smooth:.1f}. With ==one scale each|sweep== only "
        "{ppl_smooth_tensor:.1f}, where {ppl_tensor:.1f} was before: here the scales do most of the work, smoothing "
        "the rest. And α matters: at 0.75, perplexity is {too_much:,.0f}.", scene="smooth", step="smooth",
        focus="sweep",
    ),
    Beat(
        "Now weights alone, {bits} bits, in groups: {ppl_rounded:.1f}. Keep the 1% of channels that meet the loudest "
        "activations in float: {ppl_kept:.1f}. {grid}", scene="awq", step="few", focus="result",
        predict=Predict("AWQ scales these channels up before rounding instead. Perplexity?", (45, 70, 100, 150),
                        "ppl_awq"),
    ),
    Beat(
        "{ppl_awq:.1f}. ==Its search|search==, layer by layer: scale by s = (mean |X|)^α, round, compare outputs, for "
        "20 powers α. Zero is plain rounding, so it never loses. On average {awq_ratio:.2f} wins, and leaves "
        "{awq_loss:.0%} of the error. {best}", scene="awq", step="last", play=True, focus="search",
    ),
    Beat(
        "==All ways|ppl==, one text. Break it: set the threshold to 0, and nothing is left in int8; to 20, and "
        "outliers stay. Try Toyland, whose loud channels do no harm. Which text makes LLM.int8() lose to plain rows?",
        scene="ways", step="last", focus="ppl", do=Do("Move the threshold", knob="threshold"),
    ),
)
# fmt: on
GLOSSARY = {
    "channel": "One of the numbers of a token’s vector: the same place in every token.",
    "residual": "The vector that runs through all layers, to which each adds. Norms bring it to size before a layer.",
}


PART: dict[str, Any] = {"part": knob("part")}
HERE: dict[str, Any] = {**PART, "layer": knob("layer"), "alpha": knob("alpha")}
RUNNING = tuple(
    Line(label, of(loud.RUNNING, way=name), colour=colour)
    for (name, label), colour in zip(WAYS.items(), COLOURS, strict=True)
)
SEARCHED = (("mixer.qkv", "query", "queries, keys, values"), ("mixer.out", "value", "attention’s output"),
            ("ffn.gate_up", "key", "gate and up"), ("ffn.down", "alarm", "down"))  # fmt: skip


def _close(name: str, title: str, **more: Any) -> Heatmaps:
    return Heatmaps(name=name, title=title, tensor=of(loud.CLOSE, **PART), veil=of(loud.STAYS, **PART), rows="token",
                    columns="channel", colours="key", cell=loud.code_cell, power=0.5, **more)  # fmt: skip


def _bars(name: str, title: str, tensor: str, colour: str, **more: Any) -> Bars:
    labels = tuple(WAYS.values())
    return Bars(name=name, title=title, values=of(tensor), labels=labels, colour=colour, high=None, **more)


def _ranges(name: str, title: str, before: str, line: Line, **more: Any) -> Curves:
    """Ranges of the chosen layer's channels, loudest first."""
    was = (Line("as they were", of(before, **PART, layer=knob("layer")), colour="kept", dashed=True),) if before else ()
    return Curves(name=name, title=title, lines=(*was, line), log=True, across="channel", span=6,
                  x_label="channel, by loudness", format=".3f", **more)  # fmt: skip


# fmt: off
SCENES = (
    Scene(
        "landscape",
        (
            Heatmaps(name="all", title="Activations, all channels",
                     tensor=of(loud.X, **PART), rows="token", columns="channel", colours="key", power=0.5),
            Curves(name="ranges", title="Largest of each channel", note="loudest first, log", span=7, log=True,
                   across="channel", height=400,
                   lines=(Line("activations", of(loud.X_TOP, **PART), colour="key"),
                          Line("weights that they meet", of(loud.W_TOP, **PART), colour="value")),
                   x_label="channel, by loudness", format=".2f"),
            Stack(name="layers", title="Outlier channels", span=5, codes=of(loud.KIND),
                  colours=("kept", "value", "key"), kinds=("not read yet", "none", "outliers"),
                  values=of(loud.FOUND), values_label="channels"),
            _close("close", "The loudest 48, close up", note="grey: moves to the float side", span=8),
            Numbers(
                name="sizes", title="This input", span=4,
                numbers=(Number("Largest activation", of(loud.MOST, **PART), format=",.1f", colour="key"),
                         Number("Median", of(loud.USUAL, **PART), format=".3f"),
                         Number("Largest in the residual", of(loud.RESIDUAL), format=",.0f", colour="alarm")),
            ),
        ),
    ),
    Scene(
        "ways",
        (
            _bars("ppl", "Perplexity of this text", loud.PPLS, "key", note="W8A8, then weights", span=6, format=".1f"),
            _bars("moved", "How far predictions move", loud.MOVED, "alarm", note="nats a token", span=6, format=".3f"),
            Curves(name="running", title="Perplexity so far", note="log", lines=RUNNING, across="token", log=True,
                   x_label="token", height=220),
            *microscope.next_views(),
            _close("ways_close", "What moves to the float side", note="grey"),
        ),
    ),
    Scene(
        "smooth",
        (
            _ranges("smooth", "Activations, smoothed", loud.X_TOP_AT,
                    Line("÷ s", of(loud.X_AFTER, **HERE), colour="key"), note="largest of each, log", height=230),
            _ranges("smooth_w", "Weights, in exchange", loud.W_TOP_AT,
                    Line("× s", of(loud.W_AFTER, **HERE), colour="value"), note="that layer’s own, log", height=230),
            _ranges("factor", "The factor s", "", Line("s", of(loud.FACTOR, **HERE), colour="recomputed"), note="log"),
            Plane(name="sweep", title="One scale each, after smoothing", note="W8A8", span=6, height=170, log=True,
                  points=(Points("smoothed by α", of(ALPHA), of(SMOOTHED), colour="query", joined=True),),
                  lines=(Line("not smoothed", of(LEVEL), x=of(ALPHA), colour="alarm", dashed=True),),
                  x_label="α", y_label="perplexity", x_format=".2f", format=".1f"),
        ),
    ),
    Scene(
        "awq",
        (
            Curves(name="search", title="AWQ’s search, layer by layer", note="share of plain rounding’s error", span=7,
                   across="ratio", height=240, format=".2f", x_label="power of the activations, α", y_label="error",
                   lines=tuple(Line(label, of(loud.LOSS, part=part), x=of(loud.TRIED), colour=colour)
                               for part, colour, label in SEARCHED)),
            Curves(name="chosen", title="What it chose", note="α, layer by layer", span=5, low=0.0, high=1.0,
                   height=240, x_label="step", format=".2f",
                   lines=tuple(Line(label, of(loud.RATIO, part=part), colour=colour)
                               for part, colour, label in SEARCHED)),
            _bars("result", "Perplexity of this text", loud.PPLS, "key", format=".1f"),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"outliers.*": {}, "microscope.*": {}}


# fmt: off
LESSON = Lesson(
    slug="outliers", title="The few that spoil the scale", question="Why do a handful of channels ruin everything?",
    part="Fewer bits", order=19,
    sources=("lecture", "Dettmers 2022, arXiv:2208.07339", "Xiao 2022, arXiv:2211.10438", "Lin 2023, arXiv:2306.00978"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.quant.llm_int8:llm_int8_matmul", "engine.quant.llm_int8:LLMInt8Linear",
          "engine.quant.smoothquant:migration", "engine.quant.awq:search"),
    looks=frozenset({"part", "alpha", "layer"}), bounded_by={"layer": "layers"}, facts=facts, marks=marks,
    glossary=GLOSSARY, budget=60_000_000, seconds=600,
    footnote="* OPT-125m and larger, as reported. ** Llama-2-7B, α = 0.85. *** OPT-6.7B, 3 bits, groups of 128.",
)
# fmt: on
