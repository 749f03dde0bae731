"""What the lesson on pruning runs: weights that fade, parts cut out, patterns, retraining."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.evaluate import perplexity, surprisal
from engine.prune import apply, magnitude, matrices, structured, two_four
from engine.prune.measure import timed
from engine.quant.packing import unpack
from engine.recipes import Recipe, Stage
from engine.recording import newest, note, record, site, step, tap
from engine.toyland import Grammar, batch
from lessons.models import TOY
from lessons.sharing import toy

SIDE = 24  # rows and columns of each weight that the page shows
BINS = 48  # of the histogram
MATRICES = {
    "What heads read": "mixer.qkv", "What heads write": "mixer.out",
    "What neurons read": "ffn.gate_up", "What neurons write": "ffn.down",
}  # fmt: skip
NEURONS = (0.75, 0.5, 0.25)  # shares kept
READ = {"rows": 16, "length": 128}  # of Toyland, for every perplexity of a toy
RATE, EVERY = 1e-3, 10  # of retraining; steps between two held-out readings
PRODUCT: dict[str, Any] = {"out": 1536, "width": 576, "rows": 64, "sparsity": 0.9}  # as a feed-forward layer of SmolLM2

WEIGHT = site("pruning.weight", f"the first {SIDE} rows and columns of a weight", symbol="W")
KEPT = site("pruning.kept", "which of them stay", symbol="m", low=0.0, high=1.0)
SHARE = site("pruning.share", "the share of all weights that is pruned", low=0.0, high=1.0)
GONE = site("pruning.gone", "the share pruned in each layer and matrix", low=0.0, high=1.0)
PPL = site("pruning.perplexity", "e to the mean surprisal on texts that it was not trained on", low=1.0)
BIN = site("pruning.size", "how large a weight is", symbol="|w|", low=0.0)
MANY = site("pruning.many", "weights of that size, a thousandth of all at a time", low=0.0)
LEFT = site("pruning.left", "the parameters that are left, of all", low=0.0, high=1.0)
PARAMETERS = site("pruning.parameters", "parameters of the model as it stands")
SCORE = site("pruning.head.score", "how much each head writes, over the most of its layer", low=0.0, high=1.0)
HEADS = site("pruning.heads", "which heads are left", low=0.0, high=1.0)
ERROR = site("pruning.head.error", "relative change of the attention’s output, mean over layers",
             symbol="‖full − pruned‖/‖full‖", low=0.0)  # fmt: skip
MS = site("pruning.milliseconds", "the shortest time that a product took", unit="ms", low=0.0)
FOUR = site("pruning.four", "the same weight, for its 2:4 pattern", symbol="W")
CHOSEN = site("pruning.chosen", "the two largest of each four", symbol="m", low=0.0, high=1.0)
PACKED = site("pruning.packed", "the weights that stay, side by side", symbol="W", grows="output")
PLACED = site("pruning.placed", "where each of them stood among its four", symbol="2-bit index", grows="output")
STORED = site("pruning.stored", "bytes of that weight as it is stored", unit="B", low=0.0)
CURVE = site("pruning.curve", "perplexity while it is trained on", low=0.0)
TRAINED = site("pruning.trained", "steps of training so far", low=0.0)
WOKEN = site("pruning.woken", "pruned weights that the last step of training moved off zero", low=0.0)
KINDS = {"weights": "single weights", "heads": "heads", "neurons": "neurons", "layers": "layers"}


def quality(model: Any, ids: Any, by: str) -> float:
    with record(keep={}):  # the passes of a reading are no steps of the lesson
        found = perplexity(surprisal(model, ids))
    return tap(PPL, found, "", by=by)


def fade(model: Any, ids: Any, shares: tuple[float, ...], knobs: Any) -> None:
    """More and more of the smallest weights go, and as many at random."""
    weights = matrices(model)
    stride = max(1, sum(w.numel() for w in weights.values()) // 400_000)
    sizes = {name: w.flatten()[::stride].abs().cpu().float().numpy() for name, w in weights.items()}
    every = np.concatenate(list(sizes.values()))
    edges = np.linspace(0, np.quantile(every, 0.995), BINS + 1)
    tap(BIN, ((edges[1:] + edges[:-1]) / 2).astype(np.float32), "bin")
    tap(MANY, _histogram(every, edges, len(every)), "bin", of="all")
    for layer in range(model.shape.layers):
        for matrix in MATRICES.values():
            corner = weights[f"blocks.{layer}.{matrix}.weight"][:SIDE, :SIDE]
            tap(WEIGHT, corner, "output input", layer=layer, matrix=matrix)
    for share in shares:
        masks = magnitude.magnitude(model, sparsity=share, scope=knobs.scope)
        gone = np.zeros((model.shape.layers, len(MATRICES)), np.float32)
        for layer in range(model.shape.layers):
            for i, matrix in enumerate(MATRICES.values()):
                mask = masks[f"blocks.{layer}.{matrix}.weight"]
                gone[layer, i] = 1 - float(mask.float().mean())
                tap(KEPT, mask[:SIDE, :SIDE].byte(), "output input", layer=layer, matrix=matrix)
        tap(GONE, gone, "layer matrix")
        stay = np.concatenate([sizes[name][mask.flatten()[::stride].cpu().numpy()] for name, mask in masks.items()])
        tap(MANY, _histogram(stay, edges, len(every)), "bin", of="kept")
        tap(SHARE, share, "")
        quality(apply(model, masks), ids, "weights")
        quality(apply(model, magnitude.by_chance(model, sparsity=share, seed=0, scope=knobs.scope)), ids, "chance")
        step(label=f"{share:.0%} pruned")


def _histogram(sizes: np.ndarray, edges: np.ndarray, total: int) -> np.ndarray:
    return (1000 * np.histogram(sizes, edges)[0] / max(1, total)).astype(np.float32)


def shrink(model: Any, ids: Any, heads: list[int]) -> None:
    """Whole heads, neurons and layers go, and the model gets smaller."""
    H, L = model.shape.heads, model.shape.layers
    outputs = structured.head_outputs(model, ids[:4])
    writes = [structured.attention(model, layer).out.weight.detach() for layer in range(L)]
    scores = [structured.head_scores(y, out) for y, out in zip(outputs, writes, strict=True)]
    tap(SCORE, np.stack([(s / s.max()).cpu().numpy() for s in scores]), "layer head")
    errors = [structured.head_errors(y, out, keep=heads) for y, out in zip(outputs, writes, strict=True)]
    tap(ERROR, np.mean(errors, 0).astype(np.float32), "count")
    took = timed(**PRODUCT)
    tap(MS, 1e3 * np.array([took.dense, took.zeros, took.smaller], np.float32), "way")
    total = sum(p.numel() for p in model.parameters())

    def show(small: Any, by: str, stay: Mapping[int, list[int]]) -> None:
        count = sum(p.numel() for p in small.parameters())
        tap(HEADS, np.array([[h in stay.get(i, range(H)) for h in range(H)] for i in range(L)], np.uint8), "layer head")
        tap(PARAMETERS, count, "")
        tap(LEFT, count / total, "", by="now")
        for kind in KINDS if by == "whole" else (by,):
            tap(LEFT, count / total, "", by=kind)
            quality(small, ids, f"cut {kind}")
        step(label=by)

    show(model, "whole", {})
    for count in heads:
        stay = {layer: structured.best(s, count) for layer, s in enumerate(scores)}
        show(structured.cut(model, heads=stay), "heads", stay)
    for share in NEURONS:
        show(structured.cut(model, neurons=structured.neurons_of(model, share=share)), "neurons", {})
    order = structured.layer_scores(model, ids).argsort().tolist()
    for gone in (1, 2):
        left = sorted(set(range(L)) - set(order[:gone]))
        show(structured.cut(model, layers=left), "layers", {i: [] for i in order[:gone]})


def fours(model: Any, ids: Any) -> None:
    """Of each four neighbours the two largest stay, four rows of the picture a step."""
    weight = matrices(model)["blocks.1.ffn.gate_up.weight"]
    chosen = two_four.mask(weight)[:SIDE, :SIDE].byte().cpu().numpy()
    tap(FOUR, weight[:SIDE, :SIDE], "output input")
    small = two_four.compress(weight.half())
    places = unpack(small.places, 2, small.values.shape[1])
    for rows in range(0, SIDE, 4):
        seen = np.ones_like(chosen)
        seen[: rows + 4] = chosen[: rows + 4]
        tap(CHOSEN, seen, "output input")
        tap(PACKED, small.values[rows : rows + 4, : SIDE // 2].float(), "output kept")
        tap(PLACED, places[rows : rows + 4, : SIDE // 2].int(), "output kept")
        step()
    tap(STORED, weight.numel() * 2, "", of="dense")
    tap(STORED, small.nbytes, "", of="sparse")
    size = (weight.shape[0], weight.shape[1])
    note(fours={
        "dense": weight.numel() * 2, "sparse": small.nbytes, "shape": list(weight.shape),
        "products": two_four.multiplications(size, rows=1, sparse=False),
        "fewer": two_four.multiplications(size, rows=1, sparse=True),
        "cuda": two_four.timed_on_cuda(),
    })  # fmt: skip
    quality(apply(model, two_four.masks(model)), ids, "fours")
    step(label="packed")


def retrain(knobs: Any) -> None:
    """The toy, pruned and trained on with its zeros held, or not."""
    whole = toy(TOY)[0]
    ids = batch(Grammar(), seed=0, step=0, stream="test", **READ).ids
    masks = magnitude.magnitude(whole, sparsity=knobs.sparsity, scope=knobs.scope)
    before = quality(whole, ids, "toy")

    def tell(of: str, value: float, done: int) -> None:
        tap(CURVE, value, "", of=of)
        tap(TRAINED, done, "", of=of)

    for label, held in (("whole", before), ("pruned", quality(apply(whole, masks), ids, "toy"))):
        tell("before", before, 0)
        tell("held", held, 0)
        step(label=label)

    def progress(now: Any, done: int, of: int, loss: float) -> None:
        tell("batch", math.exp(loss), done)
        tell("before", before, done)
        if (woken := newest("prune.revived")) is not None:
            tap(WOKEN, float(woken.reshape(-1)[-1]), "")
        if done % EVERY == 0 or done == of:
            tell("held", quality(now, ids, "toy"), done)

    recipe = Recipe(
        lambda _: whole, "retraining", stages=(Stage(knobs.steps, 16, 64),), rate=RATE,
        warmup=max(1, knobs.steps // 10), seed=1,
    )  # fmt: skip
    magnitude.retrain(whole, masks, recipe, hold=knobs.hold, progress=progress)
    step(label="retrained")  # a step is told of after it
