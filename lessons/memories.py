"""What lesson ssm looks into: a list of pairs read by several memories at once, what each holds, and what it could say.

All read the same tokens, each with its own cache, in lockstep. After each pair a copy of every memory is asked for all
pairs told so far, so that one sees them being written and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from engine import checkpoints, zoo
from engine.caches.full import Full
from engine.evaluate import Question
from engine.mixers.hybrid import layer_stack
from engine.mixers.state import state_bytes
from engine.probing import asked_now
from engine.recording import Recording, note, record, site, tap
from lessons.lesson import Finding
from lessons.recall import PAIRS, asked_for_pairs
from lessons.views import Arithmetic

SOFTMAX, MAMBA, RWKV, HYBRID = "softmax", "mamba", "rwkv", "hybrid"
MEMORIES = (SOFTMAX, HYBRID, MAMBA, RWKV)
GREW_UP = {SOFTMAX: "toy", MAMBA: "mamba", RWKV: "rwkv"}  # in the zoo
READ_LISTS = {SOFTMAX: "softmax", HYBRID: "hybrid", MAMBA: "mamba16", RWKV: "rwkv"}  # small ones that read nothing else
WITH_ATTENTION = {0: "mamba", 1: "hybrid", 4: "toy"}  # by how many of the four layers attend
KINDS = ("Mamba", "RWKV", "softmax attention")
CODES = {"Mamba": 0, "Rwkv": 1, "SoftmaxAttention": 2}
SERIES = ("softmax", "hybrid", "mamba16", "mamba4", "rwkv", "linear")
SEEDS = zoo.SEEDS

DELTA = site("ssm.delta", "how much of itself each channel overwrites for this token: its step size", symbol="Δ",
             low=0.0)  # fmt: skip
STATE = site("ssm.state", "what each channel remembers, in so many numbers", symbol="h", grows="query")
STRIP = site("ssm.strip", "what each channel remembers, on its own scale", symbol="h / max|h|", low=-1.0, high=1.0)
KEPT = site("ssm.kept", "the share of its memory that each channel keeps at each token", symbol="Ā", grows="query",
            low=0.0, high=1.0)  # fmt: skip
SHARE = site("ssm.share", "the share of each number that a token leaves", symbol="Ā = exp(ΔA)", grows="query",
             low=0.0, high=1.0)  # fmt: skip
STEP = site("ssm.step", "the step size of each channel at each token", symbol="Δ", grows="query", low=0.0)
WRITE = site("ssm.write", "where in the state each token writes", symbol="B", grows="query")
MEAN = site("ssm.mean", "how much a token overwrites: mean step size of all channels", symbol="Δ", low=0.0)
RECEPTANCE = site("ssm.receptance", "how much of its answer each channel lets through", symbol="σ(r)", grows="query",
                  low=0.0, high=1.0)  # fmt: skip
AVERAGE = site("ssm.average", "the average that each channel carries", symbol="a / b", grows="query")
DECAY = site("ssm.decay", "the share of its weight that a channel keeps a token later, whatever the token",
             symbol="exp(−w)", low=0.0, high=1.0)  # fmt: skip
BACK = site("ssm.back", "how likely each memory gives back a pair, were it asked now", symbol="p(value)", grows="told",
            low=0.0, high=1.0)  # fmt: skip
KNOWN = site("ssm.known", "pairs that each memory could give back now")
HELD = site("ssm.held", "bytes held of the past: keys, values and states, from the tensors", unit="B", low=0.0)
LAYERS = site("ssm.layers", "what each layer is")
LAYER_HELD = site("ssm.layer_held", "bytes held by each layer", unit="B")
SERIES_FOUND = site("ssm.series", "share of pairs recalled, mean over seeds", low=0.0, high=1.0)


def members(attention: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trained models that there are, and the models whose memory is weighed, which needs no training: a hybrid
    with any number of attention layers, and what is not trained yet."""
    names = {**GREW_UP, HYBRID: WITH_ATTENTION.get(attention, "")}
    trained = {name: checkpoints.load(zoo_name)[0] for name, zoo_name in names.items()
               if zoo_name and checkpoints.available(zoo_name)[0]}  # fmt: skip
    made = {HYBRID: zoo.toy(mixer=zoo.mixed(zoo.each(zoo.Mamba), zoo.each(zoo.SoftmaxAttention), count=attention))}
    made |= {name: zoo.find(zoo_name).make for name, zoo_name in GREW_UP.items()}
    return trained, {name: trained[name] if name in trained else made[name](0) for name in MEMORIES}


def inside_mamba(model: Any, ids: Any) -> dict[int, dict[str, np.ndarray]]:
    """Layer by layer what selects and what is held, token by token; channels that overwrite most come first."""
    with record(keep={"mamba.*": {}}, budget=200_000_000) as inner:
        model.hidden(ids)
    seen, found = inner.freeze(), {}
    for layer in range(model.shape.layers):
        state, kept, delta, write = (
            seen.track(f"mamba.{name}", layer=layer).chunks[0].array[0] for name in ("state", "kept", "delta", "write")
        )
        order = np.argsort(-delta.mean(0), kind="stable")
        found[layer] = {"state": state[:, order], "kept": kept[:, order], "delta": delta[:, order], "write": write}
    return found


def inside_rwkv(model: Any, ids: Any) -> dict[int, dict[str, np.ndarray]]:
    """The same of RWKV; channels that forget soonest come first."""
    with record(keep={"rwkv.*": {}}, budget=200_000_000) as inner:
        model.hidden(ids)
    seen, found = inner.freeze(), {}
    for layer in range(model.shape.layers):
        decay, r, average = (
            seen.track(f"rwkv.{name}", layer=layer).chunks[0].array for name in ("decay", "receptance", "state")
        )
        order = np.argsort(decay, kind="stable")
        found[layer] = {"decay": decay[order], "receptance": r[0][:, order], "average": average[0][:, order]}
    return found


def show_mamba(inside: Mapping[int, Mapping[str, np.ndarray]], t: int) -> None:
    for layer, got in inside.items():
        tap(DELTA, got["delta"][t], "channel", layer=layer)
        tap(STEP, got["delta"][t : t + 1], "query channel", layer=layer)
        tap(STATE, got["state"][t : t + 1], "query channel state", layer=layer)
        tap(STRIP, (got["state"][t] / (np.abs(got["state"]).max((0, 2))[:, None] + 1e-9)), "channel state", layer=layer)
        tap(SHARE, got["kept"][t : t + 1], "query channel state", layer=layer)
        tap(WRITE, got["write"][t : t + 1], "query state", layer=layer)
        tap(KEPT, got["kept"][t : t + 1].mean(-1), "query channel", layer=layer, of=MAMBA)
        tap(MEAN, float(got["delta"][t].mean()), "", layer=layer)


def show_rwkv(inside: Mapping[int, Mapping[str, np.ndarray]], t: int) -> None:
    """A row of what is no number stands for a model that is not there yet."""
    for layer, got in inside.items():
        tap(KEPT, got["decay"][None], "query channel", layer=layer, of=RWKV)
        tap(RECEPTANCE, got["receptance"][t : t + 1], "query channel", layer=layer)
        tap(AVERAGE, got["average"][t : t + 1], "query channel", layer=layer)
        if not t:
            tap(DECAY, got["decay"], "channel", layer=layer)
    if not inside and not t:
        nothing = np.full((1, 1), np.nan, np.float32)
        tap(KEPT, nothing, "query channel", layer=0, of=RWKV)
        tap(RECEPTANCE, nothing, "query channel", layer=0)
        tap(AVERAGE, nothing, "query channel", layer=0)
        tap(DECAY, nothing[0], "channel", layer=0)


def listeners(state: int) -> dict[str, Any]:
    """The small models that are asked for pairs, Mamba with `state` numbers a channel. They began alike, and read lists
    and nothing else."""
    kinds = {**READ_LISTS, MAMBA: f"mamba{state}"}
    names = {name: f"recall-{kind}-{SEEDS[0]}" for name, kind in kinds.items()}
    return {name: checkpoints.load(zoo_name)[0] for name, zoo_name in names.items()
            if checkpoints.available(zoo_name)[0]}  # fmt: skip


class Readers:
    """Several models reading one text in lockstep, each with a cache of its own: some are weighed, some are asked."""

    def __init__(self, weighed: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        self.models, self.asked = weighed, asked
        self.caches = {name: Full() for name in weighed}
        self.heard = {name: Full() for name in asked}
        self.stacks = {name: layer_stack(model) for name, model in weighed.items()}
        for name in MEMORIES:
            if name not in asked:
                tap(BACK, np.full((1, 1), np.nan, np.float32), "told pair", of=name)
                tap(KNOWN, float("nan"), "", of=name)

    def read(self, ids: Any) -> None:
        """Each reads the tokens ids [1, T]; tap what each then holds."""
        for name, model in self.asked.items():
            model.hidden(ids, cache=self.heard[name], show=1)
        for name, model in self.models.items():
            cache = self.caches[name]
            model.hidden(ids, cache=cache, show=1)
            tap(HELD, cache.nbytes + state_bytes(cache.states), "", of=name)
            kinds = self.stacks[name]
            shared = cache.nbytes / max(1, kinds.count("SoftmaxAttention"))
            each = [
                shared if kind == "SoftmaxAttention" else state_bytes(cache.states[i]) for i, kind in enumerate(kinds)
            ]
            tap(LAYER_HELD, np.array(each, np.float32), "layer", of=name)
            tap(LAYERS, np.array([CODES[kind] for kind in kinds], np.int32), "layer", of=name)

    def ask(self, questions: list[list[int]], values: list[int]) -> None:
        """Ask a copy of each for every pair so far: questions of one length, and the ids of the right values."""
        for name, model in self.asked.items():
            found = asked_now(model, self.heard[name], questions).cpu().numpy()
            right = found[np.arange(len(values)), values]
            tap(BACK, right[None].astype(np.float32), "told pair", of=name)
            tap(KNOWN, float((found.argmax(-1) == values).sum()), "", of=name)


def of_list(tokenizer: Any, question: Question) -> tuple[list[int], list[int], list[int]]:
    """The ids of the question and its answer, where its values stand, and where its keys do: `… : key value , …`."""
    ids = tokenizer.prompt(question.prompt)
    start = tokenizer.pieces(ids).index(":") + 1
    end = tokenizer.pieces(ids).index(".")
    values = list(range(start + 1, end, 3))
    return ids + tokenizer.encode(question.answer), values, [at - 1 for at in values]


def questions_so_far(tokenizer: Any, ids: list[int], keys: list[int]) -> list[list[int]]:
    """`. now ? key` for each key."""
    asking = tokenizer.encode(". now?")
    return [[*asking, ids[at]] for at in keys]


def series_points(tokenizer: Any, *, questions: int) -> Iterator[None]:
    """A point a turn: the recall of small models that read nothing but such lists, three seeds of each kind."""
    models = {
        (kind, seed): checkpoints.load(f"recall-{kind}-{seed}")[0]
        for kind in SERIES
        for seed in SEEDS
        if checkpoints.available(f"recall-{kind}-{seed}")[0]
    }
    note(series=sorted({kind for kind, _ in models}), seeds=len({seed for _, seed in models}))
    for kind in SERIES:
        if kind not in {known for known, _ in models}:
            tap(SERIES_FOUND, float("nan"), "", of=kind)
    for count in PAIRS:
        found = asked_for_pairs({f"{kind} {seed}": m for (kind, seed), m in models.items()}, tokenizer, count,
                                questions=questions)  # fmt: skip
        for kind in dict.fromkeys(kind for kind, _ in models):
            tap(SERIES_FOUND, float(np.mean([v for name, v in found.items() if name.split()[0] == kind])), "", of=kind)
        yield


def deepest(recording: Recording) -> int:
    """The number of the last layer."""
    return int(recording.meta["model"]["layers"]) - 1


def kept_rule(recording: Recording) -> tuple[float, float, float]:
    """How far the recorded states are from h = exp(ΔA)·h + Δ·B·x: what is added is no product with B (of the largest
    h), A is not the same at every token (of A); and by how much Ā moves."""
    off, spread, moved = 0.0, 0.0, 0.0
    for layer in range(deepest(recording) + 1):
        h, kept, delta, B = (recording.stack(s, layer=layer) for s in (STATE, SHARE, STEP, WRITE))
        before = np.concatenate((np.zeros_like(h[:1]), h[:-1]))
        added = h - kept * before  # T E N
        into = (added * B[:, None]).sum(-1, keepdims=True) / (B[:, None] ** 2).sum(-1, keepdims=True)
        off = max(off, float(np.abs(added - into * B[:, None]).max() / np.abs(h).max()))
        sure = (kept > 1e-3) & (kept < 0.999)
        A = np.log(np.maximum(kept, 1e-30)) / np.maximum(delta[..., None], 1e-9)
        middle = np.median(A, 0)
        spread = max(spread, float(np.where(sure & sure.all(0), np.abs(A / middle - 1), 0).max()))
        moved = max(moved, float((kept.max(0) - kept.min(0)).max()))
    return off, spread, moved


def recurrence(recording: Recording) -> Finding:
    """Claim: the state is what Mamba’s recurrence says, with an Ā that moves."""
    off, spread, moved = kept_rule(recording)
    holds = off < 1e-3 and spread < 1e-2 and moved > 0.1
    filled = (
        f"what is added is Δ·B·u to {off:.0e} of h; ln Ā / Δ is the same at every token to {spread:.0e}; "
        f"Ā moves by up to {moved:.2f}"
    )
    why = "" if holds else "The recorded states do not follow the recurrence."
    return Finding(f"Ā moves by {moved:.2f}", "agrees" if holds else "differs", why, filled)


def constant(recording: Recording) -> Finding:
    """Claim: what RWKV holds does not grow."""
    rwkv, cache = (recording.stack(HELD, of=name) for name in (RWKV, SOFTMAX))
    same = len(set(rwkv.tolist())) == 1
    filled = f"after 1 and {len(rwkv)} tokens: RWKV {rwkv[0]:,.0f} and {rwkv[-1]:,.0f} B; "
    filled += f"softmax’s cache {cache[0]:,.0f} and {cache[-1]:,.0f} B"
    return Finding(f"{rwkv[-1]:,.0f} B", "agrees" if same else "differs", "" if same else "It grows.", filled)


def smaller(recording: Recording) -> Finding:
    """Claim: few attention layers, a small cache."""
    mixed, full = (recording.stack(HELD, of=name)[-1] for name in (HYBRID, SOFTMAX))
    grows = [float(np.diff(recording.stack(HELD, of=name))[-1]) for name in (HYBRID, SOFTMAX)]
    share, n = grows[0] / grows[1], recording.meta["attention"]
    filled = f"a token adds {grows[0]:,.0f} B to the hybrid, {grows[1]:,.0f} B to softmax; "
    filled += f"after {recording.meta['tokens']} tokens {mixed:,.0f} and {full:,.0f} B"
    why = f"{n} of 4 layers attend here, 1 of 8 in Jamba. States come on top."
    return Finding(f"{share:.0%} of the growth", "agrees" if abs(share - n / 4) < 1e-6 else "differs", why, filled)


def state_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """How one number of the state came about at one token."""
    t, n = at["query"], at["state"]
    layer = min(knobs.layer, deepest(recording))
    h, kept, delta, B = (recording.stack(s, layer=layer) for s in (STATE, SHARE, STEP, WRITE))
    if not 0 <= t < len(h):
        raise ValueError(f"token {t} has not been read")
    e = min(knobs.channel, h.shape[1] - 1)
    before = float(h[t - 1, e, n]) if t else 0.0
    share, step_size, write = float(kept[t, e, n]), float(delta[t, e]), float(B[t, n])
    added = float(h[t, e, n]) - share * before
    A = float(np.log(max(share, 1e-30)) / step_size)
    held = added * (share - 1) / (A * step_size)
    return Arithmetic(
        title=f"layer {layer}, channel {e}, number {n} of its state at token {t}",
        lines=(
            ("Δ, chosen by this token", f"{step_size:.4f}"),
            ("Ā = exp(Δ·A)", f"{share:.4f}"),
            ("h before", f"{before:+.4f}"),
            ("what stays, Ā·h", f"{share * before:+.4f}"),
            ("what is written, Δ·B·x (Euler)", f"{added:+.4f}"),
            ("h = Ā·h + Δ·B·x", f"{h[t, e, n]:+.4f}"),
        ),
        note=f"A = {A:.2f} is the same for every token. By the exact rule (zero-order hold) {held:+.4f} would be "
        "written; Mamba’s code takes Euler’s Δ·B.",
        vectors=(("B", tuple(B[t].tolist())), ("h", tuple(h[t, e].tolist()))),
        values={"h": float(h[t, e, n]), "kept": share, "added": added, "write": write},
    )
