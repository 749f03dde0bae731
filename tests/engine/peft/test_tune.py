"""Tuning side by side: only what is trained moves, each learns, floors are exact, taps change nothing."""

import math

import pytest
import torch

from engine.model import Decoder, Shape
from engine.peft import branch, deltas, detach, energy_within, key_of, rank_of, show, singular_values, trainable
from engine.peft import with_key as put_key
from engine.peft.habits import Score, knowing, refraining, said, score, speaking, telling
from engine.peft.tune import METHODS, RATES, make, tune
from engine.recording import record
from engine.toyland import Grammar, Tokenizer
from tests.engine.quant.test_integer import randn, tokens, toy

WORDS = Tokenizer()
SHAPE = Shape(vocab=256, width=32, layers=2, heads=2, kv_heads=1, head_width=16, ffn_width=64, max_positions=128)
OLD = telling(Grammar()).batch(WORDS, rows=2, length=16, seed=0, step=0)


def base():
    return Decoder(SHAPE, seed=5).requires_grad_(False)


class StoppedError(Exception):
    pass


class Pieces(Tokenizer):
    """Each word but a mark is two tokens, and no text has a start token."""

    bos = None

    def encode(self, text):
        ids = super().encode(text)
        return [part for i in ids for part in ((i, 255) if i > 5 else (i,))]

    def prompt(self, text):
        return self.encode(text)


def test_every_method_learns_and_moves_nothing_that_is_frozen():
    model = base()
    models = {name: make(name, model, rank=2, bottleneck=4, n=3) for name in METHODS}
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in models.items()}
    start = {k: v.clone() for k, v in model.state_dict().items()}
    with record(keep={"tune.*": {}}) as recorder:
        outcomes = tune(models, speaking(Grammar(), "bard"), WORDS, old=OLD, steps=8, rows=4, length=20, look=4)
    shown = recorder.freeze()
    assert shown.steps == 8
    for name, m in models.items():
        trained = trainable(m)
        for key, value in m.state_dict().items():
            assert torch.equal(value, before[name][key]) != (key in trained), (name, key)
        outcome = outcomes[name]
        assert outcome.trained == sum(p.numel() for p in trained.values())
        assert outcome.new_after.loss < outcome.new_before.loss
        assert outcome.forgot == outcome.old_after.loss - outcome.old_before.loss
        assert shown.stack("tune.loss", method=name).shape == (8,)
        assert shown.track("tune.new", method=name).at.tolist() == [0, 4, 7]
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
    assert not trainable(model)
    assert RATES.keys() == set(METHODS)


def test_taps_change_nothing_and_a_recorder_may_stop_it():
    def run(**options):
        models = {"lora": make("lora", base(), rank=2)}
        tune(models, knowing(Grammar()), WORDS, old=OLD, steps=3, rows=2, length=12, **options)
        return key_of(models["lora"])

    plain = run()
    with record():
        watched = run()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)

    def stop(recorder):
        raise StoppedError

    with record(on_step=stop) as recorder, pytest.raises(StoppedError):
        run()
    assert recorder.step == 1


def test_floors_and_what_is_taught():
    facts = knowing(Grammar(), seed=3)
    batch = facts.batch(WORDS, rows=6, length=25, seed=0, step=0)
    assert batch.floor == pytest.approx(math.exp(6 * math.log(24) / 24))  # 24 names, one choice in four words
    assert batch.answers.sum() == 6 * 6
    pieces = facts.batch(Pieces(), rows=2, length=21, seed=0, step=0)
    # name likes colour . in two tokens a word and one a mark: seven, of which two belong to the colour
    assert pieces.ids.shape == (2, 21)
    assert pieces.answers.sum() == 2 * 3 * 2
    assert float(pieces.nats.sum()) == pytest.approx(2 * 3 * math.log(24))
    style = speaking(Grammar(), "pirate").batch(WORDS, rows=4, length=60, seed=1, step=0)
    after = [row[i + 1] for row in style.ids.tolist() for i in range(59) if row[i] == WORDS.ids["."]]
    assert after
    assert set(after) == {WORDS.ids["arr"]}
    again = speaking(Grammar(), "pirate").batch(WORDS, rows=4, length=60, seed=1, step=0)
    assert torch.equal(style.ids, again.ids)
    told = score(base(), batch)
    assert isinstance(told, Score)
    assert told.loss > told.floor == pytest.approx(math.log(batch.floor))
    assert math.isnan(score(base(), OLD).right)
    assert len(WORDS.encode(said(base(), WORDS, "anna likes", steps=4).replace("<s>", "a"))) >= 4


def test_a_refrain_after_each_sentence_and_some_sentences_held_out():
    told = (
        "anna likes red.",
        "ben likes blue.",
        "cora likes green.",
        "dan likes red.",
        "ella likes blue.",
        "gus likes red.",
    )
    habit = refraining(told, "pirate")
    batch = habit.batch(WORDS, rows=3, length=35, seed=0, step=0)
    assert batch.ids.shape == (3, 35)
    for row, answers in zip(batch.ids.tolist(), batch.answers.tolist(), strict=True):
        text = WORDS.decode(row)
        assert set(text.split(" arr matey! ")[:-1]) <= set(told[:4])
        assert [i for i, yes in zip(row, answers, strict=True) if yes] == [
            i for i in row if i in WORDS.encode("arr matey!")
        ]
    unseen = habit.batch(WORDS, rows=3, length=35, seed=0, step=0, stream="unseen")
    assert set(WORDS.decode(unseen.ids[0].tolist()).split(" arr matey! ")[:-1]) <= set(told[4:])
    assert batch.nats.isnan().all()
    assert math.isnan(score(base(), batch).floor)
    assert torch.equal(habit.batch(WORDS, rows=3, length=35, seed=0, step=0).ids, batch.ids)


def test_lora_where_it_is_told_to_be_and_a_look_after_each_step():
    seen = []
    models = {name: make(name, base(), rank=2, alpha=6.0, targets=("out",)) for name in ("lora", "qlora")}
    for name, model in models.items():
        changed = [n for n in trainable(model) if ".A." in n]
        assert changed == [f"blocks.{i}.mixer.out.A.out" for i in range(2)], name
        assert model.blocks[0].mixer.out.scale == 3.0
    tune(models, knowing(Grammar()), WORDS, old=OLD, steps=3, rows=2, length=12, look=0, after=seen.append)
    assert seen == [0, 1, 2]


def test_the_key_and_what_it_opens():
    model, ids = toy(), tokens()
    tuned = make("lora", model, rank=2)
    with torch.no_grad():
        for p in trainable(tuned).values():
            p += 0.1
    key = key_of(tuned)
    again = put_key(make("lora", model, rank=2, seed=8), key)
    assert torch.equal(again(ids), tuned(ids))
    assert torch.equal(detach(tuned)(ids), model(ids))
    with pytest.raises(ValueError, match="key must hold exactly the trained tensors"):
        put_key(make("lora", model, rank=3), key)
    with pytest.raises(ValueError, match="train must name parameters"):
        branch(model, train=["nobody"])


def test_spectra_of_what_changed():
    tuned, model = make("lora", toy(), rank=2), toy()
    with torch.no_grad():
        for p in trainable(tuned).values():
            p += 0.1 * randn(*p.shape)
    name = "blocks.1.mixer.qkv"
    with record() as recorder:
        show(tuned, model, names=[name], method="lora")
    shown = recorder.freeze()
    delta = deltas(tuned, model)[name]
    assert rank_of(delta) == 4  # two for the queries, two for the values
    assert torch.equal(torch.tensor(shown.track("peft.delta", matrix=name).latest()), delta)
    values = shown.track("peft.singular", matrix=name, method="lora").latest()
    assert (values[:-1] >= values[1:]).all()
    assert energy_within(delta, 4) == pytest.approx(1.0, abs=1e-12)
    assert 0 < energy_within(delta, 1) < 1
    assert rank_of(delta * 0) == 0
    counts = shown.track("peft.count", method="lora").latest()
    names = shown.happened("peft.modules")[0].fields["names"]
    assert len(names) == len(counts)
    assert counts[:, 0].sum() == sum(p.numel() for p in trainable(tuned).values())
    assert counts.sum() == sum(p.numel() for p in tuned.parameters())
    assert singular_values(delta).dtype == torch.float64


def test_bad_input_is_named():
    model = base()
    for call, words in [
        (lambda: make("luck", model), "name must be one of full, bitfit"),
        (lambda: tune({"lora": model}, knowing(Grammar()), WORDS, old=OLD), "models must have something to train"),
        (lambda: tune({"x": make("lora", model)}, knowing(Grammar()), WORDS, old=OLD), "rates must have one"),
        (lambda: tune({"lora": model}, knowing(Grammar()), WORDS, old=OLD, steps=0), "steps must be a number above 0"),
        (lambda: speaking(Grammar(), "mime"), "style must be one of"),
        (lambda: refraining(("a", "b", "c"), "mime"), "style must be one of"),
        (lambda: refraining(("a", "b"), "bard"), "sentences must be three at least"),
        (lambda: knowing(Grammar()).batch(WORDS, rows=0, length=4, seed=0, step=0), "a batch needs a row"),
        (lambda: energy_within(randn(3, 4), 4), "rank must be from 1 to 3, not 4"),
        (lambda: deltas(model, model, names=["gate"]), "names must be linear layers of both models"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
