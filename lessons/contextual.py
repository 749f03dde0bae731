"""Only what this token needs: which neurons fire, small networks that tell it beforehand, and what may be left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import param

from engine.evaluate import perplexity, surprisal
from engine.generate import checked_ids
from engine.prune.contextual import active, needed, observe, recall, similarities, top, train_predictor
from engine.prune.contextual_decoding import by_habit, by_predictor, by_truth, contextual, count_of, work
from engine.prune.structured import feed_forward
from engine.recording import Recording, note, record, site, step, tap
from engine.toyland import Grammar, batch, story
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, introduce, load, read_aloud
from lessons.sharing import toy
from lessons.texts import NAMES, OWN, TEXTS
from lessons.views import Arithmetic, Curves, Heatmaps, Line, Number, Numbers, knob, of

SHOWN = 64  # neurons of a layer in the picture
SHARES = (1.0, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1)
STUDIED = 640  # tokens that the predictors learn from
RANK, STEPS, RATE = 24, 60, 2e-2
WAYS = {"predictor": "foretold", "truth": "the truth", "habit": "always the same"}

FIRES = site("firing.fires", "each neuron: 0 silent, 1 fires", grows="token")
FIRED = site("firing.codes", "each neuron: 0 silent, 1 fires unforetold, 2 foretold in vain, 3 fires as foretold",
             grows="token")  # fmt: skip
SILENT = site("firing.silent", "the share of the layer’s neurons that a token leaves silent", low=0.0, high=1.0)
FOUND = site(
    "firing.found", "of a token’s strongest neurons, the share that was foretold, mean over tokens", low=0.0, high=1.0
)
RECALL = site("firing.recall", "of what fires, the share that is foretold", low=0.0, high=1.0)
SAME = site("firing.same", "the share that is right if every token gets the same neurons", low=0.0, high=1.0)
LAYER = site("firing.layer", "the layer")
ALIKE = site("firing.alike", "cosine of the stream entering a layer and entering the next", low=-1.0, high=1.0)
HEADS = site("firing.heads", "how much of a layer’s writing each head does, mean over tokens", low=0.0, high=1.0)
SHARE = site("firing.share", "the share of neurons that is computed", low=0.0, high=1.0)
PPL = site("firing.perplexity", "e to the mean surprisal with only those neurons", low=1.0)
WORK = site("firing.work", "the blocks’ multiplications that are left, predictors included", low=0.0)


class Turn(Knobs):
    model = choice()
    share = param.Number(0.3, bounds=(0.05, 1.0), step=0.05, label="Neurons computed", doc="Share of each layer’s.")
    threshold = param.Number(
        0.05, bounds=(0.0, 0.5), step=0.01, label="Counts as firing above", doc="Of the token’s largest; SwiGLU only."
    )
    text: param.Selector = param.Selector(default="lighthouse", objects=dict(NAMES), label="Text", doc="What is read.")
    own = param.String("Once upon a time", label="Your own text", doc="Read when Text is “Your own”.")
    tokens = param.Integer(48, bounds=(12, 96), step=4, label="Tokens read", doc="How much of it.")
    layer = param.Integer(2, bounds=(0, 29), label="Layer", doc="Which layer you look into.")


def run(knobs: Turn) -> None:
    if knobs.model == TOY:
        model = toy("relu")[0]
        tokenizer = load(TOY)[1]
        introduce(TOY, model)
    else:
        model, tokenizer = load(knobs.model)
    ids, studied = _texts(knobs, tokenizer, model)
    layers = len(model.blocks)
    exact = knobs.model == TOY  # ReLU: silent is silent
    threshold = 0.0 if exact else knobs.threshold
    note(total_steps=len(ids) + layers + 1 + len(SHARES), layers=layers, tokens=len(ids), share=knobs.share,
         exact=exact, threshold=threshold)  # fmt: skip
    read_aloud(tokenizer.pieces(ids))
    with record(keep={}):
        seen = observe(model, checked_ids(ids, model.shape.vocab)[None])
    fires = [active(one.neurons, threshold=threshold) for one in seen]
    _read(seen, fires)
    predictors, habits = _study(model, studied, knobs)
    _foretell(seen, fires, predictors, knobs)
    _leave_out(model, ids, predictors, habits)


def _texts(knobs: Turn, tokenizer: Any, model: Any) -> tuple[list[int], Any]:
    """What is read, and other text that the predictors learn from."""
    if knobs.model == TOY:
        said = knobs.own if knobs.text == OWN else story(seed=list(TEXTS).index(knobs.text), tokens=knobs.tokens)
        studied = batch(Grammar(), seed=1, step=0, rows=8, length=96).ids
        return list(tokenizer.prompt(said))[: knobs.tokens], studied
    said = knobs.own if knobs.text == OWN else TEXTS[knobs.text]
    other = "\n".join(text for name, text in TEXTS.items() if name != knobs.text)
    return (
        list(tokenizer.prompt(said))[: knobs.tokens],
        checked_ids(tokenizer.prompt(other)[:STUDIED], model.shape.vocab)[None],
    )


def _strongest(neurons: Any, keep: int) -> Any:
    """Where each token's strongest neurons are: `keep` of them, or fewer where fewer fire."""
    return top(neurons.abs(), keep) & active(neurons)


def _study(model: Any, studied: Any, knobs: Turn) -> tuple[dict[int, Any], dict[int, Any]]:
    """Train a small predictor for each layer, one layer a step; and what is most used, as a contrast."""
    with record(keep={}):
        seen = observe(model, studied)
    alike = similarities(seen).mean(1).cpu().float().numpy()
    few = [float(needed(s.neurons, share=0.9).double().mean() / s.neurons.shape[1]) for s in seen]
    heads = [float(needed(s.heads, share=0.9).double().mean() / s.heads.shape[1]) for s in seen]
    note(alike=float(alike[1:].mean()) if len(alike) > 1 else float(alike.mean()), needed=float(np.mean(few)),
         needed_heads=float(np.mean(heads)), rank=RANK)  # fmt: skip
    predictors, habits = {}, {}
    half = len(seen[0].ffn_in) // 4 * 3  # the last quarter is for testing
    for layer, one in enumerate(seen):
        keep = count_of(one.neurons.shape[1], knobs.share)
        truth = _strongest(one.neurons, keep)
        predictors[layer] = train_predictor(one.ffn_in[:half], truth[:half], rank=RANK, steps=STEPS, rate=RATE)
        habits[layer] = one.neurons[:half]
        said = top(predictors[layer](one.ffn_in[half:]), keep)
        always = by_habit(habits[layer], share=knobs.share)(one.ffn_in[half:])
        tap(RECALL, recall(said, truth[half:]), "")
        tap(SAME, recall(always, truth[half:]), "")
        tap(LAYER, layer, "")
        if layer == 0:
            tap(ALIKE, alike, "layer")
        step(label=f"layer {layer}")
    return predictors, habits


def _read(seen: Sequence[Any], fires: Sequence[Any]) -> None:
    """Word by word: what fires."""
    tap(HEADS, np.stack([_shares(one) for one in seen]), "layer head")
    silent = [(1 - f.double().mean(1)).tolist() for f in fires]
    rows = [f[:, :SHOWN].cpu().numpy().astype(np.int32) for f in fires]
    note(silent=float(np.mean(silent)))
    for t in range(len(rows[0])):
        for layer, row in enumerate(rows):
            tap(FIRES, row[t : t + 1], "token neuron", layer=layer)
            tap(SILENT, silent[layer][t], "", layer=layer)
        step()


def _shares(one: Any) -> Any:
    """How much of a layer's writing each head does."""
    return (one.heads / one.heads.sum(1, keepdim=True)).mean(0).cpu().float().numpy()


def _foretell(seen: Sequence[Any], fires: Sequence[Any], predictors: Mapping[int, Any], knobs: Turn) -> None:
    """The same words again: what was foretold of them."""
    for layer, one in enumerate(seen):
        keep = count_of(one.neurons.shape[1], knobs.share)
        truth = _strongest(one.neurons, keep)
        said = top(predictors[layer](one.ffn_in), keep)
        codes = fires[layer].int() + 2 * said.int()
        tap(FIRED, codes[:, :SHOWN].cpu().numpy().astype(np.int32), "token neuron", layer=layer)
        tap(FOUND, float((said & truth).sum() / truth.sum()), "", layer=layer)
    step(label="foretold")


def _leave_out(model: Any, ids: list[int], predictors: Mapping[int, Any], habits: Mapping[int, Any]) -> None:
    """What it costs to compute only some of the neurons, chosen in three ways."""
    text = checked_ids(ids, model.shape.vocab)[None].to(model.embed.weight.device)
    layers = range(len(model.blocks))

    def read(some: Any) -> float:
        with record(keep={}):
            return perplexity(surprisal(some, text))

    whole = read(model)
    all_kept = contextual(model, neurons={i: by_truth(feed_forward(model, i)) for i in layers})
    with record(keep={}):
        off = float((all_kept(text) - model(text)).abs().max())
    note(off=off)
    for share in SHARES:
        choosers = {
            "predictor": {i: by_predictor(predictors[i], share=share) for i in layers},
            "truth": {i: by_truth(feed_forward(model, i), share=share) for i in layers},
            "habit": {i: by_habit(habits[i], share=share) for i in layers},
        }
        tap(SHARE, share, "")
        for way, chosen in choosers.items():
            tap(PPL, whole if share == 1 else read(contextual(model, neurons=chosen)), "", way=way)
        tap(WORK, work(model, neurons=share, rank=RANK), "")
        step(label=f"{share:.0%}")


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    read = {way: recording.stack(PPL, way=way).astype(float) for way in WAYS}
    at = int(np.argmin([abs(share - meta["share"]) for share in SHARES]))  # what the predictors were trained for
    return {
        "name": meta["model"]["name"],
        "layers": meta["layers"],
        "shown": SHOWN,
        "rule": "exactly silent" if meta["exact"] else f"below {meta['threshold']:.0%} of its strongest",
        "silent": 100 * meta["silent"],
        "needed": 100 * meta["needed"],
        "heads": 100 * meta["needed_heads"],
        "alike": meta["alike"],
        "recall": 100 * float(recording.stack(RECALL).mean()),
        "same": 100 * float(recording.stack(SAME).mean()),
        "chosen": 100 * meta["share"],
        "enough": 100 * SHARES[at],
        "ppl": read["truth"][0],
        "ppl_guess": read["predictor"][at],
        "ppl_truth": read["truth"][at],
        "ppl_habit": read["habit"][at],
        "work": 100 * float(recording.stack(WORK)[at]),
        "half": meta["tokens"] // 2,
        "read": meta["tokens"] - 1,
        "studied": meta["tokens"] + meta["layers"] - 1,
        "foretold": meta["tokens"] + meta["layers"],
        "last": recording.steps - 1,
    }


def marks(recording: Recording) -> list[Mark]:
    layers, tokens = recording.meta["layers"], recording.meta["tokens"]
    return [Mark(tokens, "predictors learn"), Mark(tokens + layers, "foretold"),
            Mark(tokens + layers + 1, "leaving out")]  # fmt: skip


def _similar(recording: Recording) -> Finding:
    alike = recording.track(ALIKE).latest().astype(float)
    mean = recording.meta["alike"]
    told = f"layer by layer, from {alike.min():.2f} to {alike.max():.2f}"
    return Finding(f"{mean:.2f}", "agrees" if mean > 0.9 else "differs",
                   "" if mean > 0.9 else "Few layers: each has more to do.", told)  # fmt: skip


def _unused(recording: Recording) -> Finding:
    f, meta = facts(recording), recording.meta
    agrees = meta["needed"] < 0.5 and meta["needed_heads"] < 0.8
    why = ("" if meta["exact"] else "SwiGLU has no exact zeros. ") + (
        "" if agrees else "Few heads: most of them write something for most tokens."
    )
    squares = f"90% of the squares: {f['needed']:.0f}% of neurons, {f['heads']:.0f}% of heads"
    filled = f"{squares}; {f['rule']}: {f['silent']:.0f}%"
    return Finding(f"{f['needed']:.0f}% of neurons", "agrees" if agrees else "differs", why.strip(), filled)


def _predictors(recording: Recording) -> Finding:
    f = facts(recording)
    agrees = f["recall"] > f["same"] + 5 and f["ppl_guess"] < f["ppl_habit"]
    cost = f"{f['ppl_guess']:.2f}, {f['ppl_habit']:.2f}"
    filled = f"{f['recall']:.0f}% foretold, {f['same']:.0f}% by habit; perplexity with {f['enough']:.0f}%: {cost}"
    why = f"They learned from {STUDIED} tokens; the source’s from hundreds of thousands."
    return Finding(f"{f['recall']:.0f}%", "agrees" if agrees else "differs", why, filled)


def _exact(recording: Recording) -> Finding:
    meta = recording.meta
    if not meta["exact"]:
        return Finding("–", "untestable", "SwiGLU has no zeros to leave out: switch to Toyland, whose model has ReLU.")
    return Finding(
        f"{meta['off']:.1e}", "agrees" if meta["off"] < 1e-4 else "differs", "", "max |dense − only non-zeros|"
    )


# fmt: off
CLAIMS = (
    Claim("Activations change little from layer to layer", "lecture; Liu 2023, 2310.17157", "cos(x_l, x_l+1)",
          "similar", _similar),
    Claim("For one token most neurons and heads are unused", "lecture; Liu 2023, 2310.17157",
          "share that holds 90% of the squares", "15–20% needed *", _unused),
    Claim("Small predictors tell which", "lecture; Liu 2023, 2310.17157", "foretold / firing", "little loss *",
          _predictors),
    Claim("Leaving out exact zeros changes nothing", "Liu 2023, 2310.17157", "max |difference|", "0", _exact),
)

BEATS = (
    Beat(
        "A feed-forward layer has many [[neuron]]s. ==Each row|fires== is a word, each column one of the first "
        "{shown} neurons: coloured if it fires for this word.", scene="fire", step="half", play=True,
        focus="fires",
        predict=Predict("What share is silent for a word?", (10, 30, 60, 90), "silent", format=".0f", unit="%"),
    ),
    Beat(
        "{silent:.0f}% are {rule}. In all layers {needed:.0f}% of the neurons hold nine tenths of what is written, "
        "of the ==heads|heads== {heads:.0f}%. And other words light ==other ones|fires==.", scene="fire", step="read",
        play=True, focus="fires",
    ),
    Beat(
        "If one knew which, the rest need not be computed, nor even **read from memory**. But one knows only after "
        "computing them. So a tiny [[predictor]] looks at a layer’s input and guesses. Watch ==them learn|recall==, "
        "layer by layer.", scene="guess", step="studied", play=True, focus="recall",
    ),
    Beat(
        "They foretell {recall:.0f}% of the strongest {chosen:.0f}% that fire; always taking ==the same|recall== "
        "neurons would get {same:.0f}%. One may even ask a layer early, where the stream ==turns little|alike== from "
        "layer to layer: here its cosine is {alike:.2f}.", scene="guess", step="studied", focus="alike",
    ),
    Beat(
        "Back in the text: ==magenta|fired== fired as foretold. Red fired too, but nobody said so; grey was foretold "
        "in vain: work for nothing. Click one.",
        scene="foretold", step="foretold", focus="fired", do=Do("Open a neuron’s arithmetic", cell="fired"),
    ),
    Beat(
        "Now leave others out. ==With {enough:.0f}%|cost== of the neurons, perplexity goes from {ppl:.1f} to "
        "{ppl_guess:.1f}; with an oracle’s choice {ppl_truth:.1f}, with a fixed one {ppl_habit:.1f}. {work:.0f}% of "
        "the multiplications are left.", scene="cost", step="last", play=True, focus="cost",
    ),
    Beat(
        "SmolLM2’s neurons are never exactly silent, so that a threshold must be chosen: Toyland’s model has ReLU and "
        "true zeros. Break it: compute **5%**. Or find a text whose neurons nobody foretold.", scene="cost",
        step="last", focus="cost",
    ),
)
GLOSSARY = {
    "neuron": "One unit between the two matrices of a feed-forward layer: it reads the input, and writes if it fires.",
    "predictor": "Two small matrices that guess from a layer’s input which neurons will matter.",
}


def fired_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """What one neuron did for one word."""
    layer = min(knobs.layer, recording.meta["layers"] - 1)
    codes = recording.stack(FIRED, layer=layer)
    code = int(codes[at["token"], at["neuron"]])
    said = {0: "silent, and so foretold", 1: "fires, and nobody said so", 2: "foretold, but silent",
            3: "fires, as foretold"}[code]  # fmt: skip
    fires = codes[:, at["neuron"]] % 2
    return Arithmetic(
        title=f"layer {layer}, neuron {at['neuron']}",
        lines=(
            ("for this word", said), ("fires for", f"{fires.mean():.0%} of the words"),
            ("silent neurons of the layer", f"{float(recording.stack(SILENT, layer=layer)[at['token']]):.0%}"),
            ("of the strongest, foretold", f"{float(recording.track(FOUND, layer=layer).latest()):.0%}"),
        ),
        values={"code": float(code)},
    )


LOOK = {"layer": knob("layer")}
SCENES = (
    Scene(
        "fire",
        (
            Heatmaps(
                name="fires", title="Which neurons fire", span=8, tensor=of(FIRES, **LOOK), rows="token",
                columns="neuron", row_labels="tokens", states=("silent", "fires"), state_colours=("sunk", "heavy"),
            ),
            Heatmaps(
                name="heads", title="How much each head writes", note="mean share of its layer", span=4,
                tensor=of(HEADS), rows="layer", columns="head", colours="query",
            ),
            Numbers(
                name="now", title="For this word",
                numbers=(Number("Silent neurons of the layer", of(SILENT, **LOOK), format=".0%"),),
            ),
        ),
    ),
    Scene(
        "guess",
        (
            Curves(
                name="recall", title="What is foretold, layer by layer", span=7, low=0.0, high=1.0, format=".0%",
                lines=(
                    Line("by a predictor", of(RECALL), colour="heavy", x=of(LAYER)),
                    Line("always the same", of(SAME), colour="kept", x=of(LAYER)),
                ),
                x_label="layer", y_label="of the strongest", height=220,
            ),
            Curves(
                name="alike", title="The stream, from layer to layer", note="cosine", span=5, across="layer",
                lines=(Line("alike", of(ALIKE), colour="recent"),), x_label="layer", y_label="cosine", high=1.0,
                height=220, format=".2f",
            ),
        ),
    ),
    Scene(
        "foretold",
        (
            Heatmaps(
                name="fired", title="What was foretold of each word", span=9, tensor=of(FIRED, **LOOK), rows="token",
                columns="neuron", row_labels="tokens", cell=fired_cell,
                states=("silent", "missed", "in vain", "as foretold"),
                state_colours=("sunk", "alarm", "kept", "heavy"),
            ),
            Numbers(
                name="found", title="In this layer", span=3,
                numbers=(
                    Number("Of the strongest, foretold", of(FOUND, **LOOK), format=".0%", colour="heavy"),
                    Number("Silent, last word", of(SILENT, **LOOK), format=".0%"),
                ),
            ),
        ),
    ),
    Scene(
        "cost",
        (
            Curves(
                name="cost", title="What it costs to leave neurons out", note="perplexity, log", span=8, log=True,
                lines=tuple(
                    Line(label, of(PPL, way=way), colour=colour, x=of(SHARE), dashed=way == "truth")
                    for (way, label), colour in zip(WAYS.items(), ("heavy", "ink", "kept"), strict=True)
                ),
                x_label="share computed", y_label="perplexity", height=240,
            ),
            Numbers(
                name="figures", title="At this share", span=4,
                numbers=(
                    Number("Computed", of(SHARE), format=".0%"), Number("Multiplications left", of(WORK), format=".0%"),
                    Number("Perplexity", of(PPL, way="predictor"), format=",.1f", colour="heavy"),
                ),
            ),
        ),
    ),
)


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"firing.*": {}}


LESSON = Lesson(
    slug="contextual", title="Only what this token needs", question="Do all neurons matter for every token?",
    part="Fewer weights at work", order=22, sources=("lecture", "Liu 2023, arXiv:2310.17157"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.prune.contextual:train_predictor", "engine.prune.contextual_decoding:ContextualFFN",
          "engine.prune.contextual:observe"),
    looks=frozenset({"layer"}), bounded_by={"layer": "layers"}, facts=facts, marks=marks, glossary=GLOSSARY,
    step_word="step", seconds=300, trains=True,
    footnote="* OPT models of 6.7 to 175 billion parameters, as reported. Measured: this page.",
)
# fmt: on
