"""The draft that reads the target's features: lossless, its cache right, its data the target's own, its training real."""

import pytest
import torch
from safetensors.torch import load_file

from engine.caches.full import Full
from engine.generate import generate
from engine.speculate import Dice, Verdict
from engine.speculate.draft import Feature, FeatureDraft, frequent, loss_of, make_data, train, write
from engine.speculate.loop import speculate
from engine.speculate.seeds import seeds
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


def test_seeds():
    some = seeds(50, seed=0)
    assert len(set(some)) == 50
    assert some == seeds(50, seed=0) != seeds(50, seed=1)
    assert sum(s.startswith("<|im_start|>user") for s in some) > 25
    assert len(set(seeds(3000, seed=0))) == 3000
    with pytest.raises(ValueError, match="count must"):
        seeds(0, seed=0)


def test_the_words_of_the_head():
    assert frequent(torch.tensor([[5, 5, 2], [2, 5, 7]]), vocab=9, count=3).tolist() == [2, 5, 7]
    assert frequent(torch.tensor([[5]]), vocab=9, count=3).tolist() == [0, 1, 5]
    with pytest.raises(ValueError, match="count must"):
        frequent(torch.tensor([[5]]), vocab=9, count=10)


def test_texts_are_the_targets_own():
    target = toy(3, vocab=9)
    prompts = torch.tensor([[1, 2], [3, 4], [5, 6]])
    ids, hidden = write(target, prompts, new=6, seed=0)
    assert ids.shape == (3, 8)
    assert torch.equal(ids[:, :2], prompts)
    assert (hidden - target.hidden(ids[:, :-1])).abs().max() < EXACT
    for row in (0, 2):
        assert ids[row, 2:].tolist() == list(generate(target, prompts[row], steps=6, cache=Full()))
    assert torch.equal(ids, write(target, prompts, new=6, seed=0)[0])


def test_data_and_training_go_on_where_they_stopped(tmp_path):
    target = toy(3, vocab=9).float()

    def encode(text):
        return [ord(letter) % 9 for letter in text[:6]]

    assert make_data(target, encode, tmp_path, batches=2, rows=4, new=10) == 2
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert make_data(target, encode, tmp_path, batches=3, rows=4, new=10) == 3
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}.items()

    def trained(folder, *stops):
        torch.manual_seed(0)
        model = Feature(target, torch.arange(9), ffn_width=12)
        for steps in stops:
            torch.manual_seed(1)
            assert train(model, tmp_path, steps=8, rows=4, checkpoint=folder / "c.safetensors", until=steps) == steps
        return model.state_dict()

    whole, halves = trained(tmp_path / "a", 8), trained(tmp_path / "b", 3, 8)
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_training_brings_it_closer(tmp_path):
    target = toy(3, vocab=9).float()
    make_data(target, lambda text: [ord(letter) % 9 for letter in text[:6]], tmp_path, batches=2, rows=16, new=20)
    torch.manual_seed(0)
    model = Feature(target, torch.arange(9))
    test = load_file(tmp_path / "0001.safetensors")

    def measured():
        with torch.no_grad():
            return loss_of(
                model, test["ids"].long(), test["hidden"].float(), generator=torch.Generator().manual_seed(0), eos=None
            )[1]

    before = measured()
    train(model, tmp_path, steps=60, rows=16, rate=3e-3, warmup=5)
    after = measured()
    assert after["divergence"] < 0.5 * before["divergence"]
    assert after["overlap"] > before["overlap"]


def test_a_draft_that_is_right_has_no_divergence():
    """Handed the law itself, the loss is 0 but for the features."""
    target = toy(3, vocab=9)
    model = feature(target)
    ids = torch.randint(0, 9, (2, 12), generator=torch.Generator().manual_seed(0))
    hidden = target.hidden(ids[:, :-1])
    model.forward = lambda features, following, cache=None: hidden[:, 1:]
    loss, figures = loss_of(model, ids, hidden, generator=torch.Generator().manual_seed(0), eos=None)
    assert abs(figures["divergence"]) < 1e-6
    assert figures["feature"] == 0
    assert figures["same"] == 1
    assert figures["overlap"] == pytest.approx(1.0, abs=1e-6)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
