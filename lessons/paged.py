"""A page table for thoughts: many texts share one memory in blocks, where a stretch for each would waste most of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine.caches.full import Full
from engine.caches.reserved import KINDS, Request
from engine.caches.scheduler import serve
from engine.generate import generate
from engine.recording import Recording, note, record
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, load
from lessons.paging import (
    DROP_TOKENS,
    FAMILIES,
    FREE,
    HELD,
    POINTERS,
    POOL,
    REFERENCES,
    RUNNING,
    SHARE,
    SLOTS,
    STATES,
    TABLES,
    TAKEN,
    USED,
    Shown,
    Ways,
    lose_words,
)  # fmt: skip
from lessons.views import Arithmetic, Blocks, Curves, Line, Number, Numbers, Stretches, knob, of

PROMPT_TOKENS = 64  # of a longer prompt, the beginning is read

PROMPT = "Alan Turing is a computer scientist and mathematician renowned"
OTHERS = (
    "Artificial Intelligence is the future of technology", "The capital of France is", "Water boils at",
    "Once upon a time there was a", "Bread rises because", "The key turned on the first try and",
    "To keep a secret, never",
)  # fmt: skip
SYSTEM = "You are a helpful assistant. Answer in plain words. "
TOY_PROMPT = "the orange shell is in the barn . where is"
TOY_OTHERS = (
    "tess is in the beach .", "dan goes to the mill", "sam is in the cellar . where is sam ?", "night falls .",
    "will is in the bridge", "quinn takes the blue ring", "ella is in the cave .",
)  # fmt: skip
TOY_SYSTEM = "one day in the kitchen . night falls . "
WAYS = {"max": "the longest allowed", "pow2": "a power of two", "oracle": "exactly its length"}
ARRIVALS = {"One after the other": "queue", "All at once": "together", "In two rushes": "rushes"}


class Turn(Knobs):
    model = choice()
    prompt = param.String(PROMPT, label="First request", doc="What A begins with.")
    requests = param.Integer(6, bounds=(2, 8), label="Requests", doc="How many people ask.")
    arrivals: param.Selector = param.Selector(
        default="queue", objects=dict(ARRIVALS), label="Arrivals", doc="When they come."
    )
    copies = param.Integer(2, bounds=(1, 3), label="Answers to B", doc="More than one: it forks after its prompt.")
    shared = param.Boolean(False, label="Shared prompt", doc="The same instruction stands before every request.")
    steps = param.Integer(16, bounds=(4, 32), label="Longest answer", doc="Answers are half as long at least.")
    memory = param.Integer(64, bounds=(32, 128), step=16, label="Memory", doc="Slots in all.")
    block: param.Selector = param.Selector(
        default=4, objects=[1, 2, 4, 8, 16], label="Block size", doc="Slots of one block."
    )
    preempt: param.Selector = param.Selector(
        default="recompute", objects={"read again later": "recompute", "swapped out": "swap"}, label="Sent away",
        doc="What becomes of a text for which no block is left.",
    )  # fmt: skip
    longest = param.Integer(32, bounds=(16, 64), label="Longest allowed", doc="What a reservation must be ready for.")
    reserve: param.Selector = param.Selector(
        default="max", objects={label: name for name, label in WAYS.items()}, label="Reserved",
        doc="How long a stretch is kept for each text.",
    )  # fmt: skip
    evict: param.Selector = param.Selector(
        default="random", objects={"anywhere": "random", "the oldest": "oldest"}, label="Words dropped",
        doc="Which words the last text loses, one by one.",
    )  # fmt: skip


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model)
    asked = make_requests(knobs, tokenizer)
    blocks = knobs.memory // knobs.block
    slots = blocks * knobs.block
    pages = Shown(blocks, block_size=knobs.block, requests=asked, tokenizer=tokenizer)
    for request in asked:
        pages.check(request.tokens)
    limits = {
        "max": [min(slots, max(knobs.longest, r.tokens)) for r in asked],
        "pow2": [min(slots, 1 << (r.tokens - 1).bit_length()) for r in asked],
        "oracle": [r.tokens for r in asked],
    }
    ways = {
        way: [dataclasses.replace(request, limit=limit) for request, limit in zip(asked, each, strict=True)]
        for way, each in limits.items()
    }
    note(slots=slots, blocks=blocks, block=knobs.block, longest=max(limits["max"]), copies=knobs.copies)
    note(texts=len(pages.ends), tokens=sum(pages.ends.values()))
    service = serve(model, pages, asked, preempt=knobs.preempt, beside=Ways(ways, slots=slots))
    first = asked[0]
    with record(keep={}):  # of its own, and thrown away: these steps are not part of the picture
        alone = list(generate(model, list(first.prompt), steps=first.steps, cache=Full()))
    note(same=alone == service.texts["A"], preempted=len(service.preempted), served=pages.t)
    lose_words(model, pages, [*first.prompt, *alone][: min(DROP_TOKENS, slots)], oldest=knobs.evict == "oldest")


def make_requests(knobs: Turn, tokenizer: Any) -> list[Request]:
    """Who asks what, when, and how long the answer will be: between half of the longest and all of it."""
    toy = knobs.model == TOY
    own = TOY_PROMPT if toy and knobs.prompt == PROMPT else knobs.prompt
    texts = (own, *(TOY_OTHERS if toy else OTHERS))[: knobs.requests]
    before = (TOY_SYSTEM if toy else SYSTEM) if knobs.shared else ""
    rng = np.random.default_rng(1)
    lengths = rng.integers(-(-knobs.steps // 2), knobs.steps + 1, len(texts))
    when = {"queue": range(len(texts)), "together": [0] * 8, "rushes": [0] * (len(texts) // 2) + [6] * 8}
    return [
        Request(
            chr(65 + i), tuple(tokenizer.prompt(before + text)[:PROMPT_TOKENS]), int(lengths[i]),
            2 * when["queue"][i] if knobs.arrivals == "queue" else when[knobs.arrivals][i],
            knobs.copies if i == 1 else 1,
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip


def facts(recording: Recording) -> dict[str, Any]:
    meta, served = recording.meta, recording.meta["served"]
    running = {way: recording.track(RUNNING, way=way) for way in ("paged", *WAYS)}
    uses = {way: recording.stack("memory.use", strategy="reserved", way=way) for way in WAYS}
    counts = recording.stack(RUNNING, way="paged")[:served]
    ends = {way: 1 + max(at for at, row in track.rows() if row > 0 and at < served) for way, track in running.items()}
    drops = recording.happened("pages.drop")
    freeing = next((i for i, e in enumerate(drops) if e.fields["freed"]), len(drops) - 1)
    copies = recording.happened("block.copy")
    forks = recording.happened("serve.fork")
    away = recording.happened("serve.preempt")
    whole = {way: _used(use).sum() / max(1, _taken(use).sum()) for way, use in uses.items()}
    paged = recording.stack("memory.use", strategy="paged")[:served]
    return {
        **{key: meta[key] for key in ("slots", "blocks", "block", "longest", "copies", "texts", "preempted")},
        **{f"most_{way}": int(track.stack()[:served].max()) for way, track in running.items()},
        **{f"share_{way}": float(value) for way, value in whole.items()},
        **{f"end_{way}": value for way, value in ends.items()},
        "share_paged": float(_used(paged).sum() / max(1, _taken(paged).sum())),
        "faster": ends["max"] / ends["paged"],
        "waste": float((paged[:, KINDS.index("internal")] / np.maximum(counts, 1)).max()),
        "busiest": int(counts.argmax()),
        "grown": min(5, served - 1),
        "fork": forks[0].step if forks else 0,
        "copy": copies[0].step if copies else 0,
        "spared": sum(e.fields["spared"] for e in recording.happened("serve.admit")),
        "sharing": int(recording.stack("serve.shared").max()),
        "away": away[0].step if away else int(counts.argmax()),
        "drop_first": drops[0].step - 1,
        "drop_free": drops[freeing].step,
        "until_free": freeing + 1,
        "drop_text": len(drops) + 1,
        "last": recording.steps - 1,
    }


def _used(use: np.ndarray) -> np.ndarray:
    return use[:, KINDS.index("used")]


def _taken(use: np.ndarray) -> np.ndarray:
    return use[:, [KINDS.index(kind) for kind in ("used", "reserved", "internal")]].sum(1)


def marks(recording: Recording) -> list[Mark]:
    f = facts(recording)
    named = [("copy", "a shared block is copied"), ("end_paged", "paging is done")]
    found = [Mark(min(f[key], f["last"]), label) for key, label in named if f[key]]
    away = [Mark(f["away"], "a text is sent away")] if f["preempted"] else []
    return [*found, *away, Mark(f["drop_first"], "words are dropped")]


def _reservations(recording: Recording) -> Finding:
    f = facts(recording)
    low, high = (pick(f[f"share_{way}"] for way in WAYS) for pick in (min, max))
    filled = ", ".join(f"{label} {f[f'share_{way}']:.0%}" for way, label in WAYS.items())
    inside = 0.1 < low < 0.5 and high < 0.5
    why = "How much is wasted is decided by the limit: answers here are nearer to it than real ones, in a tiny memory."
    return Finding(f"{low:.0%} to {high:.0%}", "agrees" if inside else "differs", "" if inside else why, filled)


def _paging(recording: Recording) -> Finding:
    f = facts(recording)
    better = f["share_paged"] > f["share_max"]
    why = "" if better else "With blocks this large a text leaves more of its last one empty than a stretch wastes."
    filled = f"words held / slots taken, over all steps, blocks of {f['block']}"
    return Finding(f"{f['share_paged']:.0%}", "agrees" if better else "differs", why, filled)


def _below_a_block(recording: Recording) -> Finding:
    f = facts(recording)
    below = f["waste"] < f["block"]
    why = "" if below else "A text left a whole block empty."
    return Finding(f"{f['waste']:.2f}", "agrees" if below else "differs", why, f"most in any step < {f['block']}")


def _throughput(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['end_max']} / {f['end_paged']} steps for all {f['texts']} texts"
    inside = 2 <= f["faster"] <= 4
    why = "" if inside else "Counted in steps, in a tiny memory; what reservation loses is decided by its limit."
    return Finding(f"{f['faster']:.1f}×", "agrees" if inside else "differs", why, filled)


def _sharing(recording: Recording) -> Finding:
    shared, held = (
        recording.stack("serve.shared"),
        recording.stack("paged.held")[: len(recording.stack("serve.shared"))],
    )
    if not shared.any():
        return Finding("–", "untestable", "No two texts share a word in this run: switch the shared prompt on.")
    saved = shared.sum() / (shared.sum() + held.sum())
    filled = f"{shared.sum():,} of {shared.sum() + held.sum():,} words, over all steps, needed no slot"
    close = 0.06 <= saved <= 0.1
    why = "" if close else "It depends on how much of each text is prompt, and on how many texts have the same one."
    return Finding(f"{saved:.1%}", "agrees" if close else "differs", why, filled)


def _same_words(recording: Recording) -> Finding:
    same = recording.meta["same"]
    why = "" if same else "Sums in another order can tip a word that two candidates are equally likely to be."
    return Finding("the same" if same else "other words", "agrees" if same else "differs", why, "A alone = A among all")


KWON = "Kwon 2023, 2309.06180"
# fmt: off
CLAIMS = (
    Claim(
        "Reserving a fixed stretch for each request wastes memory", f"lecture; {KWON}", "words held / slots kept",
        "20.4% to 38.2% *", _reservations,
    ),
    Claim("With blocks, almost all memory taken holds a word", KWON, "words held / slots taken", "96.3% *", _paging),
    Claim(
        "Less than one block is wasted for each text", KWON, "empty slots of used blocks / texts", "< one block",
        _below_a_block, "slots",
    ),
    Claim(
        "So more texts run at once, and all are done sooner", KWON, "steps reserved / steps paged", "2 to 4× *",
        _throughput,
    ),
    Claim(
        "Several answers to one prompt share its memory", KWON, "words shared / all words", "6.1% to 9.8% *", _sharing,
    ),
    Claim("Where the words lie changes nothing that is said", KWON, "A alone = A among all", "exact", _same_words),
)
# fmt: on


def entry_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """Where the words of one entry lie: from the number of a word to a block and a place in it, and who held it."""
    i, entry, size = at["sequence"], at.get("entry", 0), recording.meta["block"]
    rows = [(when, int(row[i, entry])) for when, row in recording.track(TABLES).rows()]
    held = [(when, block) for when, block in rows if block >= 0]
    lines = [
        (f"words {entry * size} to {(entry + 1) * size - 1} of this text", f"entry {entry} of its table"),
        (f"word n → entry n // {size}, place n mod {size}", f"{entry * size} → {entry}, 0"),
    ]
    for block in dict.fromkeys(block for _, block in held):
        steps = [when for when, other in held if other == block]
        lines.append((f"steps {steps[0]} to {steps[-1]}", f"block {block}"))
    address = f"{held[-1][1]} · {size} + (n mod {size})" if held else "nowhere"
    return Arithmetic(
        title=f"entry {entry} of a page table",
        lines=(*lines, ("slot in memory", address)),
        note="The words of a block lie side by side. Where the next block lies does not matter: the table knows.",
        values={"block": float(held[-1][1]) if held else -1.0},
    )


# fmt: off
BEATS = (
    Beat(
        "Many people talk to one model. Every word leaves a key and a value, and nobody knows how long a talk will "
        "get. So memory is cut into [[blocks]] of {block} slots. Each text has a ==page table|pages==: which block "
        "holds its next few words? A’s lie anywhere, and the arrows find them.", scene="pages", step=0, focus="pages",
        notes="Compare with virtual memory: pages, a page table, a free list.",
    ),
    Beat(
        "Step by step. Every running text writes one word, into the next slot of its last block. Only when that is "
        "full does it take another from ==the free list|pages==. ==The two laws|laws== hold at every step. Click an "
        "entry to see where its words lie.", scene="pages", step="grown", play=True, focus="pages",
        do=Do("Open an entry or a block", cell="pages"),
    ),
    Beat(
        "Before page tables, each request got one long stretch, ready for the longest answer allowed: {longest} slots. "
        "The same memory of {slots} slots, the same {texts} texts: reserved, {most_max} of them fit at once.",
        scene="pages", step="grown",
        predict=Predict("How many run at once with page tables?", (2, 4, 6, 8), "most_paged", format=".0f"),
    ),
    Beat(
        "{most_paged}. ==Hatched slots|memory== are kept for words that never come; whoever finds no long stretch "
        "waits outside. Of what is taken, {share_max:.0%} holds a word; with blocks, {share_paged:.0%}. The limit "
        "decides: turn **Longest allowed**, or **Reserved**, and watch ==the curves|shares==.",
        scene="waste", step="busiest", play=True, focus="memory",
    ),
    Beat(
        "Someone wanted {copies} answers to B. Nothing is copied: a [[fork]] B′ points to the same blocks, and each "
        "counts its readers: ×2. Only when one of them writes into a shared block does it get its own: "
        "==copy-on-write|pages==.", scene="pages", step="copy", focus="pages",
    ),
    Beat(
        "Most services put the same instruction before every request. Switch **Shared prompt** on: full blocks with "
        "the same beginning are found by a [[hash]] and shared. In this run, {spared} words did not have to be read "
        "again.",
        scene="pages", step="busiest", focus="pages", do=Do("Switch the shared prompt on", knob="shared"),
    ),
    Beat(
        "Could it just forget a few words, as in lesson 13? One last text loses its words, one by one. "
        "==The block stays taken|dropping== until its last word goes: {until_free} had to go before the first block "
        "came free. Memory is given out in blocks, so drop in blocks.",
        scene="drop", step="drop_free", play=True, focus="dropping",
    ),
    Beat(
        "Break it. Shrink **Memory** until a text is sent away, and later has to be read again. Make it smaller than "
        "one request. Try blocks of 1 and of 16: what does each cost? Can you find a setting where reserving wins?",
        scene="pages", step="away", do=Do("Shrink the memory", knob="memory"),
    ),
)

GLOSSARY = {
    "blocks": "Equal pieces of memory, each with room for the keys and values of a few tokens, in every layer.",
    "fork": "A second answer that goes on from the same words: it starts with a copy of the page table, not of memory.",
    "hash": "A short fingerprint of a block’s words and of all before it: equal fingerprints, equal beginnings.",
}


def _pages_view(name: str, title: str, **more: Any) -> Blocks:
    return Blocks(
        name=name, title=title, tensor=of(TABLES), states=of(STATES), families=of(FAMILIES), slots=of(SLOTS),
        tokens=of("pages.tokens"), refs=of("pages.refs"), free=of("pages.free"), cell=entry_cell, **more,
    )


COLOURS = {"paged": "recent", "max": "alarm", "pow2": "key", "oracle": "recomputed"}
NAMES = {"paged": "blocks", **WAYS}


def _lines(tensor: str) -> tuple[Line, ...]:
    return tuple(Line(label, of(tensor, way=way), colour=COLOURS[way]) for way, label in NAMES.items())


SCENES = (
    Scene(
        "pages",
        (
            _pages_view("pages", "Who holds which block"),
            Numbers(
                name="laws", title="Two laws, counted anew at every step",
                numbers=(
                    Number("blocks in use", of(USED), colour="recent"), Number("+ blocks free", of(FREE)),
                    Number("table entries", of(POINTERS), colour="recent"), Number("= sum of all ×", of(REFERENCES)),
                    Number("slots that hold a word", of(HELD)), Number("of slots taken", of(TAKEN)),
                ),
            ),
        ),
    ),
    Scene(
        "waste",
        (
            Stretches(
                name="memory", title="One memory, reserved and in blocks", note="the same texts, the same colours",
                tensor=of("memory.stretches", way=knob("reserve")), families=of(FAMILIES),
                states=of(STATES), slots=of(POOL), tables=of(TABLES), codes=of(SLOTS),
            ),
            Curves(
                name="shares", title="Of the slots taken, how many hold a word?", span=6, lines=_lines(SHARE), low=0,
                high=1, format=".0%", x_label="step",
            ),
            Curves(
                name="running", title="Texts written at once", span=6, lines=_lines(RUNNING), low=0, format=".0f",
                x_label="step",
            ),
        ),
    ),
    Scene(
        "drop",
        (
            _pages_view("dropping", "A text that loses its words"),
            Curves(
                name="kept", title="Words held, and slots taken for them",
                lines=(
                    Line("slots taken", of(TAKEN), colour="alarm"), Line("words held", of(HELD), colour="recent"),
                ), low=0, format=".0f", x_label="step",
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    sites = ("paged.*", "pages.tokens", "pages.refs", "pages.free", "memory.*", "serve.*")
    return {name: {} for name in sites}


# fmt: off
LESSON = Lesson(
    slug="paged", title="A page table for thoughts",
    question="How do many conversations share one memory without waste?", part="Keep the right things", order=14,
    sources=("lecture", "Kwon 2023, arXiv:2309.06180"), knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES,
    claims=CLAIMS,
    code=("engine.caches.blocks:Tables", "engine.caches.scheduler:serve", "engine.caches.reserved:Reserved"),
    looks=frozenset({"reserve"}), facts=facts, marks=marks, glossary=GLOSSARY, step_word="step", seconds=300,
    footnote="* OPT-13B on one A100 with chats of ShareGPT and Alpaca, as reported. Measured: this page, this server.",
)
# fmt: on
