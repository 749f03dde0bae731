"""Routers: who is chosen, what the gates add up to, who is dropped, and the losses, against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from engine.moe.router import ExpertChoice, TopK, balance_loss, z_loss
from tests.engine.moe.common import randn

sizes = st.tuples(st.integers(1, 30), st.integers(1, 9))


@given(sizes, st.integers(0, 2**31), st.data())
def test_the_gates_of_the_likeliest_sum_to_one(size, seed, data):
    N, E = size
    k = data.draw(st.integers(1, E))
    routing = TopK(k)(randn(N, E, seed=seed))
    assert torch.allclose(routing.gates.sum(-1), torch.ones(N).double(), rtol=0, atol=1e-12)
    assert (routing.chosen.sum(-1) == k).all()
    assert ((routing.gates > 0) == routing.chosen).all()
    least = routing.probabilities.masked_fill(~routing.chosen, 2).amin(-1)
    most = routing.probabilities.masked_fill(routing.chosen, -1).amax(-1)
    assert (least >= most).all()
    # A softmax over the chosen logits is their probabilities over the sum of these.
    kept = routing.probabilities * routing.chosen
    assert torch.allclose(routing.gates, kept / kept.sum(-1, keepdim=True), rtol=0, atol=1e-12)
    plain = TopK(k, renormalise=False)(randn(N, E, seed=seed))
    assert torch.equal(plain.gates, kept)


@given(sizes, st.integers(0, 2**31), st.sampled_from([0.3, 0.5, 1.0, 1.25, 2.0]), st.data())
def test_capacity_drops_whom_a_loop_drops(size, seed, capacity, data):
    N, E = size
    k = data.draw(st.integers(1, E))
    logits = randn(N, E, seed=seed)
    routing = TopK(k, capacity=capacity)(logits)
    places = [math.ceil(capacity * k * N / E)] * E
    sent = torch.zeros(N, E, dtype=torch.bool)
    order = logits.argsort(-1, descending=True)
    for choice in range(k):  # first choices before second ones
        for token in range(N):
            e = int(order[token, choice])
            if places[e]:
                places[e] -= 1
                sent[token, e] = True
    assert torch.equal(routing.sent, sent)
    assert torch.equal(routing.dropped, routing.chosen & ~sent)
    assert torch.equal(routing.gates, TopK(k)(logits).gates * sent)
    assert torch.equal(routing.chosen, TopK(k)(logits).chosen)


@given(sizes, st.integers(0, 2**31), st.data())
def test_infinite_capacity_drops_nothing(size, seed, data):
    N, E = size
    k = data.draw(st.integers(1, E))
    logits = randn(N, E, seed=seed)
    logits[:, 0] += 100 * (seed % 2)  # all want the first
    for capacity in (None, math.inf, float(E)):
        routing = TopK(k, capacity=capacity)(logits)
        assert not routing.dropped.any()
        assert torch.equal(routing.gates, TopK(k)(logits).gates)


@given(sizes, st.integers(0, 2**31), st.data())
def test_expert_choice_is_even_and_takes_the_likeliest(size, seed, data):
    N, E = size
    per_token = data.draw(st.floats(0.1, E))
    routing = ExpertChoice(per_token)(randn(N, E, seed=seed))
    count = math.ceil(per_token * N / E)
    assert (routing.load == count).all()
    for e in range(E):
        taken, p = routing.chosen[:, e], routing.probabilities[:, e]
        assert taken.all() or p[taken].min() >= p[~taken].max()
    assert torch.equal(routing.gates, routing.probabilities * routing.chosen)


def test_expert_choice_sees_the_future_and_top_k_does_not():
    logits = randn(8, 4)
    changed = torch.cat([logits[:7], 9 * randn(1, 4, seed=5)])
    first = [route(x).chosen[:7] for route in (ExpertChoice(1.0), TopK(2)) for x in (logits, changed)]
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[2], first[3])


@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(1, 4))
def test_the_balance_loss_is_that_of_transformers_over_k(N, seed, k):
    logits = randn(N, 4, seed=seed).float()
    theirs = load_balancing_loss_func((logits,), 4, top_k=k)
    assert float(balance_loss(TopK(k)(logits))) * k == pytest.approx(float(theirs), rel=1e-5)


def test_the_balance_loss_is_one_when_even_and_the_experts_count_when_collapsed():
    even = torch.eye(6).double().repeat(3, 1) * 1e-9  # each expert first for as many tokens, all as likely
    for k in (1, 6):
        assert float(balance_loss(TopK(k)(even))) == pytest.approx(1)
    collapsed = torch.zeros(10, 6).double()
    collapsed[:, 2] = 100
    assert float(balance_loss(TopK(1)(collapsed))) == pytest.approx(6)
    assert float(balance_loss(ExpertChoice(2.0)(randn(12, 6)))) == pytest.approx(1)


def test_the_gradient_of_the_balance_loss_evens_out():
    logits = torch.zeros(10, 3).double()
    logits[:, 0] = 1
    logits.requires_grad_(True)
    balance_loss(TopK(1)(logits)).backward()
    assert (logits.grad[:, 0] > 0).all(), "a step down should make the busiest expert less likely"
    assert (logits.grad[:, 1:] < 0).all()


def test_the_z_loss_is_the_mean_square_of_the_log_of_the_sum():
    assert float(z_loss(torch.zeros(5, 4))) == pytest.approx(math.log(4) ** 2)
    logits = randn(7, 3)
    assert float(z_loss(logits)) == pytest.approx(
        sum(math.log(sum(map(math.exp, r))) ** 2 for r in logits.tolist()) / 7
    )


def test_bad_input_is_named():
    for call, words in [
        (lambda: TopK(0), "k must be a number of experts above 0, not 0"),
        (lambda: TopK(2, capacity=0.0), "capacity must be a factor above 0.* not 0.0"),
        (lambda: TopK(2, capacity=math.nan), "capacity must be a factor above 0.* not nan"),
        (lambda: TopK(4)(randn(5, 3)), "k must be at most the number of experts, 3, not 4"),
        (lambda: TopK(1)(randn(0, 3)), r"logits must have shape \[tokens, experts\] with a value"),
        (lambda: TopK(1)(randn(3)), r"logits must have shape \[tokens, experts\]"),
        (lambda: ExpertChoice(0.0), "per_token must be a number of experts above 0, not 0"),
        (lambda: ExpertChoice(3.5)(randn(5, 3)), "per_token must be at most the number of experts, 3, not 3.5"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
