"""A memory that learns what follows what: the delta rule, autograd, and less surprise the second time."""

import numpy as np
import pytest
import torch

from engine.mixers.following import following, word_vectors
from engine.recording import record

from .common import SHAPE, decoder, rand

VECTORS = torch.nn.functional.normalize(rand(9, 7), dim=1)
TEXT = [0, 1, 2, 3, 1, 2, 8, 1, 2]


def test_without_momentum_and_forgetting_it_is_the_delta_rule():
    M = np.zeros((7, 7))
    vectors = VECTORS.numpy()
    moments = list(following(VECTORS, TEXT, rate=0.3, momentum=0.0, forgetting=0.0))
    for t in range(1, len(TEXT)):
        k, v = vectors[TEXT[t - 1]], vectors[TEXT[t]]
        M = M + 0.6 * np.outer(k, v - k @ M)
        np.testing.assert_allclose(moments[t].memory.weights[0][0, 0], M, atol=1e-12)


def test_surprise_is_the_length_of_autograds_gradient():
    moments = list(following(VECTORS, TEXT, rate=0.2, momentum=0.4, forgetting=0.05))
    for t in range(1, len(TEXT)):
        M = moments[t - 1].memory.weights[0][0, 0].clone().requires_grad_()
        loss = (VECTORS[TEXT[t - 1]] @ M - VECTORS[TEXT[t]]).square().sum()
        (gradient,) = torch.autograd.grad(loss, M)
        assert abs(moments[t].surprise - float(gradient.norm())) < 1e-12


def test_the_second_time_surprises_less_and_the_answer_is_nearer():
    apart = torch.eye(9, dtype=torch.float64)  # words that have nothing in common
    moments = list(following(apart, TEXT, rate=0.3, momentum=0.0, forgetting=0.0))
    assert moments[8].surprise < moments[5].surprise < moments[2].surprise
    near = [float(moments[t].answers(apart, [1])[0, 2]) for t in (1, 2, 5, 8)]
    np.testing.assert_allclose(near, [0, 0.6, 0.84, 0.936])  # what is missed shrinks by 1 - 2 theta each time


def test_switched_off_it_learns_nothing_and_recording_changes_nothing():
    off = list(following(VECTORS, TEXT, rate=0.3, momentum=0.5, forgetting=0.1, learning=False))
    assert all(float(m.memory.weights[0].abs().max()) == 0 for m in off)
    plain = list(following(VECTORS, TEXT, rate=0.3, momentum=0.5, forgetting=0.1))
    with record() as recorder:
        shown = list(following(VECTORS, TEXT, rate=0.3, momentum=0.5, forgetting=0.1))
    assert torch.equal(plain[-1].memory.weights[0], shown[-1].memory.weights[0])
    assert len(recorder.freeze().track("following.surprise").chunks) == len(TEXT)


def test_word_vectors_have_length_one_and_nothing_in_common():
    vectors = word_vectors(decoder(None, shape=SHAPE), 12)
    assert vectors.shape == (12, SHAPE.width)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(12, dtype=torch.float64))
    with pytest.raises(ValueError, match="count must be from 2 to 17 words, not 18"):
        word_vectors(decoder(None), 18)


@pytest.mark.parametrize(("text", "knobs", "says"), [
    ([], {}, "one at least"), ([0, 9], {}, "from 0 to 8"), ([0, 1], {"rate": 1.5}, "rate must be between 0 and 1"),
    ([0, 1], {"forgetting": -0.1}, "forgetting must be"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(text, knobs, says):
    with pytest.raises(ValueError, match=says):
        list(following(VECTORS, text, **{"rate": 0.1, "momentum": 0.1, "forgetting": 0.1, **knobs}))
