"""Learning from the teacher's doubts: four ways to teach a small model, in one race, and what each of them says."""

from __future__ import annotations

from typing import Any

import numpy as np
import param

from engine.distil import layers
from engine.distil.run import MAP, TERM, WAYS
from engine.recording import Recording, note
from lessons import pupils
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice
from lessons.pupils import ALPHAS, AT, CURVE, HEATS, RIGHT, SAID, SOFT, TAKES, WARMTH, WORDS
from lessons.views import Bars, Curves, Facing, Heatmaps, Line, Number, Numbers, Saying, Sayings, Sheet, View, knob, of

NAMES = {"hard": "right words", "soft": "soft labels", "layers": "layers too", "synthetic": "its own texts"}
COLOURS = {"hard": "alarm", "soft": "recent", "layers": "heavy", "synthetic": "key"}


class Turn(Knobs):
    model = choice(default=TOY)
    task: param.Selector = param.Selector(
        default="secret", objects={"Secret codes": "secret", "Stories": "home", "Lists": "few"},
        label="Task", doc="Which of Toyland’s texts students learn from, and are judged by.",
    )  # fmt: skip
    texts: param.Selector = param.Selector(
        default=32, objects={"32": 32, "128": 128, "Endless": 0}, label="Texts to learn from",
        doc="How many different texts of 32 words there are. The teacher’s own texts are 256, whatever you choose.",
    )  # fmt: skip
    temperature = param.Integer(2, bounds=(1, 8), label="Teach at T", doc="The temperature of the soft labels.")
    alpha = param.Number(0.9, bounds=(0.0, 1.0), step=0.1, label="α", doc="Weight of the soft labels in the loss.")
    steps = param.Integer(100, bounds=(20, 120), step=20, label="Training steps", doc="Of every student.")
    seeds = param.Integer(3, bounds=(1, 3), label="Seeds", doc="Students of each kind: each begins elsewhere.")
    narrower: param.Selector = param.Selector(
        default=3, objects={"Half": 2, "A third": 3, "A sixth": 6}, label="Student’s width",
        doc="Of the teacher’s. A student of SmolLM2 has an eighth.",
    )  # fmt: skip
    layers = param.Integer(2, bounds=(1, 4), label="Student’s layers", doc="The teacher has four; SmolLM2 has thirty.")
    place: param.Selector = param.Selector(
        default=0, objects={"Many right answers": 0, "Two or three": 1, "One right answer": 2}, label="Look at a word",
        doc="Of which word’s odds you look at.",
    )  # fmt: skip
    look: param.Selector = param.Selector(
        default=1, objects={f"{t:g}": i for i, t in enumerate(WARMTH)}, label="Look at T",
        doc="The temperature of the odds that are drawn. Nothing is trained anew.",
    )  # fmt: skip
    way: param.Selector = param.Selector(
        default="soft", objects={label.capitalize(): way for way, label in NAMES.items()},
        label="Look at the student of", doc="Whose odds stand beside the teacher’s.",
    )  # fmt: skip


def run(knobs: Turn) -> None:
    school, tokenizer = pupils.open_school(knobs)
    note(
        total_steps=pupils.steps_of(school), training=knobs.steps, seeds=knobs.seeds, texts=pupils.reads(school),
        real=knobs.model != TOY,
    )  # fmt: skip
    watch = pupils.Watch(school, tokenizer)
    pupils.weigh(school)
    pupils.race(school, watch)
    pupils.mapped(school)
    pupils.specialist(school, watch)


def facts(recording: Recording) -> dict[str, Any]:
    """What is known by now: of a run that was stopped, as much as there is."""
    meta, ends = recording.meta, {"begun": min(1, recording.steps - 1), "last": recording.steps - 1}
    raced = _at(recording, "map") - 1
    open_, sure = (_of_what_came(recording, place) for place in (0, 2))
    # fmt: off
    found: dict[str, Any] = ends | {
        "name": meta["model"]["name"], "context": " ".join(meta["contexts"][0].split()[-7:]), "came": meta["came"][0],
        "sure": open_[1], "doubt": _doubt(meta), "words": meta["words"], "certain": sure[1],
        "certain_hot": sure[4], "certain_word": meta["came"][2], "runners": meta["runners"],
        "texts_told": meta["texts"], "raced": raced,
        "training": meta["training"], "seeds": meta["seeds"],
    }
    if "times" in meta:
        found |= {"times": meta["times"]["flops"], "times_bytes": meta["times"]["bytes"],
                  "times_ms": meta["times"]["time"]}
    if recording.has(CURVE, way="hard", of="mean"):
        lines = {way: recording.stack(CURVE, way=way, of="mean").astype(float) for way in WAYS}
        alike = {way: recording.stack(pupils.MATCHED, way=way).astype(float) for way in ("layers", "hard")}
        right = {name: float(recording.track(RIGHT, reader=name).latest()) for name in ("teacher", *WAYS)}
        found |= {
            **{f"nats_{way}": float(line[-1]) for way, line in lines.items()}, "teacher": meta["teacher"],
            "heart": _by_heart(lines["hard"], recording.stack(AT, of="hard").astype(int)), "asked": _asked(meta, right),
            "alike_first": alike["layers"][0], "alike_layers": alike["layers"][-1], "alike_hard": alike["hard"][-1],
        }
    if recording.has(MAP):
        grid = recording.track(MAP).latest().astype(float)
        best = np.unravel_index(np.nanargmin(grid), grid.shape)
        found |= {"without": grid[0, 0], "best": grid[best], "best_alpha": ALPHAS[best[0]], "best_heat": HEATS[best[1]],
                  "map_told": f"{meta['map_steps']} steps a cell, one seed"}
    # fmt: on
    return found | {"special": float(np.mean(meta.get("special", np.nan))), "special_told": _special_told(meta)}


def _of_what_came(recording: Recording, place: int) -> np.ndarray:
    """The teacher's odds, at each temperature, of the word that came at a place."""
    came = int(recording.track(pupils.LABEL, place=place).latest().argmax())
    return recording.track(SOFT, place=place, reader="teacher").latest()[:, came].astype(float)


def _at(recording: Recording, phase: str) -> int:
    """The first step of a phase; the end where it never came."""
    return next((e.step for e in recording.happened("distil.phase") if e.fields["phase"] == phase), recording.steps)


def _doubt(meta: dict[str, Any]) -> str:
    if meta["real"]:
        return f"Teacher and class may say only the {meta['words']} words of three short texts."
    return f"{meta['open'][0]} words could stand here, and Toyland’s own odds, which are known exactly, agree."


def _by_heart(line: np.ndarray, at: np.ndarray) -> str:
    best = int(line.argmin())
    if line[-1] > 1.03 * line[best]:
        low = f"After {at[best]} steps it was at {line[best]:.2f}"
        return f"{low}: then it learnt its texts by heart, and reads others worse."
    return "It has not learnt its texts by heart: there are too many, or too few steps."


def _asked(meta: dict[str, Any], right: dict[str, float]) -> str:
    if np.isnan(right["teacher"]):
        return "Here no question is asked, so look at what they say."
    told = ", ".join(f"{NAMES[way]} {right[way]:.0%}" for way in WAYS)
    return f"Of all unseen questions the teacher gets {right['teacher']:.0%} right; {told}."


def _special_told(meta: dict[str, Any]) -> str:
    if "special" not in meta and not meta["real"]:
        return ""
    if "special" not in meta:
        return "SmolLM2’s class has three texts only: whether it could beat its teacher is not tried."
    mean, teacher = float(np.mean(meta["special"])), meta["teacher"]
    wins = sum(nats < teacher for nats in meta["special"])
    told = "it beats" if mean < teacher else "it does not beat"
    return (
        f"After {meta['special_steps']} steps it stands at {mean:.3f}: {told} its teacher’s {teacher:.3f}, "
        f"in {wins} of {len(meta['special'])} seeds."
    )


def marks(recording: Recording) -> list[Mark]:
    said = {"race": "four students", "map": "α and T", "specialist": "a specialist"}
    return [Mark(min(e.step, recording.steps - 1), said[e.fields["phase"]])
            for e in recording.happened("distil.phase") if e.fields["phase"] in said]  # fmt: skip


def _mixed(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"α = 0: {f['without']:.2f}; α = {f['best_alpha']:g}, T = {f['best_heat']:g}: {f['best']:.2f}, the least"
    good = f["best_alpha"] > 0
    why = f"The map: {f['map_told']}. " + ("" if good else "Here no soft label beats the right words.")
    return Finding(f"{f['without']:.2f} → {f['best']:.2f}", "agrees" if good else "differs", why.strip(), filled)


def _few(recording: Recording) -> Finding:
    f = facts(recording)
    filled = (
        f"{f['texts_told']}, {f['training']} steps, {f['seeds']} seeds: {f['nats_hard']:.3f} → {f['nats_soft']:.3f}"
    )
    good = f["nats_soft"] < f["nats_hard"]
    why = f"Nats a word, less is better; the teacher has {f['teacher']:.3f}."
    if not good:
        why = f"With fresh texts, or after few steps, right words do as well. {why}"
    return Finding(f"{f['nats_hard']:.2f} → {f['nats_soft']:.2f}", "agrees" if good else "differs", why, filled)


def _beats(recording: Recording) -> Finding:
    f, meta = facts(recording), recording.meta
    if "special" not in meta:
        why = "It would take endless texts of one task, with right answers. Toyland has them."
        return Finding("–", "untestable", why, "")
    each = ", ".join(f"{nats:.3f}" for nats in meta["special"])
    good = f["special"] < f["teacher"]
    least = f"The least there is: {meta['floor']:.3f}."
    why = (
        f"Judged by {pupils.UNSEEN_ROWS} unseen texts, taught by endless ones, α = {pupils.SPECIAL['alpha']:g}. {least}"
    )
    if not good:
        why = f"{meta['special_steps']} steps are too few, or the student too small. {why}"
    return Finding(f"{f['special']:.3f} vs {f['teacher']:.3f}", "agrees" if good else "differs", why,
                   f"teacher {f['teacher']:.3f}; students {each}")  # fmt: skip


def _cheaper(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"FLOPs {f['times']:.1f}×, bytes {f['times_bytes']:.1f}×, measured time {f['times_ms']:.1f}×"
    inside = 10 <= f["times"] <= 100
    why = "Of one token. Time falls less: a small layer costs as many calls as a large one."
    if not inside:
        far = "less" if f["times"] < 10 else "more"
        why = f"This pair differs by {far} than that; the student’s size is a choice. {why}"
    return Finding(f"{f['times']:.1f}×", "agrees" if inside else "differs", why, filled)


def _synthetic(recording: Recording) -> Finding:
    f = facts(recording)
    both = f"right words {f['nats_hard']:.3f}, the teacher’s own texts {f['nats_synthetic']:.3f}"
    filled = f"{both}, equal steps, {f['seeds']} seeds"
    good = f["nats_synthetic"] < f["nats_hard"]
    why = "It never read a real text. The teacher wrote as many as were wanted."
    if not good:
        why = f"Real texts teach more where there are enough of them. {why}"
    return Finding(f"{f['nats_hard']:.2f} vs {f['nats_synthetic']:.2f}", "agrees" if good else "differs", why, filled)


HINTON, CHAPTER = "Hinton 2015, 1503.02531", "architectures"
# fmt: off
CLAIMS = (
    Claim("The loss mixes soft labels and right words", f"{CHAPTER}; {HINTON}",
          "L = α T² KL + (1 − α) CE, over α and T", "both help", _mixed),
    Claim("Where texts are few, soft labels save the day", HINTON, "CE of unseen texts, right words → soft labels",
          "44.5% → 57.0% *", _few),
    Claim("A student of one task can beat its teacher there", CHAPTER, "CE(student) vs CE(teacher)", "can", _beats),
    Claim("Students are 10 to 100 times cheaper", CHAPTER, "FLOPs(teacher) / FLOPs(student)", "10× to 100×", _cheaper),
    Claim("Text that a teacher writes distils it too", "lecture; Kim and Rush 2016, 1606.07947",
          "CE, right words vs synthetic", "it works", _synthetic),
)

BEATS = (
    Beat(
        "==“{context}”|context== And now? ==The text|label== says “{came}”, and nothing else. ==The teacher|odds== "
        "gives that word only {sure:.0%}. {doubt} What it thinks of the wrong words is its [[dark knowledge]].",
        scene="doubts", step=0, focus="odds", knobs={"place": 0, "look": 1},
    ),
    Beat(
        "Now another word: the teacher gives “{certain_word}” {certain:.1%}. Divide its logits by a [[temperature]] "
        "before the softmax, and the runners-up step out of the dark: {runners}. At T = 4 it keeps {certain_hot:.0%}. "
        "**Turn T.** Nothing is trained anew.", scene="doubts", step="begun", focus="odds",
        knobs={"place": 2}, do=Do("Turn T", knob="look"),
    ),
    Beat(
        "Four students, each {times:.0f} times cheaper, {training} steps, {seeds} seeds. One learns "
        "==right words|curve==, one [[soft labels]], one the teacher’s layers too, all from the same {texts_told}. The "
        "fourth reads what the teacher wrote. The teacher’s surprisal is {teacher:.2f}.", scene="race", step="begun",
        focus="curve", knobs={"place": 0, "look": 1},
        predict=Predict("Right words alone will end at about", (0.8, 1.2, 1.7, 3.0), "nats_hard", unit="nats"),
    ),
    Beat(
        "==Right words|curve== end at {nats_hard:.2f}. {heart} Soft labels: {nats_soft:.2f}. Same texts, same steps, "
        "but each word brought a whole row of odds. Layers: {nats_layers:.2f}. The teacher’s own texts: "
        "{nats_synthetic:.2f}.",
        scene="race", step="raced", play=True, focus="curve",
    ),
    Beat(
        "==Let them speak|said==, always with the likeliest word. What differs from the teacher is underlined; scrub "
        "back to hear the babble before. {asked}", scene="race", step="raced", focus="said",
    ),
    Beat(
        "==Who was surprised, word by word?|heard== At the right end of the scale, very. Toyland’s grammar itself "
        "cannot foretell an open word: that is the floor. Open a student’s cell: there stands the loss, both terms, "
        "with T². Trap: average KL over the vocabulary too, and it shrinks {words} times.", scene="words",
        step="raced", focus="heard",
        do=Do("Open a student’s word", cell="heard"),
    ),
    Beat(
        "Inside: ==how alike|cka_layers== student’s and teacher’s layers see the same words ([[CKA]]). Told to match "
        "them, the student goes from {alike_first:.2f} to {alike_layers:.2f}; the one of right words reaches "
        "{alike_hard:.2f} by itself. ==Four terms|terms== make up its loss.", scene="inside", step="raced",
        play=True, focus="cka_layers",
    ),
    Beat(
        "How much of each? ==The map|map==: α mixes, T softens; {map_told}. α = 0, no teacher, ends at {without:.2f}; "
        "the best cell is α = {best_alpha:g}, T = {best_heat:g} with {best:.2f}. ==The price|cheaper==: {times:.0f} "
        "times fewer multiplications, on this machine {times_ms:.1f} times faster.", scene="map", step="last",
        play=True, focus="map",
    ),
    Beat(
        "Can a pupil outgrow its master? ==A specialist|special== reads only this task, texts without end. "
        "{special_told} Break it: take **Endless** texts, where right words are enough. Or α = 1: who only imitates, "
        "stops at the teacher. Which task resists?", scene="map", step="last", focus="special",
        do=Do("Let texts be endless", knob="texts"),
    ),
)
GLOSSARY = {
    "dark knowledge": "What a model’s small probabilities tell of how words resemble each other (Hinton).",
    "temperature": "T in softmax(z/T). Above 1 it evens the odds out; the order stays.",
    "soft labels": "The teacher’s probabilities of all words, where a text has only the one that came.",
    "CKA": "Centred kernel alignment: 1 if two layers hold the same, turned or scaled (arXiv:1905.00414).",
}

PLACE: dict[str, Any] = {"place": knob("place")}
ORDER = of(WORDS, reader="teacher", **PLACE)


def _line(way: str, label: str, colour: str, of_: str = "mean", **more: Any) -> Line:
    """A student's mean with the band of its seeds."""
    return Line(label, of(CURVE, way=way, of=of_), colour=colour, x=of(AT, of="hard"), **more)


def _student(way: str, at: str) -> Line:
    band = (of(CURVE, way=way, of="low"), of(CURVE, way=way, of="high"))
    return Line(NAMES.get(way, "specialist"), of(CURVE, way=way, of="mean"), colour=COLOURS.get(way, "recent"),
                x=of(AT, of=at), band=band)


def _level(way: str, label: str, colour: str, of_: str, at: str) -> Line:
    return Line(label, of(CURVE, way=way, of=of_), colour=colour, x=of(AT, of=at), dashed=True)


def _alike(way: str, title: str) -> View:
    return Heatmaps(name=f"cka_{way}", title=title, tensor=of(layers.ALIGNMENT, way=way), rows="student",
                    columns="teacher", colours="sequential", gaps=True, span=4)


RIGHTS = Number("Questions right", of(RIGHT, reader="teacher"), format=".0%")
SCENES = (
    Scene(
        "doubts",
        (
            Sayings(name="context", title="The text so far",
                    sayings=(Saying("Next word?", of(pupils.CONTEXT, **PLACE)),)),
            Facing(name="label", title="The text and the truth", span=6, format=".0%", origin="formula",
                   left=of(pupils.LABEL, **PLACE), right=of(pupils.TRUTH, **PLACE), labels=ORDER,
                   left_label="the text says", right_label="Toyland’s own odds", left_colour="ink",
                   right_colour="value"),
            Facing(name="odds", title="Teacher and student, at T", span=6, format=".1%",
                   left=of(SOFT, reader="teacher", temperature=knob("look"), **PLACE),
                   right=of(SOFT, reader=knob("way"), temperature=knob("look"), **PLACE),
                   labels=ORDER, left_label="teacher", right_label="student",
                   left_colour="query", right_colour="recent"),
        ),
    ),
    Scene(
        "race",
        (
            Curves(name="curve", title="Surprisal of unseen texts, live", note="mean and range of the seeds, log",
                   lines=(*(_student(way, "hard") for way in WAYS),
                          _level("teacher", "teacher", "query", "mean", "hard"),
                          _level("floor", "the least there is", "ink", "mean", "hard")),
                   log=True, x_label="training step", y_label="nats a word", format=".2f", height=300),
            Sayings(name="said", title="How they go on", prompt=of(pupils.PROMPT), note="the likeliest word each time",
                    sayings=(Saying("teacher", of(SAID, reader="teacher"), (RIGHTS,), colour="query"),
                             *(Saying(NAMES[way], of(SAID, reader=way),
                                      (Number("Questions right", of(RIGHT, reader=way), format=".0%"),),
                                      colour=COLOURS[way]) for way in WAYS))),
        ),
    ),
    Scene(
        "words",
        (
            Heatmaps(name="heard", title="Who is surprised by which word", tensor=of(pupils.HEARD), rows="reader",
                     columns="token", column_labels="tokens", power=0.5, gaps=True, cell=pupils.loss_cell,
                     row_labels=("Toyland", "teacher", "words", "soft", "layers", "own texts")),
            Sayings(name="story", title="The text that they read",
                    sayings=(Saying("Unseen", of(pupils.CONTEXT, place="end")),)),
            Curves(name="small", title="Surprisal of unseen texts", lines=tuple(_student(way, "hard") for way in WAYS),
                   log=True, x_label="training step", format=".2f", height=170),
        ),
    ),
    Scene(
        "inside",
        (
            _alike("layers", "Layers matched"), _alike("soft", "Soft labels"), _alike("hard", "Right words"),
            Curves(name="alike", title="How alike matched layers are", span=6, low=0.0, high=1.0, height=200,
                   lines=tuple(Line(NAMES[way], of(pupils.MATCHED, way=way), colour=COLOURS[way], x=of(AT, of="hard"))
                               for way in WAYS), x_label="training step", format=".2f"),
            Curves(name="terms", title="Terms of the loss, layers matched", note="first seed, log", span=6, log=True,
                   lines=tuple(Line(label, of(TERM, term=term, way="layers", seed=0), colour=colour)
                               for term, label, colour in (("soft", "T² KL", "recent"), ("hard", "CE", "alarm"),
                                                           ("hidden", "hidden states", "heavy"),
                                                           ("attention", "attention scores", "sink"))),
                   x_label="step", format=".3f", height=200),
        ),
    ),
    Scene(
        "map",
        (
            Heatmaps(name="map", title="Surprisal by α and T", note="each cell is a training", tensor=of(MAP),
                     rows="alpha", columns="temperature", gaps=True, span=5,
                     row_labels=tuple(f"α = {a:g}" for a in ALPHAS), column_labels=tuple(f"T = {t:g}" for t in HEATS)),
            Curves(name="special", title="A specialist against its teacher", note="log", span=7, log=True, height=200,
                   lines=(_student("specialist", "specialist"),
                          _level("teacher", "teacher", "query", "special", "specialist"),
                          _level("floor", "the least there is", "ink", "special", "specialist")),
                   x_label="training step", y_label="nats a word", format=".3f"),
            Bars(name="cheaper", title="How many times less", values=of(pupils.TIMES), span=4, high=None, format=".1f",
                 labels=("weights", "products", "bytes", "time"), colour="value"),
            Numbers(name="price", title="One more token", span=8,
                    numbers=tuple(Number(f"{label}, {who}", of(TAKES, of=who, kind=kind), unit=unit, format=form,
                                         colour=colour)
                                  for kind, label, unit, form in (("products", "Multiplications", "", ",.0f"),
                                                                  ("bytes", "Bytes", "B", ",.0f"),
                                                                  ("ms", "Time", "ms", ".2f"))
                                  for who, colour in (("teacher", "query"), ("student", "recent")))),
            Sheet(name="reported", title="What others report", origin="reported",
                  columns=("pair", "smaller", "faster", "keeps"),
                  rows=(("BERT → DistilBERT", "1.7×", "1.6×", "97% of GLUE"),
                        ("BERT → TinyBERT", "7.5×", "9.4×", "96.8% of GLUE"),
                        ("Ten speech nets → one", "10×", "–", "60.8% of 61.1%")),
                  source="Sanh 2019, 1910.01108 (GLUE); Jiao 2019, 1909.10351, 4 layers (GLUE); Hinton 2015, "
                         "1503.02531, ten nets for speech made one: frames told right."),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"distil.*": {}}


# fmt: off
LESSON = Lesson(
    slug="distil", title="Learning from the teacher's doubts",
    question="Why do soft answers teach more than right answers?",
    part="Teach it cheaply", order=27,
    sources=("architectures", "lecture", "Hinton 2015, arXiv:1503.02531", "Kim and Rush 2016, arXiv:1606.07947",
             "Jiao 2019, arXiv:1909.10351"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.distil.logits:soften", "engine.distil.logits:loss", "engine.distil.run:Student",
          "engine.distil.layers:alignment", "engine.distil.synthetic:write"),
    looks=frozenset({"place", "look", "way"}), bounded_by={}, facts=facts, marks=marks, glossary=GLOSSARY,
    seconds=600, trains=True,
    footnote="* As reported: frames of speech told right with 3% of the data, hard → soft; with all of it 58.9%.",
)
# fmt: on
