"""Calling only two of eight: a router, eight networks, what keeps it fair, and what a token costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import param

from engine import cost
from engine.moe.router import ExpertChoice, Router, TopK
from engine.moe.usage import by_topic, told_by, topic_text
from engine.published import PUBLISHED
from engine.recording import Recording, note, step, tap
from engine.toyland import Tokenizer, story
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import name_ids, read_aloud
from lessons.routing import (
    AT,
    CALLED,
    COUNT,
    DROPS,
    EVEN,
    LIKED,
    LIKES,
    LOST,
    ODDS,
    RIVER,
    SENT,
    SHAPE,
    favourite_words,
    grown,
    routed,
)  # fmt: skip
from lessons.sharing import size
from lessons.views import (
    Arithmetic,
    Bars,
    Calculator,
    Curves,
    Field,
    Heatmaps,
    Line,
    Number,
    Numbers,
    Routes,
    Tokens,
    knob,
    of,
)  # fmt: skip

TOPICS = {"A story": "story", "At the harbour": "harbour", "In the kitchen": "kitchen", "Your own": "own"}
ROUTES = {
    "The best one (Switch)": "top1", "The best two (Mixtral)": "top2", "Experts choose tokens": "choice",
    "One, and one for all": "shared",
}  # fmt: skip


class Turn(Knobs):
    route: param.Selector = param.Selector(
        default="top1", objects=dict(ROUTES), label="Who is called", doc="How tokens and experts find each other."
    )
    balance = param.Number(0.01, bounds=(0.0, 0.1), step=0.01, label="Balance loss", doc="Its weight, where it is on.")
    steps = param.Integer(140, bounds=(20, 240), step=20, label="Training steps", doc="Of both models, on this page.")
    capacity: param.Selector = param.Selector(
        default=1.25, objects={"No limit": 0.0, "1.25 of an even share": 1.25, "an even share": 1.0},
        label="Places an expert has", doc="Tokens of a text that find no place are dropped.",
    )  # fmt: skip
    text: param.Selector = param.Selector(default="story", objects=dict(TOPICS), label="Text", doc="Whom it calls.")
    own = param.String("anna takes the key . where is the key ?", label="Your own text", doc="In Toyland’s words.")
    design: param.Selector = param.Selector(
        default="fair", objects={"balanced": "fair", "no balance loss": "free"}, label="Look at", doc="Which router."
    )
    layer = param.Integer(0, bounds=(0, 1), label="Layer", doc="Which of the two layers.")
    expert = param.Integer(0, bounds=(0, COUNT - 1), label="Expert", doc="Whose favourite words you read.")


def route(knobs: Turn, *, reading: bool = False) -> Router:
    """The router that was chosen; in `reading` with the places that an expert has."""
    if knobs.route == "choice":
        return ExpertChoice(1.0)
    limit = (knobs.capacity or None) if reading else None
    return TopK(2, capacity=limit) if knobs.route == "top2" else TopK(1, renormalise=False, capacity=limit)


def run(knobs: Turn) -> None:
    tokenizer = Tokenizer()
    ids = _text(knobs, tokenizer)
    note(model={"name": "Toyland", "kind": "toy", "layers": SHAPE.layers, "heads": SHAPE.heads})
    note(total_steps=2 * knobs.steps + len(ids), training=knobs.steps, tokens=len(ids), route=knobs.route,
         used=route(knobs).per_token, shared=int(knobs.route == "shared"))  # fmt: skip
    shared = int(knobs.route == "shared")
    models = {
        design: grown(design, route(knobs), balance=balance, steps=knobs.steps, shared=shared)
        for design, balance in (("free", 0.0), ("fair", knobs.balance))
    }
    for design, model in models.items():
        favourite_words(design, model)
    topics = {i: told_by(table) for i, table in by_topic(models["fair"], tokens=192).items()}
    note(topics=max(topics.values()))
    read_aloud(tokenizer.pieces(ids))
    name_ids(tokenizer, np.array(ids))
    seen = {design: routed(model, ids, route(knobs, reading=True)) for design, model in models.items()}
    for t in range(len(ids)):
        for design, layers in seen.items():
            for layer, found in layers.items():
                where: dict[str, Any] = {"design": design, "layer": layer}
                tap(SENT, found["gate"][t : t + 1], "token expert", **where)
                tap(ODDS, found["odds"][t : t + 1], "token expert", **where)
                dropped = found["dropped"][: t + 1].any(-1)
                tap(LOST, np.asarray(1 + dropped, np.uint8), "slot", **where)
                tap(DROPS, int(dropped.sum()), "", **where)
                tap(CALLED, found["chosen"][: t + 1].mean(0).astype(np.float32), "expert", **where)
        step()


def _text(knobs: Turn, tokenizer: Tokenizer) -> list[int]:
    if knobs.text == "own":
        return list(tokenizer.prompt(knobs.own))[:64]
    if knobs.text == "story":
        return list(tokenizer.prompt(story(seed=4, tokens=48)))[:48]
    return list(topic_text(knobs.text, tokens=48)[0].tolist())


MIXTRAL = PUBLISHED["mixtral-8x7b"]


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    fair, free = (np.array(meta[f"{name}_0_load"]) for name in ("fair", "free"))
    parts = _parts(meta)
    last = meta["tokens"] - 1
    return {
        "experts": COUNT,
        "even": 100 / COUNT,
        "busiest_free": 100 * free.max(),
        "busiest_fair": 100 * fair.max(),
        "idle_free": int((free < 0.01).sum()),
        "told": 100 * meta["fair"][0]["told"],
        "topics": 100 * meta["topics"],
        "drops": float(recording.track(DROPS, design="fair", layer=0).latest()),
        "drops_free": float(recording.track(DROPS, design="free", layer=0).latest()),
        "tokens": meta["tokens"],
        "share": 100 * parts["active"] / parts["all"],
        "parameters": parts["all"],
        "active": parts["active"],
        "mixtral": MIXTRAL.parameters() / 1e9,
        "mixtral_active": MIXTRAL.parameters(active=True) / 1e9,
        "trained": meta["training"] - 1,
        "balanced": 2 * meta["training"] - 1,
        "reading": 2 * meta["training"],
        "half": recording.steps - 1 - last // 2,
        "last": recording.steps - 1,
    }


def _parts(meta: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of the feed-forward part: all, and those that meet a token."""
    mixture = cost.Mixture(COUNT, max(1, round(meta["used"])), shared=meta["shared"])
    every, some = (cost.moe_parameters(SHAPE, mixture, active=active) for active in (False, True))
    return {"all": every["ffn"], "active": some["ffn"]}


def marks(recording: Recording) -> list[Mark]:
    count = recording.meta["training"]
    return [Mark(0, "without balance"), Mark(count, "with balance"), Mark(2 * count, "a text is read")]


def _quarter(recording: Recording) -> Finding:
    shape, mixture = MIXTRAL.shape, cost.Mixture(4, 1)
    every, some = (cost.moe_parameters(shape, mixture, active=a)["ffn"] for a in (False, True))
    parts = _parts(recording.meta)
    filled = f"{some / 1e9:.2f} of {every / 1e9:.2f} billion; here {parts['active']:,} of {parts['all']:,}"
    return Finding(f"{some / every:.0%}", "agrees" if some * 4 == every else "differs", "", filled)


def _mixtral(recording: Recording) -> Finding:
    every, some = MIXTRAL.parameters() / 1e9, MIXTRAL.parameters(active=True) / 1e9
    agrees = round(every) == 47 and round(some) == 13
    filled = f"8 and 2 of 8 networks of 3·4096·14,336 in 32 layers, and the rest: {every:.1f} and {some:.1f} billion"
    return Finding(f"{every:.1f} / {some:.1f} billion", "agrees" if agrees else "differs",
                   "Not 8 × 7: the experts share all else.", filled)  # fmt: skip


def _fewer(recording: Recording) -> Finding:
    found = {}
    for used in (2, 1):
        mixture = cost.Mixture(8, used)
        dense = cost.moe_token_flops(MIXTRAL.shape, mixture, dense=True)
        found[used] = dense / cost.moe_token_flops(MIXTRAL.shape, mixture)
    agrees = 5 <= found[2] <= 10
    why = "It hangs on how many of the experts are called." + (
        f" One of Mixtral’s eight would save {found[1]:.1f}×." if not agrees else ""
    )
    return Finding(f"{found[2]:.1f}×", "agrees" if agrees else "differs", why,
                   f"Mixtral’s shape, all 8 against 2 of 8: {found[2]:.2f}; 1 of 8: {found[1]:.2f}")  # fmt: skip


def _balance(recording: Recording) -> Finding:
    fair, free = ([layer["even"] for layer in recording.meta[name]] for name in ("fair", "free"))
    f = facts(recording)
    agrees = min(fair) > max(free)
    filled = f"evenness {', '.join(f'{e:.2f}' for e in free)} without, {', '.join(f'{e:.2f}' for e in fair)} with"
    why = "" if agrees else "In this run the free router stayed about as even: give it more steps, or less balance."
    return Finding(f"busiest {f['busiest_free']:.0f}% vs {f['busiest_fair']:.0f}%",
                   "agrees" if agrees else "differs", why, filled)  # fmt: skip


def compute(typed: Mapping[str, float]) -> Arithmetic:
    """What a mixture of experts holds, and what a token of it costs."""
    n = {name: int(value) for name, value in typed.items()}
    if n["used"] > n["experts"]:
        raise ValueError(f"Called must be at most the {n['experts']} experts, and {n['used']} is more.")
    shape = replace(MIXTRAL.shape, width=n["width"], layers=n["layers"], ffn_width=n["ffn"])
    mixture = cost.Mixture(n["experts"], n["used"], shared=n["shared"])
    every, some = (cost.moe_parameters(shape, mixture, active=active) for active in (False, True))
    whole, few = (cost.moe_token_flops(shape, mixture, dense=dense) for dense in (True, False))
    alike = cost.expected_experts(mixture, tokens=16)
    lines = (
        ("All parameters", f"{sum(every.values()) / 1e9:,.2f} billion"),
        ("Those that a token meets", f"{sum(some.values()) / 1e9:,.2f} billion"),
        ("Of the experts’ parameters", f"{some['ffn'] / every['ffn']:.1%}"),
        ("In memory, at 16 bits", size(2.0 * sum(every.values()))),
        ("FLOPs a token", f"{few / 1e9:,.1f} billion"),
        ("Were all experts called", f"{whole / 1e9:,.1f} billion, {whole / few:.1f}×"),
        ("Experts that 16 tokens call", f"{alike:.1f} of {n['experts']}"),
    )
    return Arithmetic("", lines, note="Attention as in Mixtral: 32 query heads and 8 key heads of 128.",
                      values={"all": sum(every.values()), "active": sum(some.values())})  # fmt: skip


def sent_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """How a token's gate came about."""
    where = {"design": knobs.design, "layer": knobs.layer}
    token = at["token"]
    odds = recording.stack(ODDS, **where)[token].astype(float)
    gate = recording.stack(SENT, **where)[token].astype(float)
    order = [int(e) for e in np.argsort(-odds)]
    expert = at.get("expert", order[0])  # a word alone asks for the one that it likes best
    asked = order[: max(1, round(recording.meta["used"]))]
    return Arithmetic(
        title=f"token {token}, expert {expert}",
        lines=(
            ("p, the softmax of the router", f"{odds[expert]:.3f}"),
            ("its place among the eight", f"{order.index(expert) + 1}."),
            ("likeliest", ", ".join(f"{e}: {odds[e]:.2f}" for e in asked)),
            ("g, its weight in the answer", f"{gate[expert]:.3f}"),
        ),
        note="A likeliest expert with weight 0 was full." if gate.sum() == 0 else "",
        vectors=(("p of each expert", tuple(odds.tolist())),),
        values={"gate": float(gate[expert])},
    )


def _preset(experts: int, used: int) -> dict[str, float]:
    s = MIXTRAL.shape
    return {"experts": experts, "used": used, "shared": 0, "layers": s.layers, "width": s.width, "ffn": s.ffn_width}


# fmt: off
CLAIMS = (
    Claim("4 experts, one used: 25% of the feed-forward parameters", "lecture", "used / all", "25%", _quarter),
    Claim("Mixtral: 47 billion in all, about 13 active", "architectures; Jiang 2024, 2401.04088",
          "counted from its shape", "47 / 13 billion", _mixtral),
    Claim("5 to 10 times fewer FLOPs than a dense model of equal capacity", "primer", "all experts / those called",
          "5–10×", _fewer),
    Claim("Routers must be balanced, or they collapse", "primer; Fedus 2021, 2101.03961",
          "evenness of calls, without and with", "collapse", _balance),
)

BEATS = (
    Beat(
        "Eight small networks, the [[expert]]s, stand in each layer, and a [[router]] sends every token to one. It "
        "starts by chance. ==Each row|free== is a training step, each column an expert: the stronger, the more "
        "tokens call it.", scene="train", step=0, focus="free",
    ),
    Beat(
        "Whoever is called learns, whoever learns is called: the rich get richer. Even would be {even:.1f}% each.",
        scene="train", step="trained", play=True, focus="free",
        predict=Predict("What share does the busiest expert end with?", (12, 25, 50, 100), "busiest_free", format=".0f",
                        unit="%"),
    ),
    Beat(
        "{busiest_free:.0f}%, and {idle_free} idle: ==strong stripes and empty ones|free==. So a [[balance loss]] is "
        "added, small but stubborn. ==The same training|fair== with it: the busiest gets {busiest_fair:.0f}%.",
        scene="train", step="balanced", play=True, focus="fair",
    ),
    Beat(
        "Now both read. ==Each word|routes== goes to the expert that its router likes; thicker lines weigh more. Click "
        "a line’s end for the arithmetic.", scene="read", step="half", play=True, focus="routes",
        do=Do("Open a word’s arithmetic", cell="odds"),
    ),
    Beat(
        "An expert has only so many ==places|lost==. A word that finds it full is **dropped**: no expert works on it. "
        "With balance {drops:.0f} of {tokens} words are, without it {drops_free:.0f}.", scene="read", step="last",
        play=True, focus="lost",
    ),
    Beat(
        "Do experts know subjects? Read ==one expert’s words|likes==: they are of a kind, names or marks or doings. "
        "The word alone tells {told:.0f}% of the choice; the topic of a text {topics:.0f}%.", scene="words",
        step="last", focus="likes", do=Do("Read another expert", knob="expert"),
    ),
    Beat(
        "What is it good for? A token meets {share:.0f}% of the experts’ parameters. ==Mixtral|calculator== holds "
        "{mixtral:.1f} billion numbers and uses {mixtral_active:.1f} for a token: large in memory, cheap in work.",
        scene="words", focus="calculator",
    ),
    Beat(
        "Break it: turn the **balance loss** to 0, or far up to 0.1. Let **experts choose** their tokens: always "
        "even, but a word’s fate then hangs on words that come after it, which no writer can know.", scene="train",
        step="balanced",
        focus="fair",
    ),
)
GLOSSARY = {
    "expert": "One of several feed-forward networks in a layer, of which a token meets only a few.",
    "router": "A small matrix that scores the experts for each token; the best are called.",
    "balance loss": "E Σ f·P: what a router pays for sending many where it likes to send; 1 when even, "
    "but k in libraries that count each of k calls.",
}


LAYER = knob("layer")
WHERE = {"design": knob("design"), "layer": LAYER}


def _river(design: str, title: str) -> Heatmaps:
    return Heatmaps(
        name=design, title=title, note="stronger: more tokens", span=4, origin="toy", rows="when", columns="expert",
        tensor=of(RIVER, design=design, layer=LAYER), colours="heavy", power=0.6,
    )


SCENES = (
    Scene(
        "train",
        (
            _river("free", "Without balance loss"),
            _river("fair", "With balance loss"),
            Curves(
                name="even", title="How even the calls are", span=4, origin="toy", low=0.0, high=1.0, format=".2f",
                lines=(
                    Line("without", of(EVEN, design="free", layer=LAYER), colour="alarm", x=of(AT, design="free")),
                    Line("with", of(EVEN, design="fair", layer=LAYER), colour="recent", x=of(AT, design="fair")),
                ),
                x_label="training step", y_label="evenness", height=270,
            ),
            Curves(
                name="loss", title="Both learn", note="nats", span=12, origin="toy", format=".2f", height=170,
                lines=(
                    Line("without", of("train.loss", design="free"), colour="alarm", x=of(AT, design="free")),
                    Line("with", of("train.loss", design="fair"), colour="recent", x=of(AT, design="fair")),
                ),
                x_label="training step", y_label="loss",
            ),
        ),
    ),
    Scene(
        "read",
        (
            Routes(
                name="routes", title="Words go to experts", note="the newest sixteen", span=7, tensor=of(SENT, **WHERE),
                left="word", right="expert", left_labels="tokens", right_colour="heavy", loads=of(CALLED, **WHERE),
                loads_label="of the words so far", cell=sent_cell,
            ),
            Heatmaps(
                name="odds", title="What the router thinks", span=5, tensor=of(ODDS, **WHERE), rows="token",
                columns="expert", row_labels="tokens", colours="heavy", cell=sent_cell,
            ),
            Tokens(
                name="lost", title="Who found a place", note="struck out: dropped", span=9, codes=of(LOST, **WHERE),
                states=("empty", "kept", "evicted"), fold=False,
            ),
            Numbers(
                name="figures", title="So far", span=3,
                numbers=(Number("Words dropped", of(DROPS, **WHERE), colour="alarm"),),
            ),
        ),
    ),
    Scene(
        "words",
        (
            Bars(
                name="likes", title="Words that call one expert", note="of all calls of the word", span=5,
                values=of(LIKES, expert=knob("expert"), **WHERE), labels=of(LIKED, expert=knob("expert"), **WHERE),
                colour="heavy",
            ),
            Calculator(
                name="calculator", title="Work it out for any mixture", span=7,
                fields=(
                    Field("experts", "Experts", 8, 1, 512), Field("used", "Called", 2, 1, 512),
                    Field("shared", "Shared", 0, 0, 16), Field("layers", "Layers", 32, 1, 200),
                    Field("width", "Width", 4096, 8, 32768), Field("ffn", "Width of an expert", 14336, 8, 131072),
                ),
                presets=(
                    ("Mixtral 8x7B", _preset(8, 2)), ("The same, one called", _preset(8, 1)),
                    ("The lecture’s four, one called", _preset(4, 1)), ("Mistral 7B, dense", _preset(1, 1)),
                ),
                compute=compute,
            ),
        ),
    ),
)


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"experts.*": {}, "train.loss": {}, "moe.load": {}}


LESSON = Lesson(
    slug="experts", title="Calling only two of eight", question="How can a model be large and cheap at once?",
    part="Fewer weights at work", order=23,
    sources=("lecture", "architectures", "primer", "Fedus 2021, arXiv:2101.03961", "Jiang 2024, arXiv:2401.04088"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.moe.router:TopK", "engine.moe.router:balance_loss", "engine.moe.experts:Experts",
          "engine.moe.router:ExpertChoice"),
    looks=frozenset({"design", "layer", "expert"}), facts=facts, marks=marks, glossary=GLOSSARY, step_word="step",
    seconds=600, trains=True,
    footnote="Reported: Mixtral 8x7B and large models. Measured: two small decoders, trained here.",
)
# fmt: on
