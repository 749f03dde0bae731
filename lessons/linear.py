"""One matrix instead of a growing list: attention without a softmax (linear attention, Performer, RetNet)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine import checkpoints
from engine.generate import checked_ids
from engine.mixers import forms
from engine.mixers.linear import multiplications
from engine.mixers.retention import decay_mask, head_decays
from engine.recording import Recording, note, site, step, tap
from engine.toyland.questions import story
from lessons import kernels
from lessons.kernels import COUNT, DRAWS, ERROR, ESTIMATE, KERNEL, KINDS, LENGTH, LENGTHS, OFF, RATIO, RULE
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, load, read_aloud
from lessons.recall import FOUND, PAIRS, TOLD, recall_points
from lessons.views import (
    Arithmetic,
    Curves,
    Heatmaps,
    Line,
    Number,
    Numbers,
    Plane,
    Points,
    Tokens,
    of,
)

MAPS = {"elu + 1 (linear attention)": "elu", "FAVOR+, positive (Performer)": "positive",
        "FAVOR+, trigonometric": "trigonometric", "none, and a decay (RetNet)": "none"}  # fmt: skip
ELU, POSITIVE, TRIGONOMETRIC, NONE = MAPS.values()
RECALL = {TOY: ("softmax", "ink"), "linear": ("linear", "recent"), "performer": ("Performer", "recomputed"),
          "retnet": ("RetNet", "alarm")}  # fmt: skip
GREW_UP = {ELU: "linear", POSITIVE: "performer", TRIGONOMETRIC: "performer", NONE: "retnet"}  # in the zoo
STATE = site("linear.matrix", "the matrix that holds the whole past: the sum of φ(k) v, fading with γ", symbol="S")
WRITE = site("linear.write", "what this token writes into it", symbol="φ(k) v")
IMPLIED = site("linear.implied", "the attention that the matrix implies, never written down",
               symbol="φ(q)·φ(k) γⁿ⁻ᵐ / sum", grows="query")  # fmt: skip
SOFT = site("linear.soft", "what softmax pays, with the same queries and keys", symbol="softmax(q·k/√d)",
            grows="query", low=0.0, high=1.0)  # fmt: skip
FADE = site("linear.fade", "what is left of a key after so many tokens", symbol="γⁿ⁻ᵐ", grows="query",
            low=0.0, high=1.0)  # fmt: skip
HOLDS = site("linear.holds", "numbers held for one head: of the matrix, of a cache of keys and values")
WORK = site("linear.work", "multiplications of one head so far")


class Turn(Knobs):
    map: param.Selector = param.Selector(
        default=ELU, objects=dict(MAPS), label="Feature map", doc="What stands in for softmax's exponential."
    )
    features = param.Integer(48, bounds=(4, 128), label="Features", doc="FAVOR+: random features drawn.")
    orthogonal = param.Boolean(True, label="Orthogonal features", doc="FAVOR+: directions at right angles.")
    sharp = param.Number(
        1.0, bounds=(0.2, 1.5), step=0.1, label="Sharpness",
        doc="For the estimates: q and k times this. Sharp kernels are hard to estimate.",
    )  # fmt: skip
    decay = param.Number(
        1.0, bounds=(0.5, 1.0), step=0.01, label="Decay γ",
        doc="Left of a memory a token later. 1: all; RetNet then takes its own, one a head.",
    )  # fmt: skip
    chunk = param.Integer(16, bounds=(1, 64), label="Chunk", doc="Tokens computed in parallel by the chunked form.")
    tokens = param.Integer(64, bounds=(24, 128), label="Text length", doc="Tokens read.")
    layer = param.Integer(3, bounds=(0, 3), label="Layer", doc="Whose queries, keys and values are taken.")
    head = param.Integer(4, bounds=(0, 7), label="Head", doc="Which head of it.")


def run(knobs: Turn) -> None:
    grown = checkpoints.available(GREW_UP[knobs.map])[0]
    model, tokenizer = load(GREW_UP[knobs.map] if grown else TOY)
    text = tokenizer.encode(story(seed=2, tokens=knobs.tokens))[: knobs.tokens]
    pieces, ids = tokenizer.pieces(text), checked_ids(text, model.shape.vocab)[None].to(model.embed.weight.device)
    heads, h, T, M = model.shape.heads, knobs.head, len(text), knobs.features
    q, k, v = (x[h : h + 1] for x in forms.heads_of(model, ids, layer=knobs.layer))
    D = q.shape[-1]
    phi = forms.feature_map(knobs.map, D, count=M, orthogonal=knobs.orthogonal)
    gamma = head_decays(heads)[h : h + 1] if knobs.map == NONE and knobs.decay == 1 else q.new_tensor([knobs.decay])
    if knobs.map == NONE and grown:
        k = k * D**0.5  # the tap of retention has its keys divided already
    phi_q, phi_k = phi(q), phi(k)
    F = phi_q.shape[-1]
    implied = forms.weights(phi_q, phi_k, decay=gamma, normalised=phi.normalised)[0].numpy()
    soft, fade = forms.softmax_weights(q, k)[0].numpy(), decay_mask(gamma, T)[0].numpy()
    total = max(T, M, 3 * len(PAIRS))
    note(
        tokens=T, total_steps=total, D=D, F=F, chunk=knobs.chunk, gamma=float(gamma), map=knobs.map, grown=grown,
        features=M, sharp=knobs.sharp, crossover=forms.crossover(D), draws=DRAWS,
        forms=forms.disagreement(phi_q, phi_k, v, decay=gamma, chunk=knobs.chunk),
    )  # fmt: skip
    states = forms.written(phi_k, v, decay=gamma)
    if grown:  # softmax's kernel is that of a model that grew up with it
        q, k, _ = (x[h : h + 1] for x in forms.heads_of(checkpoints.load(TOY)[0], ids, layer=knobs.layer))
    kernel = kernels.estimates(q[0], k[0], knobs)
    recall = recall_points(RECALL, tokenizer)
    kernels.count_lengths(D, knobs.chunk)
    for t in range(total):
        if t < T:
            read_aloud(pieces[t : t + 1])
            tap(STATE, next(states)[0, :, :-1].float(), "feature width")
            tap(WRITE, (phi_k[0, t, :, None] * v[0, t]).float(), "feature width")
            tap(IMPLIED, implied[t : t + 1, : t + 1].astype(np.float32), "query key")
            tap(SOFT, soft[t : t + 1, : t + 1].astype(np.float32), "query key")
            tap(FADE, fade[t : t + 1, : t + 1].astype(np.float32), "query key")
            tap(HOLDS, F * (D + phi.normalised), "", of="matrix")
            tap(HOLDS, (t + 1) * 2 * D, "", of="cache")
            for form in ("softmax", "recurrent", "chunked"):
                tap(
                    WORK, multiplications(form, t + 1, D if form == "softmax" else F, D, chunk=knobs.chunk), "", of=form
                )
        if t < M:
            next(kernel)
        if 0 < t <= len(LENGTHS):
            kernels.time_length(LENGTHS[t - 1], D, heads)
        if t >= total - len(PAIRS):
            next(recall)
        step()


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    ratio = recording.stack(RATIO)
    state = int(recording.stack(HOLDS, of="matrix")[-1])
    trained = f"of a model trained with this map, {meta['model']['name']}"
    converted = "of a softmax model, converted without retraining"
    return {
        **{
            key: meta[key]
            for key in ("tokens", "D", "F", "chunk", "gamma", "features", "crossover", "longest", "forms", "asked")
        },
        "state_numbers": state,
        "cache_numbers": int(recording.stack(HOLDS, of="cache")[-1]),
        "even": math.ceil(state / (2 * meta["D"])),
        "source": trained if meta["grown"] else converted,
        "ratio": float(ratio[-1]),
        "rule": float(recording.stack(RULE)[-1]),
        "least": meta["squared"]["positive orthogonal"],
        "worst": meta["squared"]["trigonometric orthogonal"],
        "below": meta["below"]["trigonometric orthogonal"],
        "told": int(recording.stack(TOLD)[-1]),
        "recalled": _recalled(recording, -1),
        "fewest": int(recording.stack(TOLD)[0]),
        "recalled_few": _recalled(recording, 0),
        "half_way": recording.meta["tokens"] // 2,
        "last_token": recording.meta["tokens"] - 1,
        "last_feature": recording.meta["features"] - 1,
        "last": recording.steps - 1,
        "timed": len(LENGTHS),
    }


def _recalled(recording: Recording, point: int) -> str:
    found = {name: recording.stack(FOUND, model=name) for name in recording.meta["recalled"]}
    return ", ".join(f"{RECALL[name][0]} {values[point]:.0%}" for name, values in found.items())


def marks(recording: Recording) -> list[Mark]:
    even = facts(recording)["even"] - 1
    return [Mark(even, "the cache has grown as large as the matrix")] if even < recording.meta["tokens"] else []


def _crossover(recording: Recording) -> Finding:
    D = recording.meta["D"]
    n = recording.meta["crossover"]
    equal = [multiplications(form, D, D, D) for form in ("softmax", "recurrent")]
    filled = f"n = d = {D}: n²·2d = {equal[0]:,}, n·2d² = {equal[1]:,}; from {n} tokens on the matrix needs less"
    return Finding(f"n = {n - 1}", "agrees" if n == D + 1 and equal[0] == equal[1] else "differs", "", filled)


def _faster(recording: Recording) -> Finding:
    f = facts(recording)
    needed, here = 4000 * f["D"], 4000 * f["longest"] / f["ratio"]
    filled = f"n/d = {f['longest']}/{f['D']} = {f['rule']:.0f}; 4000·d = {needed:,} tokens; as measured {here:,.0f}"
    why = (
        "The ratio grows with length: any figure needs its n. The paper’s 4,462× is for drawing images of 3,072 "
        "tokens, against a softmax that keeps no cache."
    )
    return Finding(f"{f['ratio']:.1f}× at {f['longest']:,} tokens", "untestable", why, filled)


def _unbiased(recording: Recording) -> Finding:
    bias = recording.meta["bias"]
    small = all(abs(mean) < 3 * doubt for mean, doubt in bias.values())
    filled = "; ".join(f"{kind} {mean:+.1%} ± {doubt:.1%}" for kind, (mean, doubt) in bias.items())
    why = "Raw features: code that adds an epsilon or subtracts a maximum biases them."
    if not small:
        why = "Over three standard errors off: errors this skewed need more draws than were made."
    worst = max(abs(mean) for mean, _ in bias.values())
    return Finding(f"{worst:.1%} at most", "agrees" if small else "differs", why, f"{DRAWS} draws: {filled}")


def _stable(recording: Recording) -> Finding:
    squared, below = recording.meta["squared"], recording.meta["below"]
    plus, waves = squared["positive orthogonal"], squared["trigonometric orthogonal"]
    wrong = below["trigonometric orthogonal"]
    filled = f"error {plus:.2g} and {waves:.2g}; below zero {below['positive orthogonal']:.0%} and {wrong:.0%}"
    better = waves > plus
    why = "Sums of shares that may be negative can be near 0, and dividing by them blows up."
    if not better:
        why = "Short q and k make a flat kernel, which waves estimate as well: turn Sharpness up."
    return Finding(f"{waves / plus:.1f}× the error", "agrees" if better else "differs", why, filled)


def _orthogonal(recording: Recording) -> Finding:
    squared, lemma = recording.meta["squared"], recording.meta["lemma"]
    turned, plain = squared["positive orthogonal"], squared["positive independent"]
    why = f"A few large features decide: {DRAWS} draws give it roughly."
    filled = f"{turned:.2g} / {lemma:.2g} by lemma 2; independent ones measured {plain:.2g}"
    return Finding(
        f"{turned / lemma:.2f} of the error", "agrees" if turned < min(plain, lemma) else "differs", why, filled
    )


def _same(recording: Recording) -> Finding:
    off, f = recording.meta["forms"], facts(recording)
    filled = f"{f['tokens']} tokens, chunks of {f['chunk']}: largest difference {off:.0e} of the largest answer"
    return Finding(
        f"{off:.0e}", "agrees" if off < 1e-9 else "differs", "" if off < 1e-9 else "A form is wrong.", filled
    )


KATHAROPOULOS, CHOROMANSKI = "Katharopoulos 2020, 2006.16236", "Choromanski 2021, 2009.14794"
# fmt: off
CLAIMS = (
    Claim("O(n·d²) instead of O(n²·d)", "architectures", "n²·2d against n·2d²", "n = d", _crossover, "tokens"),
    Claim("Up to 4000 times faster", f"episodes; {KATHAROPOULOS}", "n / d", "4000×", _faster),
    Claim("FAVOR+ is unbiased", f"episodes; {CHOROMANSKI}", "mean of estimate/kernel − 1", "0", _unbiased),
    Claim(
        "Positive features are needed for stability", f"episodes; {CHOROMANSKI}", "squared error, positive and not",
        "lemma 2", _stable,
    ),
    Claim(
        "Orthogonal features lower the variance", f"episodes; {CHOROMANSKI}", "error orthogonal / independent",
        "below 1", _orthogonal,
    ),
    Claim(
        "Parallel, recurrent and chunked are one computation", "Sun 2023, 2307.08621", "max difference", "equal", _same,
    ),
)

BEATS = (
    Beat(
        "Softmax attention keeps every key and value: a list that grows. Without the exponential, keys and values can "
        "be summed *before* anybody asks. Each token adds ==its own small product|write== of key and value to "
        "==one matrix|state==. Then it is gone.", scene="state", step="half_way", play=True, focus="state",
    ),
    Beat(
        "After {tokens} tokens a cache holds {cache_numbers:,} numbers, ==the matrix|state== {state_numbers}, as from "
        "the start. From {even} tokens on it is the smaller one. Nothing is dropped; everything is *added up*. Queries "
        "and keys here are {source}.", scene="state", step="last_token", play=True, focus="holds",
    ),
    Beat(
        "What does such a memory look at? ==On the left|soft== softmax; ==beside it|implied==, with the same queries "
        "and keys, what the matrix implies. Click a cell: a [[feature map]] keeps shares positive, but this one has "
        "no sharp peak to offer.", scene="attention", step="last_token", play=True, focus="implied",
        do=Do("Open a cell’s arithmetic", cell="implied"),
    ),
    Beat(
        "RetNet lets the past ==fade|fade==: before each token the matrix is multiplied by γ. Turn **Decay** to 0.9. "
        "After seven tokens less than half of a memory is left, and new ones stand out.", scene="attention",
        step="last_token", focus="fade", do=Do("Turn the decay", knob="decay"),
    ),
    Beat(
        "Performer wants softmax’s own kernel. ==Every step draws one random feature more|off== and the error fades: "
        "right on average, from the first. With {features}, squared errors are {least:.2g} for positive features, "
        "{worst:.2g} for waves, {below:.0%} of whose estimates fall below zero.", scene="kernel", step="last_feature",
        play=True, focus="off",
    ),
    Beat(
        "So when does it pay? Softmax multiplies n²·2d times, the matrix n·2d². Heads here are {D} wide.",
        scene="cost", step=0, focus="counts",
        predict=Predict(
            "From which length on does the matrix need fewer multiplications?", (4, 13, 144, 1000), "crossover",
            format=".0f", unit="tokens",
        ),
    ),
    Beat(
        "Right after n = d. ==The clock|times== follows later: at {longest:,} tokens softmax took {ratio:.0f} times as "
        "long here, where n/d is {rule:.0f}. Parallel for training, token by token for writing, or in chunks of "
        "{chunk}: [[three orders]] of one sum.", scene="cost", step="timed", play=True, focus="times",
    ),
    Beat(
        "One matrix must also hold everything. Told ever more pairs, each model is asked for one: ==a point|recall== "
        "is {asked} questions. With {fewest} pairs: {recalled_few}; with {told}: {recalled}. A list forgets nothing; "
        "who fails at the fewest never learnt to look up.",
        scene="recall", step="last", play=True, focus="recall",
    ),
    Beat(
        "Break it. Take trigonometric features, turn **Sharpness** to 1.5, and look at the implied attention: shares "
        "below zero, and above one. How many features tame it? Is there a decay at which old and new are both seen?",
        scene="kernel", step="last_feature", do=Do("Choose another feature map", knob="map"),
    ),
)

GLOSSARY = {
    "feature map": "A function φ of queries and keys, made so that φ(q)·φ(k) can stand in for exp(q·k).",
    "three orders": "All at once as a matrix, one token after the other, or in chunks with the past in between.",
}
# fmt: on


def implied_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """The share that the matrix implies for one key, beside softmax's."""
    i, j = at["query"], at["key"]
    if not 0 <= j <= i < recording.meta["tokens"]:
        raise ValueError(f"token {i} cannot look at token {j}, which comes later")
    mine, soft, fade = (recording.track(s).chunks[i].array[0] for s in (IMPLIED, SOFT, FADE))
    kind = "share by the matrix" if recording.meta["map"] != NONE else "score by the matrix, not a share"
    return Arithmetic(
        title=f"token {i} looks at token {j}",
        lines=(
            ("share by softmax", f"{soft[j]:.4f}"),
            (f"γ to the power {i - j}", f"{fade[j]:.4f}"),
            (kind, f"{mine[j]:.4f}"),
            ("if all were alike, 1 / " + str(i + 1), f"{1 / (i + 1):.4f}"),
        ),
        note="Softmax’s row has its largest share at "
        f"token {int(soft.argmax())} ({soft.max():.2f}), the matrix’s at {int(mine.argmax())} ({mine.max():.2f}).",
        vectors=(("softmax", tuple(soft.tolist())), ("implied", tuple(mine.tolist()))),
        values={"soft": float(soft[j]), "implied": float(mine[j])},
    )


# fmt: off
NAMES = {
    "softmax": ("softmax, n²·2d", "alarm"), "recurrent": ("the matrix, n·2d²", "recent"),
    "chunked": ("in chunks", "recomputed"),
}
COUNTS = tuple(
    Line(label, of(COUNT, of=form), colour=ink, x=of(LENGTH, of="counts")) for form, (label, ink) in NAMES.items()
)
CROSS = Points("they cross", of(LENGTH, of="crossover"), of(COUNT, of="crossover"), colour="ink", names=("cross",))
ERRORS = tuple(
    Line(kind, of(ERROR, kind=kind), colour="key" if name == "positive" else "query", dashed=not orthogonal)
    for kind, (name, orthogonal) in KINDS.items()
)
RECALLED = tuple(Line(label, of(FOUND, model=name), colour=ink, x=of(TOLD)) for name, (label, ink) in RECALL.items())
SMALL: dict[str, Any] = {"rows": "query", "columns": "key", "span": 4}
TILES: dict[str, Any] = {**SMALL, "gaps": True}
SCENES = (
    Scene(
        "state",
        (
            Heatmaps(
                name="state", title="The matrix that holds the past", span=5, tensor=of(STATE), rows="feature",
                columns="width", colours="diverging",
            ),
            Heatmaps(
                name="write", title="What this token adds", span=4, tensor=of(WRITE), rows="feature", columns="width",
                colours="diverging",
            ),
            Numbers(
                name="holds", title="Held for one head", span=3,
                numbers=(
                    Number("The matrix", of(HOLDS, of="matrix"), "numbers", colour="recent"),
                    Number("A cache", of(HOLDS, of="cache"), "numbers", colour="key"),
                    Number("Multiplied, softmax", of(WORK, of="softmax"), colour="alarm"),
                    Number("Multiplied, matrix", of(WORK, of="recurrent"), colour="recent"),
                ),
            ),
            Tokens(name="text", title="The text, as it is read", fold=False),
        ),
    ),
    Scene(
        "attention",
        (
            Heatmaps(name="soft", title="Softmax", tensor=of(SOFT), colours="attention", power=0.6, **SMALL),
            Heatmaps(
                name="implied", title="Implied by the matrix", tensor=of(IMPLIED), colours="recent", power=0.6,
                cell=implied_cell, **SMALL,
            ),
            Heatmaps(name="fade", title="What is left of a key", tensor=of(FADE), colours="key", **SMALL),
            Tokens(name="again", title="The text", fold=False),
        ),
    ),
    Scene(
        "kernel",
        (
            Heatmaps(
                name="kernel", title="The kernel itself", note="of a softmax model’s q and k", tensor=of(KERNEL),
                colours="attention", **TILES,
            ),
            Heatmaps(name="estimate", title="Estimated", tensor=of(ESTIMATE), colours="recent", **TILES),
            Heatmaps(name="off", title="How far off", tensor=of(OFF), colours="diverging", **TILES),
            Curves(
                name="errors", title="Squared error, feature by feature", note=f"raw, {DRAWS} draws of each kind",
                lines=ERRORS, log=True, x_label="features", format=".2g", origin="simulated",
            ),
        ),
    ),
    Scene(
        "cost",
        (
            Plane(
                name="counts", title="Multiplications of one head", span=6, log=True, log_x=True, x_label="tokens",
                y_label="multiplications", lines=COUNTS, points=(CROSS,), origin="formula",
            ),
            Curves(
                name="times", title="Softmax over the matrix, by the clock", note="chunks of 64, this machine", span=6,
                lines=(
                    Line("measured", of(RATIO), colour="recent", x=of(LENGTH, of="timed")),
                    Line("n / d", of(RULE), colour="ink", dashed=True, x=of(LENGTH, of="timed")),
                ),
                log=True, log_x=True, x_label="tokens", y_label="times", format=".3g",
            ),
        ),
    ),
    Scene(
        "recall",
        (
            Curves(
                name="recall", title="Pairs recalled", note="one pair asked for, many questions a point",
                x_label="pairs told", lines=RECALLED, low=0, high=1, format=".0%",
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    names = ("matrix", "write", "implied", "soft", "fade", "kernel", "estimate", "off", "error", "holds", "work")
    return {"recall.*": {}, **{f"linear.{name}": {} for name in (*names, "count", "length", "ratio", "rule")}}


# fmt: off
LESSON = Lesson(
    slug="linear", title="One matrix instead of a growing list", question="What if softmax goes away?",
    part="Share the cache", order=7,
    sources=("architectures", "episodes", KATHAROPOULOS, CHOROMANSKI, "Sun 2023, arXiv:2307.08621"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS, facts=facts, marks=marks,
    code=(
        "engine.mixers.linear:LinearAttention", "engine.mixers.linear:chunked",
        "engine.mixers.performer:running_estimates", "engine.mixers.retention:Retention",
    ),
    glossary=GLOSSARY, step_word="step", seconds=180,
)
# fmt: on
