"""Remember a sketch, redraw the rest: a cache of short notes from which all heads' keys and values are rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine import cost
from engine.caches.full import Full
from engine.generate import checked_ids
from engine.mixers.latent import FORMS, LATENT, ROPE_KEY, in_form, with_rope
from engine.mixers.low_rank import kept_share, rank_for, spectra
from engine.published import PUBLISHED
from engine.recording import Recording, labelled, note, site, step, tap
from engine.toyland import Grammar, Tokenizer, batch, story
from lessons.arithmetic import attention_cell, nearest
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import introduce, read_aloud
from lessons.sharing import QUALITY, TOTALS, calculator, footprint, front, judge, toy, unknown, weigh
from lessons.views import Arithmetic, Curves, Heatmaps, Line, Number, Numbers, Tokens, knob, of

LIT = site("sketch.first_row", "the first token whose keys and values are redrawn in this step")
DIFFERENCE = site("sketch.difference", "largest difference between the two forms, in the last layer's states", low=0.0)
MATRIX = site(
    "sketch.matrix", "W^UK above W^UV of each head: what redraws keys and values from a sketch", symbol="W^UK"
)
WORK = site("sketch.work", "multiplications of one layer's attention for one new token", low=0.0)
MOVED = site("sketch.moved", "values of weights, cache and what is redrawn, read or written for one new token", low=0.0)
KEYS = site("sketch.keys", "tokens that the new one looks back at")
SPECTRUM = site("sketch.spectrum", "singular values, without those that are rounding", symbol="σ", low=0.0)
KEPT = site("sketch.kept", "share of the squares that the first directions keep", low=0.0, high=1.0)

READ = 36  # tokens of the story
FAR = 4096  # tokens back at which the two forms are compared
MLA = {"mla32": "MLA, 32", "mla8": "MLA, 8"}
DESIGNS = {"toy": "MHA", "gqa2": "GQA-2", "mqa": "MQA", **MLA}
DETAIL = {
    "toy": "8 keys and 8 values",
    "gqa2": "2 keys and 2 values",
    "mqa": "1 key and 1 value",
    "mla32": "a sketch of 32, a key of 16",
    "mla8": "a sketch of 8, a key of 16",
}


class Turn(Knobs):
    latent: param.Selector = param.Selector(
        default="mla32", objects={"32 values": "mla32", "8 values": "mla8"}, label="Sketch", doc="What a token leaves."
    )
    rope: param.Selector = param.Selector(
        default=16, objects={"16": 16, "8": 8, "4": 4, "none": 0}, label="Position values at work",
        doc="Of the 16 that the toy was trained with; the others are silenced, without retraining.",
    )  # fmt: skip
    form: param.Selector = param.Selector(
        default="naive", objects={"Redraw keys and values": "naive", "Carry the query over": "absorbed"},
        label="Form", doc="Naive or absorbed: the same sums in another order.",
    )  # fmt: skip
    layer = param.Integer(1, bounds=(0, 3), label="Layer", doc="Which layer you look into.")
    head = param.Integer(0, bounds=(0, 7), label="Head", doc="Which of its heads.")


def run(knobs: Turn) -> None:
    model, trained = toy(knobs.latent)
    introduce(MLA[knobs.latent] + ("" if trained else ", not trained here"), model)
    if knobs.rope < model.blocks[0].mixer.rope_width:
        model = with_rope(model, width=knobs.rope)
    tokenizer = Tokenizer()
    text = tokenizer.prompt(story(seed=2, tokens=READ))[:READ]
    ids = checked_ids(text, model.shape.vocab)[None]
    pieces = tokenizer.pieces(text)
    mixer = model.blocks[0].mixer
    note(total_steps=len(text) + 1, rank=mixer.rank, rope_width=mixer.rope_width, working=knobs.rope, tokens=len(text))
    note(design=knobs.latent, head_width=mixer.head_width, shape_width=model.shape.width)
    for layer, block in enumerate(model.blocks):
        tap(MATRIX, block.mixer.rebuild.weight.view(mixer.heads, -1, mixer.rank), "head width latent", layer=layer)
    mixers = {form: in_form(model, form) for form in FORMS}
    _long(mixers, toy("toy")[0])
    caches = {form: Full(capacity=len(text)) for form in FORMS}
    for t in range(len(text)):
        read_aloud(pieces[t : t + 1])
        states = {}
        for form, twin in mixers.items():
            with labelled(form=form):
                states[form] = twin.hidden(ids[:, t : t + 1], cache=caches[form])
                tap(LIT, 0 if form == "naive" else t + 1, "")
                _count(twin.blocks[0].mixer, t + 1)
        tap(DIFFERENCE, (states["naive"] - states["absorbed"]).abs().max(), "")
        step()
    with labelled(form="compared"):  # what these read is no part of the pictures
        _compare(text, model if knobs.rope < mixer.rope_width else None, knobs.latent)
    step(label="compared")


def _count(mixer: Any, keys: int) -> None:
    tap(WORK, sum(mixer.multiplications(rows=1, keys=keys).values()), "")
    tap(MOVED, sum(mixer.values_moved(keys=keys).values()), "")


def _long(forms: Mapping[str, Any], mha: Any) -> None:
    """What one new token costs a layer, for texts as long as no toy has read: counted, not run."""
    lengths = sorted({int(n) for n in np.geomspace(16, 16384, 31)} | {FAR})
    tap(KEYS, np.array(lengths, np.float64), "place")
    for form, model in forms.items():
        m = model.blocks[0].mixer
        counted = [(m.multiplications(rows=1, keys=n), m.values_moved(keys=n)) for n in lengths]
        tap(WORK, np.array([sum(a.values()) for a, _ in counted], np.float64), "place", of=form)
        tap(MOVED, np.array([sum(b.values()) for _, b in counted], np.float64), "place", of=form)
    m = mha.blocks[0].mixer
    weights, held = sum(p.numel() for p in m.parameters()), 2 * m.kv_heads * m.head_width
    met = [sum(m.multiplications(rows=1, keys=n).values()) for n in lengths]
    tap(WORK, np.array([m.qkv.weight.numel() + each for each in met], np.float64), "place", of="mha")
    tap(MOVED, np.array([weights + n * held for n in lengths], np.float64), "place", of="mha")


def _compare(text: list[int], altered: Any, design: str) -> None:
    """Toys trained alike: what they keep and how well they read; and how few directions MHA's keys and values have."""
    totals, quality, missing = [], [], []
    for name, label in DESIGNS.items():
        model, trained = toy(name)
        totals.append(int(weigh(name, model, text).sum()))
        judged = altered if altered is not None and name == design else model
        quality.append(judge(name, judged)["perplexity"] if trained else unknown(name))
        missing += [] if trained else [label]
    tap(TOTALS, np.array(totals, np.float32), "design")
    tap(QUALITY, np.array(quality, np.float32), "design")
    mha, _ = toy("toy")
    found = spectra(mha, batch(Grammar(), seed=0, step=0, rows=8, length=128, stream="test").ids)
    for (layer, which), values in found.items():
        real = values[values > 1e-9 * values[0]]  # all come from a narrower state: the others are rounding
        tap(KEPT, kept_share(real), "rank", layer=layer, of=which)
        tap(SPECTRUM, real, "rank", layer=layer, of=which)
    note(missing=missing, r90=float(np.mean([rank_for(v, 0.9) for (_, which), v in found.items() if which == "kv"])))


def facts(recording: Recording) -> dict[str, Any]:
    m = recording.meta
    names = list(DESIGNS)
    totals = recording.track(TOTALS).latest().astype(float)
    quality = dict(zip(names, recording.track(QUALITY).latest().astype(float).tolist(), strict=True))
    here, mha = totals[names.index(m["design"])], totals[0]
    work, moved = ({form: _far(recording, name, form) for form in (*FORMS, "mha")} for name in (WORK, MOVED))
    layers = m["model"]["layers"]
    return {
        "rank": m["rank"],
        "rope_width": m["rope_width"],
        "values": m["rank"] + m["rope_width"],
        "mha_values": int(mha / layers / 4),
        "heads": m["model"]["heads"],
        "width": m["shape_width"],
        "left": 100 * here / mha,
        "saved": 1 - here / mha,
        "quality": _sentence(m, quality),
        "r90": m["r90"],
        "difference": float(recording.stack(DIFFERENCE).max()),
        "far": FAR,
        "more_work": work["naive"] / work["absorbed"],
        "more_moved": moved["naive"] / moved["absorbed"],
        "against_work": work["absorbed"] / work["mha"],
        "against_moved": moved["mha"] / moved["absorbed"],
        "half": m["tokens"] // 2,
        "read": m["tokens"] - 1,
        "last": recording.steps - 1,
        "totals": (totals / layers / 4).tolist(),
        "perplexities": list(quality.values()),
    }


def _far(recording: Recording, name: str, of: str) -> float:
    place = recording.track(KEYS).latest().tolist().index(FAR)
    return float(recording.track(name, of=of).latest()[place])


def _sentence(meta: Mapping[str, Any], quality: Mapping[str, float]) -> str:
    if not np.isfinite([quality[meta["design"]], quality["toy"]]).all():
        return f"Not trained on this server: {', '.join(meta['missing'])}."
    return f"Perplexity {quality[meta['design']]:.2f}; all heads’ own notes have {quality['toy']:.2f}."


def marks(recording: Recording) -> list[Mark]:
    return [Mark(recording.meta["tokens"], "compared with toys trained alike")]


def _saved_bits(recording: Recording) -> Finding:
    new, old = PUBLISHED["deepseek-v2"].kv_values(), PUBLISHED["deepseek-67b"].kv_values()
    saved = cost.cache_saved(new, old, bits=6)
    why = "Against its forerunner’s GQA, and only with about 6 bits a value: latents alone save less, see below."
    filled = f"1 − {new:,} · 6 bit / ({old:,} · 16 bit)"
    return Finding(f"{saved:.1%}", "agrees" if round(saved, 3) == 0.933 else "differs", why, filled)


def _saved_values(recording: Recording) -> Finding:
    new, old = PUBLISHED["deepseek-v2"].kv_values(), PUBLISHED["deepseek-67b"].kv_values()
    saved = cost.cache_saved(new, old)
    same = round(saved, 3) == 0.822
    filled = f"1 − {new:,} / {old:,}: 60 · (512 + 64) against 95 · 2 · 8 · 128"
    return Finding(f"{saved:.1%}", "agrees" if same else "differs", "" if same else "The shapes give another.", filled)


def _saved_same(recording: Recording) -> Finding:
    v2 = PUBLISHED["deepseek-v2"]
    saved = cost.cache_saved(v2.kv_values(), cost.kv_values(v2.shape))
    f = facts(recording)
    why = f"This toy has fewer and narrower heads: here {f['saved']:.1%} are gone ({f['values']} of {f['mha_values']})."
    filled = f"1 − (512 + 64) / (2 · 128 · 128); here 1 − ({f['rank']} + {f['rope_width']}) / {f['mha_values']}"
    return Finding(f"{saved:.1%}", "agrees" if round(saved, 3) == 0.982 else "differs", why, filled)


def _even_mqa(recording: Recording) -> Finding:
    groups = cost.gqa_groups_of_latent(rank=512, rope_width=64, head_width=128)
    mha, gqa, mqa, big, small = (f"{v:.0f}" for v in facts(recording)["totals"])
    filled = (
        f"DeepSeek-V2: MLA 576 values a layer, MQA 256, GQA-8 2,048; toys: MLA {big} and {small}, "
        f"MQA {mqa}, GQA-2 {gqa}, MHA {mha}"
    )
    why = f"In size it does not: DeepSeek-V2’s sketch is as large as the cache of {groups} key heads, and MQA has one."
    return Finding(f"{groups}× MQA’s cache", "differs", why, filled)


def _even_mqa_reads(recording: Recording) -> Finding:
    m = recording.meta
    if m["missing"]:
        return Finding("–", "untestable", f"Not trained here: {', '.join(m['missing'])}.")
    if m["working"] < m["rope_width"]:
        return Finding("–", "untestable", "Some of the position values are silenced in this run.")
    mha, gqa, mqa, big, small = facts(recording)["perplexities"]
    filled = f"equal caches: 24 values MLA {small:.2f}, MQA {mqa:.2f}; 48 values MLA {big:.2f}, GQA-2 {gqa:.2f}"
    better = small < mqa and big < gqa
    why = f"MHA, with 192 values: {mha:.2f}. One training run of each: small differences may be luck."
    return Finding(f"{small:.2f} vs {mqa:.2f}", "agrees" if better else "differs", why, filled)


def _cost(recording: Recording) -> Finding:
    f = facts(recording)
    agrees = f["against_work"] > 1 and f["against_moved"] > 1
    filled = f"behind {FAR:,} tokens, absorbed against MHA: {f['against_work']:.1f}× the multiplications"
    why = (
        f"If keys and values are redrawn and stored for each token (naive), it moves {f['more_moved']:.1f} times more "
        "than absorbed: writing them down undoes the saving."
    )
    return Finding(f"{f['against_moved']:.1f}× fewer values", "agrees" if agrees else "differs", why, filled)


# fmt: off
CLAIMS = (
    Claim("MLA’s cache is 93.3% smaller", "architectures; DeepSeek-AI 2024, 2405.04434",
          "1 − layers · (d_c + d_R) · bits / (layers · 2 · g · d · bits)", "93.3%", _saved_bits),
    Claim("… counted in values alone", "the same formula without quantisation", "1 − 60 · 576 / (95 · 2048)", "82.2%",
          _saved_values),
    Claim("… and against MHA of its own shape", "the same formula", "1 − (d_c + d_R) / (2 · h · d)", "98.2%",
          _saved_same),
    Claim("MLA outperforms even MQA, by its cache", "architectures", "(d_c + d_R) / 2d, in key heads", "“even MQA”",
          _even_mqa),
    Claim("… or by how well it reads", "architectures; DeepSeek-AI 2024", "perplexity at equal cache", "better",
          _even_mqa_reads, "perplexity"),
    Claim("Rebuilding costs compute but moves fewer bytes", "architectures", "multiplications; values moved",
          "more; fewer", _cost),
)

BEATS = (
    Beat(
        "Each token must leave a note for those after it. Usually that is a key and a value for every head: "
        "{mha_values} numbers a layer. This model leaves ==a sketch|sketch== of {rank}, and ==one small key|rope== of "
        "{rope_width} for its place. Nothing else is [[cached]].", scene="sketch", step="half", focus="sketch",
    ),
    Beat(
        "When a later token looks back, the heads’ ==keys|keys== and ==values|values== are redrawn from the sketch, "
        "each head with matrices of its own. Choose another **head**: another drawing, the same sketch.",
        scene="sketch", step="read", play=True, focus="keys",
    ),
    Beat(
        "Click a cell of the keys: one row of the head’s matrix, times the sketch. The last {rope_width} columns are "
        "not drawn: they are the [[position key]], shared by all heads.", scene="sketch", step="read", focus="keys",
        do=Do("Open a key’s arithmetic", cell="keys"),
    ),
    Beat(
        "{mha_values} numbers a layer for every head’s own key and value. Now a sketch of {rank} and a key of "
        "{rope_width}: one vector, not two.", scene="sketch", step="read",
        predict=Predict("How much of the cache is left?", (2, 10, 25, 50), "left", format=".0f", unit="%"),
    ),
    Beat(
        "{left:.0f}%. ==The strips|footprint== are caches of toys trained alike; two of them are as large as GQA’s and "
        "MQA’s, so that the notes can be compared at the same price. {quality}", scene="cache", step="last",
        focus="footprint",
    ),
    Beat(
        "Why is so little enough? Take ordinary heads: {mha_values} numbers, all made from a state of {width}. "
        "==Sorted by strength|kept==, {r90:.0f} [[directions]] hold 90% of what they say. A sketch keeps those that "
        "matter and lets go of the rest.", scene="why", step="last", focus="kept",
    ),
    Beat(
        "Redrawing everything for each new token is slow. But q · (W c) is (q W) · c: carry the **query** over to the "
        "sketches, once. Switch the **form**: the rows go dim, nothing is redrawn, and results differ by "
        "{difference:.0e} at most.", scene="sketch", step="read", do=Do("Carry the query over", knob="form"),
    ),
    Beat(
        "{far:,} tokens back, redrawing takes {more_work:.1f} times the ==multiplications|work== of carrying over. "
        "That still takes {against_work:.1f} times those of ordinary heads, but ==moves|moved== {against_moved:.1f} "
        "times fewer values. Decoding waits for memory, so it is a good deal.", scene="price", step="last",
        focus="moved",
    ),
    Beat(
        "Break it: silence the position values. Keys still say *what* was there, no longer *where*. How far does "
        "==perplexity|front== rise with 8, with 4, with none? Then a sketch of 8: what does it cost?", scene="cache",
        step="last", do=Do("Silence position values", knob="rope"),
    ),
)
GLOSSARY = {
    "cached": "Kept until the text ends. The sketch is normed (RMSNorm) before it is kept, not after.",
    "position key": "The decoupled RoPE key. Rotation depends on the distance, so a matrix that rotates cannot be "
    "carried over to the query: the part that knows the place is kept apart, and scores are divided by the root of "
    "both widths together.",
    "directions": "Singular vectors: of all ways to write the notes with so few numbers, the one that loses least.",
}


def key_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """One value of a redrawn key: a row of the head's matrix times the sketch, or the rotated key as it was kept."""
    return _redrawn(recording, knobs, at, values=False)


def value_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """One value of a redrawn value."""
    return _redrawn(recording, knobs, at, values=True)


def _redrawn(recording: Recording, knobs: Any, at: Mapping[str, int], *, values: bool) -> Arithmetic:
    token, head, place = at["key"], at["head"], at["width"]
    layer, D = nearest(recording, LATENT, knobs.layer), recording.meta["head_width"]
    if place >= D:
        kept = recording.stack(ROPE_KEY, layer=layer)[0, token]
        return Arithmetic(
            title=f"layer {layer}, token {token}: position value {place - D}",
            lines=(("as it is in the cache", f"{kept[place - D]:.4f}"),),
            note="Rotated by the token’s place, and the same for all heads: it is not redrawn.",
            vectors=(("position key", tuple(kept.tolist())),),
            values={"sum": float(kept[place - D])},
        )
    c = recording.stack(LATENT, layer=layer)[0, token].astype(np.float64)
    row = recording.track(MATRIX, layer=layer).latest()[head, place + D * values].astype(np.float64)
    name = "value" if values else "key"
    return Arithmetic(
        title=f"layer {layer}, head {head}, token {token}: {name}, place {place}",
        lines=((f"row {place} of {'W^UV' if values else 'W^UK'} · c, {len(c)} products", f"{row @ c:.4f}"),),
        note="The sketch is the same for all heads; the matrix is this head’s own.",
        vectors=(("row", tuple(row.tolist())), ("sketch c", tuple(c.tolist())), ("row × c", tuple((row * c).tolist()))),
        values={"sum": float(row @ c)},
    )


def _growing(name: str, title: str, tensor: str) -> Curves:
    """Both forms and MHA, over the tokens that a new one looks back at."""
    ways = (("redrawn", "naive", "alarm"), ("carried over", "absorbed", "query"), ("MHA", "mha", "kept"))
    lines = tuple(Line(label, of(tensor, of=which), colour=colour, x=of(KEYS)) for label, which, colour in ways)
    return Curves(
        name=name, title=title, span=6, across="place", log=True, log_x=True, origin="formula", format=".2s",
        lines=lines, x_label="tokens looked back at",
    )  # fmt: skip


HERE = {"layer": knob("layer"), "form": "naive", "batch": 0}
DRAWN: dict[str, Any] = {"rows": "key", "columns": "width", "row_labels": "tokens"}
SCENES = (
    Scene(
        "sketch",
        (
            Heatmaps(name="sketch", title="The sketch", note="cached", span=3, tensor=of(LATENT, **HERE),
                     colours="diverging", **DRAWN),
            Heatmaps(name="rope", title="Position key", note="cached, one for all heads", span=3,
                     tensor=of(ROPE_KEY, **HERE), colours="diverging", **DRAWN),
            Heatmaps(name="keys", title="Keys, redrawn", span=6, tensor=of("attention.k", **HERE), facet="head",
                     focus=knob("head"), colours="key", lit=of(LIT, form=knob("form")), cell=key_cell, **DRAWN),
            Heatmaps(name="values", title="Values, redrawn", span=6, tensor=of("attention.v", **HERE), facet="head",
                     focus=knob("head"), colours="value", lit=of(LIT, form=knob("form")), cell=value_cell, **DRAWN),
            Heatmaps(name="pattern", title="Who looks at whom", span=6, tensor=of("attention.pattern", **HERE),
                     rows="query", columns="key", facet="head", focus=knob("head"), colours="attention",
                     row_labels="tokens", column_labels="tokens", cell=attention_cell),
            Tokens(name="text", title="The text, as it is read", fold=False),
        ),
    ),
    Scene(
        "cache",
        (
            footprint(*((name, label, DETAIL[name]) for name, label in DESIGNS.items()),
                      title="What one more token leaves, and how well they read"),
            front(*DESIGNS.values(), span=5),
            calculator(span=7),
        ),
    ),
    Scene(
        "why",
        (
            Curves(
                name="kept", title="How much a few directions keep", span=7, across="rank", origin="toy",
                note="of MHA’s keys and values in this layer",
                lines=(
                    Line("keys and values", of(KEPT, layer=knob("layer"), of="kv"), colour="ink"),
                    Line("keys", of(KEPT, layer=knob("layer"), of="k"), colour="key"),
                    Line("values", of(KEPT, layer=knob("layer"), of="v"), colour="value"),
                ),
                x_label="directions", low=0.0, high=1.0, format=".0%",
            ),
            Curves(
                name="singular", title="Their singular values", span=5, across="rank", log=True, origin="toy",
                lines=(Line("keys and values", of(SPECTRUM, layer=knob("layer"), of="kv"), colour="ink"),),
                x_label="direction", format=".2g",
            ),
        ),
    ),
    Scene(
        "price",
        (
            _growing("work", "Multiplications of a new token", WORK),
            _growing("moved", "Values moved for a new token", MOVED),
            Numbers(
                name="now", title="This token, in one layer",
                numbers=(
                    Number("Multiplications", of(WORK, form=knob("form"))),
                    Number("Values moved", of(MOVED, form=knob("form")), colour="key"),
                    Number("Forms differ by", of(DIFFERENCE), format=".1e"),
                ),
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    tapped = (LATENT, ROPE_KEY, "attention.q", "attention.k", "attention.v", "attention.pattern")
    return {name: {"form": {"naive"}} for name in tapped} | {"sketch.*": {}, "sharing.*": {}}


# fmt: off
LESSON = Lesson(
    slug="latent", title="Remember a sketch, redraw the rest", question="Can the cache hold a compressed note?",
    part="Share the cache", order=5, sources=("architectures", "DeepSeek-AI 2024, arXiv:2405.04434"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.mixers.latent:Latent", "engine.mixers.low_rank:spectra"),
    looks=frozenset({"layer", "head", "form"}), bounded_by={"layer": "layers", "head": "heads"}, facts=facts,
    marks=marks, glossary=GLOSSARY, step_word="token", seconds=120,
    footnote="DeepSeek’s figures by formula, from its published shapes. Measured: toys of half a million weights.",
)
# fmt: on
