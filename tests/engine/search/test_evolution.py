"""Oracle: a small space looked through to the end. Laws: nobody is over budget; the front is what no other beats;
evolution finds the optimum of an objective that is known."""

import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.evaluate import perplexity, surprisal
from engine.model import Decoder, Shape
from engine.recording import record
from engine.search import evolution
from engine.search.evolution import cross, draw_at_random, evolve, front, mutate, quality, shrink
from engine.search.supernet import Space, Subnet, extract

SPACE = Space(layers=(1, 2, 3), heads=(2, 4), ffn_width=(8, 16, 24))
WIDE = Space(layers=(2, 3, 4, 5), heads=(1, 2, 3, 4), ffn_width=(8, 16, 24, 32))


def size(subnet: Subnet) -> float:
    return 10 * subnet.layers + 4 * sum(subnet.heads) + sum(subnet.ffn_width)


def toy(subnet: Subnet) -> float:
    """Falls with all sizes, most with heads in front and neurons behind: the best use of a budget is not even."""
    gain = sum(3 * h / (i + 1) + w * (i + 1) / 12 for i, (h, w) in enumerate(zip(*_both(subnet), strict=True)))
    return 100 - gain - 3 * subnet.layers


def _both(subnet):
    return subnet.heads, subnet.ffn_width


def every(space: Space):
    for layers in space.layers:
        for heads in product(space.heads, repeat=layers):
            for widths in product(space.ffn_width, repeat=layers):
                yield Subnet(heads, widths)


@pytest.mark.parametrize("limit", [60, 80, 110])
def test_the_known_optimum_is_found(limit):
    assert sum(1 for _ in every(SPACE)) == SPACE.count
    fitting = [s for s in every(SPACE) if size(s) <= limit]
    found = list(evolve(SPACE, score=toy, costs={"size": size}, budget={"size": limit}, population=20, generations=8))
    assert found[-1].best.score == toy(found[-1].best.subnet) == min(map(toy, fitting))
    assert limit < 100 or sum(len(g.born) for g in found) < 0.8 * len(fitting)  # without looking at all of them


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), limit=st.integers(48, 250), population=st.integers(2, 12))
def test_nobody_is_over_budget_or_looked_at_twice(seed, limit, population):
    calls = []

    def score(subnet):
        calls.append(subnet)
        return toy(subnet)

    costs = {"size": size, "layers": lambda s: s.layers}
    budget = {"size": limit, "layers": 4}
    found = list(evolve(WIDE, score=score, costs=costs, budget=budget, population=population, generations=3, seed=seed))
    born = [c for g in found for c in g.born]
    assert all(c.costs["size"] <= limit and c.costs["layers"] <= 4 for c in born)
    assert all(
        c.costs == {"size": size(c.subnet), "layers": c.subnet.layers} and c.score == toy(c.subnet) for c in born
    )
    assert calls == [c.subnet for c in born]
    assert len(set(calls)) == len(calls)
    best = [g.best.score for g in found]
    assert best == [min(c.score for c in born if c.generation <= g.number) for g in found]
    sizes = [len(g.born) for g in found]
    drawn = list(draw_at_random(WIDE, score=toy, costs=costs, budget=budget, sizes=sizes, seed=seed))
    assert all(c.costs["size"] <= limit for g in drawn for c in g.born)


def test_evolution_beats_chance_at_as_many_looks():
    wins = 0
    for seed in range(10):
        common = {"score": toy, "costs": {"size": size}, "budget": {"size": 150}, "seed": seed}
        bred = list(evolve(WIDE, **common, population=24, generations=8))
        drawn = list(draw_at_random(WIDE, **common, sizes=[len(g.born) for g in bred]))
        assert sum(len(g.born) for g in bred) == sum(len(g.born) for g in drawn)
        wins += bred[-1].best.score < drawn[-1].best.score
    assert wins >= 9


def test_it_can_be_stopped_and_its_seed_tells_all():
    def firsts(seed):
        running = evolve(WIDE, score=toy, costs={"size": size}, budget={}, population=6, generations=10**6, seed=seed)
        return [next(running).born for _ in range(3)]

    assert firsts(1) == firsts(1) != firsts(2)


def test_a_budget_that_none_meets_tells_the_smallest():
    least = size(SPACE.smallest)
    for limit in (least - 1, 0, float("nan")):
        with pytest.raises(ValueError, match=f"budget\\['size'\\] must be at least {least:.4g}"):
            evolve(SPACE, score=toy, costs={"size": size}, budget={"size": limit})
        with pytest.raises(ValueError, match="what the smallest costs"):
            draw_at_random(SPACE, score=toy, costs={"size": size}, budget={"size": limit}, sizes=[1])
    only = list(evolve(SPACE, score=toy, costs={"size": size}, budget={"size": least}, population=5, generations=3))
    assert [c.subnet for g in only for c in g.born] == [SPACE.smallest]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"population": 1}, "population"),
        ({"generations": 0}, "generations"),
        ({"parents": 1.5}, "parents"),
        ({"mutation": -0.1}, "mutation"),
        ({"mutants": 2}, "mutants"),
        ({"budget": {"bytes": 3}}, "budget must limit"),
        ({"costs": {}}, "budget must limit"),
    ],
)
def test_errors(changes, words):
    given_ = {"score": toy, "costs": {"size": size}, "budget": {"size": 200}, **changes}
    with pytest.raises(ValueError, match=words):
        evolve(SPACE, **given_)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_children_stay_in_the_space(seed):
    rng = random.Random(seed)
    one, other = WIDE.draw(rng), WIDE.draw(rng)
    for child in (mutate(one, WIDE, chance=0.5, rng=rng), cross(one, other, rng=rng)):
        assert child.layers in WIDE.layers
        assert set(child.heads) <= set(WIDE.heads)
        assert set(child.ffn_width) <= set(WIDE.ffn_width)
    assert mutate(one, WIDE, chance=0, rng=rng) == one
    child = cross(one, other, rng=rng)
    assert child.layers in (one.layers, other.layers)
    for i, (heads, width) in enumerate(zip(child.heads, child.ffn_width, strict=True)):
        assert heads in [p.heads[i] for p in (one, other) if i < p.layers]
        assert width in [p.ffn_width[i] for p in (one, other) if i < p.layers]
    if one != WIDE.smallest:
        less = shrink(one, WIDE, rng=rng)
        assert size(less) < size(one)
        assert less.layers in WIDE.layers


def test_the_smallest_cannot_shrink():
    with pytest.raises(ValueError, match="cannot shrink"):
        shrink(SPACE.smallest, SPACE, rng=random.Random(0))


@given(points=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_front_by_definition(points):
    def beaten(a):
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in points)

    cost, score = (torch.tensor(axis) for axis in zip(*points, strict=True))
    assert front(cost, score).tolist() == [not beaten(a) for a in points]


def test_quality_is_the_perplexity_of_the_extracted_model():
    shape = Shape(vocab=50, width=32, layers=3, heads=4, kv_heads=4, head_width=8, ffn_width=24, max_positions=64)
    model = Decoder(shape, seed=1).double().requires_grad_(False)
    model.embed.weight *= 20
    ids = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    subnet = Subnet((2, 4), (8, 16))
    measured = quality(model, ids)
    assert measured(subnet) == pytest.approx(perplexity(surprisal(extract(model, subnet), ids)), rel=1e-12)
    assert measured(subnet) != measured(SPACE.largest)
    for bad in (ids[0], ids[:, :1], ids[:0]):
        with pytest.raises(ValueError, match="ids must have shape"):
            quality(model, bad)


def test_quality_against_a_subnet_is_the_cross_entropy_with_what_it_expects():
    shape = Shape(vocab=50, width=32, layers=3, heads=4, kv_heads=4, head_width=8, ffn_width=24, max_positions=64)
    model = Decoder(shape, seed=1).double().requires_grad_(False)
    model.embed.weight *= 20
    ids = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    subnet, teacher = Subnet((2, 4), (8, 16)), Subnet((4, 4, 4), (24, 24, 24))
    measured = quality(model, ids, against=teacher)
    expected = model(ids[:, :-1]).softmax(-1).flatten(0, 1)
    for one in (subnet, teacher):
        loss = torch.nn.functional.cross_entropy(extract(model, one)(ids[:, :-1]).flatten(0, 1), expected)
        assert measured(one) == pytest.approx(float(loss.exp()), rel=1e-12)
    assert measured(teacher) < measured(subnet)  # nobody knows better what it expects


def test_what_a_lesson_sees():
    with record() as recorder:
        found = list(evolve(WIDE, score=toy, costs={"size": size, "layers": lambda s: s.layers}, budget={"size": 200},
                            population=8, generations=4))  # fmt: skip
    recording = recorder.freeze()
    born = [c for g in found for c in g.born]
    assert recording.steps == 4
    assert recording.stack(evolution.COST, cost="size").tolist() == [size(c.subnet) for c in born]
    assert recording.stack(evolution.SCORE).tolist() == pytest.approx([c.score for c in born])
    told = recording.happened("search.candidate")
    assert [tuple(e.fields["heads"]) for e in told] == [c.subnet.heads for c in born]
    assert [e.fields["generation"] for e in told] == [c.generation for c in born]
    last = recording.track(evolution.FRONT).latest()
    points = torch.tensor([[size(c.subnet), c.score] for c in born], dtype=torch.float64)
    assert last.tolist() == front(points[:, 0], points[:, 1]).tolist()
    assert last.any()
    assert recording.stack(evolution.BEST).tolist() == pytest.approx([g.best.score for g in found])
