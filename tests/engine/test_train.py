"""Training: stopped and resumed equals uninterrupted, bit for bit; what ships is what the manifest says."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import checkpoints, train, zoo
from engine.card import card
from engine.mimetic import mimetic
from engine.model import Decoder, Shape
from engine.recipes import Recipe, Stage
from engine.recording import record
from engine.toyland import Grammar, batch
from engine.weights import sha256, unfilled

SMALL = Shape(vocab=256, width=16, layers=2, heads=2, kv_heads=2, head_width=8, ffn_width=24, max_positions=256)
RECIPE = Recipe(
    lambda seed: Decoder(SMALL, seed=seed), "tiny", stages=(Stage(4, 2, 16), Stage(3, 2, 24)), warmup=2, rate=1e-2
)
ZOO = checkpoints.manifest()


class StoppedError(Exception):
    pass


def stop_after(steps):
    def progress(done, total, loss):
        if done == steps:
            raise StoppedError

    return progress


def trained(**options):
    model = RECIPE.make(RECIPE.seed)
    train.train(model, RECIPE, **options)
    return model.state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


@pytest.mark.parametrize("at", [1, 3, 4, 5, 6])
def test_resumed_equals_uninterrupted(tmp_path, at):
    """StoppedError at `at` of 7 steps, also at the border between stages; a checkpoint at every step."""
    with pytest.raises(StoppedError):
        trained(folder=tmp_path, every=-1.0, progress=stop_after(at))
    done = []
    resumed = trained(folder=tmp_path, progress=lambda step, *_: done.append(step))
    assert done == list(range(at + 1, 8)), "it should go on from the checkpoint, not from the start"
    assert same(resumed, trained())


def test_a_finished_run_is_not_run_again(tmp_path):
    first = trained(folder=tmp_path)
    assert same(trained(folder=tmp_path, progress=stop_after(1)), first)
    with pytest.raises(StoppedError):
        trained(folder=tmp_path, progress=stop_after(1), resume=False)


def test_no_pickle_and_no_leftovers(tmp_path):
    trained(folder=tmp_path, every=-1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "other recipe", "empty"])
def test_a_useless_checkpoint_means_a_fresh_start(tmp_path, damage):
    path = tmp_path / "checkpoint.safetensors"
    if damage == "other recipe":
        train.train(RECIPE.make(0), replace(RECIPE, rate=5e-3), folder=tmp_path)
    else:
        trained(folder=tmp_path)
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 1000])
    assert same(trained(folder=tmp_path), trained())


def test_recording_changes_nothing_and_shows_the_curve():
    with record() as recorder:
        seen = trained()
    recording = recorder.freeze()
    assert same(seen, trained())
    assert recording.steps == RECIPE.steps
    losses = recording.stack("train.loss")
    assert losses.shape == (7,)
    assert losses[0] == pytest.approx(math.log(256), abs=0.2)
    assert losses[-1] < losses[0]
    floors = recording.stack("train.floor")
    assert [math.exp(x) for x in floors] == pytest.approx([RECIPE.text(at).floor for at in range(7)], rel=1e-6)
    rates = recording.stack("train.rate")
    assert rates[0] == pytest.approx(RECIPE.rate / 2, rel=0.1)
    assert rates[-1] < rates[2]


def test_a_recorder_may_stop_it():
    def on_step(recorder):
        if recorder.step == 3:
            raise StoppedError

    with pytest.raises(StoppedError), record(on_step=on_step) as recorder:
        trained()
    assert recorder.so_far().steps == 3


def test_weights_follow_from_the_seed():
    one, other = (Decoder(SMALL, seed=seed) for seed in (1, 1))
    train.train(one, replace(RECIPE, seed=1))
    train.train(other, replace(RECIPE, seed=2))
    assert not same(one.state_dict(), other.state_dict()), "the texts should follow from the seed too"
    assert same(trained(), trained())


def test_steps_have_the_texts_of_their_stage():
    sizes = [tuple(RECIPE.text(at).ids.shape) for at in range(RECIPE.steps)]
    assert sizes == [(2, 16)] * 4 + [(2, 24)] * 3
    assert not torch.equal(RECIPE.text(0).ids, RECIPE.text(1).ids)


def test_rate_rises_then_falls_to_nothing():
    recipe = replace(RECIPE, stages=(Stage(1000, 2, 16),), warmup=100, rate=1.0)
    rates = [recipe.rate_at(at) for at in range(1000)]
    assert rates[0] == pytest.approx(0.01, rel=0.01)
    assert max(rates) == pytest.approx(1, abs=0.03)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_mimetic_heads_look_back_and_copy(kv_heads):
    """In the first layer heads 0, 1, 2 look 1, 2, 3 tokens back, the last nowhere; all copy what they look at."""
    shape = Shape(vocab=256, width=128, layers=2, heads=4, kv_heads=kv_heads, head_width=32, ffn_width=16)
    plain, model = Decoder(shape, seed=3), mimetic(Decoder(shape, seed=3), seed=5, gain=0.5)
    ids = torch.randint(0, 256, (2, 80), generator=torch.Generator().manual_seed(0))
    with record(keep={"attention.pattern": {"layer": 0}}) as recorder:
        logits = model(ids)
    pattern = recorder.freeze().stack("attention.pattern", layer=0)  # B H T T
    for head, offset in enumerate((1, 2, 3)):
        assert pattern[:, head].diagonal(-offset, 1, 2)[:, 8:].mean() > 0.8
    assert pattern[:, 3].diagonal(-1, 1, 2)[:, 8:].max() < 0.2
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        v = (x @ block.mixer.qkv.weight.T)[:, -32 * kv_heads :].view(200, kv_heads, 32)
        copied = v.repeat_interleave(4 // kv_heads, 1).reshape(200, 128) @ block.mixer.out.weight.T
        assert (copied * x).sum(-1).mean() / 128 == pytest.approx(0.5, rel=0.1)
    for name, value in plain.state_dict().items():
        touched = ".mixer." in name or name == "embed.weight"
        assert torch.equal(value, model.state_dict()[name]) != touched
    shift = model.embed.weight - plain.embed.weight / plain.embed.weight.norm(dim=1).mean()
    assert shift[0].norm() == pytest.approx(1, abs=1e-5)
    assert shift == pytest.approx(shift[:1].expand_as(shift), abs=1e-6), "one direction for all tokens"
    assert torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) < math.log(256) + 1
    assert same(model.state_dict(), mimetic(Decoder(shape, seed=3), seed=5, gain=0.5).state_dict())
    assert not same(model.state_dict(), mimetic(Decoder(shape, seed=3), seed=6, gain=0.5).state_dict())


def test_measure_is_cross_entropy_and_counts_only_answers():
    class Oracle(torch.nn.Module):
        """Knows the test texts by heart, except that it gets every second row's answers wrong."""

        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))
            self.rows = 0

        def forward(self, ids):
            test = batch(Grammar(), seed=0, step=0, rows=8, length=48, stream="test")
            nexts = test.ids[:, 1:].clone()
            wrong = test.answers[:, 1:] & (torch.arange(8)[:, None] % 2 == 0)
            nexts[wrong] = 255
            return torch.nn.functional.one_hot(nexts, 256) * 3.0

    test = batch(Grammar(), seed=0, step=0, rows=8, length=48, stream="test")
    found = train.measure(Oracle(), Grammar(), rows=8, length=48)
    assert found["recall"] == pytest.approx(float(test.answers[1::2].sum() / test.answers.sum()))
    wrong = float(test.answers[::2].sum()) / (8 * 47)
    assert found["loss"] == pytest.approx(math.log(math.e**3 + 255) - 3 * (1 - wrong), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["floor"] == test.floor


def test_train_to_assets_writes_weights_and_manifest(tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.RECIPES, "tiny", RECIPE)
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "manifest.json").write_text(json.dumps({"other": ZOO["toy"]}))
    entry = train.train_to_assets("tiny", folder=tmp_path / "zoo", work=tmp_path / "work")
    entries = json.loads((tmp_path / "zoo" / "manifest.json").read_text())
    assert entries == {"other": ZOO["toy"], "tiny": entry}
    assert "`tiny`" in (tmp_path / "zoo" / "README.md").read_text()
    path = tmp_path / "zoo" / "tiny.safetensors"
    assert entry["sha256"] == sha256(path)
    assert entry["bytes"] == path.stat().st_size
    assert entry["steps"] == 7
    assert entry["tokens"] == 4 * 32 + 3 * 48
    monkeypatch.setattr(checkpoints, "ZOO", tmp_path / "zoo")
    model, tokenizer = checkpoints.load("tiny", dtype=torch.float32, device="cpu")
    assert tokenizer.size == model.shape.vocab
    again = {name: value.half().float() for name, value in trained().items()}
    assert same(model.state_dict(), again)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (lambda: zoo.find("gpt"), "gpt"),
        (lambda: zoo.build("../toy"), "toy"),
        (lambda: Stage(0, 1, 8), "steps"),
        (lambda: Stage(1, 0, 8), "rows"),
        (lambda: Stage(1, 1, 1), "length"),
        (lambda: RECIPE.text(7), "7"),
    ],
)
def test_bad_input_is_named(wrong, names):
    with pytest.raises(ValueError, match=names):
        wrong()


# --- what ships -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_shipped_models_are_what_the_manifest_says(name):
    """Evaluated anew: the same texts, the same weights; other machines add in another order, hence 0.2%."""
    entry = ZOO[name]
    recipe = zoo.find(entry["recipe"])
    assert entry["data"] == train.data_digest(recipe), "the grammar changed since this model was trained"
    assert (entry["seed"], entry["steps"]) == (recipe.seed, recipe.steps)
    model, _ = checkpoints.load(name, dtype=torch.float32, device="cpu")
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]
    found = train.figures(model, recipe)
    assert found["perplexity"] == pytest.approx(entry["perplexity"], rel=2e-3)
    assert found["floor"] == pytest.approx(entry["floor"], abs=1e-4)
    assert found["recall"] == pytest.approx(entry["recall"], abs=5e-3)
    assert found["perplexity"] > found["floor"] * 0.99, "no model beats the grammar itself but by luck of the draw"


def test_the_card_says_what_the_manifest_says():
    assert (checkpoints.ZOO / "README.md").read_text() == card(ZOO)


def test_toys_that_are_compared_have_as_many_parameters():
    for name, recipe in zoo.RECIPES.items():
        count = sum(p.numel() for p in unfilled(lambda recipe=recipe: recipe.make(0)).parameters())
        if name.startswith("recall-"):
            assert count == pytest.approx(zoo.SMALL_PARAMETERS, rel=0.05), name
        elif name == "little":
            assert count < zoo.PARAMETERS / 5
        elif not name.startswith(("experts", "supernet")):
            assert count == pytest.approx(zoo.PARAMETERS, rel=0.05), name


def test_the_zoo_stays_small():
    folder = Path(checkpoints.ZOO)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 40e6
    assert {path.stem for path in folder.glob("*.safetensors")} == set(ZOO)
