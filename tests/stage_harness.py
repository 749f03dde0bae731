"""Pages to develop and test the stage with: synthetic recordings, packed by the real Feed, played without a server.

The numbers are made up (seeded noise in plausible shapes), so these pages are for our eyes and for tests of pixels
only; no visitor ever gets one. `python -m tests.stage_harness sinks OUT.html` writes a page that opens from disk;
`python -m tests.stage_harness shots /tmp/screens` photographs all of them.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import param
import torch

from app.page import course
from app.picture import Feed
from app.stage import FOLDER, bundle
from engine.caches.blocks import Tables
from engine.quant.affine import Grid as Quantiser
from engine.quant.affine import quantise
from engine.quant.kmeans import Codebook, kmeans
from engine.recording import Recording, event, note, record, site, step, tap
from engine.speculate.tree import tree_mask
from lessons import microscope
from lessons.cells import LECTURE, Matrix, numbers
from lessons.knobs import Knobs
from lessons.lesson import PARTS, Beat, Do, Predict, Scene
from lessons.views import (
    Arithmetic,
    Bars,
    Blocks,
    Calculator,
    Column,
    Curves,
    Entry,
    Facing,
    Field,
    Footprint,
    Heatmaps,
    Holding,
    Ledger,
    Line,
    Number,
    Numbers,
    Plane,
    Points,
    Routes,
    Saying,
    Sayings,
    Sheet,
    Slots,
    Stack,
    Stretches,
    Strip,
    Tokens,
    Tower,
    Towers,
    Tree,
    Tries,
    knob,
    of,
)

PATTERN = site("demo.pattern", "the share of attention a query gives a key", symbol="A", grows="query", low=0, high=1)
KEYS = site("demo.keys", "keys as cached", symbol="K", grows="key")
VALUES = site("demo.values", "values as cached", symbol="V", grows="key")
QUERIES = site("demo.queries", "queries", symbol="Q", grows="query")
FIRST = site("demo.first", "first row computed in this step")
CODES = site("demo.codes", "what the cache holds, slot by slot")
MASS = site("demo.mass", "mean attention on token 0", symbol="A₀", low=0, high=1)
PPL = site("demo.perplexity", "perplexity so far")
TOP = site("demo.top", "probability of the likeliest next tokens")
IDS = site("demo.ids", "the likeliest next tokens")
PARTS_TRAINED = site("demo.parts", "parameters trained and frozen")
COUNT = site("demo.count", "parameters trained")
BYTES = site("demo.bytes", "bytes of the cache", unit="B")

TEXT = (
    'The "Art istic License" sets out the terms under which a package may be copied , such that the Copyright Holder '
    "keeps some semblance of control over the development of the package , while giving the users of the package the "
    "right to use and distribute it in a more or less customary fashion , plus the right to make reasonable changes ."
)
WORDS = TEXT.split()
STRATEGIES = ("full", "window", "recompute", "sinks")


class SinksKnobs(Knobs):
    model = param.Selector(default="smollm2", objects={"Toyland": "toy", "SmolLM2-135M": "smollm2"}, label="Model")
    window = param.Integer(64, bounds=(8, 128), label="Window", doc="How many slots the windowed caches have.")
    sinks = param.Integer(4, bounds=(0, 8), label="Sinks")
    switch = param.Boolean(True, label="Sink switch")
    text = param.Selector(
        default="artistic", objects={"Artistic License": "artistic", "A story": "story"}, label="Text"
    )
    layer = param.Integer(16, bounds=(0, 29), label="Layer")
    head = param.Integer(7, bounds=(0, 8), label="Head")


class DecodeKnobs(Knobs):
    model = param.Selector(default="smollm2", objects={"Toyland": "toy", "SmolLM2-135M": "smollm2"}, label="Model")
    prompt = param.String("The red ball is in the attic. Where is the red ball?", label="Prompt")
    head = param.Integer(3, bounds=(0, 8), label="Head")
    layer = param.Integer(12, bounds=(0, 29), label="Layer")
    cache = param.Boolean(True, label="Keep keys and values")
    temperature = param.Number(0.0, bounds=(0.0, 2.0), step=0.1, label="Temperature")


class ManyKnobs(Knobs):
    head = param.Integer(0, bounds=(0, 31), label="Head")


def _softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _attention(rng: np.random.Generator, heads: int, length: int, *, sink: float = 4.0) -> np.ndarray:
    """Lower-triangular patterns with a sink, a diagonal and a few stripes."""
    i, j = np.indices((length, length))
    scores = rng.normal(0, 1, (heads, length, length)) - 0.04 * (i - j)
    scores[:, :, 0] += sink * rng.uniform(0.2, 1.2, (heads, 1))
    for h in range(heads):
        scores[h] += np.where((i - j) == rng.integers(0, 5), rng.uniform(1, 4), 0)
        scores[h][:, rng.integers(0, length, 3)] += rng.uniform(0, 3)
    return _softmax(np.where(j <= i, scores, -np.inf)).astype(np.float32)


def sinks_recording(length: int = 320, window: int = 64, sinks: int = 4) -> Recording:
    rng = np.random.default_rng(3)
    rise = {"full": 0.0, "window": 1.05, "recompute": 0.28, "sinks": 0.22}
    noise = np.cumsum(rng.normal(0, 0.16, length)) / np.sqrt(np.arange(1, length + 1))
    with record(budget=10**8) as recorder:
        note(model={"name": "SmolLM2-135M", "kind": "real"})
        for t in range(length):
            word = WORDS[t % len(WORDS)]
            event("text.token", piece=(" " if t and word[0].isalnum() else "") + word)
            for name in STRATEGIES:
                codes = np.full(t + 1, 1, np.uint8)
                if name != "full":
                    codes[:] = 6
                    first = sinks if name == "sinks" else 0
                    codes[max(0, t + 1 - window + first) :] = 4 if name == "recompute" else 3
                    codes[:first] = 2
                tap(CODES, codes, "slot", strategy=name)
                late = 0.0 if t < window else rise[name] * min(1.0, (t - window) / 6)
                tap(PPL, float(np.exp(2.85 + 2.2 / (1 + t / 25) + noise[t] + late)), "", strategy=name)
            mass = 0.05 + 0.75 / (1 + np.exp(-(np.arange(30)[None] - 11.5))) * rng.beta(3, 2.2, (9, 30))
            tap(MASS, np.clip(mass, 0, 1), "head layer")
            step()
    return recorder.freeze()


def decode_recording(prompt: int = 13, length: int = 48, heads: int = 9) -> Recording:
    rng = np.random.default_rng(5)
    pattern = _attention(rng, heads, length)
    q, k, v = (rng.normal(0, 1, (length, 64)).astype(np.float32) for _ in range(3))
    with record(budget=10**8) as recorder:
        note(model={"name": "SmolLM2-135M", "kind": "real"})
        for t in range(prompt - 1, length):
            new = slice(0, prompt) if t == prompt - 1 else slice(t, t + 1)
            for n in range(new.start, new.stop):
                event("text.token", piece=(" " if n else "") + WORDS[n % len(WORDS)])
            tap(PATTERN, pattern[None, :, new, : t + 1], "batch head query key", layer=12)
            tap(QUERIES, q[new], "query width", layer=12)
            tap(KEYS, k[new], "key width", layer=12)
            tap(VALUES, v[new], "key width", layer=12)
            tap(FIRST, new.start, "")
            codes = np.full(t + 1, 1, np.uint8)
            codes[new] = 3
            tap(CODES, codes, "slot", strategy="full")
            tap(BYTES, (t + 1) * 30 * 2 * 3 * 64 * 4, "")
            top = np.sort(_softmax(rng.normal(0, 2.2, 200)))[::-1][:8]
            tap(TOP, top.astype(np.float32), "rank")
            tap(IDS, rng.choice(len(WORDS), 8, replace=False), "rank")
            tap(PPL, float((t + 1) ** 2), "", strategy="reread")
            tap(PPL, float(t + 1), "", strategy="kept")
            step()
    return recorder.freeze()


def many_recording(heads: int = 32, length: int = 128) -> Recording:
    """What the frame rate is measured with: 32 heads of 128 by 128."""
    pattern = _attention(np.random.default_rng(1), heads, length)
    with record(budget=10**8) as recorder:
        note(model={"name": "Toyland", "kind": "toy"})
        for t in range(length):
            tap(PATTERN, pattern[:, t : t + 1, : t + 1], "head query key", layer=0)
            step()
    return recorder.freeze()


LOADS = site("demo.loads", "share of the tokens that each expert got", low=0, high=1)
GROUPS = site("demo.groups", "the key head of each query head")
ROUTED = site("demo.routed", "gate weights", grows="query", low=0, high=1)
KINDS = site("demo.kinds", "what each layer is")
READS = site("demo.reads", "whose cache each layer reads")
STORED = site("demo.stored", "bytes a token")
INTENSITY = site("demo.intensity", "FLOPs a byte", unit="FLOP/B")
LEDGER = site("demo.ledger", "figures of each step")
STEPS_USED = site("demo.steps", "which steps there are")
SPEED = site("demo.speed", "FLOPs a second", unit="FLOP/s")


ENTRIES = site("demo.entries", "the block behind each entry of two texts' tables")
HOLDERS = site("demo.holders", "of two texts: not here yet, running")
KIN = site("demo.kin", "whose fork a text is")
FILLED = site("demo.filled", "slots that hold a word")
TEXT_IDS = site("demo.text_ids", "the words in the slots")
READERS = site("demo.readers", "tables that point to each block")
SPARE = site("demo.spare", "blocks on the free list")
KEPT_LONG = site("demo.kept_long", "stretches of one memory")
ROOM = site("demo.room", "slots of the memory")
GUESSED = site("demo.guessed", "words of a tree of guesses")
AFTER = site("demo.after", "the node that each comes after")
FATE = site("demo.fate", "what became of each")
PLACE = site("demo.place", "where in the text each stands")
SEEN = site("demo.seen", "which see which", low=0, high=1)
SAID = site("demo.said", "the words that a model says", grows="token")


def _pages(tables: Tables, t: int) -> None:
    """A text that grows by a word a step, and from step 7 on a fork of it."""
    if not t:
        tables.open("a")
    if t == 7:
        tables.fork("a", "b")
    for name in tables.tables:
        tables.append(name, [t])
    rows = np.full((2, 7), -2, np.int32)
    for row, table in zip(rows, tables.tables.values(), strict=False):
        row[: len(table.blocks)] = table.blocks
    both = len(tables.tables) > 1
    tap(ENTRIES, rows, "sequence entry")
    tap(HOLDERS, np.array([2, 2 if both else 0]), "sequence")
    tap(KIN, np.array([0, 0]), "sequence")
    tap(FILLED, (tables.contents >= 0).astype(np.uint8), "block slot")
    tap(TEXT_IDS, tables.contents, "block slot")
    tap(READERS, np.array(tables.pool.refs), "block")
    tap(SPARE, np.array(list(tables.pool.free), np.int32), "place")
    tap(KEPT_LONG, np.array([[0, 30, t + 1, 24, 0], [30, 16, max(1, t - 8), 10, 1]][: 1 + both]), "request part")
    tap(ROOM, 56, "")


def _guesses(t: int) -> None:
    """A tree of two paths that grows, is checked and pruned."""
    parents = (-1, 0, 1, 1, 2, 2)
    fates = ([1, 0, 0, 0, 0, 0], [1, 2, 2, 2, 2, 0], [1, 3, 4, 3, 2, 0], [1, 3, 4, 3, 5, 6])[min(3, t // 2)]
    tap(GUESSED, np.arange(6, dtype=np.int32), "node")
    tap(AFTER, np.array((-1, 0, 1, 1, 2, 3), np.int32), "node")
    tap(FATE, np.array(fates, np.uint8), "node")
    tap(PLACE, np.array([7, 8, 9, 9, 10, 10], np.int32), "node")
    tap(SEEN, tree_mask(parents[:5]), "row key")


def shared_recording(steps: int = 24) -> Recording:
    """Groups that merge, tokens sent to experts, layers that share, points that move under a roof."""
    rng = np.random.default_rng(7)
    intensity = np.array([0.2, 0.5, 0.9, 2.0, 12.0])
    roof = np.geomspace(0.1, 100, 40)
    tables = Tables(14, block_size=4)
    with record(budget=10**8) as recorder:
        note(model={"name": "Toyland", "kind": "toy"})
        event("text.words", words={str(t): WORDS[t] for t in range(steps)})
        for t in range(steps):
            event("text.token", piece=(" " if t else "") + WORDS[t])
            _pages(tables, t)
            _guesses(t)
            for who, word in (("first", t), ("second", t if t < 9 else t // 2)):
                tap(SAID, np.array([word], np.int32), "token", who=who)
            layers = [[[64 * (t > i), 640], [0, 2560]] for i in range(4)]
            tap(PARTS_TRAINED, np.array([[[0, 900], [90, 0]], *layers]), "place part kind")
            tap(COUNT, 90.0 + 64 * min(t, 4), "")
            tap(GROUPS, np.arange(8) // [1, 2, 4, 8][min(3, t // 6)], "head")
            gates = np.where(rng.random(8) < 0.3, rng.random(8), 0.0).astype(np.float32)
            tap(ROUTED, (gates / max(1e-9, gates.sum()))[None], "query expert")
            tap(LOADS, rng.dirichlet(np.full(8, 3.0)).astype(np.float32), "expert")
            tap(KINDS, np.array([0, 0, 1, 1, 1, 1]), "layer")
            tap(READS, np.array([0, 1, 2, 2, 2, 2]) if t >= 6 else np.arange(6), "layer")
            tap(STORED, np.array([32, 32, 512, 0, 0, 0]) if t >= 6 else np.full(6, 512), "layer")
            grown = intensity * (1 + t / 4)
            tap(INTENSITY, grown.astype(np.float32), "operation")
            tap(SPEED, (np.minimum(4e10 * grown, 2e11) * rng.uniform(0.4, 0.9, 5)).astype(np.float32), "operation")
            rows = np.array([[900.0, 3.0], [450.0, 3.1], [300.0, 3.6]])
            rows[1 + t // 8 :] = np.nan
            tap(LEDGER, rows, "row column")
            tap(STEPS_USED, np.ones(3), "row")
            tap(INTENSITY, roof.astype(np.float32), "place", of="roof")
            tap(SPEED, np.minimum(4e10 * roof, 2e11).astype(np.float32), "place", of="roof")
            step()
    return recorder.freeze()


def _bytes(values: Any) -> Arithmetic:
    count = 2 * values["layers"] * values["heads"] * values["width"] * 2
    return Arithmetic("", (("bytes a token", f"{count:,}"),))


SHARED_SCENE = Scene(
    "shared",
    (
        Routes(of(GROUPS), left="query head", right="key head", title="Who reads whose notes", name="groups", span=6),
        Routes(
            of(ROUTED), left="token", right="expert", left_labels="tokens", left_colour="recent", right_colour="value",
            loads=of(LOADS), title="Tokens to experts", name="experts", span=6,
        ),
        Stack(
            of(KINDS), kinds=("window", "cross"), reads=of(READS), values=of(STORED), values_label="bytes a token",
            title="The layers", name="layers", span=6,
        ),
        Towers(
            (Tower("A little of it", of(PARTS_TRAINED), of(COUNT), of(COUNT), colour="query"),),
            parts=("attention", "ffn"), title="What is trained", name="towers", span=6,
        ),
        Sheet(
            ("method", "they say", "here"), (("a little", "0.1M", Number("", of(COUNT))), ("all", "125M", "–")),
            kinds=("", "reported", "toy"), title="Beside theirs", name="sheet", span=6, source="As someone reports it.",
        ),
        Footprint(
            (Holding("Shared", of(STORED), "layers that share"),),
            title="What a token leaves", name="footprint",
        ),
        Facing(
            of(STORED), of(STORED), ("first", "second", "third", "fourth"), "bytes", "bytes again",
            title="Two bars a row", name="facing", unit="B",
        ),
        Ledger(
            of(LEDGER), of(STEPS_USED), (Entry("As it was"), Entry("Cut", "by half"), Entry("Cut again")),
            (Column("bytes", ".3s", "B"), Column("perplexity", ".2f")), 1, title="A stack", name="ledger",
        ),
        Tries(
            of(LEDGER, column=0), of(LEDGER, column=1), of(STEPS_USED), "bytes", "perplexity", allowed=10.0,
            title="All tries", name="tries",
        ),
        Sayings(
            (
                Saying("The first", of(SAID, who="first"), (Number("slots", of(ROOM)),)),
                Saying("The second", of(SAID, who="second"), (Number("slots", of(ROOM)),), colour="key"),
            ),
            title="What they say", name="sayings",
        ),
        Tree(
            of(GUESSED), of(AFTER), of(FATE), of(PLACE), mask=of(SEEN), title="Guesses and their check", name="tree",
        ),
        Plane(
            points=(
                Points(
                    "operations", of(INTENSITY), of(SPEED), colour="query",
                    names=("attention", "norms", "qkv", "ffn", "head"), trail=True,
                ),
            ),
            lines=(Line("the roof", of(SPEED, of="roof"), colour="alarm", x=of(INTENSITY, of="roof")),),
            x_label="FLOPs a byte", y_label="FLOPs a second", log=True, log_x=True,
            title="The roofline", name="roof", span=6,
        ),
        Blocks(
            of(ENTRIES), of(HOLDERS), of(KIN), of(FILLED), of(TEXT_IDS), of(READERS), of(SPARE),
            title="Who holds which block", name="blocks",
        ),
        Stretches(
            of(KEPT_LONG), of(KIN), of(HOLDERS), of(ROOM), tables=of(ENTRIES), codes=of(FILLED),
            title="One memory, reserved and in blocks", name="stretches",
        ),
        Calculator(
            (
                Field("layers", "Layers", 32, 1, 1000),
                Field("heads", "Key heads", 32, 1, 1000),
                Field("width", "Head width", 128, 1, 1000),
            ),
            (("Llama-2-7B", {"layers": 32, "heads": 32, "width": 128}), ("SmolLM2", {"layers": 30, "heads": 3})),
            _bytes, title="Calculator", name="calculator",
        ),
    ),
)  # fmt: skip

SINKS_SCENE = Scene(
    "lockstep",
    (
        Slots(
            title="Four ways to remember, in lockstep",
            name="strips",
            strips=tuple(
                Strip(
                    label, of(CODES, strategy=s), detail, of(PPL, strategy=s), "perplexity", colour=colour, aside=cost
                )
                for s, label, detail, colour, cost in (
                    ("full", "Keep everything", "cache grows: {slots} slots", "ink", "O(T²)"),
                    ("window", "Sliding window", "{kept} slots, {evicted} gone", "alarm", "O(TL)"),
                    ("recompute", "Window, recomputed", "{kept} slots, rebuilt each token", "recomputed", "O(TL²)"),
                    ("sinks", "Sinks + window", "4 + 60 slots", "sink", "O(TL)"),
                )
            ),
        ),
        Curves(
            title="Perplexity so far",
            note="past token 64",
            name="perplexity",
            span=7,
            log=True,
            start=64,
            lines=tuple(
                Line(label, of(PPL, strategy=s), colour)
                for s, label, colour in (
                    ("full", "everything", "kept"),
                    ("window", "window", "alarm"),
                    ("recompute", "recomputed", "recomputed"),
                    ("sinks", "sinks", "sink"),
                )
            ),
        ),
        Heatmaps(
            of(MASS),
            rows="head",
            columns="layer",
            colours="attention",
            gaps=True,
            title="Attention on token 0",
            note="mean, layer × head",
            name="mass",
            span=5,
        ),
        Tokens(title="The text, as it is read", name="text", codes=of(CODES, strategy="sinks")),
    ),
)

DECODE_SCENE = Scene(
    "decode",
    (
        Heatmaps(
            of(PATTERN, layer=knob("layer"), batch=0),
            rows="query",
            columns="key",
            facet="head",
            focus=knob("head"),
            colours="attention",
            row_labels="tokens",
            column_labels="tokens",
            lit=of(FIRST),
            cell=lambda *a: None,
            power=0.5,
            title="Attention, growing a row a token",
            name="attention",
        ),
        Heatmaps(
            of(QUERIES, layer=knob("layer")),
            rows="query",
            columns="width",
            colours="query",
            lit=of(FIRST),
            title="Queries",
            name="queries",
            span=4,
        ),
        Heatmaps(
            of(KEYS, layer=knob("layer")),
            rows="key",
            columns="width",
            colours="key",
            lit=of(FIRST),
            title="Keys",
            name="keys",
            span=4,
        ),
        Heatmaps(
            of(VALUES, layer=knob("layer")),
            rows="key",
            columns="width",
            colours="diverging",
            lit=of(FIRST),
            title="Values",
            name="values",
            span=4,
        ),
        Slots(
            title="The cache",
            name="cache",
            strips=(Strip("Kept", of(CODES, strategy="full"), "{slots} slots"),),
            span=7,
        ),
        Bars(of(TOP), of(IDS), title="The next token", name="next", span=5),
        Numbers((Number("cache", of(BYTES), "B"), Number("row", of(FIRST), "", ",d", "query")), title="Cost", span=5),
        Curves(
            (Line("read again", of(PPL, strategy="reread"), "alarm"), Line("kept", of(PPL, strategy="kept"), "recent")),
            title="Multiplications so far",
            log=True,
            span=7,
            x_label="token",
        ),
    ),
)

MANY_SCENE = Scene(
    "many",
    (
        Heatmaps(
            of(PATTERN, layer=0), rows="query", columns="key", facet="head", colours="attention", title="All 32 heads"
        ),
    ),
)

SINKS_BEATS = (
    Beat("Four copies of one model read the same text. They differ in **what they remember**.", step=20),
    Beat(
        "The window has just slid past ==the first token|strips==. Nothing the model needs to know was in it: it is "
        "the word “The”. Yet ==the red curve|perplexity== climbs to {window:.1f}.\n\nHeads that have nothing to look "
        "for still must put their attention *somewhere*: [[softmax]] has to add up to one. They have learned to park "
        "it on token 0.",
        step="gone",
        focus="perplexity",
        predict=Predict("If we pin that one token in the cache, perplexity will be about", (20, 30, 50, 65), "sinks"),
    ),
    Beat("Now *you*.", do=Do("Turn the **window** down until the sinks no longer help.", knob="window")),
    Beat("Play it from the start.", do=Do("Press play.", play=True), step=319, play=True),
)
DECODE_BEATS = (
    Beat("Each row is a token asking all tokens before it. ==One row a token|attention== is added.", focus="attention"),
    Beat("Click a cell.", do=Do("Open any cell of the attention matrix.", cell="attention"), step=20, play=True),
    Beat("The end.", step=35),
)

CLAIMS = [
    ("A plain window breaks once the first tokens go", "ppl(window) / ppl(dense)", "5158 / 5641", "41 / 17", "agrees"),
    ("A few sinks heal it", "ppl(4 + 60) vs ppl(recompute)", "5.40 vs 5.43", "20.9 vs 22.3", "agrees"),
    ("Cost is O(TL) instead of O(TL²)", "168·64 vs 168·64² scores", "—", "10,752 vs 688,128", "differs"),
    ("Dense fails on long text", "T = 320 ≤ 8192 trained", "5641", "17.0", "untestable"),
]  # fmt: skip


class GridKnobs(Knobs):
    matrix = Matrix(LECTURE, label="Matrix")
    bits = param.Integer(2, bounds=(1, 8), label="Bits")


def grid_recording() -> Recording:
    """The lecture's matrix on an even grid of two bits, value by value; and rows with a codebook each."""
    rows = torch.tensor(numbers(LECTURE), dtype=torch.float64)
    with record() as recorder:
        note(model={"name": "the lecture’s matrix", "kind": "toy"})
        done = quantise(rows, Quantiser(2, symmetric=False))
        book = kmeans_quietly(torch.randn(12, 24, generator=torch.Generator().manual_seed(1)).double())
        microscope.look_at_affine(rows, done, method="linear")
        microscope.look_at_codebook(*book, method="k-means")
        microscope.count_of(done, method="linear")
        microscope.walk(rows, done.reconstruct(), method="linear")
    return recorder.freeze()


def kmeans_quietly(x: torch.Tensor) -> tuple[torch.Tensor, Codebook]:
    with record(keep={}):
        return x, kmeans(x, bits=3, granularity="channel")


GRID_SCENE = Scene(
    "grid",
    (
        microscope.grid_view(
            title="The matrix in two bits", levels=False, edit="matrix", index={"method": "linear"},
            labels=("weights", "codes", "given back", "size of the error"),
        ),
        microscope.grid_view(
            name="rows", title="A codebook a row", levels=True, walked=False, index={"method": "k-means"}, span=8,
            block_word="row",
        ),
        microscope.bits_view(index={"method": "linear"}, span=4),
    ),
)  # fmt: skip

PAGES: dict[str, dict[str, Any]] = {
    "sinks": {
        "make": sinks_recording,
        "scene": SINKS_SCENE,
        "knobs": SinksKnobs,
        "beats": SINKS_BEATS,
        "question": "Why does forgetting the first token break the model?",
        "part": PARTS[3],
        "order": 12,
        "facts": {"window": 41.04, "sinks": 20.91, "gone": 168},
        "marks": [{"step": 64, "label": "the first token leaves the window"}],
        "looks": {"layer", "head"},
        "step_word": "token",
    },
    "decode": {
        "make": decode_recording,
        "scene": DECODE_SCENE,
        "knobs": DecodeKnobs,
        "beats": DECODE_BEATS,
        "question": "Why does a language model reread everything to say one more word?",
        "part": PARTS[0],
        "order": 1,
        "facts": {"saving": 24.4},
        "marks": [{"step": 0, "label": "the prompt, all at once"}],
        "looks": {"layer", "head"},
        "step_word": "token",
    },
    "shared": {
        "make": shared_recording,
        "scene": SHARED_SCENE,
        "knobs": ManyKnobs,
        "beats": (Beat("What lessons share.", step=12), Beat("Later.", step=23, focus="groups")),
        "question": "What do the shared pictures look like?",
        "part": PARTS[1],
        "order": 3,
        "facts": {},
        "marks": [],
        "looks": {"head"},
        "step_word": "token",
    },
    "many": {
        "make": many_recording,
        "scene": MANY_SCENE,
        "knobs": ManyKnobs,
        "beats": (Beat("All of them."),),
        "question": "How fast?",
        "part": PARTS[0],
        "order": 0,
        "facts": {},
        "marks": [],
        "looks": {"head"},
        "step_word": "token",
    },
}

PAGES["grid"] = PAGES["shared"] | {
    "make": grid_recording,
    "scene": GRID_SCENE,
    "knobs": GridKnobs,
    "beats": (Beat("A matrix, and its codes.", step=5), Beat("All through.", step=16)),
    "question": "How few bits?",
    "looks": set(),
    "step_word": "value",
}

CELL = {
    "type": "cell",
    "view": 0,
    "title": "query 20 “may”, key 0 “The”, head 3",
    "lines": [["q_20 · k_0", "34.43"], ["÷ √64", "4.30"], ["softmax →", "0.30"]],
    "note": "30% of this head’s attention on one word it cannot use.",
    "vectors": [[name, list(np.random.default_rng(i).normal(0, 1, 64))] for i, name in enumerate(("q", "k", "q·k"))],
}


def messages(page: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the server would send for the page: picture, rows, text, facts."""
    recording = page["make"]()
    sent: list[dict[str, Any]] = []
    Feed(sent.append).show("r1", recording, page["scene"], page["knobs"]())
    yield {"type": "run", "run": "r1", "state": "running", "steps": 0, "total": recording.steps}
    yield from sent
    yield {"type": "words", "run": "r1", "words": {i: " " + word for i, word in enumerate(WORDS)}}
    yield {
        "type": "run",
        "run": "r1",
        "state": "done",
        "steps": recording.steps,
        "total": recording.steps,
        "seconds": 4.12,
    }
    claims = [
        {
            "text": t,
            "source": "lecture; Xiao 2023",
            "formula": f,
            "reported": r,
            "measured": m,
            "unit": "",
            "verdict": v,
        }
        | {"why": "The model was trained on 8,192 tokens; this text has 320." if v == "untestable" else ""}
        for t, f, r, m, v in CLAIMS
    ]
    yield {"type": "facts", "run": "r1", "facts": page["facts"], "marks": page["marks"], "claims": claims}


def saved(name: str, page: dict[str, Any] | None = None) -> dict[str, Any]:
    """A lesson's page as data, for app/stage/standin.js; `page` as in PAGES."""
    page = page or PAGES[name]
    menu = [
        {"slug": n, "title": n, "part": p["part"], "order": p["order"], "href": f"{n}.html"} for n, p in PAGES.items()
    ]
    source = Path(FOLDER.parents[1] / "engine" / "caches" / "full.py").read_text()
    lines = [i for i, line in enumerate(source.splitlines(), 1) if "self." in line][:3]
    code = {"name": "Full", "file": "engine/caches/full.py", "line": 1, "text": source, "taps": lines}
    return {
        "lesson": {
            "slug": name,
            "title": name,
            "question": page["question"],
            "part": page["part"],
            "order": page["order"],
            "sources": ["lecture"],
            "step_word": page["step_word"],
            "glossary": {"softmax": "Turns scores into shares that add up to one: eˣ divided by the sum of all eˣ."},
            "beats": [dataclasses.asdict(beat) for beat in page["beats"]],
            "knobs": [{**spec, "look": spec["name"] in page["looks"]} for spec in page["knobs"].spec()],
            "lessons": menu,
            "models": [
                {"value": "toy", "label": "Toyland", "available": True, "why": ""},
                {"value": "smollm2", "label": "SmolLM2-135M", "available": True, "why": ""},
            ],
        },
        "start": {"knobs": page["knobs"]().values(), "beat": 0, "step": None, "notices": [], "present": False},
        "places": {"fonts": "", "home": "index.html"},
        "messages": list(messages(page)),
        "answers": {
            '["code",null,null]': {"type": "code", "sources": [code]},
            '["tensors",null,null]': _tensors(),
            '["calculate",4,null]': {"type": "calculated", "view": 4, "lines": [["bytes a token", "524,288"]]},
        },
        "cell": CELL,
    }


def _tensors() -> dict[str, Any]:
    about = {"symbol": "A", "meaning": "the share of attention a query gives a key", "axes": ["head", "query", "key"]}
    size = {
        "shape": [9, 48, 48],
        "dtype": "float32",
        "bytes": 82_944,
        "unit": "",
        "low": 0,
        "high": 0.98,
        "mean": 0.021,
    }
    return {"type": "tensors", "tensors": [{"key": "attention.pattern[layer=12]", **about, **size}], "cut": []}


def saved_home() -> dict[str, Any]:
    """The index as data."""
    previews = {"decode": DECODE_SCENE.views[:1], "sinks": SINKS_SCENE.views[:1]}

    def preview(slug: str) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        recording = {"decode": decode_recording, "sinks": sinks_recording}[slug]()
        Feed(sent.append).show("p", recording, Scene("preview", previews[slug]), PAGES[slug]["knobs"]())
        return sent

    parts = course("{}.html")
    for card in (card for part in parts for card in part["lessons"]):
        card |= {"preview": preview(card["slug"])} if card["slug"] in previews else {"href": None}
    return {"course": parts, "places": {"fonts": "", "home": "#"}, "messages": []}


def plain(value: Any) -> Any:
    """JSON for standin.js: arrays as base64."""
    if isinstance(value, np.ndarray):
        return {"array": str(value.dtype), "base64": base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def html(name: str, *, data: dict[str, Any] | None = None, fonts: str = "", shadow: bool = True) -> str:
    """A page that opens from disk: the bundle and the stand-in inline, mounted in a shadow root as Panel does."""
    data = data or (saved_home() if name == "home" else saved(name))
    data["places"]["fonts"] = fonts
    script = bundle().replace("export default { render };", "const page = { render };")
    double = re.sub(r"^export ", "", (FOLDER / "standin.js").read_text(), flags=re.M)
    text = json.dumps(plain(data), ensure_ascii=False).replace("</", "<\\/")
    if "</script" in script + double:
        raise ValueError("the stage's modules must not contain a closing script tag")
    host = 'const host = document.getElementById("host");\n' + (
        'const el = host.attachShadow({ mode: "open" }).appendChild(document.createElement("div"));\n'
        if shadow
        else "const el = host;\n"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Stage harness</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"></head><body><div id="host"></div>'
        f'<script type="module">\n{script}\n{double}\n{host}'
        f"const model = standin({text});\nwindow.double = model;\npage.render({{ model, el }});\n</script>"
        "</body></html>"
    )


def shots(folder: Path, names: list[str]) -> None:
    """Photographs at 1440, 1024 and 390 pixels, by day and by night."""
    from playwright.sync_api import sync_playwright

    from app.browser import find_browser

    folder.mkdir(parents=True, exist_ok=True)
    fonts = _fonts()
    wrongs: list[Any] = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        for name in names:
            (folder / f"{name}.html").write_text(html(name, fonts=fonts))
            for theme in ("light", "dark"):
                for width, height in ((1440, 1000), (1024, 1000), (390, 844)):
                    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
                    page.on("pageerror", lambda error: wrongs.append(error))
                    page.goto(f"file://{folder}/{name}.html")
                    page.wait_for_function("window.leanscope && window.leanscope.ready")
                    if name == "sinks":
                        page.keyboard.press("ArrowRight")
                        page.locator(".guess").nth(1).click()
                    page.wait_for_timeout(500 if name != "home" else 6000)
                    page.screenshot(path=folder / f"{name}-{theme}-{width}.png")
                    page.set_viewport_size({"width": width, "height": 3000 if width < 500 else 1700})
                    page.wait_for_timeout(300)
                    page.screenshot(path=folder / f"{name}-{theme}-{width}-tall.png")
                    page.close()
        browser.close()
    if wrongs:
        raise SystemExit("\n".join(map(str, wrongs)))


def _fonts() -> str:
    try:
        from app.fonts import folder
    except ImportError:
        return ""
    place = folder()
    return f"file://{place}/" if place else ""


if __name__ == "__main__":
    if sys.argv[1] == "shots":
        shots(Path(sys.argv[2]), sys.argv[3:] or ["sinks", "decode", "home"])
    else:
        Path(sys.argv[2]).write_text(html(sys.argv[1]))
