"""Hybrids and the small helpers of recurrent mixers."""

from itertools import pairwise

import pytest
import torch

from engine.caches.full import Full
from engine.mixers.hybrid import hybrid, layer_stack, remixed, spread
from engine.mixers.mamba import Mamba
from engine.mixers.rwkv import Rwkv
from engine.mixers.softmax import SoftmaxAttention
from engine.mixers.state import state_bytes
from engine.mixers.windows import WindowAttention
from engine.model import Decoder, Shape

from .common import in_parts, tokens

SHAPE = Shape(vocab=17, width=12, layers=8, heads=2, kv_heads=1, head_width=6, ffn_width=16)


def mamba(layer):
    return Mamba(SHAPE, layer, state=4)


def attention(layer):
    return SoftmaxAttention(SHAPE, layer)


def test_layers_are_where_jamba_has_them():
    """One attention layer in 8: at place 4 (`attn_layer_offset` of the released Jamba)."""
    assert spread(8, 1) == [4]
    assert spread(32, 4) == [4, 12, 20, 28]
    assert spread(8, 0) == []
    assert spread(3, 3) == [0, 1, 2]
    model = Decoder(SHAPE, mixer=hybrid(SHAPE, mamba, attention, at=spread(8, 1)))
    assert layer_stack(model) == ["Mamba"] * 4 + ["SoftmaxAttention"] + ["Mamba"] * 3


@pytest.mark.parametrize("count", range(9))
def test_spread_is_even(count):
    places = spread(8, count)
    assert len(set(places)) == count
    gaps = [b - a for a, b in pairwise(places)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_hybrid_of_one_kind_is_that_kind():
    ids = tokens(9)
    with torch.no_grad():
        for at, only in (((), mamba), (range(8), attention)):
            mixed, pure = Decoder(SHAPE, mixer=hybrid(SHAPE, mamba, attention, at=at)), Decoder(SHAPE, mixer=only)
            assert torch.equal(mixed(ids), pure(ids))


def test_three_kinds_compose():
    """A factory is a mixer like any other, so hybrids nest; each layer keeps what it is made to keep."""
    inner = hybrid(SHAPE, mamba, attention, at={1, 5})
    model = Decoder(SHAPE, mixer=hybrid(SHAPE, inner, lambda i: Rwkv(SHAPE, i), at={7})).double()
    assert layer_stack(model)[7] == "Rwkv"
    ids, cache = tokens(14), Full()
    with torch.no_grad():
        torch.testing.assert_close(in_parts(model, ids, [6, 1, 7], cache), model(ids), rtol=0, atol=1e-11)
    assert set(cache.states) == {0, 2, 3, 4, 6, 7}
    assert cache.nbytes == 2 * 2 * 14 * 6 * 8  # keys and values of the two attention layers alone
    assert state_bytes(cache.states) == 8 * (5 * (3 * 24 + 24 * 4) + 3 * 12)


def test_bad_input_is_named():
    for at in ({8}, {-1}, {0, 9}):
        with pytest.raises(ValueError, match="at must name layers from 0 to 7"):
            hybrid(SHAPE, mamba, attention, at=at)
    with pytest.raises(ValueError, match="count must be at most layers=4, not 5"):
        spread(4, 5)
    with pytest.raises(ValueError, match="count must be a whole number from 0 on, not -1"):
        spread(4, -1)
    with pytest.raises(ValueError, match="layers must be a whole number from 1 on, not 0"):
        spread(0, 0)


def test_the_same_weights_under_other_mixers():
    """Windows as wide as the text are full attention; narrower ones are not; nothing is copied."""
    model = Decoder(SHAPE, seed=3).eval()
    ids = tokens(20)
    wide = remixed(model, lambda layer: WindowAttention(SHAPE, layer, window=20))
    narrow = remixed(model, lambda layer: WindowAttention(SHAPE, layer, window=3))
    torch.testing.assert_close(wide(ids), model(ids))
    assert (narrow(ids) - model(ids)).abs().max() > 1e-4
    assert wide.embed.weight.data_ptr() == model.embed.weight.data_ptr()


def test_fewer_layers_are_the_first_ones():
    model = Decoder(SHAPE, seed=3).eval()
    ids = tokens(9)
    short = remixed(model, attention, layers=2)
    assert len(short.blocks) == short.shape.layers == 2
    x = model.through(model.embed(ids), range(2), shared={})
    torch.testing.assert_close(short.hidden(ids), model.norm(x))
    for layers in (0, 9):
        with pytest.raises(ValueError, match="layers"):
            remixed(model, attention, layers=layers)
