"""Your own lean model: techniques on top of each other, what each eats of an error budget, and all your tries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine import cost
from engine.recording import Recording, note, tap
from engine.stack import FLOAT, GROUP
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, load
from lessons.stacking import ASKED as PROMPT
from lessons.stacking import (
    BOUND,
    BYTES,
    DONE,
    FASTER,
    FLOPS,
    FOUND,
    PACE,
    PERPLEXITY,
    RECALL,
    ROWS,
    SAID,
    SHARES,
    SMALLER,
    STEPS,
    USED,
    WAY_X,
    WAY_Y,
    answer,
    bench,
    chosen,
    refuse,
    stack,
)
from lessons.views import Arithmetic, Column, Entry, Ledger, Number, Saying, Sayings, Tries, knob, of

TENTH = 0.1  # the rise of perplexity that the lesson asks about


class Turn(Knobs):
    model = choice(default=TOY)
    heads: param.Selector = param.Selector(
        default="GQA",
        objects={"All": "all", "GQA, trained so": "GQA", "MQA, trained so": "MQA", "One, merged": "merged"},
        label="Key heads",
        doc="Toys were trained with 8, 2 or 1 key heads; SmolLM2 with 3 for its 9 query heads.",
    )
    experts = param.Boolean(False, label="Experts", doc="A toy of eight experts of which two work on a token.")
    prune: param.Selector = param.Selector(
        default="nothing",
        objects={
            "Nothing": "nothing",
            "Smallest weights": "smallest",
            "Two of each four": "2:4",
            "A head": "heads",
        },
        label="Prune",
        doc="What is cut before weights are rounded. A head: the one that writes least, in each layer.",
    )
    share = param.Integer(30, bounds=(5, 90), step=5, label="Share pruned", doc="Percent; for the smallest weights.")
    bits: param.Selector = param.Selector(
        default=4, objects={"16": 16, "8": 8, "4": 4, "3": 3, "2": 2}, label="Weight bits",
        doc="Rounded after training, in groups of 32 with a scale and a minimum each.",
    )  # fmt: skip
    mend = param.Integer(0, bounds=(0, 40), step=10, label="Mending steps", doc="The toy trains on, rounded as it is.")
    cache: param.Selector = param.Selector(
        default="sinks",
        objects={"Everything": "full", "A window": "window", "Sinks and a window": "sinks", "Heavy hitters": "heavy"},
        label="Cache keeps",
        doc="Which tokens stay in memory.",
    )
    budget = param.Integer(128, bounds=(16, 256), step=8, label="Tokens kept", doc="By every cache but the full one.")
    cache_bits: param.Selector = param.Selector(
        default=4, objects={"16": 16, "8": 8, "4": 4, "2": 2}, label="Cache bits", doc="Of each key and value kept.",
    )  # fmt: skip
    guess = param.Boolean(
        False,
        label="Guess ahead",
        doc="Look up what followed before, and check it in one pass. Then both answers take the likeliest words.",
    )
    allowed = param.Integer(10, bounds=(1, 100), label="Error budget", doc="Percent by which perplexity may rise.")
    text: param.Selector = param.Selector(
        default="bread", objects={"The lighthouse": "lighthouse", "Bread": "bread", "The licence": "licence"},
        label="Text", doc="What perplexity is measured on; of Toyland, other stories.",
    )  # fmt: skip
    tokens = param.Integer(192, bounds=(96, 320), step=32, label="Its length", doc="Tokens of the text.")
    prompt: param.Selector = param.Selector(
        default="given", objects={"Ours": "given", "Your own": "own"}, label="Prompt", doc="What both models answer."
    )
    own = param.String("Once upon a time", label="Your own prompt", doc="Used when Prompt is “Your own”.")
    words = param.Integer(32, bounds=(8, 64), step=8, label="Answer", doc="Tokens that both say.")


def run(knobs: Turn) -> None:
    refuse(knobs)
    model, tokenizer = load(knobs.model, fast=True)
    at = bench(knobs, model, tokenizer)
    used = chosen(knobs)
    at.used[:] = used
    note(total_steps=1 + int(used.sum()) + knobs.mend + knobs.words, tokens=knobs.tokens, bits=knobs.bits,
         kept=knobs.budget if knobs.cache != "full" else 0, guess=knobs.guess)  # fmt: skip
    at.count(0, at.original, cost.kv_bytes(model.shape, tokens=knobs.tokens), knobs.tokens)
    at.show(0)
    at.measure(0, at.original)
    at.show(0)
    lean = at.original
    for row, lean in stack(knobs, at):
        at.measure(row, lean)
        at.show(row)
    tap(DONE, used.sum(), "")
    answer(at, lean, tokenizer, knobs.words)


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    rows, used = recording.track(ROWS).latest(), recording.track(USED).latest()
    parts = recording.track(SHARES).latest()
    first, last = rows[0], rows[int(np.flatnonzero(used)[-1])]
    rises = rows[:, PERPLEXITY] / first[PERPLEXITY] - 1
    held = [i for i in np.flatnonzero(used) if rises[i] <= TENTH]
    weights, cache = parts[0] / parts[int(np.flatnonzero(used)[-1])]
    answers = [i for i, label in enumerate(recording.labels) if label == "answer"]
    return {
        "name": meta["model"]["name"],
        "tokens": meta["tokens"],
        "bits": meta["bits"],
        "steps": int(used.sum()) - 1,
        "before": float(first[BYTES]) / _unit(first)[0],
        "after": float(last[BYTES]) / _unit(first)[0],
        "unit": _unit(first)[1],
        "times": float(first[BYTES] / last[BYTES]),
        "weights_times": float(weights),
        "cache_times": float(cache),
        "within": float(max(first[BYTES] / rows[i, BYTES] for i in held)),
        "rise": float(rises[int(np.flatnonzero(used)[-1])]),
        "ppl_before": float(first[PERPLEXITY]),
        "ppl_after": float(last[PERPLEXITY]),
        "recall_before": float(first[RECALL]),
        "recall_after": float(last[RECALL]),
        "flops": float(first[FLOPS] / last[FLOPS]),
        "faster": float(recording.track(FASTER).latest()),
        "bound": float(last[BOUND]),
        "pace": float(last[PACE]),
        "ten": _ten(parts, used, meta["tokens"], meta["kept"]),
        "parted": _parted(meta),
        "counted": 0,
        "whole": 1,
        "rounded": _at(recording, "rounded"),
        "stacked": answers[0] - 1,
        "answering": answers[0],
        "last": recording.steps - 1,
        "trap": TRAPS[meta["model"]["kind"]],
    }


def _unit(row: np.ndarray) -> tuple[float, str]:
    return (1e6, "MB") if row[BYTES] >= 1e7 else (1e3, "kB")


def _at(recording: Recording, label: str) -> int:
    """The last step of that name; where the stack has none, its end."""
    found = [i for i, name in enumerate(recording.labels) if name == label]
    return found[-1] if found else recording.labels.index("answer") - 1


def _ten(parts: np.ndarray, used: np.ndarray, tokens: int, kept: int) -> str:
    """From how many tokens on all would be ten times smaller: weights stay, the original's cache grows."""
    end = int(np.flatnonzero(used)[-1])
    (weights, cache), (lean, lean_cache) = parts[0], parts[end]
    grows = cache / tokens  # bytes a token of the original
    lean_grows = 0.0 if kept else lean_cache / tokens
    if grows <= 10 * lean_grows:
        return "however long the text"
    start = lean + (lean_cache if kept else 0.0)
    return f"from {max(0.0, (10 * start - weights) / (grows - 10 * lean_grows)):,.0f} tokens on"


def _parted(meta: Any) -> str:
    if meta["parted"] < 0:
        return f"all {meta['said']} words agree"
    return f"they part at word {meta['parted'] + 1}"


TRAPS = {
    "real": "Mind the trap: these weights came on a grid of 4 bits, so 4 cost nothing here, and 3 are out of reach.",
    "toy": "A toy has weights to spare. SmolLM2 falls apart at 3 bits: don’t judge one model by another.",
}


def marks(recording: Recording) -> list[Mark]:
    said = dict(zip(STEPS, ("the original", "key heads", "experts", "pruned", "weights rounded", "mended",
                            "cache keeps less", "cache in few bits", "guessing ahead"), strict=True))  # fmt: skip
    found = {label: i for i, label in enumerate(recording.labels) if label in said}
    first = next((i for i, label in enumerate(recording.labels) if label == "answer"), None)
    return [Mark(i, said[label]) for label, i in found.items()] + ([Mark(first, "both answer")] if first else [])


def _hundred(recording: Recording) -> Finding:
    f = facts(recording)
    told = f"weights {f['weights_times']:.1f}×, cache {f['cache_times']:.1f}×, both {f['times']:.1f}×"
    filled = f"{f['before']:,.0f} / {f['after']:,.0f} {f['unit']} at {f['tokens']} tokens: {told}"
    good = f["times"] >= 10 and f["rise"] <= TENTH
    if good:
        return Finding(f"{f['times']:.1f}×", "agrees", "", filled)
    if f["times"] >= 10:
        return Finding(f"{f['times']:.1f}×", "differs", f"But perplexity rose by {f['rise']:.0%}.", filled)
    why = f"Weights set the pace on short texts; only the cache shrinks by more. Ten times would be {f['ten']}."
    return Finding(f"{f['times']:.1f}×", "differs", why, filled)


def _timed(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"tokens a second, in turns: {f['faster']:.2f}×; by bytes alone {f['bound']:.1f}×"
    why = "What runs are rounded weights made floats again: nothing is read in fewer bits, so nothing is faster."
    if recording.meta["guess"]:
        why = "Guesses are checked several in a pass; weights are floats again, so their bits save no time here."
    good = f["faster"] >= 10
    return Finding(f"{f['faster']:.2f}×", "agrees" if good else "differs", "" if good else why, filled)


def _quality(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"perplexity {f['ppl_before']:.2f} → {f['ppl_after']:.2f}; recall {f['recall_before']:.0%} → "
    filled += f"{f['recall_after']:.0%}"
    fits, finds = f["rise"] <= TENTH, f["recall_before"] - f["recall_after"] <= TENTH
    why = "" if fits and finds else "This stack has gone too far: see which step ate the budget."
    if fits and not finds:
        why = "Perplexity hardly rises, but what a cache drops can’t be asked for: recall tells what perplexity hides."
    return Finding(f"{f['rise']:+.1%}", "agrees" if fits and finds else "differs", why, filled)


CLAIMS = (
    Claim("Architecture and quantisation together make models 10 to 100 times smaller", "architectures",
          "bytes(original) / bytes(lean), weights and cache", "10 to 100×", _hundred),
    Claim("… and as much faster", "architectures", "tokens a second, lean / original", "10 to 100×", _timed),
    Claim("… at little cost in quality", "architectures", "perplexity(lean) / perplexity(original) − 1", "little",
          _quality),
)  # fmt: skip

BEATS = (
    Beat(
        "This is your bench. {name} as it was trained: its weights and its [[cache]] after {tokens} tokens take "
        "{before:,.0f} {unit}. ==The ledger|ledger== will get a row for each technique that you stack on it. Every bar "
        "compares with ==the first row|ledger==.", scene="stack", step="counted", focus="ledger",
    ),
    Beat(
        "Size is one side. The other: [[perplexity]], {ppl_before:.2f} on this text, and recall, "
        "{recall_before:.0%} of the questions answered. You have an ==error budget|ledger==: perplexity may rise by a "
        "tenth.", scene="stack", step="whole", focus="ledger",
        predict=Predict("How many times smaller will it be within that?", (1.5, 3, 10, 50), "within", unit="×"),
    ),
    Beat(
        "{within:.1f} times. ==Row by row|ledger== it shrinks, and the orange steps walk towards the red line. Weights "
        "in {bits} bits give most. {trap}", scene="stack", step="rounded", play=True, focus="ledger",
    ),
    Beat(
        "All of it: {times:.1f} times fewer bytes, the cache alone {cache_times:.0f} times, for {rise:+.1%}. But "
        "==tokens a second|ledger== don’t follow: {faster:.2f} times. Our rounded weights are made floats again before "
        "they multiply. By ==bytes alone|ledger==, a formula, a machine that waits for memory could gain {bound:.1f} "
        "times.", scene="stack", step="stacked", play=True, focus="ledger",
    ),
    Beat(
        "Numbers don’t talk. ==Both models|answers== go on from the same words, token by token, with the same dice: "
        "{parted}. A different word need not be a worse one. Read both: where does the lean one invent what the "
        "original had read?",
        scene="answers", step="last", play=True, focus="answers",
    ),
    Beat(
        "This run stands as a ring on ==your map|tries==: lower left is better. Turn a knob, and the next try joins "
        "it. The green staircase is the [[Pareto front]]: none of those on it is beaten in both.", scene="stack",
        focus="tries", do=Do("Turn Cache bits", knob="cache_bits"),
    ),
    Beat(
        "Not all goes together. Turn **Guess ahead** on: wrong guesses must be taken back, and a cache that dropped "
        "tokens, or rounded them, cannot. The knob says so. A try is a **link**: copy one from ==the list|tries==, and "
        "someone else’s browser opens it.", scene="stack", focus="tries", do=Do("Turn Guess ahead on", knob="guess"),
    ),
    Beat(
        "Break it. Two **bits**. Half the weights pruned, or two of each four. A window of 16. Which step blows the "
        "budget? On the toy, can a few **mending steps** bring it back? How far left can you push "
        "==the front|tries==?", scene="stack", step="stacked", focus="tries",
        do=Do("Set Weight bits to 2", knob="bits"),
    ),
)  # fmt: skip
GLOSSARY = {
    "cache": "The keys and values of tokens already read, kept so that they need not be computed again.",
    "perplexity": "e to the mean surprisal: among how many equally likely tokens the model hesitates.",
    "Pareto front": "Those choices for which no other is better in one thing and at least as good in the other.",
}

ENTRIES = (
    Entry("The original", "16 bits, nothing left out"),
    Entry("Key heads", "{heads}"),
    Entry("Experts", "two of eight work"),
    Entry("Pruned", "{prune}"),
    Entry("Weights rounded", f"{{bits}} bits, groups of {GROUP}"),
    Entry("Mended", "{mend} training steps"),
    Entry("Cache keeps less", "{cache}, {budget} tokens"),
    Entry("Cache rounded", "{cache_bits} bits"),
    Entry("Guessing ahead", "looked up, then checked"),
)
FIGURES = (
    Column("weights and cache", ".3s", "B"),
    Column("FLOPs a token", ".3s"),
    Column("tokens/s, measured", ".3g", more=True),
    Column("by bytes alone", ".2f", "×", more=True, origin="formula"),
    Column("perplexity", ".2f"),
    Column("recall", ".0%", more=True),
)


def figure_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """How one figure of the ledger comes about."""
    row, column = at["row"], at["column"]
    rows, used = recording.track(ROWS).latest(), recording.track(USED).latest()
    weights, cache = recording.track(SHARES).latest()[row]
    here, first = rows[row, column], rows[0, column]
    title = f"{ENTRIES[row].label}: {FIGURES[column].label}"
    if not used[row] or not np.isfinite(here):
        return Arithmetic(title, (("figure", "none"),), note="This step is not in this stack, or not measured yet.")
    lines = {
        BYTES: (("weights", f"{weights:,.0f} B"), ("+ cache", f"{cache:,.0f} B"), ("=", f"{here:,.0f} B")),
        FLOPS: (("FLOPs of one token", f"{here:,.0f}"), ("a multiplication and an addition", "2 each")),
        PACE: (("tokens a second", f"{here:,.1f}"), ("measured", "in turns with the original")),
        BOUND: (("bytes, original / here", f"{rows[0, BYTES] / rows[row, BYTES]:.2f}"), ("formula", f"{here:.2f}×")),
        PERPLEXITY: (("perplexity", f"{here:.3f}"), ("over the original’s, less one", f"{here / first - 1:+.1%}")),
        RECALL: (("answers that come first", f"{here:.1%}"), ("the original’s", f"{first:.1%}")),
    }[column]
    steps = tuple(float(rows[i, column]) for i in np.flatnonzero(used) if np.isfinite(rows[i, column]))
    return Arithmetic(title, (*lines, ("of the original", f"{here / first:.3f}")), vectors=(("step by step", steps),),
                      values={"here": float(here), "first": float(first)})  # fmt: skip


LEDGER = Ledger(
    name="ledger", title="The stack, step by step", note="each row stands on those above", tensor=of(ROWS),
    used=of(USED), entries=ENTRIES, columns=FIGURES, budgeted=PERPLEXITY, allowed=knob("allowed"), cell=figure_cell,
)  # fmt: skip
TRIES = Tries(
    name="tries", title="Your tries", note="lower left is better; click one to open it", x=of(WAY_X), y=of(WAY_Y),
    done=of(DONE), x_label="bytes", y_label="perplexity", x_format=".3s", format=".2f",
    words="heads {heads} · prune {prune} · weights {bits} bits · cache {cache} {budget}, {cache_bits} bits",
    figures=(Number("smaller", of(SMALLER), "×", ".2f"), Number("recall", of(FOUND), "", ".0%"),
             Number("times as fast", of(FASTER), "", ".2f")),
    apart=("model", "text", "tokens"), allowed=knob("allowed"),
)  # fmt: skip
SCENES = (
    Scene("stack", (LEDGER, TRIES)),
    Scene(
        "answers",
        (
            Sayings(
                name="answers", title="The same prompt, two answers", note="drawn by the same dice",
                sayings=(
                    Saying("The original", of(SAID, of="original")),
                    Saying("The lean one", of(SAID, of="lean"), colour="recent"),
                ),
                prompt=of(PROMPT), abreast=True,
            ),
            TRIES,
        ),
    ),
)  # fmt: skip


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"build.*": {}, "stack.*": {}}


LESSON = Lesson(
    slug="build", title="Your own lean model", question="How far can you go before it breaks?", part="Put it together",
    order=29, sources=("architectures", "lecture", "primer"), knobs=Turn, run=run, keep=keep, beats=BEATS,
    scenes=SCENES, claims=CLAIMS,
    code=("engine.stack:rounded", "engine.stack:weight_bytes", "engine.caches.snapped:Snapped", "engine.ledger:judge"),
    looks=frozenset({"allowed"}), facts=facts, marks=marks, glossary=GLOSSARY, step_word="step", seconds=600,
    trains=True,
    snapshots={
        "Two bits, mended": {"bits": 2, "mend": 20},
        "Guessing ahead, with a full cache": {"guess": True, "cache": "full", "cache_bits": 16},
        "Pruned, then rounded": {"prune": "smallest"},
    },
    footnote=f"Bytes are counted as a file would hold them, the original at {FLOAT} bits a number.",
)  # fmt: skip
