"""Loud channels: what the linear layers of a model are given, and what each way of rounding makes of the model.

`survey` shows the inputs layer by layer while the model reads, `migrate` how smoothing shifts ranges from activations
to weights, `search` AWQ's search layer by layer; an `Ear` reads a text with model after model and compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine.quant import capture_inputs, linears
from engine.quant.awq import AWQLinear, grid
from engine.quant.awq import search as awq_search
from engine.quant.llm_int8 import LLMInt8Linear, outlier_channels
from engine.quant.smoothquant import migration
from engine.recording import Recording, event, note, record, site, step, tap
from lessons import microscope
from lessons.views import Arithmetic

X = site("outliers.x", "how large each activation is", symbol="|X|", low=0.0)
CLOSE = site("outliers.close", "the same, of the loudest channels alone", symbol="|X|", low=0.0)
CLOSE_IDS = site("outliers.close.ids", "which channels these are")
STAYS = site("outliers.stays", "1 where a channel stays on the int8 side, 0 where it moves to the float side")
X_TOP = site("outliers.x_top", "the largest activation of each channel, loudest first", symbol="max|X_j|", low=0.0)
W_TOP = site("outliers.w_top", "the largest weight that each of these channels meets", symbol="max|W_j|", low=0.0)
FOUND = site("outliers.found", "outlier channels of each layer, over its three inputs")
KIND = site("outliers.kind", "whether a layer has outliers: not read yet, none, some")
MOST = site("outliers.most", "the largest activation of a layer's input", low=0.0)
USUAL = site("outliers.usual", "the median activation of a layer's input", low=0.0)
RESIDUAL = site("outliers.residual", "the largest value of the residual stream after each layer", low=0.0)
X_TOP_AT = site("outliers.x_before", "the largest activation of a channel, loudest first", symbol="max|X_j|", low=0.0)
W_TOP_AT = site("outliers.w_before", "the largest weight that each of these channels meets", symbol="max|W_j|", low=0.0)
X_AFTER = site("outliers.x_after", "the largest activation of each channel, smoothed", symbol="max|X_j| / s", low=0.0)
W_AFTER = site("outliers.w_after", "the largest weight each channel meets, smoothed", symbol="s · max|W_j|", low=0.0)
FACTOR = site("outliers.factor", "by how much each channel is divided", symbol="s", low=0.0)
PPLS = site("outliers.perplexities", "perplexity of the text, one for each way", low=0.0)
MOVED = site("outliers.moved", "how far predictions moved: KL divergence from the float model, a token", unit="nats")
RUNNING = site("outliers.running", "perplexity of the text so far")
LOSS = site("outliers.awq.loss", "what rounding changes in a layer's output, as a share of plain rounding's", low=0.0)
RATIO = site("outliers.awq.ratio", "the power of the activations that AWQ chose", symbol="α", low=0.0, high=1.0)
TRIED = site("outliers.awq.tried", "the powers that it tries")

PARTS = {"Queries, keys, values": "mixer.qkv", "Gate and up": "ffn.gate_up", "Down": "ffn.down"}  # all can be smoothed
ROWS, WIDE, LOUDEST = 32, 576, 48  # tokens drawn, channels drawn at most, channels of the close-up
ALPHAS = range(0, 101, 10)  # hundredths
UNSURE = 8  # tokens before a mean is drawn
EACH = 3  # ranges are kept of every third layer


def array(x: Any) -> np.ndarray:
    """A tensor on whatever device as NumPy."""
    found: np.ndarray = x.detach().float().cpu().numpy()
    return found


def survey(model: Any, ids: Any, *, threshold: float) -> tuple[dict[str, Any], Any]:
    """Read `ids` [1, tokens], a step a layer: what its linear layers are given. Returns these inputs, and the log
    probabilities [tokens, vocabulary]."""
    layers, stats = len(model.blocks), []
    found, kinds = np.zeros(layers, np.float32), np.zeros(layers, np.int32)
    with capture_inputs(model) as inputs:

        def look(layer: int, out: Any) -> None:
            for part in PARTS.values():
                x, weight = inputs[f"blocks.{layer}.{part}"], model.blocks[layer].get_submodule(part).weight
                flagged = array(outlier_channels(x, threshold=threshold)) > 0
                stats.append(_show(part, np.abs(array(x)), np.abs(array(weight)).max(0), flagged))
                found[layer] += flagged.sum()
            kinds[layer] = 2 if found[layer] else 1
            tap(FOUND, found, "layer")
            tap(KIND, kinds, "layer")
            sizes = np.abs(array(out[0]))
            tap(RESIDUAL, float(sizes.max()), "")
            residual.append((float(sizes.max()), float(np.median(sizes[1:]))))
            step(label=f"layer {layer}")

        residual: list[tuple[float, float]] = []
        hooks = [
            block.register_forward_hook(lambda _, args, out, layer=layer: look(layer, out))
            for layer, block in enumerate(model.blocks)
        ]
        try:
            logp = logprobs(model, ids)
        finally:
            for hook in hooks:
                hook.remove()
    loudest = max(residual)
    note(found=found.tolist(), stats=stats, residual=[loudest[0], float(np.median([usual for _, usual in residual]))])
    return dict(inputs), logp


def _show(part: str, x: np.ndarray, w_top: np.ndarray, flagged: np.ndarray) -> list[float]:
    """Picture and figures of one input [token, channel]."""
    x_top = x.max(0)
    wide = -(-x.shape[1] // WIDE)  # neighbours share a column where there are too many
    tap(X, x[:ROWS].reshape(min(ROWS, len(x)), -1, wide).max(-1), "token channel", part=part)
    near = np.sort(np.argsort(-x_top)[:LOUDEST])
    tap(CLOSE, x[:ROWS, near], "token channel", part=part)
    tap(CLOSE_IDS, near.astype(np.int32), "channel", part=part)
    tap(STAYS, np.broadcast_to(~flagged[near], (min(ROWS, len(x)), len(near))).astype(np.uint8), "token channel",
        part=part)  # fmt: skip
    order = np.argsort(-x_top)
    tap(X_TOP, x_top[order], "channel", part=part)
    tap(W_TOP, w_top[order], "channel", part=part)
    tap(MOST, float(x_top.max()), "", part=part)
    tap(USUAL, float(np.median(x)), "", part=part)
    first = np.bincount(x[1:].argmax(1), minlength=x.shape[1]).max() / max(1, len(x) - 1)
    return [float(a.max() / max(np.median(a), 1e-12)) for a in (x_top, w_top)] + [float(first), float(flagged.sum())]


def migrate(model: Any, inputs: Mapping[str, Any]) -> None:
    """What smoothing does to both ranges, for every alpha, at every third layer: its own inputs, its own weights."""
    for layer in range(0, len(model.blocks), EACH):
        for part in PARTS.values():
            x_top = inputs[f"blocks.{layer}.{part}"].abs().amax(0)
            w_top = model.blocks[layer].get_submodule(part).weight.abs().amax(0)
            order = np.argsort(-array(x_top))
            where: dict[str, Any] = {"layer": layer, "part": part}
            tap(X_TOP_AT, array(x_top)[order], "channel", **where)
            tap(W_TOP_AT, array(w_top)[order], "channel", **where)
            for alpha in ALPHAS:
                with record(keep={}):
                    scale = array(migration(x_top, w_top, alpha=alpha / 100))
                tap(X_AFTER, (array(x_top) / scale)[order], "channel", alpha=alpha, **where)
                tap(W_AFTER, (array(w_top) * scale)[order], "channel", alpha=alpha, **where)
                tap(FACTOR, scale[order], "channel", alpha=alpha, **where)


def logprobs(model: Any, ids: Any) -> Any:
    """Log probabilities [tokens, vocabulary] of what comes next, reading `ids` [1, tokens] in one pass."""
    return model(ids)[0].float().log_softmax(-1)


class Ear:
    """Reads one text with model after model, and compares each with the first."""

    def __init__(self, ids: Any, names: tuple[str, ...], tokenizer: Any) -> None:
        self.ids, self.names, self.tokenizer = ids, names, tokenizer
        self.base: Any = None
        self.ppls, self.moved = (np.full(len(names), np.nan, np.float32) for _ in range(2))

    def hear(self, name: str, logp: Any) -> float:
        """What is to be shown of log probabilities; returns the perplexity. Ends the step."""
        ppl = self.perplexity(logp, name)
        self.base = logp if self.base is None else self.base
        at = self.names.index(name)
        self.ppls[at] = ppl
        self.moved[at] = float((self.base.exp() * (self.base - logp)).sum(-1).mean())
        tap(PPLS, self.ppls, "way")
        tap(MOVED, self.moved, "way")
        self._next(array(self.base[-1].exp()), array(logp[-1].exp()))
        step(label=name)
        return ppl

    def perplexity(self, logp: Any, name: str = "") -> float:
        """e to the mean surprisal of all tokens but the first."""
        nats = -array(logp[:-1].gather(-1, self.ids[0, 1:, None])[:, 0]).astype(np.float64)
        if name:
            means = np.cumsum(nats) / np.arange(1, len(nats) + 1)
            means[: min(UNSURE, len(means) - 1)] = np.nan  # a mean of few tokens says little and is huge
            tap(RUNNING, np.exp(np.minimum(means, 80.0)).astype(np.float32), "token", way=name)
        return float(np.exp(min(nats.mean(), 80.0)))

    def _next(self, was: np.ndarray, now: np.ndarray) -> None:
        top = sorted({*np.argsort(-was)[:6].tolist(), *np.argsort(-now)[:3].tolist()}, key=lambda i: -was[i])
        tap(microscope.NEXT, was[top], "token", when="before")
        tap(microscope.NEXT, now[top], "token", when="after")
        tap(microscope.NEXT_IDS, np.array(top, np.int32), "token")
        event("text.words", words=dict(zip(map(str, top), self.tokenizer.pieces(top), strict=True)))


def weigh(model: Any, inputs: Mapping[str, Any], *, threshold: float) -> list[float]:
    """Bytes of the first layer's matrices at 16 bits, and by LLM.int8()."""
    whole = small = 0.0
    for name, linear in linears(model).items():
        if name.startswith("blocks.0."):
            flagged = outlier_channels(inputs[name], threshold=threshold)
            whole += linear.weight.numel() * 2
            small += LLMInt8Linear(linear, threshold=threshold).storage_bits(flagged) / 8
    return [whole, small]


def search(model: Any, inputs: Mapping[str, Any], *, bits: int, group: int) -> Callable[[str, Any], Any]:
    """AWQ's search, a step a layer. Returns a recipe that puts the layers found in their places."""
    ready: dict[str, Any] = {}
    chosen: list[float] = []
    won: list[float] = []
    weights = grid(bits, group=group)
    for layer in range(len(model.blocks)):
        for name, linear in linears(model).items():
            if name.startswith(f"blocks.{layer}."):
                with record(keep={}):
                    found = awq_search(linear.weight.detach(), inputs[name], weights)
                    ready[name] = AWQLinear(linear, scale=found.scale, weights=weights)
                losses = array(found.losses)
                tap(LOSS, losses / max(losses[0], 1e-30), "ratio", part=name.split(".", 2)[2])
                tap(RATIO, found.ratio, "", part=name.split(".", 2)[2])
                tap(TRIED, array(found.ratios), "ratio")
                chosen.append(found.ratio)
                won.append(float(losses.min() / max(losses[0], 1e-30)))
        step(label=f"AWQ, layer {layer}")
    note(awq_ratio=float(np.mean(chosen)), awq_loss=float(np.mean(won)))
    return lambda name, linear: ready[name]


def code_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """What one scale for all, or one a token, or the int8 side alone would make of one activation."""
    row, column, part = at["token"], at["channel"], knobs.part
    when = at.get("step")
    read = lambda name: recording.track(name, part=part).latest(when)  # noqa: E731
    x, channel = read(CLOSE), int(read(CLOSE_IDS)[column])
    value, most, own = float(x[row, column]), float(read(MOST)), float(x[row].max())
    stays = read(STAYS)[0] > 0
    rest = float(x[row, stays].max()) if stays.any() else 0.0
    lines = [(f"|x| of token {row}, channel {channel}", f"{value:.3f}")]
    for label, top in (("one scale for all", most), ("one for this token", own), ("without the outliers", rest)):
        if top:
            lines.append((f"{label}: {top:.2f} ÷ 127 a step", f"{top / 127:.4f}"))
            lines.append(("… so its code", f"{value * 127 / top:.2f} ≈ {round(value * 127 / top)}"))
    if not stays[column]:
        lines = [*lines[:-2], ("outlier: multiplied in float", f"{value:.3f}")]
    return Arithmetic(
        title=f"{part}: token {row}, channel {channel}", lines=tuple(lines),
        note=f"The median activation here is {float(read(USUAL)):.3f}.",
        vectors=(("|x| of this token, the loudest channels", tuple(x[row].tolist())),), values={"value": value},
    )  # fmt: skip
