"""QLoRA: the start is the 4-bit model, gradients reach A and B alone, the stored bits are counted."""

import pytest
import torch

from engine.peft import detach, lora, qlora, trainable
from engine.quant import quantised
from engine.quant.affine import Grid, quantise
from engine.quant.integer import recipe
from engine.quant.nf4 import from_blocks, to_blocks
from tests.engine.peft.test_lora import furthest
from tests.engine.quant.test_integer import randn, tokens, toy

GRID = Grid(4, symmetric=False, granularity="group", group=16, whole_zero=False)


def test_the_start_is_the_model_on_its_4_bit_grid():
    base, ids = toy(), tokens()
    exact = quantised(base, recipe(weights=GRID))(ids)
    model = qlora.attach(base, rank=3, targets=("q", "down"), store=lambda w: qlora.Affine(w, group=16))
    assert torch.equal(model(ids), exact)
    assert torch.equal(detach(model)(ids), exact)
    assert not torch.equal(exact, base(ids))


def test_nf4_is_read_back_from_packed_codes():
    weight = randn(24, 64)
    store = qlora.NF4(weight)
    assert torch.equal(store(), from_blocks(*to_blocks(weight)).view(24, 64))
    assert torch.equal(store.decode(), store())
    assert store.codes.numel() == 24 * 64 // 2
    assert store.stored_bits == 24 * 64 * 4 + 24 * 64  # a float64 constant for each 64 weights here
    assert qlora.Affine(weight).codes.numel() == 24 * 64 // 2
    assert torch.equal(qlora.Affine(weight, group=16)(), quantise(weight, GRID).reconstruct())


def test_only_the_products_learn_and_what_was_rounded_stays():
    base, ids = toy(), tokens()
    model = qlora.attach(base, rank=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(trainable(model)) == {
        name for name, _ in model.named_parameters() if ".A." in name or ".B." in name
    }  # fmt: skip
    optimiser = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for _ in range(2):
        model(ids).square().mean().backward()
        optimiser.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (".A." in name or ".B." in name)
    merged = lora.merge(model)
    assert furthest(merged(ids), model(ids)) < 1e-12


def test_bits_of_all_linear_layers_are_counted():
    model = qlora.attach(toy(), targets=("q",))
    values = sum(layer.base().numel() for layer in lora.layers(model).values())
    assert values == 2 * (64 * 32 + 32 * 32 + 96 * 32 + 32 * 48)
    assert qlora.stored_bits(model) == values * 4 + values // 64 * 64
    assert qlora.stored_bits(lora.attach(toy())) == 2 * 64 * 32 * 64  # float64, the layers with a product


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="store must be one of nf4, affine, not 'int3'"):
        qlora.attach(toy(), store="int3")
    with pytest.raises(ValueError, match="block must divide"):
        qlora.NF4(randn(3, 5))
