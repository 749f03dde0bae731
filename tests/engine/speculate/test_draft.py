"""How the draft is made: data of the target's own, training that goes on where it stopped, and the stored file."""

import pytest
import torch
from safetensors.torch import load_file

from engine.caches.full import Full
from engine.generate import generate
from engine.model import Decoder, Shape
from engine.speculate import draft
from engine.speculate.draft import about, frequent, load, loss_of, ship, train, untrained
from engine.speculate.feature import Feature, FeatureDraft
from engine.speculate.loop import speculate
from engine.speculate.seeds import seeds
from engine.speculate.texts import make_data, write
from engine.weights import ModelUnavailable
from tests.engine.speculate.test_chain import EXACT, toy
from tests.engine.speculate.test_feature import feature


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
        for number, steps in enumerate(stops):
            torch.manual_seed(number)  # what goes on starts from other weights and words than the checkpoint's
            model = Feature(target, torch.arange(6) + 3 * number, ffn_width=12)
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


def test_what_is_stored_comes_back(tmp_path):
    target = toy(3, vocab=9).float()
    model = feature(target, [0, 3, 4]).float()
    path = tmp_path / "draft.safetensors"
    assert ship(model, path, steps=7) == path.stat().st_size
    assert about(path)["steps"] == 7
    features, ids = torch.randn(1, 3, 16), torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        again = load(target, path)
        assert (again.logits(again(features, ids)) - model.logits(model(features, ids))).abs().max() < 0.05
        assert torch.equal(again.words, model.words)
    with pytest.raises(ModelUnavailable, match="made for a model of width 16"):
        load(toy(3, vocab=8), path)
    with pytest.raises(ModelUnavailable, match="missing"):
        load(target, tmp_path / "nothing.safetensors")


def test_an_untrained_draft_speaks_the_words_of_the_texts(tmp_path):
    target = toy(3, vocab=9).float()
    make_data(target, lambda text: [ord(letter) % 9 for letter in text[:6]], tmp_path, batches=2, rows=4, new=10)
    model = untrained(target, tmp_path, words=5, ffn_width=12)
    ids = load_file(tmp_path / "0000.safetensors")["ids"]
    assert model.words.tolist() == frequent(ids, vocab=9, count=5).tolist()
    for folder in (tmp_path / "none",):
        with pytest.raises(ValueError, match="call make_data first"):
            untrained(target, folder)
        with pytest.raises(ValueError, match="call make_data first"):
            train(model, folder, steps=1)


def test_the_draft_is_made_by_one_call(tmp_path, monkeypatch):
    shape = Shape(
        vocab=9, width=16, layers=1, heads=2, kv_heads=1, head_width=8, ffn_width=24, max_positions=256
    )  # fmt: skip
    target = Decoder(shape, seed=0).eval().requires_grad_(False)

    class Letters:
        eos = None

        def encode(self, text):
            return [ord(letter) % 9 for letter in text[:6]]

    monkeypatch.setattr(draft.checkpoints, "load", lambda name, **_: (target, Letters()))
    told = []
    path = tmp_path / "drafts" / "d.safetensors"
    size = draft.make(tmp_path, path=path, batches=2, steps=2, progress=lambda *said: told.append(said))
    assert size == path.stat().st_size
    assert told == [("texts", 1, 2), ("texts", 2, 2), ("training", 1, 2), ("training", 2, 2)]
    drafter = FeatureDraft(load(target, path), length=2)
    expected = list(generate(target, [1, 2], steps=9, cache=Full()))
    assert list(speculate(target, [1, 2], steps=9, drafter=drafter)) == expected
