"""Learning while reading: a memory that goes on training on what it reads, and keeps what surprised it (Titans)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import param

from engine.mixers.following import CHANGE, SURPRISE, WEIGHTS, WRITE, following, word_vectors
from engine.recording import Recording, note, record, site, step, tap
from engine.toyland.questions import story
from engine.toyland.words import GRAMMAR, MARKS, START, VOCABULARY
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene, Verdict
from lessons.models import TOY, load, name_ids, read_aloud
from lessons.reading import (
    ASKED,
    BACK,
    COURSE,
    FILLER,
    FOUND,
    INSIDE,
    LONG,
    OFF,
    ON,
    READERS,
    RECALLED,
    SHORT,
    TASK,
    course_cell,
    distances,
    layers_read,
    show_layers,
)  # fmt: skip
from lessons.views import Bars, Curves, Heatmaps, Line, Tokens, knob, of

LIST = (
    "remember few: anna red, kite attic, ben green, lamp castle, zoe pink, drum garden. now? kite attic, anna red, "
    "drum garden, zoe pink. remember few: anna blue, hat barn, ben green. now? anna blue, ben green, anna blue."
)
SONG = "sing: rose bean owl kite lamp pie again: rose bean owl kite lamp pie again: rose bean owl kite lamp pie."
TEXTS = {"Facts, repeated and changed": "list", "A song, sung again": "song", "A story": "story", "Your own": "own"}
STORY, MOST = 72, 96  # tokens of a story, and of any text
WATCHED = 8  # facts
USED = len([word for word in VOCABULARY if not word.startswith("<spare")])
PLAIN = {*GRAMMAR, *MARKS, START}
LABELS = site("reading.labels", "the value of each fact")


class Turn(Knobs):
    rate = param.Number(0.4, bounds=(0.0, 1.0), step=0.05, label="Learning rate θ", doc="How big a step a word makes.")
    momentum = param.Number(
        0.2, bounds=(0.0, 0.95), step=0.05, label="Momentum η", doc="How much of the surprise before is carried on."
    )
    forgetting = param.Number(
        0.01, bounds=(0.0, 0.3), step=0.01, label="Forgetting α", doc="How much of the memory each word lets go."
    )
    text: param.Selector = param.Selector(default="list", objects=dict(TEXTS), label="Text", doc="What is read.")
    own = param.String("anna likes the owl. anna likes the owl.", label="Your own text", doc="In Toyland’s words.")
    window = param.Integer(32, bounds=(4, 64), label="Window", doc="Tokens that Titans’ layers see; trained with 32.")
    by_hand = param.Boolean(
        False, label="Steer the layers too", doc="On: θ, η and α hold in the trained layers, which else choose them."
    )
    layer = param.Integer(1, bounds=(0, 3), label="Layer", doc="Of the trained model, whose parts are drawn.")
    head = param.Integer(0, bounds=(0, 7), label="Head", doc="Which head of it.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(TOY)
    ids = _ids(tokenizer, knobs)
    pieces, facts_told = tokenizer.pieces(ids), _facts(tokenizer, ids)
    T, vectors = len(ids), word_vectors(model, USED)
    note(
        tokens=T, total_steps=T + len(FILLER), told=[list(f) for f in facts_told], rate=knobs.rate,
        momentum=knobs.momentum, forgetting=knobs.forgetting, window=knobs.window,
    )  # fmt: skip
    note(delta=_delta_rule(vectors, ids, knobs.rate))
    values = [value for _, value, _ in facts_told]
    name_ids(tokenizer, np.array(values))
    layers = None
    course = following(vectors, ids, rate=knobs.rate, momentum=knobs.momentum, forgetting=knobs.forgetting)
    for t, moment in enumerate(course):
        read_aloud(pieces[t : t + 1])
        near = moment.answers(vectors, [key for key, _, _ in facts_told]).numpy()
        near = near[np.arange(len(values)), values].astype(np.float32)
        tap(RECALLED, near, "fact")
        tap(COURSE, near[None], "query fact")
        tap(LABELS, np.array(values, np.int32), "fact")
        if t:  # the first picture need not wait for the layers
            layers = layers or layers_read(knobs, ids)
        for s in (0, 1) if t == 1 else (t,) if t else ():
            show_layers(layers or {}, s)
        step()
    distances(tokenizer, knobs)


def _ids(tokenizer: Any, knobs: Turn) -> list[int]:
    texts = {"list": LIST, "song": SONG, "own": knobs.own}
    ids = tokenizer.encode(texts.get(knobs.text) or story(seed=3, tokens=STORY))[:MOST]
    if len(ids) < 4:
        raise ValueError(f"The text has {len(ids)} tokens; at least 4 are needed to see a memory learn.")
    if max(ids) >= USED:
        raise ValueError("The text holds spare words that Toyland does not use.")
    return ids


def _facts(tokenizer: Any, ids: list[int]) -> list[tuple[int, int, int]]:
    """What one word tells of the next, both no mere grammar: (key, value, where it was told first), at most WATCHED."""
    plain = [piece.strip() in PLAIN for piece in tokenizer.pieces(ids)]
    told: dict[tuple[int, int], int] = {}
    for loose in (False, True):  # a text of grammar alone has facts of grammar
        for t in range(1, len(ids)):
            if loose or not (plain[t - 1] or plain[t]):
                told.setdefault((ids[t - 1], ids[t]), t)
        if told:
            break
    return [(key, value, t) for (key, value), t in list(told.items())[:WATCHED]]


def _delta_rule(vectors: Any, ids: list[int], rate: float) -> float:
    """How far the engine's loop is from the delta rule, when it neither forgets nor carries surprise on."""
    with record(keep={}):  # what this tries is not part of the picture
        *_, last = following(vectors, ids, rate=rate, momentum=0.0, forgetting=0.0)
    words = vectors.numpy()
    M = np.zeros((words.shape[1],) * 2)
    for before, now in itertools.pairwise(ids):
        M += 2 * rate * np.outer(words[before], words[now] - words[before] @ M)
    return float(np.abs(last.memory.weights[0][0, 0].numpy() - M).max() / max(1e-30, np.abs(M).max()))


def facts(recording: Recording) -> dict[str, Any]:
    meta, surprise = recording.meta, recording.stack(SURPRISE)
    first, again = _tellings(recording)
    pieces = [e.fields["piece"].strip() for e in recording.happened("text.token")]
    key, value, t = _repeated(recording)
    times = _times(pieces, key, value)
    weights = recording.stack(WEIGHTS)
    return {
        **{name: meta[name] for name in ("tokens", "rate", "momentum", "forgetting", "window")},
        "numbers": int(weights[0].size),
        "key": key,
        "value": value,
        "told_at": t,
        "again_at": times[1] if len(times) > 1 else t,
        "told": len(times),
        "shock": float(surprise[times[0]]),
        "echo": float(surprise[times[1]]) if len(times) > 1 else float("nan"),
        "shock_pct": float(100 * surprise[times[1]] / surprise[times[0]]) if len(times) > 1 else 100.0,
        "first": first,
        "again": again,
        "before": float(recording.stack(COURSE)[max(0, t - 1), 0]),
        "after": float(recording.stack(COURSE)[t, 0]),
        "end": meta["tokens"] - 1,
        "last": recording.steps - 1,
        "changed": _changed(recording, pieces),
        "titans_says": _titans_says(recording),
        "longest": float(recording.stack(BACK)[-1]),
        "largest": float(np.abs(weights[-1]).max()),
    }


def _times(pieces: list[str], key: str, value: str) -> list[int]:
    return [t for t in range(1, len(pieces)) if (pieces[t - 1], pieces[t]) == (key, value)]


def _repeated(recording: Recording) -> tuple[str, str, int]:
    """The first fact that is told twice; else the first of all."""
    pieces = [e.fields["piece"].strip() for e in recording.happened("text.token")]
    told = [(pieces[t - 1], pieces[t], t) for _, _, t in recording.meta["told"]]
    return next((f for f in told if len(_times(pieces, f[0], f[1])) > 1), told[0])


def _tellings(recording: Recording) -> tuple[float, float]:
    """Mean surprise of the facts when they are told first, and when they are told again."""
    pieces = [e.fields["piece"].strip() for e in recording.happened("text.token")]
    surprise = recording.stack(SURPRISE)
    times = [_times(pieces, pieces[t - 1], pieces[t]) for _, _, t in recording.meta["told"]]
    again = [surprise[t] for told in times for t in told[1:]]
    return float(np.mean([surprise[told[0]] for told in times])), float(np.mean(again)) if again else float("nan")


def _changed(recording: Recording, pieces: list[str]) -> str:
    """What became of a fact whose key was later told another value."""
    course, told = recording.stack(COURSE), recording.meta["told"]
    for n, (key, _, t) in enumerate(told):
        for m, (other, _, later) in enumerate(told):
            if other == key and later > t:
                was, now, new = course[later - 1, n], course[-1, n], course[-1, m]
                return (
                    f"“{pieces[t - 1]} {pieces[t]}” was answered at {was:.2f}; after “{pieces[t - 1]} {pieces[later]}” "
                    f"it ends at {now:.2f}, the new value at {new:.2f}."
                )
    return "In this text nothing is changed."


def _titans_says(recording: Recording) -> str:
    """Codes found from beyond the window, or that there is no model to ask."""
    if not recording.meta["here"]:
        return "The model trained with such layers is not there yet, so its lines and panels are empty."
    far = _beyond(recording)
    on, off = (float(recording.stack(FOUND, of=name)[far].mean()) for name in (ON, OFF))
    return f"Beyond the window Titans finds {on:.0%} of the codes with its memory on, {off:.0%} with it off."


def _beyond(recording: Recording) -> np.ndarray:
    """Which distances lie beyond what all windows together can reach at once: one window."""
    return recording.stack(BACK) > recording.meta["window"]


def marks(recording: Recording) -> list[Mark]:
    pieces = [e.fields["piece"].strip() for e in recording.happened("text.token")]
    key, value, t = _repeated(recording)
    again = _times(pieces, key, value)[1:2]
    return [Mark(t, f"{key} {value}, told first"), *(Mark(s, "told again") for s in again),
            Mark(recording.meta["tokens"], "codes are asked for")]  # fmt: skip


def _three(recording: Recording) -> Finding:
    if not recording.meta["here"]:
        return Finding("–", "untestable", "The Titans model is not trained yet.")
    far = _beyond(recording)
    on, off, full = (float(recording.stack(FOUND, of=name)[far].mean()) for name in (ON, OFF, "toy"))
    filled = f"codes over {recording.meta['window']} tokens back: on {on:.0%}, off {off:.0%}; full attention {full:.0%}"
    verdict: Verdict = "agrees" if on > off + 0.1 and on > 0.5 * full else "differs"
    why = "Four layers of windows reach further than one."
    if verdict == "differs":
        why = "The memory brings back too little to stand in for attention." if on <= 0.5 * full else (
            "The memory makes too little difference: what is found, the windows find."
        )  # fmt: skip
    return Finding(f"{on:.0%} on, {off:.0%} off", verdict, why, filled)


def _less(recording: Recording) -> Finding:
    first, again = _tellings(recording)
    if np.isnan(again):
        return Finding("–", "untestable", "No fact is told twice in this text.")
    less = again < first
    why = "" if less else "With these knobs the memory overshoots: its steps are larger than what it missed."
    return Finding(f"{again / first:.2f} of the first", "agrees" if less else "differs", why,
                   f"mean ‖dℓ/dM‖ {first:.2f} when told first, {again:.2f} when told again")  # fmt: skip


def _delta(recording: Recording) -> Finding:
    off = recording.meta["delta"]
    filled = f"η = α = 0: M + 2θ·k(v − M(k)) against the engine’s loop, largest difference {off:.0e}"
    return Finding(
        f"{off:.0e}", "agrees" if off < 1e-9 else "differs", "" if off < 1e-9 else "The loop is wrong.", filled
    )


BEHROUZ = "Behrouz 2024, 2501.00663"
# fmt: off
CLAIMS = (
    Claim("Short, long and task memory stand in for full attention", f"post; {BEHROUZ}",
          "codes found beyond the window, memory on and off", "full attention replaced", _three),
    Claim("What was seen before surprises less", BEHROUZ, "‖dℓ/dM‖ told again / told first", "below 1", _less),
    Claim("A linear memory without momentum and forgetting is the delta rule", BEHROUZ, "M + 2θ·k(v − M(k))", "equal",
          _delta),
)

BEATS = (
    Beat(
        "A trained model’s weights stand still. This memory’s do not: ==one matrix|matrix== that starts at zero and "
        "takes a training step at every word. ==Each step|write== says: *this word followed that one*. "
        "==Strong words|text== teach most.", scene="memory", step="told_at", play=True, focus="matrix",
    ),
    Beat(
        "“{key} {value}” has just been told. Surprise is the [[gradient]]’s length: {shock:.2f}. Asked for “{key}”, "
        "==its answer|facts== stood at {before:.2f} of “{value}” before, and at {after:.2f} now.", scene="memory",
        step="told_at", focus="facts",
        predict=Predict(
            "Told again, how large is the surprise, in percent of the first time?", (20, 60, 100, 150), "shock_pct",
            format=".0f", unit="%",
        ),
    ),
    Beat(
        "The second time: {echo:.2f}. ==The curve|surprise== falls where the text repeats itself: over all facts from "
        "{first:.2f} to {again:.2f}. No epoch, no batch: it learnt while reading.", scene="memory", step="again_at",
        play=True, focus="surprise",
    ),
    Beat(
        "Facts can change. {changed} A step writes what was *missed*, so it also unwrites. ==Each row|course== is one "
        "fact: dim until it is told, then bright, then slowly dimmer, for other words use the same matrix.",
        scene="course", step="end", play=True, focus="course",
    ),
    Beat(
        "Three knobs: θ is the step, [[momentum]] η carries surprise on to the next words, forgetting α dims "
        "everything a little at each. Titans’ layers choose all three anew for every word. Here you do: turn "
        "**Forgetting** up.", scene="course", step="end", focus="course",
        do=Do("Turn the forgetting", knob="forgetting"),
    ),
    Beat(
        "A Titans layer has three memories: ==a window|short== of {window} tokens with attention, ==the learning "
        "matrix|long== for what is past it, and ==persistent tokens|task== that belong to the task, not the text. "
        "{titans_says}", scene="layers", step="end", play=True, focus="short",
    ),
    Beat(
        "The test: a code is told, then ever more filler, then it is asked for. ==Each point|found== is sixteen codes. "
        "A window alone loses them; full attention never does. Where does the memory stand, on and off?",
        scene="recall", step="last", play=True, focus="found",
    ),
    Beat(
        "Mind the sources: Titans has no official code. This was written from the paper’s equations and is held "
        "against automatic differentiation; one public reference has a wrong gradient. In a [[chunk]], gradients are "
        "taken at its start: only chunks of one are the loop.", scene="layers", step="end", focus="inside",
    ),
    Beat(
        "Break it. Momentum 0.9 and rate 0.5: the memory overshoots, and surprise grows with every word. Rate 1 "
        "without momentum? Can you write a text of your own whose second half surprises *more* than its first?",
        scene="memory", step="end", do=Do("Turn the momentum", knob="momentum"),
    ),
)

GLOSSARY = {
    "gradient": "Which way, and how strongly, the weights should move to answer better.",
    "momentum": "A step also goes a part of the way of the step before: a surprise lasts for a few words.",
    "chunk": "So many tokens whose gradients are computed together, as matrix products.",
}
# fmt: on


# fmt: off
PART: dict[str, Any] = {"layer": knob("layer"), "head": knob("head")}
LINES = {**READERS, ON: (f"Titans, {ON}", "recent"), OFF: (f"Titans, {OFF}", "key")}
FOUND_LINES = tuple(
    Line(label, of(FOUND, of=name), colour=ink, x=of(BACK)) for name, (label, ink) in LINES.items()
)
SCENES = (
    Scene(
        "memory",
        (
            Tokens(
                name="text", title="The text, as it is read", note="stronger: more surprising", fold=False,
                value=of(SURPRISE), colours="heavy", value_label="surprise",
            ),
            Heatmaps(
                name="matrix", title="The memory’s matrix", span=4, tensor=of(WEIGHTS), rows="in", columns="out",
                colours="diverging",
            ),
            Heatmaps(
                name="write", title="What this word changes", span=4, tensor=of(WRITE), rows="in", columns="out",
                colours="diverging",
            ),
            Bars(
                name="facts", title="Asked for its key, how near", span=4, values=of(RECALLED),
                labels=of(LABELS), colour="value", format=".2f",
            ),
            Curves(
                name="surprise", title="Surprise, and how far the matrix moves", x_label="token", format=".2f", low=0,
                lines=(
                    Line("surprise", of(SURPRISE), colour="heavy"),
                    Line("moved", of(CHANGE), colour="recent", dashed=True),
                ),
            ),
        ),
    ),
    Scene(
        "course",
        (
            Heatmaps(
                name="course", title="What it knows of each fact, word by word", tensor=of(COURSE), rows="fact",
                columns="query", column_labels="tokens", colours="value", cell=course_cell,
            ),
            Tokens(
                name="text2", title="The text", note="stronger: more surprising", fold=False, value=of(SURPRISE),
                colours="heavy", value_label="surprise",
            ),
            Bars(
                name="facts2", title="How near each answer is now", span=6, values=of(RECALLED), labels=of(LABELS),
                colour="value", format=".2f",
            ),
            Heatmaps(
                name="matrix2", title="The memory’s matrix", span=6, tensor=of(WEIGHTS), rows="in", columns="out",
                colours="diverging",
            ),
        ),
    ),
    Scene(
        "layers",
        (
            Heatmaps(
                name="short", title="Short term: the window", span=5, tensor=of(SHORT, **PART), rows="query",
                columns="key", colours="attention", power=0.6,
            ),
            Heatmaps(
                name="long", title="Long term: the learning matrix", span=4, tensor=of(LONG, **PART), rows="in",
                columns="out", colours="diverging",
            ),
            Heatmaps(
                name="task", title="The task: persistent tokens", span=3, tensor=of(TASK, **PART), rows="query",
                columns="persistent", colours="sink",
            ),
            Heatmaps(
                name="inside", title="How surprised each head’s memory is", tensor=of(INSIDE, layer=knob("layer")),
                rows="head", columns="query", column_labels="tokens", colours="heavy",
            ),
            Tokens(name="text3", title="The text", fold=False),
        ),
    ),
    Scene(
        "recall",
        (
            Curves(
                name="found", title="Codes found, by how long ago they were told", note=f"{ASKED} codes a point",
                lines=FOUND_LINES,
                x_label="tokens back", low=0, high=1, format=".0%",
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {
        "reading.*": {},
        "following.surprise": {},
        "following.change": {},
        "following.weights": {},
        "following.write": {},
    }


# fmt: off
LESSON = Lesson(
    slug="titans", title="Learning while reading", question="Can a memory keep training at test time?",
    part="Share the cache", order=9, sources=("post", BEHROUZ),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS, facts=facts, marks=marks,
    code=("engine.mixers.following:following", "engine.mixers.titans:sequential", "engine.mixers.titans:gradients",
          "engine.mixers.titans_layers:MemoryAsGate"),
    looks=frozenset({"layer", "head"}), glossary=GLOSSARY, step_word="word", seconds=120,
)
# fmt: on
