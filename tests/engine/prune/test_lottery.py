"""The lottery ticket: exact sparsities, first values to the bit, and the same training for every contrast."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.model import Decoder
from engine.prune import enforce, everything, matrices, revived, sparsity
from engine.prune.glyphs import accuracy, network, pictures, trainer
from engine.prune.lottery import compare, draw, first_values, next_masks, rewound, shuffled
from engine.prune.magnitude import magnitude
from engine.recipes import Recipe, Stage
from engine.recording import record
from engine.train import train
from tests.engine.test_train import SMALL


def small(seed):
    return network(seed, hidden=(16,))


@pytest.fixture(scope="module")
def rounds():
    with record() as recorder:
        done = draw(small, trainer(steps=30, count=200), lambda m: accuracy(m, count=200), seed=3, rounds=4, share=0.2)
    return done, recorder.freeze()


def test_sparsity_is_one_minus_the_power(rounds):
    done, _ = rounds
    for one in done:
        for mask in one.masks.values():
            assert int(mask.sum()) == mask.numel() - round((1 - 0.8**one.number) * mask.numel())
        assert one.sparsity == pytest.approx(1 - 0.8**one.number, abs=2e-3)
    for before, after in pairwise(done):  # what is gone stays gone
        assert all((before.masks[n] >= after.masks[n]).all() for n in before.masks)


def test_the_ticket_starts_at_the_first_values_to_the_bit():
    model, start = small(3), first_values(small(3))
    masks = magnitude(model, sparsity=0.5)
    trainer(steps=20, count=100)(model, lambda m: enforce(m, masks))
    assert revived(model, masks) == 0
    assert all(not torch.equal(w, start[n]) for n, w in matrices(model).items())
    rewound(model, start, masks)
    for name, weight in matrices(model).items():
        assert torch.equal(weight[masks[name]], start[name][masks[name]])
        assert not weight[~masks[name]].any()
        assert torch.equal(start[name], matrices(small(3))[name])  # what training moved was never the start
    assert all(torch.equal(w, start[n]) for n, w in matrices(rewound(model, start, everything(model))).items())


def test_every_round_trains_from_the_start_with_its_mask_held(rounds):
    """`draw` done by hand for one round: same accuracy to the last picture."""
    done, _ = rounds
    train_it = trainer(steps=30, count=200)
    model = small(3)
    enforce(model, done[2].masks)
    train_it(model, lambda m: enforce(m, done[2].masks))
    assert accuracy(model, count=200) == done[2].quality["ticket"]
    other = small(3 + 2001)
    enforce(other, done[2].masks)
    train_it(other, lambda m: enforce(m, done[2].masks))
    assert accuracy(other, count=200) == done[2].quality["reinit"]
    worn = next_masks(model, done[2].masks, keep=0.8**3, scope="layer")
    assert all(torch.equal(worn[n], done[3].masks[n]) for n in worn)


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_shuffling_keeps_the_count_of_each_layer(seed, share):
    masks = magnitude(small(0), sparsity=share)
    other = shuffled(masks, seed=seed)
    assert all(int(masks[n].sum()) == int(other[n].sum()) for n in masks)
    if 0.2 < share < 0.8:
        assert any(not torch.equal(masks[n], other[n]) for n in masks)


def test_dead_weights_that_a_survivor_equals_stay_dead():
    """A survivor at exactly zero is no smaller than what was pruned before, and must not take its place."""
    model = small(0)
    masks = magnitude(model, sparsity=0.5, scope="layer")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    for scope in ("layer", "global"):
        after = next_masks(model, masks, keep=0.25, scope=scope)
        assert all((masks[n] >= after[n]).all() for n in masks)
        assert sparsity(after) == pytest.approx(0.75, abs=2e-3)


def test_taps_and_events_tell_the_story(rounds):
    done, shown = rounds
    assert shown.steps == 5
    assert shown.stack("lottery.sparsity", strategy="ticket") == pytest.approx([one.sparsity for one in done])
    assert shown.stack("lottery.quality", strategy="ticket") == pytest.approx([one.quality["ticket"] for one in done])
    assert len(shown.stack("lottery.quality", strategy="shuffled")) == 4
    assert [e.fields["round"] for e in shown.happened("lottery.rewound")] == [0, 1, 2, 3, 4]
    first = shown.track("prune.weight", linear="0", strategy="ticket").stack()
    assert (first == first[0]).all()  # every round starts where the first did


def test_it_works_for_a_decoder_and_the_engines_own_training():
    recipe = Recipe(lambda seed: Decoder(SMALL, seed=seed), "tiny", stages=(Stage(4, 2, 16),), warmup=1, rate=1e-2)
    found = compare(
        recipe.make,
        lambda model, after: train(model, recipe, after=after),
        lambda model: float(sum(float(w.abs().sum()) for w in matrices(model).values())),
        seeds=[0, 1],
        rounds=1,
        scope="global",
    )
    assert list(found) == [0, 1]
    assert found[0][1].quality["ticket"] != found[1][1].quality["ticket"]
    assert found[0][1].sparsity == pytest.approx(0.2, abs=1e-3)


def test_pictures_show_their_digits_and_unseen_ones_are_others():
    x, digits = pictures(400, seed=5)
    assert x.shape == (400, 36)
    assert len(digits.unique()) == 10
    again, _ = pictures(400, seed=5)
    other, _ = pictures(400, seed=6)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    ones = x[digits == 1].view(-1, 6, 6).sum((1, 2)).mean()
    assert ones < x[digits == 8].view(-1, 6, 6).sum((1, 2)).mean()  # a one has fewer strokes than an eight


def test_bad_input_is_named():
    train_it = trainer(steps=1, count=10)
    for call, words in [
        (lambda: draw(small, train_it, accuracy, seed=0, rounds=0), "rounds must be a number above 0, not 0"),
        (lambda: draw(small, train_it, accuracy, seed=0, rounds=1, share=1.0), "share must be between 0 and 1"),
        (lambda: draw(small, train_it, accuracy, seed=0, rounds=1, contrasts=["luck"]), "contrasts must be"),
        (lambda: draw(small, train_it, accuracy, seed=0, rounds=1, scope="row"), "scope must be"),
        (lambda: compare(small, train_it, accuracy, seeds=[], rounds=1), "seeds must hold"),
        (lambda: pictures(0, seed=0), "count must be"),
        (lambda: trainer(steps=0), "steps must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
