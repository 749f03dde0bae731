"""The cache above and below: layers that read what another layer remembered (CLA, YOCO)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine import cost
from engine.caches.full import Full
from engine.generate import generate
from engine.mixers.cross_layer import borrowed
from engine.mixers.early_exit import early_exit, exit_layer, prefill_multiplications
from engine.recording import Recording, event, note, record, site, step, tap
from engine.timing import in_turns
from engine.toyland import Grammar, batch
from engine.zoo import WINDOW
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, load, read_aloud
from lessons.sharing import (
    BYTES,
    PERPLEXITY,
    QUALITY,
    RECALL,
    TOTALS,
    calculator,
    compare,
    footprint,
    front,
    judge,
    toy,
    unknown,
    weigh,
)
from lessons.views import Arithmetic, Curves, Footprint, Heatmaps, Holding, Line, Number, Numbers, Stack, of

KINDS = ("keeps notes", "only asks", "has a window")
KEEPS, ASKS, LOOKS_NEAR = range(3)
KIND = site("layers.kind", "what each layer is: one that keeps keys and values, one that only asks, one with a window")
READS = site("layers.owner", "the layer whose keys and values each layer reads, once the token has come so far")
LIT = site("layers.lit", "where the token is on its way up", low=0.0, high=1.0)
GROWTH = site("layers.growth", "bytes of the whole cache after so many tokens", unit="B")
LENGTH = site("layers.length", "tokens in the cache")
DONE = site("layers.done", "what was computed of each token: all of a layer (1), its keys and values alone (0.5)",
            low=0.0, high=1.0)  # fmt: skip
WORK = site("layers.work", "multiplications to read the prompt")
MS = site("layers.milliseconds", "time to read the prompt, the best of several", unit="ms")

DESIGNS = (
    ("toy", "MHA", "every layer keeps 8 key heads"),
    ("cla2", "CLA-2", "every second layer keeps them"),
    ("mqa", "MQA", "every layer keeps 1 key head"),
    ("cla2-mqa", "CLA-2 with MQA", "every second layer keeps 1"),
    ("yoco", "YOCO", "windows below, one cache above"),
)
TRAINED = {("toy", 1): "toy", ("toy", 2): "cla2", ("mqa", 1): "mqa", ("mqa", 2): "cla2-mqa"}
LENGTHS = np.arange(0, 257, 8)
BASES = {"MHA": "toy", "MQA": "mqa"}
CONTRAST = (
    ("base", "No layer shares", "trained so"),
    ("sibling", "Layers share", "trained so"),
    ("cut", "Layers share", "cut out of the first, not trained"),
)


# fmt: off
class Turn(Knobs):
    factor: param.Selector = param.Selector(
        default=2, objects={"1": 1, "2": 2, "4": 4}, label="Layers a cache", doc="How many layers read one cache."
    )
    base: param.Selector = param.Selector(
        default="toy", objects=BASES, label="Base attention", doc="What each layer does before layers share."
    )
    prompt = param.Integer(48, bounds=(16, 160), label="Prompt", doc="Tokens that YOCO reads, in full and in short.")


def run(knobs: Turn) -> None:
    _, tokenizer = load(TOY)
    ids = batch(Grammar().only("home"), seed=0, step=0, rows=1, length=knobs.prompt, stream="test").ids
    text = ids[0].tolist()
    read_aloud(tokenizer.pieces(text))
    base, _ = toy(knobs.base)
    sibling, layers = TRAINED.get((knobs.base, knobs.factor)), base.shape.layers
    note(factor=knobs.factor, base=knobs.base, prompt=knobs.prompt, layers=layers, total_steps=4 * layers + 2)
    event("layers.phase", phase="base")
    _climb(base, text)
    cut = None if sibling else borrowed(base, factor=knobs.factor)
    event("layers.phase", phase="shared")
    _climb(toy(sibling)[0] if sibling else cut, text)
    event("layers.phase", phase="yoco")
    _climb(toy("yoco")[0], text)
    event("layers.phase", phase="alike")
    compare({name: label for name, label, _ in DESIGNS}, text)
    _grow(toy("toy")[0].shape, toy("mqa")[0].shape)
    step()
    event("layers.phase", phase="contrast")
    _contrast(base, sibling, cut or borrowed(base, factor=knobs.factor), text)
    step()
    event("layers.phase", phase="prefill")
    _leave(toy("yoco")[0], ids)


def _climb(model: Any, ids: list[int]) -> None:
    """One more token on its way up: a step a layer, with whose keys and values it meets there."""
    layers = model.shape.layers
    with record(keep={}) as seen:
        list(generate(model, ids, steps=1, cache=Full()))
    kind = np.full(layers, LOOKS_NEAR, np.int32)
    owner = np.full(layers, -1, np.int32)  # a window is nobody else's
    for e in seen.events:
        if e.name == "layers.keep":
            kind[e.fields["layer"]], owner[e.fields["layer"]] = KEEPS, e.fields["layer"]
        elif e.name == "layers.read":
            kind[e.fields["layer"]], owner[e.fields["layer"]] = ASKS, e.fields["owner"]
    if not any(e.name.startswith("layers.") for e in seen.events):
        kind[:], owner = KEEPS, np.arange(layers)  # plain attention keeps its own and tells nobody
    for layer in range(layers):
        weigh("now", model, ids)
        at = np.arange(layers)
        tap(KIND, kind, "layer")
        tap(READS, np.where(at <= layer, owner, -1).astype(np.int32), "layer")
        tap(LIT, np.where(at == layer, 1.0, np.where(at < layer, 0.55, 0.2)).astype(np.float32), "layer")
        step()


def _grow(mha: Any, mqa: Any) -> None:
    """What each design holds after so many tokens, by the engine's formulas, in values of four bytes."""
    tap(LENGTH, LENGTHS.astype(np.float32), "length")
    for name, _, _ in DESIGNS:
        shape = mqa if "mqa" in name else mha
        held = [
            cost.yoco_values(shape, window=WINDOW, tokens=int(n)) if name == "yoco"
            else cost.cla_values(shape, factor=2 if "cla2" in name else 1, tokens=int(n))
            for n in LENGTHS
        ]  # fmt: skip
        tap(GROWTH, 4 * np.array(held, np.float32), "length", design=name)


def _contrast(base: Any, sibling: str | None, cut: Any, ids: list[int]) -> None:
    """The same cache twice: once the model was trained for it, once it was taken away."""
    told = {"base": (base, True), "sibling": toy(sibling) if sibling else (cut, False), "cut": (cut, True)}
    for name, (model, known) in told.items():
        weigh(f"contrast {name}", model, ids)
        if known:
            note(**{f"{name}_judged": judge(f"contrast {name}", model)})
        else:
            unknown(f"contrast {name}")


def _leave(model: Any, ids: Any) -> None:
    """Read the prompt in full and leave early: which rows of which layers were computed, told by the queries asked."""
    layers, N = model.shape.layers, ids.shape[1]
    ways = {"full": model.hidden, "early": lambda ids: early_exit(model, ids)}
    done = np.zeros((2, layers, N), np.float32)
    last = {}
    for i, (name, way) in enumerate(ways.items()):
        with record(keep={"attention.q": {}}) as seen:
            last[name] = model.logits(way(ids)[:, -1])
        for track in seen.tracks.values():
            rows = track.stack().shape[track.axes.index("query")]
            done[i, int(track.index["layer"]), N - rows :] = 1
        kept = {e.fields["layer"] for e in seen.events if e.name == "layers.keep"}
        for layer in kept:
            done[i, layer] = np.maximum(done[i, layer], 0.5)
    with record(keep={}):
        taken = in_turns({name: functools.partial(way, ids) for name, way in ways.items()}, rounds=15, warm_up=0)
    work = dict(zip(ways, prefill_multiplications(model, tokens=N), strict=True))
    note(apart=float((last["full"] - last["early"]).abs().max()), exit=exit_layer(model))
    for layer in range(layers):
        tap(DONE, np.where(np.arange(layers)[None, :, None] <= layer, done, 0.0), "way layer token")
        for name in ways:
            tap(WORK, work[name], "", way=name)
            tap(MS, min(taken[name]) * 1e3, "", way=name)
        step()


def _phase(recording: Recording, name: str) -> int:
    return next(e.step for e in recording.happened("layers.phase") if e.fields["phase"] == name)


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    kept = dict(zip((name for name, _, _ in DESIGNS), recording.track(TOTALS).latest().tolist(), strict=True))
    ppl = dict(zip(kept, recording.track(QUALITY).latest().tolist(), strict=True))
    recall = {name: float(recording.track(RECALL, design=name).latest()) for name in kept}
    full, early = (float(recording.track(WORK, way=way).latest()) for way in ("full", "early"))
    L = meta["layers"]
    shared = recording.track(BYTES, design="now").latest(2 * L - 1)
    return {
        **{f"kept_{name.replace('-', '_')}": value for name, value in kept.items()},
        **{f"ppl_{name.replace('-', '_')}": value for name, value in ppl.items()},
        **{f"recall_{name.replace('-', '_')}": value for name, value in recall.items()},
        "small": kept["toy"] / kept["cla2-mqa"],
        "kept_shared": float(shared.sum()),
        "kept_base": float(recording.track(BYTES, design="now").latest(0).sum()),
        "layers": L, "factor": meta["factor"],
        "window": WINDOW,
        "ppl_base": meta["base_judged"]["perplexity"],
        "ppl_cut": meta["cut_judged"]["perplexity"],
        "recall_base": meta["base_judged"]["recall"],
        "recall_cut": meta["cut_judged"]["recall"],
        "less": full / early,
        "exit": meta["exit"],
        "prompt": meta["prompt"],
        "apart": meta["apart"],
        **{name: _phase(recording, name) for name in ("alike", "contrast", "prefill")},
        "climbed": L - 1,
        "climbed_shared": 2 * L - 1,
        "climbed_yoco": 3 * L - 1,
        "last": recording.steps - 1,
    }


def marks(recording: Recording) -> list[Mark]:
    said = {
        "base": "no layer shares", "shared": "layers share", "yoco": "YOCO", "alike": "trained alike, compared",
        "contrast": "cut out, not trained", "prefill": "reading a prompt",
    }
    return [Mark(e.step, said[e.fields["phase"]]) for e in recording.happened("layers.phase")]


def _halves(recording: Recording) -> Finding:
    f = facts(recording)
    missing = {"MQA", "CLA-2 with MQA"} & set(recording.meta["missing"])
    ratio = f["kept_mqa"] / f["kept_cla2_mqa"]
    if missing:
        return Finding(f"{ratio:.0f}×", "untestable", f"Not trained here: {', '.join(sorted(missing))}.")
    loss = f["ppl_cla2_mqa"] / f["ppl_mqa"] - 1
    agrees = ratio == 2 and loss < 0.03
    filled = (
        f"{f['kept_mqa']:,.0f} B → {f['kept_cla2_mqa']:,.0f} B; perplexity {f['ppl_mqa']:.2f} → {f['ppl_cla2_mqa']:.2f}"
    )
    why = f"Questions right: {f['recall_mqa']:.0%} → {f['recall_cla2_mqa']:.0%}."
    why = why if agrees else f"With four layers, two caches are few. {why}"
    return Finding(f"{ratio:.0f}×, perplexity {loss:+.1%}", "agrees" if agrees else "differs", why, filled)


def _one_cache(recording: Recording) -> Finding:
    f = facts(recording)
    grown = recording.track(GROWTH, design="yoco").latest()
    slope = float(grown[-1] - grown[-2]) / float(LENGTHS[-1] - LENGTHS[-2])
    agrees = slope == f["kept_yoco"] == f["kept_toy"] / f["layers"]
    filled = f"{f['kept_toy']:,.0f} B ÷ {f['layers']} = {f['kept_yoco']:,.0f} B a token, and windows of {WINDOW}"
    why = "" if agrees else f"The formula says {slope:,.0f} B a token."
    return Finding(f"{f['kept_toy'] / f['kept_yoco']:.0f}× less", "agrees" if agrees else "differs", why, filled)


def _half_way(recording: Recording) -> Finding:
    f = facts(recording)
    full, early = (float(recording.track(WORK, way=way).latest()) for way in ("full", "early"))
    ms = [float(recording.track(MS, way=way).latest()) for way in ("full", "early")]
    agrees = f["apart"] < 1e-4 and full > 1.5 * early
    filled = f"{early / 1e6:.1f} of {full / 1e6:.1f} million multiplications; logits apart by {f['apart']:.0e}"
    why = f"In time {ms[0]:.1f} → {ms[1]:.1f} ms. With long prompts attention counts too, and more is saved."
    return Finding(f"{full / early:.1f}× less work", "agrees" if agrees else "differs", why, filled)


def done_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """What was computed of one token in one layer, and what for."""
    way, layer, token = at["way"], at["layer"], at["token"]
    done = recording.track(DONE).latest()
    value = float(done[way, layer, token])
    said = {0.0: "nothing", 0.5: "keys and values alone", 1.0: "all of the layer"}[value]
    name = ("in full", "leaving early")[way]
    rows = [int((row == 1).sum()) for row in done[way]]
    return Arithmetic(
        title=f"layer {layer}, token {token}, {name}",
        lines=(
            ("computed of this token", said),
            *((f"rows that pass layer {i}", f"{count}") for i, count in enumerate(rows)),
            ("rows in all", f"{sum(rows)} of {done[way].size}"),
        ),
        note="Nothing above reads this token’s state: only its keys and values." if value < 1 else "",
        values={"done": value, "rows": float(sum(rows))},
    )


CLAIMS = (
    Claim(
        "CLA with MQA halves the cache again, with little loss", "episodes; Brandon 2024, 2405.12981",
        "2 · layers/2 · 1 · width", "2× at 1B and 3B *", _halves,
    ),
    Claim(
        "YOCO fills one cache only", "post; Sun 2024, 2405.05254", "one layer’s keys and values, and windows",
        "9.4× less memory at 1M tokens *", _one_cache,
    ),
    Claim(
        "YOCO can stop reading a prompt half way", "post; Sun 2024, 2405.05254", "multiplications, full vs early",
        "180 s → 6 s at 512K tokens *", _half_way,
    ),
)

BEATS = (
    Beat(
        "A token climbs ==four layers|stack==. In each it leaves a key and a value, and reads what earlier tokens left "
        "**there**: every layer has a [[cache]] of its own. ==The strip|strip== adds them up: {kept_base:,.0f} bytes.",
        scene="stack", step="climbed", play=True, focus="stack",
    ),
    Beat(
        "Heads can share. Layers too: now only the first of every {factor} keeps anything. ==The others|stack== bring "
        "a question of their own and read the cache below. That is [[CLA]]; what is left is {kept_shared:,.0f} bytes.",
        scene="stack", step="climbed_shared", play=True, focus="stack",
        notes="Arrows bend down to the cache that is read.",
    ),
    Beat(
        "[[YOCO]] goes further. The lower half looks through windows of {window} tokens, which never grow. Then "
        "==one layer|stack== writes keys and values for all above: you only cache once. ==One more token|strip== costs "
        "{kept_yoco:,.0f} bytes.", scene="stack", step="climbed_yoco", play=True, focus="stack",
    ),
    Beat(
        "Both kinds of sharing can be had together: one key head ([[MQA]]), in every second layer.", scene="alike",
        step="alike",
        predict=Predict("How many times smaller is that cache than MHA’s?", (2, 4, 8, 16), "small", format=".0f",
                        unit="×"),
    ),
    Beat(
        "{small:.0f} times: 8 by heads, 2 by layers. ==All these toys|alike== were trained alike, and read almost as "
        "well: perplexity {ppl_toy:.2f} with every cache, {ppl_cla2:.2f} with every second, {ppl_yoco:.2f} in YOCO. Of "
        "the questions they get {recall_toy:.0%}, {recall_cla2:.0%} and {recall_yoco:.0%} right. ==Long texts|growth== "
        "tell caches apart.", scene="alike", step="alike", focus="alike",
    ),
    Beat(
        "So why not cut caches out of the model that you have?", scene="contrast", step="alike",
        predict=Predict("Perplexity was {ppl_base:.2f}. Every layer but the first of {factor} reads its neighbour’s "
                        "keys, untrained: what now?", (4, 6, 12, 20), "ppl_cut", format=".1f"),
    ),
    Beat(
        "{ppl_cut:.1f}. Each layer’s queries were learned against its own keys; to ==another layer’s|contrast== they "
        "say nothing. Questions answered fall from {recall_base:.0%} to {recall_cut:.0%}. CLA is no cut but a way "
        "to train. Choose **MQA** as base and look again.", scene="contrast", step="contrast", focus="contrast",
        do=Do("Change the base attention", knob="base"),
    ),
    Beat(
        "YOCO’s second gift: from layer {exit} on, a prompt needs nothing but ==keys and values|rows==. So {prompt} "
        "tokens climb half way, and the last one alone goes on: {less:.1f} times less work, the same answer to "
        "{apart:.0e}.", scene="prefill", step="last", play=True, focus="rows",
    ),
    Beat(
        "Work it out for ==any model|calculator==. Break it: let **four** layers read one cache and watch the "
        "questions; give it the shortest prompt, then the longest; type layers that don’t divide.", scene="alike",
        focus="calculator",
    ),
)

GLOSSARY = {
    "cache": "Keys and values of all tokens so far, kept so that they need not be computed again.",
    "CLA": "Cross-layer attention: neighbouring layers share one cache (Brandon 2024, arXiv:2405.12981).",
    "YOCO": "You only cache once: half of the layers read one global cache (Sun 2024, arXiv:2405.05254).",
    "MQA": "Multi-query attention: all query heads of a layer share one key head.",
}

COLOURS = {"toy": "ink", "cla2": "key", "mqa": "query", "cla2-mqa": "value", "yoco": "recent"}
STRIP = Footprint(
    name="strip", title="What one more token costs", origin="toy",
    holdings=(Holding("The cache", of(BYTES, design="now"), "keys and values, layer by layer"),),
)
SCENES = (
    Scene(
        "stack",
        (
            STRIP,
            Stack(
                name="stack", title="A token on its way up", span=12, codes=of(KIND), kinds=KINDS,
                colours=("key", "query", "kept"), reads=of(READS), values=of(BYTES, design="now"),
                values_label="bytes a token", lit=of(LIT), lit_label="has come so far",
            ),
        ),
    ),
    Scene(
        "alike",
        (
            footprint(*DESIGNS, name="alike", title="Trained alike: what a token costs, and how well they read"),
            Curves(
                name="growth", title="The whole cache as the text grows", note="bytes", span=6, across="length",
                origin="formula", x_label="tokens", y_label="bytes", format=".2s",
                lines=tuple(
                    Line(label, of(GROWTH, design=name), colour=COLOURS[name], x=of(LENGTH))
                    for name, label, _ in DESIGNS
                ),
            ),
            front(*(label for _, label, _ in DESIGNS), span=6),
            calculator(),
        ),
    ),
    Scene(
        "contrast",
        (
            Footprint(
                name="contrast", title="The same cache: trained for it, or cut", origin="converted",
                holdings=tuple(
                    Holding(
                        label, of(BYTES, design=f"contrast {name}"), detail, figure_label="perplexity",
                        figure=of(PERPLEXITY, design=f"contrast {name}"), colour="alarm" if name == "cut" else "key",
                    )
                    for name, label, detail in CONTRAST
                ),
            ),
            Numbers(
                name="answers", title="Questions answered right", origin="converted",
                numbers=tuple(
                    Number(f"{label}, {detail}", of(RECALL, design=f"contrast {name}"), format=".0%",
                           colour="alarm" if name == "cut" else "key")
                    for name, label, detail in CONTRAST
                ),
            ),
        ),
    ),
    Scene(
        "prefill",
        (
            Heatmaps(
                name="rows", title="Reading a prompt, the first layer on top", tensor=of(DONE), rows="layer",
                columns="token", facet="way", note="way 0: in full, 1: leaving early", colours="recent", span=12,
                gaps=True, cell=done_cell, origin="toy",
            ),
            Numbers(
                name="work", title="What it takes", origin="toy",
                numbers=tuple(
                    Number(f"{label}: {what}", of(track, way=way), format=form, unit=unit, colour=colour)
                    for way, label, colour in (("full", "in full", "ink"), ("early", "leaving early", "recent"))
                    for what, track, form, unit in (("multiplications", WORK, ".3s", ""), ("time", MS, ".1f", "ms"))
                ),
            ),
        ),
    ),
)


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"layers.*": {}, "sharing.*": {}}


LESSON = Lesson(
    slug="layers-share", title="The cache above and below", question="If heads can share, can layers?",
    part="Share the cache", order=4,
    sources=("episodes", "post", "Brandon 2024, arXiv:2405.12981", "Sun 2024, arXiv:2405.05254"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.mixers.cross_layer:Owner", "engine.mixers.cross_layer:_ask", "engine.mixers.early_exit:early_exit"),
    facts=facts, marks=marks, glossary=GLOSSARY, step_word="step", seconds=120,
    footnote="* As the papers report. Measured: toys of half a million weights and four layers.",
)
# fmt: on
