"""Fewer bits for the cache: which values may share a scale, which layers need more bits, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import param

from engine import cost
from engine.caches import Cache
from engine.caches.full import Full
from engine.caches.layer_bits import assign, by_layer
from engine.caches.quantised import Quantised, token_bytes
from engine.evaluate import Answer, ask, passkey, surprisals
from engine.generate import checked_ids
from engine.published import PUBLISHED
from engine.recording import Recording, labelled, newest, note, record, site, step, tap
from engine.toyland import Grammar
from engine.toyland.questions import passkey_question
from lessons import views
from lessons.arithmetic import nearest
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, load, read_aloud
from lessons.texts import NAMES, text_ids
from lessons.views import Arithmetic, Line, Number, Points, knob, of

PPL = site("kv_bits.perplexity", "e to the mean surprisal of the tokens read from a packed cache so far")
BYTES = site("kv_bits.bytes", "bytes of the whole cache, scales counted", unit="B")
ERROR = site("kv_bits.layer_error", "what rounding changed in a layer's keys, relative to their size", low=0.0)
SWEEP_PPL = site("kv_bits.sweep.perplexity", "perplexity of the whole text at this many bits")
SWEEP_BYTES = site("kv_bits.sweep.bytes", "bytes a token at this many bits, scales counted", unit="B")
SUFFERS = site("kv_bits.suffers", "how far predictions move when this layer's cache alone has two bits", low=0.0)
GIVEN = site("kv_bits.given", "which number of bits each layer is given when the mean is three")

SWEEP = (8, 4, 3, 2)
OPTIONS, MEAN = (2, 3, 4), 3  # bits that a layer may get, and on average
WAYS = {"plain": "16 bits", "tensor": "one scale for all", "token": "a scale a token", "channel": "keys by channel"}
TOLD, AT = Grammar(), {"before": 2, "after": 8, "seed": 3}  # the toy's passkey
COLOURS = {"plain": "ink", "tensor": "alarm", "token": "recomputed", "channel": "recent", "tuned": "value"}


class Turn(Knobs):
    model = choice()
    bits = param.Integer(2, bounds=(2, 8), label="Bits", doc="Bits of each stored key and value.")
    recent = param.Integer(16, bounds=(0, 48), label="Kept whole", doc="Newest tokens that are not rounded.")
    text: param.Selector = param.Selector(default="bread", objects=dict(NAMES), label="Text", doc="What it reads.")
    own = param.String("Once upon a time", label="Your own text", doc="Read when Text is “Your own”.")
    tokens = param.Integer(112, bounds=(64, 128), label="Tokens read", doc="How much of the text is read.")
    layer = param.Integer(6, bounds=(0, 29), label="Layer", doc="Which layer you look into.")
    head = param.Integer(0, bounds=(0, 7), label="Key head", doc="Which of its key heads.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model, fast=True)
    toy = knobs.model == TOY
    ids = text_ids(tokenizer, knobs.text, knobs.own, toy=toy, tokens=knobs.tokens)
    shape = model.shape
    group = shape.head_width if shape.head_width < 16 else 16  # it has to divide a token's channels
    chunks = math.ceil(len(ids) / group)
    if len(ids) < knobs.recent + 2 * group:
        raise ValueError(
            f"The text has {len(ids)} tokens; with {knobs.recent} kept whole, at least {knobs.recent + 2 * group} are "
            "needed to see any packed."
        )

    def make(bits: int | Sequence[int], way: str = "channel") -> Cache:
        if way == "plain":
            return Full()
        keys, values = ("tensor", "tensor") if way == "tensor" else (way, "token")
        return Quantised(bits, keys=keys, values=values, group=group, recent=knobs.recent, at_once=group)

    note(bits=knobs.bits, group=group, recent=knobs.recent, chunks=chunks, layers=shape.layers)
    note(total_steps=chunks + len(SWEEP) + shape.layers + 1)
    pieces = tokenizer.pieces(ids)
    text = checked_ids(ids, shape.vocab)[None].to(model.embed.weight.device)
    start = group * math.ceil((knobs.recent + group) / group)  # from here on tokens are read from a packed cache
    _read(model, text, pieces, {way: make(knobs.bits, way) for way in WAYS}, group=group, start=start)
    for bits in SWEEP:
        for way in ("tensor", "channel"):
            ppl, used = _whole(model, text, make(bits, way), group=group, start=start)
            tap(SWEEP_PPL, ppl, "", strategy=way)
            tap(SWEEP_BYTES, used / len(ids), "", strategy=way)
        step()
    given = _tune(model, text, make, group=group)
    uniform, _ = _whole(model, text, make(MEAN), group=group, start=start)
    tuned, used = _whole(model, text, make(given), group=group, start=start)
    tap(SWEEP_PPL, tuned, "", strategy="tuned")
    tap(SWEEP_BYTES, used / len(ids), "", strategy="tuned")
    note(uniform=uniform, tuned=tuned, given=given)
    _ask(model, tokenizer, make, knobs.bits, toy=toy)
    step()


def _read(model: Any, text: Any, pieces: list[str], caches: Mapping[str, Cache], *, group: int, start: int) -> None:
    """All ways read the same text, a group of tokens a step; perplexity counts from token `start` on."""
    readers = {way: surprisals(model, text, cache=cache, chunk=group) for way, cache in caches.items()}
    nats: dict[str, list[float]] = {way: [] for way in caches}
    squares = {way: np.zeros((model.shape.layers, 2)) for way in caches}
    for at in range(0, len(pieces), group):
        read_aloud(pieces[at : at + group])
        for way, cache in caches.items():
            with labelled(strategy=way):
                nats[way] += next(readers[way])[0].double().tolist()
                tap(BYTES, cache.nbytes, "")
                if way != "plain":
                    tap(ERROR, _errors(way, squares[way]), "layer")
                if len(nats[way]) > start:
                    tap(PPL, float(np.exp(np.mean(nats[way][start:]))), "")
        step()


def _errors(way: str, squares: np.ndarray) -> np.ndarray:
    """‖K' − K‖ / ‖K‖ of each layer, over all that was packed so far."""
    for layer in range(len(squares)):
        error = newest("kv_bits.key_error", strategy=way, layer=layer)
        stored = newest("kv_bits.keys", strategy=way, layer=layer)
        if error is not None and stored is not None:
            squares[layer] += (np.square(error).sum(), np.square(stored - error).sum())
    return np.sqrt(squares[:, 0] / np.maximum(squares[:, 1], 1e-12)).astype(np.float32)


def _whole(model: Any, text: Any, cache: Cache, *, group: int, start: int) -> tuple[float, int]:
    """Perplexity past the tokens that were never packed, and bytes at the end. Its passes are no steps of the page."""
    with record(keep={}):
        nats = np.concatenate([n[0].double().cpu().numpy() for n in surprisals(model, text, cache=cache, chunk=group)])
    return float(np.exp(nats[start:].mean())), cache.nbytes


def _tune(model: Any, text: Any, make: Callable[..., Cache], *, group: int) -> list[int]:
    """Bits for each layer: measured layer by layer on the first half of the text, a layer a step."""
    rows: list[np.ndarray] = []
    half = text[:, : max(3 * group, text.shape[1] // 2)]
    layers = model.shape.layers
    found = by_layer(model, half, options=OPTIONS[:1], make=make)
    while True:
        with record(keep={}):
            row = next(found, None)
        if row is None:
            break
        rows.append(row.numpy())
        tap(SUFFERS, np.array([r[0] for r in rows] + [0.0] * (layers - len(rows)), np.float32), "layer")
        step()
    # A bit more halves each step, and so takes three quarters of what its rounding does: measuring two bits will do.
    losses: Any = np.stack(rows) / 4.0 ** np.arange(len(OPTIONS))
    given = assign(losses, options=OPTIONS, budget=MEAN)
    tap(GIVEN, np.array([OPTIONS.index(bits) for bits in given], np.int32), "layer")
    return given


def _ask(model: Any, tokenizer: Any, make: Callable[..., Cache], bits: int, *, toy: bool) -> None:
    """A number told early and asked for late, from each kind of cache."""
    question = passkey(tokenizer, tokens=150, depth=0.2, seed=2) if not toy else passkey_question(TOLD, **AT)
    for way in WAYS:
        with record(keep={}):
            answer: Answer = ask(model, tokenizer, question, cache=make(bits, way), chunk=16)
        note(**{f"asked_{way}": [question.answer.strip(), answer.text.strip(), answer.right]})


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    ppl = {way: float(recording.stack(PPL, strategy=way)[-1]) for way in WAYS}
    used = {way: float(recording.stack(BYTES, strategy=way)[-1]) for way in WAYS}
    loud, layer = _outlier(recording)
    asked = {way: meta[f"asked_{way}"] for way in WAYS}
    suffers = recording.track(SUFFERS).latest()
    given = meta["given"]
    # fmt: off
    return {
        **{name: meta[name] for name in ("bits", "group", "recent", "uniform", "tuned", "layers", "chunks")},
        **{f"ppl_{way}": value for way, value in ppl.items()},
        **{f"bytes_{way}": value for way, value in used.items()},
        **{f"said_{way}": said for way, (_, said, _) in asked.items()},
        "name": meta["model"]["name"], "told": asked["plain"][0],
        "smaller": used["plain"] / used["channel"], "worse": ppl["tensor"] / ppl["plain"],
        "loud_layer": layer, "loud_times": loud,
        "given_most": given.count(max(OPTIONS)), "given_least": given.count(min(OPTIONS)),
        "worst_layer": int(suffers.argmax()), "worst_times": float(suffers.max() / max(np.median(suffers), 1e-12)),
        "read": meta["chunks"] - 1, "swept": meta["chunks"] + len(SWEEP) - 1, "last": recording.steps - 1,
    }
    # fmt: on


def _outlier(recording: Recording) -> tuple[float, int]:
    """How much louder the loudest key channel is than the usual one of its head, and in which layer."""
    best = (0.0, 0)
    for track in recording.tracks:
        if track.name == "attention.k" and track.index.get("strategy") == "plain":
            sizes = np.abs(recording.stack("attention.k", **track.index)[0]).mean(1)  # H W
            best = max(best, (float((sizes.max(1) / np.median(sizes, 1)).max()), int(track.index["layer"])))
    return best


def marks(recording: Recording) -> list[Mark]:
    chunks = recording.meta["chunks"]
    return [Mark(chunks, "8 bits to 2"), Mark(chunks + len(SWEEP), "layer by layer")]


def _naive(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['bits']} bits: {f['ppl_tensor']:.1f} / {f['ppl_plain']:.1f} = {f['worse']:.2f}×"
    if f["worse"] > 1.1:
        return Finding(f"{f['worse']:.2f}×", "agrees", "", filled)
    return Finding(f"{f['worse']:.2f}×", "differs", "At this many bits this text does not feel it. Try two.", filled)


def _channels(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"keys by channel {f['ppl_channel']:.1f}, by token {f['ppl_token']:.1f}, one scale {f['ppl_tensor']:.1f}"
    order = f["ppl_channel"] < f["ppl_token"] and f["ppl_channel"] < f["ppl_tensor"]
    why = "" if order else "In this run keys by channel are not the best of the three."
    return Finding(f"{f['ppl_channel']:.1f} vs {f['ppl_token']:.1f}", "agrees" if order else "differs", why, filled)


def _layers(recording: Recording) -> Finding:
    f = facts(recording)
    filled = (
        f"{f['given_least']} layers at 2 bits, {f['given_most']} at 4, {f['layers']} in all; against 3 bits for all"
    )
    better = f["tuned"] < f["uniform"]
    why = "" if better else (
        "What layers suffer one by one does not add up, and a short text is noisy: three bits for all do as well."
    )  # fmt: skip
    return Finding(f"{f['tuned']:.1f} vs {f['uniform']:.1f}", "agrees" if better else "differs", why, filled)


HOOPER = "post; Hooper 2024, 2401.18079"
# fmt: off
CLAIMS = (
    Claim(
        "Low precision done naively hurts the answers, unpredictably", HOOPER, "ppl(one scale) / ppl(16 bits)",
        "hurts", _naive,
    ),
    Claim(
        "Keys have loud channels: a scale for each channel saves them", "Liu 2024, 2402.02750; Hooper 2024",
        "ppl(keys by channel) vs ppl(keys by token)", "channel wins", _channels,
    ),
    Claim(
        "Layers differ: give bits where they help", HOOPER, "ppl(tuned by layer) vs ppl(uniform), equal bytes",
        "tuned wins", _layers,
    ),
)

BEATS = (
    Beat(
        "Each token leaves a key and a value in every layer. Here are ==the keys|keys== of one head, a row a token. "
        "Look for stripes: some [[channel]]s are far louder than the others. In layer {loud_layer} one is "
        "{loud_times:.0f} times as loud as the usual one.",
        scene="levels", step=0, play=True, focus="keys",
    ),
    Beat(
        "Now store each number in {bits} bits: ==a code|codes== from 0 up, and a [[scale]] that says how far apart the "
        "levels lie. Who shares a scale decides all. The newest {recent} tokens stay whole. Click a code to see how it "
        "came about.",
        scene="levels", step="read", play=True, focus="codes", do=Do("Open a code’s arithmetic", cell="codes"),
    ),
    Beat(
        "One scale for everything must stretch to the loudest channel, so the quiet ones all fall on one level. With "
        "all its memory in 16 bits, {name} reads this text at a [[perplexity]] of {ppl_plain:.1f}.",
        scene="levels", step="read", focus="naive",
        predict=Predict("And with one scale for all, in {bits} bits?", (32, 60, 400, 3000), "ppl_tensor"),
    ),
    Beat(
        "{ppl_tensor:,.0f}. A scale a token does better: {ppl_token:.1f}. A scale for each channel of the keys, as in "
        "KIVI, reaches {ppl_channel:.1f}, with a cache {smaller:.1f} times smaller. ==The curves|curves== show it "
        "happen: same bits, other neighbours.",
        scene="quality", step="read", play=True, focus="curves",
    ),
    Beat(
        "From eight bits down to two: ==each point|plane== is a whole reading. At eight nobody notices. At two, one "
        "scale for all is lost; channels hold on. Asked for {told}, told early in a text, 16 bits answer "
        "“{said_plain}”, channels “{said_channel}”, one scale “{said_tensor}”.",
        scene="quality", step="swept", play=True, focus="plane",
    ),
    Beat(
        "Do all layers need the same? Take the bits from ==one layer at a time|layers== and see how far the "
        "predictions move. Layer {worst_layer} suffers {worst_times:.0f} times as much as the usual one. ==Four bits "
        "where it hurts|given==, two where it does not: perplexity {tuned:.1f}; three bits for all, {uniform:.1f}.",
        scene="layers", step="last", play=True, focus="layers",
    ),
    Beat(
        "How long a text fits into your memory? ==The calculator|fits== counts codes, scales and zero points. Then "
        "break it: find the fewest bits, and a text, at which even keys by channel fall apart. Or keep no token whole.",
        scene="layers", step="last", do=Do("Turn **Kept whole** to 0", knob="recent"),
    ),
)
# fmt: on

GLOSSARY = {
    "channel": "One of the numbers of a key: the same place in every token’s key.",
    "scale": "The distance between two neighbouring levels; with a least value it turns codes back into numbers.",
    "perplexity": "e to the mean surprisal: among how many equally likely tokens the model hesitates.",
}


def code_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """How one key of a packed token became a code: least and largest of its channel, step, code, and back."""
    row, column, head = at["key"], at["width"], at["head"]
    layer = nearest(recording, "attention.k", knobs.layer)
    group, bits = recording.meta["group"], recording.meta["bits"]
    where: dict[str, Any] = {"layer": layer, "strategy": "channel"}
    code = int(recording.stack("kv_bits.key_codes", **where)[0, head, row, column])
    stored, lost = (recording.stack(f"kv_bits.{n}", **where)[0, head, :, column] for n in ("keys", "key_error"))
    back, error, first = float(stored[row]), float(lost[row]), row // group * group
    own = (stored - lost)[first : first + group]
    low, high = float(own.min()), float(own.max())
    size = (high - low) / (2**bits - 1)
    return Arithmetic(
        title=f"layer {layer}, key head {head}: token {row}, channel {column}",
        lines=(
            (f"least of the {len(own)} tokens that share a scale", f"{low:.3f}"),
            ("largest", f"{high:.3f}"),
            (f"step = ({high:.3f} − {low:.3f}) / (2^{bits} − 1)", f"{size:.4f}"),
            (f"code = round(({back - error:.3f} − {low:.3f}) / {size:.4f})", str(code)),
            (f"read back: {low:.3f} + {code} · {size:.4f}", f"{back:.3f}"),
            ("error, at most half a step", f"{error:+.4f}"),
        ),
        note="Step and least value are stored in 16 bits, rounded outwards.",
        vectors=(("k, the tokens that share this scale", tuple(own.tolist())),),
        values={"code": float(code), "error": error, "step": size},
    )


def _fits(values: Mapping[str, float]) -> Arithmetic:
    shape = {name: int(values[name]) for name in ("layers", "kv_heads", "width")}
    bits, group = int(values["bits"]), int(values["group"])
    plain = shape["layers"] * 2 * shape["kv_heads"] * shape["width"] * 2
    packed = float(plain) if bits >= 16 else shape["layers"] * token_bytes(
        bits=bits, group=group, kv_heads=shape["kv_heads"], head_width=shape["width"]
    )  # fmt: skip
    memory = values["memory"] * 1e9
    return Arithmetic(
        "",
        (
            ("bytes a token at 16 bits", f"{plain:,}"),
            (f"bytes a token at {bits} bits, scales counted", f"{packed:,.0f}"),
            ("times smaller", f"{plain / packed:.2f}×"),
            ("tokens that fit at 16 bits", f"{cost.tokens_that_fit(memory, plain):,}"),
            (f"tokens that fit at {bits} bits", f"{cost.tokens_that_fit(memory, packed):,}"),
        ),
        note="Keys by channel, values by token: a scale and a least value of 16 bits each for every group.",
    )


def _keys(name: str, title: str, tensor: str, colours: str, way: str, **more: Any) -> views.Heatmaps:
    where = {"layer": knob("layer"), "strategy": way, "batch": 0}
    return views.Heatmaps(
        name=name, title=title, tensor=of(tensor, **where), rows="key", columns="width", facet="head",
        focus=knob("head"), colours=colours, row_labels="tokens", **more,
    )  # fmt: skip


FIELDS = tuple(
    views.Field(name, label, value, low, high, unit, whole=name != "memory")
    for name, label, value, low, high, unit in (
        ("layers", "Layers", 30, 1, 1000, ""), ("kv_heads", "Key heads", 3, 1, 1000, ""),
        ("width", "Head width", 64, 1, 4096, ""), ("bits", "Bits", 2, 1, 16, ""), ("group", "Group", 32, 1, 1024, ""),
        ("memory", "Memory", 1, 0.001, 1e4, "GB"),
    )
)  # fmt: skip
SHAPES = {PUBLISHED[name].title: PUBLISHED[name].shape for name in ("smollm2", "llama-2-7b", "llama-3-8b")}
PRESETS = tuple((n, {"layers": s.layers, "kv_heads": s.kv_heads, "width": s.head_width}) for n, s in SHAPES.items())
LINES = tuple(Line(label, of(PPL, strategy=way), colour=COLOURS[way]) for way, label in WAYS.items())
ERRORS = tuple(Line(WAYS[way], of(ERROR, strategy=way), colour=COLOURS[way]) for way in WAYS if way != "plain")
SWEPT = tuple(
    Points(name, of(SWEEP_BYTES, strategy=way), of(SWEEP_PPL, strategy=way), colour=COLOURS[way], trail=True)
    for way, name in (("tensor", WAYS["tensor"]), ("channel", WAYS["channel"]), ("tuned", "tuned by layer"))
)
USED = tuple(Number(label, of(BYTES, strategy=way), unit="bytes", colour=COLOURS[way]) for way, label in WAYS.items())
# fmt: off
SCENES = (
    Scene(
        "levels",
        (
            _keys("keys", "Keys, as they come", "attention.k", "diverging", "plain", span=6),
            _keys("codes", "Their codes, a scale a channel", "kv_bits.key_codes", "key", "channel", span=6,
                  cell=code_cell),
            _keys("kind", "What rounding changed, a scale a channel", "kv_bits.key_error", "diverging", "channel",
                  span=6),
            _keys("naive", "… and with one scale for all", "kv_bits.key_error", "diverging", "tensor", span=6),
            views.Tokens(name="text", title="The text, as it is read", fold=False),
        ),
    ),
    Scene(
        "quality",
        (
            views.Curves(
                name="curves", title="Perplexity so far", note="of tokens read from packed memory", span=7, log=True,
                lines=LINES, x_label="group of tokens",
            ),
            views.Plane(
                name="plane", title="Eight bits, four, three, two", span=5, log=True, x_label="bytes a token",
                y_label="perplexity", x_format=",.0f", format=".1f",
                points=SWEPT,
            ),
            views.Numbers(name="bytes", title="The cache", numbers=USED),
        ),
    ),
    Scene(
        "layers",
        (
            views.Curves(
                name="layers", title="How far predictions move when one layer has two bits", span=7, across="layer",
                lines=(Line("KL to 16 bits, nats a token", of(SUFFERS), colour="alarm"),), x_label="layer",
                format=".4f", low=0.0,
            ),
            views.Stack(
                name="given", title="Bits given, three on average", codes=of(GIVEN), span=5,
                kinds=("2 bits", "3 bits", "4 bits"), colours=("alarm", "key", "value"),
            ),
            views.Curves(
                name="errors", title="What rounding changed in the keys", note="relative to their size", lines=ERRORS,
                across="layer", x_label="layer", format=".2f", low=0.0,
            ),
            views.Calculator(
                name="fits", title="How many tokens fit?",
                fields=FIELDS, presets=PRESETS, compute=_fits,
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    wanted: dict[str, dict[str, Any]] = {
        name: {} for name in ("kv_bits.perplexity", "kv_bits.bytes", "kv_bits.sweep.*")
    }
    wanted |= {name: {} for name in ("kv_bits.layer_error", "kv_bits.suffers", "kv_bits.given", "kv_bits.keys")}
    return wanted | {
        "kv_bits.key_error": {},
        "kv_bits.key_codes": {"strategy": "channel"},
        "attention.k": {"strategy": "plain"},
    }


# fmt: off
LESSON = Lesson(
    slug="kv-bits", title="Fewer bits for the cache", question="How few bits can a memory have?",
    part="Keep the right things", order=15,
    sources=("post", "Hooper 2024, arXiv:2401.18079", "Liu 2024, arXiv:2402.02750"), knobs=Turn, run=run, keep=keep,
    beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.caches.quantised:shrink", "engine.caches.quantised:Quantised", "engine.caches.layer_bits:assign"),
    looks=frozenset({"layer", "head"}), bounded_by={"layer": "layers", "head": "kv_heads"}, facts=facts, marks=marks,
    glossary=GLOSSARY, budget=40_000_000, seconds=300,
)
# fmt: on
