"""Guess, then check: a small model says some words ahead, and one pass of the large one says which of them hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import param

from engine.recording import Recording, note, site, step, tap
from engine.speculate.bild import LOSSLESS
from engine.speculate.rounds import Round, check_tree, little_rounds, rounds
from engine.speculate.seeds import chat
from engine.toyland import story
from lessons.guess_trees import FINAL, drawn, live_cell, show_round, show_tree, tree_view, your_cell
from lessons.guessing import BILD, LOOKUP, SMALL, Pair, Plain, drafter, pair
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import choice, name_ids
from lessons.odds import (
    SCENES_OF_ODDS,
    denser_claim,
    expected_claim,
    law_claim,
    lengths_of,
    show_places,
    shown,
    try_lengths,
)
from lessons.texts import LIGHTHOUSE
from lessons.views import Curves, Line, Number, Numbers, Saying, Sayings, of

ALONE = site("tree.alone", "passes that the paths take, each alone")
TOGETHER = site("tree.together", "passes that they take as a tree")
APART = site("tree.apart", "largest difference of a logit between the two", low=0.0)
OURS, LOOP = "guess", "plain"
SAID = site("said.words", "the new words so far", grows="word")
PASSES = site("said.passes", "passes of the target so far", low=0.0)
SECONDS = site("said.seconds", "seconds so far, the prompt left out", unit="s", low=0.0)
COUNT = site("said.count", "new words so far, the prompt’s own left out")
SAME = site("said.same", "words that are those of the plain loop, of all so far", low=0.0, high=1.0)
ASKED = site("said.asked", "guesses that were asked for", symbol="γ")
RATIO = site("said.ratio", "words a pass of the target so far")

BREAD = "Bread is one of the oldest foods in the world."
LECTURE = "It > is > a > good\nIt > is > the\nIt > has > to > be"
# Toyland has none of the lecture’s words: the same tree, about a question that it can answer.
ATTIC = "anna is in the attic. the red ball is in the cellar. where is the red ball?"
CELLAR = "in > the > cellar > now\nin > the > attic\nin > a > box > now"
PASSAGE = LIGHTHOUSE[LIGHTHOUSE.index("The tide was") : LIGHTHOUSE.index(" Inside")]
ASKS = {
    "A fox who cannot sleep": ("fox", chat("Write a short story about a fox who cannot sleep.")),
    "Say a text again": ("again", chat(f"Repeat this text word by word: {PASSAGE}")),
    "Your own": ("own", ""),
}
TOY_ASKS = {"fox": 8, "again": 5}  # seeds of Toyland’s stories
OWN, ROOM = "own", 256  # tokens of a text at most


class Turn(Knobs):
    model = choice()
    guesser: param.Selector = param.Selector(
        default=SMALL,
        objects={"A small model": SMALL, "Words looked up in the text": LOOKUP, "Big little decoder: lossy": BILD},
        label="Who guesses", doc="BiLD keeps the small model’s words where it is sure: not lossless.",
    )  # fmt: skip
    length = param.Integer(3, bounds=(1, 8), label="Length or depth", doc="Guesses in a row; of a tree, its depth.")
    width = param.Integer(2, bounds=(1, 3), label="Width of the tree", doc="1: a chain. Looked up words are a chain.")
    adaptive = param.Boolean(False, label="Adaptive length", doc="A chain, as long as pays.")
    temperature = param.Number(0.0, bounds=(0.0, 1.5), step=0.1, label="Temperature", doc="Of p and q alike.")
    ask: param.Selector = param.Selector(
        default="fox", objects={k: v[0] for k, v in ASKS.items()}, label="Asked", doc="Prompt."
    )
    own = param.String("Once upon a time", label="Your own prompt", doc="Read when Asked is “Your own”.")
    tree = param.String(LECTURE, label="Your tree", doc="A path a line, its words with > between them.")
    before = param.String(BREAD, label="Text before the tree", doc="What the tree’s first words follow.")
    tokens = param.Integer(32, bounds=(16, 64), label="Words written", doc="New tokens.")
    bits: param.Selector = param.Selector(
        default="float32", objects={"32 bits": "float32", "16 bits": "bfloat16"}, label="Numbers",
        doc="In 16 bits a check costs less, and a tie of two words may fall the other way.",
    )  # fmt: skip
    fallback = param.Number(0.3, bounds=(0.0, 1.0), step=0.05, label="BiLD: falls back below", doc="Its confidence.")
    rollback = param.Number(3.0, bounds=(0.0, 10.0), step=0.5, label="BiLD: rolls back above", doc="Surprise in nats.")


def run(knobs: Turn) -> None:
    both = pair(knobs.model, knobs.guesser, dtype=knobs.bits)
    bild = knobs.guesser == BILD and both.small is not None
    looks = both.small is None
    who = "earlier in the text" if looks else "the little toy" if both.toy else "a small draft"
    note(who=who, missing=both.missing, lossless=LOSSLESS or not bild, temperature=knobs.temperature, looks=looks)
    pruned = _tree(knobs, both)
    ids = _prompt(knobs, both)
    new, plain = _write(knobs, both, ids, bild=bild, first=pruned + 1)
    show_places(both, [*ids, *new], len(ids), temperature=knobs.temperature or 1.0)
    try_lengths(both, ids, temperature=knobs.temperature, plain=plain)


def _tree(knobs: Turn, both: Pair) -> int:
    """The learner's tree; returns its last step."""
    text = ATTIC if both.toy and knobs.before == BREAD else knobs.before
    tree = CELLAR if both.toy and knobs.tree == LECTURE else knobs.tree
    ids = both.tokenizer.prompt(text)
    if len(ids) > ROOM:
        raise ValueError(f"Text before the tree has {len(ids)} tokens; at most {ROOM} fit.")
    draft = drawn(tree, both.tokenizer, follows=text, toy=both.toy)
    checked = check_tree(both.target, ids, draft, temperature=knobs.temperature, seed=1)
    sure = 1.0 if knobs.temperature else 0.0  # a chosen word: p alone says how often it stays
    for name, value in ((ALONE, checked.passes), (TOGETHER, 1), (APART, checked.off)):
        tap(name, value, "")
    grown, pruned = show_tree(both.tokenizer, ids[-1], len(ids), draft, checked, q=sure)
    said = [draft.tokens[node] for node in checked.verdict.accepted]
    note(tree={
        "guesses": len(draft), "accepted": len(said), "paths": checked.passes, "off": checked.off, "grown": grown,
        "pruned": pruned, "text": text, "said": both.tokenizer.decode([*said, checked.verdict.token]).strip(),
        "instead": checked.verdict.corrected,
    })  # fmt: skip
    return pruned


def _prompt(knobs: Turn, both: Pair) -> list[int]:
    if knobs.ask == OWN:
        ids = both.tokenizer.prompt(knobs.own)
    elif both.toy:
        ids = both.tokenizer.prompt(story(seed=TOY_ASKS[knobs.ask], tokens=48))
    else:
        ids = both.tokenizer.prompt(dict(ASKS.values())[knobs.ask])
    if not 2 <= len(ids) <= ROOM:
        raise ValueError(f"Your own prompt has {len(ids)} tokens; from 2 to {ROOM} fit.")
    return list(ids)


def _write(knobs: Turn, both: Pair, ids: list[int], *, bild: bool, first: int) -> tuple[list[int], float]:
    """Rounds of guessing and checking, the plain loop in turns with them; the new words, and its seconds for each."""
    more: dict[str, Any] = {"steps": knobs.tokens, "temperature": knobs.temperature, "seed": 1}
    if bild:
        turns = little_rounds(both.target, both.small, ids, steps=knobs.tokens, fallback=knobs.fallback,
                              rollback=knobs.rollback, most=knobs.length)  # fmt: skip
    else:
        guesser = drafter(both, length=knobs.length, width=knobs.width, adaptive=knobs.adaptive)
        turns = rounds(both.target, ids, guesser=guesser, **more)
    loop = Plain(both, ids, **more)
    told: list[Round] = []
    said: list[int] = []
    measure: list[int] = []
    seconds = plain = 0.0
    at = first
    for one in turns:
        words, took = loop.say(len(one.new))
        last = [*ids, *said][-1]
        place = len(ids) + len(said)
        said, measure = said + one.new, measure + words
        if told:  # the prompt's own pass is the same for both
            seconds, plain = seconds + one.seconds, plain + took
        for stage in range(FINAL) if len(one.draft) else (FINAL - 1,):
            if len(one.draft) or len(said) < knobs.tokens:  # one last word that needs no guess leaves the tree as it is
                show_round(both.tokenizer, last, place, one, stage=stage)
            if stage == FINAL - 1:
                _figures(both, one, words, passes=len(told) + 1, seconds=seconds, plain=plain, said=said, loop=measure)
            step()
            at += 1
        told.append(one)
    checks = told[1:]
    note(written={
        "first": first, "last": at - 1, "passes": len(told), "words": len(said), "seconds": seconds, "plain": plain,
        "same": sum(a == b for a, b in zip(said, measure, strict=True)), "checks": len(checks),
        "accepted": sum(len(c.verdict.accepted) for c in checks), "guessed": sum(len(c.draft) for c in checks),
        "looked": sum(len(c.verdict.accepted) + len(c.verdict.rejected) for c in checks),
        "rows": float(np.mean([c.rows for c in checks])), "gave": (len(said) - 1) / len(checks),
        "draft_seconds": sum(c.draft_seconds for c in checks),
    }, total_steps=at + len(shown(ids, said)) + len(lengths_of(both)))  # fmt: skip
    return said, plain / (len(said) - 1)


def _figures(both: Pair, one: Round, words: list[int], *, passes: int, seconds: float, plain: float, said: list[int],
             loop: list[int]) -> None:  # fmt: skip
    new = {OURS: (one.new, passes, seconds), LOOP: (words, len(loop), plain)}
    for name, (ids, calls, took) in new.items():
        name_ids(both.tokenizer, np.array(ids))
        tap(SAID, np.array(ids, np.int32), "word", by=name)
        tap(PASSES, calls, "", by=name)
        tap(SECONDS, took, "", by=name)
    tap(COUNT, len(said) - 1, "")
    tap(SAME, sum(a == b for a, b in zip(said, loop, strict=True)) / len(said), "")
    tap(RATIO, len(said) / passes, "")
    tap(ASKED, float(len(one.draft)) if np.isnan(one.asked) else one.asked, "")


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    tree, written, places, lengths = (meta[name] for name in ("tree", "written", "places", "lengths"))
    after = written["last"] + 1
    gain = written["plain"] / written["seconds"]
    return {
        "name": meta["model"]["name"], "who": meta["who"], "missing": meta["missing"] and f"({meta['missing']})",
        "before": tree["text"], "guesses": tree["guesses"], "paths": tree["paths"], "held": tree["accepted"],
        "said": tree["said"], "off": tree["off"], "grown": tree["grown"], "pruned": tree["pruned"],
        "first": written["first"] + 1, "written": written["last"], "passes": written["passes"],
        "words": written["words"], "same": written["same"], "accepted": written["accepted"] / written["checks"],
        "gave": written["gave"], "guessed": written["guessed"] / written["checks"], "seconds": written["seconds"],
        "plain": written["plain"], "gain": gain, "verdict": _pays(recording)[0],
        "place": after + places["one"], "chance": places["chance"], "law_off": places["off"],
        "alpha": lengths["alpha"], "cost": lengths["cost"], "thin": lengths["intensity"][0],
        "dense": lengths["intensity"][1], "lengths": recording.steps - 1, "most": lengths["most"],
    }  # fmt: skip


def _pays(recording: Recording) -> tuple[str, str]:
    """Whether it was quicker, and why or why not, from what was measured."""
    w = recording.meta["written"]
    gain, checks = w["plain"] / w["seconds"], w["checks"]
    check = (w["seconds"] - w["draft_seconds"]) / checks / (w["plain"] / (w["words"] - 1))
    drafts = w["draft_seconds"] / checks / (w["plain"] / (w["words"] - 1))
    why = (
        f"A check of {w['rows']:.0f} rows took {check:.1f} plain steps, its guesses {drafts:.1f}, "
        f"and gave {w['gave']:.1f} words."
    )
    word = "a gain" if gain > 1.05 else "a loss" if gain < 0.95 else "neither gain nor loss"
    return word, why


def marks(recording: Recording) -> list[Mark]:
    f = facts(recording)
    return [Mark(f["pruned"], "your tree is pruned"), Mark(f["written"], "the words are written"),
            Mark(f["written"] + 1, "p and q, place by place"), Mark(f["lengths"], "all lengths tried")]  # fmt: skip


def _words(recording: Recording) -> Finding:
    meta, w = recording.meta, recording.meta["written"]
    shown, filled = f"{w['same']} of {w['words']}", f"{w['same']} of {w['words']} words alike"
    if not meta["lossless"]:
        return Finding(shown, "untestable", "The big little decoder is at work, which makes no such promise.", filled)
    if meta["temperature"]:
        return Finding(shown, "untestable", "Above temperature 0 both draw, each with dice of its own.", filled)
    if w["same"] == w["words"]:
        return Finding(shown, "agrees", "", filled)
    why = "Two words were nearly tied, and a pass over several rows rounds otherwise than one over a single row."
    return Finding(shown, "differs", why, filled)


def _paths(recording: Recording) -> Finding:
    tree = recording.meta["tree"]
    exact = recording.meta["model"]["dtype"] == "float32"
    close = tree["off"] < (2e-3 if exact else 1.0)
    why = "" if close else "More than rounding."
    if not exact and close:
        why = "Numbers of 16 bits round that much."
    return Finding(f"{tree['off']:.1e}", "agrees" if close else "differs", why,
                   f"1 pass for {tree['paths']} paths, logits apart by {tree['off']:.1e}")  # fmt: skip


def _quicker(recording: Recording) -> Finding:
    w = recording.meta["written"]
    gain = w["plain"] / w["seconds"]
    filled = f"{w['plain']:.2f} s / {w['seconds']:.2f} s"
    return Finding(f"{gain:.2f}×", "agrees" if gain > 1.05 else "differs", _pays(recording)[1], filled)


def _lossy(recording: Recording) -> Finding:
    meta, w = recording.meta, recording.meta["written"]
    if meta["lossless"]:
        return Finding("–", "untestable", "Another guesser is at work: choose it, and compare its words.")
    other = w["words"] - w["same"]
    why = "Here it said the same by luck." if not other else ""
    return Finding(f"{other} of {w['words']} words differ", "agrees" if other else "differs", why,
                   f"{w['plain']:.2f} s / {w['seconds']:.2f} s")  # fmt: skip


LEVIATHAN = "lecture; Leviathan 2022, 2211.17192"
# fmt: off
CLAIMS = (
    Claim("Accepted words keep the target’s distribution", LEVIATHAN, "min(p, q) + (1 − Σ min(p, q)) · rest = p",
          "exactly p", law_claim),
    Claim("At temperature 0 the words are those of the plain loop", LEVIATHAN, "words alike", "all", _words),
    Claim("Every path of a tree reads as if it were alone", "SpecInfer, 2305.09781", "max |logits − path by path|", "0",
          _paths),
    Claim("A check gives (1 − α^(γ+1)) / (1 − α) words", LEVIATHAN, "measured against formula, γ = 1 to 8",
          "on average", expected_claim),
    Claim("Intensity grows with the number of guesses", "lecture", "FLOPs / bytes of a check, counted", "grows",
          denser_claim),
    Claim("It is quicker at batch 1", LEVIATHAN, "seconds of the plain loop / seconds", "2 to 3× *", _quicker),
    Claim("BiLD is quicker and nearly as good, but not lossless", "BiLD, 2302.07863", "words that differ",
          "about 2× *", _lossy),
)

BEATS = (
    Beat(
        "Reading ten words takes a large model hardly longer than reading one: its weights must come from memory "
        "either way. So let somebody **guess** ahead. ==This tree|tree== holds {guesses} guesses at what follows "
        "“{before}” Each column is one place of the text, and has one [[position id]].",
        scene="tree", step=4, play=True, focus="tree",
    ),
    Beat(
        "{name} reads them all in **one pass**. ==The mask|tree== shows each word the text, its own path and itself: "
        "each path reads as if alone: logits differ by {off:.0e}. {held} guesses hold; the rest is pruned, and the "
        "target adds a word of its own: “{said}”",
        scene="tree", step=9, play=True, focus="tree", do=Do("Write a tree of your own", knob="tree"),
    ),
    Beat(
        "Now for a whole text. Guesses come from {who}, checks from {name}, ==round by round|live==: grown, checked, "
        "pruned. {missing} The first rejected word ends a path; the target’s own word stands in for it.",
        scene="write", step="first", focus="live",
        predict=Predict("How many guesses will one check accept, on average?", (0.3, 0.7, 1.2, 1.8), "accepted"),
    ),
    Beat(
        "{accepted:.1f} of {guessed:.1f}. With the target’s own word, {words} words took {passes} of its passes. Did "
        "guessing change them? ==The plain loop|texts== says the same text beside it, one pass a word: {same} of "
        "{words} are the same.",
        scene="write", step="written", play=True, focus="texts",
    ),
    Beat(
        "Both took turns on this machine: {seconds:.2f} s, the plain loop {plain:.2f} s. That is {verdict}, {gain:.2f} "
        "times as fast. Fewer passes alone save nothing: a check of several rows costs more than a step, guesses cost "
        "too, and most may be wrong. Where a text repeats itself, looking words up pays.",
        scene="write", step="written", focus="clock", do=Do("Ask for a text again, and look words up", knob="ask"),
    ),
    Beat(
        "With a temperature, words are drawn. A guess drawn from q is kept with chance min(1, p/q). Where ==q says too "
        "much|laws==, it is rejected, and replaced from ==what q left of p|rest==. Together that is p, to "
        "{law_off:.0e}. Temperature must bend **both** p and q.",
        scene="place", step="place", focus="laws", do=Do("Raise the temperature", knob="temperature"),
    ),
    Beat(
        "If each guess holds with chance α = {alpha:.2f}, a check gives ==(1 − α^(γ+1)) / (1 − α) words|lengths==. "
        "Longer drafts pay less and less, while each ==guess costs|speed==. The check’s own work gets "
        "==denser|dense==: {thin:.1f} FLOPs a byte without guesses, {dense:.1f} with {most}.",
        scene="lengths", step="lengths", play=True, focus="lengths", do=Do("Let it adapt", knob="adaptive"),
    ),
    Beat(
        "Break it. Guess nonsense: nothing is accepted, yet every pass still gives one right word. Or choose the "
        "**big little decoder**: it keeps what a small model is sure of, and [[BiLD]] is *not lossless*; nor is "
        "Medusa’s typical acceptance. Which words change?",
        scene="write", step="written", focus="texts", do=Do("Choose who guesses", knob="guesser"),
    ),
)
# fmt: on

GLOSSARY = {
    "position id": "The number of a place in the text, by which attention knows how far two words are apart. Words "
    "that stand for the same place share it.",
    "BiLD": "Big Little Decoder: the small model writes until it is unsure; the big one takes words back only where it "
    "finds them too unlikely. What comes out is the text of neither.",
}


def _saying(by: str, label: str, colour: str) -> Saying:
    figures = (Number("passes", of(PASSES, by=by)), Number("seconds", of(SECONDS, by=by), format=".2f"))
    return Saying(label, of(SAID, by=by), figures, colour=colour)


# fmt: off
SCENES = (
    Scene(
        "tree",
        (
            tree_view("tree", "Your guesses, read in one pass", your_cell),
            Numbers(
                (Number("Passes as a tree", of(TOGETHER), colour="value"), Number("Path by path", of(ALONE)),
                 Number("Largest difference of a logit", of(APART), format=".1e")),
                name="same", title="The same logits, measured",
            ),
        ),
    ),
    Scene(
        "write",
        (
            tree_view("live", "This round", live_cell),
            Sayings((_saying(LOOP, "The plain loop", "ink"), _saying(OURS, "Guess, then check", "value")),
                    name="texts", title="Word by word the same?"),
            Curves(
                (Line("guess, then check", of(COUNT), "value", x=of(SECONDS, by=OURS)),
                 Line("the plain loop", of(COUNT), "ink", x=of(SECONDS, by=LOOP))),
                name="clock", title="Words over time, both taking turns", span=8, x_label="seconds", format=".0f",
            ),
            Numbers(
                (Number("Words a pass", of(RATIO), format=".2f", colour="value"),
                 Number("Guesses in a round", of(ASKED), colour="query"),
                 Number("Words alike", of(SAME), format=".0%")),
                name="figures", title="So far", span=4,
            ),
        ),
    ),
    *SCENES_OF_ODDS,
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {name: {} for name in ("tree.*", "guess.*", "said.*", "place.*", "lengths.*")}


# fmt: off
LESSON = Lesson(
    slug="speculate", title="Guess, then check",
    question="How does a small model speed up a big one without changing its words?", part="Several tokens at a time",
    order=25, sources=("lecture",), knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.speculate.chain:verify", "engine.speculate.tree:verify", "engine.speculate.tree:tree_mask",
          "engine.speculate.loop:_show", "engine.speculate:residual"),
    snapshots={"Drawn at temperature 1": {"temperature": 1.0}, "The big little decoder": {"guesser": BILD}},
    facts=facts, marks=marks, glossary=GLOSSARY, step_word="step", seconds=240,
    footnote="* On other machines and far larger models, as reported; BiLD’s on its own tasks.",
)
# fmt: on
