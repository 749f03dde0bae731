"""Weights after a stay in a format: the formats' own arithmetic, block by block, and nothing else of the model."""

import pytest
import torch

from engine.model import Decoder, Shape
from engine.quant import linears, quantised
from engine.quant.formats import FORMATS, rounded
from engine.quant.nf4 import from_blocks, to_blocks
from engine.quant.stored import BLOCK, block_of, recipe, residuals, stored, stored_bits

SHAPE = Shape(vocab=20, width=32, layers=2, heads=2, kv_heads=1, head_width=16, ffn_width=48)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "fp8 e4m3fn", "fp8 e5m2"])
def test_floats_are_the_formats_own(name):
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-4, 5)
    assert torch.equal(stored(x, FORMATS[name]), rounded(x, FORMATS[name]))
    assert stored_bits(x, FORMATS[name]) == 63 * FORMATS[name].bits


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_others_are_scaled_block_by_block(name):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    back = stored(x, FORMATS[name])
    expected = from_blocks(*to_blocks(x, form=FORMATS[name], block=64), form=FORMATS[name]).view(6, 64)
    assert torch.equal(back, expected)
    largest = x.abs().amax(1)
    assert torch.allclose(back.abs().amax(1), largest)  # the largest of each block is a level
    assert torch.equal(stored(x * 8, FORMATS[name]), back * 8)
    assert stored_bits(x, FORMATS[name]) == 384 * FORMATS[name].bits + 6 * 16


def test_a_block_divides_the_values():
    assert [block_of(torch.ones(n)) for n in (1, 6, 96, 128, 4096)] == [1, 2, 32, BLOCK, BLOCK]


def test_only_the_linear_layers_change():
    model = Decoder(SHAPE, seed=1)
    ids = torch.arange(12)[None]
    before = model(ids)
    twin = quantised(model, recipe(FORMATS["fp16"]))
    for name, linear in linears(twin).items():
        own = linears(model)[name].weight
        assert torch.equal(linear.weight, own.half().float())
        assert linear.weight.data_ptr() != own.data_ptr()
    assert twin.embed.weight is model.embed.weight
    assert torch.equal(model(ids), before)
    assert (twin(ids) - before).abs().max() < 0.01 * before.abs().max()
    assert torch.equal(quantised(model, recipe(FORMATS["fp32"]))(ids), before)


def test_residuals_are_what_each_block_is_given():
    model = Decoder(SHAPE, seed=1)
    ids = torch.arange(12)[None]
    found = dict(residuals(model, ids))
    assert torch.equal(found[0], model.embed(ids)[0])
    assert list(found) == [0, 1]
    assert torch.equal(found[1], model.blocks[0](found[0][None], **_context(model, ids))[0])
    assert not any(block.norm1._forward_pre_hooks for block in model.blocks)


def _context(model, ids):
    """What Decoder.hidden hands to a block, as it hands it."""
    seen = {}
    handle = model.blocks[0].register_forward_pre_hook(lambda m, args, kw: seen.update(kw), with_kwargs=True)
    model.hidden(ids)
    handle.remove()
    return seen


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="x must be finite"):
        stored(torch.tensor([torch.inf]), FORMATS["fp16"])
