"""Prompt lookup against a search written out, and its loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.generate import generate
from engine.recording import record
from engine.speculate import Dice
from engine.speculate.feature import FeatureDraft
from engine.speculate.lookup import Either, Lookup, follow
from engine.speculate.loop import speculate
from tests.engine.speculate.test_chain import EXACT, furthest_law, plain_law, toy
from tests.engine.speculate.test_feature import feature


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(1, 4), st.integers(1, 5), st.data())
def test_the_dict_finds_what_a_search_finds(text, longest, length, data):
    drafter = Lookup(length=length, longest=longest)
    for end in sorted(data.draw(st.sets(st.integers(1, len(text)))) | {len(text)}):  # the text grows in portions
        draft = drafter.draft(text[:end], room=100, temperature=0.0, dice=Dice(0))
        assert list(draft.tokens) == follow(text[:end], longest=longest, length=length)[0]
        assert draft.is_chain
        assert draft.laws is None


def test_the_longest_match_wins_and_then_the_latest():
    assert follow([1, 2, 3, 9, 2, 3, 8, 7, 2, 3], longest=3, length=2) == ([8, 7], 4, 2)
    assert follow([1, 2, 3, 9, 2, 8, 1, 2], longest=3, length=3) == ([3, 9, 2], 0, 2)
    assert follow([1, 2, 3], longest=3, length=2) == ([], -1, 0)
    assert follow([1, 1], longest=3, length=2) == ([1], 0, 1)


def test_a_short_end_may_be_ignored():
    draft = Lookup(shortest=2).draft([1, 2, 1], room=9, temperature=0.0, dice=Dice(0))
    assert len(draft) == 0


def test_no_more_than_there_is_room_for():
    assert Lookup(length=5).draft([1, 2, 3, 4, 1], room=2, temperature=0.0, dice=Dice(0)).tokens == (2, 3)


def test_it_is_lossless():
    target = toy(1)

    def work(dice):
        return list(speculate(target, [0, 1, 0, 1], steps=3, drafter=Lookup(), temperature=1.0, dice=dice))

    assert furthest_law(work, plain_law(target, [0, 1, 0, 1], 3, 1.0)) < EXACT


def test_what_cannot_be_looked_up_is_drafted():
    """Both hear of every pass: the model's features are whole when its turn comes. And it is lossless."""
    target = toy(1)
    model = feature(target)

    def drafter():
        return Either(Lookup(length=2, shortest=2), FeatureDraft(model, length=2))

    def work(dice):
        return list(speculate(target, [0, 1, 0], steps=3, drafter=drafter(), temperature=1.0, dice=dice))

    assert furthest_law(work, plain_law(target, [0, 1, 0], 3, 1.0)) < EXACT
    target = toy(2, vocab=9)
    model = feature(target)
    expected = list(generate(target, [1, 2, 3], steps=40, cache=Full()))
    with record() as recorder:
        assert list(speculate(target, [1, 2, 3], steps=40, drafter=drafter())) == expected
    recording = recorder.freeze()
    drafts = sum(e.fields["drafted"] > 0 for e in recording.happened("speculate.round"))
    assert 0 < len(recording.happened("speculate.lookup")) < drafts


def test_greedy_loops_are_looked_up():
    """A toy that repeats itself: the same words as the plain loop, in far fewer passes."""
    target = toy(2, vocab=9)
    expected = list(generate(target, [1, 2, 3], steps=40, cache=Full()))
    with record(keep={}) as recorder:
        assert list(speculate(target, [1, 2, 3], steps=40, drafter=Lookup())) == expected
    assert recorder.freeze().steps < 30


def test_wrong_arguments():
    with pytest.raises(ValueError, match="length must be"):
        Lookup(length=0)
    with pytest.raises(ValueError, match="shortest must be"):
        Lookup(longest=2, shortest=3)
    with pytest.raises(ValueError, match="shortest must be"):
        Lookup(shortest=0)


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_says_the_same_words(smollm2):
    """Word by word in float32, where a batch of rows and a single row may differ by rounding alone."""
    model, tokenizer = smollm2
    ids = tokenizer.prompt("Say it again. The cat sat on the mat. The cat sat on the mat. The cat")
    with torch.inference_mode():
        expected = list(generate(model, ids, steps=24, cache=Full()))
    with record(keep={}) as recorder:
        assert list(speculate(model, ids, steps=24, drafter=Lookup())) == expected
    assert recorder.freeze().steps < 24
