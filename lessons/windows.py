"""Look near, look far: which cells of the attention matrix may be left out, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine import checkpoints
from engine.generate import checked_ids
from engine.mixers.hybrid import remixed
from engine.mixers.softmax import PATTERN
from engine.mixers.windows import attended_cells, receptive_field
from engine.recording import Recording, event, note, record, site, step, tap
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene, Verdict
from lessons.models import REAL, TOY, choice, load, read_aloud
from lessons.patterns import (
    BENEATH,
    CALCULATOR,
    DILATED,
    EVERY_CELL,
    EVICTED,
    FIELD,
    FORMULA,
    GLOBAL,
    INTERLEAVED,
    OPEN,
    PATTERNS,
    REACHED,
    STATES,
    WINDOW,
    field_cell,
    fields_of,
    held_of,
    mask_of,
    matrix_cell,
    mixer,
    sizes,
)  # fmt: skip
from lessons.recall import Standing, code, standings
from lessons.views import (
    Curves,
    Heatmaps,
    Line,
    Number,
    Numbers,
    Plane,
    Points,
    Slots,
    Stack,
    Strip,
    Tokens,
    knob,
    of,
)  # fmt: skip

TRAINED = {"window": "window", "interleaved": "interleaved"}  # models of the zoo that grew up with their windows
TRAINED_WINDOW = 32  # theirs
QUESTIONS = {TOY: 8, REAL: 2}

LOST = site("windows.lost", "the share of this token's attention that falls on cells left out", low=0.0, high=1.0)
CELLS = site("windows.cells", "cells of one head of the first layer computed so far")
WORK = site("windows.work", "multiplications of queries with keys and of shares with values so far, in all layers")
HELD = site("windows.held", "what the first layer's cache holds: global and recent tokens, and those let go")
BYTES = site("windows.bytes", "keys and values held in all layers", unit="B")
LAYERS = site("windows.layers", "which layers look through a window (0) and which attend fully (1)")
LAYER_REACH = site("windows.layer_reach", "tokens that matter on entering each layer")
RIGHT = site("windows.right", "share of the pass keys found so far, pattern by pattern", low=0.0, high=1.0)
CACHE = site("windows.cache", "bytes of the cache after the question, from its tensors", unit="B")


class Turn(Knobs):
    model = choice(default=TOY)
    pattern: param.Selector = param.Selector(
        default=WINDOW, objects=dict(PATTERNS), label="Pattern", doc="Which cells stay open."
    )
    window = param.Integer(32, bounds=(2, 64), label="Window", doc="Tokens a query may look at, itself among them.")
    dilation = param.Integer(2, bounds=(1, 4), label="Dilation", doc="Dilated: every how many tokens it looks.")
    pinned = param.Integer(4, bounds=(0, 16), label="Global tokens", doc="Local + global: first tokens all may see.")
    every = param.Integer(2, bounds=(1, 6), label="Full layer every", doc="Windows with full layers: one of how many.")
    top = param.Integer(3, bounds=(0, 29), label="Seen from layer", doc="How far back its output still depends.")
    tokens = param.Integer(150, bounds=(80, 200), label="Text length", doc="Tokens; the code is told at the start.")
    layer = param.Integer(1, bounds=(0, 29), label="Layer", doc="Whose attention lies beneath the mask.")
    head = param.Integer(2, bounds=(0, 8), label="Head", doc="Which of its heads.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model)
    toy, shape = knobs.model == TOY, model.shape
    question = code(tokenizer, toy=toy, tokens=knobs.tokens, seed=0)
    prompt = tokenizer.prompt(question.prompt)
    text = prompt + tokenizer.encode(question.answer)
    T, top = len(text), min(knobs.top, shape.layers - 1)
    pieces, ids = tokenizer.pieces(text), checked_ids(text, shape.vocab)[None].to(model.embed.weight.device)
    fact = question.fact or range(1)
    note(
        tokens=T, total_steps=T, top=top, pattern=knobs.pattern, window=knobs.window, dilation=knobs.dilation,
        pinned=knobs.pinned, every=knobs.every, told=fact.start, asked=len(prompt) - 1,
        questions=QUESTIONS[knobs.model],
        fact=[fact.start, fact.stop], answer=question.answer.strip(),
    )  # fmt: skip
    with record(keep={PATTERN: {}}, budget=200_000_000) as inner:
        model.hidden(ids)
    beneath = inner.freeze()
    rows = [beneath.track(PATTERN, layer=i).chunks[0].array[0] for i in range(shape.layers)]  # head query key
    finds = np.array([row[:, len(prompt) - 1, fact.start : fact.stop].sum(-1) for row in rows])
    note(finder=[int(i) for i in np.unravel_index(finds.argmax(), finds.shape)])
    masks = [mask_of(sizes(knobs.pattern, knobs, i), T) for i in range(shape.layers)]
    asked = _asked(model, tokenizer, knobs, toy)
    fields = None
    work = np.zeros(2)
    cells = np.zeros(2, np.int64)
    per_slot = 2 * shape.kv_heads * shape.head_width * next(model.parameters()).element_size()
    kinds = np.array([sizes(knobs.pattern, knobs, i) is None for i in range(top + 1)], np.int32)
    both: Any = (model, remixed(model, mixer(knobs.pattern, knobs, shape)))
    counters = [[block.mixer.multiplications for block in one.blocks] for one in both]
    for t in range(T):
        read_aloud(pieces[t : t + 1])
        for i in range(shape.layers):
            row = rows[i][:, t : t + 1, : t + 1]
            tap(BENEATH, row, "head query key", layer=i)
            tap(OPEN, masks[i][t : t + 1, : t + 1], "query key", layer=i)
            tap(LOST, (row[:, 0] * (1 - masks[i][t, : t + 1])).sum(-1).astype(np.float32), "head", layer=i)
        cells += [t + 1, int(masks[0][t].sum())]
        for n, name in enumerate(("full", "pattern")):
            work[n] += sum(sum(count(rows=1, keys=t + 1).values()) for count in counters[n])
            tap(CELLS, int(cells[n]), "", of=name)
            tap(WORK, float(work[n]), "", of=name)
        for name in PATTERNS.values():
            held = [held_of(sizes(name, knobs, i), t + 1) for i in range(shape.layers)]
            tap(HELD, held[0], "slot", pattern=name)
            tap(BYTES, per_slot * sum(int((codes != EVICTED).sum()) for codes in held), "", pattern=name)
        if t:
            fields = fields or fields_of(model, knobs, ids, top)
            if t <= top + 2:
                _light(fields, t - 1, top, kinds)
            if t >= T - QUESTIONS[knobs.model]:  # at the end of the text, where the code is asked for
                next(asked, None)
        else:
            tap(LAYERS, kinds, "layer")
            tap(LAYER_REACH, np.zeros(top + 1, np.float32), "layer")
        if t == fact.start:
            event("windows.told", token=pieces[t])
        step()


def _light(fields: tuple[np.ndarray, list[int], list[int]], depth: int, top: int, kinds: np.ndarray) -> None:
    rows, measured, formula = fields
    tap(FIELD, rows[depth : depth + 1], "depth token")
    tap(REACHED, measured[depth], "")
    tap(FORMULA, formula[depth], "")
    tap(LAYERS, kinds, "layer")
    known = [measured[top + 1 - i] if top + 1 - i <= depth else 0 for i in range(top + 1)]
    tap(LAYER_REACH, np.array(known, np.float32), "layer")


def _asked(model: Any, tokenizer: Any, knobs: Turn, toy: bool) -> Any:
    """Ask every pattern for one pass key after the other; a question a turn."""
    models = {name: remixed(model, mixer(name, knobs, model.shape)) for name in PATTERNS.values()}
    for name in TRAINED if toy else ():
        if checkpoints.available(name)[0]:
            models[f"trained {name}"] = checkpoints.load(name)[0]
    asked = (code(tokenizer, toy=toy, tokens=knobs.tokens, seed=n) for n in range(QUESTIONS[knobs.model]))
    missing = Standing(0.0, 0, "")  # a logarithmic axis leaves out what is not there
    for now in standings(models, tokenizer, asked):
        for name in PATTERNS.values():
            tap(RIGHT, now[name].right, "", pattern=name)
            tap(CACHE, now[name].held, "", pattern=name)
        grown = [now.get(f"trained {name}", missing) for name in TRAINED]
        tap(RIGHT, np.array([g.right for g in grown], np.float32), "model", pattern="trained")
        tap(CACHE, np.array([g.held for g in grown], np.float32), "model", pattern="trained")
        yield


def facts(recording: Recording) -> dict[str, Any]:
    meta, T = recording.meta, recording.meta["tokens"]
    layer, head = meta["finder"]
    reached = recording.stack(REACHED)
    right = {name: float(recording.stack(RIGHT, pattern=name)[-1]) for name in PATTERNS.values()}
    held = {name: float(recording.stack(CACHE, pattern=name)[-1]) for name in PATTERNS.values()}
    trained = dict(zip(TRAINED, recording.stack(RIGHT, pattern="trained")[-1].tolist(), strict=True))
    there = dict(zip(TRAINED, (recording.stack(CACHE, pattern="trained")[-1] > 0).tolist(), strict=True))
    return {
        **{k: meta[k] for k in ("window", "dilation", "pinned", "every", "tokens", "told", "asked", "answer")},
        "name": meta["model"]["name"],
        "layers": len(reached) - 1,
        "depth": len(reached),
        "back": meta["asked"] + 1 - meta["told"],
        "first": min(meta["window"] + 8, T - 1),
        "last": T - 1,
        "finder": head,
        "finder_layer": layer,
        "lost": float(recording.stack(LOST, layer=layer)[meta["asked"], head]),
        "reach": int(reached[-1]),
        "rule": receptive_field(len(reached) - 1, window=meta["window"]),
        "times": len(reached) * meta["window"] - meta["window"],
        "cells_full": int(recording.stack(CELLS, of="full")[-1]),
        "cells": int(recording.stack(CELLS, of="pattern")[-1]),
        "saved": float(recording.stack(CELLS, of="full")[-1] / recording.stack(CELLS, of="pattern")[-1]),
        "questions": meta["questions"],
        **{f"right_{name}": value for name, value in right.items()},
        **{f"held_{name}": value for name, value in held.items()},
        "lighter": held[EVERY_CELL] / held[INTERLEAVED],
        "trained": _trained(trained, there),
    }


def _trained(right: Mapping[str, float], there: Mapping[str, bool]) -> str:
    said = [f"{name} {right[name]:.0%}" for name in TRAINED if there[name]]
    return " and ".join(said) or "none is here to ask"


def marks(recording: Recording) -> list[Mark]:
    m = recording.meta
    return [Mark(m["told"], "the code is told"), Mark(m["asked"], "the code is asked for")]


def _billions(recording: Recording) -> Finding:
    n, k = 128_000, 128 * 1024
    filled = f"128,000² = {n * n / 1e9:.1f} billion; 131,072² = {k * k / 1e9:.1f} billion"
    why = f"Causal attention fills half of them: {(n * n + n) / 2e9:.1f} billion."
    return Finding(f"{n * n / 1e9:.1f} billion", "agrees", why, filled)


def _fourfold(recording: Recording) -> Finding:
    n, w = 512, 128
    exact, all_of_it = attended_cells(n, window=w), attended_cells(n, window=n)
    filled = f"{n}² / ({n}·{w}) = {n * n / (n * w):.1f}; causal: {all_of_it:,} / {exact:,} = {all_of_it / exact:.2f}"
    why = "Half of n² is never looked at, and early tokens have no full window: cell by cell it saves less."
    return Finding(f"{n * n / (n * w):.1f}× by n²/(n·w), {all_of_it / exact:.2f}× by cells", "differs", why, filled)


def _context(recording: Recording) -> Finding:
    f = facts(recording)
    L, w, T = f["layers"], f["window"], f["tokens"]
    if recording.meta["pattern"] != WINDOW:
        return Finding(f"{f['reach']}", "untestable", "The formula is for windows in all layers: choose that pattern.")
    depths = recording.stack(REACHED)
    inside = [d for d in range(len(depths)) if receptive_field(d, window=w) <= T]
    same = all(int(depths[d]) == receptive_field(d, window=w) for d in inside)
    d = inside[-1]
    filled = f"L·w = {d}·{w} = {d * w}; L·(w − 1) + 1 = {receptive_field(d, window=w)}"
    why = "Each window counts its own token, which the layer above has counted: it is L·(w − 1) + 1, as gradients show."
    if not same:
        why = "Gradients this small vanish in the numbers' range."
    elif d < L:
        why += f" From layer {d + 1} on the text is too short to tell."
    return Finding(f"{int(depths[d])} tokens through {d} layers", "differs", why, filled)


def _winner(recording: Recording) -> Finding:
    f = facts(recording)
    mixed, full = f["right_interleaved"], f["right_full"]
    said = (f"{name} {f[f'right_{name}']:.0%} with {f[f'held_{name}'] / 1e3:,.0f} kB" for name in PATTERNS.values())
    filled = "; ".join(said)
    measured = f"{mixed:.0%} with {f['held_interleaved'] / f['held_full']:.0%} of the cache"
    others = max(f[f"right_{name}"] for name in (WINDOW, DILATED, GLOBAL))
    if not full:
        return Finding(measured, "untestable", "Even every cell open does not find these codes.", filled)
    if recording.meta["every"] == 1 or f["held_interleaved"] >= f["held_full"]:
        return Finding(measured, "untestable", "With these knobs interleaving saves no memory.", filled)
    verdict: Verdict = "agrees" if mixed > others or (mixed >= 0.9 * full and mixed >= others) else "differs"
    why = f"Converted without retraining. Trained with windows of {TRAINED_WINDOW}: {f['trained']}."
    if verdict == "differs":
        why = f"No better than windows alone here ({others:.0%}). " + why
    return Finding(measured, verdict, why, filled)


# fmt: off
CLAIMS = (
    Claim("128K tokens make a matrix of 16 billion entries", "architectures", "n²", "16 billion", _billions, "entries"),
    Claim("512 tokens, windows of 128: four times fewer", "architectures", "n² / (n·w)", "4.0×", _fourfold),
    Claim("Layers of windows have an effective context of L·w", "architectures", "L·w", "L·w", _context),
    Claim(
        "Interleaving full and window layers wins in practice", "architectures; Gemma 2, 2408.00118",
        "pass keys found; bytes of the cache", "the practical winner", _winner,
    ),
)

BEATS = (
    Beat(
        "Each row is a token, looking back: ==the darker a cell|matrix==, the more attention it pays. Full attention "
        "fills the whole triangle. A [[window]] of {window} keeps a band along the diagonal, the token itself among "
        "them, and ==greys|matrix== all the rest.", scene="mask", step="first", play=True, focus="matrix",
    ),
    Beat(
        "Early on a code is told: “{answer}”. At the end somebody asks for it, and head {finder} of layer "
        "{finder_layer} looks {back} tokens back, ==deep into the grey|matrix==: {lost:.0%} of its attention falls on "
        "cells left out. The mask has opened {saved:.1f} times fewer cells: {cells:,} of {cells_full:,}.",
        scene="mask", step="last", play=True, focus="matrix", knobs={"layer": 1, "head": 2},
    ),
    Beat(
        "Click a cell, grey or not. The mask sets a score to −∞ before the [[softmax]], so what is left is shared out "
        "anew. The cell shows both shares.", scene="mask", step="last", focus="matrix",
        do=Do("Open a cell’s arithmetic", cell="matrix"),
    ),
    Beat(
        "But layers stand on each other. A token sees {window} back; those have seen {window} further back, one layer "
        "below. ==The top row|field== is the last token alone.", scene="reach", step=0, focus="field",
        predict=Predict(
            "How many tokens can it see through all layers of this picture?", (32, 63, 125, 150), "reach", format=".0f"
        ),
    ),
    Beat(
        "Layer by layer ==the field|field== widens by {window} − 1. Gradients say which tokens still matter: {reach} "
        "in the end, where the rule ==L(w − 1) + 1|reached== gives {rule}. The often quoted L·w = {times} counts each "
        "token twice where windows meet.", scene="reach", step="depth", play=True, focus="field",
    ),
    Beat(
        "Can it *find* the code, though? Every pattern is asked {questions} times. ==Further left|plane== is less "
        "cache, higher up more codes found. Full layers cost memory, and the code is there: every cell "
        "{right_full:.0%}, windows {right_window:.0%}.", scene="ask", step="last",
        predict=Predict(
            "Windows, with one layer in {every} left full: which share of codes?", (0, 0.3, 0.6, 1.0),
            "right_interleaved", format=".0%",
        ),
    ),
    Beat(
        "{right_interleaved:.0%}, with a cache {lighter:.1f} times smaller than ==the full one|strips==. A layer that "
        "still sees everything can carry the code up, where the weights get along with the rest. These were "
        "==converted|plane==, not trained for it. Trained with windows of 32: {trained}.",
        scene="ask", step="last", focus="plane",
        notes="Mistral 7B v0.1 had windows of 4,096 in all layers, v0.2 and Mixtral 8x7B none.",
    ),
    Beat(
        "Turn the **pattern** to Dilated: as many cells, twice the reach. Then to Local + global. Which finds the "
        "code, and what does each keep in ==its cache|strips==?", scene="ask", step="last",
        do=Do("Choose another pattern", knob="pattern"),
    ),
    Beat(
        "Break it. Widen the window until windows alone find the code: is L(w − 1) + 1 enough? Shorten the text. Or "
        "leave one layer full among four, and see whether it is the right one.", scene="ask", step="last",
    ),
)

GLOSSARY = {
    "window": "The last w tokens that a query may look at, itself among them. What lies further back is left out.",
    "softmax": "Turns scores into shares that add up to one. A score of −∞ gets a share of 0.",
}
# fmt: on


# fmt: off
LAYER = {"layer": knob("layer")}
COLOURS = {EVERY_CELL: "ink", WINDOW: "alarm", DILATED: "recomputed", GLOBAL: "sink", INTERLEAVED: "recent"}
SHORT = dict(zip(PATTERNS.values(), ("every cell", "windows", "dilated", "local + global", "interleaved"), strict=True))
POINTS = tuple(
    Points(SHORT[p], of(CACHE, pattern=p), of(RIGHT, pattern=p), colour=COLOURS[p], names=(SHORT[p],))
    for p in PATTERNS.values()
)
GROWN = Points(
    "trained with windows", of(CACHE, pattern="trained"), of(RIGHT, pattern="trained"), colour="heavy",
    names=("windows, trained", "interleaved, trained"),
)
SCENES = (
    Scene(
        "mask",
        (
            Heatmaps(
                name="matrix", title="Full attention, and what the mask greys out of it", span=8,
                tensor=of(BENEATH, **LAYER, head=knob("head")), veil=of(OPEN, **LAYER), rows="query", columns="key",
                colours="attention", row_labels="tokens", column_labels="tokens", cell=matrix_cell, power=0.7,
            ),
            Numbers(
                name="counters", title="So far", span=4,
                numbers=(
                    Number("Cells opened", of(CELLS, of="pattern"), colour="recent"),
                    Number("Cells of full attention", of(CELLS, of="full")),
                    Number("Multiplications", of(WORK, of="pattern"), format=".3s", colour="recent"),
                    Number("Multiplications, full", of(WORK, of="full"), format=".3s"),
                    Number("Of its attention left out", of(LOST, **LAYER, head=knob("head")), format=".0%",
                           colour="alarm"),
                ),
            ),
            Tokens(
                name="text", title="The text, and what a window still holds", codes=of(HELD, pattern=WINDOW),
                states=STATES,
            ),
        ),
    ),
    Scene(
        "reach",
        (
            Heatmaps(
                name="field", title="What the last token depends on, one layer deeper a row", tensor=of(FIELD),
                rows="depth", columns="token", colours="query", cell=field_cell, power=0.25, origin="converted",
                note="gradients, converted without retraining",
            ),
            Stack(
                name="layers", title="Layer by layer", span=6, codes=of(LAYERS), kinds=("window", "full"),
                colours=("recent", "ink"), values=of(LAYER_REACH), values_label="tokens that matter",
                origin="converted",
            ),
            Curves(
                name="reached", title="How far back, measured and by the formula", span=6,
                lines=(
                    Line("gradients", of(REACHED), colour="query"),
                    Line("L(w − 1)d + 1", of(FORMULA), colour="ink", dashed=True),
                ),
                x_label="layers", y_label="tokens", format=",.0f", low=0, origin="converted",
            ),
        ),
    ),
    Scene(
        "ask",
        (
            Plane(
                name="plane", title="Codes found against memory", span=7,
                note="converted without retraining, unless it says so",
                points=(*POINTS, GROWN),
                x_label="bytes of the cache", y_label="codes found", log_x=True, format=".0%", origin="converted",
            ),
            CALCULATOR,
            Slots(
                name="strips", title="What the first layer’s cache holds", states=STATES, origin="converted",
                strips=tuple(
                    Strip(label, of(HELD, pattern=p), detail="{kept} held, {evicted} gone", number=of(BYTES, pattern=p),
                          number_label="bytes, all layers", number_format=",.0f", colour=COLOURS[p])
                    for label, p in PATTERNS.items()
                ),
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"windows.*": {}}


# fmt: off
LESSON = Lesson(
    slug="windows", title="Look near, look far", question="Which cells of the matrix can you leave out?",
    part="Share the cache", order=6,
    sources=("architectures", "Beltagy 2020, arXiv:2004.05150", "Jiang 2023, arXiv:2310.06825"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=(
        "engine.mixers.windows:WindowAttention", "engine.mixers.windows:banded_attention",
        "engine.mixers.windows:measured_reach",
    ),
    looks=frozenset({"layer", "head"}), bounded_by={"layer": "layers", "head": "heads", "top": "layers"}, facts=facts,
    marks=marks, glossary=GLOSSARY, step_word="step", seconds=240,
    footnote="Windows by release: Mistral 7B v0.1 in all layers, v0.2 and Mixtral in none; Gemma 2 in every second.",
)
# fmt: on
