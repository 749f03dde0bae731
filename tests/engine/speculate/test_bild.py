"""Big Little Decoder against its loop written out without caches, its two ends, and its label."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.generate import generate
from engine.recording import record
from engine.speculate import bild
from engine.speculate.bild import big_little
from tests.engine.speculate.test_chain import toy


def by_hand(big, small, prompt, steps, fallback, rollback, most):
    """Algorithm 1 on whole texts: no cache, one word at a time."""
    text, verified, last = list(prompt), len(prompt), len(prompt) + steps
    while verified < last:
        p = small(torch.tensor([text]))[0, -1].softmax(-1)
        guessed = len(text) - verified
        if float(p.max()) >= fallback and guessed < most and len(text) < last - 1:
            text.append(int(p.argmax()))
            continue
        rows = big(torch.tensor([text]))[0].log_softmax(-1)
        for at in range(verified, len(text)):
            if -float(rows[at - 1, text[at]]) > rollback:
                text = text[:at]
                break
        text.append(int(rows[len(text) - 1].argmax()))
        verified = len(text)
    return text[len(prompt) :]


@given(st.integers(0, 9), st.floats(0, 1), st.floats(0, 6), st.integers(1, 6))
@settings(max_examples=25)
def test_it_is_algorithm_1(seed, fallback, rollback, most):
    big, small = toy(seed, vocab=9), toy(seed + 20, vocab=9, layers=1)
    out = list(big_little(big, small, [1, 2], steps=15, fallback=fallback, rollback=rollback, most=most))
    assert out == by_hand(big, small, [1, 2], 15, fallback, rollback, most)


def test_its_ends():
    big, small = toy(1, vocab=9), toy(21, vocab=9, layers=1)
    plain = list(generate(big, [1, 2], steps=12, cache=Full()))
    assert list(big_little(big, small, [1, 2], steps=12, fallback=1.0)) == plain  # always unsure: the big one alone
    little = list(generate(small, [1, 2], steps=11, cache=Full()))
    unchecked = list(big_little(big, small, [1, 2], steps=12, fallback=0.0, rollback=math.inf, most=99))
    assert unchecked[:11] == little
    assert little != plain[:11]


def test_it_is_not_lossless_and_says_so():
    assert bild.LOSSLESS is False
    big, small = toy(1, vocab=9), toy(21, vocab=9, layers=1)
    plain = list(generate(big, [1, 2], steps=30, cache=Full()))
    assert list(big_little(big, small, [1, 2], steps=30, fallback=0.3, rollback=2.0)) != plain


def test_a_stricter_rollback_takes_back_more():
    big, small = toy(1, vocab=9), toy(21, vocab=9, layers=1)

    def passes(rollback):
        with record() as recorder:
            list(big_little(big, small, [1, 2], steps=40, fallback=0.0, rollback=rollback, most=5))
        recording = recorder.freeze()
        for at, far in recording.track("bild.distance").rows():
            outcome = recording.track("speculate.outcome").latest(at)
            assert (far[outcome == 1] <= rollback).all()
            assert not (outcome == 2).any() or far[outcome == 2][0] > rollback
        assert recording.stack("next.token").tolist()[0] == 2
        assert len(recording.stack("bild.by")) == 40
        return recording.steps

    assert passes(0.0) >= passes(1.0) > passes(math.inf)


def test_wrong_arguments():
    model = toy(1)
    for wrong in ({"steps": 0}, {"fallback": 1.5}, {"rollback": -1.0}, {"most": 0}, {"steps": 64}):
        with pytest.raises(ValueError, match=r"must|fit"):
            big_little(model, model, [1, 1], **{"steps": 3, **wrong})
