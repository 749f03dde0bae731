"""One microscope for every way to spend fewer bits: what lessons on quantisation look at, and the views that show it.

`look_at` shows a small matrix, its codes, what they give back, the error, and the levels; `walk` lets its values fall
one by one. `count` counts bits with their scales. `next_token` and `read_on` show what a change does to a model: the
next token's distribution before and after, and perplexity on a text as it is read. All take an index
(method="k-means"), so that one recording can hold several of a kind; the views take the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from engine.caches.full import Full
from engine.evaluate import surprisals
from engine.quant.affine import Quantised
from engine.quant.kmeans import Codebook, kmeans
from engine.recording import Recording, event, note, record, site, step, tap
from lessons.views import Arithmetic, Bars, Curves, Grid, Line, Number, Numbers, knob, of

VALUES = site("microscope.values", "the values before rounding", symbol="w")
CODES = site("microscope.codes", "which level stands for each value", symbol="q")
BACK = site("microscope.back", "what the codes give back", symbol="ŵ")
ERROR = site("microscope.error", "what rounding changed", symbol="ŵ − w")
LEVELS = site("microscope.levels", "the values that there are codes for")
ENDS = site("microscope.ends", "the first and the last code")
SCALE = site("microscope.scale", "the distance between two levels", symbol="S")
ZERO = site("microscope.zero", "the code that stands for zero", symbol="Z")
BLOCK = site("microscope.block", "the block of each value: those of one block share a scale")
SEEN = site("microscope.seen", "how many values are through")
SQUARED = site(
    "microscope.squared", "mean squared error of the values that are through", symbol="mean (ŵ − w)²", low=0.0
)
DISTORTION = site(
    "microscope.distortion", "sum of squared distances to the nearest centroid", symbol="Σ|w−c|²", low=0.0
)
TYPED = site("microscope.typed", "1 where the matrix is the learner's own, 0 where it comes from the model")
BITS = site("microscope.bits", "bits: as it was, codes, scales and zero points, all, all a value", unit="bits")
NEXT = site("microscope.next", "probability of the next token", low=0.0, high=1.0)
NEXT_IDS = site("microscope.next.ids", "the tokens that are likeliest before or after")
MOVED = site("microscope.moved", "how far the distribution moved: KL divergence from before to after", unit="nats")
PERPLEXITY = site("microscope.perplexity", "e to the mean surprisal of the text so far")
AT = site("microscope.at", "tokens of the text that are read")

PARTS = {"queries, keys, values": "mixer.qkv", "attention’s output": "mixer.out", "gate and up": "ffn.gate_up",
         "down": "ffn.down"}  # fmt: skip
ROWS, COLUMNS = 16, 32  # of a matrix that is looked at: more cells would not travel exactly
FALLS = 24  # steps in which the values of a matrix fall
SHOWN = 6  # likeliest tokens, before and after


def corner(x: Any, *, rows: int = ROWS, columns: int = COLUMNS) -> Any:
    """The upper left corner of a matrix, as large as one can look at."""
    return x[: min(rows, ROWS), : min(columns, COLUMNS)]


def look_at(
    x: Any,
    codes: Any,
    back: Any,
    *,
    levels: Any = None,
    scale: Any = None,
    zero: Any = None,
    ends: tuple[int, int] | None = None,
    block: Any = None,
    **index: Any,
) -> None:
    """One frame: the matrix [row, column], its codes, what they give back, the error; and the levels of each block
    ([block, level]), or what they follow from on an even grid: scale and zero point [block], first and last code."""
    x, back = (np.asarray(_array(a), np.float64) for a in (x, back))
    codes = np.asarray(_array(codes)).astype(np.int32)
    if x.ndim != 2 or not x.size or x.shape[0] > ROWS or x.shape[1] > COLUMNS:
        raise ValueError(f"x must be a matrix of 1 to {ROWS} rows and 1 to {COLUMNS} columns, not {list(x.shape)}")
    if codes.shape != x.shape or back.shape != x.shape:
        raise ValueError(f"codes and back must have the shape of x, {list(x.shape)}")
    tap(VALUES, x.astype(np.float32), "row column", **index)
    tap(CODES, codes, "row column", **index)
    tap(BACK, back.astype(np.float32), "row column", **index)
    tap(ERROR, (back - x).astype(np.float32), "row column", **index)
    given = np.zeros(x.shape) if block is None else np.asarray(_array(block))
    tap(BLOCK, given.astype(np.int32), "row column", **index)
    if levels is not None:
        tap(LEVELS, np.atleast_2d(np.asarray(_array(levels), np.float32)), "block level", **index)
    if scale is not None:
        tap(SCALE, np.asarray(_array(scale), np.float32).reshape(-1), "block", **index)
    if zero is not None:
        tap(ZERO, np.asarray(_array(zero), np.float32).reshape(-1), "block", **index)
    if ends is not None:
        tap(ENDS, np.array(ends, np.int32), "end", **index)
    tap(SQUARED, float(np.square(back - x).mean()), "", **index)


def look_at_affine(x: Any, done: Quantised, **index: Any) -> None:
    """The same of what affine.quantise made of `x`, which is small."""
    grid = done.grid
    look_at(
        x, done.codes, done.reconstruct(), scale=done.scale, zero=done.zero, ends=(grid.low, grid.high),
        block=blocks_of(grid, x), **index,
    )  # fmt: skip


def look_at_codebook(x: Any, book: Codebook, **index: Any) -> None:
    """The same of what kmeans.kmeans made of `x`."""
    levels = book.centroids
    look_at(
        x, book.codes, book.reconstruct(), levels=levels, ends=(0, levels.shape[1] - 1), block=blocks_of(book.grid, x),
        **index,
    )  # fmt: skip


def show_kmeans(x: Any, *, bits: int, **index: Any) -> Codebook:
    """K-means at work on a small matrix: a step for each of its own, with the sum of squared distances and the bits
    that a codebook of 32-bit numbers takes. Keywords of `kmeans` (granularity, group, start, seed) are handed on; the
    rest are the taps' index."""
    asked = {name: index.pop(name) for name in ("granularity", "group", "start", "seed") if name in index}
    with record(keep={"kmeans.*": {}}) as seen:
        book = kmeans(x, bits=bits, most_steps=40, **asked)
    moves, blocks = seen.freeze(), blocks_of(book.grid, x)
    tracks = (moves.track(f"kmeans.{name}").rows() for name in ("codes", "centroids", "distortion"))
    for (_, codes), (_, levels), (_, loss) in zip(*tracks, strict=True):
        look_at(x, codes, levels[blocks, codes], levels=levels, ends=(0, 2**bits - 1), block=blocks, **index)
        tap(DISTORTION, float(loss[0]), "", **index)
        count(book.codes.numel(), codes=book.codes.numel() * bits, extra=32 * book.centroids.numel(), **index)
        step(label="k-means")
    return book


def blocks_of(grid: Any, x: Any) -> np.ndarray:
    """The number of each value's block."""
    blocks = np.asarray(_array(grid.blocks(x)))
    return np.broadcast_to(np.arange(len(blocks))[:, None], blocks.shape).reshape(tuple(x.shape))


def walk(x: Any, back: Any, **index: Any) -> None:
    """Let the values fall, row by row: a step for each, or for a few where there are many."""
    x, back = (np.asarray(_array(a), np.float64).reshape(-1) for a in (x, back))
    stride = max(1, math.ceil(x.size / FALLS))
    for seen in [*range(0, x.size, stride), x.size]:
        tap(SEEN, seen, "", **index)
        if seen:
            tap(SQUARED, float(np.square(back[:seen] - x[:seen]).mean()), "", **index)
        step(label="value")


def count(values: int, *, codes: int, extra: int, before: int = 32, **index: Any) -> None:
    """Bits of `values` numbers: before at so many each, then their codes and what these need besides (scales,
    zero points, codebooks). `codes` and `extra` are in bits, all of them."""
    after = codes + extra
    tap(BITS, np.array([values * before, codes, extra, after, after / values], np.float32), "part", **index)


def count_of(done: Quantised | Codebook, **index: Any) -> None:
    """The same of a quantised tensor, by its own count."""
    codes = done.codes.numel() * done.grid.bits
    count(done.codes.numel(), codes=codes, extra=done.storage_bits - codes, **index)


def next_token(before: Any, after: Any, tokenizer: Any, ids: Any, **index: Any) -> float:
    """What two models expect next, in the later half of the text `ids` [1, tokens], where the first of them is half
    sure: the likeliest tokens of both. Returns how far the distribution moved there, in nats."""
    sure = before.logits(before.hidden(ids))[0].float().softmax(-1).amax(-1).cpu().numpy()
    half = len(sure) // 2
    at = half + int(np.abs(sure[half:] - 0.5).argmin())
    was, now = (_probabilities(model, ids[:, : at + 1]) for model in (before, after))
    top = sorted({*np.argsort(-was)[:SHOWN].tolist(), *np.argsort(-now)[: SHOWN // 2].tolist()}, key=lambda i: -was[i])
    tap(NEXT, was[top], "token", when="before", **index)
    tap(NEXT, now[top], "token", when="after", **index)
    tap(NEXT_IDS, np.array(top, np.int32), "token", **index)
    event("text.words", words=dict(zip(map(str, top), tokenizer.pieces(top), strict=True)))
    note(next_after="".join(tokenizer.pieces(ids[0, max(0, at - 7) : at + 1].tolist())).strip())
    moved = float(np.sum(was * (np.log(was + 1e-12) - np.log(now + 1e-12))))
    tap(MOVED, moved, "", **index)
    return moved


def _probabilities(model: Any, ids: Any) -> np.ndarray:
    return np.asarray(_array(model.logits(model.hidden(ids)[:, -1:])[0, 0].float().softmax(-1)), np.float32)


def read_on(model: Any, ids: Any, *, chunk: int = 16, **index: Any) -> float:
    """Read `ids` [1, tokens], a step for each `chunk` tokens; returns the perplexity of all of it."""
    nats: list[float] = []
    for part in surprisals(model, ids, cache=Full(), chunk=chunk):
        nats += part[0].tolist()
        heard = np.array(nats[1:])
        if heard.size:
            tap(PERPLEXITY, float(np.exp(np.minimum(heard.mean(), 80.0))), "", **index)
            tap(AT, len(nats), "", **index)
        step(label="reading")
    return float(np.exp(np.minimum(np.mean(nats[1:]), 80.0)))


def perplexities(recording: Recording, key: str = "method") -> dict[str, float]:
    """The perplexity of each reading, by its index."""
    found = [track for track in recording.tracks if track.name == PERPLEXITY]
    return {str(track.index.get(key, "")): float(track.latest()) for track in found}


def bits_of(recording: Recording, **index: Any) -> dict[str, float]:
    """What `count` counted, by name."""
    names = ("before", "codes", "extra", "after", "each")
    return dict(zip(names, recording.track(BITS, **index).latest().tolist(), strict=True))


def cell_sum(recording: Recording, knobs: Any, at: Mapping[str, int], **index: Any) -> Arithmetic:
    """One value: its code, what the code gives back, and the error."""
    i, j, when = at["row"], at["column"], at.get("step")
    read = lambda name: recording.track(name, **index).latest(when)  # noqa: E731
    w, q, back = (read(name)[i, j] for name in (VALUES, CODES, BACK))
    block = int(read(BLOCK)[i, j])
    values = {"value": float(w), "code": float(q), "back": float(back), "error": float(back - w)}
    lines: list[tuple[str, str]] = [("w", f"{w:.6g}")]
    if recording.has(SCALE, **index):
        S, Z = float(read(SCALE)[block]), float(read(ZERO)[block])
        lines += [
            (f"w ÷ scale = {w:.4g} ÷ {S:.4g}", f"{w / S:.4f}"),
            ("rounded, plus the zero point: the code", f"{round(float(w) / S):d} + {Z:g} → {q:d}"),
            (f"scale · (code − zero point) = {S:.4g} · ({q:d} − {Z:g})", f"{back:.4f}"),
        ]
    elif recording.has(LEVELS, **index):
        levels = np.sort(read(LEVELS)[block])
        near = sorted(range(len(levels)), key=lambda n: abs(levels[n] - w))[:3]
        lines += [(f"distance to level {n}, {levels[n]:.4g}", f"{abs(levels[n] - w):.4f}") for n in near]
        lines += [("the nearest: the code", f"{q:d}"), ("what it gives back", f"{back:.4f}")]
    lines.append(("error", f"{back - w:+.4f}"))
    return Arithmetic(title=f"row {i + 1}, column {j + 1}", lines=tuple(lines), values=values)


def grid_view(
    *, name: str = "matrix", title: str, levels: bool, walked: bool = True, edit: str = "", **more: Any
) -> Grid:
    """The matrix and its number line. `levels`: those of a codebook are drawn, else an even grid's. Further keywords
    are the view's own (note, span, labels, block_word, cell, index)."""
    index: Mapping[str, Any] = more.pop("index", {})
    even = not levels

    def opened(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
        asked = {k: getattr(knobs, v.name) if isinstance(v, knob) else v for k, v in index.items()}
        return cell_sum(recording, knobs, at, **asked)

    return Grid(
        name=name, title=title, tensor=of(VALUES, **index), codes=of(CODES, **index), back=of(BACK, **index),
        error=of(ERROR, **index), ends=of(ENDS, **index), block=of(BLOCK, **index),
        levels=of(LEVELS, **index) if levels else None, scale=of(SCALE, **index) if even else None,
        zero=of(ZERO, **index) if even else None, seen=of(SEEN, **index) if walked else None,
        edit=knob(edit) if edit else None, **{"cell": opened, **more},
    )  # fmt: skip


def bits_view(*, name: str = "bits", title: str = "Bits, counted", **more: Any) -> Numbers:
    """What the codes and their scales take."""
    index: Mapping[str, Any] = more.pop("index", {})
    number = lambda label, part, **look: Number(label, of(BITS, part=part, **index), **look)  # noqa: E731
    return Numbers(
        name=name, title=title,
        numbers=(
            number("As it was", 0, unit="bits"),
            number("Codes", 1, unit="bits", colour="recomputed"),
            number("Scales, zero points, codebooks", 2, unit="bits", colour="alarm"),
            number("All, a value", 4, unit="bits", format=".2f", colour="value"),
        ), **more,
    )  # fmt: skip


def next_views(*, span: int = 6, **more: Any) -> tuple[Bars, Bars]:
    """The next token's distribution, before and after."""
    index: Mapping[str, Any] = more.pop("index", {})
    labels = of(NEXT_IDS, **index)
    made = (("before", "What comes next: as it was", "kept"), ("after", "What comes next: rounded", "recomputed"))
    first, second = (
        Bars(name=f"next_{when}", title=title, span=span, values=of(NEXT, when=when, **index), labels=labels,
             colour=colour, **more)
        for when, title, colour in made
    )  # fmt: skip
    return first, second


def reading_view(
    lines: Iterable[tuple[str, Mapping[str, Any], str]], *, name: str = "reading", title: str = "Perplexity so far",
    **more: Any,
) -> Curves:  # fmt: skip
    """Perplexity as the text is read: (label, index, colour) for each reading."""
    drawn = tuple(Line(label, of(PERPLEXITY, **ix), colour=colour, x=of(AT, **ix)) for label, ix, colour in lines)
    return Curves(name=name, title=title, lines=drawn, x_label="token", **{"log": True, **more})


def _array(x: Any) -> Any:
    """A tensor on whatever device as NumPy, anything else as it is."""
    return x.detach().cpu().numpy() if hasattr(x, "detach") else x
