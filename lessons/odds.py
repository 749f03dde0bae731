"""One place and all lengths, as lesson speculate shows them: p, q and what is left of p; what longer drafts give."""

from __future__ import annotations

import numpy as np

from engine.cost import check_intensity, expected_tokens, forward_work, speculation_speedup
from engine.recording import Recording, note, site, step, tap
from engine.speculate import acceptance, residual
from engine.speculate.rounds import laws_at, rounds
from lessons.guessing import Pair, drafter
from lessons.lesson import Finding, Scene
from lessons.models import name_ids, read_aloud
from lessons.views import Bars, Curves, Facing, Line, Number, Numbers, Tokens, of

CANDIDATES = site("place.words", "the likeliest words of one place")
LAW_P = site("place.p", "their probabilities under the target", symbol="p", low=0.0, high=1.0)
LAW_Q = site("place.q", "their probabilities under the guesser", symbol="q", low=0.0, high=1.0)
REST = site("place.rest", "what a rejected guess is replaced from", symbol="norm(max(0, p − q))", low=0.0, high=1.0)
CHANCE = site("place.chance", "chance that a guess is accepted here", symbol="Σ min(p, q)", low=0.0, high=1.0)
OFF = site("place.off", "how far what comes out is from p", low=0.0)
GAMMA = site("lengths.gamma", "guesses a check", symbol="γ")
GAVE = site("lengths.gave", "words that a check gave on average", low=0.0)
TOLD = site("lengths.told", "the formula for as many", symbol="(1 − α^(γ+1)) / (1 − α)", low=0.0)
QUICKER = site("lengths.quicker", "times as fast as the plain loop", low=0.0)
FORETOLD = site("lengths.foretold", "the formula for it", symbol="E / (γc + 1)", low=0.0)
DENSE = site("lengths.intensity", "FLOPs a byte of a check", low=0.0)

LENGTHS, FEW_LENGTHS = (1, 2, 3, 4, 6, 8), (1, 2, 4, 8)  # of toys, and of a real model, which takes its time
CANDIDATE_WORDS, SHOWN_PLACES = 8, 20
LENGTH_WORDS, FEW_WORDS = 48, 20


def lengths_of(both: Pair) -> tuple[int, ...]:
    """The lengths that are tried."""
    return LENGTHS if both.toy else FEW_LENGTHS


def shown(ids: list[int], new: list[int]) -> range:
    """The places whose laws are shown: of new words, the first left out, which nobody guessed."""
    return range(len(ids) + 1, min(len(ids) + len(new), len(ids) + 1 + SHOWN_PLACES))


def show_places(both: Pair, text: list[int], prompt: int, *, temperature: float) -> None:
    """p, q and the residual, word by word."""
    places = shown(text[:prompt], text[prompt:])
    p, q, guessed = laws_at(both.target, both.small, text, places, temperature=temperature)
    agreed, rest = acceptance(p, q), residual(p, q)
    out = q.minimum(p) + (1 - agreed)[:, None] * rest
    off = (out - p).abs().amax(-1)
    pieces = both.tokenizer.pieces(text)
    read_aloud(pieces[: places[0]])
    for n in range(len(places)):
        read_aloud(pieces[places[n] : places[n] + 1])
        top = p[n].maximum(q[n]).topk(CANDIDATE_WORDS).indices
        name_ids(both.tokenizer, top)
        tap(CANDIDATES, top.int(), "candidate")
        for name, row in ((LAW_P, p), (LAW_Q, q), (REST, rest)):
            tap(name, row[n, top].float(), "candidate")
        tap(CHANCE, float(agreed[n]), "")
        tap(OFF, float(off[n]), "")
        step()
    some = [n for n, there in enumerate(guessed) if there] or [0]
    apart = [n for n in some if 0.2 < float(agreed[n]) < 0.9]
    note(places={"off": float(off.max()), "chance": float(agreed[some].mean()), "one": (apart or some)[0],
                 "count": len(places)})  # fmt: skip


def try_lengths(both: Pair, ids: list[int], *, temperature: float, plain: float) -> None:
    """The same text in chains of every length: what a check gives, what it takes, how much it computes a byte."""
    words, lengths = (LENGTH_WORDS if both.toy else FEW_WORDS), lengths_of(both)
    found = {name: np.full(len(lengths), np.nan, np.float32) for name in (GAVE, TOLD, QUICKER, FORETOLD, DENSE)}
    shape = both.target.shape
    bytes_each = {"weight_bytes": both.size, "cache_bytes": both.size}
    accepted = looked = guessed = 0
    drafting = 0.0
    for n, gamma in enumerate(lengths):
        turns = list(rounds(both.target, ids, steps=words, guesser=drafter(both, length=gamma),
                            temperature=temperature, seed=1))[1:]  # fmt: skip
        full = [one for one in turns if len(one.draft) == gamma]
        accepted += sum(len(one.verdict.accepted) for one in full)
        looked += sum(len(one.verdict.accepted) + len(one.verdict.rejected) for one in full)
        drafting += sum(one.draft_seconds for one in full)
        guessed += gamma * len(full)
        alpha, cost = accepted / max(1, looked), drafting / max(1, guessed) / plain
        if full:
            found[GAVE][n] = np.mean([1 + len(one.verdict.accepted) for one in full])
            work = forward_work(shape, queries=1 + gamma, keys=len(ids) + words // 2 + gamma, **bytes_each)
            found[DENSE][n] = np.mean([one.flops for one in full]) / sum(w.bytes for w in work)
        found[QUICKER][n] = plain * (words - 1) / sum(one.seconds for one in turns)
        for i, length in enumerate(lengths):
            found[TOLD][i] = expected_tokens(alpha, length)
            found[FORETOLD][i] = speculation_speedup(alpha, length, cost=cost)
        tap(GAMMA, np.array(lengths, np.float32), "length")
        for name, values in found.items():
            tap(name, values, "length")
        step()
    rule = [check_intensity(shape, drafted=g, context=len(ids) + words // 2, **bytes_each) for g in (0, lengths[-1])]
    note(lengths={"alpha": alpha, "cost": cost, "most": lengths[-1], "intensity": rule})


def law_claim(recording: Recording) -> Finding:
    off = recording.meta["places"]["off"]
    filled = f"max |law of what comes out − p| over {recording.meta['places']['count']} places: {off:.1e}"
    if not recording.meta["lossless"]:
        return Finding(
            f"{off:.1e}", "untestable", "It holds for checked guesses; the big little decoder’s are not.", filled
        )
    return Finding(f"{off:.1e}", "agrees" if off < 1e-12 else "differs", "" if off < 1e-12 else "More than rounding.",
                   filled)  # fmt: skip


def expected_claim(recording: Recording) -> Finding:
    gave, told, lengths = (recording.stack(name)[-1] for name in (GAVE, TOLD, GAMMA))
    there = np.isfinite(gave)
    alpha = recording.meta["lengths"]["alpha"]
    if not there.any():
        return Finding("–", "untestable", "Nothing was guessed.", f"α = {alpha:.2f}")
    off = float(np.abs(gave[there] / told[there] - 1).mean())
    filled = f"α = {alpha:.2f}; " + ", ".join(
        f"γ={g:.0f}: {a:.1f} ({b:.1f})" for g, a, b in zip(lengths[there], gave[there], told[there], strict=True)
    )
    why = "" if off < 0.15 else "Acceptance is not even: easy words follow easy words, hard ones stand together."
    return Finding(f"off by {off:.0%}", "agrees" if off < 0.15 else "differs", why, filled)


def denser_claim(recording: Recording) -> Finding:
    counted, lengths = (recording.stack(name)[-1] for name in (DENSE, GAMMA))
    low, high = recording.meta["lengths"]["intensity"]
    there = np.flatnonzero(np.isfinite(counted))
    if len(there) < 2:
        return Finding("–", "untestable", "Too few checks to count.", f"formula: {low:.2f} → {high:.2f}")
    grows = bool((np.diff(counted[there]) > 0).all())
    counts = f"{counted[there[0]]:.1f} → {counted[there[-1]]:.1f}"
    filled = f"{lengths[there[0]]:.0f} → {lengths[there[-1]]:.0f} guesses; formula, from none: {low:.1f} → {high:.1f}"
    return Finding(counts, "agrees" if grows else "differs", "" if grows else "It does not grow everywhere.", filled)


# fmt: off
SCENES_OF_ODDS = (
    Scene(
        "place",
        (
            Tokens(name="text", title="The text, and the place that is looked at", fold=False),
            Facing(of(LAW_Q), of(LAW_P), of(CANDIDATES), "q, the guesser", "p, the target", name="laws",
                   title="What may stand there", span=7, left_colour="key", right_colour="query", format=".1%"),
            Bars(of(REST), of(CANDIDATES), name="rest", title="What replaces a rejected guess", span=5,
                 colour="value", format=".1%"),
            Numbers(
                (Number("Chance that a guess is kept", of(CHANCE), format=".0%", colour="value"),
                 Number("What comes out, away from p", of(OFF), format=".1e")),
                name="sum", title="Σ min(p, q), and the sum of both ways",
            ),
        ),
    ),
    Scene(
        "lengths",
        (
            Curves(
                (Line("measured", of(GAVE), "value", x=of(GAMMA)),
                 Line("formula", of(TOLD), "ink", dashed=True, x=of(GAMMA))),
                name="lengths", title="Words a check gives", across="length", span=4, x_label="guesses", format=".2f",
            ),
            Curves(
                (Line("measured", of(QUICKER), "value", x=of(GAMMA)),
                 Line("formula", of(FORETOLD), "ink", dashed=True, x=of(GAMMA))),
                name="speed", title="Times as fast as the plain loop", across="length", span=4, x_label="guesses",
                format=".2f",
            ),
            Curves((Line("counted", of(DENSE), "query", x=of(GAMMA)),), name="dense", across="length", span=4,
                   title="FLOPs a byte of a check", x_label="guesses", format=".1f", low=0.0),
        ),
    ),
)
# fmt: on
