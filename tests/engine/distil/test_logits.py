"""Soft labels: F.kl_div as oracle, the gradient in closed form and its limit, nothing to learn from an equal."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.distil.logits import divergence, gradient, gradient_at_infinity, loss, soft, soften
from engine.recording import record
from tests.engine.quant.test_integer import randn

shapes = st.sampled_from([(1, 7), (5, 3), (2, 4, 11)])


def far(a, b):
    return float((a - b).detach().abs().max())


@settings(max_examples=40)
@given(shapes, st.floats(0.25, 16), st.floats(0, 1), st.integers(0, 2**31))
def test_the_loss_is_that_of_pytorch_and_its_gradient_the_closed_form(shape, t, alpha, seed):
    student, teacher = randn(*shape, seed=seed).mul(3).requires_grad_(), randn(*shape, seed=seed + 1) * 3
    targets = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(seed))
    terms = loss(student, teacher, targets, temperature=t, alpha=alpha)
    V = shape[-1]
    q, p = F.log_softmax(student / t, -1).reshape(-1, V), F.softmax(teacher / t, -1).reshape(-1, V)
    expected = F.kl_div(q, p, reduction="batchmean") * t * t
    assert far(terms.soft, expected) < 1e-12 * max(1, t * t)
    hard = F.cross_entropy(student.reshape(-1, V), targets.reshape(-1))
    assert far(terms.hard, hard) < 1e-14
    assert far(terms.total, alpha * expected + (1 - alpha) * hard) < 1e-11
    (slope,) = torch.autograd.grad(divergence(student, teacher, temperature=t), student)
    assert far(slope, gradient(student.detach(), teacher, temperature=t)) < 1e-12


@settings(max_examples=20)
@given(shapes, st.floats(0.25, 16), st.integers(0, 2**31))
def test_an_equal_has_nothing_to_teach(shape, t, seed):
    student = randn(*shape, seed=seed).requires_grad_()
    shifted = student.detach() + 3.0  # softmax does not notice
    for teacher in (student.detach().clone(), shifted):
        value = divergence(student, teacher, temperature=t)
        (slope,) = torch.autograd.grad(value, student)
        assert abs(float(value.detach())) < 1e-12
        assert float(slope.abs().max()) < 1e-13


def test_as_the_temperature_grows_logits_are_matched():
    student, teacher = randn(6, 9), randn(6, 9, seed=1)
    limit = gradient_at_infinity(student, teacher)
    errors = [far(gradient(student, teacher, temperature=t), limit) for t in (10.0, 100.0, 1000.0)]
    assert errors[2] < 2e-3 * float(limit.abs().max())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]  # as 1/T
    centred = (student - student.mean(-1, keepdim=True)).requires_grad_()
    goal = teacher - teacher.mean(-1, keepdim=True)
    (slope,) = torch.autograd.grad(F.mse_loss(centred, goal) / 2, centred)
    assert far(slope, limit) < 1e-15
    cold = gradient(student, teacher, temperature=0.001)
    assert far(cold * 6 / 0.001, soft(student, temperature=0.001) - soft(teacher, temperature=0.001)) < 1e-12


def test_the_likeliest_words_are_shown_at_each_temperature():
    logits = randn(40) * 4
    with record() as recorder:
        shown = soften(logits, temperatures=(0.5, 1.0, 8.0), top=5, of="teacher")
    kept = recorder.freeze()
    words = kept.track("distil.words", of="teacher").latest()
    assert words.tolist() == logits.topk(5).indices.tolist()
    assert far(shown[1], logits.softmax(-1)[torch.tensor(words)]) < 1e-15
    entropy = kept.track("distil.entropy").latest()
    assert entropy[0] < entropy[1] < entropy[2] < torch.tensor(40.0).log() + 1e-6
    p = logits.softmax(-1)
    assert entropy[1] == pytest.approx(-float((p * p.log()).sum()), abs=1e-12)


def test_bad_input_is_named():
    x, words = randn(2, 5), torch.tensor([0, 1])
    for call, said in [
        (lambda: soft(x, temperature=0.0), "temperature must be a number above 0"),
        (lambda: divergence(x, x, temperature=-1.0), "temperature must be a number above 0"),
        (lambda: divergence(x, x[:1]), "student and teacher must have one shape"),
        (lambda: loss(x, x, words, alpha=1.5), "alpha must be from 0 to 1, not 1.5"),
        (lambda: loss(x, x, words[:1]), r"targets must have shape \[2\], not \[1\]"),
        (lambda: soften(x, temperatures=(1.0,)), "logits must have shape"),
        (lambda: soften(x[0], temperatures=(), top=2), "temperatures must hold one"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
