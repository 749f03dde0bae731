"""Oracles: weights counted in the extracted model, scipy's Spearman. Laws: a made sum is found again exactly; no term
falls below zero; timings that follow the sizes are ranked as they are."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from engine.model import Decoder, Shape
from engine.recording import record
from engine.search import latency
from engine.search.latency import Predictor, compare, fit, laps, parameters, rank_correlation, timings
from engine.search.supernet import Space, Subnet, extract

SPACE = Space(layers=(2, 3, 4, 5), heads=(2, 4), ffn_width=(8, 16, 24, 32))


def some(count: int, seed: int = 0) -> list[Subnet]:
    rng = random.Random(seed)
    return [SPACE.draw(rng) for _ in range(count)]


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.floats(0.01, 5)] * 4))
def test_a_made_sum_is_found_again(weights):
    truth = Predictor(*weights)
    found = fit(some(30), [truth(s) for s in some(30)])
    for subnet in some(20, seed=1):
        assert found(subnet) == pytest.approx(truth(subnet), rel=1e-6)
    assert (found.base, found.layer, found.head, found.neuron) == pytest.approx(weights, rel=1e-4, abs=1e-6)


def test_no_term_falls_below_zero():
    subnets = some(30)
    falling = [20.0 - s.layers + 0.05 * sum(s.ffn_width) for s in subnets]
    found = fit(subnets, falling)
    assert min(found.base, found.layer, found.head, found.neuron) >= 0
    assert found.neuron > 0
    larger = Subnet((*subnets[0].heads, 4), (*subnets[0].ffn_width, 8))
    assert found(larger) >= found(subnets[0])


def test_ranks_of_noisy_timings_agree():
    rng = random.Random(0)
    truth = Predictor(1.0, 0.5, 0.02, 0.004)
    noisy = [truth(s) * rng.uniform(0.97, 1.03) for s in some(60)]
    found = fit(some(60)[:30], noisy[:30])
    with record() as recorder:
        value = compare(found, some(60)[30:], noisy[30:])
    assert value > 0.95
    recording = recorder.freeze()
    assert recording.track(latency.MEASURED).latest().tolist() == pytest.approx(noisy[30:])
    assert recording.track(latency.PREDICTED).latest().tolist() == pytest.approx([found(s) for s in some(60)[30:]])
    assert compare(Predictor(9.0, 0.0, 0.0, 1.0), some(9), [-sum(s.ffn_width) for s in some(9)]) == pytest.approx(-1)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=20))
def test_rank_correlation_is_scipys(pairs):
    a, b = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs, strict=True))
    if len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        with pytest.raises(ValueError, match="two different values"):
            rank_correlation(a, b)
    else:
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("activation", "kv_heads"), [("swiglu", 4), ("gelu", 2), ("relu", 2)])
def test_parameters_are_those_of_the_extracted_model(activation, kv_heads, tied):
    shape = Shape(vocab=50, width=32, layers=5, heads=4, kv_heads=kv_heads, head_width=8, ffn_width=32,
                  activation=activation, tied=tied)  # fmt: skip
    model = Decoder(shape)
    for subnet in some(5):
        assert parameters(shape, subnet) == sum(p.numel() for p in extract(model, subnet).parameters())


def test_timings_are_of_the_subnets_in_their_order():
    shape = Shape(vocab=50, width=32, layers=24, heads=4, kv_heads=4, head_width=8, ffn_width=32)
    ids = torch.zeros(2, 8, dtype=torch.long)
    ms = timings(Decoder(shape).eval(), [Subnet.even(n, heads=2, ffn_width=8) for n in (24, 1)], ids, repeats=5)
    assert 0 < 3 * ms[1] < ms[0] < 10_000


def test_laps_come_one_by_one():
    shape = Shape(vocab=50, width=32, layers=5, heads=4, kv_heads=4, head_width=8, ffn_width=32)
    model, read = Decoder(shape).eval(), []
    running = laps(model, some(3), torch.zeros(1, 4, dtype=torch.long), repeats=3)
    for lap in running:
        read.append(lap)
        assert len(lap) == 3
        assert min(lap) > 0
    assert len(read) == 3
    assert len({tuple(lap) for lap in read}) == 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit(some(3), [1.0] * 3), "four at least"),
        (lambda: fit(some(5), [1.0] * 4), "as many"),
        (lambda: fit(some(4), [1.0, 2.0, 0.0, 1.0]), "above 0"),
        (lambda: fit(some(4), [1.0, 2.0, float("nan"), 1.0]), "above 0"),
        (lambda: rank_correlation(torch.ones(2), torch.ones(3)), "as long"),
        (lambda: rank_correlation(torch.ones(1), torch.ones(1)), "two at least"),
        (lambda: timings(None, [], torch.zeros(1, 1)), "subnets not empty"),
        (lambda: timings(None, some(1), torch.zeros(1, 1), repeats=0), "repeats"),
        (lambda: laps(None, [], torch.zeros(1, 1), repeats=1), "subnets not empty"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
