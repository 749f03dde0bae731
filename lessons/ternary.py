"""Weights of -1, 0 and 1: the map of them, products that become sums, and what 70 billion of them would take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine import cost
from engine.published import PUBLISHED
from engine.quant.affine import quantise
from engine.quant.bitnet import TOKENS, BitLinear, pack_ternary, pack_trits, signed_additions, ternary
from engine.recording import Recording, note, record, site, tap
from lessons.arithmetic import nearest
from lessons.sharing import size
from lessons.views import Arithmetic, Calculator, Field

CODES = site("ternary.codes", "the weights that compute: add, skip, subtract", symbol="W̃", low=-1.0, high=1.0)
SHARES = site("ternary.shares", "how many weights are -1, 0 and 1", low=0.0, high=1.0)
COUNTED = site("ternary.counted", "what all linear layers do for one token")
INPUT = site("ternary.input", "the 8-bit activations of one token that the matrix is given", symbol="x̃")
WORK = ("products", "scalings", "additions", "subtracted", "skipped")
LEAST = math.log2(3)  # bits that one of three takes


def live(layer: int, matrix: Any) -> None:
    """The ternary map of one matrix as it is now; nothing where it computes in float."""
    if isinstance(matrix, BitLinear):
        codes = ternary(matrix.weight)[0].cpu().numpy()
        tap(CODES, codes, "output input", layer=layer)
        tap(SHARES, np.array([(codes == c).mean() for c in (-1, 0, 1)], np.float32), "code", layer=layer)


def bit_linears(model: Any) -> dict[str, Any]:
    """Every layer that computes with ternary weights."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}


def inputs_of(model: Any, ids: Any) -> dict[str, Any]:
    """What each of them is given for the last token of `ids` [1, tokens]."""
    found: dict[str, Any] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0][0, -1:].detach()}))
        for name, m in bit_linears(model).items()
    ]
    try:
        with record(keep={}):
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def count_work(model: Any, ids: Any) -> None:
    """Do one token's products as signed additions, in every linear layer, count them, and weigh the weights packed."""
    given = inputs_of(model, ids)
    weights = added = subtracted = skipped = scaled = packed = two_bits = 0
    counts, exact = np.zeros(3), True
    for name, layer in bit_linears(model).items():
        codes, _ = ternary(layer.weight)
        x = quantise(layer.norm(given[name]).detach(), TOKENS).codes
        sums, work = signed_additions(x, codes)
        exact = exact and bool((x.int() @ codes.int().T == sums).all())
        added, subtracted = added + work.additions, subtracted + work.subtractions
        weights, skipped, scaled = weights + codes.numel(), skipped + int((codes == 0).sum()), scaled + len(codes)
        packed += pack_trits(codes).numel() + 2  # and one scale of 16 bits
        two_bits += pack_ternary(codes).numel() + 2
        counts += [int((codes == c).sum()) for c in (-1, 0, 1)]
        if name.endswith("mixer.out"):
            tap(INPUT, x[0].cpu().numpy().astype(np.int32), "input", layer=int(name.split(".")[1]))
    tap(COUNTED, np.array([0, scaled, added, subtracted, skipped], np.float32), "kind", of="bitnet")
    tap(COUNTED, np.array([weights, 0, weights, 0, 0], np.float32), "kind", of="float")
    shares = counts / counts.sum()
    note(
        weights=weights, additions=added + subtracted, skipped=skipped, scaled=scaled, exact=exact,
        bytes_float=2 * weights, bytes_trits=packed, bytes_two=two_bits, shares=shares.tolist(),
        entropy=float(-(shares * np.log2(np.maximum(shares, 1e-12))).sum()),
    )  # fmt: skip


def sums_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """One output: which inputs are added, which subtracted, which skipped."""
    layer, row, column = nearest(recording, CODES, knobs.layer), at["output"], at["input"]
    when = at.get("step")
    codes = recording.track(CODES, layer=layer).latest(when)[row].astype(int)
    plus, minus = int((codes == 1).sum()), int((codes == -1).sum())
    word = {1: "add", 0: "skip", -1: "subtract"}[int(codes[column])]
    lines = [(f"weight {row}, {column}", f"{codes[column]:+d}: {word}" if codes[column] else "0: skip")]
    lines.append(("added, subtracted, skipped", f"{plus}, {minus}, {len(codes) - plus - minus}"))
    vectors: tuple[tuple[str, tuple[float, ...]], ...] = (("w̃, this output", tuple(codes.astype(float).tolist())),)
    if recording.has(INPUT, layer=layer):
        x = recording.track(INPUT, layer=layer).latest().astype(int)
        up, down = int(x[codes == 1].sum()), int(x[codes == -1].sum())
        lines += [("Σ x̃ where w̃ is 1", f"{up:,}"), ("Σ x̃ where w̃ is −1", f"{down:,}"), ("output", f"{up - down:,}")]
        vectors = (("x̃, 8 bits each", tuple(x.astype(float).tolist())), *vectors)
    return Arithmetic(
        title=f"layer {layer}: output {row}", lines=tuple(lines), vectors=vectors,
        note="No product of two numbers. One multiplication by the scales waits at the end.",
        values={"plus": float(plus), "minus": float(minus)},
    )  # fmt: skip


FIELDS = (
    Field("weights", "Weights", 70, 0.01, 10_000, unit="billions", whole=False),
    Field("memory", "Memory", 160, 0.1, 100_000, unit="GB", whole=False),
    Field("layers", "Layers", 80, 1, 1000),
    Field("kv_heads", "Key heads", 8, 1, 1024),
    Field("width", "Head width", 128, 2, 4096),
    Field("tokens", "Tokens of a text", 512, 1, 10_000_000),
)


def calculator(**view: Any) -> Calculator:
    """How much room ternary weights leave for texts."""
    chosen = {PUBLISHED[n].title: PUBLISHED[n] for n in ("smollm2", "llama-2-7b", "llama-3-8b")}
    presets = tuple(
        (title, {"weights": round(p.parameters() / 1e9, 3), "layers": p.shape.layers, "kv_heads": p.shape.kv_heads,
                 "width": p.shape.head_width})
        for title, p in chosen.items()
    )  # fmt: skip
    presets = (("A model of 70B", {f.name: f.value for f in FIELDS}), *presets)
    shown = {"name": "calculator", "title": "How many texts at once?"} | view
    return Calculator(fields=FIELDS, presets=presets, compute=compute, **shown)


def compute(typed: Mapping[str, float]) -> Arithmetic:
    """Weights at 16 bits and as trits, five to a byte, and the texts whose caches fit beside them."""
    weights, memory = typed["weights"] * 1e9, typed["memory"] * 1e9
    text = 2 * typed["layers"] * typed["kv_heads"] * typed["width"] * 2 * typed["tokens"]
    whole, small = 2 * weights, weights / 5
    fit = [cost.tokens_that_fit(max(0.0, memory - taken), text) for taken in (whole, small)]
    more = f"{fit[1] / fit[0]:,.1f}×" if fit[0] else "it did not fit at all" if fit[1] else "neither fits"
    lines = (
        ("Weights, 16 bits", size(whole)),
        ("Weights, ternary, five to a byte", size(small)),
        ("The least there is: log₂ 3 bits each", size(weights * LEAST / 8)),
        (f"Cache of a text of {typed['tokens']:,.0f} tokens", size(text)),
        ("Texts that fit beside 16-bit weights", f"{fit[0]:,}"),
        ("Texts that fit beside ternary weights", f"{fit[1]:,}"),
        ("More texts at once", more),
    )
    return Arithmetic("", lines, note="All weights ternary, no head in float; the cache at 16 bits.",
                      values={"whole": whole, "small": small, "before": fit[0], "after": fit[1]})  # fmt: skip
