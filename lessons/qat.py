"""Learn with the grid on: rounding after training, training with rounded weights, and weights of -1, 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine.generate import checked_ids
from engine.quant.affine import Grid
from engine.quant.bitnet import bitnet
from engine.quant.qat import after_training
from engine.recording import Recording, note, step, tap
from engine.toyland import Grammar, story
from engine.train import measure
from engine.zoo import build, find
from lessons import grid_on, microscope
from lessons.grid_on import AWAY, BITS, FLIPPED, GRADIENT, LONG, PPL, gradient_cell, judge, looked_at, phase, train_on
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, load
from lessons.ternary import (
    CODES,
    COUNTED,
    FIELDS,
    LEAST,
    SHARES,
    WORK,
    calculator,
    compute,
    count_work,
    live,
    sums_cell,
)
from lessons.views import Bars, Curves, Facing, Heatmaps, Line, Number, Numbers, Plane, Points, knob, of

SWEEP = (8, 6, 5, 4, 3, 2)
SCRATCH = 3e-3  # learning rate from nothing
QUESTION = 39  # tokens of a story that end with “where is the grey bell? in the”


class Turn(Knobs):
    bits = param.Integer(2, bounds=(2, 8), label="Bits", doc="Bits of each weight while it trains with the grid on.")
    granularity: param.Selector = param.Selector(
        default="channel",
        objects={"Each row": "channel", "The whole matrix": "tensor"},
        label="One scale for",
        doc="Which weights share the distance between two lines.",
    )
    learned = param.Boolean(False, label="Learn the scale", doc="On: the scale is trained too (LSQ), not observed.")
    steps = param.Integer(40, bounds=(10, 100), step=10, label="Training steps", doc="Of each of the three trainings.")
    layer = param.Integer(1, bounds=(0, 3), label="Layer", doc="Whose matrix you look at.")


def run(knobs: Turn) -> None:
    toy, tokenizer = load(TOY)
    note(bits=knobs.bits, training=knobs.steps, total_steps=len(SWEEP) + 4 + 3 * knobs.steps)
    _afterwards(toy, tokenizer, knobs)
    grid_on.with_the_grid(toy, bits=knobs.bits, granularity=knobs.granularity, learned=knobs.learned, steps=knobs.steps)
    scratch = {"bitnet": bitnet(build(TOY)), "float": build(TOY)}
    for name, model in scratch.items():
        phase(name)
        train_on(model, name, knobs.steps, SCRATCH, after=_show_ternary)
    phase("counted")
    note(scratch={name: judge(model, name)["perplexity"] for name, model in scratch.items()})
    count_work(scratch["bitnet"], _prompt(tokenizer, toy))
    grid_on.longer()
    step(label="counted")


def _show_ternary(model: Any) -> None:
    for layer, matrix in looked_at(model):
        live(layer, matrix)


def _prompt(tokenizer: Any, model: Any) -> Any:
    ids = tokenizer.prompt(story(seed=1, tokens=48))[:QUESTION]
    return checked_ids(ids, model.shape.vocab)[None].to(model.embed.weight.device)


def _afterwards(toy: Any, tokenizer: Any, knobs: Turn) -> None:
    """PTQ: fewer and fewer bits for a model that never trained with them."""
    phase("ptq")
    ids, whole = _prompt(tokenizer, toy), 0.0
    found = np.full(len(SWEEP), np.nan, np.float32)
    for bits in (SWEEP[0], *SWEEP):
        grid = Grid(bits, granularity=knobs.granularity)
        small = after_training(toy, weights=grid)
        for layer, linear in looked_at(small):
            original = toy.blocks[layer].mixer.out.weight
            grid_on.look("ptq", layer, original, (linear.codes.scale, linear.codes.zero), grid)
            microscope.count_of(linear.codes, layer=layer)
        microscope.next_token(toy, small, tokenizer, ids)
        if whole:  # the first picture waits for no figure
            found[SWEEP.index(bits)] = judge(small, "ptq")["perplexity"]
            tap(BITS, np.array(SWEEP, np.float32), "run", of="sweep")
            tap(PPL, found.copy(), "run", of="sweep")
        step(label=f"{bits} bits")
        if not whole:
            whole = measure(toy, Grammar(), **grid_on.TEXTS)["perplexity"]
            tap(BITS, np.array([min(SWEEP), max(SWEEP)], np.float32), "end", of="whole")
            tap(PPL, np.array([whole, whole], np.float32), "end", of="whole")
    note(whole=whole)


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    sweep = dict(zip(SWEEP, recording.track(PPL, of="sweep").latest(), strict=True))
    flipped, away = recording.stack(FLIPPED), recording.stack(AWAY)
    nexts = [recording.track(microscope.NEXT, when=when).latest() for when in ("before", "after")]
    # fmt: off
    return {
        **{key: meta[key] for key in ("bits", "whole", "ptq", "qat", "weights", "additions", "skipped", "scaled")},
        **{f"ptq{bits}": float(ppl) for bits, ppl in sweep.items()},
        **{f"scratch_{name}": ppl for name, ppl in meta["scratch"].items()},
        "name": meta["model"]["name"], "training": meta["training"], "recall": meta["recall"],
        "sure": float(nexts[0].max()), "unsure": float(nexts[1][nexts[0].argmax()]),
        "flipped": float(flipped[-1]), "away_before": float(away[0]), "away_after": float(away[-1]),
        "smaller": meta["bytes_float"] / meta["bytes_trits"], "entropy": meta["entropy"], "least": LEAST,
        "zeros": meta["shares"][1], "longer": _longer_told(meta), "gap": _gap(meta),
        "coarse": SWEEP.index(3) + 1, "rounded": len(SWEEP), "before": _at(recording, "before"),
        "trained": _at(recording, "bitnet") - 1, "counted": recording.steps - 1,
    }
    # fmt: on


def _at(recording: Recording, phase: str) -> int:
    return next(e.step for e in recording.happened("qat.phase") if e.fields["phase"] == phase)


def _longer_told(meta: Mapping[str, Any]) -> str:
    found = {b: meta["longer"][f"qat{b}"] for b in LONG if f"qat{b}" in meta["longer"]}
    if not found:
        return "The longer runs are not on this machine."
    told = ", ".join(f"{bits} bits {ppl:.2f}" for bits, ppl in found.items())
    alike = meta["longer"].get("qat16")
    told += f"; float, trained on alike, {alike:.2f}" if alike else ""
    return f"After {find('qat2').steps} steps on longer texts: {told}."


def _gap(meta: Mapping[str, Any]) -> str:
    if "bitnet" not in meta["longer"]:
        return "The longer run of BitNet is not on this machine, so how that race ends is not shown."
    ppl, whole = meta["longer"]["bitnet"], meta["whole"]
    side = "above" if ppl > whole else "below"
    far = f"{abs(ppl / whole - 1):.0%} {side} float’s {whole:.2f}"
    return f"Trained for as long as the toy, BitNet ends at {ppl:.2f}: {far}."


def marks(recording: Recording) -> list[Mark]:
    said = {
        "ptq": "rounded afterwards", "before": "the grid is on", "qat": "training", "bitnet": "BitNet, from nothing",
        "float": "float, from nothing", "counted": "counted",
    }  # fmt: skip
    return [Mark(e.step, said[e.fields["phase"]]) for e in recording.happened("qat.phase")]


def _trained_beats_rounded(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['bits']} bits: {f['ptq']:,.2f} rounded afterwards, {f['qat']:.2f} after {f['training']} steps"
    wins = f["qat"] < f["ptq"]
    why = f"Before rounding {f['whole']:.2f}. {f['longer']}"
    if not wins:
        why = f"With {f['bits']} bits rounding costs next to nothing, so there is nothing to win back. {f['longer']}"
    return Finding(f"{f['ptq']:,.1f} → {f['qat']:.1f}", "agrees" if wins else "differs", why, filled)


def _three_values(recording: Recording) -> Finding:
    meta = recording.meta
    values = sorted({int(v) for t in recording.tracks if t.name == CODES for v in np.unique(t.latest())})
    shares = ", ".join(
        f"{c:+d}: {s:.0%}" if c else f"0: {s:.0%}" for c, s in zip((-1, 0, 1), meta["shares"], strict=True)
    )
    packed = 8 * meta["bytes_trits"] / meta["weights"]
    filled = f"log₂ 3 = {LEAST:.3f}; {shares}: {meta['entropy']:.3f} bits; five to a byte, with scales {packed:.2f}"
    good = set(values) <= {-1, 0, 1} and meta["entropy"] <= LEAST + 1e-9
    return Finding(f"{LEAST:.3f} bits", "agrees" if good else "differs", "" if good else f"It has {values}.", filled)


def _only_additions(recording: Recording) -> Finding:
    f, exact = facts(recording), recording.meta["exact"]
    filled = f"one token: {f['weights']:,} products in float; {f['additions']:,} sums, {f['skipped']:,} skipped"
    why = f"One multiplication by the scales for each output is left: {f['scaled']:,}."
    return Finding(f"{f['weights']:,} → {f['scaled']:,}", "agrees" if exact else "differs",
                   why if exact else "The sums are not the matrix product.", filled)  # fmt: skip


def _bigger_batch(recording: Recording) -> Finding:
    f, meta = facts(recording), recording.meta
    why = "No 70B model and no kernel for ternary weights here: the speed is theirs. Counted here: bytes."
    room = compute({field.name: field.value for field in FIELDS}).values
    texts = f"at 70B room for {room['before']:,.0f} texts → {room['after']:,.0f}"
    sizes = f"{meta['bytes_float']:,} B / {meta['bytes_trits']:,} B"
    filled = f"{sizes}; by bytes alone {texts}, {room['after'] / room['before']:.1f}×"
    return Finding(f"{f['smaller']:.1f}× fewer bytes", "untestable", why, filled)


def _parity(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['training']} steps from nothing: BitNet {f['scratch_bitnet']:.1f}, float {f['scratch_float']:.1f}"
    why = f"Half a million weights, not three billion. {f['gap']}"
    found = recording.meta["longer"].get("bitnet")
    return Finding("–" if found is None else f"{found:.2f} vs {f['whole']:.2f}", "untestable", why, filled)


MA = "lecture; Ma 2024, 2402.17764"
# fmt: off
CLAIMS = (
    Claim("Training with the grid on (QAT) beats rounding afterwards (PTQ)", "lecture; Jacob 2017, 1712.05877",
          "ppl(PTQ) → ppl(QAT), same bits", "QAT wins", _trained_beats_rounded),
    Claim("Weights in {−1, 0, 1}: 1.58 bits each", MA, "log₂ 3", "1.58 bits", _three_values),
    Claim("Matrix products become additions", MA, "multiplications of one token", "none but scales", _only_additions),
    Claim("At 70B, BitNet b1.58 takes 11 times the batch and has 8.9 times the throughput", MA,
          "bytes(16 bits) / bytes(ternary)", "11× and 8.9× *", _bigger_batch),
    Claim("From 3B weights on BitNet b1.58 reads as well as float", "Ma 2024, 2402.17764", "ppl(BitNet) vs ppl(float)",
          "parity at 3B *", _parity),
)

BEATS = (
    Beat(
        "A corner of one of {name}’s matrices. Each weight ==falls onto the nearest line|matrix== of a grid, and only "
        "the line’s number is kept: its [[code]]. The model was trained long before, and knows nothing of it. That is "
        "[[PTQ]].", scene="round", step=0, focus="matrix",
    ),
    Beat(
        "Take bits away: fewer lines. In float ==perplexity|sweep== is {whole:.2f}; at four bits {ptq4:.2f}, at three "
        "{ptq3:.2f}. Two bits leave three lines: −1, 0 and 1 times the scale.", scene="round", step="coarse",
        play=True, focus="sweep",
        predict=Predict("With two bits, perplexity will be about", (5, 20, 200, 700), "ptq2", format=",.0f"),
    ),
    Beat(
        "{ptq2:,.0f}. Ask where the grey bell is: ==before|next_before== it was {sure:.0%} sure of the right word, "
        "==now|next_after== it gives that word {unsure:.0%}. The scale stretches to the largest weight of a row, and "
        "most others fall to 0.", scene="round", step="rounded", play=True,
        focus="next_after",
    ),
    Beat(
        "What if it trained *knowing* that it will be rounded? [[QAT]] rounds in every forward pass, and moves the "
        "float weights behind. One catch: rounding is ==a staircase|stair==. Its slope is 0, no gradient gets through. "
        "So cheat: going back, pretend that it is 1, the [[straight-through]] line.",
        scene="slope", step="before", focus="stair",
        predict=Predict("Rounded afterwards: {ptq:,.1f}. After {training} steps with the grid on?", (4, 7, 30, 100),
                        "qat"),
    ),
    Beat(
        "{qat:.1f}, in {training} steps. ==The curve|curve== falls while ==the matrix|training== barely stirs: "
        "{flipped:.0%} of its weights change their code. They do not gather on the lines: on average "
        "{away_before:.3f} steps away before, {away_after:.3f} after. They *cross*.",
        scene="train", step="trained", play=True, focus="curve",
    ),
    Beat(
        "Here is how. ==Each gradient|gradient== that reaches a rounded weight is handed to the float weight behind "
        "it. ==Five weights|paths== near an edge drift, step by step, until one is over, and the model suddenly "
        "computes with another number.", scene="slope", step="trained", play=True, focus="paths",
        do=Do("Open a weight’s gradient", cell="gradient"),
    ),
    Beat(
        "Go all the way: BitNet b1.58 trains [[ternary]] weights from nothing. ==1 adds, −1 subtracts|ternary==, 0 is "
        "skipped. For one token ==the linear layers|work== did {weights:,} multiplications; now "
        "{additions:,} sums remain. Packed, the weights are {smaller:.1f} times smaller.",
        scene="ternary", step="counted", play=True, focus="ternary", do=Do("Open an output’s sum", cell="ternary"),
    ),
    Beat(
        "==The race|race==: after {training} steps BitNet {scratch_bitnet:.1f}, float {scratch_float:.1f}. Don’t be "
        "fooled by a start: BitNet’s layers bring norms that help early. {gap} Ma and others see parity only from "
        "three billion weights on.", scene="ternary", step="counted", focus="race",
    ),
    Beat(
        "{longer} Break it: one scale for **the whole matrix**. Or ten steps only. Or eight bits, where there is "
        "nothing to win. And does a **learned** scale beat an observed one?", scene="train", step="trained",
        focus="sweep_live",
        do=Do("Share one scale", knob="granularity"),
    ),
)
GLOSSARY = {
    "code": "The number of a grid line. Times the scale, it gives the weight that computes.",
    "PTQ": "Post-training quantisation: round the weights of a model that is finished.",
    "QAT": "Quantisation-aware training: train with rounding in the forward pass (Jacob 2017, arXiv:1712.05877).",
    "straight-through": "Rounding forward, slope 1 back, 0 outside the range (Bengio 2013, arXiv:1308.3432).",
    "ternary": "One of three: −1, 0 or 1, which takes log₂ 3 = 1.58 bits.",
}


LAYER: dict[str, Any] = {"layer": knob("layer")}
SWEPT = (
    Points("rounded afterwards", of(BITS, of="sweep"), of(PPL, of="sweep"), colour="alarm", joined=True),
    Points("trained here, now", of(BITS, of="live"), of(PPL, of="live"), colour="recent", trail=True),
    Points("trained longer, shipped", of(BITS, of="long"), of(PPL, of="long"), colour="value"),
)
WHOLE = Line("float", of(PPL, of="whole"), x=of(BITS, of="whole"), colour="ink", dashed=True)
PATHS = tuple(
    Line(f"weight {n + 1}", of(grid_on.PATH, weight=n, **LAYER), colour=colour)
    for n, colour in enumerate(("query", "key", "value", "heavy", "recent"))
)
EDGE = Line("its code changes", of(grid_on.PATH, weight="edge", **LAYER), colour="ink", dashed=True)


STOOD = Points("weights of one row", of(grid_on.STOOD, **LAYER), of(grid_on.USED, **LAYER), colour="query")
STEPS = of(grid_on.STAIR_X)
STAIRS = (
    Line("forward: the staircase", of(grid_on.STAIR), x=STEPS, colour="key"),
    Line("slope that the gradient is told", of(grid_on.SLOPE), x=STEPS, colour="value", dashed=True),
)


def _sweep(name: str, title: str, points: tuple[Points, ...], **more: Any) -> Plane:
    return Plane(name=name, title=title, points=points, lines=(WHOLE,), log=True, x_label="bits a weight",
                 y_label="perplexity", x_format=".0f", format=",.2f", origin="toy", **more)


def _curve(name: str, label: str, colour: str, **more: Any) -> Line:
    return Line(label, of(grid_on.CURVE, of=name), x=of(grid_on.AT, of=name), colour=colour, **more)


SCENES = (
    Scene(
        "round",
        (
            microscope.grid_view(
                title="Rounded afterwards", levels=False, walked=False, index={"method": "ptq", **LAYER},
                labels=("trained in float", "codes", "what computes", "size of the error"), block_word="row",
            ),
            _sweep("sweep", "Fewer bits, and how well it reads", SWEPT[:1], span=4, height=220),
            *microscope.next_views(span=4),
            microscope.bits_view(index=LAYER),
        ),
    ),
    Scene(
        "slope",
        (
            Plane(
                name="stair", title="Rounding, and its pretended slope", span=6, origin="toy", height=230,
                points=(STOOD,), lines=STAIRS,
                x_label="float weight, in steps of its grid", y_label="the line it computes with", x_format=".2f",
                format=".2f",
            ),
            Curves(name="paths", title="Five weights on their way", note="steps from the line each began on",
                   lines=(*PATHS, EDGE), span=6, height=200, x_label="step", origin="toy", format="+.3f"),
            Heatmaps(name="gradient", title="Gradient handed to the float weights", span=8, origin="toy",
                     tensor=of(GRADIENT, **LAYER), rows="row", columns="column", colours="diverging", gaps=True,
                     cell=gradient_cell),
            Numbers(
                name="drift", title="How far they went", span=4, origin="toy",
                numbers=(Number("Codes that changed", of(FLIPPED), format=".1%", colour="key"),
                         Number("Distance from a line", of(AWAY), format=".3f", unit="steps")),
            ),
        ),
    ),
    Scene(
        "train",
        (
            Curves(name="curve", title="Training with the grid on, live", note="perplexity, log", height=190,
                   span=7, log=True,
                   lines=(_curve("qat", "this step’s texts", "recent"),
                          _curve("ptq", "rounded afterwards", "alarm", dashed=True)),
                   x_label="training step", y_label="perplexity", origin="toy"),
            _sweep("sweep_live", "Afterwards, or with the grid on", SWEPT, span=5, height=190),
            microscope.grid_view(
                name="training", title="Trained with the grid on", levels=False, walked=False,
                index={"method": "qat", **LAYER}, block_word="row",
                labels=("float, behind", "codes", "what computes", "size of the error"),
            ),
            Numbers(
                name="figures", title="On texts never seen", origin="toy",
                numbers=(Number("Perplexity", of(PPL, of="live"), format=",.2f", colour="recent"),
                         Number("Questions right", of(grid_on.RECALL, of="live"), format=".0%"),
                         Number("Codes that changed", of(FLIPPED), format=".1%", colour="key")),
            ),
        ),
    ),
    Scene(
        "ternary",
        (
            Heatmaps(name="ternary", title="Add, skip, subtract", note="a matrix of BitNet, training", span=6,
                     tensor=of(CODES, **LAYER), rows="output", columns="input", colours="diverging", cell=sums_cell,
                     origin="toy"),
            Curves(name="race", title="From nothing, on the same texts", note="perplexity, log", height=260,
                   span=6, log=True,
                   lines=(_curve("bitnet", "BitNet b1.58", "recent"), _curve("float", "float", "ink")),
                   x_label="training step", y_label="perplexity", origin="toy"),
            Bars(name="shares", title="Its weights", span=4, values=of(SHARES, **LAYER), colour="recent",
                 labels=("subtract", "skip", "add"), origin="toy"),
            Facing(name="work", title="One token, all linear layers", span=8, left=of(COUNTED, of="float"),
                   right=of(COUNTED, of="bitnet"), labels=WORK, left_label="float", right_label="ternary",
                   left_colour="ink", right_colour="recent", format=",.0f", origin="toy"),
            calculator(),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"qat.*": {"linear": ()}, "microscope.*": {}, "ternary.*": {}}


# fmt: off
LESSON = Lesson(
    slug="qat", title="Learn with the grid on", question="What if the model trains knowing it will be rounded?",
    part="Fewer bits", order=20,
    sources=("lecture", "Jacob 2017, arXiv:1712.05877", "Bengio 2013, arXiv:1308.3432", "Ma 2024, arXiv:2402.17764"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.quant.qat:StraightThrough", "engine.quant.qat:QATLinear", "engine.quant.bitnet:BitLinear"),
    looks=frozenset({"layer"}), bounded_by={"layer": "layers"}, facts=facts, marks=marks, glossary=GLOSSARY,
    seconds=600, trains=True,
    footnote="* As reported, at 3 and at 70 billion weights. Measured: toys of half a million weights.",
)
# fmt: on
