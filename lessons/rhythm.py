"""Planning and anchoring: how far a token looks back, how much it is looked at later, whether the two go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine.caches.full import Full
from engine.generate import checked_ids, generate
from engine.recording import Recording, note, record, site, step, tap
from engine.rhythm import Rhythm, beat, listen, near_and_far, shuffled
from lessons import views
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene
from lessons.models import TOY, choice, load, read_aloud
from lessons.views import Arithmetic, Line, of

LOOKS = site("rhythm.looks", "how far back each token looks, clipped to the window, mean over the near heads",
             symbol="WAAD", grows="query", unit="tokens")  # fmt: skip
LOOKED = site("rhythm.looked", "share of attention that later tokens pay to it, mean over the far heads", symbol="FAI",
              grows="query", low=0.0)  # fmt: skip
LOOK = site("rhythm.look", "how far back this token looks", symbol="WAAD", low=0.0, unit="tokens")
ANCHOR = site("rhythm.anchor", "share of attention that later tokens pay to this one", symbol="FAI", low=0.0)
PLACE = site("rhythm.place", "which token of the text")
CODES = site(
    "rhythm.codes", "whether a token is a peak of looking back (plan), of being looked at (anchor), or of both"
)
DISTANCES = site("rhythm.distances", "how far back each head looks on average", low=0.0, unit="tokens")
GROUPS = site("rhythm.groups", "1 where a head is among those that look nearest, 2 among those that look farthest")
HISTOGRAM = site("rhythm.histogram", "of the shuffles, how many coupled this often", low=0.0)

KEY = "violet: plans, underlined: anchors"
STATES = ("empty", "plan", "anchor", "both")
BINS = np.linspace(0.0, 1.0, 11)
PROMPT = "To make a good cup of tea, follow these steps. First, fill the kettle with"
TOY_PROMPT = "one day in the kitchen . the orange shell is in the barn ."


class Turn(Knobs):
    model = choice()
    prompt = param.String(PROMPT, label="Prompt", doc="What the model goes on from.")
    tokens = param.Integer(112, bounds=(48, 160), label="New tokens", doc="How many tokens the model writes.")
    temperature = param.Number(0.7, bounds=(0.0, 1.5), step=0.1, label="Temperature", doc="0: the likeliest token.")
    seed = param.Integer(0, bounds=(0, 9), label="Another draw", doc="The same prompt, told another way.")
    window = param.Integer(10, bounds=(4, 40), label="Window", doc="Looking farther back counts as looking this far.")
    sinks = param.Integer(1, bounds=(0, 4), label="First tokens left out", doc="Most heads rest on the first token.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model, fast=True)
    toy = knobs.model == TOY
    text = TOY_PROMPT if toy and knobs.prompt == PROMPT else knobs.prompt
    prompt = tokenizer.prompt(text)[:64]
    pieces = tokenizer.pieces(prompt)
    note(prompt_tokens=len(prompt), total_steps=2 * knobs.tokens + 1, first=pieces[0].strip())
    read_aloud(pieces)
    ids = list(prompt)
    options: dict[str, Any] = {"steps": knobs.tokens, "temperature": knobs.temperature, "seed": knobs.seed}
    for token in generate(model, prompt, cache=Full(), **options):
        tap(CODES, np.zeros(len(ids), np.uint8), "token")
        read_aloud(tokenizer.pieces([token]))
        ids.append(token)
    whole = checked_ids(ids, model.shape.vocab)
    settings = {"window": knobs.window, "sinks": knobs.sinks}
    found, looks, looked, codes, coupling = _measure(model, whole, settings)
    note(written=knobs.tokens, share=coupling.share, p=coupling.p, chance=float(coupling.chance.mean()))
    for t in range(len(prompt), len(ids)):
        first = 0 if t == len(prompt) else t
        tap(LOOKS, looks[first : t + 1], "query")
        tap(LOOKED, looked[first : t + 1], "query")
        tap(LOOK, looks[t], "")
        tap(ANCHOR, looked[t], "")
        tap(PLACE, t, "")
        tap(CODES, np.where(np.arange(len(ids)) <= t, codes, 0).astype(np.uint8), "token")
        step()
    _heads(found)
    other = shuffled(whole, seed=knobs.seed, fixed=1)
    *_, mixed = _measure(model, other, settings)
    note(shuffled_share=mixed.share, shuffled_p=mixed.p, shuffled_chance=float(mixed.chance.mean()))
    tap(HISTOGRAM, np.histogram(coupling.chance.numpy(), BINS)[0] / len(coupling.chance), "bin")
    step()


def _measure(
    model: Any, ids: Any, settings: Mapping[str, int]
) -> tuple[Rhythm, np.ndarray, np.ndarray, np.ndarray, Any]:
    """All measures of a text, which is read once more in one pass: its steps are no steps of the page."""
    with record(keep={"rhythm.peaks": {}}) as inner:
        found = listen(model, ids, **settings)
        waad, fai, coupling = beat(found, skip=max(1, settings["sinks"]))
        step()
    peaks = inner.freeze()
    plan, anchor = (peaks.track("rhythm.peaks", measure=name).latest().astype(int) for name in ("waad", "fai"))
    looked = np.nan_to_num(fai.float().numpy())
    return found, waad.float().numpy(), looked, (plan + 2 * anchor).astype(np.uint8), coupling


def _heads(found: Rhythm) -> None:
    """Which heads look near and which far, and how far."""
    tap(DISTANCES, found.distance.float(), "layer head")
    near, far = near_and_far(found.distance)
    groups = np.zeros(found.distance.shape, np.uint8)
    for code, heads in ((1, near), (2, far)):
        for layer, head in heads:
            groups[layer, head] = code
    tap(GROUPS, groups, "layer head")


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    distance = recording.track(DISTANCES).latest()
    looks, looked = recording.track(LOOK), recording.track(ANCHOR)
    waad = np.array([float(row) for _, row in looks.rows()])
    fai = np.array([float(row) for _, row in looked.rows()])
    codes = recording.track(CODES).latest()
    T = meta["written"]
    # fmt: off
    return {
        "name": meta["model"]["name"], "first": meta["first"], "written": T,
        "near": float(np.quantile(distance, 0.1)), "far": float(np.quantile(distance, 0.9)),
        "low": float(waad.min()), "high": float(waad.max()), "most": float(fai.max()), "usual": float(np.median(fai)),
        "plans": int((codes % 2 == 1).sum()), "anchors": int((codes >= 2).sum()),
        "share": meta["share"], "chance": meta["chance"], "p": meta["p"],
        **{f"shuffled_{name}": meta[f"shuffled_{name}"] for name in ("share", "chance", "p")},
        "wrote": T - 1, "half": T + T // 2, "replayed": 2 * T - 1, "last": recording.steps - 1,
    }
    # fmt: on


def marks(recording: Recording) -> list[Mark]:
    return [Mark(recording.meta["written"], "listened to, token by token")]


def _rhythm(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['share']:.0%} of the peaks, {f['chance']:.0%} by chance, p = {f['p']:.2f}"
    if f["p"] < 0.05:
        return Finding(f"{f['share']:.0%} vs {f['chance']:.0%}", "agrees", "In this one text.", filled)
    why = "In this text peaks meet no oftener than chance lets them. The paper’s models are far larger, and reason."
    return Finding(f"{f['share']:.0%} vs {f['chance']:.0%}", "differs", why, filled)


def _shuffled(recording: Recording) -> Finding:
    f = facts(recording)
    filled = (
        f"shuffled: {f['shuffled_share']:.0%} against {f['shuffled_chance']:.0%} by chance, p = {f['shuffled_p']:.2f}"
    )
    if f["p"] >= 0.05:
        return Finding(
            filled.split(": ")[1], "untestable", "There is no coupling here that shuffling could take away.", filled
        )
    gone = f["shuffled_p"] >= 0.05
    why = "" if gone else "The coupling outlives the order of the words, so it is not about planning."
    return Finding(f"p = {f['shuffled_p']:.2f}", "agrees" if gone else "differs", why, filled)


def _spread(recording: Recording) -> Finding:
    f = facts(recording)
    wide = f["far"] > 3 * f["near"]
    filled = f"one head in ten looks back less than {f['near']:.1f} tokens, one in ten more than {f['far']:.1f}"
    why = "" if wide else "The heads of this model look back about equally far."
    return Finding(f"{f['near']:.1f} to {f['far']:.1f} tokens", "agrees" if wide else "differs", why, filled)


LI = "episodes; Li 2025, 2510.13554"
# fmt: off
CLAIMS = (
    Claim("Some heads look near, others far", LI, "mean distance, 10% and 90% of heads", "local and global", _spread),
    Claim(
        "Attention has a rhythm: a token that looks far back plans, and an anchor follows", LI,
        "share of looking peaks with an anchor within 2 tokens, against chance", "coupled", _rhythm,
    ),
    Claim(
        "It is about the text’s order", "our control", "the same for the same tokens shuffled", "gone", _shuffled,
    ),
)

BEATS = (
    Beat(
        "{name} writes {written} tokens. Every token looks back at those before it, with dozens of heads at once. Some "
        "only ever look next door; others reach to the other end of the text.",
        scene="text", step="wrote", play=True, focus="text",
    ),
    Beat(
        "==Each square|heads== is one head; the darker, the farther back it looks. One in ten stays within {near:.1f} "
        "tokens, one in ten reaches beyond {far:.1f}. We call the nearest third *near heads*, the farthest third *far "
        "heads*: two kinds of reader in one model.",
        scene="heads", step="last", focus="heads",
    ),
    Beat(
        "Now listen to the near heads, token by token. Mostly they look at the word just before. Sometimes they reach "
        "back: ==a peak|looks==, up to {high:.1f} tokens. In the paper, such a token *plans*: it opens a new piece of "
        "thought.",
        scene="text", step="half", play=True, focus="looks",
    ),
    Beat(
        "The far heads tell who is looked at **later**. The usual token gets {usual:.2%} of each later look; ==an "
        "anchor|looked== gets up to {most:.1%}. Do plans and anchors come together? The paper says: an anchor "
        "follows a plan closely.",
        scene="text", step="replayed", play=True, focus="looked",
        predict=Predict(
            "How many of the planning peaks have an anchor within two tokens?", (0.2, 0.4, 0.6, 0.9), "share", ".0%",
        ),
    ),
    Beat(
        "{share:.0%}. But {anchors} anchors among {written} tokens meet many peaks by accident. Turn them round "
        "the text like a ring, a thousand times: ==chance|chance== alone gives {chance:.0%} on average, and does "
        "as well as the text in {p:.0%} of the turns.",
        scene="heads", step="last", focus="chance",
    ),
    Beat(
        "So judge: below 5% we would call it a rhythm. A second control: the same words, shuffled, couple "
        "{shuffled_share:.0%} of the time. {name} is far smaller than the paper’s models, and this text "
        "reasons little. What you see is what is there.",
        scene="heads", step="last", focus="verdict",
    ),
    Beat(
        "Break it: find a prompt with a rhythm. Sums, recipes, lists? Draw another answer. Leave no first token out, "
        "and see how the resting place of most heads fools the measure.",
        scene="text", step="replayed", do=Do("Set **First tokens left out** to 0", knob="sinks"),
    ),
)
# fmt: on

GLOSSARY = {
    "chance": "What happens when nothing is behind it: here, the anchors turned round the text to another place.",
}


def head_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """Where one head stands among all: how far it looks, and which third it is in."""
    layer, head = at["layer"], at["head"]
    distance = recording.track(DISTANCES).latest()
    group = int(recording.track(GROUPS).latest()[layer, head])
    here = float(distance[layer, head])
    return Arithmetic(
        title=f"layer {layer}, head {head}",
        lines=(
            ("Σ_s A[t, s] · (t − s), mean over t", f"{here:.1f} tokens"),
            ("heads that look less far", f"{int((distance < here).sum())} of {distance.size}"),
            ("counted among", ("neither", "the near heads", "the far heads")[group]),
        ),
        note=f"The first {knobs.sinks} tokens are left out, and what is paid to the others is scaled to 1.",
        vectors=((f"the heads of layer {layer}", tuple(distance[layer].tolist())),),
        values={"distance": here},
    )


# fmt: off
SCENES = (
    Scene(
        "text",
        (
            views.Tokens(
                name="text", title="How far each token looks back", value=of(LOOKS), value_label="looks back",
                colours="recomputed", fold=False, span=6,
            ),
            views.Tokens(
                name="peaks", title="Plans and anchors", note=KEY, codes=of(CODES), states=STATES, fold=False, span=6,
            ),
            views.Curves(
                name="looks", title="How far back it looks", note="near heads, WAAD", x_label="token", format=".2f",
                lines=(Line("looking back", of(LOOK), colour="recomputed", x=of(PLACE)),), span=6, y_label="tokens",
            ),
            views.Curves(
                name="looked", title="How much it is looked at later", note="far heads, FAI", x_label="token",
                lines=(Line("looked at", of(ANCHOR), colour="heavy", x=of(PLACE)),), format=".2%", span=6, low=0.0,
            ),
        ),
    ),
    Scene(
        "heads",
        (
            views.Heatmaps(
                name="heads", title="How far back each head looks", tensor=of(DISTANCES), rows="head", columns="layer",
                colours="recomputed", gaps=True, cell=head_cell, span=7,
            ),
            views.Bars(
                name="chance", title="Coupling by chance", note="share of coupled peaks, over a thousand turns",
                values=of(HISTOGRAM), labels=tuple(f"{low:.0%} to {low + 0.1:.0%}" for low in BINS[:-1]),
                colour="kept", span=5, high=None,
            ),
            views.Tokens(
                name="verdict", title="Plans and anchors", note=KEY, codes=of(CODES), states=STATES, fold=False,
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    names = ("looks", "looked", "look", "anchor", "place", "codes", "groups", "histogram", "distances")
    return {f"rhythm.{name}": {} for name in names}


# fmt: off
LESSON = Lesson(
    slug="rhythm", title="Planning and anchoring", question="Does attention have a rhythm?",
    part="Keep the right things", order=16, sources=("episodes", "Li 2025, arXiv:2510.13554"), knobs=Turn, run=run,
    keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.rhythm:measure", "engine.rhythm:listen", "engine.rhythm:coupling"), facts=facts, marks=marks,
    glossary=GLOSSARY, step_word="token", seconds=300,
)
# fmt: on
