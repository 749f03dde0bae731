"""Curves start from the whole model each time; timings are of three products that differ as they say."""

import copy
import math

import pytest
import torch

from engine.evaluate import perplexity, surprisal
from engine.prune import apply
from engine.prune.magnitude import by_chance, magnitude
from engine.prune.measure import curve, text_perplexity, timed, toyland_perplexity
from engine.prune.structured import cut, neurons_of
from engine.recording import record
from engine.toyland import Grammar
from engine.train import measure
from tests.engine.prune.test_masks import same
from tests.engine.quant.test_integer import tokens, toy


def test_a_curve_measures_each_share_on_the_whole_model():
    model, ids = toy(), tokens(12)[:1]
    before = copy.deepcopy(model)
    with record(keep={"prune.curve.*": {}}) as recorder:
        points = curve(lambda s: apply(model, magnitude(model, sparsity=s)), [0, 0.9, 0.5], text_perplexity(ids))
    assert same(model, before)
    assert [p.zeros for p in points] == pytest.approx([0, 0.9, 0.5], abs=1e-4)
    assert points[0].quality == perplexity(surprisal(model, ids))
    alone = apply(model, magnitude(model, sparsity=0.5))
    assert points[2].quality == perplexity(surprisal(alone, ids))
    shown = recorder.freeze()
    assert shown.stack("prune.curve.share") == pytest.approx([0, 0.9, 0.5])
    assert shown.stack("prune.curve.quality") == pytest.approx([p.quality for p in points])
    assert list(shown.labels) == ["0%", "90%", "50%"]
    smaller = curve(lambda s: cut(model, neurons=neurons_of(model, share=1 - s)), [0.0, 0.5], text_perplexity(ids))
    assert smaller[1].parameters < smaller[0].parameters == sum(p.numel() for p in model.parameters())
    assert smaller[1].zeros == 0


def test_toyland_perplexity_is_that_of_measure():
    model = toy(vocab=256).requires_grad_(False)
    grammar = Grammar()
    expected = measure(model, grammar, rows=2, length=24)["perplexity"]
    assert toyland_perplexity(grammar, rows=2, length=24)(model) == expected


def test_only_a_smaller_matrix_takes_less_time():
    for _ in range(8):  # a busy machine may interrupt one of them more often than the others
        took = timed(out=1024, width=1024, rows=64, sparsity=0.9, tries=9)
        if took.smaller < 0.6 * took.dense and 0.6 < took.zeros / took.dense < 1.6:
            break
    else:
        pytest.fail(f"in none of eight tries: {took}")
    assert all(math.isfinite(t) and t > 0 for t in (took.dense, took.zeros, took.smaller))


def test_bad_input_is_named():
    model = toy()
    for call, words in [
        (lambda: curve(lambda s: model, [], lambda m: 1.0), "shares must hold one share"),
        (lambda: curve(lambda s: model, [1.5], lambda m: 1.0), "share must be a number from 0 to 1"),
        (lambda: timed(out=0, width=4, rows=1, sparsity=0.5), "out must be a number above 0, not 0"),
        (lambda: timed(out=4, width=4, rows=1, sparsity=2), "sparsity must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.real
def test_smollm2_loses_less_by_magnitude_than_by_chance(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode("The sun rises in the east and sets in the west. " * 2)])
    whole, small = curve(lambda s: apply(model, magnitude(model, sparsity=s)), [0, 0.3], text_perplexity(ids))
    (chance,) = curve(lambda s: apply(model, by_chance(model, sparsity=s, seed=0)), [0.3], text_perplexity(ids))
    assert whole.quality < small.quality < chance.quality / 2
