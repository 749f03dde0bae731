"""QAT: rounded forward, straight-through backward, learned scales, and that it beats rounding afterwards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quant import linears
from engine.quant.affine import Grid, quantise
from engine.quant.integer import QuantLinear, fake_quantise
from engine.quant.qat import QATLinear, after_training, converted, prepare, staircase, straight_through
from engine.recording import record
from tests.engine.quant.test_integer import randn, tokens, toy


@given(st.integers(0, 2**31), st.integers(2, 8), st.floats(0.05, 1.5), st.booleans())
def test_the_gradient_is_the_identity_inside_the_range_and_zero_outside(seed, bits, step, even):
    grid = Grid(bits, symmetric=even)
    x = (randn(6, 8, seed=seed) * 3).requires_grad_()
    scale = torch.tensor([[step]], dtype=torch.float64)
    zero = torch.tensor([[0 if even else 1]], dtype=torch.int32)
    weights = randn(6, 8, seed=seed + 1)
    y = straight_through(x, scale, zero, grid)
    lines = (x.detach() / step).round() + zero
    inside = (lines >= grid.low) & (lines <= grid.high)
    assert torch.equal(y, (lines.clamp(grid.low, grid.high) - zero) * step)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights * inside)


@given(st.integers(0, 2**31), st.integers(2, 4), st.sampled_from(["tensor", "channel", "group"]))
def test_the_gradient_of_a_learned_scale_is_lsq(seed, bits, granularity):
    grid = Grid(bits, granularity=granularity, group=4 if granularity == "group" else None)
    x = randn(3, 8, seed=seed)
    blocks = grid.blocks(x)
    scale = torch.full((len(blocks), 1), 0.7, dtype=torch.float64, requires_grad=True)
    g = randn(3, 8, seed=seed + 1)
    (straight_through(x, scale, torch.zeros_like(scale, dtype=torch.int32), grid) * g).sum().backward()
    for b, (values, grads) in enumerate(zip(blocks, grid.blocks(g), strict=True)):
        total = 0.0
        for v, d in zip(values.tolist(), grads.tolist(), strict=True):  # LSQ, equation 3, value by value
            line = v / 0.7
            total += d * (grid.low if line <= grid.low - 0.5 else grid.high if line >= grid.high + 0.5
                          else round(line) - line)  # fmt: skip
        assert float(scale.grad[b]) == pytest.approx(total / (values.numel() * grid.high) ** 0.5, abs=1e-12)


def test_between_borders_the_scale_s_slope_is_the_true_derivative():
    # With straight-through rounding frozen, s (round(v/s)) grows by round(v/s) a unit of s, and v/s * ds is what the
    # identity in v takes away; clipped values have no such part, so there finite differences see the very gradient.
    x = torch.tensor([10.0, -10.0], dtype=torch.float64)
    grid, zero = Grid(3), torch.zeros(1, 1, dtype=torch.int32)
    scale = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    y = straight_through(x, scale, zero, grid)
    (2 * y[0] + y[1]).backward()
    ahead = straight_through(x, scale.detach() + 1e-6, zero, grid) - y.detach()
    expected = float((2 * ahead[0] + ahead[1]) / 1e-6) / (2 * grid.high) ** 0.5
    assert float(scale.grad) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("activations", [None, Grid(8, granularity="token")])
def test_forward_is_the_rounded_model_and_conversion_keeps_it(learned, activations):
    model, ids = toy(), tokens()
    weights = Grid(3, granularity="channel")
    ready = prepare(model, weights=weights, activations=activations, learned=learned)
    with torch.no_grad():
        out = ready(ids)
        assert torch.equal(out, after_training(model, weights=weights, activations=activations)(ids))
        train(ready, ids, steps=3)
        done = converted(ready)
        assert torch.equal(done(ids), ready(ids))
    assert not any(isinstance(m, QATLinear) for m in done.modules())
    assert len([m for m in done.modules() if isinstance(m, QuantLinear)]) == 8
    layer = done.blocks[0].ffn.down
    assert layer.codes.codes.abs().max() <= weights.high
    assert layer.storage_bits < layer.weight.numel() * 3 + 32 * 64 + 1


def train(model, ids, *, steps, rate=3e-3):
    """A few steps of next-token learning; returns the last loss."""
    with torch.enable_grad():
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
        for _ in range(steps):
            loss = loss_of(model, ids)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return float(loss_of(model, ids).detach())


def loss_of(model, ids):
    return torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_training_with_the_grid_on_beats_rounding_afterwards():
    ids = tokens(40)
    float_model = toy()
    train(float_model, ids, steps=60)
    weights = Grid(2, granularity="channel")
    with torch.no_grad():
        plain = float(loss_of(after_training(float_model, weights=weights), ids))
    for learned in (False, True):
        ready = prepare(float_model, weights=weights, learned=learned)
        assert train(ready, ids, steps=40, rate=1e-3) < plain - 0.3


def test_a_prepared_model_trains_alone_and_every_weight_learns():
    model, ids = toy(), tokens()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ready = prepare(model, weights=Grid(4, granularity="channel"), learned=True)
    train(ready, ids, steps=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert all(p.grad is not None for p in ready.parameters())
    assert all(float(m.scale.grad.abs().sum()) > 0 for m in ready.modules() if isinstance(m, QATLinear))
    some = prepare(model, weights=Grid(4), names=["blocks.0.ffn.down"])
    assert len(linears(some)) == 7


def test_ptq_is_rounding_each_weight():
    model = toy()
    grid = Grid(4, granularity="group", group=8)
    done = after_training(model, weights=grid)
    for name, linear in linears(model).items():
        assert torch.equal(done.get_submodule(name).weight, quantise(linear.weight.detach(), grid).reconstruct())
        assert torch.equal(done.get_submodule(name).weight, fake_quantise(linear.weight.detach(), grid))


def test_equals_torchao_s_fake_quantisation():
    primitives = pytest.importorskip("torchao.quantization.quant_primitives", exc_type=ImportError)
    grid = Grid(4, granularity="group", group=8)
    x = randn(6, 16).float().requires_grad_()
    scale = (grid.blocks(x.detach()).abs().amax(1, keepdim=True) / 9).float()  # too small: some values are clipped
    zero = torch.zeros_like(scale, dtype=torch.int32)
    theirs = primitives._fake_quantize_affine(
        x, (1, 8), scale.view(6, 2), zero.view(6, 2), torch.int8, grid.low, grid.high
    )
    ours = straight_through(x, scale, zero, grid)
    assert torch.allclose(theirs, ours, rtol=1e-6, atol=0)
    one, two = (torch.autograd.grad(y.sum(), x)[0] for y in (theirs, ours))
    assert torch.allclose(one, two, rtol=1e-6, atol=0)  # theirs multiplies by scale / scale
    assert 0 < (one == 0).sum() < 96


def test_taps_show_weights_in_steps_of_their_grid():
    layer = QATLinear(torch.nn.Linear(8, 4).double(), weights=Grid(3, granularity="channel"), name="a")
    with record() as recorder:
        layer(randn(2, 8))
    found = recorder.freeze()
    lines, rounded = (found.track(f"qat.{n}", linear="a").latest() for n in ("lines", "rounded"))
    scale = layer.grid_of_weights()[0].detach().numpy()
    assert (lines.round() * scale) == pytest.approx(rounded)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="weights must be symmetric for a learned scale"):
        prepare(toy(), weights=Grid(4, symmetric=False), learned=True)
    with pytest.raises(ValueError, match="names must be linear layers"):
        prepare(toy(), weights=Grid(4), names=["nothing"])
    layer = QATLinear(torch.nn.Linear(2, 2), weights=Grid(4), activations=Grid(8))
    with pytest.raises(ValueError, match="x must be finite"):
        layer(torch.full((1, 2), torch.nan))


def test_the_staircase_is_flat_and_its_pretended_slope_is_one_inside():
    v, stairs, slope = staircase(Grid(3), beyond=2.0, points=501)
    assert set(stairs.tolist()) == set(range(-3, 4))
    inside = (v.round() >= -3) & (v.round() <= 3)
    assert torch.equal(slope, inside.double())
    assert torch.equal(stairs, v.round().clamp(-3, 3))
