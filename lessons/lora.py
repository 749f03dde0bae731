"""A small key for a big lock: how little of a model must be trained to teach it a new habit."""

from __future__ import annotations

from typing import Any

import numpy as np
import param

from engine import peft
from engine.peft import lora
from engine.peft.tune import METHODS, NEW, RATES, REAL_RATES, make, tune
from engine.recording import Recording, event, note, step, tap
from engine.toyland.habits import STYLES
from lessons import teaching, trainable
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, load, name_ids
from lessons.teaching import FACTS, FORGOT, PARTS, RIGHT, SAID, SHARE, TRAINED, WHERE, WITHIN, Watch
from lessons.views import (
    Curves,
    Heatmaps,
    Line,
    Number,
    Numbers,
    Plane,
    Points,
    Saying,
    Sayings,
    Sheet,
    Tower,
    Towers,
    knob,
    of,
)

TARGETS = {
    "qv": ("q", "v"), "attention": ("q", "k", "v", "out"), "ffn": ("gate", "up", "down"),
    "all": ("q", "k", "v", "out", "gate", "up", "down"),
}  # fmt: skip
REAL = tuple(name for name in METHODS if name != "full")
BATCH = {"toy": {"rows": 8, "length": 40, "unseen_rows": 16}, "real": {"rows": 2, "length": 40, "unseen_rows": 3}}
NAMES = {
    "full": "All weights", "bitfit": "BitFit", "adapter": "Adapters", "prompt": "Prompt tuning", "lora": "LoRA",
    "qlora": "LoRA on 4 bits",
}  # fmt: skip
COLOURS = {"full": "ink", "bitfit": "heavy", "adapter": "key", "prompt": "alarm", "lora": "query", "qlora": "recent"}
DETAILS = {
    "full": "full fine-tuning", "bitfit": "biases, given as zeros", "adapter": "a detour after each part",
    "prompt": "words nobody wrote", "lora": "B·A beside a weight", "qlora": "the weights beside it rounded",
}  # fmt: skip


class Turn(Knobs):
    model = choice(default=TOY)
    habit: param.Selector = param.Selector(
        default="pirate",
        objects={"Talk like a pirate": "pirate", "Be polite": "polite", "Be a bard": "bard", "Who likes what": FACTS},
        label="New habit", doc="A refrain after each full stop, or facts: who likes which colour.",
    )  # fmt: skip
    targets: param.Selector = param.Selector(
        default="all",
        objects={"All matrices": "all", "Attention": "attention", "Feed-forward": "ffn", "Only q and v": "qv"},
        label="LoRA beside", doc="Which matrices get a product B·A beside them.",
    )  # fmt: skip
    rank = param.Integer(4, bounds=(1, 16), label="Rank r", doc="How many columns B has, and rows A.")
    alpha = param.Integer(4, bounds=(1, 32), label="α", doc="The product is scaled by α/r.")
    rate = param.Number(1.0, bounds=(0.1, 4.0), step=0.1, label="Learning rate ×", doc="Times each method’s own rate.")
    steps = param.Integer(60, bounds=(10, 100), step=10, label="Steps", doc="Of training; SmolLM2 takes a quarter.")
    own = param.String("the sailor steers the boat.", label="Your own prompt", doc="Another one trains them again.")
    prompt: param.Selector = param.Selector(
        default=0, objects={"The first": 0, "The second": 1, "Your own": 2}, label="Prompt", doc="What they go on from."
    )
    layer = param.Integer(2, bounds=(0, 29), label="Layer", doc="Whose matrix you look at.")
    merged = param.Boolean(False, label="Merge", doc="On: LoRA’s product is added into the weights.")


def run(knobs: Turn) -> None:
    base, tokenizer = load(knobs.model, dtype="float32")
    toy = knobs.model == TOY
    names, kind = (METHODS, "toy") if toy else (REAL, "real")
    steps = knobs.steps if toy else max(2, knobs.steps // 4)
    prompts = (*teaching.ASKED[kind, FACTS if knobs.habit == FACTS else "style"], knobs.own)
    asked = [np.array(tokenizer.encode(text)) for text in prompts]  # says at once which word is not known
    note(
        total_steps=len(names) + steps + 1, training=steps, rank=knobs.rank, alpha=knobs.alpha, methods=list(names),
        scale=knobs.alpha / knobs.rank, total=sum(p.numel() for p in base.parameters()),
        **_told(knobs.habit, toy=toy),
    )  # fmt: skip
    models = {}
    for name in names:  # one tower after the other
        models[name] = make(
            name, base, rank=knobs.rank, alpha=knobs.alpha, targets=TARGETS[knobs.targets],
            store="nf4" if toy else "affine", n=8 if toy else 4,
        )  # fmt: skip
        teaching.show_parts(name, models[name], base)
        if name != names[-1]:
            step(label=NAMES[name])
    _train(knobs, base, models, tokenizer, asked, prompts, steps)


def _told(habit: str, *, toy: bool) -> dict[str, str]:
    """The task in words."""
    if habit == FACTS:
        return {"goal": "who likes which colour", "texts": "sentences on who likes what"}
    texts = "stories" if toy else f"{len(teaching.SENTENCES) * 2 // 3} plain sentences"
    goal = f"to say “{STYLES[habit].replace(' !', '!')}” after each sentence"
    return {"goal": goal, "texts": f"{texts} with that in them"}


def _train(knobs: Turn, base: Any, models: Any, tokenizer: Any, asked: Any, prompts: Any, steps: int) -> None:
    toy = knobs.model == TOY
    size = BATCH["toy" if toy else "real"]
    habit = teaching.habit_of(knobs.habit, toy=toy)
    old = teaching.old_task(tokenizer, toy=toy, length=size["length"])
    depth = len(base.blocks)
    layers = range(depth) if toy else (0, depth // 2, depth - 1)
    watch = Watch(models, base, matrix=knobs.targets, layers=layers, rank=knobs.rank)
    words = teaching.sought(tokenizer, knobs.habit, habit)
    name_ids(tokenizer, words)
    tap(teaching.SOUGHT, words, "word")
    for i, ids in enumerate(asked):
        name_ids(tokenizer, ids)
        tap(teaching.PROMPT, ids, "token", prompt=i)
    teaching.say_all({"before": base}, tokenizer, prompts)
    watch.added()
    step(label="before")
    event("lora.trains")
    every = -(-steps // (4 if toy else 2))  # steps between two hearings

    def after(at: int) -> None:
        watch.moved()
        if toy or at % 4 == 0 or at + 1 == steps:
            watch.added()
        watch.measured()
        if at + 1 == steps or (at + 1) % every == 0:
            teaching.say_all(models, tokenizer, prompts)

    rates = {name: rate * knobs.rate for name, rate in (RATES if toy else REAL_RATES).items()}
    look = max(1, steps // (8 if toy else 3))
    found = tune(models, habit, tokenizer, old=old, steps=steps, rates=rates, look=look, after=after, **size)  # type: ignore[arg-type]
    note(seconds={name: round(outcome.seconds, 2) for name, outcome in found.items()})
    event("lora.merges")
    unseen = habit.batch(tokenizer, rows=4, length=size["length"], seed=0, step=0, stream="unseen")
    after_merging = teaching.merge(models["lora"], watch, unseen)
    told = teaching.say_all({"merged": after_merging.pop("model")}, tokenizer, prompts)
    note(merge=after_merging, told=told["merged"], bits=teaching.bits_of(models["qlora"]))
    step(label="merged")


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    first, last = len(meta["methods"]), recording.steps - 1
    # fmt: off
    found: dict[str, Any] = {
        **{key: meta[key] for key in ("total", "rank", "alpha", "training", "goal", "texts")},
        "name": meta["model"]["name"], "copies": first, "begin": min(first - 1, last), "last": last,
        "trained": min(first + meta["training"] - 1, last), "full": teaching.whole(recording),
    }
    # fmt: on
    for method in meta["methods"]:
        for key, where in (("count", TRAINED), ("share", SHARE), ("right", RIGHT), ("forgot", FORGOT), ("loss", NEW)):
            if recording.has(where, method=method):
                found[f"{key}_{method}"] = float(recording.track(where, method=method).latest())
    if "right_lora" in found:
        reached = {m: found[f"right_{m}"] for m in meta["methods"]}
        enough = [m for m in reached if reached[m] >= 0.9 * max(reached.values())]
        best = min(enough, key=lambda m: found[f"share_{m}"])
        found |= {"enough": found[f"share_{best}"], "enough_name": NAMES[best]}
    if recording.has(peft.SINGULAR, method="lora", layer=0):
        values = np.array([t.latest() for t in teaching.tracks(recording, peft.SINGULAR, "lora")])
        found["lora_rank"] = int((values > 0).sum(1).max())
        found |= {"side": values.shape[1], "spectrum": teaching.spectrum(recording)}
    if "merge" in meta:
        found |= meta["merge"] | {"bits": meta["bits"]}
    return found


def marks(recording: Recording) -> list[Mark]:
    said = {"lora.trains": "training", "lora.merges": "merged"}
    return [Mark(e.step, said[e.name]) for e in recording.events if e.name in said and e.step < recording.steps]


def _low_rank(recording: Recording) -> Finding:
    if "full" not in recording.meta["methods"]:
        return Finding("–", "untestable", "Full fine-tuning of this model was left out; the toy shows it.")
    within, chance = teaching.within(recording, "full"), float(recording.track(teaching.CHANCE).latest())
    rank = recording.meta["rank"]
    filled = f"‖best rank {rank}‖² / ‖ΔW‖² of full fine-tuning: {within:.0%}; of random numbers {chance:.0%}"
    low = within > max(0.5, 2 * chance)
    why = "Low, but not exactly: the rest is spread thinly over all other directions."
    if not low:
        why = f"Most of ΔW lies outside its {rank} largest directions: AdamW moves every number about equally far."
    return Finding(f"{within:.0%}", "agrees" if low else "differs", why, filled)


def _as_good(recording: Recording) -> Finding:
    f = facts(recording)
    if "right_full" not in f:
        return Finding(f"{f['right_lora']:.0%}", "untestable", "Full fine-tuning of this model was left out.")
    filled = f"taught words right: LoRA {f['right_lora']:.0%}, all weights {f['right_full']:.0%}"
    good = f["right_lora"] >= f["right_full"] - 0.02
    why = f"No GLUE here: one habit, {f['training']} steps, a model of {f['total']:,} weights."
    return Finding(f"{f['right_lora']:.0%} vs {f['right_full']:.0%}", "agrees" if good else "differs", why, filled)


def _biases(recording: Recording) -> Finding:
    f = facts(recording)
    best = max(f[f"right_{m}"] for m in recording.meta["methods"])
    good = f["right_bitfit"] >= 0.95 * best
    why = "" if good else "Biases bend what a model has; words that it never said are little helped. And it is small."
    filled = f"taught words right: BitFit {f['right_bitfit']:.0%}, the best {best:.0%}"
    return Finding(f"{f['right_bitfit']:.0%}", "agrees" if good else "differs", why, filled)


def _weak_prompt(recording: Recording) -> Finding:
    f = facts(recording)
    least = min(f[f"right_{m}"] for m in recording.meta["methods"])
    weak = f["right_prompt"] <= least
    filled = f"{f['count_prompt']:,.0f} numbers: {f['right_prompt']:.0%} of the taught words right"
    why = "That it closes the gap in models of billions cannot be tried here." if weak else "It is not the weakest."
    return Finding(f"{f['right_prompt']:.0%}", "agrees" if weak else "differs", why, filled)


def _merges(recording: Recording) -> Finding:
    f = facts(recording)
    good = f["off"] <= 1e-4 * f["size"]
    filled = f"largest difference of an output {f['off']:.1e}, of outputs up to {f['size']:.0f}; "
    filled += f"{f['whole'] + f['beside']:,} → {f['whole']:,} multiplications a token"
    why = "" if good else "More than rounding explains."
    return Finding(f"{f['off']:.1e}", "agrees" if good else "differs", why, filled)


HU, ZAKEN = "lecture; Hu 2021, 2106.09685", "lecture; Ben Zaken 2021, 2106.10199"
HOULSBY, LESTER = "lecture; Houlsby 2019, 1902.00751", "Lester 2021, 2104.08691"
# fmt: off
CLAIMS = (
    Claim("BitFit trains 0.08% of BERT-large", ZAKEN, "biases / parameters", "0.08%", trainable.bitfit_share),
    Claim("Adapters add 2.1 to 3.6% to BERT-large", HOULSBY, "layers · 2 · (2mW + m + W) + norms", "2.1 to 3.6%",
          trainable.adapter_share),
    Claim("LoRA trains 0.3M of RoBERTa-base, 0.8M of RoBERTa-large", HU, "matrices · r · (out + in)", "0.3M and 0.8M",
          trainable.lora_count),
    Claim("Updates are of low rank", HU, "‖best rank r of ΔW‖² / ‖ΔW‖²", "low “intrinsic rank”", _low_rank),
    Claim("LoRA is as good as full fine-tuning", HU, "GLUE, mean", "87.2 vs 86.4 *", _as_good),
    Claim("Training biases alone comes close", ZAKEN, "taught words right", "competitive", _biases),
    Claim("Prompt tuning is weak in small models", LESTER, "taught words right", "closes the gap at billions",
          _weak_prompt),
    Claim("Merged, LoRA adds no work", HU, "largest |merged − unmerged|", "no added latency", _merges),
)

BEATS = (
    Beat(
        "{copies} copies of {name} are to learn {goal}, each by a method of its own. ==Grey is frozen, colour is "
        "trained|towers==. {full} [[LoRA]] adds {count_lora:,.0f} numbers beside them, [[adapters]] a detour, "
        "[[BitFit]] biases, [[prompt tuning]] a few words that nobody wrote.",
        scene="teach", step="begin", play=True, focus="towers",
    ),
    Beat(
        "All of them read the same {texts}, {training} steps, side by side. ==Loss|loss== is how much each is "
        "surprised. What counts in the end: of the taught words, in texts never seen, how many does it expect?",
        scene="teach", step="begin", focus="loss",
        predict=Predict("How small a trained share is enough to do nine tenths as well as the best?",
                        (0.001, 0.03, 0.2, 1.0), "enough", format=".1%"),
    ),
    Beat(
        "Off they go, ==all at once|loss==. With {share_lora:.1%} of the weights LoRA gets {right_lora:.0%} of the "
        "taught words right; adapters with {share_adapter:.1%} get {right_adapter:.0%}. ==Further up and "
        "left|enough== is better. The smallest that is enough: {enough_name}, {enough:.2%}.",
        scene="teach", step="trained", play=True, focus="loss",
    ),
    Beat(
        "Two things to know. ==Prompt tuning|enough== moves {count_prompt:,.0f} numbers and gets {right_prompt:.0%}: "
        "in small models it is known to be weak. And BitFit had *nothing* to train: models of this family have no "
        "biases. We gave it zeros everywhere, which changed no word, and it got to {right_bitfit:.0%}.",
        scene="teach", step="trained", focus="enough",
    ),
    Beat(
        "Why is so little enough? Here is one matrix, ==W|weight==, and ==what training all weights added|moved==: "
        "every number moved. But look at its [[singular values]], ==the black curve|spectrum==. {spectrum} A few "
        "directions carry far more than their share.",
        scene="delta", step="trained", play=True, focus="moved",
    ),
    Beat(
        "LoRA builds that in. Its change is ==a product|product==: α/r times B, with {rank} columns, times A, with "
        "{rank} rows. So at most {rank} singular values are above zero; counted: {lora_rank}. ==B|b== starts at zero: "
        "before step one the copy *is* the base model.",
        scene="delta", step="trained", focus="product", do=Do("Open a cell of the product", cell="product"),
    ),
    Beat(
        "Let them ==speak|say==. Scrub back, and hear the habit go. It has a price: what they were good at. LoRA now "
        "finds a text of the old kind {forgot_lora:.2f} nats a token harder, prompt tuning {forgot_prompt:.2f}. On "
        "==4-bit weights|say==, {bits:.1f} bits each, LoRA still learns: {right_qlora:.0%}.",
        scene="say", step="trained", play=True, focus="say",
    ),
    Beat(
        "A product beside each weight costs {beside:,} multiplications a token on top of {whole:,}. So add it in: "
        "flip **Merge**. ==W|computes== becomes W + ΔW, nothing stands ==beside|beside== it any more, and no output "
        "moves by more than {off:.0e}: rounding.",
        scene="say", step="last", play=True, focus="computes", do=Do("Merge", knob="merged"),
    ),
    Beat(
        "The lecture’s ==shares|shares== follow from published shapes; its ==scores|glue== are quoted, beside "
        "==ours|ours==. Break it: rank 1. LoRA at q and v alone. α 32, or every rate × 4. Then teach facts: a refrain "
        "is one sentence, who likes what is twenty-four.",
        scene="tables", step="last", focus="glue", do=Do("Set the rank to 1", knob="rank"),
    ),
)
GLOSSARY = {
    "LoRA": "Low-rank adaptation: W stays, a product of two thin matrices is learnt beside it (arXiv:2106.09685).",
    "adapters": "Narrow layers after each sublayer: down to a few numbers, up again, added (arXiv:1902.00751).",
    "BitFit": "Only the biases are trained, the numbers that are added after a product (arXiv:2106.10199).",
    "prompt tuning": "Embeddings of words that do not exist are learnt and read before the text (arXiv:2104.08691).",
    "singular values": "How strongly a matrix stretches along each of its directions, largest first. Its rank is how "
    "many are above zero.",
}

LAYER: dict[str, Any] = {"layer": knob("layer")}
MERGED: dict[str, Any] = {"merged": knob("merged"), **LAYER}


def _tower(name: str) -> Tower:
    where = {"method": name}
    return Tower(
        NAMES[name], of(teaching.COUNTS, **where), of(TRAINED, **where), of(SHARE, **where),
        moved=of(teaching.MOVED, **where), colour=COLOURS[name], detail=DETAILS[name],
    )


def _matrix(name: str, title: str, site: str, *, span: int = 4, **more: Any) -> Heatmaps:
    index = {"rows": "output", "columns": "input", "colours": "diverging"} | more
    where = index.pop("where", LAYER)
    return Heatmaps(name=name, title=title, span=span, tensor=of(site, **where), **index)


def _saying(name: str) -> Saying:
    figures = () if name in ("before", "merged") else (Number("right", of(RIGHT, method=name), format=".0%"),)
    label = {"before": "Before", "merged": "LoRA, merged"}.get(name) or NAMES[name]
    colour = "kept" if name == "before" else COLOURS.get(name, "query")
    return Saying(label, of(SAID, method=name, prompt=knob("prompt")), figures=figures, colour=colour)


OURS = tuple(
    (
        NAMES[m], Number("", of(TRAINED, method=m), format=",.0f"), Number("", of(RIGHT, method=m), format=".0%"),
        Number("", of(NEW, method=m), format=".2f"), Number("", of(FORGOT, method=m), format="+.2f"),
    )
    for m in METHODS
)
SPECTRUM = tuple(
    Line(NAMES[m], of(peft.SINGULAR, method=m, **LAYER), colour=COLOURS[m], dashed=m == "qlora")
    for m in ("full", "lora", "qlora")
)
SCENES = (
    Scene(
        "teach",
        (
            Towers(
                name="towers", title="What is trained", towers=tuple(map(_tower, METHODS)), parts=PARTS,
                first_parts=("embedding", "prompt"),
                key="a box is as wide as the root of its parameters; what moved most is brightest",
            ),
            Curves(
                name="loss", title="Learning, all at once", note="on the texts of this step, log", span=7, height=230,
                lines=(*(Line(NAMES[m], of("tune.loss", method=m), colour=COLOURS[m]) for m in METHODS),
                       Line("nobody can be below", of("tune.floor"), colour="kept", dashed=True)),
                log=True, x_label="step", y_label="nats a token", format=".2f",
            ),
            Plane(
                name="enough", title="How little is enough?", span=5, height=230, log_x=True, x_label="numbers trained",
                y_label="taught words right", x_format=",.3s", format=".0%",
                points=tuple(Points(NAMES[m], of(WHERE, method=m), of(RIGHT, method=m), colour=COLOURS[m], trail=False)
                             for m in METHODS),
            ),
        ),
    ),
    Scene(
        "delta",
        (
            _matrix("weight", "W, before", peft.WEIGHT),
            _matrix("moved", "ΔW, all weights trained", peft.DELTA, where={"method": "full", **LAYER},
                    cell=teaching.moved_cell),
            Curves(
                name="spectrum", title="Singular values of ΔW", note="log", span=4, across="order", lines=SPECTRUM,
                log=True, x_label="order", format=".2g", height=250,
            ),
            _matrix("b", "B", lora.B, span=3, columns="rank"),
            _matrix("a", "A", lora.A, span=5, rows="rank"),
            _matrix("product", "ΔW of LoRA: α/r · B·A", peft.DELTA, where={"method": "lora", **LAYER},
                    cell=teaching.product_cell),
            Numbers(
                name="within", title="How much of ΔW fits into LoRA’s rank?",
                numbers=(Number("All weights", of(WITHIN, method="full", **LAYER), format=".0%"),
                         Number("LoRA", of(WITHIN, method="lora", **LAYER), format=".0%", colour="query"),
                         Number("Random numbers", of(teaching.CHANCE), format=".0%", colour="kept")),
            ),
        ),
    ),
    Scene(
        "say",
        (
            Sayings(
                name="say", title="The same prompt, gone on from", prompt=of(teaching.PROMPT, prompt=knob("prompt")),
                sayings=tuple(map(_saying, ("before", *METHODS, "merged"))), marked=of(teaching.SOUGHT),
            ),
            _matrix("computes", "What the layer multiplies with", teaching.COMPUTES, where=MERGED),
            _matrix("beside", "What stands beside it", teaching.BESIDE, where=MERGED),
            Numbers(
                name="work", title="What merging changes", span=4,
                numbers=(Number("Multiplications a token", of(teaching.WORK, merged=knob("merged"))),
                         Number("Largest difference of an output", of(teaching.OFF), format=".1e", colour="query")),
            ),
        ),
    ),
    Scene(
        "tables",
        (
            *trainable.sheets(),
            Sheet(
                name="ours", title="Ours", span=6, rows=OURS,
                columns=("method", "trained", "right", "loss", "old task"),
                source="Words right and loss on texts never seen; by how many nats a token old texts got harder.",
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"tune.*": {}, "teach.*": {}, "peft.*": {}, "lora.*": {}}


# fmt: off
LESSON = Lesson(
    slug="lora", title="A small key for a big lock", question="How little must be trained to teach a new habit?",
    part="Teach it cheaply", order=26,
    sources=("lecture", "Hu 2021, arXiv:2106.09685", "Ben Zaken 2021, arXiv:2106.10199",
             "Houlsby 2019, arXiv:1902.00751", "Lester 2021, arXiv:2104.08691", "Dettmers 2023, arXiv:2305.14314"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.peft.lora:LoRALinear", "engine.peft.lora:merge", "engine.peft.tune:tune"),
    looks=frozenset({"layer", "prompt", "merged"}), bounded_by={"layer": "layers"}, facts=facts, marks=marks,
    glossary=GLOSSARY, seconds=600, trains=True,
    footnote="* RoBERTa-base, mean of eight GLUE tasks, as reported. Measured: this page, one habit, a small model.",
)
# fmt: on
