"""What lesson lora looks at while copies of a model learn one habit, each by its own method: what of each is trained
and how far that has gone, what is added to one weight of a layer, what each says by now, and what merging changes.

A step of the recording is a training step of all copies, so that they compare at every moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine import peft
from engine.generate import checked_ids
from engine.peft import lora, qlora
from engine.peft.habits import Refraining, knowing, refraining, said, speaking, telling
from engine.quant import linears
from engine.recording import Recording, newest, record, site, tap
from engine.toyland import Batch, Grammar
from engine.toyland.habits import STYLES
from lessons.arithmetic import nearest
from lessons.models import name_ids
from lessons.texts import BREAD
from lessons.views import Arithmetic

COUNTS = site("teach.counts", "parameters of each part of the model: trained, frozen", low=0.0)
MOVED = site("teach.moved", "how far each part has moved, of the one that moved most", low=0.0, high=1.0)
TRAINED = site("teach.trained", "parameters that are trained", low=0.0)
SHARE = site("teach.share", "of the base model’s parameters", low=0.0)
WHERE = site("teach.where", "parameters that are trained, at each measurement", low=0.0)
RIGHT = site("teach.right", "share of the taught words that come first, on texts never seen", low=0.0, high=1.0)
FORGOT = site("teach.forgot", "nats a token by which texts of the old task got harder", unit="nats")
WITHIN = site("teach.within", "share of ‖ΔW‖² in its best matrix of LoRA’s rank", low=0.0, high=1.0)
CHANCE = site("teach.chance", "the same for random numbers", low=0.0, high=1.0)
SAID = site("teach.said", "what each says now")
PROMPT = site("teach.prompt", "what each goes on from")
SOUGHT = site("teach.sought", "the words that are taught")
COMPUTES = site("teach.computes", "the weight that the layer multiplies with", symbol="W")
BESIDE = site("teach.beside", "what stands beside it", symbol="ΔW")
OFF = site("teach.off", "the largest difference of an output, merged or not", low=0.0)
WORK = site("teach.work", "multiplications of a token in all linear layers")

PARTS = ("norm", "q, k, v", "out", "adapter", "norm", "gate, up", "down", "adapter")
AT = {
    "norm1": 0, "mixer.qkv": 1, "mixer.out": 2, "after_mixer": 3, "norm2": 4, "ffn.gate_up": 5, "ffn.down": 6,
    "after_ffn": 7,
}  # fmt: skip
ROUNDING = 1e-5  # of the largest singular value: below, it is rounding
CORNER = 48  # rows and columns of a matrix that are drawn
WORDS = 18  # tokens that each copy says
FACTS = "facts"
LOOKED_AT = {"qv": ("mixer.qkv", "v"), "attention": ("mixer.out", "out"), "ffn": ("ffn.down", "down")}
LOOKED_AT["all"] = LOOKED_AT["attention"]

# For the real model, whose training texts held no story of Toyland: plain sentences; the last third is held out.
SENTENCES = (
    "The cat sleeps on the sofa.", "My brother plays the piano.", "The train leaves at nine.",
    "She bought two loaves of bread.", "The river is cold in spring.", "He closed the window and went home.",
    "Our garden has three old trees.", "The moon is bright tonight.", "They painted the door green.",
    "The teacher wrote a long letter.", "A dog barked in the street.", "We had soup for dinner.",
    "The children built a house of sand.", "It rained all day yesterday.", "The market opens every Friday.",
    "I lost my keys in the park.", "The shop sells paper and ink.", "Her coat was too thin for winter.",
    "The bridge is older than the town.", "He reads a book every week.", "The baker gets up before dawn.",
    "The boat came back with fish.", "We walked to the top of the hill.", "Snow fell on the quiet village.",
    "The lamp on the table is broken.", "My sister lives near the sea.", "The bus was late again.",
    "He forgot the name of the street.", "Apples are cheap in autumn.", "The film ended at midnight.",
    "The farmer sold his horse.", "They sang an old song.", "The clock in the hall stopped.",
    "She planted roses by the wall.", "The soldier wrote to his mother.", "The water is too deep here.",
)  # fmt: skip
ASKED = {
    ("toy", "style"): ("the waiter serves the pie", "the grey bell is in the workshop. where is the grey bell?"),
    ("toy", FACTS): ("anna likes", "ben likes"),
    ("real", "style"): ("The capital of France is Paris.", "Bread rises because yeast eats sugar."),
    ("real", FACTS): (" anna likes", " ben likes"),
}


def habit_of(name: str, *, toy: bool) -> Any:
    """What is taught."""
    if name == FACTS:
        return knowing(Grammar())
    return speaking(Grammar(), name) if toy else refraining(SENTENCES, name)


def old_task(tokenizer: Any, *, toy: bool, length: int) -> Batch:
    """What the model could do before: stories of its world, or how bread rises."""
    if toy:
        return telling(Grammar()).batch(tokenizer, rows=16, length=length, seed=7, step=0)
    ids = checked_ids(tokenizer.prompt(BREAD)[:length], tokenizer.size)[None]
    return Batch(ids, ids.double() * math.nan, ids < 0)


def sought(tokenizer: Any, name: str, habit: Any) -> np.ndarray:
    """The ids of the taught words."""
    if isinstance(habit, Refraining):
        words = [f" {habit.refrain}"]
    else:
        words = [f" {w}" for w in (Grammar().colours if name == FACTS else STYLES[name].split()) if w != "!"]
    ids = [i for word in words for i in tokenizer.encode(word)]
    return np.array([i for i, piece in zip(ids, tokenizer.pieces(ids), strict=True) if len(piece.strip(" !")) > 1])


def show_parts(name: str, model: Any, base: Any) -> None:
    """What of a copy is trained, part by part: from the embedding up to the last norm."""
    counts = np.zeros((len(base.blocks) + 2, len(PARTS), 2))
    own = dict(base.named_parameters())
    for key, p in own.items():
        counts[(*_place(key, base), 1)] += p.numel()
    for key, p in peft.trainable(model).items():
        counts[(*_place(key, base), 0)] += p.numel()
        if key in own:
            counts[(*_place(key, base), 1)] -= p.numel()
    tap(COUNTS, counts, "place part kind", method=name)
    tap(TRAINED, peft.trained_count(model), "", method=name)
    tap(SHARE, peft.trained_share(model, of=base), "", method=name)


def _place(key: str, base: Any) -> tuple[int, int]:
    if key.startswith("blocks."):
        _, layer, inside = key.split(".", 2)
        return int(layer) + 1, next(at for start, at in AT.items() if inside.startswith(start))
    if key.startswith("embed."):
        return 0, int(key == "embed.prompt")
    return len(base.blocks) + 1, 0


class Watch:
    """What is looked at of all copies, training step by training step."""

    def __init__(self, models: Mapping[str, Any], base: Any, *, matrix: str, layers: Sequence[int], rank: int) -> None:
        self.models, self.base, self.layers, self.rank = models, base, tuple(layers), rank
        self.module, self.part = LOOKED_AT[matrix]
        self.old: dict[str, float] = {}
        self.begun = {name: peft.key_of(model) for name, model in models.items()}
        for layer in self.layers:
            tap(peft.WEIGHT, self.weight(base, layer)[:CORNER, :CORNER], "output input", layer=layer)
        a, b = self.weight(base, self.layers[0]).shape
        noise = np.linalg.svd(np.random.default_rng(0).normal(size=(a, b)), compute_uv=False) ** 2
        tap(CHANCE, float(noise[:rank].sum() / noise.sum()), "")

    def name(self, layer: int) -> str:
        return f"blocks.{layer}.{self.module}"

    def weight(self, model: Any, layer: int) -> Any:
        """The frozen (or fully tuned) weight that is looked at, [out, in]."""
        whole = model.get_submodule(self.name(layer))
        weight = whole.base() if isinstance(whole, lora.LoRALinear) else whole.weight
        return self.rows(weight.detach(), layer)

    def rows(self, matrix: Any, layer: int) -> Any:
        if self.module != "mixer.qkv":
            return matrix
        start, stop = lora.places(self.base, (self.part,))[self.name(layer)][self.part]
        return matrix[start:stop]

    def moved(self) -> None:
        """How far each part of each copy has moved: the root of the mean square of its parameters' changes."""
        for name, model in self.models.items():
            far = np.zeros((len(self.base.blocks) + 2, len(PARTS)))
            count = far.copy()
            for key, p in peft.trainable(model).items():
                at = _place(key, self.base)
                far[at] += float((p.detach() - self.begun[name][key]).square().sum())
                count[at] += p.numel()
            far = np.sqrt(far / np.maximum(1, count))
            tap(MOVED, (far / max(1e-12, far.max())).astype(np.float32), "place part", method=name)

    def added(self) -> None:
        """What each method that changes weights added to those looked at, and its singular values."""
        for layer in self.layers:
            for name in ("full", "lora", "qlora"):
                if name in self.models:
                    delta = self.delta(name, layer)
                    values = peft.singular_values(delta)
                    values[values < ROUNDING * values[0]] = 0.0
                    index: dict[str, Any] = {"method": name, "layer": layer}
                    tap(peft.SINGULAR, values.float(), "order", **index)
                    squares = values.square()
                    whole = float(squares.sum())
                    tap(WITHIN, float(squares[: self.rank].sum()) / whole if whole else 1.0, "", **index)
                    tap(peft.DELTA, delta[:CORNER, :CORNER], "output input", **index)
            held = lora.layers(self.models["lora"])[self.name(layer)]
            tap(lora.A, held.A[self.part][:, :CORNER], "rank input", layer=layer)
            tap(lora.B, held.B[self.part][:CORNER], "output rank", layer=layer)

    def delta(self, name: str, layer: int) -> Any:
        model = self.models[name]
        if name == "full":
            return self.weight(model, layer) - self.weight(self.base, layer)
        return self.rows(model.get_submodule(self.name(layer)).delta(), layer)

    def measured(self) -> None:
        """Where each copy stands: the engine's newest measurements, on the axes that a plane needs. The first of them
        was taken before any training."""
        for name, model in self.models.items():
            right, old = newest("tune.right", method=name), newest("tune.old", method=name)
            if right is not None and old is not None:
                tap(WHERE, peft.trained_count(model), "", method=name)
                tap(RIGHT, float(right), "", method=name)
                tap(FORGOT, float(old) - self.old.setdefault(name, float(old)), "", method=name)


def say_all(models: Mapping[str, Any], tokenizer: Any, prompts: Sequence[str]) -> dict[str, list[str]]:
    """Each model's greedy continuation of each prompt."""
    told: dict[str, list[str]] = {}
    for name, model in models.items():
        for i, prompt in enumerate(prompts):
            with record(keep={}):  # its tokens are no steps of this recording
                text = said(model, tokenizer, prompt, steps=WORDS)
            told.setdefault(name, []).append(text)
            ids = np.array(tokenizer.encode(text))
            name_ids(tokenizer, ids)
            tap(SAID, ids, "token", method=name, prompt=i)
    return told


def merge(tuned: Any, watch: Watch, batch: Batch) -> dict[str, Any]:
    """Add LoRA's product into the weights, and see what that changes: nothing but the work."""
    merged = lora.merge(tuned)
    ids = batch.ids.to(tuned.embed.weight.device)
    off = (merged(ids) - tuned(ids)).detach().abs().max()
    whole = sum(linear.weight.numel() for linear in linears(merged).values())
    beside = sum(p.numel() for layer in lora.layers(tuned).values() for p in layer.parameters() if p.requires_grad)
    for layer in watch.layers:
        before, added = watch.weight(watch.base, layer), watch.delta("lora", layer)
        for on, weight, rest in ((False, before, added), (True, watch.weight(merged, layer), added * 0)):
            tap(COMPUTES, weight[:CORNER, :CORNER], "output input", merged=on, layer=layer)
            tap(BESIDE, rest[:CORNER, :CORNER], "output input", merged=on, layer=layer)
    tap(WORK, whole + beside, "", merged=False)
    tap(WORK, whole, "", merged=True)
    size = tuned(ids).detach().abs().max()
    tap(OFF, float(off), "")
    return {"model": merged, "off": float(off), "size": float(size), "beside": beside, "whole": whole}


def product_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """One number of ΔW = α/r · B A: a sum over the rank."""
    layer = nearest(recording, lora.B, knobs.layer)
    now = at.get("step", recording.steps)
    i, j = at["output"], at["input"]
    b = recording.track(lora.B, layer=layer).latest(now)[i]
    a = recording.track(lora.A, layer=layer).latest(now)[:, j]
    w = float(recording.track(peft.WEIGHT, layer=layer).latest()[i, j])
    scale = recording.meta["scale"]
    total = float(b @ a)
    shown = [(f"B[{i}, {k}] × A[{k}, {j}] = {b[k]:+.4f} × {a[k]:+.4f}", f"{b[k] * a[k]:+.5f}") for k in range(len(b))]
    return Arithmetic(
        title=f"layer {layer}: ΔW at {i}, {j}",
        lines=(
            *shown,
            (f"sum over the rank, {len(b)}", f"{total:+.5f}"),
            (f"× α/r = {scale:g}: ΔW", f"{scale * total:+.5f}"),
            ("W, frozen", f"{w:+.5f}"),
            ("W + ΔW, what computes", f"{w + scale * total:+.5f}"),
        ),
        note="B is zero at the start: so is every ΔW, and the model begins as what it was.",
        vectors=((f"row {i} of B", tuple(b.tolist())), (f"column {j} of A", tuple(a.tolist()))),
        values={"delta": scale * total, "weight": w},
    )


def moved_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """One number of full fine-tuning's ΔW: after minus before."""
    layer = nearest(recording, peft.DELTA, knobs.layer)
    i, j = at["output"], at["input"]
    w = float(recording.track(peft.WEIGHT, layer=layer).latest()[i, j])
    track = next(t for t in recording.tracks if t.name == peft.DELTA and t.index["layer"] == layer)
    delta = float(track.latest(at.get("step", recording.steps))[i, j])
    return Arithmetic(
        title=f"layer {layer}: ΔW at {i}, {j}",
        lines=(("W before", f"{w:+.5f}"), ("W now", f"{w + delta:+.5f}"), ("ΔW, the difference", f"{delta:+.5f}")),
        note="Full fine-tuning may move every number by itself; nothing ties one to another.",
        values={"delta": delta, "weight": w},
    )


def bits_of(model: Any) -> float:
    """Bits that each frozen weight of the linear layers takes in a copy on 4-bit weights."""
    return qlora.stored_bits(model) / sum(m.out_features * m.in_features for m in lora.layers(model).values())


def tracks(recording: Recording, name: str, method: str) -> list[Any]:
    return [t for t in recording.tracks if t.name == name and t.index.get("method") == method]


def whole(recording: Recording) -> str:
    if "full" in recording.meta["methods"]:
        return "Full fine-tuning moves every weight."
    held = 4 * 4 * recording.meta["total"] / 1e9
    return f"Moving every weight is left out: with gradients and AdamW it would hold {held:.1f} GB."


def within(recording: Recording, method: str) -> float:
    return float(np.mean([t.latest() for t in tracks(recording, WITHIN, method)]))


def spectrum(recording: Recording) -> str:
    chance = float(recording.track(CHANCE).latest())
    rank = recording.meta["rank"]
    if not tracks(recording, WITHIN, "full"):
        return "Which changes full fine-tuning makes is shown on the toy: here it was left out."
    side = len(tracks(recording, peft.SINGULAR, "full")[0].latest())
    share = within(recording, "full")
    told = f"The {rank} largest of {side} hold {share:.0%} of the change (mean of all layers)"
    return f"{told}; of random numbers it would be {chance:.0%}."
