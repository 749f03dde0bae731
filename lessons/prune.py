"""Cutting connections: weights, heads, neurons and layers that can go, what it costs, and what a machine gains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine.generate import checked_ids
from engine.prune import glyphs, lottery
from engine.recording import Recording, note
from engine.toyland import Grammar, batch
from lessons import pruning as cut
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import REAL, TOY, choice, load
from lessons.texts import BREAD
from lessons.views import Arithmetic, Bars, Curves, Heatmaps, Line, Number, Numbers, Plane, Points, knob, of

SHARES = {TOY: (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95), REAL: (0.0, 0.2, 0.4, 0.5, 0.6, 0.7)}
TOKENS = 160  # of a text, for every perplexity of the real model
ROUNDS, DROPPED = 3, 0.5  # of the lottery


class Turn(Knobs):
    model = choice(default=TOY)
    scope: param.Selector = param.Selector(
        default="global", objects={"All weights together": "global", "Each matrix alone": "layer"}, label="Compare",
        doc="Among which weights the smallest are looked for.",
    )  # fmt: skip
    sparsity = param.Number(0.7, bounds=(0.1, 0.95), step=0.05, label="Prune before retraining", doc="Of the toy.")
    steps = param.Integer(60, bounds=(10, 80), step=10, label="Retraining steps", doc="Training with zeros held.")
    hold = param.Boolean(True, label="Hold zeros", doc="Mask the weights again after each step of the optimiser.")
    seeds = param.Integer(3, bounds=(1, 3), label="Lotteries", doc="How many seeds the lottery is drawn with.")
    matrix: param.Selector = param.Selector(
        default="ffn.gate_up", objects=dict(cut.MATRICES), label="Matrix", doc="Which weight you look at."
    )
    layer = param.Integer(1, bounds=(0, 29), label="Layer", doc="Of which layer.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model)
    heads = [count for count in (8, 6, 4, 2) if count < model.shape.heads]
    shares = SHARES[knobs.model]
    fours = len(shares) + 1 + len(heads) + len(cut.NEURONS) + 2
    training = fours + cut.SIDE // 4 + 1
    note(
        total_steps=training + 3 + knobs.steps + knobs.seeds * (ROUNDS + 1), heads=model.shape.heads,
        layers=model.shape.layers, counts=heads, scope=knobs.scope, sparsity=knobs.sparsity, hold=knobs.hold,
        retraining=knobs.steps, seeds=knobs.seeds,
        phases={
            "shrink": len(shares), "fours": fours, "retrain": training, "ticket": training + 3 + knobs.steps,
        },
    )  # fmt: skip
    if knobs.model == TOY:
        ids = batch(Grammar(), seed=0, step=0, stream="test", **cut.READ).ids
    else:
        ids = checked_ids(tokenizer.prompt(BREAD)[:TOKENS], model.shape.vocab)[None].to(model.embed.weight.device)
    cut.fade(model, ids, shares, knobs)
    cut.shrink(model, ids, heads)
    cut.fours(model, ids)
    cut.retrain(knobs)
    for seed in range(knobs.seeds):
        lottery.draw(glyphs.network, glyphs.trainer(), glyphs.accuracy, seed=seed, rounds=ROUNDS, share=DROPPED)


def _at(recording: Recording, by: str) -> np.ndarray:
    """The perplexities of a kind of pruning, in order."""
    return recording.stack(cut.PPL, by=by).astype(float)


def _tickets(recording: Recording) -> dict[str, np.ndarray]:
    """Accuracy of each way of starting, [seed, round]; the whole network's is round 0 of the tickets."""
    found = {name: recording.stack("lottery.quality", strategy=name) for name in ("ticket", "reinit", "shuffled")}
    return {name: values.reshape(recording.meta["seeds"], -1).astype(float) for name, values in found.items()}


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    shares = recording.stack(cut.SHARE).astype(float)
    small, chance = _at(recording, "weights"), _at(recording, "chance")
    half = int(np.argmin(abs(shares - 0.5)))
    fine = shares[small < 1.1 * small[0]].max()
    ms = recording.track(cut.MS).latest().astype(float)
    held = recording.stack(cut.CURVE, of="held").astype(float)
    runs = _tickets(recording)
    at = meta["phases"]
    return {
        "name": meta["model"]["name"],
        "ppl": small[0],
        "ppl_half": small[half],
        "chance_half": chance[half],
        "ppl_most": small[-1],
        "most_percent": 100 * shares[-1],
        "fine_percent": 100 * fine,
        "half": half,
        "most": len(shares) - 1,
        "shrink": at["shrink"],
        "shrunk": at["fours"] - 1,
        "fours": at["fours"],
        "packed": at["retrain"] - 1,
        "cut": at["retrain"] + 1,
        "training": at["retrain"] + 2,
        "trained": at["ticket"] - 1,
        "ticket": at["ticket"],
        "last": recording.steps - 1,
        "fewest": meta["counts"][-1],
        "ppl_heads": _at(recording, "cut heads")[-1],
        "ppl_neurons": _at(recording, "cut neurons")[-1],
        "ppl_layer": _at(recording, "cut layers")[1],
        "ms_dense": ms[0],
        "ms_zeros": ms[1],
        "ms_smaller": ms[2],
        "bytes_percent": 100 * meta["fours"]["sparse"] / meta["fours"]["dense"],
        "ppl_fours": float(_at(recording, "fours")[-1]),
        "heads": meta["heads"],
        "sparsity_percent": 100 * meta["sparsity"],
        "steps": meta["retraining"],
        "ppl_toy": held[0],
        "ppl_cut": held[1],
        "ppl_back": held[-1],
        "revived": float(recording.stack(cut.WOKEN).mean()),
        "dense_right": 100 * runs["ticket"][:, 0].mean(),
        "ticket_right": 100 * runs["ticket"][:, 2].mean(),
        "reinit_right": 100 * runs["reinit"][:, 1].mean(),
        "shuffled_right": 100 * runs["shuffled"][:, 1].mean(),
    }


def marks(recording: Recording) -> list[Mark]:
    said = {"shrink": "heads, neurons, layers", "fours": "two of four", "retrain": "retraining", "ticket": "lottery"}
    return [Mark(recording.meta["phases"][name], label) for name, label in said.items()]


def _smallest(recording: Recording) -> Finding:
    f = facts(recording)
    agrees = f["ppl_half"] < f["chance_half"]
    filled = f"half pruned: smallest {f['ppl_half']:.2f}, at random {f['chance_half']:,.1f}, none {f['ppl']:.2f}"
    return Finding(f"{f['ppl_half']:.2f} vs {f['chance_half']:,.1f}", "agrees" if agrees else "differs",
                   "" if agrees else "Here the smallest weights matter more than their size.", filled)  # fmt: skip


def _heads(recording: Recording) -> Finding:
    counts, errors = recording.meta["counts"], recording.track(cut.ERROR).latest().astype(float)
    agrees = bool((np.diff(errors) > 0).all())
    told = ", ".join(
        f"{count} of {recording.meta['heads']}: {error:.2f}" for count, error in zip(counts, errors, strict=True)
    )
    why = "The source’s code mixes heads and positions; here the head axis is kept. All 8 kept: 0."
    return Finding(" / ".join(f"{e:.2f}" for e in errors), "agrees" if agrees else "differs", why, told)


def _zeros(recording: Recording) -> Finding:
    dense, zeros, smaller = recording.track(cut.MS).latest().astype(float)
    agrees = zeros > 0.8 * dense
    filled = f"dense {dense:.2f} ms, {cut.PRODUCT['sparsity']:.0%} zeros {zeros:.2f} ms, truly smaller {smaller:.2f} ms"
    return Finding(f"{dense / zeros:.2f}×, cut {dense / smaller:.1f}×", "agrees" if agrees else "differs",
                   "" if agrees else "Timed while this machine had other work.", filled)  # fmt: skip


def _fewer(recording: Recording) -> Finding:
    f = recording.meta["fours"]
    times, share = f["products"] / f["fewer"], f["sparse"] / f["dense"]
    agrees = times == 2 and abs(share - 9 / 16) < 1e-3
    cuda = f["cuda"]
    timed_there = f"timed on CUDA: {cuda[0] / cuda[1]:.2f}×" if cuda else "No card with sparse units here: not timed."
    filled = f"{f['products']:,} → {f['fewer']:,} multiplications; {f['dense']:,} → {f['sparse']:,} B"
    return Finding(f"{times:.0f}×, {share:.4f} of the bytes", "agrees" if agrees else "differs", timed_there, filled)


def _recovers(recording: Recording) -> Finding:
    f = facts(recording)
    lost, back = math.log(f["ppl_cut"] / f["ppl_toy"]), math.log(f["ppl_cut"] / f["ppl_back"])
    share = back / lost if lost > 0.01 else 1.0
    agrees = f["ppl_back"] < 1.02 * f["ppl_toy"]
    path = f"{f['ppl_toy']:.2f} → {f['ppl_cut']:,.1f} → {f['ppl_back']:.2f} in {f['steps']} steps"
    filled = f"{f['sparsity_percent']:.0f}% pruned: {path}"
    why = "" if agrees else "A short training on a small model; the source’s networks had far more weights to spare."
    return Finding(f"{share:.0%} of the loss back", "agrees" if agrees else "differs", why, filled)


def _ticket(recording: Recording) -> Finding:
    runs = _tickets(recording)
    whole, half = runs["ticket"][:, 0], runs["ticket"][:, 1].mean()
    wins = int((runs["ticket"][:, 1:] > runs["reinit"]).sum())
    agrees = half >= whole.mean() - 0.01 and wins > 0.9 * runs["reinit"].size
    filled = (
        f"half: {half:.1%}, all: {whole.mean():.1%}; ticket above re-initialised {wins} of {runs['reinit'].size} times"
    )
    why = f"{len(whole)} × a small network that names digits." if agrees else "Fewer weights did not match here."
    return Finding(f"{half:.1%} vs {whole.mean():.1%}", "agrees" if agrees else "differs", why, filled)


# fmt: off
CLAIMS = (
    Claim("Weights near zero can go: magnitude beats chance", "architectures; Han 2015, 1506.02626",
          "perplexity, smallest vs random", "method", _smallest),
    Claim("Heads pruned by their norm: the error when 8, 6, 4, 2 are kept", "architectures, task 3",
          "‖full − pruned‖/‖full‖", "method", _heads),
    Claim("Unstructured zeros do not speed up dense hardware", "architectures", "dense / with zeros", "1×", _zeros),
    Claim("2:4 halves the multiplications", "architectures; Mishra 2021, 2104.08378", "n·in / (n·in/2)",
          "about 2×", _fewer),
    Claim("Retraining brings the quality back", "Han 2015, 1506.02626", "ln(pruned/retrained) / ln(pruned/whole)",
          "no loss at 9× *", _recovers),
    Claim("The winning ticket, rewound, trains to match", "architectures; Frankle 2019, 1803.03635",
          "accuracy, ticket vs whole", "matches at 10–20% left *", _ticket),
)

BEATS = (
    Beat(
        "A corner of one weight matrix of {name}: each cell is a number, blue or red, strong or faint. Most are "
        "==close to zero|sizes==. Which of them would nobody miss?", scene="fade", step=0, focus="weights",
        notes="Choose another matrix: all look alike, and none is like the other.",
    ),
    Beat(
        "Drop the smallest, a share at a time: ==weights fade out|weights==, and the ==bell|sizes== hollows from "
        "its middle. This is [[magnitude pruning]].", scene="fade", step="half", play=True, focus="sizes",
        predict=Predict("How much can go before perplexity is a tenth worse?", (10, 40, 60, 80), "fine_percent",
                        format=".0f", unit="%"),
    ),
    Beat(
        "About {fine_percent:.0f}%. With half of them gone perplexity is {ppl_half:.2f} instead of {ppl:.2f}; had you "
        "dropped as many ==at random|quality==, {chance_half:,.0f}. But at {most_percent:.0f}% it is {ppl_most:,.0f}: "
        "there is a cliff.", scene="fade", step="most", play=True, focus="quality",
    ),
    Beat(
        "Is it faster now? A product with 90% zeros takes ==as long as before|time==: {ms_zeros:.2f} ms, and "
        "{ms_dense:.2f} without. A processor multiplies by zero like by any other number. Cut to a tenth of its rows, "
        "it takes {ms_smaller:.2f} ms: a model must truly get **smaller**.", scene="whole", step="shrink",
        focus="time",
    ),
    Beat(
        "So cut out whole things, least useful first. ==Heads go dark|heads==: with {fewest} of {heads} in each layer "
        "==perplexity|cost== is {ppl_heads:,.1f}; with a quarter of the neurons {ppl_neurons:,.1f}; without one single "
        "layer {ppl_layer:,.0f}. Each time a dense, smaller model is left.", scene="whole", step="shrunk", play=True,
        focus="heads", do=Do("Play it head by head", play=True),
    ),
    Beat(
        "Or make a deal with the hardware: [[2:4]]. Of ==each four neighbours|four== the two largest stay. "
        "==Two bits|places== a weight say where it stood: {bytes_percent:.0f}% of the bytes, half the multiplications, "
        "perplexity {ppl_fours:.2f}.", scene="fours", step="packed", play=True, focus="four",
    ),
    Beat(
        "Prune {sparsity_percent:.0f}% of the toy: {ppl_toy:.2f} becomes {ppl_cut:,.0f}. Train on, and ==it comes "
        "back|curve==: {ppl_back:.2f}. Watch the trap: ==each step|revived== wakes about {revived:,.0f} pruned "
        "weights, by gradient and momentum. Zeros must be held.", scene="retrain", step="trained", play=True,
        focus="curve",
    ),
    Beat(
        "Why train a giant first? Rewind the survivors to their **first** values and train again: the [[winning "
        "ticket]]. With ==a quarter|ticket== of the weights it names {ticket_right:.0f}% of digits; from new first "
        "values {reinit_right:.0f}%.", scene="ticket", step="last", play=True, focus="ticket",
    ),
    Beat(
        "Weights can go by the handful, if they may be anywhere; machines want order. Now break it: turn off **Hold "
        "zeros**, or prune 95% **each matrix alone** and give it 80 steps.", scene="retrain", step="trained",
        focus="curve",
    ),
)
GLOSSARY = {
    "magnitude pruning": "Setting the weights nearest to zero to zero, in the hope that they did little.",
    "2:4": "At most two of any four neighbouring weights are not zero: a pattern that some hardware can skip through.",
    "winning ticket": "The few weights of a network that, started where they once started, train as well as all.",
}


def weight_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """One weight, and whether it stays."""
    where = {"layer": min(knobs.layer, recording.meta["layers"] - 1), "matrix": knobs.matrix}
    weight = float(recording.track(cut.WEIGHT, **where).latest()[at["output"], at["input"]])
    last = len(recording.stack(cut.SHARE)) - 1
    now = min(at.get("step", last), last)
    stays = bool(recording.track(cut.KEPT, **where).latest(now)[at["output"], at["input"]])
    share = float(recording.stack(cut.SHARE)[now])
    return Arithmetic(
        title=f"weight {at['output']}, {at['input']}",
        lines=(
            ("w", f"{weight:.4f}"), ("|w|", f"{abs(weight):.4f}"), ("pruned so far", f"{share:.0%}"),
            ("it", "stays" if stays else "is gone"),
        ),
        note="Compared with all weights of the model." if recording.meta["scope"] == "global"
        else "Compared with the weights of its own matrix.",
        values={"weight": weight},
    )


WHICH = {"layer": knob("layer"), "matrix": knob("matrix")}
SCENES = (
    Scene(
        "fade",
        (
            Heatmaps(
                name="weights", title="A corner of the weights", note="small and grey: gone", span=6,
                tensor=of(cut.WEIGHT, **WHICH),
                veil=of(cut.KEPT, **WHICH), rows="output", columns="input", colours="diverging", gaps=True,
                cell=weight_cell,
            ),
            Curves(
                name="sizes", title="How large the weights are", span=6, across="bin",
                lines=(
                    Line("all", of(cut.MANY, of="all"), colour="kept", x=of(cut.BIN)),
                    Line("those that stay", of(cut.MANY, of="kept"), colour="recent", x=of(cut.BIN)),
                ),
                x_label="|w|", y_label="of 1,000", low=0.0, height=300,
            ),
            Curves(
                name="quality", title="What it costs", note="perplexity, log", span=5, log=True,
                lines=(
                    Line("smallest first", of(cut.PPL, by="weights"), colour="recent", x=of(cut.SHARE)),
                    Line("at random", of(cut.PPL, by="chance"), colour="alarm", x=of(cut.SHARE)),
                ),
                x_label="share pruned", y_label="perplexity", height=190,
            ),
            Heatmaps(
                name="gone", title="Where they went", note="share pruned", span=4, tensor=of(cut.GONE), rows="matrix",
                columns="layer", row_labels=("heads in", "heads out", "ffn in", "ffn out"),
                colours="recent",
            ),
            Numbers(
                name="now", title="Now", span=3,
                numbers=(
                    Number("Pruned", of(cut.SHARE), format=".0%"),
                    Number("Perplexity", of(cut.PPL, by="weights"), format=",.1f", colour="recent"),
                    Number("At random", of(cut.PPL, by="chance"), format=",.1f", colour="alarm"),
                ),
            ),
        ),
    ),
    Scene(
        "whole",
        (
            Heatmaps(
                name="heads", title="How much each head writes", note="small, grey: cut out", span=5,
                tensor=of(cut.SCORE), veil=of(cut.HEADS), rows="layer", columns="head", colours="query", gaps=True,
            ),
            Plane(
                name="cost", title="Smaller, and worse", note="perplexity, log", span=7, log=True,
                points=tuple(
                    Points(kind, of(cut.LEFT, by=kind), of(cut.PPL, by=f"cut {kind}"), colour=colour, trail=True)
                    for kind, colour in (("heads", "query"), ("neurons", "value"), ("layers", "heavy"))
                ),
                x_label="parameters left", y_label="perplexity", x_format=".0%", format=",.2f", height=260,
            ),
            Bars(
                name="time", title="Does the machine care?", note="ms for one product, timed here", span=5,
                values=of(cut.MS), labels=("dense", "90% zeros", "a tenth"), colour="recent", format=".2f",
                high=None, origin="real",
            ),
            Numbers(
                name="size", title="The model now", span=7,
                numbers=(
                    Number("Parameters", of(cut.PARAMETERS)), Number("Left", of(cut.LEFT, by="now"), format=".0%"),
                ),
            ),
        ),
    ),
    Scene(
        "fours",
        (
            Heatmaps(
                name="four", title="Two of each four", note="grey: gone", span=6, tensor=of(cut.FOUR),
                veil=of(cut.CHOSEN), rows="output", columns="input", colours="diverging", gaps=True,
            ),
            Heatmaps(
                name="values", title="What is stored", span=3, tensor=of(cut.PACKED), rows="output",
                columns="kept", colours="diverging", gaps=True,
            ),
            Heatmaps(
                name="places", title="Where each stood", note="two bits", span=3, tensor=of(cut.PLACED),
                rows="output", columns="kept", gaps=True, states=("1st", "2nd", "3rd", "4th"),
                state_colours=("key", "value", "recent", "recomputed"),
            ),
            Numbers(
                name="stored", title="One weight matrix, at 16 bits",
                numbers=(
                    Number("Dense", of(cut.STORED, of="dense"), unit="B"),
                    Number("2:4", of(cut.STORED, of="sparse"), unit="B", colour="recent"),
                    Number("Perplexity", of(cut.PPL, by="fours"), format=",.2f"),
                ),
            ),
        ),
    ),
    Scene(
        "retrain",
        (
            Curves(
                name="curve", title="Retraining, live", note="perplexity, log", span=7, log=True, origin="toy",
                lines=(
                    Line("this step’s texts", of(cut.CURVE, of="batch"), colour="kept", x=of(cut.TRAINED, of="batch")),
                    Line("texts never seen", of(cut.CURVE, of="held"), colour="recent", x=of(cut.TRAINED, of="held")),
                    Line("before pruning", of(cut.CURVE, of="before"), colour="ink", dashed=True,
                         x=of(cut.TRAINED, of="before")),
                ),
                x_label="training step", y_label="perplexity", height=260,
            ),
            Curves(
                name="revived", title="Pruned weights that a step revived", span=5, origin="toy",
                lines=(Line("off zero", of(cut.WOKEN), colour="alarm", x=of(cut.TRAINED, of="batch")),),
                x_label="training step", y_label="weights", low=0.0, format=",.0f", height=260,
            ),
        ),
    ),
    Scene(
        "ticket",
        (
            Plane(
                name="ticket", title="The lottery: digits named right", note="a point a network", span=8, origin="toy",
                points=tuple(
                    Points(label, of("lottery.sparsity", strategy=name), of("lottery.quality", strategy=name),
                           colour=colour, trail=True)
                    for name, label, colour in (
                        ("ticket", "rewound to the first values", "recent"), ("reinit", "new first values", "key"),
                        ("shuffled", "as many, elsewhere", "kept"),
                    )
                ),
                x_label="pruned", y_label="named right", x_format=".0%", format=".0%",
            ),
            Heatmaps(
                name="net", title="The ticket in the first layer", note="first values; grey: gone", span=4, gaps=True,
                origin="toy", tensor=of("prune.weight", linear="0", strategy="ticket"),
                veil=of("prune.mask", linear="0", strategy="ticket"), rows="output", columns="input",
                colours="diverging",
            ),
        ),
    ),
)


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    first = {"linear": "0", "strategy": "ticket"}
    wanted: dict[str, dict[str, Any]] = {"pruning.*": {}, "two_four.*": {}, "lottery.*": {}, "prune.revived": {}}
    return wanted | {"prune.weight": first, "prune.mask": first}


LESSON = Lesson(
    slug="prune", title="Cutting connections", question="What can be removed, and does the hardware care?",
    part="Fewer weights at work", order=21,
    sources=("architectures", "Han 2015, arXiv:1506.02626", "Mishra 2021, arXiv:2104.08378",
             "Frankle 2019, arXiv:1803.03635"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.prune.magnitude:magnitude", "engine.prune.structured:cut", "engine.prune.two_four:compress",
          "engine.prune.lottery:draw"),
    looks=frozenset({"layer", "matrix"}), bounded_by={"layer": "layers"}, facts=facts, marks=marks, glossary=GLOSSARY,
    step_word="step", seconds=600, trains=True,
    footnote="* AlexNet (Han), small image networks (Frankle), as reported. Measured: this page.",
)
# fmt: on
