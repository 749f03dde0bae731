"""Magnitude pruning: against torch's own, exact counts where weights are equal, and retraining that revives nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune as oracle

from engine.model import Decoder
from engine.prune import apply, matrices, revived, sparsity
from engine.prune.magnitude import by_chance, lowest, magnitude, retrain, revival, thresholds
from engine.recipes import Recipe, Stage
from engine.recording import record
from tests.engine.quant.test_integer import toy
from tests.engine.test_train import SMALL

RECIPE = Recipe(lambda seed: Decoder(SMALL, seed=seed), "tiny", stages=(Stage(6, 2, 16),), warmup=2, rate=1e-2)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_masks_are_those_of_torch(scope, share):
    model, other = toy(), toy()
    masks = magnitude(model, sparsity=share, scope=scope)
    layers = [(other.get_submodule(name.removesuffix(".weight")), "weight") for name in matrices(model)]
    if scope == "global":
        oracle.global_unstructured(layers, pruning_method=oracle.L1Unstructured, amount=share)
    else:
        for layer, name in layers:
            oracle.l1_unstructured(layer, name, amount=share)
    for (layer, _), mask in zip(layers, masks.values(), strict=True):
        assert torch.equal(layer.weight_mask.bool(), mask)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=30), st.data())
def test_exactly_as_many_go_as_asked_for_also_among_equals(values, data):
    """Weights rounded to few values, as SmolLM2's: a bare threshold would prune all equals or none."""
    count = data.draw(st.integers(0, len(values)))
    gone = lowest(torch.tensor(values), count)
    assert int(gone.sum()) == count
    in_order = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert gone.nonzero().flatten().tolist() == sorted(in_order[:count])


def test_global_pruning_spares_the_layer_with_large_weights_and_layer_pruning_does_not():
    model = toy()
    with torch.no_grad():
        model.blocks[0].mixer.qkv.weight.mul_(50)
    name = "blocks.0.mixer.qkv.weight"
    assert magnitude(model, sparsity=0.5)[name].double().mean() > 0.95
    assert magnitude(model, sparsity=0.5, scope="layer")[name].double().mean() == 0.5


def test_thresholds_part_pruned_from_kept():
    model = toy()
    with record() as recorder:
        masks = magnitude(model, sparsity=0.4)
    edges = thresholds(model, masks)
    for name, weight in matrices(model).items():
        assert weight[~masks[name]].abs().max() == edges[name] <= weight[masks[name]].abs().min()
    shown = recorder.freeze()
    assert shown.track("prune.threshold").latest() == pytest.approx(list(edges.values()), rel=1e-6)
    assert [e.fields["value"] for e in shown.happened("prune.threshold")] == list(edges.values())


def test_chance_prunes_as_many_by_its_seed():
    model = toy()
    one, again, other = (by_chance(model, sparsity=0.7, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    assert sparsity(one) == pytest.approx(0.7, abs=1e-4)
    # Small weights are cheaper to lose than random ones: the part of the squares that is left.
    left = [sum(float((w * m[n]).square().sum()) for n, w in matrices(model).items())
            for m in (magnitude(model, sparsity=0.7), one)]  # fmt: skip
    assert left[0] > 2 * left[1]


def test_retraining_keeps_pruned_weights_at_zero_and_moves_the_others():
    model = RECIPE.make(0)
    masks = magnitude(model, sparsity=0.5)
    before = {name: weight.clone() for name, weight in matrices(model).items()}
    with record() as recorder:
        trained = retrain(model, masks, RECIPE)
    assert revived(trained, masks) == 0
    assert all(torch.equal(weight, before[name]) for name, weight in matrices(model).items())
    moved = matrices(trained)
    assert all(float((moved[n][masks[n]] != before[n][masks[n]]).double().mean()) > 0.99 for n in masks)
    shown = recorder.freeze()
    assert len(shown.stack("prune.revived")) == 6
    assert (shown.stack("prune.revived") > 0).all()  # each step's gradient would
    assert math.isfinite(shown.stack("train.loss")[-1])
    told: list[int] = []
    free = retrain(model, masks, RECIPE, hold=False, progress=lambda twin, *_: told.append(revived(twin, masks)))
    assert revived(free, masks) == told[-1] > 0


def test_momentum_revives_what_only_its_gradient_is_kept_from_and_decay_alone_does_not():
    def zeros_after(hold):
        return [int((weight == 0).sum()) for weight in revival(hold=hold)]

    assert zeros_after("weights") == [0] * 9 + [4] * 11
    assert zeros_after("gradients") == [0] * 9 + [4] + [0] * 10
    assert zeros_after("nothing") == [0] * 9 + [4] + [0] * 10
    with torch.inference_mode():  # where a page runs
        assert revival(hold="nothing").shape == (20, 8)
    # Pruned before there is any momentum, with its gradient masked: decay of 0 is 0.
    weight = torch.nn.Parameter(torch.zeros(3))
    optimiser = torch.optim.AdamW([weight], weight_decay=0.5)
    weight.grad = torch.zeros(3)
    optimiser.step()
    assert torch.equal(weight.detach(), torch.zeros(3))


def test_one_turn_after_another_prunes_more():
    model = RECIPE.make(0)
    for share in (0.3, 0.6):
        masks = magnitude(model, sparsity=share)
        model = retrain(model, masks, RECIPE)
        assert sparsity(masks) == pytest.approx(share, abs=1e-3)
    assert revived(model, masks) == 0


def test_bad_input_is_named():
    model = toy()
    broken = toy()
    broken.blocks[0].ffn.down.weight.data[0, 0] = torch.nan
    for call, words in [
        (lambda: magnitude(model, sparsity=1.2), "sparsity must be a number from 0 to 1, not 1.2"),
        (lambda: magnitude(model, sparsity=math.nan), "sparsity must be"),
        (lambda: magnitude(model, sparsity=0.5, scope="row"), "scope must be one of global, layer, not 'row'"),
        (lambda: by_chance(model, sparsity=-0.1, seed=0), "sparsity must be"),
        (lambda: magnitude(broken, sparsity=0.5), "blocks.0.ffn.down.weight must be finite"),
        (lambda: lowest(torch.zeros(3), 4), "count must be from 0 to 3, not 4"),
        (lambda: revival(hold="hope"), "hold must be"),
        (lambda: revival(hold="weights", prune_at=0), "prune_at must be from 1 to steps=20, not 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.real
def test_smollm2_is_never_written_into(smollm2):
    """Its weights lie on a coarse grid, so thousands are equal: still exactly the share asked for goes."""
    model, _ = smollm2
    before = model.blocks[3].ffn.down.weight.clone()
    masks = magnitude(model, sparsity=0.5, scope="layer")
    twin = apply(model, masks)
    assert torch.equal(model.blocks[3].ffn.down.weight, before)
    assert all(int(mask.sum()) * 2 == mask.numel() for mask in masks.values())
    assert twin.embed.weight is model.embed.weight
