"""The draft that reads the target's features: lossless, whatever it is; its caches leave no trace."""

import pytest
import torch

from engine.caches.full import Full
from engine.generate import generate
from engine.speculate import Dice, Verdict
from engine.speculate.feature import Feature, FeatureDraft
from engine.speculate.loop import speculate
from tests.engine.speculate.test_chain import EXACT, furthest_law, plain_law, toy


def feature(target, words=None, *, seed=0):
    torch.manual_seed(seed)
    words = torch.arange(target.shape.vocab) if words is None else torch.tensor(words)
    return Feature(target, words, ffn_width=12).double().requires_grad_(False)


@pytest.mark.parametrize("words", [None, [0, 2]])
@pytest.mark.parametrize("widths", [(1, 1), (2, 1)])
def test_the_loop_has_the_law_of_the_target(words, widths):
    """Also when the draft can say only some of the words."""
    target = toy(1)
    model = feature(target, words)

    def work(dice):
        drafter = FeatureDraft(model, widths=widths)
        return list(speculate(target, [0, 2], steps=3, drafter=drafter, temperature=1.0, dice=dice))

    assert furthest_law(work, plain_law(target, [0, 2], 3, 1.0)) < EXACT


@pytest.mark.parametrize("widths", [None, (3, 2), (1, 2, 2)])
def test_greedy_equals_the_plain_loop(widths):
    target = toy(2, vocab=9)
    expected = list(generate(target, [1, 2, 3], steps=20, cache=Full()))
    drafter = FeatureDraft(feature(target, [1, 3, 4, 8]), length=3, widths=widths)
    assert list(speculate(target, [1, 2, 3], steps=20, drafter=drafter)) == expected


def test_its_guesses_are_those_of_one_pass_over_everything():
    """Caches, portions and what was forgotten leave no trace: the first guess is that of the whole text read at once,
    the second that of the text with the first one's own feature at its end."""
    target = toy(2, vocab=9)
    model, text = feature(target), [1, 5, 3, 2, 7, 7, 1]
    hidden = target.hidden(torch.tensor([text]))[0]
    drafter = FeatureDraft(model, length=2)
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        drafter.told(None, Verdict([], [], 0, torch.ones(1)), hidden[start:stop])
        draft = drafter.draft(text[: stop + 1], room=9, temperature=0.0, dice=Dice(0))
        assert drafter.cache.seen == stop
    features, ids = hidden[None, :6], torch.tensor([text[1:]])
    own = model(features, ids)[:, -1:]
    first = int(model.logits(own).argmax())
    longer = model(torch.cat((features, own), 1), torch.tensor([[*text[1:], first]]))[0, -1]
    assert draft.tokens == (first, int(model.logits(longer).argmax()))


def test_it_must_have_been_told():
    target = toy(2)
    drafter = FeatureDraft(feature(target))
    drafter.told(None, None, torch.ones(2, 16).double())
    with pytest.raises(ValueError, match="was told of 2 tokens"):
        drafter.draft([1, 1, 1, 1], room=3, temperature=0.0, dice=Dice(0))
    with pytest.raises(ValueError, match="must be numbers above 0"):
        FeatureDraft(feature(target), length=0)
