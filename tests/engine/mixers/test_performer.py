"""FAVOR+: unbiased, and which features have the smaller error. Statistics state their samples and their tolerance."""

import pytest
import torch

from engine.mixers.linear import chunked, divide, implied_attention, parallel, recurrent, with_ones
from engine.mixers.performer import (
    FLOOR,
    Favor,
    gaussian_omega,
    orthogonal_omega,
    performer,
    positive_error,
    positive_features,
    running_estimates,
    softmax_kernel,
    trigonometric_error,
    trigonometric_features,
)
from engine.recording import record

from .common import SHAPE, rand

D = 8
X, Y = 0.25 * rand(5, D, seed=3), 0.25 * rand(5, D, seed=4)  # lengths near 0.7, as those of heads after D^(-1/4)
KINDS = {
    "positive": (positive_features, positive_error),
    "trigonometric": (trigonometric_features, trigonometric_error),
}


def estimates(features, draw, *, count, draws, seed=0):
    """`draws` independent estimates of exp(x·y) for the five pairs, by `count` features each: [draws, 5]."""
    found = []
    for i in range(draws):
        omega = draw(count, D, seed=seed + i)
        found.append((features(X, omega) * features(Y, omega)).sum(-1))
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", [gaussian_omega, orthogonal_omega])
def test_the_estimate_is_unbiased(kind, draw):
    """2,000 draws of 16 features: the mean is within 4.5 standard errors of exp(x·y), 1 in 30,000 by chance."""
    found = estimates(KINDS[kind][0], draw, count=16, draws=2000)
    exact = (X * Y).sum(-1).exp()
    error = found.std(0) / found.shape[0] ** 0.5
    assert ((found.mean(0) - exact).abs() < 4.5 * error).all()
    assert (error < 0.02 * exact).all()  # so that a bias of a tenth could not hide


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_that_of_lemma_2(kind):
    """Independent features: the measured mean squared error over 20,000 draws is within 12% of the closed form."""
    features, error = KINDS[kind]
    omega = gaussian_omega(20000 * 4, D, seed=5)
    products = features(X, omega) * features(Y, omega) * len(omega)  # 5 draws*4, or twice that
    products = products.view(5, -1, len(omega)).sum(1).view(5, -1, 4).mean(-1)
    measured = (products - (X * Y).sum(-1, keepdim=True).exp()).square().mean(-1)
    torch.testing.assert_close(measured, error(X, Y, count=4), rtol=0.12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_orthogonal_features_have_the_smaller_error(kind):
    """Section 2.4: 4,000 draws of one block of 8. On average over the pairs the variance falls by a fifth or more."""
    features = KINDS[kind][0]
    free = estimates(features, gaussian_omega, count=D, draws=4000, seed=10).var(0)
    square = estimates(features, orthogonal_omega, count=D, draws=4000, seed=10).var(0)
    assert (square / free).mean() < 0.8
    assert (square < 1.05 * free).all()


def test_positive_features_are_better_where_attention_is_small():
    """Lemma 2: as x nears -y the positive error goes to 0 and the trigonometric one does not; at x = y it is the other
    way round."""
    x = rand(1, D, seed=6)
    x = 1.5 * x / x.norm()
    assert positive_error(x, -x, count=1).item() < 1e-12
    assert trigonometric_error(x, -x, count=1).item() > 10
    assert trigonometric_error(x, x, count=1).item() < 1e-12
    assert positive_error(x, x, count=1).item() > 10
    omega = gaussian_omega(64, D, seed=7)
    exact = softmax_kernel(x, -x)
    positive, trigonometric = (f(x, omega) @ f(-x, omega).mT for f in (positive_features, trigonometric_features))
    assert (positive - exact).abs() < 1e-12
    assert (trigonometric - exact).abs() > 0.05
    assert (trigonometric_features(x, omega) < 0).any()  # of either sign: a sum of weights may be near 0
    assert (positive_features(x, omega) > 0).all()


def test_orthogonal_rows_are_orthogonal_and_as_long_as_gaussian_ones():
    omega = orthogonal_omega(2 * D + 3, D, seed=1)
    assert omega.shape == (19, D)
    for block in omega.split(D):
        products = block @ block.mT
        assert (products - products.diagonal().diag()).abs().max() < 1e-12
    torch.testing.assert_close(omega.norm(dim=-1), gaussian_omega(19, D, seed=1).norm(dim=-1), rtol=1e-12, atol=0)
    # Every coordinate of a row is N(0, 1): 3,000 rows, mean within 4.5 standard errors, variance within 10%.
    rows = torch.cat([orthogonal_omega(D, D, seed=i) for i in range(375)])
    assert rows.mean(0).abs().max() < 4.5 / 3000**0.5
    assert (rows.var(0) - 1).abs().max() < 0.1


def test_more_features_tighten_the_estimate():
    """The error falls with the root of the count: from 16 to 1,024 features it shrinks 4 to 16 times (8 expected)."""
    q, k = 0.25 * rand(12, D, seed=8), 0.25 * rand(12, D, seed=9)
    with record() as recorder:
        found = running_estimates(q, k, gaussian_omega(1024, D, seed=2), features=positive_features)
    exact = softmax_kernel(q, k)
    error = (found - exact).square().mean((1, 2)).sqrt()
    assert 4 < error[15] / error[1023] < 16
    recording = recorder.freeze()
    assert recording.track("performer.estimate").stack().shape == (1024, 12, 12)
    assert (recording.track("performer.kernel").latest() == exact.numpy()).all()
    waves = running_estimates(q, k, gaussian_omega(64, D, seed=2), features=trigonometric_features)
    omega = gaussian_omega(64, D, seed=2)
    whole = trigonometric_features(q, omega) @ trigonometric_features(k, omega).mT
    torch.testing.assert_close(waves[-1], whole, rtol=0, atol=1e-12)
    assert waves.shape == (64, 12, 12)


def test_causal_prefix_sums_equal_the_masked_matrix():
    favor = Favor(6, count=10, seed=0).double()
    q, k, v = rand(2, 2, 13, 6), rand(2, 2, 13, 6, seed=1), rand(2, 2, 13, 6, seed=2)
    phi_q, phi_k = favor(q, query=True), favor(k)
    quadratic = implied_attention(phi_q, phi_k) @ v
    for y in (
        parallel(phi_q, phi_k, with_ones(v)),
        recurrent(phi_q, phi_k, with_ones(v))[0],
        chunked(phi_q, phi_k, with_ones(v), chunk=5)[0],
    ):
        torch.testing.assert_close(divide(y), quadratic, rtol=0, atol=1e-12)


@pytest.mark.parametrize("features", [positive_features, trigonometric_features])
def test_rescaling_queries_leaves_the_answer(features):
    """`free_scale` multiplies a query's features by one number, which the division cancels."""
    omega = gaussian_omega(32, 6, seed=0)
    q, k, v = rand(9, 6) / 2, rand(9, 6, seed=1) / 2, rand(9, 6, seed=2)
    plain, free = (
        divide(parallel(features(q, omega, free_scale=scale), features(k, omega), with_ones(v)))
        for scale in (False, True)
    )
    torch.testing.assert_close(plain, free, rtol=1e-9, atol=1e-9)


def test_with_many_features_it_is_softmax_attention():
    """20,000 orthogonal features: every weight within 0.02 of softmax attention's over the same keys."""
    favor = Favor(6, count=20000, seed=0).double()
    q, k = rand(1, 12, 6) / 2, rand(1, 12, 6, seed=1) / 2
    later = torch.ones(12, 12, dtype=torch.bool).triu(1)
    softmax = (q @ k.mT / 6**0.5).masked_fill(later, -torch.inf).softmax(-1)
    found = implied_attention(favor(q, query=True), favor(k))
    assert (found - softmax).abs().max() < 0.02


def test_long_keys_do_not_divide_by_zero():
    """In float32 the features of a key of length 40 vanish; the floor keeps the sum above 0."""
    favor = Favor(6, count=8, seed=0)
    q, k = torch.full((1, 4, 6), 40.0), torch.full((1, 4, 6), -40.0)
    y = divide(parallel(favor(q, query=True), favor(k), with_ones(torch.ones(1, 4, 6))))
    assert y.isfinite().all()
    assert favor(k).min() >= FLOOR / 8**0.5 * 0.999


def test_seeds_and_layers_draw_differently():
    a, b, c = (performer(SHAPE, i, count=4, seed=s).features.omega for i, s in ((0, 0), (1, 0), (0, 1)))
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(a, performer(SHAPE, 0, count=4, seed=0).features.omega)
    assert "features.omega" in performer(SHAPE, 0, count=4).state_dict()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="count must be a whole number from 1 on, not 0"):
        performer(SHAPE, 0, count=0)
    with pytest.raises(ValueError, match="width must be a whole number from 1 on, not 0"):
        orthogonal_omega(3, 0, seed=0)
    for features in (positive_features, trigonometric_features):
        with pytest.raises(ValueError, match=r"omega must have shape \[features, 8\] to fit x, not \[4, 6\]"):
            features(X, gaussian_omega(4, 6, seed=0))
