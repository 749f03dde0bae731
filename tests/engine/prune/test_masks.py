"""Masks: put on a copy, never on the model itself, and held through an optimiser."""

import copy

import pytest
import torch

from engine.prune import apply, enforce, everything, holding, matrices, revived, sparsity, zeros
from engine.prune.magnitude import magnitude
from engine.recording import record
from tests.engine.quant.test_integer import tokens, toy


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_model_itself_stays_as_it_was_and_the_copy_shares_what_is_not_masked():
    model = toy()
    before = copy.deepcopy(model)
    masks = magnitude(model, sparsity=0.6)
    twin = apply(model, masks)
    assert same(model, before)
    assert not same(twin, model)
    assert twin.embed.weight is model.embed.weight
    assert zeros(twin) == pytest.approx(sparsity(masks))
    assert sparsity(masks) == pytest.approx(0.6, abs=1e-4)
    for name, weight in matrices(model).items():
        assert torch.equal(twin.get_parameter(name), weight * masks[name])
    enforce(twin, {"blocks.0.ffn.down.weight": torch.zeros(32, 48, dtype=torch.bool)})
    assert same(model, before)
    assert torch.equal(apply(model, everything(model))(tokens()), model(tokens()))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_masked_weights_stay_zero_through_an_optimiser_with_momentum_and_decay(kind):
    """The optimiser has moments from before the pruning: what is not held comes back."""
    ids = tokens()

    def revived_after(hold):
        model = toy()
        make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
        extra = {"momentum": 0.9} if kind == "sgd" else {}
        optimiser = make(model.parameters(), lr=0.01, weight_decay=0.1, **extra)
        masks = {}
        for at in range(8):
            if at == 3:
                masks = magnitude(model, sparsity=0.5)
                enforce(model, masks)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimiser.step()
            if masks and hold:
                holding(masks)(model)
        return revived(model, masks)

    assert revived_after(True) == 0
    assert revived_after(False) > 1000


def test_taps_show_corners_cells_and_what_came_back():
    model = toy()
    masks = magnitude(model, sparsity=0.5)
    with record() as recorder:
        twin = apply(model, masks)
        with torch.no_grad():
            twin.blocks[0].ffn.down.weight.add_(1.0)
        holding(masks)(twin)
    shown = recorder.freeze()
    name = "blocks.0.ffn.down"
    mask = masks[f"{name}.weight"]
    assert (shown.track("prune.mask", linear=name).latest() == mask[:32, :32].numpy()).all()
    kept = shown.track("prune.kept", linear=name).latest()
    assert (kept[~mask[:32, :32].numpy()] == 0).all()
    assert (kept == shown.track("prune.weight", linear=name).latest() * mask[:32, :32].numpy()).all()
    # The cells of uneven sizes overlap, so the mean is near, and for one that divides exact.
    even = "blocks.0.mixer.out"
    assert shown.track("prune.density", linear=even).latest().mean() == pytest.approx(
        float(masks[f"{even}.weight"].double().mean())
    )
    assert shown.stack("prune.sparsity").mean() == pytest.approx(
        sum(1 - float(m.double().mean()) for m in masks.values()) / len(masks)
    )
    assert shown.stack("prune.revived")[0] == int((~mask).sum())
    assert shown.nbytes < 1_000_000


def test_bad_input_is_named():
    model = toy()
    for call, words in [
        (
            lambda: apply(model, {"x": torch.ones(1, dtype=torch.bool)}),
            "masks must name weights .* not 'x'",
        ),
        (lambda: apply(model, {"blocks.0.ffn.down.weight": torch.ones(32, 48)}), "must be bool"),
        (lambda: enforce(model, {"blocks.0.ffn.down.weight": torch.ones(48, 32) > 0}), r"must be bool \[32, 48\]"),
        (lambda: sparsity({}), "masks must hold a weight"),
        (lambda: matrices(torch.nn.ReLU()), "model must have a linear layer"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
