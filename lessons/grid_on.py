"""What training with the grid on shows: which line each weight stands for, how far it went, what the model can do.

`look` puts one corner of a matrix under the microscope. `with_the_grid` trains a copy of a model, a step of the page
for each of its own; `train_on` does so with any model, and `longer` judges the longer runs that ship.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine import checkpoints
from engine.quant.affine import Grid, place, snap
from engine.quant.qat import prepare, staircase
from engine.recipes import Recipe, Stage
from engine.recording import Recording, event, note, site, step, tap
from engine.toyland import Grammar
from engine.train import measure, train
from lessons import microscope
from lessons.arithmetic import nearest
from lessons.views import Arithmetic

CURVE = site("qat.curve", "perplexity while it trains", low=0.0)
AT = site("qat.curve.at", "steps of training so far")
BITS = site("qat.bits", "bits of each weight", unit="bits")
PPL = site("qat.perplexity", "e to the mean surprisal, on texts of Toyland that no model was trained on")
RECALL = site("qat.recall", "share of the questions' words that come first", low=0.0, high=1.0)
STAIR_X = site("qat.stair.x", "a weight, in steps of its grid", symbol="W/s")
STAIR = site("qat.stair", "what the forward pass makes of it")
SLOPE = site("qat.slope", "the slope that the gradient is told")
STOOD = site("qat.stood", "where the weights of one row stand, in steps of their grid", symbol="W/s")
USED = site("qat.used", "the line that each of them computes with")
PATH = site("qat.path", "where one weight stands, in steps of its grid", symbol="W/s")
GRADIENT = site("qat.gradient", "the gradient that has passed the rounding", symbol="∂L/∂W")
FLIPPED = site("qat.flipped", "share of the weights with another code than before training", low=0.0, high=1.0)
AWAY = site("qat.away", "mean distance of a weight from the nearest line, in steps of the grid", low=0.0)

LONG = (8, 4, 3, 2)  # bits of the longer runs that ship
ROWS, COLUMNS, FOLLOWED = 8, 24, 5  # of a matrix that are looked at; weights whose way is drawn
TEXTS = {"rows": 16, "length": 128}  # held out, read for each perplexity
BATCH = {"rows": 8, "length": 64}  # trained on at each step
RATE, EVERY = 1.5e-3, 10  # of training with the grid on; steps between two held-out readings


def phase(name: str) -> None:
    """What the steps from here on are about."""
    event("qat.phase", phase=name)


def looked_at(model: Any) -> list[tuple[int, Any]]:
    """Of each layer the matrix that is looked at: a square one."""
    return [(i, block.mixer.out) for i, block in enumerate(model.blocks)]


def judge(model: Any, name: str, *, bits: int | None = None) -> dict[str, float]:
    found = measure(model, Grammar(), **TEXTS)
    if bits is not None:
        tap(BITS, bits, "", of=name)
    tap(PPL, found["perplexity"], "", of=name)
    tap(RECALL, found["recall"], "", of=name)
    return found


def look(method: str, layer: int, weight: Any, scales: tuple[Any, Any], grid: Grid) -> np.ndarray:
    """The microscope on one corner of a matrix. Returns all its codes."""
    scale, zero = scales
    codes = snap(weight, scale, zero, grid)
    corner, each = (slice(ROWS), slice(COLUMNS)), slice(ROWS) if len(scale) > 1 else slice(1)
    rows = np.broadcast_to(np.arange(ROWS)[:, None], (ROWS, COLUMNS)) if len(scale) > 1 else None
    microscope.look_at(
        weight[corner], codes[corner], place(codes, scale, zero, grid)[corner], scale=scale[each], zero=zero[each],
        ends=(grid.low, grid.high), block=rows, method=method, layer=layer,
    )  # fmt: skip
    return codes.cpu().numpy()


def with_the_grid(toy: Any, *, bits: int, granularity: str, learned: bool, steps: int) -> None:
    """QAT: round in each forward pass, and move the float weights behind."""
    grid = Grid(bits, granularity=granularity)
    model = prepare(toy, weights=grid, learned=learned)
    begun: dict[int, np.ndarray] = {}

    def show(trained: Any) -> None:
        flipped, away = [], []
        for layer, linear in looked_at(trained):
            scale, zero = (part.detach() for part in linear.grid_of_weights())
            codes = look("qat", layer, linear.weight.detach(), (scale, zero), grid)
            stood = (linear.weight.detach() / scale).cpu().numpy()
            first = begun.setdefault(layer, np.stack((codes, stood)))
            flipped.append((codes != first[0]).mean())
            away.append(np.abs(stood - stood.round()).mean())
            tap(STOOD, stood[0, :COLUMNS], "weight", layer=layer)
            tap(USED, codes[0, :COLUMNS].astype(np.float32), "weight", layer=layer)
            _follow(layer, stood, first)
            if linear.weight.grad is not None:
                tap(GRADIENT, linear.weight.grad[:ROWS, :COLUMNS], "row column", layer=layer)
        tap(FLIPPED, float(np.mean(flipped)), "")
        tap(AWAY, float(np.mean(away)), "")

    phase("before")
    for name, values in zip((STAIR_X, STAIR, SLOPE), staircase(grid), strict=True):
        tap(name, values.float(), "point")
    show(model)
    ptq = judge(model, "live", bits=bits)["perplexity"]
    tap(CURVE, ptq, "", of="ptq")
    tap(AT, 0, "", of="ptq")
    step(label="before training")
    phase("qat")
    train_on(model, "qat", steps, RATE, after=show, bits=bits, ptq=ptq)
    trained = judge(model, "live", bits=bits)
    note(ptq=ptq, qat=trained["perplexity"], recall=trained["recall"])
    step(label="trained")


def _follow(layer: int, stood: np.ndarray, first: np.ndarray) -> None:
    """The way of the weights that began nearest to where their code changes, half a step from their line; upwards is
    towards that place."""
    codes, begun = (part[:ROWS, :COLUMNS].reshape(-1) for part in first)
    now, side = stood[:ROWS, :COLUMNS].reshape(-1), np.sign(begun - codes)
    for n, i in enumerate(np.argsort(np.abs(0.5 - np.abs(begun - codes)))[:FOLLOWED]):
        tap(PATH, float(side[i] * (now[i] - codes[i])), "", weight=n, layer=layer)
    tap(PATH, 0.5, "", weight="edge", layer=layer)


def train_on(
    model: Any,
    name: str,
    steps: int,
    rate: float,
    *,
    after: Callable[[Any], None],
    bits: int | None = None,
    ptq: float | None = None,
) -> None:
    """Train in place, a step of the page for each; `ptq` is what rounding alone gave."""

    def progress(done: int, of_all: int, loss: float) -> None:
        tap(CURVE, math.exp(loss), "", of=name)
        tap(AT, done, "", of=name)
        if ptq is not None:
            tap(CURVE, ptq, "", of="ptq")
            tap(AT, done, "", of="ptq")
            if done % EVERY == 0 and done < of_all:
                judge(model, "live", bits=bits)

    stages, warmup = (Stage(steps, BATCH["rows"], BATCH["length"]),), max(1, steps // 10)
    train(
        model, Recipe(lambda _: model, name, stages=stages, rate=rate, warmup=warmup, seed=1), progress=progress,
        after=after,
    )  # fmt: skip


def longer() -> None:
    """The longer runs that ship, as far as they are here."""
    found: dict[str, float] = {}
    for name in ("bitnet", "qat16", *(f"qat{bits}" for bits in LONG)):
        if checkpoints.available(name)[0]:
            found[name] = measure(checkpoints.load(name)[0], Grammar(), **TEXTS)["perplexity"]
    known = {float(bits): found[f"qat{bits}"] for bits in LONG if f"qat{bits}" in found} or {math.nan: math.nan}
    tap(BITS, np.array(list(known), np.float32), "run", of="long")
    tap(PPL, np.array(list(known.values()), np.float32), "run", of="long")
    note(longer=found)


def gradient_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """One weight in one step: what computed, which gradient came, how far it went."""
    i, j = at["row"], at["column"]
    layer = nearest(recording, GRADIENT, knobs.layer)
    track = recording.track(GRADIENT, layer=layer)
    now = min(at.get("step", recording.steps), int(track.at[-1]))
    if now < track.at[0]:
        raise ValueError("No gradient has come yet: training begins later.")
    read = lambda name, when: recording.track(name, method="qat", layer=layer).latest(when)  # noqa: E731
    w, before = (float(read(microscope.VALUES, when)[i, j]) for when in (now, now - 1))
    scales = read(microscope.SCALE, now)
    scale, code = float(scales[i if len(scales) > 1 else 0]), int(read(microscope.CODES, now)[i, j])
    g = float(track.latest(now)[i, j])
    return Arithmetic(
        title=f"layer {layer}: weight {i}, {j}",
        lines=(
            ("float weight before this step", f"{before:+.5f}"),
            ("gradient at the rounded weight, handed on × 1", f"{g:+.5f}"),
            ("moved by the optimiser", f"{w - before:+.5f}"),
            ("float weight", f"{w:+.5f}"),
            (f"÷ scale {scale:.4f}", f"{w / scale:+.3f}"),
            ("rounded: the code", f"{code:+d}"),
            ("what computes: scale × code", f"{scale * code:+.5f}"),
        ),
        note="AdamW divides a gradient by its usual size, so that each weight moves about as far as the learning rate.",
        vectors=(("gradient, this row", tuple(track.latest(now)[i].tolist())),),
        values={"gradient": g, "code": float(code), "moved": w - before},
    )
