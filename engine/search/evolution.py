"""Evolution under a budget: keep the best, change them a little, pair them, and look again.

The search of Once-for-all (Cai et al. 2020, arXiv:1908.09791, section 3.4), after Real et al.'s "Regularized Evolution"
(arXiv:1802.01548). Paper -> here: accuracy predictor = `score`, lower is better (perplexity, really measured); latency
lookup table = one of `costs`; parent ratio = `parents`; mutation probability = `mutation`; a mutated child instead of a
paired one with `mutants`.
Shapes: a generation's candidates are one axis; costs go by name.
Errors: ValueError for a budget that not even the smallest subnet meets, with its figure, and for settings out of range.
Deviations: the papers throw a candidate over budget away and draw again; here it is made smaller step by step until it
fits, so that tight budgets cost no more. The best stay as parents however old they are (the "regularised" part, dying
of age, is left out, as in Once-for-all). Scores are measured, not predicted, and no candidate is measured twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.evaluate import perplexity
from engine.model import Decoder
from engine.recording import event, site, step, tap
from engine.search.supernet import Space, Subnet, run

COST = site("search.cost", "what each new candidate costs", grows="candidate", low=0.0)
SCORE = site("search.score", "perplexity of each new candidate on held-out text", grows="candidate", low=1.0)
FRONT = site("search.front", "whether a candidate found so far is beaten by none in cost and score", low=0.0, high=1.0)
BEST = site("search.best", "the lowest perplexity found so far within the budget", low=1.0)

Cost = Callable[[Subnet], float]
TRIES = 50  # children drawn in search of one that nobody saw yet, before a small space counts as exhausted


@dataclass(frozen=True)
class Candidate:
    """A subnet that was looked at: what it costs by name, and its score (lower is better)."""

    subnet: Subnet
    costs: Mapping[str, float]
    score: float
    generation: int


@dataclass(frozen=True)
class Generation:
    """What one generation brought, and the best so far."""

    number: int
    born: list[Candidate]
    best: Candidate


def quality(model: Decoder, ids: Tensor, *, against: Subnet | None = None) -> Callable[[Subnet], float]:
    """The perplexity on held-out ids [B, T] of subnets run in place.

    With `against`, the surprisal of a word is not that of the one that came, but the mean over all that this subnet
    expects: a short text then tells more, since the luck of single words is out of it.
    """
    if ids.dim() != 2 or ids.shape[1] < 2 or not len(ids):
        raise ValueError(f"ids must have shape [batch, tokens] with two tokens at least, not {list(ids.shape)}")

    @torch.no_grad()
    def logits(subnet: Subnet) -> Tensor:
        made = run(model, ids[:, :-1].to(model.embed.weight.device), subnet)  # B T-1 V
        return made.to(torch.promote_types(made.dtype, torch.float32))

    expected = None if against is None else logits(against).softmax(-1)

    def measured(subnet: Subnet) -> float:
        found = logits(subnet)
        if expected is None:
            told = found.gather(-1, ids[:, 1:, None].to(found.device))[..., 0]  # B T-1
        else:
            told = (expected * found).sum(-1)
        return perplexity(found.logsumexp(-1) - told)

    return measured


def evolve(
    space: Space,
    *,
    score: Callable[[Subnet], float],
    costs: Mapping[str, Cost],
    budget: Mapping[str, float],
    population: int = 24,
    generations: int = 8,
    parents: float = 0.25,
    mutants: float = 0.5,
    mutation: float = 0.1,
    seed: int = 0,
) -> Iterator[Generation]:
    """Yield generation by generation; whoever has seen enough stops asking.

    The first is drawn at random; each later one has `population` less its parents of new children. No candidate is over
    `budget`, which limits some of the `costs`. These must not fall as a subnet grows. The plane of the front is the
    first of `costs` against the score.
    """
    _check(space, costs, budget)
    for name, value in (("parents", parents), ("mutants", mutants), ("mutation", mutation)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, not {value}")
    if population < 2 or generations < 1:
        raise ValueError(f"population must be 2 or more and generations 1 or more, not {population} and {generations}")
    return _evolve(space, score, costs, budget, population, generations, parents, mutants, mutation, seed)


def _evolve(space: Space, score: Cost, costs: Mapping[str, Cost], budget: Mapping[str, float], population: int,
            generations: int, parents: float, mutants: float, mutation: float,
            seed: int) -> Iterator[Generation]:  # fmt: skip
    rng = random.Random(f"evolve {seed}")
    seen: dict[Subnet, Candidate] = {}
    elders = min(population - 1, max(1, round(parents * population)))
    for number in range(generations):
        best = sorted(seen.values(), key=lambda c: c.score)[:elders]

        def child(best: list[Candidate] = best) -> Subnet:
            if not best:
                return space.draw(rng)
            one, other = rng.choice(best).subnet, rng.choice(best).subnet
            if rng.random() < mutants:
                return mutate(one, space, chance=mutation, rng=rng)
            return cross(one, other, rng=rng)

        yield _generation(number, child, seen, population - len(best), space, score, costs, budget, rng)


def draw_at_random(space: Space, *, score: Callable[[Subnet], float], costs: Mapping[str, Cost],
                   budget: Mapping[str, float], sizes: list[int], seed: int = 0) -> Iterator[Generation]:  # fmt: skip
    """The contrast: as many candidates a generation as `sizes` says, each drawn at random within the budget."""
    _check(space, costs, budget)
    if not sizes or min(sizes) < 0 or not sizes[0]:
        raise ValueError(f"sizes must be numbers of candidates, the first above 0, not {sizes}")
    rng = random.Random(f"random {seed}")
    seen: dict[Subnet, Candidate] = {}
    return (
        _generation(number, lambda: space.draw(rng), seen, size, space, score, costs, budget, rng)
        for number, size in enumerate(sizes)
    )


def mutate(subnet: Subnet, space: Space, *, chance: float, rng: random.Random) -> Subnet:
    """Depth, and each layer's heads and neurons, drawn anew with probability `chance`; new layers are drawn."""
    layers = rng.choice(space.layers) if rng.random() < chance else subnet.layers
    genes: list[tuple[int, ...]] = []
    for old, sizes in ((subnet.heads, space.heads), (subnet.ffn_width, space.ffn_width)):
        genes.append(tuple(
            rng.choice(sizes) if i >= subnet.layers or rng.random() < chance else old[i]
            for i in range(layers)
        ))  # fmt: skip
    return Subnet(*genes)


def cross(one: Subnet, other: Subnet, *, rng: random.Random) -> Subnet:
    """The depth of either, and each layer's heads and neurons from either that has the layer."""
    layers = rng.choice((one.layers, other.layers))
    heads, widths = [], []
    for i in range(layers):
        having = [parent for parent in (one, other) if i < parent.layers]
        heads.append(rng.choice(having).heads[i])
        widths.append(rng.choice(having).ffn_width[i])
    return Subnet(tuple(heads), tuple(widths))


def shrink(subnet: Subnet, space: Space, *, rng: random.Random) -> Subnet:
    """One size smaller somewhere: a layer less, or fewer heads or neurons in one layer. Raises at the smallest."""
    smaller: list[Subnet] = []
    if subnet.layers > space.layers[0]:
        depth = space.layers[space.layers.index(subnet.layers) - 1]
        smaller.append(Subnet(subnet.heads[:depth], subnet.ffn_width[:depth]))
    for i in range(subnet.layers):
        heads, widths = list(subnet.heads), list(subnet.ffn_width)
        if heads[i] > space.heads[0]:
            less = [*heads[:i], space.heads[space.heads.index(heads[i]) - 1], *heads[i + 1 :]]
            smaller.append(Subnet(tuple(less), tuple(widths)))
        if widths[i] > space.ffn_width[0]:
            less = [*widths[:i], space.ffn_width[space.ffn_width.index(widths[i]) - 1], *widths[i + 1 :]]
            smaller.append(Subnet(tuple(heads), tuple(less)))
    if not smaller:
        raise ValueError(f"subnet must not be the smallest of its space, which cannot shrink: {subnet}")
    return rng.choice(smaller)


def front(cost: Tensor | Sequence[float], score: Tensor | Sequence[float]) -> Tensor:
    """Which points [N] no other beats: as cheap and as good, and better in one of the two."""
    cost, score = torch.as_tensor(cost), torch.as_tensor(score)
    if cost.dim() != 1 or cost.shape != score.shape:
        raise ValueError(f"cost and score must be as long, not of shapes {list(cost.shape)} and {list(score.shape)}")
    no_worse = (cost[:, None] <= cost) & (score[:, None] <= score)  # i no worse than j
    better = (cost[:, None] < cost) | (score[:, None] < score)
    return ~(no_worse & better).any(0)


def _generation(number: int, child: Callable[[], Subnet], seen: dict[Subnet, Candidate], count: int, space: Space,
                score: Cost, costs: Mapping[str, Cost], budget: Mapping[str, float],
                rng: random.Random) -> Generation:  # fmt: skip
    born: list[Candidate] = []
    for _ in range(count):
        for _ in range(TRIES):
            subnet = child()
            while any(costs[name](subnet) > limit for name, limit in budget.items()):
                subnet = shrink(subnet, space, rng=rng)
            if subnet not in seen:
                break
        else:
            break  # next to nothing new within the budget
        found = Candidate(subnet, {name: cost(subnet) for name, cost in costs.items()}, score(subnet), number)
        seen[subnet] = found
        born.append(found)
        event("search.candidate", generation=number, layers=subnet.layers, heads=list(subnet.heads),
              ffn_width=list(subnet.ffn_width), score=found.score, costs=dict(found.costs))  # fmt: skip
    best = min(seen.values(), key=lambda c: c.score)
    for name in costs:
        tap(COST, torch.tensor([c.costs[name] for c in born], dtype=torch.float64), "candidate", cost=name)
    tap(SCORE, torch.tensor([c.score for c in born], dtype=torch.float64), "candidate")
    first = next(iter(costs))
    points = torch.tensor([[c.costs[first], c.score] for c in seen.values()], dtype=torch.float64)
    tap(FRONT, front(points[:, 0], points[:, 1]), "candidate")
    tap(BEST, best.score, "")
    step(label=f"generation {number}")
    return Generation(number, born, best)


def _check(space: Space, costs: Mapping[str, Cost], budget: Mapping[str, float]) -> None:
    if not costs or not set(budget) <= set(costs):
        raise ValueError(f"budget must limit what costs has ({', '.join(costs) or 'nothing'}), not {', '.join(budget)}")
    for name, limit in budget.items():
        least = costs[name](space.smallest)
        if not least <= limit:
            raise ValueError(f"budget[{name!r}] must be at least {least:.4g}, what the smallest costs, not {limit:.4g}")
