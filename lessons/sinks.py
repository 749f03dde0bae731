"""The tokens nobody reads but everybody needs: why a window breaks when the first token leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import param

from engine import cost
from engine.caches.full import Full
from engine.caches.recompute import Recompute
from engine.caches.sinks import Sinks
from engine.caches.window import Window
from engine.evaluate import ask, passkey
from engine.read import Policy, read
from engine.recording import Recording, event, newest, note, site, tap
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene, Verdict
from lessons.models import TOY, choice, load, read_aloud
from lessons.texts import NAMES, text_ids
from lessons.views import Arithmetic, Curves, Heatmaps, Line, Slots, Strip, Tokens, of

STATES = ("empty", "kept", "sink", "recent", "recomputed", "evicted")
EMPTY, KEPT, SINK, RECENT, RECOMPUTED, EVICTED = range(6)
CODES = site("sinks.slots", "what became of each token: kept, sink, recent, recomputed or evicted")
PERPLEXITY = site("sinks.perplexity", "e to the mean surprisal, of the tokens past the window so far")
MEAN_FIRST = site("sinks.first", "mean attention on the oldest token held, over the text so far", low=0.0, high=1.0)
MIN_READ = 4  # tokens past the window before a mean means anything


class Turn(Knobs):
    model = choice()
    window = param.Integer(48, bounds=(16, 128), label="Window", doc="Slots that each bounded cache has.")
    sinks = param.Integer(4, bounds=(0, 8), label="Sinks", doc="First tokens that are never evicted.")
    pinned = param.Boolean(True, label="Sink switch", doc="Off: the last strip forgets its first tokens too.")
    text: param.Selector = param.Selector(
        default="bread", objects=dict(NAMES), label="Text", doc="What the model reads."
    )
    own = param.String("Once upon a time", label="Your own text", doc="Read when Text is “Your own”.")
    tokens = param.Integer(192, bounds=(96, 320), label="Tokens read", doc="How much of the text is read.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(knobs.model, fast=True)
    toy = knobs.model == TOY
    ids = text_ids(tokenizer, knobs.text, knobs.own, toy=toy, tokens=knobs.tokens)
    window, pins = min(knobs.window, len(ids) - 2), knobs.sinks if knobs.pinned else 0
    if len(ids) < 24:
        raise ValueError(f"The text has {len(ids)} tokens; at least 24 are needed to see a window slide.")
    opening = (tokenizer.newline,) * pins if tokenizer.newline is not None else ()
    policies = {
        "dense": Policy(Full()),
        "window": Policy(Window(window)),
        "recompute": Policy(Recompute(window)),
        "sinks": Policy(Sinks(pins, window - pins)),
        "newlines": Policy(Sinks(pins, window - pins), opening=opening),
    }
    shape = model.shape
    note(
        window=window,
        sinks=pins,
        tokens=len(ids),
        total_steps=len(ids),
        first_token=tokenizer.pieces(ids[:1])[0].strip(),
        opening=len(opening),
    )
    pieces = tokenizer.pieces(ids)
    sums = dict.fromkeys(policies, 0.0)
    first = np.zeros((shape.layers, shape.heads))

    def on_token(t: int) -> None:
        nonlocal first
        read_aloud(pieces[t : t + 1])
        first = first + or_zeros(newest("attention.first", strategy="dense"), first)
        tap(MEAN_FIRST, (first / (t + 1)).astype(np.float32), "layer head")
        for name in policies:
            tap(CODES, _codes(name, t, newest("cache.kept", strategy=name), pins), "slot", strategy=name)
            if t >= window:
                sums[name] += float(or_zeros(newest("surprisal", strategy=name), np.zeros(1))[-1])
                if t >= window + MIN_READ:
                    tap(PERPLEXITY, np.exp(sums[name] / (t - window + 1)), "", strategy=name)
        if t == window:
            event("sinks.first_token_leaves", token=pieces[0])

    read(model, ids, policies, on_token=on_token)
    if not toy:
        _ask_back(model, tokenizer, window, pins)


def or_zeros(found: np.ndarray | None, like: np.ndarray) -> np.ndarray:
    """What was recorded; zeros where nobody records."""
    return np.zeros_like(like) if found is None else found


def _codes(name: str, t: int, kept: np.ndarray | None, pins: int) -> np.ndarray:
    """What became of tokens 0 to t under a strategy that holds the positions `kept`."""
    held = {"dense": KEPT, "recompute": RECOMPUTED}.get(name, RECENT)
    codes = np.full(t + 1, EVICTED, np.uint8)
    if kept is not None:
        codes[kept] = held
        if held == RECENT and name != "window":
            codes[: min(pins, t + 1)] = SINK
    return codes


def _ask_back(model: Any, tokenizer: Any, window: int, pins: int) -> None:
    """A number told at the start, then filler until a bounded cache has dropped it, then the question."""
    question = passkey(tokenizer, tokens=max(160, 2 * window), depth=0.0, seed=1)
    for name, cache in (("dense", Full()), ("sinks", Sinks(pins, window - pins))):
        answer = ask(model, tokenizer, question, cache=cache)
        note(**{f"asked_{name}": [question.answer, answer.text.strip(), answer.right]})


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    L, T = meta["window"], meta["tokens"]
    ppl = {name: _perplexity(recording, name) for name in ("dense", "window", "recompute", "sinks", "newlines")}
    mass = recording.track(MEAN_FIRST).latest()
    deep = mass[len(mass) * 2 // 5 :].mean(1)
    heads = recording.track("residual.first", strategy="dense").latest()
    now = np.median(recording.stack("residual.now", strategy="dense"))
    out = {
        "window": L,
        "name": meta["model"]["name"],
        "first_token": meta["first_token"],
        "sinks": meta["sinks"],
        "rest": L - meta["sinks"],
        "tokens": T,
        "leaves": L,
        "before": L - 1,
        "after": min(L + 24, T - 1),
        "last": T - 1,
        **{f"ppl_{name}": value for name, value in ppl.items()},
        "factor": ppl["window"] / ppl["dense"],
        "mass_low": float(deep.min()),
        "mass_high": float(deep.max()),
        "mass_mean": float(mass.mean()),
        "even": float(np.mean(1 / np.arange(1, T + 1))),
        "first_length": float(heads.max()),
        "usual_length": float(now),
        "cost_recompute": int(recording.stack("read.scores", strategy="recompute").sum()),
        "cost_sinks": int(recording.stack("read.scores", strategy="sinks").sum()),
        "cost_dense": int(recording.stack("read.scores", strategy="dense").sum()),
        "cost_window": int(recording.stack("read.scores", strategy="window").sum()),
    }
    for name in ("dense", "sinks"):
        out[f"asked_{name}"] = meta.get(f"asked_{name}", ["–", "–", False])[1]
    out["asked_right"] = meta.get("asked_dense", ["–"])[0]
    return out


def _perplexity(recording: Recording, name: str) -> float:
    """Over the tokens past the window, alike for all strategies."""
    return float(np.exp(recording.stack("surprisal", strategy=name)[recording.meta["window"] :].mean()))


def marks(recording: Recording) -> list[Mark]:
    gone = recording.happened("sinks.first_token_leaves")
    return [Mark(e.step, "the first token leaves the window") for e in gone]


def _breaks(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['ppl_window']:.1f} / {f['ppl_dense']:.1f} = {f['factor']:.2f}×"
    if f["factor"] > 1.25:
        return Finding(f"{f['factor']:.2f}×", "agrees", _where(recording), filled)
    why = "This model pays its first token no special attention, so it does not miss it (see Gu 2024, 2410.10781)."
    return Finding(f"{f['factor']:.2f}×", "differs", why, filled)


def _where(recording: Recording) -> str:
    return f"Here the break is a factor, not a thousand: {recording.meta['model']['name']} is small, the text is short."


def _heals(recording: Recording) -> Finding:
    f = facts(recording)
    filled = f"{f['sinks']} + {f['rest']} slots: {f['ppl_sinks']:.1f} vs {f['ppl_recompute']:.1f}"
    if not f["sinks"]:
        return Finding(f"{f['ppl_sinks']:.1f}", "untestable", "The sink switch is off in this run.", filled)
    close = f["ppl_sinks"] < 1.15 * f["ppl_recompute"]
    why = "" if close else "Pinning the first tokens does not bring it back to the recomputed window."
    return Finding(f"{f['ppl_sinks']:.1f} vs {f['ppl_recompute']:.1f}", "agrees" if close else "differs", why, filled)


def _costs(recording: Recording) -> Finding:
    f, T, L = facts(recording), recording.meta["tokens"], recording.meta["window"]
    counted = [f["cost_dense"], f["cost_window"], f["cost_recompute"], f["cost_sinks"]]
    rules = [cost.streaming(name, T, L=L).scores for name in ("dense", "window", "recompute", "sinks")]
    same = counted == rules
    why = "" if same else f"The formulas give {', '.join(f'{r:,}' for r in rules)}."
    shown = " / ".join(f"{c:,}" for c in counted)
    return Finding(shown, "agrees" if same else "differs", why, f"T = {T}, L = {L}: query-key products of one head")


def _content(recording: Recording) -> Finding:
    f = facts(recording)
    if not f["sinks"] or not recording.meta["opening"]:
        return Finding("–", "untestable", "No sinks are pinned in this run.")
    close = f["ppl_newlines"] < 1.25 * f["ppl_sinks"]
    filled = f"line breaks {f['ppl_newlines']:.1f}, the real first tokens {f['ppl_sinks']:.1f}"
    return Finding(f"{f['ppl_newlines']:.1f} vs {f['ppl_sinks']:.1f}", "agrees" if close else "differs", "", filled)


def _attend(recording: Recording) -> Finding:
    f = facts(recording)
    many = f["mass_high"] > 5 * f["even"]
    filled = f"mean over heads {f['mass_low']:.0%} to {f['mass_high']:.0%}; spread evenly {f['even']:.1%}"
    why = "" if many else "Its heads look at the first token no more than at any other."
    return Finding(f"{f['mass_low']:.0%} to {f['mass_high']:.0%}", "agrees" if many else "differs", why, filled)


def _long(recording: Recording) -> Finding:
    why = "Failing past the length it was trained on is another effect; 65,000 tokens are too many for this page."
    filled = f"T = {recording.meta['tokens']} tokens, far below its training length"
    return Finding(f"{facts(recording)['ppl_dense']:.1f}", "untestable", why, filled)


def _forgets(recording: Recording) -> Finding:
    if "asked_dense" not in recording.meta:
        return Finding("–", "untestable", "This model knows no numbers.")
    told, dense, ok = recording.meta["asked_dense"]
    _, sinks, kept = recording.meta["asked_sinks"]
    verdict: Verdict = "untestable" if not ok else "agrees" if not kept else "differs"
    why = "" if ok else "Even the full cache does not find it."
    return Finding(f"“{sinks}” for {told}", verdict, why, f"told {told}; full cache “{dense}”, sinks “{sinks}”")


XIAO = "lecture; Xiao 2023, 2309.17453"
# fmt: off
CLAIMS = (
    Claim(
        "A plain window breaks once the first tokens leave it", XIAO, "ppl(window) / ppl(dense)", "5158 / 5641 *",
        _breaks,
    ),
    Claim("A few sinks heal it", XIAO, "ppl(sinks + window) vs ppl(recomputed)", "5.40 vs 5.43 *", _heals),
    Claim("Cost: O(T²), O(TL), O(TL²), O(TL)", "lecture", "query-key products", "orders", _costs),
    Claim(
        "What the sinks say does not matter: line breaks do as well", XIAO, "ppl(4 line breaks + window)",
        "5.60 vs 5.40 *", _content,
    ),
    Claim(
        "Tokens attend to the first ones, or to recent ones", "lecture", "mean attention on token 0", "most layers",
        _attend,
    ),
    Claim("Dense attention fails on long text", XIAO, "ppl(dense)", "5641 at 65K *", _long),
    Claim(
        "Sinks do not bring back what was evicted", XIAO, "a number told, evicted, asked for", "accuracy 0", _forgets,
    ),
)
# fmt: on


def first_token_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """How the mean attention of one head on the first token comes about."""
    layer, head = at["layer"], at["head"]
    shares = np.array([row[layer, head] for _, row in recording.track("attention.first", strategy="dense").rows()])
    T = len(shares)
    even = np.mean(1 / np.arange(1, T + 1))
    return Arithmetic(
        title=f"layer {layer}, head {head}: attention on the first token",
        lines=(
            ("share, newest token", f"{shares[-1]:.3f}"),
            (f"mean over {T} tokens", f"{shares.mean():.3f}"),
            ("spread evenly: mean of 1/t", f"{even:.3f}"),
            ("times as much", f"{shares.mean() / even:.1f}×"),
        ),
        note=f"{shares.mean():.0%} of what this head hands on comes from a token that says nothing new.",
        vectors=(("share, token by token", tuple(shares.tolist())),),
        values={"mean": float(shares.mean()), "even": float(even)},
    )


def _strip_of(strategy: tuple[str, str, str, str, str]) -> Strip:
    name, label, detail, colour, aside = strategy
    codes, number = of(CODES, strategy=name), of(PERPLEXITY, strategy=name)
    return Strip(label, codes, detail=detail, number=number, number_label="perplexity", colour=colour, aside=aside)


STRATEGIES = (
    ("dense", "Keep everything", "cache grows: {slots} slots", "ink", "O(T²)"),
    ("window", "Sliding window", "{kept} slots, {evicted} tokens gone", "alarm", "O(TL)"),
    ("recompute", "Window, recomputed", "{kept} slots, rebuilt each token", "recomputed", "O(TL²)"),
    ("sinks", "Sinks + window", "{kept} slots, the first ones pinned", "sink", "O(TL)"),
)
LINES = tuple(Line(label, of(PERPLEXITY, strategy=name), colour=colour) for name, label, _, colour, _ in STRATEGIES)

# fmt: off
BEATS = (
    Beat(
        "{name} reads a text, token by token. Each one leaves a key and a value in every layer: the [[cache]]. "
        "==The top strip|strips== keeps all of them, and grows. The second keeps the last {window} only: a "
        "==sliding window|strips==. So far, both hold the same.",
        scene="read", step="before", play=True, focus="strips",
        notes="Let it play to the first token’s fall, then stop and ask.",
    ),
    Beat(
        "The next token pushes the very first one, “{first_token}”, out of the window. The model has read far past it. "
        "[[Perplexity]] tells how many tokens a model hesitates between; with all its memory it reads the rest of this "
        "text at {ppl_dense:.1f}.",
        scene="read", step="before",
        predict=Predict("What will the window’s be, once that token is gone?", (36, 60, 120, 240), "ppl_window"),
    ),
    Beat(
        "The window has just slid past ==the first token|text==. Nothing the model needs to know was in it. Yet "
        "==the red curve|curves== climbs, to {ppl_window:.1f} over the rest of the text: {factor:.1f} times as much.",
        scene="read", step="after", play=True, focus="curves",
    ),
    Beat(
        "Look where the heads look. ==Each square|mass== is one head; a dark one gives its attention to token 0: on "
        "average {mass_low:.0%} to {mass_high:.0%} of it in the deeper layers. [[Softmax]] has to add up to one, so a "
        "head with nothing to look for must park its attention *somewhere*.",
        scene="read", focus="mass", do=Do("Click a dark square", cell="mass"),
    ),
    Beat(
        "So pin it. ==The last strip|strips== keeps the first {sinks} tokens for ever, and {rest} recent ones: not one "
        "slot more than the window has.",
        scene="read", step="after",
        predict=Predict("With the first tokens pinned, perplexity will be about", (36, 45, 120, 240), "ppl_sinks"),
    ),
    Beat(
        "It heals: {ppl_sinks:.1f}. ==The violet strip|strips== heals too: it reads its window from scratch for every "
        "token, and so always has a first one. But it computed {cost_recompute:,.0f} products, where the sinks took "
        "{cost_sinks:,.0f}. Flip the **Sink switch** and see it break again.",
        scene="read", step="last", play=True, focus="strips", do=Do("Flip the sink switch", knob="pinned"),
    ),
    Beat(
        "It isn’t what they say. ==The dashed line|contents== pins line breaks in their place: {ppl_newlines:.1f}. But "
        "token 0 is strange inside: ==its residual|lengths== grows to a length of {first_length:,.0f}, where a usual "
        "one has {usual_length:,.0f}.",
        scene="why", step="last", focus="lengths",
    ),
    Beat(
        "Pinning does not bring back what was evicted. Told {asked_right} at the start, then made to read on, full "
        "memory answers “{asked_dense}”; sinks answer “{asked_sinks}”. A sink is a place to park attention; it is no "
        "memory.",
        scene="why", step="last",
    ),
    Beat(
        "Break it. Is one sink enough? Does every text collapse? Choose **Toyland** above: a tiny model has no sink, "
        "and its window barely notices. Can you find a text where four sinks do *not* help?",
        scene="read", step="last", do=Do("Turn Sinks to 1", knob="sinks"),
    ),
)

GLOSSARY = {
    "cache": "The keys and values of tokens already read, kept so that they need not be computed again.",
    "Perplexity": "e to the mean surprisal: among how many equally likely tokens the model hesitates.",
    "Softmax": "Turns scores into shares that add up to one, so attention has to go somewhere, needed or not.",
}

MASS = Heatmaps(
    name="mass", title="Attention on token 0", note="mean so far, layer × head", span=5, tensor=of(MEAN_FIRST),
    rows="head", columns="layer", colours="sink", gaps=True, cell=first_token_cell,
)
LENGTHS = (
    Line("token 0", of("residual.first", strategy="dense"), colour="sink"),
    Line("the token being read", of("residual.now", strategy="dense"), colour="recent"),
)
CONTENTS = (
    Line("window", of(PERPLEXITY, strategy="window"), colour="alarm"),
    Line("first tokens pinned", of(PERPLEXITY, strategy="sinks"), colour="sink"),
    Line("line breaks pinned", of(PERPLEXITY, strategy="newlines"), colour="ink", dashed=True),
)
SCENES = (
    Scene(
        "read",
        (
            Slots(
                name="strips", title="Four ways to remember, in lockstep", states=STATES,
                strips=tuple(map(_strip_of, STRATEGIES)),
            ),
            Curves(
                name="curves", title="Perplexity so far", note="past the window", span=7, lines=LINES, log=True,
                x_label="token",
            ),
            MASS,
            Tokens(name="text", title="The text, as it is read", codes=of(CODES, strategy="sinks"), states=STATES),
        ),
    ),
    Scene(
        "why",
        (
            Curves(
                name="lengths", title="Length of the residual, layer by layer", span=6, log=True, across="layer",
                lines=LENGTHS, x_label="layer", format=",.0f",
            ),
            Curves(
                name="contents", title="Does it matter what the sinks say?", note="perplexity past the window", span=6,
                log=True, lines=CONTENTS, x_label="token",
            ),
            MASS,
            Tokens(
                name="why_text", title="The text, with a plain window", span=7, codes=of(CODES, strategy="window"),
                states=STATES,
            ),
        ),
    ),
)
# fmt: on


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    sites = ("surprisal", "cache.kept", "attention.first", "residual.first", "residual.now", "read.*", "sinks.*")
    return {name: {} for name in sites}


LESSON = Lesson(
    slug="sinks",
    title="The tokens nobody reads but everybody needs",
    question="Why does forgetting the first token break the model?",
    part="Keep the right things",
    order=12,
    sources=("lecture", "architectures", "Xiao 2023, arXiv:2309.17453", "Gu 2024, arXiv:2410.10781"),
    knobs=Turn,
    run=run,
    keep=keep,
    beats=BEATS,
    scenes=SCENES,
    claims=CLAIMS,
    code=("engine.caches.sinks:Sinks", "engine.caches.window:Window", "engine.read:read"),
    facts=facts,
    marks=marks,
    glossary=GLOSSARY,
    step_word="token",
    seconds=600,
    footnote="* Llama-2-13B, 65,000 tokens, as reported. Measured: this page, this text, this server.",
)
