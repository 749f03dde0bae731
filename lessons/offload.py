"""Experts on the shelf: a few in memory, all on disk, the next ones fetched before they are asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import param

from engine.caches.full import Full
from engine.generate import checked_ids
from engine.moe.lru import Counts, asked, hit_rate
from engine.moe.offload import Offload, store_experts
from engine.moe.usage import calls, topic_text
from engine.recording import Recording, note, record, site, step, tap
from engine.toyland import Tokenizer
from engine.toyland.words import TOPICS
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Predict, Scene
from lessons.models import introduce, read_aloud
from lessons.sharing import toy
from lessons.views import Arithmetic, Bars, Curves, Heatmaps, Line, Number, Numbers, Timeline, Tokens, knob, of

MODEL = "experts-top2"
TEXTS = {"At the harbour": "harbour", "In the kitchen": "kitchen", "A topic a story": "mixed", "Your own": "own"}
DISKS = {"this disk": 0.0, "as if 100 MB/s": 100.0, "as if 20 MB/s": 20.0}
WAYS = {"plain": "when asked for", "ahead": "ahead"}
HELD, GONE, CAME = 1, 2, 3
CLEAR = 0.02  # hit rates that differ by less are alike

SHELF = site("offload.shelf", "each expert: 0 on disk, 1 in memory, 2 sent back in this step, 3 fetched in this step")
HITS = site("offload.hits", "requests so far that found their expert in memory", low=0.0)
MISSES = site("offload.misses", "requests so far that waited for the disk", low=0.0)
RATE = site("offload.rate", "the share of requests that found their expert in memory", low=0.0, high=1.0)
WAITED = site("offload.waited", "time so far that computing stood still", unit="ms", low=0.0)
SPANS = site("offload.spans", "what happened for one word: lane, kind, expert, begin and end in microseconds")
NOW = site("offload.now", "the end of this word", unit="µs", low=0.0)
END = site("offload.end", "the longest word so far", unit="µs", low=0.0)
SIMULATED = site("offload.simulated", "whether the disk was slowed down: 0 no, 1 yes")
LATE = site("offload.late", "experts that a word had to wait for", low=0.0)
SIZES = site("offload.sizes", "experts that a layer keeps")
CURVE = site("offload.curve", "hit rate at that size, with nothing loaded ahead", low=0.0, high=1.0)
GUESSED = site("offload.guessed", "the share of experts asked for that were foreseen", low=0.0, high=1.0)


class Turn(Knobs):
    size = param.Integer(2, bounds=(1, 8), label="Experts kept", doc="In memory, of the eight in each layer.")
    ahead = param.Integer(2, bounds=(1, 4), label="Fetched ahead", doc="For the next layer, while this one computes.")
    disk: param.Selector = param.Selector(
        default=0.0, objects=dict(DISKS), label="Disk", doc="The real one, or made slower than it is."
    )
    text: param.Selector = param.Selector(default="harbour", objects=dict(TEXTS), label="Text", doc="What is read.")
    own = param.String("anna takes the key . where is the key ?", label="Your own text", doc="In Toyland’s words.")
    tokens = param.Integer(28, bounds=(8, 48), step=4, label="Words read", doc="How much of the text.")
    way: param.Selector = param.Selector(
        default="ahead", objects={"Ahead": "ahead", "When asked for": "plain"}, label="Look at", doc="Which fetching."
    )


def run(knobs: Turn) -> None:
    model, tokenizer = toy(MODEL)[0], Tokenizer()
    introduce(MODEL, model)
    ids = _text(knobs, tokenizer)
    layers, experts = len(model.blocks), len(model.blocks[0].ffn.experts)
    note(total_steps=len(ids), layers=layers, experts=experts, size=knobs.size, ahead=knobs.ahead, tokens=len(ids))
    read_aloud(tokenizer.pieces(ids))
    with record(keep={}):
        plain = model(checked_ids(ids, model.shape.vocab)[None])[0]
    tap(SIZES, np.arange(1, experts + 1, dtype=np.float32), "size")
    with tempfile.TemporaryDirectory(prefix="leanscope-experts-") as folder, ExitStack() as open_files:
        path = Path(folder) / "experts.safetensors"
        store_experts(model, path)
        note(file=path.stat().st_size)
        readers = {way: Reader(open_files, model, path, knobs, ahead=knobs.ahead * (way == "ahead")) for way in WAYS}
        longest, off = 0, 0.0
        for t, token in enumerate(ids):
            words = {way: reader.read(token) for way, reader in readers.items()}
            longest = max(longest, *(int(word.spans[:, 4].max()) for word in words.values()))
            off = max(off, *(float((word.logits - plain[t]).abs().max()) for word in words.values()))
            for way, word in words.items():
                _tell(way, word, longest)
            tap(SIMULATED, int(knobs.disk > 0), "")
            step()
            if t == 0:  # after the first picture: they take longer than a word
                one, mixed = _curves(model, experts)
                tap(CURVE, np.array(one, np.float32), "size", of="one")
                tap(CURVE, np.array(mixed, np.float32), "size", of="mixed")
                note(one=one[knobs.size - 1], mixed=mixed[knobs.size - 1])
            note(
                off=off,
                counts={way: vars(reader.shelf.counts).copy() for way, reader in readers.items()},
                recall=readers["ahead"].shelf.counts.recall,
                expert_bytes=readers["plain"].shelf.expert_bytes,
            )


def _text(knobs: Turn, tokenizer: Tokenizer) -> list[int]:
    if knobs.text == "own":
        return list(tokenizer.prompt(knobs.own))[: knobs.tokens]
    topic = None if knobs.text == "mixed" else knobs.text
    return list(topic_text(topic, tokens=knobs.tokens)[0].tolist())


@dataclass(frozen=True)
class Word:
    """What happened for one word, and what stands after it."""

    held: np.ndarray  # [layer, expert]: 1 in memory
    before: np.ndarray  # the same, a word ago
    spans: np.ndarray  # [span, field]: lane, kind, expert, begin and end in microseconds
    hits: int  # so far
    misses: int
    late: int  # misses of this word
    waited: float  # seconds so far
    recall: float  # so far
    logits: Any  # [vocab]


class Reader:
    """Reads a text word by word with most experts on disk."""

    def __init__(self, open_files: ExitStack, model: Any, path: Path, knobs: Turn, *, ahead: int) -> None:
        bandwidth = knobs.disk * 1e6 or None
        self.shelf = open_files.enter_context(Offload(model, path, size=knobs.size, ahead=ahead, bandwidth=bandwidth))
        self.cache = Full()
        self.held = np.zeros((len(model.blocks), len(model.blocks[0].ffn.experts)), np.float32)

    def read(self, token: int) -> Word:
        shelf, vocab = self.shelf, self.shelf.model.shape.vocab
        misses = shelf.counts.misses
        with record(keep={"offload.resident": {}}) as seen:
            logits = shelf.model(checked_ids([token], vocab)[None], cache=self.cache)[0, -1]
        recording, before = seen.freeze(), self.held
        self.held = np.stack([recording.track("offload.resident", layer=i).latest() for i in range(len(before))])
        counts = shelf.counts
        return Word(
            self.held, before, _spans(recording), counts.hits, counts.misses, counts.misses - misses, counts.waited,
            counts.recall, logits,
        )  # fmt: skip


def _spans(recording: Recording) -> np.ndarray:
    """The intervals of one word, from its events."""
    kinds = {"offload.expert": 0, "offload.others": 0, "offload.load": 1}
    happened = []
    for e in recording.events:
        if e.name in kinds:
            f = e.fields
            kind = 2 if f.get("why") in ("ahead", "wasted") else kinds[e.name]
            begin = round(1e6 * f["start"])
            happened.append((f["layer"], kind, max(0, f["expert"]), begin, begin + round(1e6 * f["seconds"])))
    table = np.array(happened or [(0, 0, 0, 0, 0)], np.int64)
    table[:, 3:] -= table[:, 3].min()
    return table.astype(np.int32)


def _curves(model: Any, experts: int) -> tuple[list[float], list[float]]:
    """Hit rates at every size: in texts on one topic, the mean of all, and in a text that changes its topic."""
    one = [asked(calls(model, topic_text(topic, tokens=192))) for topic in TOPICS]
    # As many words, a piece of each topic in turn.
    pieces = [text[i : i + len(text) // 8] for i in range(0, len(one[0]), len(one[0]) // 8) for text in one]
    mixed = [keys for piece in pieces for keys in piece][: len(one[0]) * 4]
    sizes = range(1, experts + 1)
    return (
        [float(np.mean([hit_rate(text, size=size) for text in one])) for size in sizes],
        [hit_rate(mixed, size=size) for size in sizes],
    )


def _tell(way: str, word: Word, longest: int) -> None:
    """What stands after a word."""
    held, before = word.held > 0, word.before > 0
    shelf = np.where(held, np.where(before, HELD, CAME), np.where(before, GONE, 0))
    tap(SHELF, shelf.astype(np.int32), "layer expert", way=way)
    tap(HITS, word.hits, "", way=way)
    tap(MISSES, word.misses, "", way=way)
    tap(RATE, word.hits / max(1, word.hits + word.misses), "", way=way)
    tap(WAITED, 1e3 * word.waited, "", way=way)
    tap(SPANS, word.spans, "span field", way=way)
    tap(NOW, int(word.spans[:, 4].max()), "", way=way)
    tap(END, longest, "", way=way)
    tap(LATE, word.late, "", way=way)
    tap(GUESSED, word.recall if way == "ahead" else 0.0, "", way=way)


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    plain, ahead = (Counts(**meta["counts"][way]) for way in WAYS)
    return {
        "layers": meta["layers"],
        "experts": meta["experts"],
        "all": meta["layers"] * meta["experts"],
        "size": meta["size"],
        "kilobytes": meta["expert_bytes"] / 1e3,
        "file_kb": meta["file"] / 1e3,
        "held_percent": 100 * meta["size"] / meta["experts"],
        "words": meta["tokens"],
        "requests": plain.requests,
        "hits_percent": 100 * plain.hit_rate,
        "ahead_percent": 100 * ahead.hit_rate,
        "waited_ms": 1e3 * plain.waited,
        "ahead_ms": 1e3 * ahead.waited,
        "recall": 100 * meta["recall"],
        "even": 100 * min(1.0, meta["ahead"] / meta["experts"]),
        "more_bytes": ahead.bytes / max(1, plain.bytes),
        "stay": "They do" if meta["one"] > meta["mixed"] + CLEAR else "Hardly: Toyland’s topics share most words",
        "one": 100 * meta["one"],
        "mixed": 100 * meta["mixed"],
        "half": meta["tokens"] // 2,
        "last": meta["tokens"] - 1,
    }


def _reuse(recording: Recording) -> Finding:
    f, meta = facts(recording), recording.meta
    chance = meta["size"] / meta["experts"]
    agrees = meta["one"] > meta["mixed"] + CLEAR
    why = f"By chance it would be {chance:.0%}." + (
        "" if agrees else " Toyland’s topics share most of their words: what is reused is the grammar."
    )
    return Finding(f"{f['one']:.0f}% vs {f['mixed']:.0f}%", "agrees" if agrees else "differs", why,
                   f"one topic {meta['one']:.3f}, changing topics {meta['mixed']:.3f}")  # fmt: skip


def _foreseen(recording: Recording) -> Finding:
    meta = recording.meta
    chance = min(1.0, meta["ahead"] / meta["experts"])
    agrees = meta["recall"] > 1.5 * chance
    f = facts(recording)
    return Finding(
        f"{meta['recall']:.0%}, by chance {chance:.0%}", "agrees" if agrees else "differs",
        "" if agrees else "Four layers stand far apart: one says little of the next.",
        f"{meta['ahead']} guessed; hits {f['hits_percent']:.0f}% → {f['ahead_percent']:.0f}%",
    )  # fmt: skip


def _same(recording: Recording) -> Finding:
    off = recording.meta["off"]
    return Finding(f"{off:.1e}", "agrees" if off < 1e-4 else "differs", "", "max |logits − all in memory|")


# fmt: off
CLAIMS = (
    Claim("Texts of one subject reuse experts", "architectures; Eliseev 2023, 2312.17238",
          "hit rate, one topic vs changing topics", "reuse", _reuse),
    Claim("Routing is predictable, so that fetching ahead works", "architectures; Eliseev 2023, 2312.17238",
          "experts foreseen / asked for", "predictable", _foreseen),
    Claim("The words do not change", "Eliseev 2023, 2312.17238", "max |difference|", "0", _same),
)

BEATS = (
    Beat(
        "{all} experts of {kilobytes:.0f} kB each lie in a **file on this disk**; in memory is room for {size} in "
        "each of {layers} layers. ==Each row|shelf== is a layer, each column an expert. Read on, word by word.",
        scene="shelf", step=0, focus="shelf",
    ),
    Beat(
        "A word asks two experts a layer. In memory: a **hit**. Else computing **waits** for the disk, and the one "
        "unused for longest is sent back: an [[LRU]] cache.", scene="shelf", step="half", play=True, focus="shelf",
        knobs={"way": "plain"},
        predict=Predict("What share of requests will be hits?", (10, 25, 50, 75), "hits_percent", format=".0f",
                        unit="%"),
    ),
    Beat(
        "{hits_percent:.0f}% of {requests}. See ==one word|time== in time: short work, long waits, {waited_ms:.0f} ms "
        "over all {words} words.", scene="shelf", step="last", play=True, focus="time",
    ),
    Beat(
        "But the next layer’s router is a small matrix. Ask it **now**, with this layer’s state: it foresees "
        "{recall:.0f}% of what will be asked, where chance gives {even:.0f}%. ==While one layer works|time==, the "
        "next one’s experts arrive.", scene="shelf", step="last", focus="time", knobs={"way": "ahead"},
    ),
    Beat(
        "Now {ahead_percent:.0f}% are hits, and computing stands still for {ahead_ms:.0f} ms. The price: "
        "{more_bytes:.1f} times the bytes, for some guesses are ==wasted|time==. On a busy or slow disk they can even "
        "get in the way.", scene="shelf", step="last", focus="figures",
        do=Do("Fetch another number ahead", knob="ahead"),
    ),
    Beat(
        "Do texts on one subject stay with their experts? {stay}. ==Hit rates|sizes== are {one:.1f}% in one topic, "
        "{mixed:.1f}% where the topic keeps changing. With more room, more is found.", scene="sizes", step="last",
        focus="sizes",
    ),
    Beat(
        "Whatever is kept, the words stay the same. Break it: keep **one** expert of a layer where every word asks for "
        "two, on a disk **as if 20 MB/s**.", scene="shelf", step="last", focus="figures",
    ),
)
GLOSSARY = {"LRU": "Least recently used: of all that lies in the cache, what was not asked for the longest goes first."}


def shelf_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """Where an expert lies, and since when."""
    codes = recording.stack(SHELF, way=knobs.way)[: at.get("step", recording.steps - 1) + 1, at["layer"], at["expert"]]
    came, now = int((codes == CAME).sum()), int(codes[-1])
    where = {0: "on disk", HELD: "in memory", GONE: "just sent back", CAME: "just fetched"}[now]
    return Arithmetic(
        title=f"layer {at['layer']}, expert {at['expert']}",
        lines=(("it lies", where), ("fetched so far", f"{came} times"),
               ("words in memory", f"{int(((codes == HELD) | (codes == CAME)).sum())} of {len(codes)}"),
               ("bytes of each fetch", f"{recording.meta['expert_bytes']:,}")),
        values={"code": float(now)},
    )


SEEN = {"way": knob("way")}
SCENES = (
    Scene(
        "shelf",
        (
            Heatmaps(
                name="shelf", title="Where the experts lie", span=6, tensor=of(SHELF, **SEEN), rows="layer",
                columns="expert", gaps=True, cell=shelf_cell,
                states=("on disk", "in memory", "just sent back", "just fetched"),
                state_colours=("line", "recent", "kept", "sink"),
            ),
            Tokens(
                name="text", title="Who had to wait", span=6, note="stronger: for more experts", fold=False,
                value=of(LATE, **SEEN), colours="heavy", value_label="waited for",
            ),
            Numbers(
                name="figures", title="So far",
                numbers=(
                    Number("Hits", of(HITS, **SEEN), colour="recent"),
                    Number("Misses", of(MISSES, **SEEN), colour="alarm"),
                    Number("Hit rate", of(RATE, **SEEN), format=".0%"),
                    Number("Stood still", of(WAITED, **SEEN), unit="ms", format=",.1f", colour="alarm"),
                ),
            ),
            Timeline(
                name="time", title="One word, layer by layer", tensor=of(SPANS, **SEEN), now=of(NOW, **SEEN),
                end=of(END, **SEEN), kinds=("computes", "read when asked", "read ahead"), lanes="layer",
                items="expert", simulated=of(SIMULATED),
            ),
        ),
    ),
    Scene(
        "sizes",
        (
            Curves(
                name="sizes", title="The more is kept, the more is found", note="nothing fetched ahead", span=7,
                across="size", low=0.0, high=1.0, format=".0%",
                lines=(
                    Line("one topic", of(CURVE, of="one"), colour="recent", x=of(SIZES)),
                    Line("changing topics", of(CURVE, of="mixed"), colour="key", x=of(SIZES)),
                ),
                x_label="experts kept", y_label="hit rate", height=190,
            ),
            Bars(
                name="ways", title="Hit rate at each size, one topic", span=5, values=of(CURVE, of="one"),
                labels=tuple(f"{n} kept" for n in range(1, 9)), colour="recent",
            ),
        ),
    ),
)


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"offload.*": {}}


LESSON = Lesson(
    slug="offload", title="Experts on the shelf", question="What if the experts don’t fit?",
    part="Fewer weights at work", order=24, sources=("architectures", "Eliseev 2023, arXiv:2312.17238"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.moe.offload:Offload", "engine.moe.lru:LRU", "engine.moe.tier:Tier"),
    looks=frozenset({"way"}), facts=facts, glossary=GLOSSARY, step_word="word", seconds=120,
    footnote="The source offloads Mixtral from main memory to a GPU, in quantised form. Measured: a toy, from a file.",
)
# fmt: on
