"""Letting the hardware choose: one network that holds many, timed here, searched under a budget, and put to work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import param

from engine.recording import Recording, note
from engine.toyland import Grammar, batch
from engine.zoo import SPACE
from lessons import shapes as cut
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Do, Finding, Lesson, Mark, Predict, Scene, Verdict
from lessons.models import load, name_ids
from lessons.views import (
    Bars,
    Curves,
    Heatmaps,
    Line,
    Number,
    Numbers,
    Plane,
    Points,
    Saying,
    Sayings,
    of,
)  # fmt: skip

SUPERNET = "supernet"
PROMPT = "one day in the forest. the grey bell is in the workshop. quinn is in the beach. where is the grey bell?"
LONGEST = 256  # tokens of a prompt


class Turn(Knobs):
    budget = param.Integer(
        65, bounds=(5, 100), step=5, label="Time budget", doc="In % of what the largest shape takes."
    )
    memory = param.Number(2.5, bounds=(0.2, 2.5), step=0.1, label="Memory budget", doc="Megabytes of weights.")
    work: param.Selector = param.Selector(
        default=64, objects={"Read 64 words": 64, "Read a single word": 1}, label="Timed work",
        doc="What the machine does while shapes are timed.",
    )  # fmt: skip
    population = param.Integer(12, bounds=(6, 14), label="Population", doc="Candidates in the first generation.")
    generations = param.Integer(6, bounds=(2, 7), label="Generations", doc="How often the best have children.")
    seed = param.Integer(0, bounds=(0, 9), label="Seed", doc="Of all that is drawn by lot.")
    prompt = param.String(PROMPT, label="Prompt", doc="In Toyland’s words: what the models go on from.")


def run(knobs: Turn) -> None:
    model, tokenizer = load(SUPERNET)
    prompt = tokenizer.prompt(knobs.prompt)[:LONGEST]
    ids = batch(Grammar(), seed=0, step=0, rows=1, length=max(2, knobs.work), stream="clock").ids[:, : knobs.work]
    g = knobs.generations
    starts = np.cumsum([0, cut.LAPS, g, g, 2 * (cut.SEEDS - 1) * g, 2 * g, 1])
    note(
        work=knobs.work, budget=knobs.budget, memory=knobs.memory, generations=g, population=knobs.population,
        starts=dict(zip(("clock", "evolve", "chance", "seeds", "several", "out", "say"), starts.tolist(), strict=True)),
        total_steps=int(starts[-1]) + cut.WORDS,
    )  # fmt: skip
    name_ids(tokenizer, np.arange(tokenizer.size))
    foretell = cut.clock(model, ids, seed=knobs.seed)
    costs: dict[str, Any] = {"ms": foretell, "MB": cut.megabytes(model)}
    limits = {"ms": knobs.budget / 100 * foretell(SPACE.largest), "MB": knobs.memory}
    cut.fits(costs, limits, knobs.budget)
    note(limit=limits["ms"])
    search = cut.Search(model, costs, knobs.population, g)
    best = cut.compete(search, limits, seed=knobs.seed)
    shapes, budgets = cut.several(search, limits, best, seed=knobs.seed)
    models = cut.extracted(search, shapes, budgets, ids)
    cut.speak(models, prompt)


def _reached(recording: Recording) -> dict[str, np.ndarray]:
    """The best of each search, seed by seed."""
    return {name: np.array(values) for name, values in recording.meta["results"].items()}


def facts(recording: Recording) -> dict[str, Any]:
    meta = recording.meta
    start, final = meta["starts"], meta["final"]
    reached = _reached(recording)
    _, layer, head, neuron = meta["price"]
    heads, widths = meta["shapes"]["yours"]
    full = sum(meta["shapes"]["largest"][0]), sum(meta["shapes"]["largest"][1])
    yours, largest, smallest = (final[name] for name in ("yours", "largest", "smallest"))
    said = meta["said"]
    return {
        "budget": meta["budget"],
        "count": SPACE.count,
        "ms_largest": largest["foretold"],
        "ms_smallest": smallest["foretold"],
        "limit": meta["budgets"]["yours"],
        "rank": float(recording.track(cut.RANK).latest()),
        "noise": 100 * meta["noise"],
        "layer_us": 1000 * layer,
        "head_us": 1000 * head,
        "neurons_us": 1000 * cut.PART * neuron,
        "layer_heads": layer / head if head else math.inf,
        "looks": meta["looks"][0],
        "ppl_largest": largest["perplexity"],
        "ppl_smallest": smallest["perplexity"],
        "ppl_yours": yours["perplexity"],
        "worse": 100 * (yours["perplexity"] / largest["perplexity"] - 1),
        "ms_yours": yours["ms"],
        "faster": largest["ms"] / yours["ms"],
        "weights": 100 * yours["parameters"] / largest["parameters"],
        "layers": len(heads),
        "heads": 100 * sum(heads) / full[0],
        "neurons": 100 * sum(widths) / full[1],
        "heads_kept": sum(heads),
        "neurons_kept": sum(widths),
        "evolution": float(reached["evolution"].mean()),
        "chance": float(reached["chance"].mean()),
        "evolution_unseen": float(np.mean(meta["unseen"]["evolution"])),
        "chance_unseen": float(np.mean(meta["unseen"]["chance"])),
        "wins": int((reached["evolution"] < reached["chance"]).sum()),
        "seeds": cut.SEEDS,
        "apart": meta["apart"]["extracted"],
        "same_words": sum(a == b for a, b in zip(said["yours"], said["largest"], strict=True)),
        "words": cut.WORDS,
        **{f"at_{name}": step for name, step in start.items()},
        "clocked": start["evolve"] - 1,
        "bred": start["chance"] - 1,
        "drawn": start["seeds"] - 1,
        "compared": start["several"] - 1,
        "out": start["out"],
        "last": recording.steps - 1,
    }


def marks(recording: Recording) -> list[Mark]:
    told = {"evolve": "evolution", "chance": "chance", "seeds": "other seeds", "several": "other budgets",
            "out": "extracted", "say": "they speak"}  # fmt: skip
    return [Mark(recording.meta["starts"][name], label) for name, label in told.items()]


def _several(recording: Recording) -> Finding:
    meta = recording.meta
    final, budgets = meta["final"], meta["budgets"]
    over = [final[name]["ms"] / budgets[name] - 1 for name in cut.TARGETS]
    worse = [final[name]["perplexity"] for name in cut.TARGETS]
    filled = "; ".join(
        f"{budgets[name]:.2f} ms allowed: {final[name]['ms']:.2f} ms, perplexity {final[name]['perplexity']:.2f}"
        for name in cut.TARGETS
    )
    slack = max(0.05, meta["noise"])
    kept = sum(o <= slack for o in over)
    better = worse[0] >= 0.98 * worse[1] >= 0.96 * worse[2]
    agrees = kept == len(over) and better
    why = "None was trained again." if agrees else (
        "A roomier budget did not read better." if kept == len(over)
        else f"{len(over) - kept} took over {slack:.0%} longer: this machine had other work, or the sum errs."
    )  # fmt: skip
    verdict: Verdict = "agrees" if agrees else "differs"
    return Finding(f"{kept} of {len(over)} within budget, 0 trained again", verdict, why, filled)


def _better(recording: Recording) -> Finding:
    reached, looks = _reached(recording), recording.meta["looks"]
    gap = reached["chance"] - reached["evolution"]
    wins, losses = int((gap > 1e-9).sum()), int((gap < -1e-9).sum())
    unseen = [float(np.mean(recording.meta["unseen"][by])) for by in ("evolution", "chance")]
    found, lasting = losses == 0 and wins > len(gap) / 2, unseen[0] < unseen[1]
    pairs = ", ".join(f"{e:.3f} / {c:.3f}" for e, c in zip(reached["evolution"], reached["chance"], strict=True))
    filled = f"evolution / chance, {looks[0]} looks each: {pairs}; unseen texts: {unseen[0]:.3f} / {unseen[1]:.3f}"
    why = (
        "With this budget chance finds shapes as good: few fit, or those that do are much alike." if not found
        else f"Three seeds are few, and the gain is {gap.mean() / reached['chance'].mean():.1%}." if lasting
        else "On the texts that judge it, yes; on texts that no search saw, its winners read no better than chance’s."
    )  # fmt: skip
    agrees = found and lasting
    return Finding(f"{wins} of {len(gap)} seeds, {losses} lost", "agrees" if agrees else "differs", why, filled)


def _foretold(recording: Recording) -> Finding:
    rank = facts(recording)["rank"]
    if not math.isfinite(rank):
        return Finding("–", "untestable", "All shapes take the same time here.")
    base, layer, head, neuron = recording.meta["price"]
    filled = f"ms ≈ {base:.2f} + {layer:.3f}·layers + {head:.4f}·heads + {neuron:.5f}·neurons; {cut.EACH} unseen shapes"
    why = "" if rank > 0.9 else "Timed while this machine had other work, or its times do not follow the sizes."
    return Finding(f"{rank:.2f}", "agrees" if rank > 0.9 else "differs", why, filled)


# fmt: off
CLAIMS = (
    Claim("One training yields models for several targets", "architectures; Cai 2020, 1908.09791",
          "shapes that meet their budget, and trainings after the first", "over 10¹⁹ shapes, 1 training *", _several),
    Claim("Search under a constraint beats chance, at as many looks", "architectures; Real 2018, 1802.01548",
          "best perplexity, evolution vs random draws", "method", _better),
    Claim("Latency can be looked up: a sum of its parts ranks shapes", "Cai 2019, 1812.00332",
          "rank correlation, foretold vs timed", "method", _foretold),
)

BEATS = (
    Beat(
        "One training, {count:,} models: this [[supernet]] learned to work with 2 to 4 layers, and in each layer with "
        "2 to 8 heads and 64 to 384 neurons. Which of them suits **your** machine? Ask it. ==Each point|clock== is a "
        "shape, cut out and timed, here and now.", scene="clock", step=0, focus="clock",
        notes="Run it again: the points move a little, as the machine has other things to do.",
    ),
    Beat(
        "Half of the shapes set the ==prices|prices==: a layer {layer_us:.0f} µs, a head {head_us:.1f}, 64 neurons "
        "{neurons_us:.1f}. Their sum foretells the ==other half|clock== before they run: rank correlation {rank:.2f}. "
        "Laps differ by {noise:.0f}%, so the shortest counts.", scene="clock", step="clocked", play=True,
        focus="clock", do=Do("Open a point: how its time is foretold", cell="clock"),
    ),
    Beat(
        "The largest takes {ms_largest:.2f} ms. You allow {budget}% of that, {limit:.2f} ms: ==the red line|plane==. "
        "Candidates to its left are judged on a few texts: their [[perplexity]] at what the largest expects there. "
        "First come some drawn by lot; then the best have children, changed or paired.", scene="search",
        step="at_evolve", focus="plane",
        predict=Predict("How much of the largest’s weights will the winner keep?", (20, 40, 60, 80), "weights",
                        format=".0f", unit="%"),
    ),
    Beat(
        "Generation after generation ==the cloud|plane== sinks to the red line’s foot, and the "
        "==winner’s shape|shape== settles: {layers} layers, {heads:.0f}% of the heads, {neurons:.0f}% of the neurons; "
        "{weights:.0f}% of the weights. {looks} looks of {count:,}.", scene="search", step="bred", play=True,
        focus="shape",
    ),
    Beat(
        "Was that skill or luck? ==Grey points|plane== are as many looks by pure chance, under the same budget: drawn "
        "by lot, and made smaller until they fit. Which ==cloud|plane== lies lower?", scene="search", step="drawn",
        play=True, focus="plane",
    ),
    Beat(
        "One pair proves little, so ==three seeds|race== each. Evolution ends at {evolution:.3f} on average, chance at "
        "{chance:.3f}; it won {wins} of {seeds}. On texts that no search has seen, their winners read at "
        "{evolution_unseen:.3f} and {chance_unseen:.3f}.", scene="race", step="compared", play=True, focus="race",
    ),
    Beat(
        "Another machine, another budget? No new training. ==Two more searches|tight==, one tighter and one roomier; "
        "then all shapes are cut out and ==timed|final==. Yours: {ms_yours:.2f} ms, {faster:.1f} times as fast as the "
        "largest, perplexity {ppl_yours:.2f} against {ppl_largest:.2f}.", scene="several", step="out", play=True,
        focus="final",
    ),
    Beat(
        "Small, but not a sketch: it runs. ==Word by word|say== the cut-out models go on from one prompt. Yours and "
        "the largest share {same_words} of {words} words. And it is ==the same|same== network as inside the supernet: "
        "logits differ by {apart:.1g} at most.", scene="say", step="last", play=True, focus="say",
    ),
    Beat(
        "Now time **a single word**: a layer’s price hardly falls, heads and neurons are nearly free. Does the "
        "==shape|shape== change? Then break it: turn the budget down until nothing fits, or give chance a "
        "population so small that it wins.", scene="search", step="bred", focus="shape",
        do=Do("Time a single word", knob="work"),
    ),
)
GLOSSARY = {
    "supernet": "A network trained so that many smaller ones, cut from it, work without further training.",
    "perplexity": "e to the mean surprisal: between how many words the model hesitates.",
}


def _shape(name: str, title: str, of_: str, span: int) -> Heatmaps:
    return Heatmaps(
        name=name, title=title, note="grey: left out", span=span, tensor=of(cut.SHAPE, of=of_), rows="layer",
        columns="part", gaps=True, states=("left out", "head", f"{cut.PART} neurons"),
        state_colours=("sunk", "query", "value"),
    )


def _race(by: str, label: str, colour: str) -> tuple[Line, ...]:
    return tuple(
        Line(f"{label}, seed {i + 1}", of(cut.BEST, by=by, seed=i), colour=colour, x=of(cut.LOOKS, by=by, seed=i))
        for i in range(cut.SEEDS)
    )


def _limit(label: str, name: str, of_: str = "perplexity", x: str = "") -> Line:
    return Line(label, of(cut.LIMIT, of=of_), colour="alarm", dashed=True, x=of(cut.LIMIT, of=name))


WHO = {"largest": ("The largest", "ink"), "roomy": ("Roomy", "value"), "yours": ("Yours", "sink"),
       "tight": ("Tight", "key"), "smallest": ("The smallest", "kept")}
SCENES = (
    Scene(
        "clock",
        (
            Plane(
                name="clock", title="Foretold and timed", note="a point a shape, on this machine", height=320,
                log=True, log_x=True,
                points=(
                    Points("set the prices", of(cut.FORETOLD, group=0), of(cut.TIMED, group=0), colour="kept"),
                    Points("not seen before", of(cut.FORETOLD, group=1), of(cut.TIMED, group=1), colour="recent"),
                ),
                lines=(Line("the same", of(cut.EVEN), colour="ink", dashed=True, x=of(cut.EVEN)),),
                x_label="foretold, ms", y_label="timed, ms", x_format=".2f", format=".2f", tensor=of(cut.TIMED),
                cell=cut.timed_cell,
            ),
            Bars(
                name="prices", title="What this machine asks for", note="ms each", span=7, values=of(cut.PRICE),
                labels=("to start", "a layer", "a head", f"{cut.PART} neurons"), colour="key", format=".3f", high=None,
            ),
            Numbers(
                name="trust", title="How far to trust it", span=5,
                numbers=(
                    Number("Rank correlation", of(cut.RANK), format=".2f", colour="recent", detail="shapes not seen"),
                    Number("Laps differ by", of(cut.NOISE), format=".0%", colour="alarm", detail="middle, shortest"),
                ),
            ),
        ),
    ),
    Scene(
        "search",
        (
            Plane(
                name="plane", title="Every candidate", note="firm: this generation", height=340,
                points=(
                    Points("chance", of(cut.CANDIDATES, group=0), of(cut.SCORES, group=0), colour="kept", trail=True),
                    Points("evolution", of(cut.CANDIDATES, group=1), of(cut.SCORES, group=1), colour="recent",
                           trail=True),
                    Points("best so far", of(cut.CANDIDATES, group=2), of(cut.SCORES, group=2), colour="sink"),
                    Points("", of(cut.ENDS, of="ms"), of(cut.ENDS, of="perplexity"), colour="ink",
                           names=("smallest", "largest")),
                ),
                lines=(
                    _limit("budget", "ms"),
                    Line("front", of(cut.FRONT, of="perplexity"), colour="recent", x=of(cut.FRONT, of="ms")),
                ),
                x_label="foretold, ms", y_label="perplexity, at what the largest expects", x_format=".2f", format=".3f",
                tensor=of(cut.CANDIDATES), cell=cut.candidate_cell,
            ),
            _shape("shape", "The best so far", "now", 7),
            Numbers(
                name="found", title="So far", span=5,
                numbers=(
                    Number("Looked at", of(cut.LOOKS, by="now", seed=0)),
                    Number("Best perplexity", of(cut.BEST, by="now", seed=0), format=".3f", colour="sink"),
                    Number("Its time, foretold", of(cut.BEST_MS), unit="ms", format=".2f"),
                    Number("Its weights", of(cut.WEIGHTS), unit="MB", format=".2f"),
                ),
            ),
        ),
    ),
    Scene(
        "race",
        (
            Curves(
                name="race", title="Skill or luck", note="lowest perplexity so far, at what the largest expects",
                height=330, format=".3f",
                lines=(*_race("evolution", "evolution", "recent"), *_race("chance", "chance", "kept")),
                x_label="candidates looked at", y_label="perplexity",
            ),
        ),
    ),
    Scene(
        "several",
        (
            _shape("tight", "A tight budget", "tight", 4),
            _shape("yours", "Your budget", "yours", 4),
            _shape("roomy", "A roomy budget", "roomy", 4),
            Plane(
                name="final", title="Cut out, timed, read", note="unseen texts", span=12, height=320,
                points=(
                    Points("foretold", of(cut.FINAL_MS, of="foretold"), of(cut.FINAL_PPL), colour="kept"),
                    Points("timed", of(cut.FINAL_MS, of="timed"), of(cut.FINAL_PPL), colour="recent", joined=True,
                           names=cut.FINAL),
                ),
                lines=tuple(_limit("budget" if not i else "", name, "all") for i, name in enumerate(cut.TARGETS)),
                x_label="ms", y_label="perplexity", x_format=".2f", format=".3f",
            ),
        ),
    ),
    Scene(
        "say",
        (
            Sayings(
                name="say", title="They go on from the same words", note="wavy: not what the largest says",
                prompt=of(cut.PROMPT),
                sayings=tuple(
                    Saying(
                        label, of(cut.SAID, model=name), colour=colour,
                        figures=(
                            Number("to read", of(cut.ONE, of="ms", model=name), unit="ms", format=".2f"),
                            Number("perplexity", of(cut.ONE, of="perplexity", model=name), format=".2f"),
                            Number("weights", of(cut.ONE, of="MB", model=name), unit="MB", format=".2f"),
                        ),
                    )
                    for name, (label, colour) in WHO.items()
                ),
            ),
            Numbers(
                name="same", title="The same network", note="the largest difference of two logits",
                numbers=(
                    Number("Cut out, and in place", of(cut.APART, of="extracted"), format=".1g"),
                    Number("Largest subnet, and supernet", of(cut.APART, of="largest"), format=".1g"),
                    Number("Heads and neurons sorted, and not", of(cut.APART, of="sorted"), format=".1g"),
                ),
            ),
        ),
    ),
)


def keep(knobs: Turn) -> dict[str, dict[str, Any]]:
    return {"shapes.*": {}}


LESSON = Lesson(
    slug="search", title="Letting the hardware choose", question="Which shape is best for this machine?",
    part="Teach it cheaply", order=28,
    sources=("architectures", "Cai 2020, arXiv:1908.09791", "Cai 2019, arXiv:1812.00332",
             "Real 2018, arXiv:1802.01548"),
    knobs=Turn, run=run, keep=keep, beats=BEATS, scenes=SCENES, claims=CLAIMS,
    code=("engine.search.supernet:slices", "engine.search.evolution:evolve", "engine.search.latency:fit",
          "engine.search.supernet:sort_channels"),
    facts=facts, marks=marks, glossary=GLOSSARY, step_word="step", seconds=180,
    footnote="* Once-for-all on images, as reported. Measured: a supernet of small decoders, on this machine.",
)
# fmt: on
