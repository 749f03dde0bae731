"""Never write the matrix down: exact attention tile by tile, with a softmax that is kept up to date."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine import cost
from engine.exact.flash import Tile, choose_blocks, flash_attention, online_softmax, tile_scores, tiles
from engine.exact.fused import fused_against_naive, kernel_that_ran, layer_qkv, naive_attention
from engine.recording import Recording, labelled, note, site, step, tap
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, load
from lessons.texts import text_ids
from lessons.views import Arithmetic, Curves, Line, Number, Numbers, Tiles, knob, of

MATRIX = site("flash.matrix", "the whole matrix, as standard attention writes it down", symbol="P", low=0.0, high=1.0)
WHOLE_SCORES = site("flash.matrix.scores", "the scores behind it", symbol="S")
QUERIES = site("flash.q", "the queries of the head", symbol="Q")
KEYS = site("flash.k", "its keys", symbol="K")
EXACT = site("flash.exact", "the chosen row's answer from the whole matrix", symbol="O_i")
ROOM = site("flash.room", "bytes that the SRAM has", unit="bytes")
PEAK = site("flash.peak", "bytes in HBM at most, of one head", unit="bytes")
FASTER = site("flash.milliseconds", "median of a few rounds, for all heads of the layer", unit="ms")
CAUSAL = site("flash.causal", "1: a query may not look at later keys")
BARE_SUM = site("flash.bare.sum", "the same sum, were nobody to mind a row without keys")
LONG = 1024  # tokens at which kernels are timed: the text again and again, since values do not change the time
ROUNDS = 3
MAIN = {"sweep": "main"}  # the sweep that all scenes but the trap show
BY_KEYS, BY_QUERIES = "keys", "queries"


class Turn(Knobs):
    model = choice()
    Br = param.Integer(64, bounds=(8, 96), label="Block rows", doc="Queries of a tile.")
    Bc = param.Integer(32, bounds=(8, 96), label="Block columns", doc="Keys of a tile.")
    sram = param.Integer(64, bounds=(8, 192), label="SRAM, KiB", doc="The small fast memory. An A100 has 192.")
    fill = param.Boolean(False, label="Fill the SRAM", doc="Tiles as large as the paper's rule allows.")
    length = param.Integer(256, bounds=(64, 384), label="Length", doc="Tokens of the text.")
    causal = param.Boolean(True, label="Causal", doc="A token looks only at those before it.")
    order: param.Selector = param.Selector(
        default=BY_QUERIES,
        objects={"query block by query block (2023)": BY_QUERIES, "key block by key block (2022)": BY_KEYS},
        label="Sweep",
        doc="Which block stays in SRAM while the other kind passes.",
    )
    row = param.Integer(200, bounds=(0, 383), label="Row", doc="The query whose answer you follow.")
    layer = param.Integer(2, bounds=(0, 29), label="Layer", doc="Whose queries, keys and values.")
    head = param.Integer(3, bounds=(0, 8), label="Head", doc="Which of its heads.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model)
    ids = text_ids(tokenizer, "lighthouse", "", toy=knobs.model == TOY, tokens=knobs.length)
    q, k, v = layer_qkv(model, ids, layer=min(knobs.layer, model.shape.layers - 1))
    _, H, N, d = q.shape
    size, room = q.element_size(), knobs.sram * 1024
    Br, Bc = choose_blocks(room, d, value_bytes=size) if knobs.fill else (knobs.Br, knobs.Bc)
    Br, Bc = min(Br, N), min(Bc, N)
    head, row, causal = min(knobs.head, H - 1), min(knobs.row, N - 1), knobs.causal
    count = math.ceil(N / Br) * math.ceil(N / Bc)
    note(tiles=count, total_steps=count + math.ceil(N / Bc), d=d, heads=H, sram=room)
    whole = tile_scores(q, k, Tile(slice(0, N), slice(0, N), False), causal=causal)[0, head]  # N N
    tap(WHOLE_SCORES, whole.float(), "query key")
    tap(MATRIX, whole.softmax(-1), "query key")
    tap(QUERIES, q[0, head], "query width")
    tap(KEYS, k[0, head], "key width")
    tap(ROOM, room, "")
    exact = naive_attention(q, k, v, causal=causal)
    tap(EXACT, exact[0, head, row].float(), "width")
    tap(PEAK, cost.flash_peak(N, d, order=knobs.order) * size, "", way="tiles")
    tap(PEAK, cost.naive_peak(N, d) * size, "", way="naive")
    tap(CAUSAL, int(causal), "", sweep="main")
    tap(CAUSAL, 1, "", sweep="right")
    tap(BARE_SUM, 0.0, "")
    how: dict[str, Any] = {"causal": causal, "order": knobs.order, "sram": room, "head": head, "row": row}
    with labelled(**MAIN):
        found = flash_attention(q, k, v, Br=Br, Bc=Bc, **how)
    note(
        moved=found.moved, naive=found.naive_moved, held=found.sram, peak=found.peak, naive_peak=found.naive_peak,
        computed=found.computed, skipped=found.skipped, off=float((found.output - exact).abs().max()),
        largest=float(exact.abs().max()),
    )  # fmt: skip
    _time(q, k, v, causal=causal)
    _from_the_right(q, k, v, Br=Br, Bc=Bc, head=head)


def _time(q: Any, k: Any, v: Any, *, causal: bool) -> None:
    """PyTorch's own kernel and the naive form, on these values and on a longer text made of them."""
    longer = [t.repeat(1, 1, max(1, round(LONG / t.shape[2])), 1) for t in (q, k, v)]
    times = fused_against_naive(*longer, causal=causal, rounds=ROUNDS)
    kind, operation = kernel_that_ran(q, k, v, causal=causal)
    note(kernel=kind, operation=operation, timed=longer[0].shape[2], device=q.device.type)
    note(naive_ms=times.naive * 1e3, fused_ms=times.fused * 1e3)
    tap(FASTER, times.naive * 1e3, "", way="naive")
    tap(FASTER, times.fused * 1e3, "", way="fused")


def _from_the_right(q: Any, k: Any, v: Any, *, Br: int, Bc: int, head: int) -> None:
    """The first block of queries meets its keys from the last to the first: so it begins with tiles that are masked."""
    q, k, v = (t[:1, head : head + 1] for t in (q, k, v))  # 1 1 N D
    row = [tile for tile in tiles(q.shape[2], Br=Br, Bc=Bc, causal=True, order="queries") if not tile.rows.start]
    height = row[0].height
    m, l, o = q.new_full((1, 1, height), -np.inf), q.new_zeros((1, 1, height)), q.new_zeros((1, 1, height, q.shape[3]))
    bare_m, bare_l = np.full(height, -np.inf), np.zeros(height)
    for tile in reversed(row):
        scores = tile_scores(q, k, tile, causal=True)  # -inf where a query may not look
        m, l, o = online_softmax(m, l, o, scores, v[..., tile.columns, :])
        s = scores[0, 0].double().cpu().numpy()
        with np.errstate(invalid="ignore"):  # this is what the trap is about
            new = np.maximum(bare_m, s.max(1))
            shrink = np.exp(bare_m - new)
            bare_m, bare_l = new, shrink * bare_l + np.exp(s - new[:, None]).sum(1)
        tap("flash.tile", np.array([0, height, tile.columns.start, tile.columns.stop], np.int32), "edge", sweep="right")
        tap("flash.max", m[0, 0].float(), "query", sweep="right")
        tap("flash.sum", l[0, 0].float(), "query", sweep="right")
        if not tile.masked:
            tap("flash.scores", scores[0, 0].float(), "row column", sweep="right")
        tap("flash.sram", 0 if tile.masked else 1, "", sweep="right")
        tap(BARE_SUM, float(bare_l[0]), "")
        step()


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    N, d, Br, Bc = meta["length"], meta["width"], meta["Br"], meta["Bc"]
    edges = recording.stack("flash.tile", **MAIN)
    row = meta["row"]
    mine = [i for i, (a, b, _, _) in enumerate(edges) if a <= row < b]
    moved = recording.stack("flash.moved", **MAIN)
    bare = recording.stack(BARE_SUM)
    largest = recording.stack("flash.max", **MAIN)[mine, row]
    seen = [i for i, value in zip(mine, largest, strict=True) if np.isfinite(value)]
    return {
        "name": meta["model"]["name"],
        "N": N,
        "d": d,
        "Br": Br,
        "Bc": Bc,
        "cells": N * N,
        "row": row,
        "tiles": meta["tiles"],
        "computed": meta["computed"],
        "skipped": meta["skipped"],
        "second": min(1, meta["tiles"] - 1),
        "row_begin": seen[0],
        "row_next": seen[min(1, len(seen) - 1)],
        "row_end": seen[-1],
        "m_first": float(recording.stack("flash.max", **MAIN)[seen[0], row]),
        "m_last": float(recording.stack("flash.max", **MAIN)[seen[-1], row]),
        "l_last": float(recording.stack("flash.sum", **MAIN)[seen[-1], row]),
        "end": meta["tiles"] - 1,
        "counted": meta["tiles"],
        "moved": meta["moved"],
        "naive": meta["naive"],
        "moved_kb": moved[-1] / 1e3,
        "naive_kb": meta["naive"] / 1e3,
        "ratio": meta["naive"] / meta["moved"],
        "held_kb": meta["held"] / 1e3,
        "tile_cells": Br * Bc,
        "peak_kb": meta["peak"] / 1e3,
        "naive_peak_kb": meta["naive_peak"] / 1e3,
        "off": meta["off"],
        "speedup": meta["naive_ms"] / meta["fused_ms"],
        "timed": meta["timed"],
        "trap": meta["tiles"],
        "trap_end": recording.steps - 1,
        "guarded": float(recording.stack("flash.sum", sweep="right")[-1, 0]),
        "bare": "not a number" if np.isnan(bare[-1]) else f"{bare[-1]:.2f}",
    }


def marks(recording: Recording) -> list[Mark]:
    f = facts(recording)
    return [Mark(f["row_end"], f"row {f['row']} is done"), Mark(f["trap"], "a sweep from the right")]


def _memory(recording: Recording) -> Finding:
    meta = recording.meta
    N, d, order = meta["length"], meta["width"], meta["order"]
    sizes = [2**n for n in range(13, 18)]
    slopes = [
        cost.growth_exponent(sizes, [float(peak(n)) for n in sizes])
        for peak in (lambda n: cost.flash_peak(n, d, order=order), lambda n: cost.naive_peak(n, d))
    ]
    agrees = abs(slopes[0] - 1) < 0.02 and abs(slopes[1] - 2) < 0.05
    filled = f"{meta['peak']:,} B vs {meta['naive_peak']:,} B at N = {N}; slopes at N = {sizes[0]:,} to {sizes[-1]:,}"
    why = "" if agrees else "The counted growth is another."
    return Finding(f"N^{slopes[0]:.2f} vs N^{slopes[1]:.2f}", "agrees" if agrees else "differs", why, filled)


def _exact(recording: Recording) -> Finding:
    meta = recording.meta
    share = meta["off"] / meta["largest"]
    filled = f"max |O − O_naive| = {meta['off']:.1e}, of values up to {meta['largest']:.2f}"
    why = "" if share < 1e-5 else "More than the rounding of float32 explains."
    return Finding(f"{meta['off']:.1e}", "agrees" if share < 1e-5 else "differs", why, filled)


def _faster(recording: Recording) -> Finding:
    meta = recording.meta
    times = meta["naive_ms"] / meta["fused_ms"]
    where = "this GPU" if meta["device"] == "cuda" else "this CPU, whose caches hold what a GPU’s SRAM holds"
    filled = f"{meta['timed']} tokens, {meta['heads']} heads: {meta['naive_ms']:.1f} ms / {meta['fused_ms']:.1f} ms"
    if 2 <= times <= 4:
        return Finding(f"{times:.1f}×", "agrees", f"Timed on {where}.", filled)
    kind = "More" if times > 4 else "Less"
    return Finding(f"{times:.1f}×", "differs", f"{kind}, timed on {where}; the source’s is of GPUs.", filled)


def _default(recording: Recording) -> Finding:
    meta = recording.meta
    agrees = meta["kernel"] == "flash"
    why = "" if agrees else f"For these sizes on {meta['device']} PyTorch chose another kernel."
    return Finding(
        meta["kernel"], "agrees" if agrees else "differs", why, f"{meta['operation']} ran on {meta['device']}"
    )


def _traffic(recording: Recording) -> Finding:
    d = recording.meta["width"]
    N, rooms = 8192, [4 * d * d * 2**n for n in range(5)]  # values; below d² a block of queries is cut short too
    counts = [float(cost.flash_accesses(N, d, Br=min(M // (4 * d), d), Bc=M // (4 * d))) for M in rooms]
    slope = cost.growth_exponent(rooms, counts)
    agrees = abs(slope + 1) < 0.15
    filled = f"N = {N:,}, d = {d}, M = {rooms[0]:,} to {rooms[-1]:,} values: {counts[0]:.3g} → {counts[-1]:.3g}"
    why = "" if agrees else "What is read once whatever the tiles weighs too much here."
    return Finding(f"M^{slope:.2f}", "agrees" if agrees else "differs", why, filled)


DAO = "Dao 2022, 2205.14135"
# fmt: off
CLAIMS = (
    Claim("Memory O(n) instead of O(n²)", "architectures", "bytes in HBM at most", "n vs n²", _memory),
    Claim("No loss of quality: the answer is exact", "architectures", "max |O − O_naive|", "0", _exact),
    Claim("2 to 4 times faster", "architectures", "time(naive) / time(PyTorch’s fused)", "2–4× *", _faster),
    Claim("It is PyTorch’s default", "architectures", "the kernel that ran for these q, k, v", "default", _default),
    Claim("HBM accesses fall as SRAM grows: Θ(N²d²/M)", DAO, "slope of log accesses over log M", "M⁻¹", _traffic),
)
# fmt: on


def share_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """One cell: its score, what its tile made of it, and what it is worth at the end."""
    i, j, meta = at["query"], at["key"], recording.meta
    if meta["causal"] and j > i:
        return Arithmetic(
            f"query {i} may not look at key {j}", (("score", "−∞"), ("exp(−∞ − m)", "0")), "It comes later in the text."
        )
    edges = recording.stack("flash.tile", **MAIN)
    now = next(n for n, (a, b, c, e) in enumerate(edges) if a <= i < b and c <= j < e)
    m, l = recording.stack("flash.max", **MAIN)[:, i], recording.stack("flash.sum", **MAIN)[:, i]
    before = m[now - 1] if now else -np.inf
    q, k = recording.stack(QUERIES)[0, i], recording.stack(KEYS)[0, j]
    score = float(recording.stack(WHOLE_SCORES)[0, i, j])
    last = meta["tiles"] - 1
    final = math.exp(score - m[last]) / l[last]
    lines = (
        (f"q · k / √{len(q)}", f"{score:.3f}"),
        ("largest score before this tile, m", f"{before:.3f}".replace("-inf", "−∞")),
        ("and with it, m′", f"{m[now]:.3f}"),
        ("older sums shrink by e^(m − m′)", f"{math.exp(before - m[now]):.4f}"),
        ("this cell adds e^(score − m′)", f"{math.exp(score - m[now]):.4f}"),
        ("the sum is then l", f"{l[now]:.4f}"),
        (f"in the end e^(score − {m[last]:.3f}) / {l[last]:.3f}", f"{final:.4f}"),
        ("standard attention has", f"{recording.stack(MATRIX)[0, i, j]:.4f}"),
    )
    return Arithmetic(
        title=f"tile {now + 1} of {meta['tiles']}: query {i}, key {j}",
        lines=lines,
        note="No step needed another tile’s scores: only m and l were carried along.",
        vectors=(("q", tuple(q.tolist())), ("k", tuple(k.tolist())), ("q × k", tuple((q * k).tolist()))),
        values={"share": final},
    )


# fmt: off
BEATS = (
    Beat(
        "Attention compares every token with every other: {N} tokens, {cells:,.0f} scores. ==On the right|tiles==, the "
        "standard way writes them all to [[HBM]], reads them back, writes the shares, reads those. Most of its time "
        "goes into carrying. ==On the left|tiles==, a small tile at a time.",
        scene="sweep", step="second", focus="tiles", notes="Step a few tiles by hand before playing.",
    ),
    Beat(
        "A tile of {Br} queries and {Bc} keys fits into [[SRAM]]: {held_kb:.0f} kB with all it needs. It is computed, "
        "used, forgotten. ==Hatched tiles|tiles== lie in the future: {skipped} of {tiles} are skipped outright. Play: "
        "what is faint on the left is stored nowhere.",
        scene="sweep", step="end", play=True, focus="tiles",
    ),
    Beat(
        "But [[softmax]] divides by a sum over the *whole* row! Follow row {row}. Its first tile finds the largest "
        "score m = {m_first:.2f} and a sum of exponentials, and ==a first answer|row==, as if these keys were all.",
        scene="sweep", step="row_begin", focus="row",
    ),
    Beat(
        "A larger score turns up? Then everything so far shrinks by e^(m − m′), and the new keys are added. Two "
        "numbers a row suffice. ==The answer|row== moves towards the dashed one and, after the last tile, **is** it: "
        "m = {m_last:.2f}, l = {l_last:.2f}.",
        scene="sweep", step="row_end", play=True, focus="row",
    ),
    Beat(
        "Click a cell to see both sums, the tile’s and the matrix’s, come to the same share.",
        scene="sweep", step="row_end", focus="tiles", do=Do("Open a cell’s arithmetic", cell="tiles"),
    ),
    Beat(
        "Now count what travels between HBM and SRAM. Tiles reread keys and values for each block of queries; the "
        "standard way moves the matrix four times.",
        scene="sweep", step="second",
        predict=Predict(
            "How many times fewer bytes do the tiles move?", (0.8, 3, 12, 40), "ratio", format=".1f", unit="×"
        ),
    ),
    Beat(
        "{ratio:.1f} times fewer: ==the curves|bytes== end at {moved_kb:.0f} and {naive_kb:.0f} kB. Larger tiles "
        "reread less: turn **Fill the SRAM** on. At {timed} tokens, PyTorch’s own fused kernel is "
        "==here {speedup:.1f} times as fast|clock== as the naive form. Our Python loop is no kernel: of it we count "
        "bytes, not time.",
        scene="bytes", step="counted", focus="bytes", do=Do("Fill the SRAM", knob="fill"),
    ),
    Beat(
        "A trap. Sweep the first queries’ keys ==from the right|right==: these tiles are masked whole, so m stays −∞, "
        "and −∞ − (−∞) is no number. ==Without care|care== the sum is {bare} and stays so, whatever comes later. "
        "Skipping such tiles, or one guard, gives {guarded:.2f}.",
        scene="trap", step="trap_end", play=True, focus="care",
    ),
    Beat(
        "Break it. Make tiles so small that they move *more* than the standard way. Make them too large for the SRAM. "
        "Sweep key block by key block, as the first paper did: who moves less? The answer’s error, {off:.0e}, should "
        "never grow.",
        scene="sweep", step="end", do=Do("Turn Block rows down", knob="Br"),
    ),
)
# fmt: on

GLOSSARY = {
    "HBM": "High-bandwidth memory: a GPU’s main memory. Large, and slow beside its arithmetic.",
    "SRAM": "The small memory on the chip, beside the arithmetic: ten times as fast, a few hundred kB.",
    "softmax": "Turns scores into shares that add up to one: e to each score, divided by the sum.",
}

ROW = {"query": knob("row"), **MAIN}
NOTE = "counted, for one head"


def _sweep(name: str, title: str) -> Tiles:
    sites = {"tile": "tile", "scores": "scores", "largest": "max", "total": "sum", "held": "sram", "width": "row"}
    counted: dict[str, Any] = {
        "moved": of("flash.moved", **MAIN),
        "whole_moved": of("flash.naive", **MAIN),
        "room": of(ROOM),
    }
    peaks: dict[str, Any] = {"peak": of(PEAK, way="tiles"), "whole_peak": of(PEAK, way="naive")}
    main: dict[str, Any] = {what: of(f"flash.{where}", **MAIN) for what, where in sites.items()}
    look: dict[str, Any] = {"tensor": of(MATRIX), "causal": of(CAUSAL, **MAIN), "row": knob("row"), "cell": share_cell}
    return Tiles(name=name, title=title, **main, **counted, **peaks, **look)


# fmt: off
SCENES = (
    Scene(
        "sweep",
        (
            _sweep("tiles", "The same matrix, twice"),
            Numbers(
                name="sums", title="What the row carries along", span=5,
                numbers=(
                    Number("Largest score, m", of("flash.max", **ROW), format=".3f", colour="query"),
                    Number("Sum, l", of("flash.sum", **ROW), format=".3f", colour="sink"),
                    Number("Keys met", of("flash.met", **ROW), colour="key"),
                ),
            ),
            Curves(
                name="row", title="The row’s answer, if the keys so far were all", span=7, across="width",
                x_label="width", format=".3f",
                lines=(
                    Line("so far", of("flash.row", **MAIN), colour="recent"),
                    Line("from the whole matrix", of(EXACT), colour="ink", dashed=True),
                ),
            ),
        ),
    ),
    Scene(
        "bytes",
        (
            Curves(
                name="bytes", title="Bytes moved", note=NOTE, span=7, x_label="tile", y_label="bytes", format=",.3s",
                lines=(
                    Line("tiles", of("flash.moved", **MAIN), colour="recent"),
                    Line("standard attention", of("flash.naive", **MAIN), colour="alarm"),
                ),
            ),
            Numbers(
                name="clock", title="Timed here", note="all heads, median", span=5,
                numbers=(
                    Number("Naive", of(FASTER, way="naive"), unit="ms", format=".1f", colour="alarm"),
                    Number("PyTorch’s fused kernel", of(FASTER, way="fused"), unit="ms", format=".1f", colour="recent"),
                ),
            ),
            _sweep("small", "Where the sweep is"),
        ),
    ),
    Scene(
        "trap",
        (
            Tiles(
                name="right", title="From the last keys to the first", span=12, tensor=of(MATRIX), mirror=False,
                tile=of("flash.tile", sweep="right"), scores=of("flash.scores", sweep="right"),
                largest=of("flash.max", sweep="right"), total=of("flash.sum", sweep="right"),
                held=of("flash.sram", sweep="right"), causal=of(CAUSAL, sweep="right"),
            ),
            Numbers(
                name="care", title="The first query’s sum", span=12,
                numbers=(
                    Number("Largest score, m", of("flash.max", sweep="right", query=0), format=".2f", colour="query"),
                    Number("Sum, without care", of(BARE_SUM), format=".2f", colour="alarm"),
                    Number("Sum, guarded", of("flash.sum", sweep="right", query=0), format=".2f", colour="value"),
                ),
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"flash.*": {}}


# fmt: off
LESSON = Lesson(
    slug="flash", title="Never write the matrix down",
    question="How can attention be exact without ever holding the n² matrix?",
    part="The same answer, computed better", order=10, sources=("architectures", DAO), knobs=Turn, run=run, keep=keep,
    beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.exact.flash:flash_attention", "engine.exact.flash:online_softmax", "engine.exact.flash:tile_scores"),
    bounded_by={"layer": "layers", "head": "heads"}, facts=facts, marks=marks, glossary=GLOSSARY, step_word="tile",
    footnote="* On a GPU, in the papers’ own measurements.",
)
# fmt: on
