"""Linear attention: one sum in three orders."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.cost import growth_exponent
from engine.mixers.linear import (
    LinearAttention,
    chunked,
    divide,
    elu_features,
    implied_attention,
    multiplications,
    parallel,
    recurrent,
    with_ones,
)
from engine.recording import record

from .common import SHAPE, decoder, in_parts, multiplied, rand, tokens


def by_hand(q, k, v):
    """Equation 9 with three loops, no matrix product: the oracle."""
    y = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for i in range(q.shape[-2]):
        weights = [(q[..., i, :] * k[..., j, :]).sum(-1, keepdim=True) for j in range(i + 1)]
        y[..., i, :] = sum(w * v[..., j, :] for j, w in enumerate(weights)) / sum(weights)
    return y


@given(T=st.integers(1, 24), chunk=st.integers(1, 30), D=st.integers(1, 5), E=st.integers(1, 5))
def test_three_orders_of_one_sum(T, chunk, D, E):
    q, k, v = elu_features(rand(2, 3, T, D)), elu_features(rand(2, 3, T, D, seed=1)), rand(2, 3, T, E, seed=2)
    expected = by_hand(q, k, v)
    (one, S), (other, R) = recurrent(q, k, with_ones(v)), chunked(q, k, with_ones(v), chunk=chunk)
    for y in (parallel(q, k, with_ones(v)), one, other):
        torch.testing.assert_close(divide(y), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(S, R, rtol=0, atol=1e-12)
    assert S.shape == (2, 3, D, E + 1)  # whatever T
    torch.testing.assert_close(S[..., -1], k.sum(-2), rtol=0, atol=1e-12)  # z of equation 11


@given(sizes=st.lists(st.integers(1, 7), min_size=2, max_size=4), chunk=st.integers(1, 5))
def test_a_carried_state_stands_for_the_past(sizes, chunk):
    q, k, v = rand(1, 2, sum(sizes), 4), rand(1, 2, sum(sizes), 4, seed=1), rand(1, 2, sum(sizes), 3, seed=2)
    S, y = None, []
    for number, part in enumerate(zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)):
        found, S = recurrent(*part, S) if number % 2 else chunked(*part, S, chunk=chunk)
        y.append(found)
    torch.testing.assert_close(torch.cat(y, 2), parallel(q, k, v), rtol=0, atol=1e-12)


def test_features_are_elu_plus_one_and_never_zero():
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    torch.testing.assert_close(elu_features(x), F.elu(x) + 1, rtol=0, atol=1e-15)
    torch.testing.assert_close(elu_features(x)[0], torch.tensor(-30.0).double().exp(), rtol=1e-12, atol=0)
    assert (F.elu(x.float()) + 1 == 0).any()  # what the plain formula does in float32
    assert (elu_features(x.float()) > 0).all()
    x.requires_grad_()
    gradient = torch.autograd.grad(elu_features(x * 40).sum(), x)[0]
    assert gradient.isfinite().all()


def test_the_implied_attention_gives_the_answer():
    q, k, v = elu_features(rand(2, 9, 4)), elu_features(rand(2, 9, 4, seed=1)), rand(2, 9, 3, seed=2)
    weights = implied_attention(q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9).double(), rtol=0, atol=1e-13)
    assert (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights @ v, by_hand(q, k, v), rtol=0, atol=1e-12)


def test_recorded_states_and_patterns_explain_the_output():
    """The last recorded matrix is the carried state, token by token it grows by one outer product, and the pattern
    times the values is what the matrix answers."""
    model, ids = decoder(lambda i: LinearAttention(SHAPE, i, chunk=4)), tokens(11)
    cache = Full()
    with torch.no_grad(), record() as recorder:
        in_parts(model, ids, [9, 1, 1], cache)
    recording = recorder.freeze()
    S = torch.tensor(recording.stack("linear.state", layer=1))  # 1 H T F D
    v = torch.tensor(recording.stack("attention.v", layer=1))
    k = elu_features(torch.tensor(recording.stack("attention.k", layer=1)))
    torch.testing.assert_close(S[:, :, -1], cache.states[1][..., :-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(S[:, :, 1:] - S[:, :, :-1], k[:, :, 1:, :, None] * v[:, :, 1:, None], rtol=0, atol=1e-12)
    pattern = torch.tensor(recording.track("linear.pattern", layer=1).chunks[0].array)  # of the first pass
    mass = torch.tensor(recording.stack("linear.mass", layer=1))
    q = elu_features(torch.tensor(recording.stack("attention.q", layer=1)))
    answer = torch.einsum("bhtf,bhtfd->bhtd", q, S) / (q * mass).sum(-1, keepdim=True)
    torch.testing.assert_close((pattern @ v[:, :, :9]), answer[:, :, :9], rtol=0, atol=1e-12)
    assert len(recording.track("linear.pattern", layer=1).chunks) == 1
    softmax = torch.tensor(recording.track("linear.softmax", layer=1).chunks[0].array)
    torch.testing.assert_close(softmax.sum(-1), torch.ones(1, 2, 9).double(), rtol=0, atol=1e-12)


@given(T=st.integers(1, 30), chunk=st.integers(1, 12), D=st.integers(1, 6), E=st.integers(1, 6))
def test_multiplications_are_those_executed(T, chunk, D, E):
    q, k, v = rand(1, T, D), rand(1, T, D, seed=1), rand(1, T, E, seed=2)
    assert multiplied(lambda: parallel(q, k, v)) == multiplications("parallel", T, D, E)
    assert multiplied(lambda: recurrent(q, k, v)) == multiplications("recurrent", T, D, E)
    assert multiplied(lambda: chunked(q, k, v, chunk=chunk)) == multiplications("chunked", T, D, E, chunk=chunk)
    assert multiplied(lambda: (q @ k.mT).softmax(-1) @ v) == multiplications("softmax", T, D, E)


def test_work_grows_as_claimed_and_crosses_at_the_width():
    """O(n d²) against O(n² d): exponents 1 and 2 in n, and equal at n = d."""
    lengths = [64, 128, 256, 512]
    for form, exponent in (("softmax", 2), ("parallel", 2), ("recurrent", 1), ("chunked", 1)):
        counts = [multiplications(form, n, 32, 32, chunk=16) for n in lengths]
        assert abs(growth_exponent(lengths, counts) - exponent) < 1e-9
    for d in (8, 64):
        assert multiplications("softmax", d, d, d) == multiplications("recurrent", d, d, d)
        assert multiplications("softmax", d + 1, d, d) > multiplications("recurrent", d + 1, d, d)
        assert multiplications("softmax", d - 1, d, d) < multiplications("recurrent", d - 1, d, d)


def test_bad_input_is_named():
    q, k, v = rand(1, 4, 3), rand(1, 4, 3), rand(1, 4, 2)
    for form in (parallel, recurrent, lambda *x: chunked(*x, chunk=2)):
        for bad in ((q[:, :0], k[:, :0], v[:, :0]), (q, k[..., :2], v), (q, k, v[:, :3])):
            with pytest.raises(ValueError, match="q, k and v must have shapes"):
                form(*bad)
    with pytest.raises(ValueError, match="chunk must be a whole number from 1 on, not 0"):
        chunked(q, k, v, chunk=0)
    with pytest.raises(ValueError, match="chunk must be a whole number from 1 on, not 0"):
        LinearAttention(SHAPE, 0, chunk=0)
    with pytest.raises(ValueError, match="not 'serial'"):
        multiplications("serial", 1, 1, 1)
    with pytest.raises(ValueError, match="T must be a whole number from 1 on, not 0"):
        multiplications("parallel", 0, 1, 1)
