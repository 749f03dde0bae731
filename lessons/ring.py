"""Pass the keys around: a text too long for one device, and blocks of keys and values that go round."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import param

from engine.exact.fused import layer_qkv, naive_attention
from engine.exact.ring import Ring as Answer
from engine.exact.ring import Span, ring_attention
from engine.exact.schedule import LAYOUTS, blocks, idle_share
from engine.exact.timing import hidden, moment, played
from engine.exact.workers import RankDied
from engine.recording import Recording, note, site, step, tap
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, load
from lessons.texts import TEXTS, text_ids
from lessons.views import Arithmetic, Bars, Number, Numbers, Ring, Timeline, knob, of

READY = site("ring.ready", "processes that have started")
STATE = site("ring.state", "what each device does: 0 starts, 1 waits, 2 computes, 3 is done")
BLOCK = site("ring.block", "whose keys and values each device works with")
COMING = site("ring.coming", "whose keys and values are on their way to each device, -1: none")
SHARE = site("ring.share", "how much of the way they have come", low=0.0, high=1.0)
DONE = site("ring.done", "chunk by chunk: which device has finished it, 100 more while it works, -1 not yet, -2 masked")
CHUNKS = site("ring.chunks", "each chunk's first token, the one after its last, and the device that keeps it")
SPANS = site("ring.spans", "what every device did: device, kind, block, begin and end in microseconds")
NOW = site("ring.now", "the moment that is shown", unit="µs", low=0.0)
IDLE = site("ring.idle", "the share of the time in which each device did not compute", low=0.0, high=1.0)
SIMULATED = site("ring.simulated", "1: a simulated link; 2: played through with measured work and such a link")
END = site("ring.end", "when the slower layout is done", unit="µs", low=0.0)
CARRIED = site("ring.carried", "time that blocks were on their way, summed over devices", unit="ms", low=0.0)
BARE = site("ring.bare", "the part of it in which the device that waited did not compute", unit="ms", low=0.0)
QUERIES = site("ring.q", "queries of one head", symbol="Q")
KEYS = site("ring.k", "its keys", symbol="K")
LSE = site("ring.lse", "log of the sum of exponentials over all keys, as the ring merged it", symbol="L")
FRAMES = 48  # moments shown of a ring
ROUNDS = 2  # the least work of so many is taken
WORKING = 100
KINDS = ("compute", "recv", "send")
OWN, HERE = "own", "here"
CLOCKS = (OWN, HERE)


class Turn(Knobs):
    model = choice()
    ranks = param.Integer(4, bounds=(1, 8), label="Devices", doc="Processes, each with its part of the text.")
    length = param.Integer(768, bounds=(4, 1024), label="Length", doc="Tokens of the text.")
    layout: param.Selector = param.Selector(
        default="contiguous", objects=list(LAYOUTS), label="Layout", doc="Zigzag: an early piece and a late one each."
    )
    link: param.Selector = param.Selector(
        default=500,
        objects={"no limit": 0, "2 GB/s": 2000, "500 MB/s": 500, "100 MB/s": 100},
        label="Link speed (simulated)",
        doc="Of each connection between neighbours.",
    )
    overlap = param.Boolean(True, label="Compute meanwhile", doc="Off: a device waits for its next block first.")
    causal = param.Boolean(True, label="Causal", doc="A token looks only at those before it.")
    clock: param.Selector = param.Selector(
        default=OWN,
        objects={"a device each (simulated)": OWN, "as it ran on this machine": HERE},
        label="Clock",
        doc="The work is measured in both; here, the processes share this machine’s cores.",
    )


def run(knobs: Turn) -> None:
    n, causal = knobs.ranks, knobs.causal
    note(total_steps=FRAMES + n + 1, ranks=n, length=knobs.length, causal=causal)
    kept = {layout: blocks(knobs.length, ranks=n, layout=layout) for layout in LAYOUTS}  # or a sentence why not
    model, tokenizer = load(knobs.model)
    story = text_ids(tokenizer, "bread", "", toy=True, tokens=knobs.length) if knobs.model == TOY else []
    ids = story or tokenizer.prompt("\n".join(TEXTS.values()))[: knobs.length]
    if len(ids) < knobs.length:
        raise ValueError(f"Length must be at most {len(ids)} tokens, which is all the text there is.")
    for layout in LAYOUTS:
        tap(CHUNKS, _chunks(kept[layout]), "chunk field", layout=layout)
    _starting(n, 0)
    q, k, v = layer_qkv(model, ids, layer=2)
    q, k, v = (t.float() for t in (q, k, v))
    answers = _rings(q, k, v, knobs)
    exact = naive_attention(q, k, v, causal=causal)
    tap(QUERIES, q[0, 0], "query width")
    tap(KEYS, k[0, 0], "key width")
    tap(LSE, answers["contiguous"].lse[0, 0], "query")
    whole = (4 * q.numel() + q[..., 0].numel()) * q.element_size()
    lanes = {}
    for layout, answer in answers.items():
        lanes[layout, HERE] = [list(rank.spans) for rank in answer.ranks]
        lanes[layout, OWN] = _alone(answer, kept[layout], q, knobs)
        cells = [[turn.cells for turn in turns] for turns in answer.plan]
        found = {"cells": cells, "idle": idle_share(answer.plan), "memory": [r.memory for r in answer.ranks]}
        note(**{layout: {**found, "off": float((answer.output - exact).abs().max())}})
    note(whole=whole, backend=answers["contiguous"].backend, overlap=knobs.overlap)
    for (layout, clock), spans in lanes.items():
        where = {"layout": layout, "clock": clock}
        tap(SPANS, _table(spans), "span field", **where)
        tap(SIMULATED, 2 if clock == OWN else int(knobs.link > 0), "", **where)
        tap(END, round(1e6 * max(_end(lanes[other, clock]) for other in LAYOUTS)), "", **where)
        seconds = _end(spans)
        busy = [sum(s.seconds for s in lane if s.kind == "compute") for lane in spans]
        tap(IDLE, np.array([1 - b / seconds for b in busy], np.float32), "rank", **where)
        way = [hidden(lane) for lane in spans]
        tap(CARRIED, 1e3 * sum(total for total, _ in way), "", **where)
        tap(BARE, 1e3 * sum(total - behind for total, behind in way), "", **where)
    for frame in range(FRAMES):
        for (layout, clock), spans in lanes.items():
            _show(answers[layout], spans, _end(spans) * (frame / (FRAMES - 1)), causal, layout=layout, clock=clock)
        step()


def _rings(q: Any, k: Any, v: Any, knobs: Turn) -> dict[str, Answer]:
    """The ring in both layouts, the last of a few rounds: while processes start, the page sees how many have."""
    up = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal up
        missing = {"waiting": knobs.ranks, "starting": total - done}.get(stage, 0)
        if knobs.ranks - missing > up:  # those left from a run before are up at once
            up = knobs.ranks - missing
            _starting(knobs.ranks, up)
        else:
            step(0)  # nothing new to see; a run that nobody watches any more ends here, and with it the processes

    answers: dict[str, Answer] = {}
    try:
        for _ in range(ROUNDS):
            for layout in LAYOUTS:
                answer = ring_attention(
                    q, k, v, ranks=knobs.ranks, causal=knobs.causal, layout=layout, link=knobs.link * 1e6 or None,
                    overlap=knobs.overlap, progress=progress,
                )  # fmt: skip
                answers[layout] = min(answer, answers.get(layout, answer), key=lambda a: sum(r.work for r in a.ranks))
    except RankDied as died:
        raise ValueError(f"{died} Turn any knob to start it anew.") from None
    return answers


def _alone(answer: Answer, kept: Sequence[Sequence[Any]], q: Any, knobs: Turn) -> list[list[Span]]:
    """The same with a device for each rank: its measured work, and blocks that travel at the link's speed."""
    n = len(answer.ranks)
    work = [[s.work for s in rank.spans if s.kind == "compute"] for rank in answer.ranks]
    token = 2 * q.shape[1] * q.shape[3] * q.element_size()  # bytes of its keys and values in all heads
    size = [token * sum(b - a for a, b in block) for block in kept]
    carried = [[size[(rank - now) % n] for now in range(n - 1)] for rank in range(n)]
    return played(work, carried, link=knobs.link * 1e6 or None, overlap=knobs.overlap)


def _starting(n: int, up: int) -> None:
    tap(READY, up, "")
    for layout, clock in itertools.product(LAYOUTS, CLOCKS):
        tap(STATE, (np.arange(n) < up).astype(np.int32), "rank", layout=layout, clock=clock)
    step()


def _chunks(kept: Sequence[Sequence[Any]]) -> np.ndarray:
    return np.array(sorted((a, b, rank) for rank, block in enumerate(kept) for a, b in block), np.int32)


def _end(spans: Sequence[Sequence[Span]]) -> float:
    return max(s.end for lane in spans for s in lane)


def _table(spans: Sequence[Sequence[Span]]) -> np.ndarray:
    rows = [(i, KINDS.index(s.kind), s.block, s.begin * 1e6, s.end * 1e6) for i, lane in enumerate(spans) for s in lane]
    return np.array(rows).astype(np.int32)


def _show(answer: Answer, spans: Sequence[Sequence[Span]], t: float, causal: bool, **where: str) -> None:
    """What stands at one moment."""
    now = moment(spans, answer.plan, t)
    chunks = sorted({queries for turns in answer.plan for turn in turns for queries, _ in turn.computed})
    place = {chunk: i for i, chunk in enumerate(chunks)}
    done = np.full((len(chunks), len(chunks)), -1, np.int32)
    if causal:
        done[np.triu_indices(len(chunks), 1)] = -2
    for tiles, more in ((now.finished, 0), (now.working, WORKING)):
        for (queries, keys), rank in tiles.items():
            done[place[queries], place[keys]] = rank + more
    for name, values in ((STATE, now.state), (BLOCK, now.block), (COMING, now.coming)):
        tap(name, np.array(values, np.int32), "rank", **where)
    tap(SHARE, np.array(now.share, np.float32), "rank", **where)
    tap(DONE, done, "query key", **where)
    tap(NOW, round(t * 1e6), "", **where)


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    n, first = meta["ranks"], recording.steps - FRAMES
    idle = {(lay, c): recording.stack(IDLE, layout=lay, clock=c)[0] for lay in LAYOUTS for c in CLOCKS}
    took = {(lay, c): recording.stack(NOW, layout=lay, clock=c)[-1] / 1e3 for lay in LAYOUTS for c in CLOCKS}
    carried, bare = (float(recording.stack(s, layout="contiguous", clock=OWN)[0]) for s in (CARRIED, BARE))
    return {
        "name": meta["model"]["name"],
        "n": n,
        "N": meta["length"],
        "part": meta["length"] // n,
        "first": first,
        "half": first + FRAMES // 2,
        "last": recording.steps - 1,
        "idle_first": float(idle["contiguous", OWN][0]),
        "idle_zigzag": float(idle["zigzag", OWN].max()),
        "counted_first": meta["contiguous"]["idle"][0],
        "own_ms": took["contiguous", OWN],
        "here_ms": took["contiguous", HERE],
        "gain": took["contiguous", OWN] / max(1e-3, took["zigzag", OWN]),
        "memory_kb": max(meta["contiguous"]["memory"]) / 1e3,
        "whole_kb": meta["whole"] / 1e3,
        "carried_ms": carried,
        "bare_ms": bare,
        "hidden": 1 - bare / carried if carried else 1.0,
        "off": meta["contiguous"]["off"],
    }


def marks(recording: Recording) -> list[Mark]:
    return [Mark(recording.steps - FRAMES, "the ring begins")]


def _meets(recording: Recording) -> Finding:
    n = recording.meta["ranks"]
    spans = recording.stack(SPANS, layout="contiguous", clock=HERE)[0]
    met = [{int(s[2]) for s in spans if s[0] == rank and s[1] == 0} for rank in range(n)]
    every = all(blocks_met == set(range(n)) for blocks_met in met)
    filled = f"blocks that each of {n} processes met in {n} steps: {', '.join(str(len(m)) for m in met)}"
    why = "" if every else "Some block did not come by."
    return Finding(f"{min(map(len, met))} of {n}", "agrees" if every else "differs", why, filled)


def _memory(recording: Recording) -> Finding:
    f, n = facts(recording), recording.meta["ranks"]
    share = f["memory_kb"] / f["whole_kb"]
    filled = f"{f['memory_kb']:,.0f} kB a device, {f['whole_kb']:,.0f} kB on one: 1/{1 / share:.2f} with {n} devices"
    if n == 1:
        return Finding(f"{share:.2f}", "untestable", "There is one device.", filled)
    close = share * n < 1.6  # a second block of keys and values is on its way: 6/4 and what does not divide
    why = "A second block, the one that comes in, is held besides." if close else "It holds more than two blocks."
    return Finding(f"1/{1 / share:.2f}", "agrees" if close else "differs", why, filled)


def _hidden(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['bare_ms']:.1f} of {f['carried_ms']:.1f} ms uncovered, played with measured work"
    if not f["carried_ms"]:
        return Finding("–", "untestable", "With one device, or a link without limit, nothing takes time.", filled)
    if f["hidden"] > 0.95:
        return Finding(f"{f['hidden']:.0%}", "agrees", "", filled)
    why = "A device whose block is masked has no work to hide a transfer behind, and small blocks little."
    why = why if recording.meta["overlap"] else "With compute and transfer in turn nothing can be hidden."
    return Finding(f"{f['hidden']:.0%}", "differs", why, filled)


def _balance(recording: Recording) -> Finding:
    meta = recording.meta
    rounds = [sum(max(step) for step in zip(*meta[layout]["cells"], strict=True)) for layout in LAYOUTS]
    gain = rounds[0] / rounds[1]
    idle = " → ".join(f"{max(meta[layout]['idle']):.0%}" for layout in LAYOUTS)
    filled = f"slowest device’s cells, step by step: {rounds[0]:,} / {rounds[1]:,}; idle at most {idle}"
    if not meta["causal"] or meta["ranks"] == 1:
        return Finding(f"{gain:.2f}×", "untestable", "Without a mask, or alone, all have the same to do.", filled)
    agrees = gain > 1.2
    why = "By cells alone; the source’s are of 8 GPUs." if agrees else "So few devices gain little."
    return Finding(f"{gain:.2f}×", "agrees" if agrees else "differs", why, filled)


def _exact(recording: Recording) -> Finding:
    off = max(recording.meta[layout]["off"] for layout in LAYOUTS)
    filled = f"max |O_ring − O| = {off:.1e}, both layouts, backend {recording.meta['backend']}"
    why = "" if off < 1e-4 else "More than the rounding of float32 explains."
    return Finding(f"{off:.1e}", "agrees" if off < 1e-4 else "differs", why, filled)


LIU = "Liu 2023, 2310.01889"
# fmt: off
CLAIMS = (
    Claim("After N steps every device has met every block", "architectures", "blocks met", "all", _meets),
    Claim("Memory O(n/N) a device", "architectures", "bytes of a device / bytes on one", "1/N", _memory),
    Claim(
        "Communication is hidden behind computing", f"architectures; {LIU}", "transfer time covered by computing",
        "all of it", _hidden,
    ),
    Claim(
        "Zigzag balances the causal mask", "zhuzilin/ring-flash-attention", "steps of the slowest, contiguous / zigzag",
        "63.0 / 38.5 = 1.64× *", _balance,
    ),
    Claim("The answer is exact", LIU, "max |O_ring − O|", "0", _exact),
)
# fmt: on


def chunk_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """A chunk of queries meets a chunk of keys: what its last query gets of them, merged by log-sum-exp."""
    chunks = recording.stack(CHUNKS, layout=knobs.layout)[0].tolist()
    (qa, qb, rank), (ka, kb, owner) = chunks[at["query"]], chunks[at["key"]]
    title = f"tokens {qa}–{qb - 1} meet keys {ka}–{kb - 1}"
    if recording.meta["causal"] and ka >= qb:
        return Arithmetic(title, (("device", str(rank)), ("pairs to compute", "0")), "All of these keys come later.")
    q, k = recording.stack(QUERIES)[0], recording.stack(KEYS)[0].astype(np.float64)
    i = qb - 1
    scores = k[ka : min(kb, i + 1) if recording.meta["causal"] else kb] @ q[i].astype(np.float64) / math.sqrt(len(q[i]))
    part = float(scores.max() + np.log(np.exp(scores - scores.max()).sum()))
    whole = float(recording.stack(LSE)[0, i])
    lines = (
        ("computed by device", str(rank)),
        ("at step", str((rank - owner) % recording.meta["ranks"] + 1)),
        (f"query {i}: these keys alone, L′ = log Σ e^s", f"{part:.3f}"),
        ("all keys, as the ring merged them, L", f"{whole:.3f}"),
        ("weight of this part’s answer, e^(L′ − L)", f"{math.exp(part - whole):.4f}"),
    )
    note_ = "Each part brings its answer and one number, L′. With these, parts can be merged in any order."
    return Arithmetic(title, lines, note_, (("scores", tuple(scores.tolist())),), {"share": math.exp(part - whole)})


# fmt: off
BEATS = (
    Beat(
        "A text of {N} tokens, too long for one device, let us say. So {n} devices take a part each: real processes, "
        "==started|ring== for you. Each keeps its own queries, and for now its own [[keys and values]]. But its "
        "queries need *all* the keys.",
        scene="ring", step="first", focus="ring", notes="The first start takes seconds: each process imports PyTorch.",
    ),
    Beat(
        "So the keys travel. Each device computes with the block it holds, and at the same time passes it to its "
        "neighbour: watch ==coloured blocks|ring== move on. No device ever holds more than two: {memory_kb:,.0f} kB, "
        "not {whole_kb:,.0f}.",
        scene="ring", step="half", play=True, focus="ring",
    ),
    Beat(
        "After {n} steps every block has been everywhere, and ==the matrix|ring== is complete. Partial answers were "
        "merged by one number a row, the [[log-sum-exp]]. Click a finished piece and see its weight. "
        "The error is {off:.0e}: rounding.",
        scene="ring", step="last", play=True, do=Do("Open a piece of the matrix", cell="ring"),
    ),
    Beat(
        "But the matrix is a triangle: nobody looks ahead. The first device owns the earliest tokens, which may look "
        "at almost nothing.",
        scene="ring", step="first",
        predict=Predict("Which share of the time is device 0 idle?", (0.1, 0.3, 0.6, 0.85), "idle_first", ".0%"),
    ),
    Beat(
        "{idle_first:.0%} idle. ==Its lane|time== ends early, while the last device works all the time. Everybody "
        "waits for the slowest: {own_ms:.1f} ms in all. Scores alone would make it {counted_first:.0%}.",
        scene="time", step="last", play=True, focus="time",
    ),
    Beat(
        "The cure: cut the text into twice as many pieces and give each device an early one *and* a late one. "
        "==In zigzag|zigzag==, all have the same to do: at most {idle_zigzag:.0%} idle, and {gain:.1f} times as fast.",
        scene="balance", step="last", play=True, focus="zigzag",
    ),
    Beat(
        "Passing a block takes time, but as long as computing takes longer, ==nobody notices|time==: {hidden:.0%} of "
        "the transfers are covered. Choose a slower link, and the red gaps open.",
        scene="time", step="last", focus="time", do=Do("Choose a slower link", knob="link"),
    ),
    Beat(
        "An honest word: these clocks are ==played through|time== with measured work, as if each process had a device. "
        "Set **Clock** to see how they really ran here, sharing this machine’s cores: {here_ms:.0f} ms.",
        scene="time", step="last", do=Do("Set the clock", knob="clock"),
    ),
    Beat(
        "Break it. Switch **Compute meanwhile** off. Give eight devices four tokens. Take the mask away: does zigzag "
        "still help? Whatever you do, the answer stays exact, or you get a sentence.",
        scene="ring", step="last", do=Do("Turn Devices", knob="ranks"),
    ),
)
# fmt: on

GLOSSARY = {
    "keys and values": "What a token offers to those after it: keys say how well it fits, values what it hands on.",
    "log-sum-exp": "log Σ e^score over the keys met: with it two partial softmaxes can be joined exactly.",
}

SEEN: dict[str, Any] = {"layout": knob("layout"), "clock": knob("clock")}
WHAT = ("computes", "receives", "sends")


def _timeline(name: str, title: str, **where: Any) -> Timeline:
    how: dict[str, Any] = {"kinds": WHAT, "lanes": "device", "items": "block", "note": "coloured by whose block"}
    spans, now, end, simulated = (of(site, **where) for site in (SPANS, NOW, END, SIMULATED))
    return Timeline(name=name, title=title, tensor=spans, now=now, end=end, simulated=simulated, **how)


def _idle(title: str, layout: str) -> Bars:
    labels = tuple(f"device {i}" for i in range(8))
    return Bars(title=title, span=6, values=of(IDLE, layout=layout, clock=knob("clock")), labels=labels, colour="alarm")


# fmt: off
SCENES = (
    Scene(
        "ring",
        (
            Ring(
                name="ring", title="Devices in a ring", tensor=of(DONE, **SEEN), state=of(STATE, **SEEN),
                block=of(BLOCK, **SEEN), coming=of(COMING, **SEEN), share=of(SHARE, **SEEN),
                chunks=of(CHUNKS, layout=knob("layout")), ready=of(READY), simulated=of(SIMULATED, **SEEN),
                cell=chunk_cell,
            ),
            _timeline("lanes", "The same, as time", **SEEN),
        ),
    ),
    Scene(
        "time",
        (
            _timeline("time", "Who computes, what is on its way", **SEEN),
            Numbers(
                name="hidden", title="Transfers, all devices together",
                numbers=(
                    Number("On their way", of(CARRIED, **SEEN), unit="ms", format=".1f", colour="key"),
                    Number("Not covered by computing", of(BARE, **SEEN), unit="ms", format=".1f", colour="alarm"),
                ),
            ),
        ),
    ),
    Scene(
        "balance",
        (
            _timeline("plain", "Contiguous: one long piece each", layout="contiguous", clock=knob("clock")),
            _timeline("zigzag", "Zigzag: an early piece and a late one", layout="zigzag", clock=knob("clock")),
            _idle("Idle, contiguous", "contiguous"), _idle("Idle, zigzag", "zigzag"),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    mine = (READY, STATE, BLOCK, COMING, SHARE, DONE, CHUNKS, SPANS, NOW, IDLE, SIMULATED, CARRIED, BARE, END)
    return {name: {} for name in (*mine, QUERIES, KEYS, LSE)}


# fmt: off
LESSON = Lesson(
    slug="ring", title="Pass the keys around", question="What if the sequence does not fit on one device?",
    part="The same answer, computed better", order=11, sources=("architectures", LIU), knobs=Turn, run=run, keep=keep,
    beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=(
        "engine.exact.rank:travel", "engine.exact.rank:merge", "engine.exact.ring:_show", "engine.exact.timing:played",
    ),
    looks=frozenset({"layout", "clock"}), facts=facts, marks=marks, glossary=GLOSSARY, step_word="moment",
    footnote="* Forward passes a second on 8 H800 GPUs.", seconds=300,
)
# fmt: on
