"""SmoothQuant: the float function stays, the ranges move as the formula says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quant import capture_inputs, linears, quantised
from engine.quant.affine import Grid
from engine.quant.integer import recipe
from engine.quant.smoothquant import fold, largest, migration, smoothed
from engine.recording import record
from tests.engine.quant.test_integer import randn, tokens, toy


def calibrated(model, ids):
    with torch.no_grad(), capture_inputs(model) as inputs:
        model(ids)
    return inputs


def with_injected_outliers(model, *, size=40.0):
    """The same function with two channels of each norm `size` times as large: inverse smoothing."""
    with torch.no_grad():
        for block in model.blocks:
            for norm, linear in ((block.norm1, block.mixer.qkv), (block.norm2, block.ffn.gate_up)):
                scale = torch.ones(linear.in_features, dtype=torch.float64)
                scale[[3, 17]] = 1 / size
                fold(norm, linear, scale)
    return model


@given(st.floats(0.0, 1.0), st.booleans())
def test_the_float_output_stays(alpha, down):
    model, ids = toy(), tokens()
    twin = smoothed(model, largest(calibrated(model, ids)), alpha=alpha, down=down)
    with torch.no_grad():
        before, after = model(ids), twin(ids)
    assert float((after - before).abs().max()) < 1e-12 * float(before.abs().max())
    assert not torch.equal(twin.blocks[0].mixer.qkv.weight, model.blocks[0].mixer.qkv.weight)


def test_injected_outliers_keep_the_float_output():
    ids = tokens()
    with torch.no_grad():
        before, after = toy()(ids), with_injected_outliers(toy())(ids)
    assert float((after - before).abs().max()) < 1e-12 * float(before.abs().max())


@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_ranges_move_as_equation_4_says(seed, alpha):
    x, w = randn(20, 12, seed=seed), randn(9, 12, seed=seed + 1)
    scale = migration(x.abs().amax(0), w.abs().amax(0), alpha=alpha)
    x_range, w_range = x.abs().amax(0), w.abs().amax(0)
    assert torch.allclose(scale, x_range**alpha / w_range ** (1 - alpha), rtol=1e-12)
    after_x, after_w = (x / scale).abs().amax(0), (w * scale).abs().amax(0)
    assert torch.allclose((x / scale) @ (w * scale).mT, x @ w.mT, rtol=0, atol=1e-11)
    assert torch.allclose(after_x * after_w, x_range * w_range, rtol=1e-12)  # difficulty only moves
    if alpha == 0.5:
        assert torch.allclose(after_x, after_w, rtol=1e-12)
    if alpha == 1:
        assert torch.allclose(after_x, torch.ones(12, dtype=torch.float64), rtol=1e-12)
    if alpha == 0:
        assert torch.allclose(after_w, torch.ones(12, dtype=torch.float64), rtol=1e-12)


def test_half_way_the_ranges_meet():
    x, w = randn(20, 12).abs().amax(0), randn(9, 12, seed=1).abs().amax(0)
    scale = migration(x, w)
    assert torch.allclose(x / scale, w * scale, rtol=1e-12)


def test_a_dead_channel_is_left_alone():
    assert migration(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])).tolist() == [1.0, 1.0]


def test_each_layer_is_smoothed_by_its_own_input_and_weight():
    model, ids = with_injected_outliers(toy()), tokens()
    ranges = largest(calibrated(model, ids))
    twin = smoothed(model, ranges)
    after = largest(calibrated(twin, ids))
    for name, linear in linears(model).items():
        w_range = linear.weight.detach().abs().amax(0)
        if name.endswith(("qkv", "gate_up")):
            assert torch.allclose(after[name], (ranges[name] * w_range).sqrt(), rtol=1e-9)
        else:
            assert torch.allclose(after[name], ranges[name], rtol=1e-9)


def test_smoothing_recovers_w8a8_where_outliers_are():
    model, ids = with_injected_outliers(toy()), tokens()
    w8a8 = recipe(weights=Grid(8), activations=Grid(8))

    def error(twin):
        with torch.no_grad():
            return float((twin(ids) - model(ids)).norm())

    plain = error(quantised(model, w8a8))
    smooth = error(quantised(smoothed(model, largest(calibrated(model, ids))), w8a8))
    assert smooth < plain / 3


def test_what_is_not_smoothed_is_shared_and_the_model_stays():
    model, ids = toy(), tokens()
    before = {name: p.clone() for name, p in model.named_parameters()}
    twin = smoothed(model, largest(calibrated(model, ids)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        changed = name.endswith(("qkv.weight", "gate_up.weight", "norm1.weight", "norm2.weight"))
        assert (twin.get_parameter(name) is parameter) != changed


def test_gelu_decoders_are_smoothed_too():
    model, ids = toy(activation="gelu"), tokens()
    ranges = largest(calibrated(model, ids))
    with torch.no_grad():
        assert torch.allclose(smoothed(model, ranges)(ids), model(ids), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="down must be False"):
        smoothed(model, ranges, down=True)


def test_taps_show_both_ranges_for_each_alpha():
    with record() as recorder:
        for alpha in (0.5, 0.75):
            migration(torch.tensor([8.0, 1.0]), torch.tensor([0.5, 1.0]), alpha=alpha, linear="a")
    found = recorder.freeze()
    assert found.track("smoothquant.x_after", alpha="0.5").latest() == pytest.approx([2.0, 1.0])
    assert found.track("smoothquant.w_after", alpha="0.5").latest() == pytest.approx([2.0, 1.0])
    assert found.has("smoothquant.scale", alpha="0.75", linear="a")


def test_bad_input_is_named():
    one = torch.ones(3)
    model = toy()
    for call, words in [
        (lambda: migration(one, one, alpha=1.1), "alpha must be from 0 .* not 1.1"),
        (lambda: migration(one, one, alpha=float("nan")), "alpha must be from 0"),
        (lambda: migration(one, torch.ones(4)), "x_range and w_range must have equal shapes"),
        (lambda: migration(one / 0, one), "x_range must be finite"),
        (lambda: smoothed(model, {}), "x_ranges must hold the calibrated range of every layer smoothed, and lacks"),
        (lambda: fold(model.blocks[0].norm1, model.blocks[0].mixer.qkv, one), r"scale must have shape \[32\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    broken = toy()
    broken.blocks[0].mixer = torch.nn.Linear(32, 32).double()
    with pytest.raises(ValueError, match=r"model must have blocks with mixer.qkv and ffn.gate_up or ffn.up"):
        smoothed(broken, {})
