"""AWQ: never worse than plain rounding on what it was searched on, and the same float function."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quant import capture_inputs, linears, quantised
from engine.quant.affine import quantise
from engine.quant.awq import (
    AWQLinear,
    awq,
    grid,
    importance,
    keeping,
    kept,
    salient,
    scale_for,
    scaled_weight,
    search,
)
from engine.quant.integer import recipe
from engine.quant.smoothquant import fold
from engine.recording import record
from tests.engine.quant.test_integer import randn, tokens, toy
from tests.engine.quant.test_smoothquant import with_injected_outliers


def uneven(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs of which a few channels are far larger."""
    x = randn(40, 32, seed=seed)
    x[:, [2, 19]] *= 30
    return randn(24, 32, seed=seed + 1), x


@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4]), st.sampled_from([8, 16, 32]))
def test_the_best_scale_is_never_worse_than_plain_rounding(seed, bits, group):
    weight, x = uneven(seed)
    found = search(weight, x, grid(bits, group=group))
    rounded = quantise(weight, grid(bits, group=group)).reconstruct()
    plain = float(((x @ rounded.mT) - x @ weight.mT).square().mean())
    assert float(found.losses[0]) == pytest.approx(plain, rel=1e-9)  # ratio 0 is plain rounding
    best = float(found.losses[found.ratios.tolist().index(found.ratio)])
    assert best == float(found.losses.min()) <= plain
    layer = AWQLinear(linear_of(weight), scale=found.scale, weights=grid(bits, group=group))
    assert float((layer(x) - x @ weight.mT).square().mean()) == pytest.approx(best, rel=1e-9)


def test_uneven_activations_gain_much_and_the_curve_has_its_best_inside():
    weight, x = uneven()
    found = search(weight, x, grid(3, group=16))
    assert len(found.ratios) == 20
    assert found.ratios[1] == pytest.approx(0.05)
    assert 0 < found.ratio < 0.95
    assert found.losses.min() < found.losses[0] / 3


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_scaling_keeps_the_float_output(seed, ratio):
    weight, x = uneven(seed)
    scale = scale_for(importance(x), ratio)
    y = (x / scale) @ (weight * scale).mT
    exact = x @ weight.mT
    assert float((y - exact).abs().max()) < 1e-12 * float(exact.abs().max())
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-9)
    assert torch.equal(scale_for(importance(x), 0.0), torch.ones(32, dtype=torch.float64))


def test_the_scale_may_be_folded_into_the_norm_before():
    model, ids = toy(), tokens()
    qkv, norm = model.blocks[0].mixer.qkv, model.blocks[0].norm1
    x = model.embed(ids).detach()
    scale = scale_for(importance(norm(x).detach().flatten(0, 1)), 0.5)
    layer = AWQLinear(qkv, scale=scale, weights=grid(4, group=16))
    expected = layer(norm(x))
    fold(norm, qkv, scale)
    folded = norm(x) @ quantise(qkv.weight, grid(4, group=16)).reconstruct().mT
    assert torch.allclose(folded, expected, rtol=0, atol=1e-12)


def linear_of(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    linear.weight.data = weight
    return linear.requires_grad_(False)


def test_salient_channels_are_kept_to_the_bit_and_the_others_rounded():
    weight, x = uneven()
    channels = salient(weight, x, fraction=0.05)
    assert channels.nonzero().flatten().tolist() == [2, 19]
    layer = kept(linear_of(weight), channels, weights=grid(3, group=16))
    assert torch.equal(layer.weight[:, channels], weight[:, channels])
    assert torch.equal(layer.weight[:, ~channels], quantise(weight, grid(3, group=16)).reconstruct()[:, ~channels])
    assert salient(weight, x, fraction=0.01).sum() == 1  # at least one of 32
    assert salient(weight, x, fraction=0).sum() == 0
    assert salient(weight, x, fraction=1).all()
    by_weight = salient(weight, x, fraction=0.05, by="weight")
    assert weight[:, by_weight].norm(dim=0).min() >= weight[:, ~by_weight].norm(dim=0).max()
    assert salient(weight, x, by="random", seed=1).sum() == 1


def test_channels_met_by_large_activations_matter_most():
    weight, x = uneven()
    exact = x @ weight.mT

    def error(by):
        layer = kept(linear_of(weight), salient(weight, x, fraction=0.05, by=by), weights=grid(3, group=16))
        return float((layer(x) - exact).norm())

    assert error("activation") < error("weight") / 2
    assert error("activation") < error("random") / 2


def test_whole_models_are_replaced_layer_by_layer_with_their_own_inputs():
    model, ids = with_injected_outliers(toy().requires_grad_(False)), tokens()
    with capture_inputs(model) as inputs:
        exact = model(ids)
    weights = grid(3, group=16)
    for made in (awq(inputs, weights=weights), keeping(inputs, weights=weights, fraction=0.1)):
        twin = quantised(model, made)
        assert not linears(twin)
        assert (twin(ids) - exact).norm() < (quantised(model, recipe(weights=weights))(ids) - exact).norm()
    name = "blocks.1.ffn.down"
    expected = scaled_weight(model.get_submodule(name).weight, search(
        model.get_submodule(name).weight, inputs[name], weights).scale, weights)  # fmt: skip
    assert torch.equal(quantised(model, awq(inputs, weights=weights)).get_submodule(name).weight, expected)


def test_taps_show_the_search():
    weight, x = uneven()
    with record() as recorder:
        found = search(weight, x, grid(3, group=16), linear="a")
    shown = recorder.freeze()
    assert shown.track("awq.loss", linear="a").latest() == pytest.approx(found.losses.numpy())
    assert shown.track("awq.importance").latest().argmax() in (2, 19)
    assert shown.track("awq.scale").latest() == pytest.approx(found.scale.numpy())


def test_bad_input_is_named():
    weight, x = uneven()
    for call, words in [
        (lambda: search(weight, x, grid(3, group=5)), "group must divide the 32 values"),
        (lambda: search(weight, x[:, :8], grid(3, group=8)), r"x and weight must have shapes \[N, in\]"),
        (lambda: search(weight, x / 0, grid(3, group=8)), "x must be finite"),
        (lambda: search(weight, x[:0], grid(3, group=8)), "x must hold a value"),
        (lambda: salient(weight, x, fraction=1.5), "fraction must be from 0 to 1, not 1.5"),
        (lambda: salient(weight, x, by="luck"), "by must be .* not 'luck'"),
        (lambda: quantised(toy(), awq({}, weights=grid(3, group=8))), "inputs must hold the captured inputs"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
