"""What the lesson on search runs: shapes timed on this machine, searches under a budget, and what they find at work."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from engine.caches.full import Full
from engine.evaluate import perplexity, surprisal
from engine.generate import generate
from engine.recording import Recording, note, record, site, step, tap
from engine.search.evolution import Candidate, Generation, draw_at_random, evolve, front, quality
from engine.search.latency import Predictor, fit, laps, parameters, rank_correlation
from engine.search.supernet import Subnet, extract, run, sort_channels
from engine.toyland import Grammar, batch
from engine.zoo import SPACE
from lessons.views import Arithmetic

EACH, LAPS = 12, 16  # shapes that the sum is fitted to, as many that it has not seen, and laps of all
SEEDS = 3  # searches of each kind
SCORED = {"rows": 8, "length": 96, "stream": "valid"}  # texts that a search judges by
JUDGED = {"rows": 16, "length": 128, "stream": "test"}  # texts that no search has seen
FINAL_LAPS = 24
WORDS = 24  # said by each model at the end
PART = 64  # neurons drawn as one cell
HEADS, PARTS = SPACE.heads[-1], SPACE.ffn_width[-1] // PART
TARGETS = ("tight", "yours", "roomy")
FINAL = ("smallest", *TARGETS, "largest")

FORETOLD = site("shapes.foretold", "time that the sum foretells", unit="ms", low=0.0)
TIMED = site("shapes.timed", "the shortest time of the laps so far, on this machine", unit="ms", low=0.0)
EVEN = site("shapes.even", "where both are the same", unit="ms", low=0.0)
PRICE = site("shapes.price", "what the machine asks: to start, for a layer, for a head, for 64 neurons", unit="ms")
RANK = site("shapes.rank", "rank correlation of foretold and timed, for shapes that the sum was not fitted to")
NOISE = site("shapes.noise", "how far the middle lap lies above the shortest, over the shapes", low=0.0)
CANDIDATES = site("shapes.ms", "foretold time of each candidate", unit="ms", grows="generation", low=0.0)
SCORES = site(
    "shapes.perplexity", "its perplexity, at what the largest expects of a few texts", grows="generation", low=1.0
)
FRONT = site("shapes.front", "candidates that none beats in time and perplexity", low=0.0)
LIMIT = site("shapes.limit", "the budget", low=0.0)
ENDS = site("shapes.ends", "the smallest and the largest", low=0.0)
BEST = site("shapes.best", "the lowest perplexity found so far within the budget", low=1.0)
LOOKS = site("shapes.looks", "candidates that this search has looked at", low=0.0)
WEIGHTS = site("shapes.weights", "parameters of the best so far")
BEST_MS = site("shapes.best.ms", "foretold time of the best so far", unit="ms")
COUNTS = site("shapes.counts", "layers, heads and neurons of each timed shape", low=0.0)
SIZES = site("shapes.sizes", "layers, heads and neurons of each candidate", grows="generation", low=0.0)
SHAPE = site("shapes.shape", "which parts of the supernet the best so far keeps")
FINAL_MS = site("shapes.final.ms", "time of each extracted model, on this machine", unit="ms", low=0.0)
FINAL_PPL = site("shapes.final.perplexity", "perplexity of each extracted model on texts that no search saw", low=1.0)
ONE = site("shapes.one", "a figure of one extracted model")
PROMPT = site("shapes.prompt", "the prompt’s tokens")
SAID = site("shapes.said", "the words that a model says", grows="token")
APART = site("shapes.apart", "the largest difference of two models’ logits", low=0.0)

Costs = Mapping[str, Callable[[Subnet], float]]


def megabytes(model: Any) -> Callable[[Subnet], float]:
    """What an extracted subnet weighs."""
    size = model.embed.weight.element_size()
    return lambda subnet: parameters(model.shape, subnet) * size / 1e6


def parts(subnet: Subnet | None) -> np.ndarray:
    """[layer, part]: 1 where the subnet keeps a head, 2 where it keeps a few neurons, 0 where it keeps nothing."""
    codes = np.zeros((SPACE.layers[-1], HEADS + PARTS), np.uint8)
    if subnet is None:
        return codes
    for layer in range(subnet.layers):
        codes[layer, : subnet.heads[layer]] = 1
        codes[layer, HEADS : HEADS + subnet.ffn_width[layer] // PART] = 2
    return codes


def counts(subnet: Subnet) -> tuple[int, int, int]:
    return subnet.layers, sum(subnet.heads), sum(subnet.ffn_width)


def clock(model: Any, ids: Any, *, seed: int) -> Predictor:
    """Time some shapes lap by lap, and fit to half of them the sum that foretells the others."""
    rng = random.Random(f"clock {seed}")
    subnets = [SPACE.largest, SPACE.smallest]
    while len(subnets) < 2 * EACH:
        if (drawn := SPACE.draw(rng)) not in subnets:
            subnets.append(drawn)
    seen: list[list[float]] = []
    for lap in laps(model, subnets, ids, repeats=LAPS):
        seen.append(lap)
        shortest = [min(ms) for ms in zip(*seen, strict=True)]
        middle = [median(ms) for ms in zip(*seen, strict=True)]
        found = fit(subnets[:EACH], shortest[:EACH])
        told = np.array([found(s) for s in subnets])
        tap(FORETOLD, told.reshape(2, EACH), "group shape")
        tap(TIMED, np.array(shortest).reshape(2, EACH), "group shape")
        tap(COUNTS, np.array([counts(s) for s in subnets]).reshape(2, EACH, 3), "group shape count")
        tap(EVEN, np.array([min(shortest), max(shortest)]), "end")
        tap(PRICE, np.array([found.base, found.layer, found.head, PART * found.neuron], np.float32), "term")
        tap(RANK, rank(told[EACH:].tolist(), shortest[EACH:]), "")
        noise = float(median(m / s - 1 for m, s in zip(middle, shortest, strict=True)))
        tap(NOISE, noise, "")
        note(price=[found.base, found.layer, found.head, found.neuron], noise=noise)
        step(label=f"lap {len(seen)}")
    return found


def rank(a: Sequence[float], b: Sequence[float]) -> float:
    """The rank correlation; no number where a machine's times are all one."""
    try:
        return rank_correlation(a, b)
    except ValueError:
        return math.nan


def fits(costs: Costs, limits: Mapping[str, float], budget: int) -> None:
    """Raises ValueError, with what would do, if not even the smallest shape meets the limits."""
    ms, weight = costs["ms"](SPACE.smallest), costs["MB"](SPACE.smallest)
    if ms > limits["ms"]:
        share = math.ceil(20 * ms / costs["ms"](SPACE.largest)) * 5
        raise ValueError(
            f"Nothing fits: {budget}% of the largest shape’s time is {limits['ms']:.2f} ms, and even the smallest "
            f"needs {ms:.2f} ms on this machine. Allow {share}% at least."
        )
    if weight > limits["MB"]:
        raise ValueError(
            f"Nothing fits: the memory budget is {limits['MB']:.1f} MB, and even the smallest shape weighs "
            f"{weight:.2f} MB."
        )


@dataclass
class Search:
    """One supernet, what its shapes cost here, and every shape looked at so far: no search measures one again."""

    model: Any
    costs: Costs
    population: int
    generations: int
    known: dict[Subnet, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = batch(Grammar(), seed=0, step=0, **SCORED).ids  # type: ignore[arg-type]
        self.judge = quality(self.model, ids, against=SPACE.largest)

        where = self.model.embed.weight.device
        self.unseen = batch(Grammar(), seed=0, step=0, **JUDGED).ids.to(where)  # type: ignore[arg-type]

    def score(self, subnet: Subnet) -> float:
        if subnet not in self.known:
            self.known[subnet] = self.judge(subnet)
        return self.known[subnet]

    def read(self, subnet: Subnet) -> float:
        """The perplexity of the subnet, taken out, on texts that no search sees."""
        with record(keep={}):
            return perplexity(surprisal(extract(self.model, subnet), self.unseen))

    def evolved(self, limits: Mapping[str, float], seed: int) -> Iterator[Generation]:
        return _quietly(evolve(SPACE, score=self.score, costs=self.costs, budget=limits, population=self.population,
                               generations=self.generations, seed=seed))  # fmt: skip

    def drawn(self, limits: Mapping[str, float], seed: int, sizes: list[int]) -> Iterator[Generation]:
        return _quietly(draw_at_random(SPACE, score=self.score, costs=self.costs, budget=limits, sizes=sizes,
                                       seed=seed))  # fmt: skip


def _quietly(generations: Iterator[Generation]) -> Iterator[Generation]:
    """The same, whose own steps are no steps of the lesson."""
    while True:
        with record(keep={}):
            found = next(generations, None)
        if found is None:
            return
        yield found


def compete(search: Search, limits: Mapping[str, float], *, seed: int) -> Candidate:
    """Evolution and pure chance, look for look, with some seeds; the first pair is shown candidate by candidate."""
    tap(ENDS, np.array([search.costs["ms"](s) for s in (SPACE.smallest, SPACE.largest)]), "end", of="ms")
    tap(ENDS, np.array([search.score(s) for s in (SPACE.smallest, SPACE.largest)]), "end", of="perplexity")
    tap(LIMIT, np.array([search.score(s) for s in (SPACE.smallest, SPACE.largest)]), "end", of="perplexity")
    best: Candidate | None = None
    results: dict[str, list[float]] = {"evolution": [], "chance": []}
    unseen: dict[str, list[float]] = {"evolution": [], "chance": []}
    looks = []
    for i in range(SEEDS):
        sizes: list[int] = []
        for by in results:
            all_of: list[Candidate] = []
            made = search.evolved(limits, seed + i) if by == "evolution" else search.drawn(limits, seed + i, sizes)
            for found in made:
                all_of += found.born
                if by == "evolution":
                    sizes.append(len(found.born))
                if i == 0:
                    best = found.best if best is None or by == "evolution" else best
                    _show(found, all_of, best, by, limits, search.population)
                tap(BEST, found.best.score, "", by=by, seed=i)
                tap(LOOKS, len(all_of), "", by=by, seed=i)
                step(label=f"{by}, generation {found.number + 1}")
            results[by].append(found.best.score)
            unseen[by].append(search.read(found.best.subnet))
        looks.append(sum(sizes))
    note(results=results, unseen=unseen, looks=looks)
    assert best is not None
    return best


def _show(
    found: Generation, all_of: list[Candidate], best: Candidate, by: str, limits: Mapping[str, float], room: int
) -> None:
    """A generation on the plane, and the best of the evolution so far."""
    points = np.full((2, 1, 3, room), np.nan, np.float32)
    sizes = np.zeros((1, 3, room, 3), np.int32)
    group = 1 if by == "evolution" else 0
    for place, candidate in enumerate(found.born):
        points[:, 0, group, place] = candidate.costs["ms"], candidate.score
        sizes[0, group, place] = counts(candidate.subnet)
    points[:, 0, 2, 0] = best.costs["ms"], best.score
    sizes[0, 2, 0] = counts(best.subnet)
    tap(CANDIDATES, points[0], "generation group candidate")
    tap(SCORES, points[1], "generation group candidate")
    tap(SIZES, sizes, "generation group candidate count")
    if by == "evolution":
        cost, score = np.array([(c.costs["ms"], c.score) for c in all_of], np.float32).T
        order = cost.argsort()
        order = order[front(cost.tolist(), score.tolist()).numpy()[order]]
        tap(FRONT, cost[order], "point", of="ms")
        tap(FRONT, score[order], "point", of="perplexity")
        tap(SHAPE, parts(best.subnet), "layer part", of="now")
        tap(BEST_MS, best.costs["ms"], "")
        tap(WEIGHTS, best.costs["MB"], "")
        tap(LOOKS, len(all_of), "", by="now", seed=0)
        tap(BEST, best.score, "", by="now", seed=0)
    tap(LIMIT, np.array([limits["ms"]] * 2), "end", of="ms")


def several(
    search: Search, limits: Mapping[str, float], best: Candidate, *, seed: int
) -> tuple[dict[str, Subnet], dict[str, float]]:
    """Two more budgets, one tighter and one roomier: the shape for each, and the budgets."""
    low, high = (search.costs["ms"](s) for s in (SPACE.smallest, SPACE.largest))
    ms = {"tight": (low + limits["ms"]) / 2, "yours": limits["ms"], "roomy": (limits["ms"] + high) / 2}
    found = {"smallest": SPACE.smallest, "yours": best.subnet, "largest": SPACE.largest}
    for name in TARGETS:
        tap(SHAPE, parts(best.subnet if name == "yours" else None), "layer part", of=name)
    for name in ("tight", "roomy"):
        for generation in search.evolved({**limits, "ms": ms[name]}, seed):
            found[name] = generation.best.subnet
            tap(SHAPE, parts(found[name]), "layer part", of=name)
            step(label=f"{name}, generation {generation.number + 1}")
    return {name: found[name] for name in FINAL}, ms


def extracted(search: Search, shapes: Mapping[str, Subnet], budgets: Mapping[str, float], ids: Any) -> dict[str, Any]:
    """Take every shape out as a model of its own; time them in turns, and read texts that no search saw."""
    models = {name: extract(search.model, subnet).eval() for name, subnet in shapes.items()}
    times = list(zip(*laps(search.model, list(shapes.values()), ids, repeats=FINAL_LAPS), strict=True))
    final: dict[str, dict[str, float]] = {}
    for (name, model), ms in zip(models.items(), times, strict=True):
        final[name] = {
            "ms": min(ms), "median": median(ms), "foretold": search.costs["ms"](shapes[name]),
            "MB": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
            "parameters": sum(p.numel() for p in model.parameters()),
            "perplexity": search.read(shapes[name]),
        }  # fmt: skip
        for figure in ("ms", "MB", "perplexity"):
            tap(ONE, final[name][figure], "", of=figure, model=name)
    tap(FINAL_MS, np.array([f["ms"] for f in final.values()]), "model", of="timed")
    tap(FINAL_MS, np.array([f["foretold"] for f in final.values()]), "model", of="foretold")
    tap(FINAL_PPL, np.array([f["perplexity"] for f in final.values()]), "model")
    every = [f["perplexity"] for f in final.values()]
    note(final=final, budgets=dict(budgets), shapes={n: [list(s.heads), list(s.ffn_width)] for n, s in shapes.items()})
    for name, limit in budgets.items():
        tap(LIMIT, np.array([limit] * 2), "end", of=name)
    tap(LIMIT, np.array([min(every), max(every)]), "end", of="all")
    same(search.model, models["yours"], shapes["yours"], search.unseen[:4])
    step(label="extracted")
    return models


def same(model: Any, made: Any, subnet: Subnet, ids: Any) -> None:
    """How far logits are apart that should be equal: the largest subnet's from the supernet's, the extracted model's
    from those in place, and the supernet's from those with its heads and neurons sorted."""
    with record(keep={}):  # what is compared is no part of the picture
        whole, place = model(ids), run(model, ids, subnet)
        pairs = {
            "largest": (run(model, ids, SPACE.largest), whole),
            "extracted": (made(ids), place),
            "sorted": (sort_channels(copy.deepcopy(model))(ids), whole),
        }
    apart = {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}
    for name, far in apart.items():
        tap(APART, far, "", of=name)
    note(apart=apart, logit=float(whole.abs().max()))


def speak(models: Mapping[str, Any], prompt: Sequence[int]) -> dict[str, list[int]]:
    """The models go on from the prompt, a word each in turns; what each says."""
    tap(PROMPT, np.array(prompt[1:], np.int32), "token")  # all but the start token
    saying = {name: generate(model, list(prompt), steps=WORDS, cache=Full()) for name, model in models.items()}
    said: dict[str, list[int]] = {name: [] for name in models}
    for _ in range(WORDS):
        for name, words in saying.items():
            with record(keep={}):  # a word of one model is no step
                said[name].append(next(words))
            tap(SAID, np.array(said[name][-1:], np.int32), "token", model=name)
        step()
    note(said=said)
    return said


def _sum(recording: Recording, counted: Any) -> tuple[tuple[str, str], ...]:
    """What a shape is foretold to take, part by part."""
    base, layer, head, neuron = recording.meta["price"]
    layers, heads, neurons = (int(n) for n in counted)
    total = base + layer * layers + head * heads + neuron * neurons
    return (
        ("to start", f"{base:.3f} ms"),
        (f"{layers} layers · {layer:.4f}", f"{layer * layers:.3f} ms"),
        (f"{heads} heads · {head:.4f}", f"{head * heads:.3f} ms"),
        (f"{neurons} neurons · {neuron:.5f}", f"{neuron * neurons:.3f} ms"),
        ("foretold", f"{total:.3f} ms"),
    )


def timed_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """A timed shape: its foretold time, part by part, and what it took."""
    group, shape = at["group"], at["shape"]
    took = float(recording.track(TIMED).latest()[group, shape])
    told = float(recording.track(FORETOLD).latest()[group, shape])
    return Arithmetic(
        title=("a shape that set the prices", "a shape that it had not seen")[group],
        lines=(
            *_sum(recording, recording.track(COUNTS).latest()[group, shape]),
            ("timed, the shortest lap", f"{took:.3f} ms"),
            ("off by", f"{told / took - 1:+.1%}"),
        ),
        values={"took": took},
    )


def candidate_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """A candidate: what it is foretold to take, and how it reads."""
    place = at["generation"], at["group"], at["candidate"]
    score = float(recording.stack(SCORES)[place])
    if not math.isfinite(score):
        raise ValueError("no such candidate")
    limit = recording.meta["limit"]
    return Arithmetic(
        title=("drawn by chance", "bred by evolution", "the best so far")[at["group"]],
        lines=(
            *_sum(recording, recording.stack(SIZES)[place]),
            ("allowed", f"{limit:.3f} ms"),
            ("perplexity", f"{score:.3f}"),
        ),
        values={"score": score},
    )
