"""Key/value heads pooled and repeated, and the short training after it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.mixers.pooling import HOW, pool, repeat, shares, uptrain
from engine.mixers.windows import WindowAttention
from engine.model import Decoder, Shape
from engine.recording import record
from engine.toyland.words import SIZE

from .common import decoder, in_parts, tokens

EIGHT = Shape(vocab=17, width=12, layers=2, heads=8, kv_heads=8, head_width=4, ffn_width=16, max_positions=64)


def heads_of(model: Decoder, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a layer, head by head."""
    s = model.shape
    qkv = model.blocks[layer].mixer.qkv.weight.unflatten(0, (-1, s.head_width))
    return qkv[: s.heads], qkv[s.heads : s.heads + s.kv_heads], qkv[s.heads + s.kv_heads :]


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_repeated_heads_are_the_same_function(kv_heads):
    shape, ids = replace(EIGHT, kv_heads=kv_heads), tokens(13, batch=2)
    model = decoder(None, shape=shape)
    wide = repeat(model)
    assert wide.shape == EIGHT
    with torch.no_grad():
        torch.testing.assert_close(wide(ids), model(ids), rtol=0, atol=1e-11)
        torch.testing.assert_close(in_parts(wide, ids, [9, 1, 3], Full()), model(ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize("how", ["mean", "first"])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_pooling_identical_heads_is_the_identity(groups, how):
    """To the last bit, though a mean rounds: and it takes neighbours for a group, as repeating does."""
    small = decoder(None, shape=replace(EIGHT, kv_heads=groups)).float()
    again = pool(repeat(small), groups=groups, how=how)
    assert again.shape == small.shape
    for name, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("how", ["mean", "first"])
def test_as_many_groups_as_heads_change_nothing(how):
    model = decoder(None, shape=EIGHT).float()
    same = pool(model, groups=8, how=how)
    with torch.no_grad():
        assert torch.equal(same(tokens(9)), model(tokens(9)))
    assert same.blocks[0].mixer.qkv.weight.data_ptr() != model.blocks[0].mixer.qkv.weight.data_ptr()


@settings(max_examples=20)
@given(groups=st.sampled_from([1, 2, 4, 8]), kv_heads=st.sampled_from([8, 4, 2]), how=st.sampled_from(HOW))
def test_each_new_head_is_what_the_shares_say(groups, kv_heads, how):
    model = decoder(None, shape=replace(EIGHT, kv_heads=kv_heads))
    if kv_heads % groups:
        with pytest.raises(ValueError, match=f"groups must divide the {kv_heads} key/value heads"):
            pool(model, groups=groups, how=how)
        return
    with record() as recorder:
        small = pool(model, groups=groups, how=how)
    seen = recorder.freeze()
    share = shares(kv_heads, groups=groups, how=how).double()
    assert (seen.track("pooling.share").latest() == share.numpy()).all()
    size = kv_heads // groups
    for layer in (0, 1):
        old, new = heads_of(model, layer), heads_of(small, layer)
        assert torch.equal(old[0], new[0])
        for of, a, b in (("k", old[1], new[1]), ("v", old[2], new[2])):
            if how != "random":
                torch.testing.assert_close(b, torch.einsum("gk,kdw->gdw", share, a), rtol=0, atol=1e-14)
            away = (a - b.repeat_interleave(size, 0)).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)
            lost = torch.tensor(seen.track("pooling.distance", layer=layer, of=of).latest())
            torch.testing.assert_close(lost, away, rtol=1e-12, atol=0)


def test_shares_are_of_neighbours():
    assert shares(4, groups=2).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert shares(4, groups=2, how="first").tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert not shares(4, groups=2, how="random").any()


def test_a_mean_of_matrices_is_a_mean_of_keys():
    model = decoder(None, shape=EIGHT)
    x = model.embed(tokens(5)).detach()
    keys = torch.einsum("btw,kdw->bktd", x, heads_of(model, 0)[1])
    pooled = torch.einsum("btw,kdw->bktd", x, heads_of(pool(model, groups=2), 0)[1])
    torch.testing.assert_close(pooled, keys.unflatten(1, (2, 4)).mean(2), rtol=0, atol=1e-12)


def test_random_heads_hang_on_the_seed_alone():
    model = decoder(None, shape=EIGHT)
    torch.manual_seed(5)
    one = heads_of(pool(model, groups=2, how="random", seed=3), 1)[1]
    torch.manual_seed(6)
    two = heads_of(pool(model, groups=2, how="random", seed=3), 1)[1]
    other = heads_of(pool(model, groups=2, how="random", seed=4), 1)[1]
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert 0.01 < one.std() < 0.03


def test_the_cache_shrinks_by_heads_over_groups():
    model, ids = decoder(None, shape=EIGHT), tokens(9)
    sizes = []
    for groups in (8, 2, 1):
        cache = Full()
        with torch.no_grad():
            pool(model, groups=groups)(ids, cache=cache)
        sizes.append(cache.nbytes)
    assert sizes[0] == 4 * sizes[1] == 8 * sizes[2]


def test_uptraining_mends_what_pooling_broke_and_can_be_stopped():
    """A made-up small toy: trained a little, pooled, trained on. Weights are stopped where they are."""
    shape = Shape(vocab=SIZE, width=32, layers=1, heads=4, kv_heads=4, head_width=8, ffn_width=32)
    model = Decoder(shape, seed=0)
    how = {"rows": 4, "length": 24}
    before = uptrain(model, steps=40, rate=1e-2, **how)
    assert len(before) == 40
    assert before[-1] < before[0]
    told = []
    small = pool(model, groups=1)
    with record() as recorder:
        losses = uptrain(
            small, steps=50, rate=5e-3, **how, progress=lambda *now: told.append(now), stop=lambda: len(told) == 12
        )
    assert told == [(i + 1, 50, loss) for i, loss in enumerate(losses)]
    assert len(losses) == 12
    assert recorder.freeze().stack("train.loss").tolist() == pytest.approx(losses)
    assert not small.training
    assert not any(p.requires_grad for p in small.parameters())
    assert torch.equal(model.blocks[0].mixer.qkv.weight[:32], pool(model, groups=1).blocks[0].mixer.qkv.weight[:32])

    class StopError(Exception):
        pass

    def raises(*_):
        raise StopError

    with pytest.raises(StopError):
        uptrain(small, steps=5, **how, progress=raises)
    assert not any(p.requires_grad for p in small.parameters())


def test_uptraining_is_done_again_bit_for_bit_under_inference_mode_too():
    shape = Shape(vocab=SIZE, width=16, layers=1, heads=2, kv_heads=2, head_width=8, ffn_width=16)
    how = {"steps": 4, "rows": 2, "length": 16}
    with torch.inference_mode():
        a = pool(Decoder(shape, seed=0), groups=1)
        losses = uptrain(a, **how)
    b = pool(Decoder(shape, seed=0), groups=1)
    assert uptrain(b, **how) == losses
    assert uptrain(pool(Decoder(shape, seed=0), groups=1), seed=2, **how) != losses


@pytest.mark.real
@pytest.mark.slow
def test_the_trained_toy_is_hurt_and_mended():
    from engine.checkpoints import load
    from engine.toyland import Grammar
    from engine.train import measure

    def perplexity(model):
        return measure(model, Grammar(), rows=8, length=128)["perplexity"]

    model, _ = load("toy")
    small = pool(model, groups=2)
    hurt = perplexity(small)
    assert hurt > 2 * perplexity(model)
    assert hurt < perplexity(pool(model, groups=2, how="first")) < perplexity(pool(model, groups=2, how="random"))
    uptrain(small, steps=10, rows=8)
    assert perplexity(small) < hurt / 2


def test_bad_input_is_named():
    model = decoder(None, shape=EIGHT)
    for groups, message in ((0, "from 1 on, not 0"), (3, "groups must divide the 8 key/value heads, and 3 does not")):
        with pytest.raises(ValueError, match=message):
            pool(model, groups=groups)
    with pytest.raises(ValueError, match="how must be one of mean, first, random, not 'max'"):
        pool(model, groups=2, how="max")
    windowed = decoder(lambda i: WindowAttention(EIGHT, i, window=3), shape=EIGHT)
    for change in (lambda m: pool(m, groups=2), repeat):
        with pytest.raises(ValueError, match=r"model must have softmax attention in all layers, not \['Window"):
            change(windowed)
    with pytest.raises(ValueError, match="steps must be a whole number from 1 on, not 0"):
        uptrain(model, steps=0)
    with pytest.raises(ValueError, match="rate must be a number above 0, not 0"):
        uptrain(model, steps=1, rate=0)
