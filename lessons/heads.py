"""Many readers, fewer notebooks: query heads that share key heads, by training or by merging a trained model's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine import cost
from engine.mixers.pooling import HOW, pool, shares, uptrain
from engine.model import Shape
from engine.recording import Recording, event, note, record, site, step, tap
from engine.toyland import Grammar, Tokenizer, story
from engine.train import measure
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.looking import LOOKS, WIRES, observe, overlaps
from lessons.models import TOY, choice, load, read_aloud
from lessons.sharing import (
    MS,
    PERPLEXITY,
    QUALITY,
    RECALL,
    SERVED,
    TEXTS,
    TOTALS,
    calculator,
    compare,
    footprint,
    front,
    judge,
    toy,
)
from lessons.texts import LIGHTHOUSE
from lessons.views import Arithmetic, Bars, Curves, Heatmaps, Line, Number, Numbers, Routes, of

MERGED = site("heads.merged", "how much of each old key head is in each new one", low=0.0, high=1.0)
LEFT = site("heads.left", "how many key heads are left of the toy's")
LOST = site("heads.lost", "how far an old head is from the one that stands in for it, over its own length",
            symbol="‖W − W′‖ / ‖W‖", low=0.0)  # fmt: skip
CURVE = site("heads.curve", "perplexity", low=0.0)
WAYS = site("heads.ways", "perplexity right after merging, one for each way")
DESIGNS = (("toy", "MHA", 8), ("gqa4", "GQA-4", 4), ("gqa2", "GQA-2", 2), ("mqa", "MQA", 1))
RATE, EVERY = 1.5e-3, 10  # of uptraining; steps between two held-out readings
READ = 40  # tokens in the picture of attention


class Turn(Knobs):
    model = choice(default=TOY)
    groups: param.Selector = param.Selector(
        default=2, objects={"4": 4, "2": 2, "1": 1}, label="Merge into", doc="Key heads left when the toy’s 8 merge."
    )
    how: param.Selector = param.Selector(
        default="mean",
        objects={"Mean of the heads": "mean", "First of the heads": "first", "Random": "random"},
        label="Merge by",
        doc="What a new key head is made of.",
    )
    steps = param.Integer(80, bounds=(10, 160), step=10, label="Uptraining steps", doc="Training after the merge.")
    layer = param.Integer(1, bounds=(0, 29), label="Layer", doc="Which layer you look into.")
    head = param.Integer(0, bounds=(0, 8), label="Head", doc="Which of its query heads.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model)
    looked = [name for name, _, _ in DESIGNS] if knobs.model == TOY else [knobs.model]
    note(total_steps=len(looked) + 3 + knobs.steps + 1, groups=knobs.groups, how=knobs.how, uptraining=knobs.steps)
    text = story(seed=2, tokens=READ) if knobs.model == TOY else LIGHTHOUSE
    ids = tokenizer.prompt(text)[:READ]
    read_aloud(tokenizer.pieces(ids))
    for name in looked:
        observe(toy(name)[0] if knobs.model == TOY else model, ids)
        step()
    event("heads.phase", phase="alike")
    compare({name: label for name, label, _ in DESIGNS}, Tokenizer().prompt(story(seed=2, tokens=READ))[:READ])
    step()
    _merge(knobs)


def _merge(knobs: Turn) -> None:
    """Turn the toy's checkpoint into one of fewer key heads, and train it on."""
    whole, H = toy("toy")[0], DESIGNS[0][2]

    def show(model: Any, weights: np.ndarray) -> dict[str, float]:
        found = judge("merged", model)
        tap(MERGED, np.pad(weights, ((0, 0), (0, H - weights.shape[1]))).astype(np.float32), "head group")
        tap(LEFT, weights.shape[1], "")
        tap(CURVE, found["perplexity"], "", of="held")
        tap(CURVE, before, "", of="before")
        return found

    event("heads.phase", phase="before")
    before = measure(whole, Grammar(), **TEXTS)["perplexity"]
    note(before=show(whole, np.eye(H)))
    step()
    event("heads.phase", phase="merged")
    with record(keep={"pooling.distance": {}}) as seen:
        small = pool(whole, groups=knobs.groups, how=knobs.how)
    far = {(t.index["of"], t.index["layer"]): t.stack()[0] for t in seen.tracks.values()}
    layers = range(whole.shape.layers)
    tap(LOST, np.stack([[far[part, i] for i in layers] for part in "kv"]), "matrix layer head")
    note(merged=(merged := show(small, shares(H, groups=knobs.groups, how=knobs.how).numpy().T)))
    ways = [_right_after(whole, knobs.groups, how) if how != knobs.how else merged["perplexity"] for how in HOW]
    tap(WAYS, np.array(ways, np.float32), "way")
    step()
    event("heads.phase", phase="training")

    def progress(done: int, of: int, loss: float) -> None:
        tap(CURVE, math.exp(loss), "", of="batch")
        tap(CURVE, before, "", of="before")
        if done % EVERY == 0 and done < of:
            tap(CURVE, measure(small, Grammar(), **TEXTS)["perplexity"], "", of="held")

    uptrain(small, steps=knobs.steps, rate=RATE, progress=progress)
    event("heads.phase", phase="after")
    note(after=show(small, shares(H, groups=knobs.groups, how=knobs.how).numpy().T))


def _right_after(whole: Any, groups: int, how: str) -> float:
    with record(keep={}):
        return measure(pool(whole, groups=groups, how=how), Grammar(), **TEXTS)["perplexity"]


def _phase(recording: Recording, name: str) -> int:
    return next(e.step for e in recording.happened("heads.phase") if e.fields["phase"] == name)


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    before, merged, after = (meta[key] for key in ("before", "merged", "after"))
    drop = merged["loss"] - before["loss"]
    quality, totals, ms = (recording.track(name).latest().astype(float) for name in (QUALITY, TOTALS, MS))
    same, other = overlaps(recording)
    wires = recording.track(WIRES).latest(0)
    return {
        "name": meta["model"]["name"],
        "heads": len(wires),
        "bytes_mha": totals[0],
        "bytes_mqa": totals[-1],
        "times": totals[0] / totals[-1],
        **{f"ppl_{name}": quality[i] for i, (name, _, _) in enumerate(DESIGNS)},
        **{f"ms_{name}": ms[i] for i, (name, _, _) in enumerate(DESIGNS)},
        "same": same,
        "other": other,
        "into": meta["groups"],
        "steps": meta["uptraining"],
        "ppl_before": before["perplexity"],
        "ppl_merged": merged["perplexity"],
        "ppl_after": after["perplexity"],
        "recall_before": before["recall"],
        "recall_merged": merged["recall"],
        "recall_after": after["recall"],
        "won_back": (merged["loss"] - after["loss"]) / drop if drop > 0.01 else 1.0,
        "won_back_percent": 100 * (merged["loss"] - after["loss"]) / drop if drop > 0.01 else 100.0,
        **{name: _phase(recording, name) for name in ("alike", "merged", "training")},
        "whole": _phase(recording, "before"),
        "shared": _phase(recording, "alike") - 1,
        "last": recording.steps - 1,
    }


def marks(recording: Recording) -> list[Mark]:
    said = {
        "alike": "trained alike, compared",
        "before": "before merging",
        "merged": "right after merging",
        "training": "uptraining begins",
        "after": "uptrained",
    }
    return [Mark(e.step, said[e.fields["phase"]]) for e in recording.happened("heads.phase")]


def _layer_bytes(tokens: int, kv_heads: int) -> float:
    """One layer of 32 query heads of 128, at 16 bits."""
    shape = Shape(1, 4096, 1, 32, kv_heads, 128, 1)
    return cost.kv_bytes(shape, tokens=tokens)


def _shrinks(recording: Recording) -> Finding:
    whole, few = _layer_bytes(2048, 32), _layer_bytes(2048, 8)
    kept = recording.track(TOTALS).latest()
    weighed = ", ".join(f"{label} {b:,.0f}" for (_, label, _), b in zip(DESIGNS, kept, strict=True))
    exact = all(b * 8 == kept[0] * heads for b, (_, _, heads) in zip(kept, DESIGNS, strict=True))
    agrees = exact and abs(whole / 1e6 - 33.5) < 0.1 and abs(few / 1e6 - 8.4) < 0.1
    filled = f"2048·32·128·2·2 B = {whole / 1e6:.2f} MB, 8 key heads {few / 1e6:.2f} MB; toys, weighed: {weighed} B"
    return Finding(
        f"{whole / few:.0f}×", "agrees" if agrees else "differs", "" if agrees else "Weights differ.", filled
    )


def _long(recording: Recording) -> Finding:
    sizes = [_layer_bytes(32768, heads) / 1e6 for heads in (32, 8, 1)]
    agrees = [round(s) for s in sizes] == [537, 134, 17]
    why = "" if agrees else "The formula gives other sizes."
    told = " / ".join(f"{s:.1f}" for s in sizes)
    return Finding(f"{told} MB", "agrees" if agrees else "differs", why, "32768 · (32, 8, 1) · 128 · 2 · 2 B")


def _judged(recording: Recording) -> Finding | None:
    missing = recording.meta["missing"]
    return Finding("–", "untestable", f"Not trained here: {', '.join(missing)}.") if missing else None


def _quality(recording: Recording) -> Finding:
    if (none := _judged(recording)) is not None:
        return none
    ppl = recording.track(QUALITY).latest()
    recall = [float(recording.track(RECALL, design=name).latest()) for name, _, _ in DESIGNS]
    filled = ", ".join(f"{label} {p:.2f} ({r:.0%})" for (_, label, _), p, r in zip(DESIGNS, ppl, recall, strict=True))
    agrees = max(ppl[1:3]) < 1.05 * ppl[0]
    why = "Perplexity, and recall behind it. " + (
        "The toys are small: one training run each tells no more than that they are close." if agrees
        else "Toys of half a million weights have few heads to spare."
    )  # fmt: skip
    return Finding(f"{ppl[2]:.2f} vs {ppl[0]:.2f}", "agrees" if agrees else "differs", why, filled)


def _speed(recording: Recording) -> Finding:
    ms = recording.track(MS).latest()
    filled = ", ".join(f"{label} {t:.1f} ms" for (_, label, _), t in zip(DESIGNS, ms, strict=True))
    agrees = ms[2] < 0.8 * ms[0] and ms[2] < 1.5 * ms[3]
    why = "" if agrees else "Timed on this machine, while it had other work: the caches of toys are small."
    told = f"{SERVED['rows']} texts of {SERVED['length']} tokens: {filled}"
    return Finding(f"{ms[2]:.1f} vs {ms[3]:.1f} ms (MHA {ms[0]:.1f})", "agrees" if agrees else "differs", why, told)


def _ways(recording: Recording) -> Finding:
    ways = recording.track(WAYS).latest()
    order = [HOW[i] for i in np.argsort(ways)]
    agrees = order == list(HOW)
    filled = ", ".join(f"{how} {p:,.1f}" for how, p in zip(HOW, ways, strict=True))
    why = (
        ""
        if agrees
        else "Heads of this toy lie far apart: their mean is like none of them, the first at least is whole."
    )
    return Finding(" < ".join(order), "agrees" if agrees else "differs", why, filled)


def _returns(recording: Recording) -> Finding:
    f = facts(recording)
    agrees = f["won_back"] >= 0.8
    meta = recording.meta
    before, merged, after = (meta[key]["loss"] for key in ("before", "merged", "after"))
    filled = f"({merged:.2f} − {after:.2f}) / ({merged:.2f} − {before:.2f}) nats in {f['steps']} steps"
    why = f"Recall is slower: {f['recall_before']:.0%}, then {f['recall_merged']:.0%}, now {f['recall_after']:.0%}."
    return Finding(f"{f['won_back']:.0%}", "agrees" if agrees else "differs", why, filled)


# fmt: off
CLAIMS = (
    Claim(
        "Sharing key heads shrinks the cache by h/g: 33.5 MB a layer become 8.4", "architectures, primer",
        "2048·32·128·2·2 B", "4×", _shrinks,
    ),
    Claim(
        "At 32,768 tokens a layer takes 537 MB with MHA, 134 with GQA, 17 with MQA", "architectures",
        "tokens · key heads · width · 2 · 2 B", "537 / 134 / 17 MB", _long,
    ),
    Claim("GQA reads almost as well as MHA", "episodes; Ainslie 2023, 2305.13245", "perplexity, GQA vs MHA",
          "47.1 vs 47.2 *", _quality),
    Claim("GQA is nearly as fast as MQA", "episodes; Ainslie 2023, 2305.13245", "time of a token, GQA vs MQA",
          "0.28 vs 0.24 s (MHA 1.51) *", _speed),
    Claim("To merge heads, mean beats first beats random", "Ainslie 2023, 2305.13245",
          "perplexity right after merging", "mean < first < random *", _ways),
    Claim("A short training wins most of it back", "Ainslie 2023, 2305.13245", "(merged − after) / (merged − before)",
          "5% of the steps *", _returns),
)

BEATS = (
    Beat(
        "{name} asks with {heads} [[query head]]s at once: ==each square|looks== is one of them, looking "
        "back. Each reads a notebook, a [[key head]], that must hold a key and a value for **every** token. ==The "
        "strip|strip== weighs what one more token costs.", scene="share", step=0,
        notes="Click two squares: heads look at different things.",
    ),
    Beat(
        "Now let neighbours share. ==The wires|wires== run together: four notebooks, two, one. ==The strip|strip== "
        "shrinks with them, while as many heads ask as before. With one it is [[MQA]], between the two [[GQA]]. Each "
        "picture is another model, trained so from the start.", scene="share", step="shared", play=True, focus="wires",
    ),
    Beat(
        "Heads that read one notebook still look at different places: their attention overlaps by {same:.0%}, that of "
        "heads which don’t share by {other:.0%}. See it in SmolLM2, whose 9 heads read 3 notebooks: change the "
        "**model**.", scene="share", focus="overlap", do=Do("Look into SmolLM2", knob="model"),
    ),
    Beat(
        "Is it worse? ==Four toys|alike==, equally large, read the same texts. With all notebooks perplexity is "
        "{ppl_toy:.2f}, with two {ppl_gqa2:.2f}, with one {ppl_mqa:.2f}, and the cache is {times:.0f} times smaller.",
        scene="alike", step="alike", focus="alike",
    ),
    Beat(
        "But your model is trained already, with 8 notebooks. Merge ==neighbours|merge==: a new key head is made of "
        "the old ones’ *weight matrices*, W for keys and W for values. Before, perplexity is {ppl_before:.1f}.",
        scene="merge", step="whole", focus="merge",
        predict=Predict("And right after merging 8 into {into}?", (5, 20, 100, 400), "ppl_merged", format=",.0f"),
    ),
    Beat(
        "{ppl_merged:,.0f}. The heads never learned to speak one language: ==each lies|lost== about as far from its "
        "stand-in as it is long. Merging **must** hurt. ==Three ways|ways== do so differently.", scene="merge",
        step="merged", play=True, focus="lost",
    ),
    Beat(
        "Train it on: {steps} steps, where it once took 4,000.", scene="merge", step="training",
        predict=Predict("How much of the lost surprise comes back?", (20, 50, 80, 95), "won_back_percent",
                        format=".0f", unit="%"),
    ),
    Beat(
        "{won_back:.0%} are back: ==the curve|curve== falls to {ppl_after:.1f}. But looking up facts returns more "
        "slowly: of the questions it answers {recall_after:.0%}, where it was {recall_before:.0%}. More steps help.",
        scene="merge", step="last", play=True, focus="curve",
    ),
    Beat(
        "==Any model’s cache|calculator==: key heads times layers times width, twice. Break it: merge into **one** by "
        "**random** heads, with 10 steps. Or type key heads that don’t divide the query heads.", scene="alike",
        focus="calculator",
    ),
)
GLOSSARY = {
    "query head": "One of several ways of looking back that a layer has, each with queries of its own.",
    "key head": "One set of keys and values: what each token leaves to be found and to be handed on.",
    "MQA": "Multi-query attention: all query heads read one key head (Shazeer 2019, arXiv:1911.02150).",
    "GQA": "Grouped-query attention: each group of neighbouring query heads shares a key head (arXiv:2305.13245).",
}


def lost_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """How far one old head is from its stand-in, and what that is made of."""
    part, layer, head = at["matrix"], at["layer"], at["head"]
    far = recording.track(LOST).latest()[part, layer]
    merged = recording.track(MERGED).latest()  # old new
    group = head // (len(merged) // recording.meta["groups"])
    made = [f"{share:g} · W{old}" for old, share in enumerate(merged[:, group]) if share]
    letter = "kv"[part]
    return Arithmetic(
        title=f"layer {layer}: old head {head}, {'keys' if letter == 'k' else 'values'}",
        lines=(
            (f"W′{group}", " + ".join(made) or "drawn at random"),
            (f"‖W{head} − W′{group}‖ / ‖W{head}‖", f"{far[head]:.3f}"),
            ("mean of this layer", f"{far.mean():.3f}"),
        ),
        note="Weight matrices are merged, not keys: they are linear, so a mean of matrices makes the mean of keys.",
        vectors=(("distance, head by head", tuple(far.tolist())),),
        values={"distance": float(far[head])},
    )


# fmt: off
SCENES = (
    Scene("share", (*LOOKS,)),
    Scene(
        "alike",
        (
            footprint(
                *((name, label, f"{heads} key head{'s' * (heads > 1)}") for name, label, heads in DESIGNS),
                name="alike", title="Trained alike: what a token costs, and how well they read",
            ),
            front(*(label for _, label, _ in DESIGNS), span=6),
            Bars(
                name="speed", title="Time of one new token", note="ms, 8 texts of 512 tokens", span=6, origin="toy",
                values=of(MS), labels=tuple(d[1] for d in DESIGNS), colour="recent", format=".1f", high=None,
            ),
            calculator(),
        ),
    ),
    Scene(
        "merge",
        (
            Routes(
                name="merge", title="Old key heads into new ones", span=4, tensor=of(MERGED), left="old head",
                right="new head", left_colour="key", count=of(LEFT), origin="converted",
            ),
            Curves(
                name="curve", title="Uptraining, live", note="perplexity, log", span=8, log=True, origin="toy",
                lines=(
                    Line("this step’s texts", of(CURVE, of="batch"), colour="kept"),
                    Line("texts never seen", of(CURVE, of="held"), colour="recent"),
                    Line("before merging", of(CURVE, of="before"), colour="ink", dashed=True),
                ),
                x_label="step", y_label="perplexity",
            ),
            Numbers(
                name="figures", title="Now", span=4, origin="toy",
                numbers=(
                    Number("Perplexity", of(PERPLEXITY, design="merged"), format=",.2f", colour="recent"),
                    Number("Questions right", of(RECALL, design="merged"), format=".0%"),
                    Number("Key heads", of(LEFT), colour="key"),
                ),
            ),
            Bars(
                name="ways", title="Right after merging", note="perplexity", span=4, origin="converted",
                values=of(WAYS), labels=HOW, colour="alarm", format=",.0f", high=None,
            ),
            Heatmaps(
                name="lost", title="How far each head moved", note="0: keys, 1: values", span=4, tensor=of(LOST),
                rows="layer", columns="head", facet="matrix", colours="key", gaps=True, origin="converted",
                cell=lost_cell,
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"heads.*": {}, "sharing.*": {}, "train.*": {}}


# fmt: off
LESSON = Lesson(
    slug="heads", title="Many readers, fewer notebooks", question="Do all heads need their own keys and values?",
    part="Share the cache", order=3,
    sources=("architectures", "primer", "episodes", "Ainslie 2023, arXiv:2305.13245", "Shazeer 2019, arXiv:1911.02150"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.mixers.pooling:pool", "engine.mixers.pooling:uptrain", "engine.mixers.softmax:SoftmaxAttention"),
    looks=frozenset({"layer", "head"}), bounded_by={"layer": "layers", "head": "heads"}, facts=facts, marks=marks,
    glossary=GLOSSARY, step_word="step", seconds=600, trains=True,
    footnote="* T5-XXL, as reported (mean of 7 tasks, seconds a sample). Measured: toys of half a million weights.",
)
# fmt: on
