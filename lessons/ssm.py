"""Memory that chooses: a state of fixed size whose tokens decide what to overwrite (Mamba), RWKV, and hybrids."""

from __future__ import annotations

from typing import Any

import numpy as np
import param

from engine import checkpoints
from engine.generate import checked_ids
from engine.recording import Recording, note, step
from lessons import memories
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene, Verdict
from lessons.memories import (
    AVERAGE,
    BACK,
    DELTA,
    HELD,
    HYBRID,
    KEPT,
    KNOWN,
    LAYER_HELD,
    LAYERS,
    MAMBA,
    MEAN,
    MEMORIES,
    RECEPTANCE,
    RWKV,
    SERIES_FOUND,
    SOFTMAX,
    STATE,
    STRIP,
)  # fmt: skip
from lessons.models import load, read_aloud
from lessons.recall import FOUND, PAIRS, TOLD, one_pair, recall_points
from lessons.views import Curves, Heatmaps, Line, Number, Numbers, Stack, Tokens, knob, of

LOOK = 1  # the layer that is looked at first
ASKED = 16  # questions a point of the recall curves
LABELS = {SOFTMAX: "softmax attention", HYBRID: "hybrid", MAMBA: "Mamba", RWKV: "RWKV"}
INKS = {SOFTMAX: "ink", HYBRID: "recomputed", MAMBA: "recent", RWKV: "alarm"}
MAIN = {SOFTMAX: "toy", HYBRID: "hybrid", MAMBA: "mamba", RWKV: "rwkv"}  # of the zoo, asked for the recall curves
SIZES = {16: ("mamba",), 4: ("recall-mamba4-0",)}  # whose state of so many numbers is looked at


HELPED = "Softmax attention began its training with heads that look back one token; the states had no such help."


class Turn(Knobs):
    pairs = param.Integer(12, bounds=(3, 32), label="Pairs to remember", doc="In the list that is read.")
    state: param.Selector = param.Selector(
        default=16, objects={"16 numbers": 16, "4 numbers": 4}, label="State size",
        doc="Numbers a channel of Mamba. The model with 4 is a smaller one that read lists alone.",
    )  # fmt: skip
    attention = param.Integer(1, bounds=(0, 4), label="Attention layers", doc="In the hybrid, of its four layers.")
    architecture: param.Selector = param.Selector(
        default=HYBRID, objects={"Mamba": MAMBA, "RWKV": RWKV, "Hybrid": HYBRID, "Softmax attention": SOFTMAX},
        label="Architecture", doc="Whose layers are drawn.",
    )  # fmt: skip
    layer = param.Integer(LOOK, bounds=(0, 3), label="Layer", doc="Whose state is drawn.")
    channel = param.Integer(11, bounds=(0, 191), label="Channel", doc="One of them; 0 overwrites most.")
    which = param.Integer(1, bounds=(0, 50), label="Another list", doc="Each number is another list of pairs.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(next((n for n in SIZES[knobs.state] if checkpoints.available(n)[0]), SIZES[knobs.state][0]))
    ids, values, keys = memories.of_list(tokenizer, one_pair(knobs.pairs, seed=knobs.which))
    T, pieces = len(ids), tokenizer.pieces(ids)
    batch = checked_ids(ids, model.shape.vocab)[None].to(model.embed.weight.device)
    trained, weighed = memories.members(knobs.attention)
    asked = memories.listeners(knobs.state)
    note(
        tokens=T, total_steps=T + len(PAIRS), pairs=knobs.pairs, attention=knobs.attention, here=list(asked),
        state=knobs.state, first_value=values[0], key=pieces[-2].strip(), answer=pieces[-1].strip(),
        ends=values[-1] + 1,
    )  # fmt: skip
    mamba = memories.inside_mamba(model, batch)
    rwkv = memories.inside_rwkv(trained[RWKV], batch) if RWKV in trained else {}
    readers = memories.Readers(weighed, asked)
    for t in range(T):
        read_aloud(pieces[t : t + 1])
        memories.show_mamba(mamba, t)
        memories.show_rwkv(rwkv, t)
        readers.read(batch[:, t : t + 1])
        if t in values:
            told = values.index(t) + 1
            readers.ask(memories.questions_so_far(tokenizer, ids, keys[:told]), [ids[at] for at in values[:told]])
        step()
    main = recall_points(MAIN.values(), tokenizer, questions=ASKED)
    small = memories.series_points(tokenizer, questions=ASKED)
    for _ in PAIRS:
        next(main)
        next(small)
        step()


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    held = {name: recording.stack(HELD, of=name) for name in MEMORIES if recording.has(HELD, of=name)}
    mean, pieces = _means(recording), [e.fields["piece"].strip() for e in recording.happened("text.token")]
    listed = slice(meta["first_value"] - 2, meta["ends"])  # from the colon on
    loud = listed.start + int(mean[listed].argmax())
    values = range(meta["first_value"], meta["ends"], 3)
    step_sizes = recording.stack(MEAN, layer=min(LOOK, memories.deepest(recording)))
    kept = recording.stack(KEPT, of=MAMBA, layer=min(LOOK, memories.deepest(recording)))
    states = recording.track(STATE, layer=memories.deepest(recording)).chunks[0].array
    return {
        **{key: meta[key] for key in ("tokens", "pairs", "attention", "state", "asked", "key", "answer", "ends")},
        "channels": states.shape[1],
        "numbers": states[0].size,
        "loud": pieces[loud],
        "at_loud": loud,
        "cleared": float((kept[loud] < 0.5).mean()),
        "usual": float((np.delete(kept[listed], loud - listed.start, 0) < 0.5).mean()),
        "by_value": float(np.mean([step_sizes[t] for t in values])),
        "by_key": float(np.mean([step_sizes[t - 1] for t in values])),
        "half": meta["first_value"] + 3 * (meta["pairs"] // 2),
        "last_value": meta["ends"] - 1,
        "last_token": meta["tokens"] - 1,
        "last": recording.steps - 1,
        "cache_last": float(held[SOFTMAX][-1]),
        "hybrid_held": float(held[HYBRID][-1]),
        "rwkv_held": float(held[RWKV][-1]),
        "known": _known(recording),
        "recalled": _recalled(recording, PAIRS[-1]),
        "recalled_few": _recalled(recording, PAIRS[0]),
        "most_pairs": PAIRS[-1],
        "fewest_pairs": PAIRS[0],
        "series": _series(recording),
        "forgets": _forgets(recording),
        "unlearnt": _unlearnt(recording),
        "missing": _missing(recording),
    }


def _means(recording: Recording) -> np.ndarray:
    """The mean step size of each token, over all layers."""
    return np.mean([recording.stack(MEAN, layer=i) for i in range(memories.deepest(recording) + 1)], 0)


def _here(recording: Recording) -> list[str]:
    return [name for name in MEMORIES if name in recording.meta["here"]]


def _known(recording: Recording) -> str:
    """Who could give back how many pairs right after the list."""
    told = {name: int(recording.stack(KNOWN, of=name)[-1]) for name in _here(recording)}
    return ", ".join(f"{LABELS[name]} {count}" for name, count in told.items())


def _found(recording: Recording, name: str) -> np.ndarray | None:
    return recording.stack(FOUND, model=MAIN[name]) if MAIN[name] in recording.meta["recalled"] else None


def _recalled(recording: Recording, pairs: int) -> str:
    found = {name: _found(recording, name) for name in MEMORIES}
    return ", ".join(f"{LABELS[n]} {v[PAIRS.index(pairs)]:.0%}" for n, v in found.items() if v is not None)


def _series(recording: Recording) -> str:
    """The same of the small models, at the most pairs."""
    there = recording.meta["series"]
    said = [f"{SMALL[kind][0]} {recording.stack(SERIES_FOUND, of=kind)[-1]:.0%}" for kind in SMALL if kind in there]
    return ", ".join(said) or "none of them is trained yet"


def _forgets(recording: Recording) -> float:
    """The first number of pairs of which the small Mamba with 4 numbers a channel gives back less than half; beyond the
    last one where it never does."""
    if "mamba4" not in recording.meta["series"]:
        return float("nan")
    found = recording.stack(SERIES_FOUND, of="mamba4")
    below = [count for count, share in zip(PAIRS, found, strict=True) if share < 0.5]
    return float(below[0] if below else PAIRS[-1] + 8)


def _unlearnt(recording: Recording) -> str:
    """Which of Toyland's models fail even where few pairs are told."""
    found = {name: _found(recording, name) for name in MEMORIES}
    failed = [LABELS[name] for name, v in found.items() if v is not None and v[0] < 0.5]
    return f"There, {' and '.join(failed)} never learnt to look up. " if failed else ""


def _missing(recording: Recording) -> str:
    names = [LABELS[name] for name in MEMORIES if name not in recording.meta["here"]]
    return f"Not trained, so not asked: {', '.join(names)}." if names else ""


def marks(recording: Recording) -> list[Mark]:
    m = recording.meta
    return [Mark(m["ends"], "the list ends"), Mark(m["tokens"], "the recall curves begin")]


def _behind(recording: Recording) -> Finding:
    found = {name: _found(recording, name) for name in (SOFTMAX, MAMBA, RWKV)}
    states = [name for name in (MAMBA, RWKV) if found[name] is not None]
    if not states or found[SOFTMAX] is None:
        return Finding("–", "untestable", "Neither Mamba nor RWKV is trained yet.")
    last = {name: float(v[-1]) for name, v in found.items() if v is not None}
    filled = f"{PAIRS[-1]} pairs: " + ", ".join(f"{LABELS[name]} {share:.0%}" for name, share in last.items())
    measured = ", ".join(f"{last[n]:.0%}" for n in states)
    if all(found[name][0] < 0.5 for name in states):  # type: ignore[index]
        return _small_behind(recording, measured, filled)
    behind = all(last[name] < last[SOFTMAX] - 0.1 for name in states)
    why = HELPED if behind else "At this many pairs no state lies behind."
    return Finding(measured, "agrees" if behind else "differs", why, filled)


def _small_behind(recording: Recording, measured: str, filled: str) -> Finding:
    """The same of the small models that read lists alone, where the large ones never learnt to look up."""
    why = f"With {PAIRS[0]} pairs they fail, too: here they never learnt to look up. " + HELPED
    there = recording.meta["series"]
    small = {kind: recording.stack(SERIES_FOUND, of=kind) for kind in SMALL if kind in there}
    learnt = [kind for kind in ("mamba16", "mamba4", "rwkv", "linear") if kind in small and small[kind][0] >= 0.5]
    if "softmax" not in small or not learnt:
        return Finding(measured, "untestable", why, filled)
    behind = [kind for kind in learnt if small[kind][-1] < small["softmax"][-1] - 0.1]
    told = ", ".join(f"{SMALL[kind][0]} {small[kind][-1]:.0%}" for kind in ("softmax", *learnt))
    why = f"Of Toyland’s models the states never learnt to look up ({measured}); small ones, which began alike, did. "
    why += "All fall behind." if behind == learnt else "The larger state still has room at so many pairs."
    return Finding(
        ", ".join(f"{small[kind][-1]:.0%}" for kind in learnt), "agrees" if behind == learnt else "differs", why,
        f"small models, {PAIRS[-1]} pairs: {told}",
    )  # fmt: skip


def _recovers(recording: Recording) -> Finding:
    mixed, alone, full = (_found(recording, name) for name in (HYBRID, MAMBA, SOFTMAX))
    if mixed is None or alone is None or full is None:
        return Finding("–", "untestable", "Hybrid and Mamba are not both trained yet.")
    mean = [float(v.mean()) for v in (mixed, alone, full)]
    back = (mean[0] - mean[1]) / max(1e-9, mean[2] - mean[1])
    verdict: Verdict = "agrees" if back > 0.5 and mean[0] > mean[1] + 0.1 else "differs"
    filled = (
        f"mean over {PAIRS[0]} to {PAIRS[-1]} pairs: hybrid {mean[0]:.0%}, Mamba {mean[1]:.0%}, softmax {mean[2]:.0%}"
    )
    why = "One of four layers attends here." if verdict == "agrees" else "One attention layer does not bring it back."
    return Finding(f"{back:.0%} of the gap", verdict, why, filled)


# fmt: off
GU = "Gu and Dao 2023, 2312.00752"
CLAIMS = (
    Claim("h = Āh + B̄x, Ā and B̄ depend on the input", f"architectures; {GU}", "h = exp(ΔA)·h + Δ·B·x", "selective",
          memories.recurrence),
    Claim("RWKV needs O(1) memory a token", "architectures; Peng 2023, 2305.13048", "bytes after 1 and n tokens",
          "constant", memories.constant),
    Claim("Fixed states are less capable at precise retrieval from afar", "architectures",
          "pairs recalled, state against softmax", "less", _behind),
    Claim("Hybrids recover it", "architectures; episodes; Waleffe 2024, 2406.07887",
          "(hybrid − Mamba) / (softmax − Mamba)", "above the Transformer", _recovers),
    Claim("A few attention layers keep the cache small", "lecture; Lieber 2024, 2403.19887",
          "layers that attend / layers", "1 of 8", memories.smaller),
)

BEATS = (
    Beat(
        "A cache keeps everything; one matrix adds everything up. Mamba’s state has {numbers:,} numbers in this layer, "
        "and never more. ==Each column|state== is a channel with {state}. Watch it while the list is read: most words "
        "pass, some leave a mark.", scene="state", step="half", play=True, focus="state",
    ),
    Beat(
        "Every word decides how much to overwrite: its [[step size]] Δ. At “{loud}”, ==strongest of all|text==, "
        "{cleared:.0%} of the channels lose over half of what they held, elsewhere {usual:.0%}: a list begins, what "
        "came before may go. In layer 1 values write {by_value:.3f} on average, keys {by_key:.3f}.",
        scene="state", step="last_value", play=True, focus="text",
    ),
    Beat(
        "==One channel|history==, word by word. Click a number: what stays is Ā·h, what is added Δ·B·x. "
        "Trap: Ā = exp(ΔA) is exact, but for B Mamba’s code takes Euler’s rule, where textbooks of control print "
        "another.", scene="state", step="last_value", focus="history",
        do=Do("Open a number’s arithmetic", cell="history"),
    ),
    Beat(
        "RWKV forgets by the clock: ==each channel keeps the same share|bands== at every word, from nearly nothing to "
        "nearly all. Mamba forgets ==by the word|stripes==: stripes run down where a word clears many channels. RWKV "
        "chooses only what to let out: its [[receptance]].", scene="clock", step="last_value", play=True,
        focus="stripes",
    ),
    Beat(
        "Now test small models that read nothing but lists. After each pair, a copy of every memory is asked for all "
        "pairs so far: ==a row|back_softmax== of answers, strong where right. Look down a column: one pair, getting "
        "older.", scene="forget", step="half",
        play=True, focus="back_mamba",
        predict=Predict(
            "From how many pairs on does Mamba with 4 numbers a channel find less than half?", (4, 8, 16, 32),
            "forgets", format=".0f", unit="pairs",
        ),
    ),
    Beat(
        "After all {pairs}, they give back: {known}. Models raised on all of Toyland, ==over many lists|recall==, "
        "{asked} questions a point: with {fewest_pairs} pairs {recalled_few}; with {most_pairs} {recalled}. {missing}",
        scene="recall", step="last", play=True, focus="recall",
    ),
    Beat(
        "{unlearnt}==The small ones|series==, three seeds of each, began alike and read lists alone. At {most_pairs} "
        "pairs: {series}. A larger state has more room.", scene="recall", step="last", focus="series",
    ),
    Beat(
        "A [[hybrid]] puts a few layers of attention among many of Mamba. ==In its stack|stack== {attention} of 4 "
        "keep a growing cache. After {tokens} tokens it holds {hybrid_held:,.0f} bytes, softmax {cache_last:,.0f}, and "
        "RWKV {rwkv_held:,.0f}, as after the first.", scene="stack", step="last_token", play=True, focus="stack",
    ),
    Beat(
        "Break it. How many **pairs** does one attention layer still carry? Turn **State size** to 4 and read again. "
        "Does any list suit a state better than the others? Hybrids with two or three attention layers are "
        "not trained: their memory is weighed, nothing more.", scene="forget", step="last_value",
        do=Do("Turn the number of pairs", knob="pairs"),
    ),
)
GLOSSARY = {
    "step size": "Δ: how far a channel moves from its old state to the new input; softplus of a product with the word.",
    "receptance": "RWKV’s gate: a share between 0 and 1 for each channel, by which its answer is multiplied.",
    "hybrid": "A stack with layers of two kinds, such as Jamba (one of eight attends) and Mamba-2-Hybrid.",
}
# fmt: on


# fmt: off
SMALL = {
    "softmax": ("softmax attention", "ink"), "hybrid": ("hybrid, 1 of 2 layers attends", "recomputed"),
    "mamba16": ("Mamba, 16 numbers", "recent"), "mamba4": ("Mamba, 4 numbers", "value"), "rwkv": ("RWKV", "alarm"),
    "linear": ("linear attention", "key"),
}
LAYER: dict[str, Any] = {"layer": knob("layer")}
OVER_TEXT: dict[str, Any] = {"span": 6, "rows": "channel", "columns": "query", "column_labels": "tokens"}
DRAWN: dict[str, Any] = {"of": knob("architecture")}
TITLES = {SOFTMAX: "Softmax attention", HYBRID: "Hybrid", MAMBA: "Mamba", RWKV: "RWKV"}


def _figures(tensor: str, unit: str) -> tuple[Number, ...]:
    return tuple(Number(LABELS[n], of(tensor, of=n), unit, colour=INKS[n]) for n in MEMORIES)


BACKS = tuple(
    Heatmaps(
        name=f"back_{name}", title=TITLES[name], note="raised on lists", span=3, tensor=of(BACK, of=name), rows="told",
        columns="pair",
        colours="attention", power=0.7,
    )
    for name in MEMORIES
)
MAIN_LINES = tuple(Line(LABELS[n], of(FOUND, model=zoo), colour=INKS[n], x=of(TOLD)) for n, zoo in MAIN.items())
SMALL_LINES = tuple(
    Line(label, of(SERIES_FOUND, of=kind), colour=ink, x=of(TOLD)) for kind, (label, ink) in SMALL.items()
)
SHARES: dict[str, Any] = {"span": 6, "x_label": "pairs told", "low": 0, "high": 1, "format": ".0%"}
SCENES = (
    Scene(
        "state",
        (
            Heatmaps(
                name="delta", title="Δ: how much each channel overwrites now", tensor=of(DELTA, **LAYER), rows="Δ",
                columns="channel", colours="key", power=0.5,
            ),
            Heatmaps(
                name="state", title="The state h", note="all channels of the layer", tensor=of(STRIP, **LAYER),
                rows="state", columns="channel", colours="diverging",
            ),
            Tokens(
                name="text", title="The list, as it is read", note="stronger: overwrites more", fold=False,
                value=of(MEAN, **LAYER), colours="key", value_label="mean Δ",
            ),
            Heatmaps(
                name="history", title="One channel, token by token", tensor=of(STATE, channel=knob("channel"), **LAYER),
                rows="state", columns="query", column_labels="tokens", colours="diverging", cell=memories.state_cell,
            ),
        ),
    ),
    Scene(
        "clock",
        (
            Heatmaps(
                name="bands", title="RWKV keeps: by the clock", tensor=of(KEPT, of=RWKV, **LAYER), colours="recent",
                **OVER_TEXT,
            ),
            Heatmaps(
                name="stripes", title="Mamba keeps: by the word", tensor=of(KEPT, of=MAMBA, **LAYER), colours="recent",
                **OVER_TEXT,
            ),
            Heatmaps(
                name="receptance", title="RWKV’s receptance: what it lets out", tensor=of(RECEPTANCE, **LAYER),
                colours="query", **OVER_TEXT,
            ),
            Heatmaps(
                name="average", title="RWKV’s memory: an average a channel", tensor=of(AVERAGE, **LAYER),
                colours="diverging", **OVER_TEXT,
            ),
            Tokens(name="text2", title="The list", fold=False),
        ),
    ),
    Scene(
        "forget",
        (
            *BACKS,
            Numbers(name="known", title="Pairs it could give back now", numbers=_figures(KNOWN, "pairs")),
            Tokens(name="text3", title="The list", fold=False),
        ),
    ),
    Scene(
        "recall",
        (
            Curves(name="recall", title="Pairs recalled", note="raised on all of Toyland", lines=MAIN_LINES, **SHARES),
            Curves(
                name="series", title="Small models that read lists alone", note="mean of three seeds",
                lines=SMALL_LINES, **SHARES,
            ),
        ),
    ),
    Scene(
        "stack",
        (
            Stack(
                name="stack", title="Layer by layer: what it holds now", span=7, codes=of(LAYERS, **DRAWN),
                kinds=memories.KINDS, colours=("recent", "alarm", "key"), values=of(LAYER_HELD, **DRAWN),
                values_label="bytes held",
            ),
            Numbers(name="held", title="Held in all", span=5, numbers=_figures(HELD, "B")),
            Curves(
                name="bytes", title="Held, token by token", x_label="token", log=True, format=",.0f",
                lines=tuple(Line(LABELS[n], of(HELD, of=n), colour=INKS[n]) for n in MEMORIES),
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"ssm.*": {}, "recall.*": {}}


# fmt: off
LESSON = Lesson(
    slug="ssm", title="Memory that chooses", question="Can a fixed-size memory know what to keep?",
    part="Share the cache", order=8,
    sources=("architectures", "episodes", "lecture", GU, "Peng 2023, arXiv:2305.13048", "Lieber 2024, arXiv:2403.19887",
             "Waleffe 2024, arXiv:2406.07887"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS, facts=facts, marks=marks,
    code=("engine.mixers.mamba:Mamba", "engine.mixers.mamba:recurrent", "engine.mixers.rwkv:recurrent",
          "engine.mixers.hybrid:hybrid", "engine.probing:asked_now"),
    looks=frozenset({"layer", "channel", "architecture"}), bounded_by={"layer": "layers"}, glossary=GLOSSARY,
    step_word="step", seconds=180,
)
# fmt: on
