"""BitFit: zeros change no bit, only biases move, and a model without any is refused."""

import pytest
import torch

from engine.peft import bitfit, key_of, trainable, trained_count, with_key
from tests.engine.quant.test_integer import tokens, toy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_biases_of_zeros_change_no_bit(dtype, activation):
    base, ids = toy(activation=activation).to(dtype), tokens()
    twin = bitfit.with_biases(base)
    assert torch.equal(twin(ids), base(ids))
    assert torch.equal(bitfit.attach(twin)(ids), base(ids))
    assert not trainable(twin)
    assert all(p.dtype == dtype for p in twin.parameters())


def test_every_bias_is_trained_and_nothing_else():
    base, ids = toy(), tokens()
    model = bitfit.attach(bitfit.with_biases(base))
    # a layer: qkv, out, the fused gate and up, down, two norms; then the last norm
    assert trained_count(model) == 2 * (64 + 32 + 96 + 32 + 2 * 32) + 32
    start = key_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.SGD(trainable(model).values(), lr=0.1)
    model(ids).square().mean().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    optimiser.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(".bias")
    assert not torch.equal(model(ids), base(ids))
    assert torch.equal(with_key(model, start)(ids), base(ids))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items() if name in before)


def test_biases_that_are_there_are_kept():
    twin = bitfit.with_biases(toy())
    with torch.no_grad():
        for p in bitfit.attach(twin).parameters():
            if p.requires_grad:
                p += 1.0  # copies: those of `twin` stay zero
    assert not twin.blocks[0].mixer.qkv.bias.any()
    again = bitfit.with_biases(twin)
    assert again.blocks[0].mixer.qkv.bias is not None
    assert len(list(again.parameters())) == len(list(twin.parameters()))


def test_a_model_without_biases_is_refused():
    with pytest.raises(ValueError, match="model must have biases for BitFit to train, and this one has none"):
        bitfit.attach(toy())
