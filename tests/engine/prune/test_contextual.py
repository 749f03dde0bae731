"""Contextual sparsity: what is seen, what is predicted, and decoding with what was chosen."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.generate import generate
from engine.model import Decoder
from engine.prune.contextual import (
    Predictor,
    active,
    needed,
    observe,
    precision,
    recall,
    show,
    similarities,
    top,
    train_predictor,
)
from engine.prune.contextual_decoding import (
    activations,
    by_habit,
    by_predictor,
    by_truth,
    contextual,
    count_of,
    everything,
    work,
)
from engine.recording import record
from tests.engine.prune.test_masks import same
from tests.engine.quant.test_integer import randn, tokens, toy

TIGHT = 1e-12


def stepwise(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    cache = Full()
    return torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(ids.shape[1])], 1)


def relu(**changes) -> Decoder:
    return toy(activation="relu", heads=9, kv_heads=3, **changes).requires_grad_(False)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("ahead", [False, True])
def test_everything_chosen_is_dense(activation, ahead):
    model = toy(activation=activation, heads=9, kv_heads=3).requires_grad_(False)
    ids = tokens(7)[:1]
    before = copy.deepcopy(model)
    whole = contextual(
        model, neurons=dict.fromkeys((0, 1), everything(48)), heads=dict.fromkeys((0, 1), everything(9)), ahead=ahead
    )
    assert (whole(ids) - model(ids)).abs().max() < TIGHT
    assert (stepwise(whole, ids) - model(ids)).abs().max() < TIGHT
    assert same(model, before)
    assert whole.blocks[0].ffn.dense.down.weight is model.blocks[0].ffn.down.weight


def test_with_relu_all_that_is_not_zero_is_dense_and_less_is_not():
    model, ids = relu(), tokens(7)[:1]
    exact = contextual(model, neurons={n: by_truth(model.blocks[n].ffn) for n in (0, 1)})
    with record(keep={"contextual.chosen": {}}) as recorder:
        assert (stepwise(exact, ids) - model(ids)).abs().max() < TIGHT
    chosen = recorder.freeze().stack("contextual.chosen", layer=0)
    assert chosen.shape == (7, 48)
    assert 0.2 < chosen.mean() < 0.8  # truly fewer
    few = contextual(model, neurons={n: by_truth(model.blocks[n].ffn, share=0.1) for n in (0, 1)})
    assert (few(ids) - model(ids)).abs().max() > 1e-4


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_gathered_rows_give_what_the_masked_dense_gives(activation):
    """A token at a time, only the chosen rows are multiplied; all at once, all are, and masked."""
    model = toy(activation=activation, heads=9, kv_heads=3).requires_grad_(False)
    ids = tokens(8)[:1]
    choosers = {layer: by_predictor(Predictor(32, 48, rank=4, seed=layer).double(), share=0.3) for layer in (0, 1)}
    heads = {layer: by_predictor(Predictor(32, 9, rank=4, seed=layer).double(), share=0.5) for layer in (0, 1)}
    for ahead in (False, True):
        few = contextual(model, neurons=choosers, heads=heads, ahead=ahead)
        assert (stepwise(few, ids) - few(ids)).abs().max() < TIGHT
        assert (few(ids) - model(ids)).abs().max() > 1e-4
    assert len(list(generate(few, ids[0], steps=3, cache=Full()))) == 3


def test_chosen_neurons_and_heads_are_the_only_ones_that_count():
    model, ids = relu(), tokens(5)[:1]
    kept = torch.zeros(48, dtype=torch.bool)
    kept[[3, 7, 30]] = True
    few = contextual(model, neurons={0: lambda x: kept.expand(len(x), -1)})
    cut = copy.deepcopy(model)
    cut.blocks[0].ffn.down.weight.mul_(kept)
    assert (few(ids) - cut(ids)).abs().max() < TIGHT
    heads = torch.tensor([True, False, False, False, True, True, False, False, True])
    few = contextual(model, heads={1: lambda x: heads.expand(len(x), -1)})
    cut = copy.deepcopy(model)
    cut.blocks[1].mixer.out.weight.mul_(heads.repeat_interleave(8))
    assert (few(ids) - cut(ids)).abs().max() < TIGHT
    assert (stepwise(few, ids) - cut(ids)).abs().max() < TIGHT


def test_looking_ahead_asks_with_what_the_layer_before_read():
    model, ids = relu(layers=3), tokens(6)[:1]
    asked = {}

    def noting(layer):
        def choose(x):
            asked[layer] = x
            return everything(48)(x)

        return choose

    seen = observe(model, ids)
    contextual(model, neurons={0: noting(0), 2: noting(2)}, ahead=True)(ids)
    assert torch.equal(asked[0], seen[0].ffn_in)
    assert (asked[2] - seen[1].ffn_in).abs().max() < TIGHT
    contextual(model, neurons={2: noting(2)})(ids)
    assert torch.equal(asked[2], seen[2].ffn_in)


def test_what_is_observed_is_what_the_layers_did():
    model, ids = relu(), tokens(6)
    seen = observe(model, ids)
    x = model.embed(ids)
    assert torch.equal(seen[0].stream, x.flatten(0, 1))
    block, rope = model.blocks[0], model.rope(x)
    assert torch.equal(seen[0].mixer_in, block.norm1(x).flatten(0, 1))
    middle = x + block.mixer(block.norm1(x), rope=rope)
    assert (seen[0].ffn_in - block.norm2(middle).flatten(0, 1)).abs().max() < TIGHT
    assert (seen[0].neurons - activations(block.ffn, seen[0].ffn_in)).abs().max() < TIGHT
    after = block(x, rope=rope).flatten(0, 1)
    assert (seen[1].stream - after).abs().max() < TIGHT
    cosine = (after * seen[0].stream).sum(1) / (after.norm(dim=1) * seen[0].stream.norm(dim=1))
    assert (similarities(seen)[0] - cosine).abs().max() < TIGHT
    alone = copy.deepcopy(block.mixer)
    alone.out.weight[:, :16] = alone.out.weight[:, 24:] = 0  # head 2 alone
    written = alone(block.norm1(x), rope=rope).flatten(0, 1).norm(dim=1)
    assert (seen[0].heads[:, 2] - written).abs().max() < TIGHT


def test_zeros_are_exact_with_relu_and_a_matter_of_threshold_without():
    seen = observe(relu(), tokens(6))[0]
    assert torch.equal(active(seen.neurons), seen.neurons > 0)
    silu = observe(toy().requires_grad_(False), tokens(6))[0]
    assert active(silu.neurons).all()
    assert active(silu.neurons, threshold=0.1).double().mean() < 0.9
    values = torch.tensor([[0.0, -4.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert active(values, threshold=0.2).tolist() == [[False, True, True, False], [False] * 4]
    assert needed(values, share=0.9).tolist() == [1, 0]
    assert needed(values, share=0.98).tolist() == [2, 0]
    assert needed(values, share=1).tolist() == [3, 0]


@given(st.integers(1, 20), st.integers(0, 2**31))
def test_recall_and_precision_at_k(keep, seed):
    scores, true = randn(5, 20, seed=seed), top(randn(5, 20, seed=seed + 1), 6)
    found = top(scores, keep)
    assert (found.sum(1) == keep).all()
    both = sum(len({*a.nonzero().flatten().tolist()} & {*b.nonzero().flatten().tolist()})
               for a, b in zip(found, true, strict=True))  # fmt: skip
    assert recall(found, true) == both / 30
    assert precision(found, true) == both / (5 * keep)
    assert recall(top(scores, 20), true) == 1


def test_a_predictor_learns_what_depends_on_its_input():
    x = randn(600, 16).float()
    true = x @ randn(16, 40, seed=1).float() > 4.0  # about one of six
    with torch.inference_mode():  # where a page runs
        predictor = train_predictor(x[:500], true[:500], rank=16, steps=100)
    keep = round(float(true.double().mean()) * 40)
    found = recall(top(predictor(x[500:]), keep), true[500:])
    assert found > 0.6 > 2 * recall(top(randn(100, 40), keep), true[500:])
    again = train_predictor(x[:500], true[:500], rank=16, steps=100)
    assert torch.equal(again.second.weight, predictor.second.weight)
    narrow = train_predictor(x[:500], true[:500], rank=1, steps=40)
    assert recall(top(narrow(x[500:]), keep), true[500:]) < found


def test_habit_is_the_same_for_every_token():
    values = torch.tensor([[1.0, -5.0, 0.0, 2.0], [1.0, 5.0, 0.0, 2.0]])
    assert by_habit(values, share=0.5)(torch.zeros(3, 7)).tolist() == [[False, True, False, True]] * 3


def test_work_counts_what_is_multiplied():
    model = relu()
    assert work(model) == 1
    qkvo, ffn = 32 * (9 + 3 + 3 + 9) * 8, 2 * 32 * 48
    assert work(model, neurons=0.25) == pytest.approx((qkvo + ffn / 4) / (qkvo + ffn))
    assert work(model, neurons=0.25, rank=4) == pytest.approx((qkvo + ffn / 4 + 4 * (32 + 48)) / (qkvo + ffn))
    assert work(model, heads=1 / 3) == pytest.approx((32 * (3 + 3 + 3 + 3) * 8 + ffn) / (qkvo + ffn))
    assert count_of(10, 0.01) == 1


def test_taps_show_the_three_claims():
    model = relu()
    seen = observe(model, tokens(6)[:1])
    with record() as recorder:
        found = show(seen)
        train_predictor(seen[0].ffn_in, active(seen[0].neurons), rank=2, steps=3, layer=0)
    shown = recorder.freeze()
    assert (shown.stack("contextual.active", layer=1) == active(seen[1].neurons).numpy()).all()
    assert shown.stack("contextual.sparsity", layer=0) == pytest.approx(found["sparsity"][0].numpy())
    assert shown.stack("contextual.similarity", layer=0) == pytest.approx(found["similarity"][0].numpy())
    assert shown.stack("contextual.heads", layer=0).shape == (6, 9)
    assert found["heads"].shape == (2, 6, 9)
    assert found["heads"].sum(-1) == pytest.approx(1)
    assert shown.stack("contextual.loss", layer=0).shape[0] == 3
    few = contextual(model, neurons={0: by_truth(model.blocks[0].ffn, share=0.5)}, heads={1: everything(9)})
    ids = tokens(6)[:1]
    with record() as recorder:
        taped = stepwise(few, ids)
    assert torch.equal(taped, stepwise(few, ids))
    shown = recorder.freeze()
    assert shown.stack("contextual.chosen", layer=0).sum() == 6 * 24
    assert shown.stack("contextual.chosen.heads", layer=1).all()
    assert shown.stack("attention.pattern", layer=1).shape == (1, 9, 6, 6)


def test_bad_input_is_named():
    model = relu()
    values = randn(4, 6)
    for call, words in [
        (lambda: active(values, threshold=1), "threshold must be a number from 0 to below 1, not 1"),
        (lambda: active(values[:0]), "values must have shape"),
        (lambda: top(values, 0), "keep must be from 1 to 6, not 0"),
        (lambda: top(values, 7), "keep must be from 1 to 6, not 7"),
        (lambda: needed(values, share=0), "share must be above 0"),
        (lambda: count_of(5, 0), "share must be above 0 and at most 1, not 0"),
        (lambda: by_predictor(Predictor(4, 6, rank=1), share=1.5), "share must be"),
        (lambda: by_habit(values[:0], share=0.5), "values must have shape"),
        (lambda: Predictor(4, 6, rank=0), "rank must be a number above 0, not 0"),
        (lambda: train_predictor(values, values[:3] > 0), "x and target must be"),
        (lambda: train_predictor(values, values), "x and target must be"),
        (lambda: train_predictor(values, values > 0, steps=0), "steps and rows must be"),
        (lambda: recall(values > 9, values > 9), "true must have something active"),
        (lambda: precision(values > 9, values > 0), "predicted must have something active"),
        (lambda: recall(values > 0, values[:2] > 0), "predicted and true must be bool of one shape"),
        (lambda: similarities(observe(model, tokens(3))[:1]), "seen must hold two layers at least, not 1"),
        (lambda: contextual(model, neurons={5: everything(48)}), "layer must be from 0 to 1, not 5"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
