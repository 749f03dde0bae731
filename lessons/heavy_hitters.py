"""Keep what was looked at: if every head may keep only so many tokens, which ones should go?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine.caches.compare import compare
from engine.evaluate import Question, passkey
from engine.recording import Recording, newest, note, tap
from engine.toyland import Grammar
from engine.toyland.questions import passkey_question
from lessons.eviction import (
    ALIKE,
    BUDGETS,
    CODES,
    EVICTED,
    HELD,
    KEY_HELD,
    LABELS,
    MEAN_KL,
    SCORED,
    SHORT,
    SLOTS_USED,
    STATES,
    SWEEP,
    SWEPT,
    WORTH,
    budgets_of,
    caches,
    heavy_place,
    recent_of,
    show,
    show_sweep,
    survival,
    swept,
)  # fmt: skip
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, load, read_aloud
from lessons.texts import NAMES, text_ids
from lessons.views import (
    Arithmetic,
    Bars,
    Curves,
    Heatmaps,
    Line,
    Plane,
    Points,
    Slots,
    Strip,
    Tokens,
    knob,
    of,
)  # fmt: skip

COLOURS = {
    "full": "ink", "window": "alarm", "sinks": "sink", "h2o": "heavy", "normalised": "recomputed", "norm": "kept",
}  # fmt: skip
BOUNDED = tuple(LABELS)[1:]
KEY = "key"
PROMPTS = {"A pass key, hidden": KEY, **NAMES}


class Turn(Knobs):
    model = choice()
    budget = param.Integer(32, bounds=(12, 64), label="Budget", doc="Slots of each head.")
    recent = param.Number(0.5, bounds=(0.2, 0.9), step=0.1, label="Recent share", doc="Kept for the last tokens.")
    text: param.Selector = param.Selector(default=KEY, objects=dict(PROMPTS), label="Prompt", doc="What is read.")
    own = param.String("Once upon a time", label="Your own text", doc="Read when Prompt is “Your own”.")
    tokens = param.Integer(104, bounds=(96, 144), label="Prompt tokens", doc="About how many are read.")
    depth = param.Number(0.0, bounds=(0.0, 1.0), step=0.25, label="Where the key is told", doc="0: at the start.")
    steps = param.Integer(16, bounds=(6, 24), label="New tokens", doc="How many are written then.")
    policy: param.Selector = param.Selector(
        default="h2o", objects={LABELS[name]: name for name in BOUNDED}, label="Look at", doc="Whose memory is drawn."
    )
    layer = param.Integer(12, bounds=(0, 29), label="Layer", doc="Which layer you look into.")
    head = param.Integer(0, bounds=(0, 7), label="Key head", doc="Which of its key and value heads.")


def prompt_of(knobs: Turn, tokenizer: Any) -> tuple[list[int], Question | None]:
    """The prompt's ids, and the question that it asks."""
    toy = knobs.model == TOY
    if knobs.text != KEY:
        return text_ids(tokenizer, knobs.text, knobs.own, toy=toy, tokens=knobs.tokens), None
    if toy:
        lines = max(2, (knobs.tokens - 16) // 6)
        before = round(lines * knobs.depth)
        question = passkey_question(Grammar(), before=before, after=lines - before, seed=1)
    else:
        question = passkey(tokenizer, tokens=knobs.tokens, depth=knobs.depth, seed=1)
    return tokenizer.prompt(question.prompt), question


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model, fast=True)
    ids, question = prompt_of(knobs, tokenizer)
    budget, T = knobs.budget, len(ids) + knobs.steps - 1
    if len(ids) < budget + 8:
        raise ValueError(f"The prompt has {len(ids)} tokens; a budget of {budget} needs {budget + 8} at least.")
    policies, recent = caches(budget, knobs.recent), recent_of(budget, knobs.recent)
    shape = model.shape
    fact = question.fact if question else None
    note(budget=budget, recent=recent, prompt_tokens=len(ids), tokens=T, total_steps=T)
    note(layers=shape.layers, kv_heads=shape.kv_heads, words=[p.strip() for p in tokenizer.pieces(ids)])
    note(fact=[fact.start, fact.stop] if fact else [], answer=question.answer.strip() if question else "")
    sums, coming, alike = dict.fromkeys(policies, 0.0), ids[0], dict.fromkeys(policies, 0)
    budgets, others = budgets_of(budget, len(ids)), dict[str, float]()

    def on_token(t: int) -> None:
        nonlocal coming
        read_aloud(tokenizer.pieces([coming]))
        said = newest("compare.own", strategy="full")
        coming = int(said) if said is not None else ids[0]
        slots, key_held, new = [], [], t - len(ids) + 1
        for name, cache in policies.items():
            held = show(name, cache, t, shape, recent)
            kl = newest("compare.kl", strategy=name)
            if t >= budget and kl is not None:
                sums[name] += float(kl)
                tap(MEAN_KL, sums[name] / (t - budget + 1), "", strategy=name)
            says = newest("compare.token", strategy=name)
            if new >= 0 and alike[name] == new and says is not None:
                alike[name] += int(says == newest("compare.token", strategy="full"))
            slots.append(cache.kept(0).shape[-1])
            told = held[:, fact.start : fact.stop] if fact and t >= fact.stop else np.zeros(1)
            key_held.append(told.mean() / shape.kv_heads)
        tap(SLOTS_USED, np.array(slots, np.int32), "policy")
        tap(KEY_HELD, np.array(key_held, np.float32), "policy")
        tap(ALIKE, np.array([*alike.values()], np.int32), "policy")
        show_sweep(t, budgets, others)

    rows = policies | swept(budgets, knobs.recent)
    courses = compare(model, ids, rows, steps=knobs.steps, on_token=on_token)
    courses = {name: courses[name] for name in policies}
    texts = {name: tokenizer.decode(course.text) for name, course in courses.items()}
    note(said=texts, parts={name: -1 if course.parts is None else course.parts for name, course in courses.items()})


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    T, asked, budget = meta["tokens"], meta["prompt_tokens"] - 1, meta["budget"]
    kl = {name: float(recording.stack("compare.kl", strategy=name)[budget:T].mean()) for name in BOUNDED}
    key = recording.track(KEY_HELD).latest(asked)
    words = candidates(meta)
    shares = [survival(recording, "h2o", at, asked) for at in words]
    told = meta["answer"]
    found = {name: bool(told) and text.strip().startswith(told) for name, text in meta["said"].items()}
    named = [meta["words"][at] or "⏎" for at in words]
    later = {name: heavy_place(recording, name, asked) for name in SCORED}
    return {
        "budget": budget, "recent": meta["recent"], "heavy": budget - meta["recent"], "tokens": T,
        "share": budget / meta["prompt_tokens"], "name": meta["model"]["name"],
        **{f"kl_{name}": value for name, value in kl.items()},
        "parts_h2o": "never" if meta["parts"]["h2o"] < 0 else f"at new word {meta['parts']['h2o'] + 1}",
        **{f"said_{name}": short(text) for name, text in meta["said"].items()},
        **{f"right_{name}": ok for name, ok in found.items()},
        **{f"held_{name}": float(key[i]) for i, name in enumerate(LABELS)},
        **{f"word_{i}": word for i, word in enumerate(named)}, **{f"share_{i}": s for i, s in enumerate(shares)},
        "survivor": int(np.argmax(shares)), "survivor_word": named[int(np.argmax(shares))],
        "survivor_share": max(shares), "answer": told or "no key (this prompt hides none)",
        "place_raw": later["h2o"], "place_mean": later["normalised"],
        "full_at": budget - 1, "asked": asked, "written": T - 1, "last": recording.steps - 1,
    }  # fmt: skip


def short(text: str) -> str:
    """The first sentence of a text, on one line."""
    line = " ".join(text.split()).split(". ")[0]
    return line if len(line) <= 24 else line[:23] + "…"


def candidates(meta: Mapping[str, Any]) -> list[int]:
    """Four words to choose from: the first, one of the pass key, a full stop after it, and a word of the filler."""
    words, n = meta["words"], meta["prompt_tokens"]
    if not meta["fact"]:
        return [0, n // 5, n // 3, n // 2]
    start, stop = meta["fact"]
    digit = next((i for i in range(start, stop) if words[i] and words[i] in meta["answer"]), start)
    dot = next((i for i in range(stop, n) if words[i] == "."), n // 3)
    return [0, digit, dot, min(n - 1, dot + 3)]


def marks(recording: Recording) -> list[Mark]:
    meta = recording.meta
    return [Mark(meta["budget"], "the first token has to go"), Mark(meta["prompt_tokens"] - 1, "the prompt is read")]


def _evict(recording: Recording) -> Finding:
    f = facts(recording)
    most = recording.stack(SLOTS_USED)[: f["tokens"], 3].max()
    better = f["kl_h2o"] < f["kl_window"] and most <= f["budget"]
    filled = f"k = {f['heavy']} heavy + {f['recent']} recent; at most {most} held; window {f['kl_window']:.2f} nats"
    why = "" if better else "On this text the last tokens alone do as well."
    return Finding(f"{f['kl_h2o']:.2f} nats", "agrees" if better else "differs", why, filled)


def _fifth(recording: Recording) -> Finding:
    f = facts(recording)
    same = f["parts_h2o"] == "never"
    why = "" if same else "At this size, on this text, it parts from what the full cache says."
    filled = (
        f"{f['budget']} of {recording.meta['prompt_tokens']} tokens = {f['share']:.0%}; texts part: {f['parts_h2o']}"
    )
    if f["share"] > 0.22:
        return Finding(f"{f['kl_h2o']:.2f} nats", "untestable", "This run keeps more: turn the budget down.", filled)
    return Finding(f"{f['kl_h2o']:.2f} nats", "agrees" if same else "differs", why, filled)


def _budget(recording: Recording) -> Finding:
    budgets = recording.stack(BUDGETS)[-1]
    curve = recording.stack(SWEEP, strategy="h2o")[-1]
    falls = bool((np.diff(curve) <= 1e-6).all())
    filled = ", ".join(f"{b:.0f} slots {kl:.2f}" for b, kl in zip(budgets, curve, strict=True))
    why = "" if falls else "On one short text, chance can make a smaller budget do better."
    return Finding(f"{curve[0]:.2f} → {curve[-1]:.2f}", "agrees" if falls else "differs", why, f"H2O: {filled}")


def _retrieval(recording: Recording) -> Finding:
    f = facts(recording)
    if not recording.meta["answer"]:
        return Finding("–", "untestable", "This prompt hides no pass key: choose the one that does.")
    right = [LABELS[name] for name in LABELS if f[f"right_{name}"]]
    filled = "; ".join(f"{LABELS[n]} “{short(recording.meta['said'][n])[:12]}”" for n in LABELS)
    if not f["right_full"]:
        return Finding("nobody", "untestable", "Even the full cache does not find it.", filled)
    split = f["right_h2o"] and not f["right_window"]
    why = "" if split else "Whether heads look back at the key while reading on is up to the model."
    return Finding(f"right: {', '.join(right)}", "agrees" if split else "differs", why, filled)


def _norm(recording: Recording) -> Finding:
    f = facts(recording)
    close = f["kl_norm"] < 1.5 * f["kl_h2o"]
    place = "better" if f["kl_norm"] < f["kl_window"] else "no better"
    why = "" if close else f"Watching nothing, it does {place} than a window, and worse than attention does."
    return Finding(
        f"{f['kl_norm']:.2f} vs {f['kl_h2o']:.2f}", "agrees" if close else "differs", why,
        f"KL of short keys vs H2O, {f['share']:.0%} kept; window {f['kl_window']:.2f}",
    )  # fmt: skip


def _early(recording: Recording) -> Finding:
    f = facts(recording)
    early = f["place_raw"] < f["place_mean"]
    filled = f"mean place of heavy tokens: sums {f['place_raw']:.2f}, means {f['place_mean']:.2f}"
    why = "" if early else "Here few late tokens gather more than the early ones did."
    return Finding(f"{f['place_raw']:.2f} vs {f['place_mean']:.2f}", "agrees" if early else "differs", why, filled)


H2O = "lecture; Zhang 2023, 2306.14048"
# fmt: off
CLAIMS = (
    Claim(
        "Evict all but the k with the highest cumulative attention", H2O, "KL(full‖H2O) < KL(full‖window)", "method",
        _evict,
    ),
    Claim("A fifth of the cache is enough", "Zhang 2023, 2306.14048", "texts part", "20% *", _fifth),
    Claim("More budget, more quality", "Zhang 2023, 2306.14048", "mean KL, budget by budget", "curves", _budget),
    Claim("A pass key tells who can still find things", "post", "answers, policy by policy", "metric", _retrieval),
    Claim(
        "Keys of small norm are the ones looked at: no need to watch", "Devoto 2024, 2406.11430",
        "KL(full‖short keys) vs KL(full‖H2O)", "half the cache, no loss *", _norm,
    ),
    Claim(
        "Raw sums favour early tokens", "NVIDIA’s kvpress divides by the queries", "place: sums < means", "trap",
        _early,
    ),
)
# fmt: on


def survivor_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """What became of one token in every head of one layer, and why."""
    layer, token, name = at["layer"], at["token"], knobs.policy
    own = layer if recording.has(CODES, strategy=name, layer=layer) else 0  # alike in all layers where none chooses
    rows = [
        (when, row) for when, row in recording.track(CODES, strategy=name, layer=own).rows() if row.shape[1] > token
    ]
    worth = recording.track(WORTH, strategy=name, layer=layer) if name in SCORED else None
    lines: list[tuple[str, str]] = []
    vectors = []
    for head in range(len(rows[0][1])):
        gone = next((when for when, row in rows if row[head, token] == EVICTED), None)
        state = STATES[rows[-1][1][head, token]]
        lines.append((f"head {head}", f"held, {state}" if gone is None else f"evicted when word {gone} came"))
        scores = [float(row[head, token]) for _, row in worth.rows() if row.shape[1] > token] if worth else []
        known = scores[: gone - token] if gone is not None else scores
        if known:
            unit = "a query, on average" if name == "normalised" else "in all"
            lines.append((f"attention from {len(known)} queries", f"{known[-1]:.3f} {unit}"))
            vectors.append((f"head {head}", tuple(known)))
    words = recording.meta["words"]
    word = f"“{words[token]}”, word {token}" if token < len(words) else f"word {token}"
    return Arithmetic(
        title=f"{word}, in layer {layer}",
        lines=tuple(lines),
        note="The head lets go of the token worth least to it, among those that are neither pinned nor recent.",
        vectors=tuple(vectors),
        values={"token": float(token)},
    )


# fmt: off
BEATS = (
    Beat(
        "Six copies of {name} read one text. ==The first|strips== keeps every key and value. The others have {budget} "
        "slots in each head, and now they are full: from here on, one token must go with every word. A window drops "
        "the oldest. Is that the right one?", scene="keep", step="full_at", play=True, focus="strips",
    ),
    Beat(
        "[[H2O]] watches what is looked at. Each token’s share of every query’s attention is added up; the {recent} "
        "newest stay (teal), and of the others the {heavy} with ==the highest sums|strips==: the "
        "[[heavy hitters]], magenta. Each head chooses for itself: turn **Key head**.",
        scene="keep", step="asked", play=True, focus="strips", do=Do("Look into another head", knob="head"),
    ),
    Beat(
        "The text has been read, and most of it is gone from every bounded memory. Look at four of its words, in the "
        "order of the text: “{word_0}”, the first; “{word_1}”; “{word_2}”; “{word_3}”.", scene="keep", step="asked",
        predict=Predict(
            "Which do most of H2O’s heads still hold: 0 “{word_0}”, 1 “{word_1}”, 2 “{word_2}” or 3 “{word_3}”?",
            (0, 1, 2, 3), "survivor", format=".0f",
        ),
    ),
    Beat(
        "“{survivor_word}”: {survivor_share:.0%} of all heads hold it. ==The map|map== shows every layer: dark columns "
        "are words that many heads kept. ==The peaks|sums== are what one head gathered. Click a dark cell.",
        scene="why", step="asked", focus="map", do=Do("Open a cell of the map", cell="map"),
    ),
    Beat(
        "A trap: an early token was seen by more queries, so its sum has had longer to grow. Divide by the number of "
        "queries, and ==late tokens get a chance|means==: heavy tokens now lie at {place_mean:.2f} of the text instead "
        "of {place_raw:.2f}.", scene="why", step="asked", focus="means",
    ),
    Beat(
        "Does it help? [[KL]] says how far a memory’s next word is from the full one’s. Window: {kl_window:.2f}, "
        "sinks {kl_sinks:.2f}, H2O {kl_h2o:.2f}, its mean {kl_normalised:.2f}. ==Short keys|curves==, {kl_norm:.2f}, "
        "watch nothing. H2O’s text ==parts from the full one’s|alike== {parts_h2o}.",
        scene="quality", step="written", play=True, focus="curves",
    ),
    Beat(
        "Told {answer}, then asked for it. Everything kept: “{said_full}”. H2O: “{said_h2o}”. Sinks: “{said_sinks}”. "
        "==Of the key’s words|key==, H2O’s heads still hold {held_h2o:.0%}, sinks {held_sinks:.0%}. "
        "What is gone cannot come back.", scene="quality", step="written", focus="key",
    ),
    Beat(
        "More slots, ==smaller error|budgets==: how fast depends on what is kept. Break it: find a prompt, a budget or "
        "a place for the key where H2O loses to the sinks. Nothing was asked yet when the tokens were chosen: that is "
        "its weak side.",
        scene="budget", step="last", play=True, do=Do("Turn the budget down", knob="budget"),
    ),
)

GLOSSARY = {
    "H2O": "Heavy-Hitter Oracle: keeps recent tokens and those that gathered the most attention so far.",
    "heavy hitters": "The few tokens that get most of the attention: a head can often do with them alone.",
    "KL": "Kullback-Leibler divergence: how far one distribution is from another; 0 means the same.",
}

HERE = {"layer": knob("layer"), "head": knob("head")}
DETAILS = {"full": "{slots} slots, and growing"}
STRIPS = tuple(
    Strip(
        label, of(CODES, strategy=name, **HERE), detail=DETAILS.get(name, "{kept} slots, {evicted} tokens gone"),
        number=of(MEAN_KL, strategy=name), number_label="nats from full", number_format=".2f", colour=COLOURS[name],
    )
    for name, label in LABELS.items()
)
LINES = tuple(Line(LABELS[name], of(MEAN_KL, strategy=name), colour=COLOURS[name]) for name in BOUNDED)
SCENES = (
    Scene(
        "keep",
        (
            Slots(
                name="strips", title="What one head keeps, policy by policy", note="same budget, same text",
                states=STATES, strips=STRIPS,
            ),
            Tokens(
                name="text", title="The text, as this head remembers it", states=STATES,
                codes=of(CODES, strategy=knob("policy"), **HERE),
            ),
        ),
    ),
    Scene(
        "why",
        (
            Heatmaps(
                name="map", title="Who still holds which word", note="heads of each layer, by “Look at”",
                tensor=of(HELD, strategy=knob("policy")), rows="layer", columns="token", colours="heavy",
                column_labels="tokens", cell=survivor_cell,
            ),
            Curves(
                name="sums", title="Attention gathered, added up", span=6, across="token", low=0, format=".2f",
                lines=(Line("sum", of(WORTH, strategy="h2o", **HERE), colour="heavy"),), x_label="token",
            ),
            Curves(
                name="means", title="The same, a query on average", span=6, across="token", low=0, format=".3f",
                lines=(Line("mean", of(WORTH, strategy="normalised", **HERE), colour="recomputed"),), x_label="token",
            ),
        ),
    ),
    Scene(
        "quality",
        (
            Curves(
                name="curves", title="How far from the full cache", note="mean KL since tokens had to go", lines=LINES,
                x_label="token", y_label="nats", low=0, format=".2f",
            ),
            Bars(name="slots", title="Slots", span=4, values=of(SLOTS_USED), labels=SHORT, format=",.0f", high=None),
            Bars(name="key", title="Of the pass key, held", span=4, values=of(KEY_HELD), labels=SHORT, colour="heavy"),
            Bars(
                name="alike", title="New words until texts part", span=4, values=of(ALIKE), labels=SHORT,
                format=",.0f", high=None, colour="value",
            ),
        ),
    ),
    Scene(
        "budget",
        (
            Plane(
                name="budgets", title="Quality against budget", note="the same prompt, read with other budgets too",
                points=tuple(
                    Points(LABELS[name], of(BUDGETS), of(SWEEP, strategy=name), colour=COLOURS[name], joined=True)
                    for name in SWEPT
                ),
                x_label="slots of each head", y_label="mean KL to the full cache (nats)",
            ),
        ),
    ),
)


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"hitters.*": {}, "compare.kl": {}, "compare.token": {}, "compare.own": {"strategy": "full"}}


LESSON = Lesson(
    slug="heavy-hitters", title="Keep what was looked at", question="If you may keep only k tokens, which?",
    part="Keep the right things", order=13,
    sources=("lecture", "post", "Zhang 2023, arXiv:2306.14048", "Devoto 2024, arXiv:2406.11430"), knobs=Turn, run=run,
    keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.caches.heavy_hitters:HeavyHitters", "engine.caches.selected:Selected", "engine.caches.norm:LowNorm"),
    looks=frozenset({"policy", "layer", "head"}), bounded_by={"layer": "layers", "head": "kv_heads"}, facts=facts,
    marks=marks, glossary=GLOSSARY, step_word="token", seconds=600,
    footnote="* OPT and LLaMA of 6.7B to 66B (Zhang), Llama-2-7B (Devoto), as reported. Measured: this page.",
)
# fmt: on
