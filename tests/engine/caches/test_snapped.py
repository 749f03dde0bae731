"""Few tokens in few bits: many bits change next to nothing, values are those of the grid, slots the inner cache's."""

import pytest
import torch

from engine.caches.full import Full
from engine.caches.heavy_hitters import HeavyHitters
from engine.caches.quantised import shrink
from engine.caches.sinks import Sinks
from engine.caches.snapped import Snapped
from engine.caches.window import Window
from engine.model import Decoder, Shape
from engine.recording import record

SHAPE = Shape(vocab=30, width=32, layers=2, heads=4, kv_heads=2, head_width=8, ffn_width=40, max_positions=64)
IDS = torch.arange(40).remainder(29)[None]


@pytest.fixture(scope="module")
def model():
    return Decoder(SHAPE, seed=1).double().eval().requires_grad_(False)


def inners():
    return {"window": Window(12), "sinks": Sinks(2, 10), "heavy": HeavyHitters(4, recent=6, sinks=2)}


@pytest.mark.parametrize("name", list(inners()))
def test_with_many_bits_it_is_the_inner_cache(model, name):
    plain = model(IDS, cache=inners()[name])
    fine = model(IDS, cache=Snapped(inners()[name], bits=15))
    coarse = model(IDS, cache=Snapped(inners()[name], bits=2))
    assert (fine - plain).abs().max() < 1e-3 < (coarse - plain).abs().max()


@pytest.mark.parametrize("name", list(inners()))
def test_slots_and_what_one_pass_may_bring_are_the_inner_ones(model, name):
    inside, cache = inners()[name], Snapped(inners()[name], bits=4)
    assert (cache.bound, cache.at_once, cache.watches) == (inside.bound, inside.at_once, inside.watches)
    with record() as recorder:
        whole = model(IDS, cache=cache)
    assert torch.equal(cache.kept(0), cache.inside.kept(0))
    assert cache.kept(0).shape[-1] == 12
    assert cache.seen == cache.inside.seen == 40
    assert recorder.freeze().stack("snapped.keys", layer=0).shape[-1] == SHAPE.head_width
    again = Snapped(inners()[name], bits=4)
    one_by_one = torch.cat([model(IDS[:, t : t + 1], cache=again) for t in range(40)], 1)
    torch.testing.assert_close(one_by_one, whole)


def test_what_is_held_is_what_the_grid_gives_back(model):
    cache = Snapped(Window(5), bits=3)
    k, v = torch.randn(2, 1, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    view = cache.extend(0, k, v, model.rope(k))
    torch.testing.assert_close(view.v, shrink(v, bits=3, along="token", group=8).read(v.dtype), rtol=0, atol=0)
    assert max(len(row.unique()) for row in view.v.reshape(-1, 8)) <= 8


def test_bytes_are_codes_and_constants_as_packed(model):
    cache = Snapped(Window(12), bits=4)
    model(IDS, cache=cache)
    values = 2 * 2 * 2 * 8 * 12  # keys and values, layers, heads, width, slots
    assert cache.nbytes == values / 2 + values / 8 * 4
    halves = Snapped(Window(12), bits=4, group=4)
    model(IDS, cache=halves)
    assert halves.nbytes == values / 2 + values / 4 * 4
    heavy = Snapped(HeavyHitters(4, recent=6, sinks=2), bits=4)
    model(IDS, cache=heavy)
    assert heavy.nbytes == cache.nbytes + 2 * 2 * 12 * (8 + 8)  # places, and scores in float64


def test_errors_are_sentences(model):
    with pytest.raises(ValueError, match="inside must be a cache that keeps some"):
        Snapped(Full(), bits=4)
    with pytest.raises(ValueError, match="bits must be"):
        Snapped(Window(4), bits=16)
    with pytest.raises(ValueError, match="group must be 0"):
        Snapped(Window(4), bits=4, group=-1)
    used = Window(4)
    model(IDS, cache=used)
    with pytest.raises(ValueError, match="fresh"):
        Snapped(used, bits=4)
    with pytest.raises(ValueError, match="group must divide"):
        model(IDS, cache=Snapped(Window(4), bits=4, group=3))
