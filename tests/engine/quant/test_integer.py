"""Integer products against products of what the codes stand for, and layers that replace linear ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.model import Decoder, Shape
from engine.quant import awq, bitnet, capture_inputs, copied, linears, llm_int8, qat, quantised
from engine.quant.affine import Grid, quantise
from engine.quant.integer import QuantLinear, accumulate, fake_quantise, integer_matmul, recipe
from engine.recording import record

TOY = Shape(vocab=31, width=32, layers=2, heads=4, kv_heads=2, head_width=8, ffn_width=48, max_positions=64)


def toy(**changes) -> Decoder:
    return Decoder(Shape(**{**TOY.__dict__, **changes})).double()


def tokens(count: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 31, (2, count), generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(
    st.sampled_from(["tensor", "token", "group"]),
    st.sampled_from(["tensor", "channel", "group"]),
    st.booleans(),
    st.booleans(),
    st.integers(2, 8),
    st.integers(2, 8),
    st.sampled_from([(1,), (5,), (2, 3)]),
)
def test_integer_products_equal_products_of_reconstructions(a_by, w_by, a_even, w_even, a_bits, w_bits, rows):
    a = quantise(randn(*rows, 16) + 0.4,
                 Grid(a_bits, symmetric=a_even, granularity=a_by, group=4 if a_by == "group" else None))  # fmt: skip
    w = quantise(randn(7, 16, seed=1) - 0.2,
                 Grid(w_bits, symmetric=w_even, granularity=w_by, group=4 if w_by == "group" else None))  # fmt: skip
    got, work = integer_matmul(a, w)
    expected = a.reconstruct() @ w.reconstruct().mT
    assert got.shape == (*rows, 7)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12 * float(expected.abs().max() + 1))
    outputs = a.codes[..., 0].numel() * 7
    assert work.code_multiplications == outputs * 16
    groups = 4 if "group" in (a_by, w_by) else 1
    assert work.scale_multiplications == 2 * groups * outputs
    assert (work.zero_multiplications == 0) == (a_even and w_even)


def test_sums_are_taken_in_integers_and_are_exact():
    a, w = torch.full((1, 1, 40000), 127), torch.full((1, 1, 40000), 127)
    assert int(accumulate(a, w)) == 40000 * 127 * 127  # past 2^24, where float32 would round
    with record() as recorder:
        integer_matmul(quantise(randn(2, 8), Grid(8)), quantise(randn(3, 8), Grid(8)))
    assert recorder.freeze().track("integer.accumulator").latest().dtype.kind == "i"


def test_a_layer_computes_the_same_in_integers_and_in_float():
    linear = torch.nn.Linear(24, 10).double()
    layer = QuantLinear(linear, weights=Grid(4, granularity="group", group=8), activations=Grid(8, granularity="token"))
    x = randn(2, 5, 24)
    assert torch.allclose(layer(x), layer.integer_forward(x), rtol=0, atol=1e-12)
    assert layer.storage_bits == 240 * 4 + 30 * 64
    expected = torch.nn.functional.linear(
        fake_quantise(x, Grid(8, granularity="token")),
        quantise(linear.weight, layer.weights).reconstruct(),
        linear.bias,
    )
    assert torch.equal(layer(x), expected)
    both = QuantLinear(linear, weights=None)
    assert torch.equal(both(x), linear(x))
    with pytest.raises(ValueError, match="weights and activations must both have a grid"):
        both.integer_forward(x)


def test_a_recipe_replaces_every_linear_layer_of_a_copy():
    model, ids = toy(), tokens()
    model.requires_grad_(False)
    before = model(ids)
    twin = quantised(model, recipe(weights=Grid(16, granularity="channel")))
    assert torch.equal(model(ids), before)
    assert not linears(twin)
    assert len([m for m in twin.modules() if isinstance(m, QuantLinear)]) == len(linears(model)) == 8
    assert twin.embed.weight is model.embed.weight
    assert (twin(ids) - before).abs().max() < 1e-3 * before.abs().max()
    errors = [
        float((quantised(model, recipe(weights=Grid(b, granularity="channel")))(ids) - before).norm())
        for b in (2, 4, 8)
    ]
    assert errors[0] > errors[1] > errors[2] > 0
    some = quantised(model, recipe(weights=Grid(2)), names=["blocks.1.ffn.down"])
    assert list(linears(some)) == [n for n in linears(model) if n != "blocks.1.ffn.down"]


@pytest.mark.parametrize("recipe_of", [
    lambda: recipe(weights=Grid(4)), llm_int8.recipe, lambda: lambda n, m: qat.QATLinear(m, weights=Grid(4)),
    lambda: lambda n, m: bitnet.BitLinear(m),
    lambda: lambda n, m: awq.AWQLinear(m, scale=torch.ones(m.in_features), weights=awq.grid(4, group=8)),
])  # fmt: skip
def test_what_takes_a_layer_s_place_has_its_sizes_and_its_bias(recipe_of):
    linear = torch.nn.Linear(24, 10).double()
    layer = recipe_of()("name", linear)
    assert (layer.in_features, layer.out_features) == (24, 10)
    x = randn(3, 24)
    with torch.no_grad():
        off, on = layer(x), None
        linear.bias += 5
        on = recipe_of()("name", linear)(x)
    assert torch.allclose(on - off, torch.full((3, 10), 5.0, dtype=torch.float64))


def test_the_head_stays_in_float():
    model = toy(tied=False)
    assert "head" not in linears(model)
    assert quantised(model, recipe(weights=Grid(2))).head is not model.head
    assert quantised(model, recipe(weights=Grid(2))).head.weight is model.head.weight


def test_a_copy_shares_all_but_what_is_fresh():
    model = toy()
    twin = copied(model, fresh={"blocks.0.norm1"})
    for name, parameter in twin.named_parameters():
        assert (parameter is dict(model.named_parameters())[name]) == (name != "blocks.0.norm1.weight")
    with torch.no_grad():
        twin.blocks[0].norm1.weight.mul_(2)
    assert (model.blocks[0].norm1.weight == 1).all()


def test_inputs_are_captured_row_by_row_and_the_hooks_go():
    model, ids = toy(), tokens()
    with record(keep={"linear.input": {"linear": "blocks.1.ffn.down"}}) as recorder, capture_inputs(model) as inputs:
        model(ids)
        model(ids[:, :5])
    assert {n: tuple(x.shape) for n, x in inputs.items()} == {n: (50, m.in_features) for n, m in linears(model).items()}
    x = inputs["blocks.0.mixer.qkv"]
    assert torch.equal(x[:40], model.blocks[0].norm1(model.embed(ids)).detach().flatten(0, 1))
    shown = recorder.freeze().track("linear.input")
    assert shown.chunks[0].array.shape == (40, 48)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with capture_inputs(model, names=["blocks.0.ffn.down"], rows=30) as few:
        model(ids)
        model(ids)
    assert few["blocks.0.ffn.down"].shape == (30, 48)
    with pytest.raises(RuntimeError), capture_inputs(model):
        raise RuntimeError
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="names must be linear layers"), capture_inputs(model, names=["embed"]):
        pass
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_input_is_named():
    a, w = quantise(randn(2, 8), Grid(8)), quantise(randn(3, 8), Grid(8))
    for call, words in [
        (lambda: integer_matmul(a, quantise(randn(3, 9), Grid(8))), r"\[\.\.\., K\] and \[out, K\], not \[2, 8\]"),
        (lambda: integer_matmul(quantise(randn(2, 8), Grid(8, granularity="channel")), w), "a must be quantised per"),
        (lambda: integer_matmul(a, quantise(randn(3, 8), Grid(8, granularity="token"))), "a must be quantised per"),
        (lambda: integer_matmul(quantise(randn(2, 8), Grid(16)), quantise(randn(3, 8), Grid(16))), "within 32 bits"),
        (
            lambda: integer_matmul(
                quantise(randn(2, 8), Grid(8, granularity="group", group=2)),
                quantise(randn(3, 8), Grid(8, granularity="group", group=4)),
            ),
            "group must be the same in a and w, not 2 and 4",
        ),
        (lambda: quantised(toy(), recipe(weights=Grid(2)), names=["blocks.9"]), "names must be linear layers"),
        (lambda: QuantLinear(torch.nn.Linear(2, 2), weights=None, activations=Grid(8))(torch.full((1, 2), torch.inf)),
         "x must be finite"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
