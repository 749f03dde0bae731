"""Adaptive length: the formula's optimum, both rules followed by hand, and the law unharmed."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import cost
from engine.recording import record
from engine.speculate import Dice, Drafter, Verdict, in_a_row
from engine.speculate.adaptive import Adaptive, best_length
from engine.speculate.chain import Chain
from engine.speculate.lookup import Lookup
from engine.speculate.loop import speculate
from tests.engine.speculate.test_chain import EXACT, furthest_law, plain_law, toy


@given(st.floats(0, 1), st.integers(0, 12))
def test_expected_tokens_is_the_mean_over_every_outcome(alpha, gamma):
    mean = sum((1 - alpha) * alpha**n * (n + 1) for n in range(gamma)) + alpha**gamma * (gamma + 1)
    assert cost.expected_tokens(alpha, gamma) == pytest.approx(mean, abs=1e-12)
    if alpha < 1:
        assert cost.expected_tokens(alpha, gamma) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha), rel=1e-6)


def test_published_speed_up():
    """Leviathan, table 1's form: alpha 0.8, gamma 5, c = 0.1: (1 - 0.8^6) / (0.2 * 1.5)."""
    assert cost.speculation_speedup(0.8, 5, cost=0.1) == pytest.approx((1 - 0.8**6) / (0.2 * 1.5))
    with pytest.raises(ValueError, match="alpha must"):
        cost.expected_tokens(1.5, 2)
    with pytest.raises(ValueError, match="cost must"):
        cost.speculation_speedup(0.5, 2, cost=-0.1)


def test_intensity_grows_with_what_is_checked():
    shape = toy(0).shape
    found = [cost.check_intensity(shape, drafted=n, context=20) for n in range(9)]
    assert all(a < b for a, b in itertools.pairwise(found))
    plain = cost.decode_flops(shape, context=20) / cost.decode_bytes(shape, context=20)
    assert found[0] == pytest.approx(plain)


def test_a_cheap_and_good_drafter_is_asked_for_more():
    assert best_length(0.0, 0.1, most=8) == 1
    assert best_length(1.0, 0.1, most=8) == 8
    assert best_length(0.9, 0.01, most=8) > best_length(0.5, 0.01, most=8) > 1
    assert best_length(0.8, 0.02, most=20) > best_length(0.8, 0.3, most=20)
    with pytest.raises(ValueError, match="most must"):
        best_length(0.5, 0.1, most=0)


class Told(Drafter):
    def __init__(self):
        self.length, self.heard = 2, []

    def draft(self, text, *, room, temperature, dice):
        return in_a_row([1] * min(self.length, room))

    def told(self, draft, verdict, hidden):
        self.heard.append(len(draft))


def told(drafter, accepted):
    draft = drafter.draft([0], room=99, temperature=0.0, dice=Dice(0))
    rejected = [accepted] if accepted < len(draft) else []
    drafter.told(draft, Verdict(list(range(accepted)), rejected, 0, torch.ones(1)), torch.ones(1, 1))
    return len(draft)


def test_two_up_one_down():
    inner = Told()
    drafter = Adaptive(inner, rule="steps", most=5)
    assert [told(drafter, n) for n in (2, 4, 5, 3, 0, 0, 0, 0, 0)] == [2, 4, 5, 5, 4, 3, 2, 1, 1]
    assert inner.heard == [2, 4, 5, 5, 4, 3, 2, 1, 1]


def test_alpha_moves_by_what_was_looked_at():
    drafter = Adaptive(Told(), alpha=0.5, memory=0.8, cost=0.05)
    told(drafter, 0)  # one guess was looked at
    assert drafter.alpha == pytest.approx(0.8 * 0.5)
    length, before = best_length(drafter.alpha, 0.05, most=8), drafter.alpha
    assert told(drafter, length) == length
    assert drafter.alpha == pytest.approx(0.8**length * before + 1 - 0.8**length)


def test_the_cost_is_measured():
    drafter = Adaptive(Told())
    told(drafter, 1)
    assert drafter.cost is not None
    assert 0 < drafter.cost < math.inf


@pytest.mark.parametrize("rule", ["expected", "steps"])
def test_it_is_lossless(rule):
    target, small = toy(1), toy(2, layers=1)

    def work(dice):
        drafter = Adaptive(Chain(small, length=1), rule=rule, most=2, cost=0.1)
        return list(speculate(target, [0], steps=3, drafter=drafter, temperature=1.0, dice=dice))

    assert furthest_law(work, plain_law(target, [0], 3, 1.0)) < EXACT


def test_what_is_recorded():
    with record() as recorder:
        list(speculate(toy(2, vocab=9), [1, 2], steps=20, drafter=Adaptive(Lookup())))
    lengths = recorder.freeze().stack("speculate.length")
    assert lengths.min() >= 1
    assert lengths.max() <= 8


def test_wrong_arguments():
    for wrong in ({"rule": "other"}, {"most": 0}, {"memory": 1.0}, {"alpha": 2.0}, {"cost": -1.0}):
        with pytest.raises(ValueError, match="must"):
            Adaptive(Lookup(), **wrong)
