"""Forms compared: they agree, the estimates are what lemma 2 says, counts cross where n = d."""

import pytest
import torch

from engine.mixers import linear
from engine.mixers.forms import (
    crossover,
    disagreement,
    errors,
    feature_map,
    heads_of,
    seconds,
    softmax_weights,
    weights,
    written,
)
from engine.mixers.performer import positive_error, softmax_kernel, trigonometric_error
from engine.mixers.softmax import SoftmaxAttention

from .common import SHAPE, decoder, rand, tokens

ONE = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize("name", ["elu", "positive", "trigonometric", "none"])
@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_the_forms_agree_and_the_state_implies_the_weights(name, decay):
    q, k, v = (rand(2, 13, 6, seed=s) for s in range(3))
    phi = feature_map(name, 6, count=8)
    gamma = torch.full((2,), decay, dtype=torch.float64)
    assert disagreement(phi(q), phi(k), v, decay=gamma, chunk=5) < 1e-12
    *_, S = written(phi(k), v, decay=gamma)
    found = phi(q)[:, -1:] @ S  # H 1 D+1
    made = weights(phi(q), phi(k), decay=gamma, normalised=phi.normalised)[:, -1:]
    torch.testing.assert_close(linear.divide(found) if phi.normalised else found[..., :-1], made @ v)


def test_many_positive_features_come_close_to_softmax():
    q, k = rand(1, 9, 6), rand(1, 9, 6, seed=5)
    phi = feature_map("positive", 6, count=40_000)
    made = weights(phi(q), phi(k), decay=ONE[:1], normalised=True)
    torch.testing.assert_close(made, softmax_weights(q, k), atol=0.06, rtol=0)


@pytest.mark.parametrize(("name", "lemma"), [("positive", positive_error), ("trigonometric", trigonometric_error)])
def test_errors_are_those_of_lemma_2(name, lemma):
    x, y = rand(1, 6, seed=1) / 3, rand(1, 6, seed=2) / 3
    measured = errors(x, y, name=name, count=16, orthogonal=False, draws=4000)
    expected = lemma(x, y, count=16) / softmax_kernel(x, y)[0, 0] ** 2
    torch.testing.assert_close(measured.squared[-1], expected[0], rtol=0.15, atol=0)
    assert abs(measured.bias) < 4 * measured.doubt


def test_orthogonal_features_err_less():
    x, y = rand(6, 8, seed=1) / 3, rand(6, 8, seed=2) / 3
    plain, turned = (errors(x, y, name="positive", count=8, orthogonal=o, draws=600) for o in (False, True))
    assert turned.squared[-1] < plain.squared[-1]
    assert plain.below == 0


def test_heads_are_those_that_attention_used():
    model = decoder(lambda layer: SoftmaxAttention(SHAPE, layer)).eval()
    q, k, v = heads_of(model, tokens(7), layer=1)
    assert q.shape == k.shape == v.shape == (2, 7, 6)
    torch.testing.assert_close(softmax_weights(q, k).sum(-1), torch.ones(2, 7, dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 12, 64])
def test_counts_cross_right_after_the_width(width):
    assert crossover(width) == width + 1
    counts = [linear.multiplications(form, width, width, width) for form in ("recurrent", "softmax")]
    assert counts[0] == counts[1]


def test_what_makes_no_sense_is_refused():
    assert seconds("chunked", 8, width=4, heads=1, chunk=4, tries=1) > 0
    with pytest.raises(ValueError, match="form"):
        seconds("fast", 8, width=4, heads=1, chunk=4)
    with pytest.raises(ValueError, match="name"):
        feature_map("relu", 6, count=4)
