"""The quantised KV cache: equal to the plain one at 16 bits, within half a step below, and every byte counted."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.caches.layer_bits import assign, divergence, sensitivity
from engine.caches.quantised import Quantised, shrink, token_bytes
from engine.model import Decoder, Shape
from engine.recording import record

SHAPE = Shape(vocab=29, width=32, layers=3, heads=4, kv_heads=2, head_width=8, ffn_width=48, max_positions=128)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(SHAPE, seed=1).double().requires_grad_(False)


def text(count: int, seed: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 29, (batch, count), generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decode(model: Decoder, ids: torch.Tensor, cache, prefill: int) -> torch.Tensor:
    parts = [model(ids[:, :prefill], cache=cache)]
    parts += [model(ids[:, t : t + 1], cache=cache) for t in range(prefill, ids.shape[1])]
    return torch.cat(parts, 1)


@given(st.integers(1, 30), st.booleans(), st.sampled_from([None, 1, 7]))
def test_16_bits_is_the_plain_cache(model, prefill, rotated, at_once):
    ids = text(40)
    plain, same = Full(), Quantised(16, group=4, recent=2, rotated=rotated, at_once=at_once)
    expected = decode(model, ids, plain, prefill)
    got = decode(model, ids, same, prefill)
    if at_once is None:
        assert torch.equal(got, expected)
    else:  # other shapes of product round differently
        assert torch.allclose(got, expected, rtol=0, atol=1e-14)
    assert same.nbytes == plain.nbytes
    assert same.seen == 40
    assert same.kept(0).tolist() == list(range(40))


def test_a_tail_as_long_as_the_text_is_the_plain_cache(model):
    ids = text(40)
    assert torch.equal(decode(model, ids, Quantised(2, group=4, recent=37), 5), decode(model, ids, Full(), 5))


@given(
    st.integers(0, 2**31),
    st.integers(1, 15),
    st.sampled_from(["channel", "token", "tensor"]),
    st.sampled_from([0.0, 8.0, -300.0]),
    st.sampled_from([1e-4, 1.0, 50.0]),
)
def test_error_is_at_most_half_a_step(seed, bits, along, offset, size):
    x = randn(2, 3, 8, 16, seed=seed) * size + offset
    chunk = shrink(x, bits=bits, along=along, group=4)
    error = (chunk.read(x.dtype) - x).abs().unflatten(-1, (-1, 4 if along == "token" else 1))
    assert (error <= chunk.scale[0].double() * (0.5 + 1e-9)).all()
    assert chunk.levels().min() >= 0
    assert chunk.levels().max() <= 2**bits - 1


@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["channel", "token"]))
def test_equals_kivi_s_formulas(seed, bits, along):
    # KIVI, section 3.2, on values whose minima and steps float16 holds exactly: there nothing is rounded outwards.
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, 2**bits, (2, 8, 16)) + generator.uniform(-0.45, 0.45, (2, 8, 16))
    groups = groups.clip(0, 2**bits - 1)
    groups[..., 0], groups[..., 1] = 0, 2**bits - 1
    groups = groups * 2.0 ** generator.integers(-6, 3, (2, 8, 1)) - generator.integers(-64, 64, (2, 8, 1)) / 8
    least, most = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = (most - least) / (2**bits - 1)
    theirs = np.round((groups - least) / scale) * scale + least
    if along == "channel":  # 16 tokens of 8 channels
        x, theirs = (torch.tensor(part.swapaxes(1, 2))[None] for part in (groups, theirs))
    else:  # 4 tokens of two groups of 16 channels
        x, theirs = (torch.tensor(part.reshape(1, 2, 4, 32)) for part in (groups, theirs))
    assert torch.allclose(shrink(x, bits=bits, along=along, group=16).read(x.dtype), theirs, rtol=0, atol=1e-12)


def test_constants_and_extremes_are_held():
    x = torch.full((1, 1, 4, 8), 3.0)
    for along in ("channel", "token", "tensor"):
        assert torch.equal(shrink(x, bits=2, along=along, group=8).read(x.dtype), x)
    zero = torch.zeros(1, 1, 4, 8)
    assert torch.equal(shrink(zero, bits=1, along="channel", group=4).read(x.dtype), zero)


@given(st.integers(1, 45), st.sampled_from([2, 3, 4, 8]), st.sampled_from([(4, 0), (4, 3), (8, 8)]), st.booleans())
def test_what_is_seen_is_packed_tokens_then_the_tail(model, count, bits, sizes, rotated):
    group, recent = sizes
    cache, plain = Quantised(bits, group=group, recent=recent, rotated=rotated), Full()
    rope = model.rope(torch.zeros(1, dtype=torch.float64))
    k, v = randn(1, 2, count, 8), randn(1, 2, count, 8, seed=1)
    for c in (cache, plain):
        c.extend(0, k, v, rope)
        c.advance(count)
    new_k, new_v = randn(1, 2, 1, 8, seed=2), randn(1, 2, 1, 8, seed=3)
    got, full = (c.extend(0, new_k, new_v, rope) for c in (cache, plain))
    packed = max(0, (count - recent) // group) * group
    assert torch.equal(got.v[:, :, packed:], full.v[:, :, packed:])
    assert torch.allclose(got.k[:, :, packed:], full.k[:, :, packed:], rtol=0, atol=1e-12)
    assert got.q_positions == full.q_positions
    for at in range(0, packed, group):
        part = slice(at, at + group)
        expected = shrink(v[:, :, part], bits=bits, along="token", group=group).read(v.dtype)
        assert torch.equal(got.v[:, :, part], expected)
        keys = rope.rotate(k, range(count))[:, :, part] if rotated else k[:, :, part]
        expected = shrink(keys, bits=bits, along="channel", group=group).read(k.dtype)
        expected = expected if rotated else rope.rotate(expected, range(at, at + group))
        assert torch.equal(got.k[:, :, part], expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_byte_is_counted(model, bits):
    cache = Quantised(bits, group=8, recent=8)
    with torch.no_grad():
        model(text(45, batch=1), cache=cache)
    packed, tail = 32, 13  # four chunks; 13 tokens are less than 8 + 8
    heads, width, layers = 2, 8, 3
    codes = 2 * packed * heads * width * bits // 8
    keys = packed // 8 * heads * width * 4  # scale and minimum of each channel of a chunk, two bytes each
    values = packed * heads * 4  # of each token's one group of 8 channels
    assert cache.nbytes == layers * (codes + keys + values + 2 * tail * heads * width * 8)
    each = token_bytes(bits=bits, group=8, kv_heads=heads, head_width=width)
    assert packed * each == codes + keys + values


def test_fewer_bits_cost_less_and_err_more(model):
    ids = text(100)
    exact = decode(model, ids, Full(), 1).log_softmax(-1)
    errors, sizes = [], []
    for bits in (8, 4, 2, 1):
        cache = Quantised(bits, group=8, recent=8)
        errors.append(divergence(exact, decode(model, ids, cache, 1).log_softmax(-1)))
        sizes.append(cache.nbytes)
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)
    assert errors[0] < errors[-1] / 100


def test_keys_with_outlier_channels_want_a_scale_a_channel():
    x = randn(1, 2, 32, 16)
    x[..., 3] += 40
    errors = {along: float((shrink(x, bits=3, along=along, group=16).read(x.dtype) - x).norm())
              for along in ("channel", "token", "tensor")}  # fmt: skip
    assert errors["channel"] < errors["token"] / 4
    assert errors["channel"] < errors["tensor"] / 4


def test_layers_may_have_bits_of_their_own(model):
    ids = text(40)
    mixed = Quantised([16, 2, 16], group=4, recent=0)
    decode(model, ids, mixed, 1)
    alone = [Quantised([16, 16, 16], group=4, recent=0), Quantised([2, 2, 2], group=4, recent=0)]
    for cache in alone:
        decode(model, ids, cache, 1)
    assert alone[1].nbytes < mixed.nbytes < alone[0].nbytes
    assert mixed.nbytes * 3 == 2 * alone[0].nbytes + alone[1].nbytes
    with pytest.raises(ValueError, match="bits must name a number for every layer, and has 2 for layer 2"):
        decode(model, ids, Quantised([4, 4]), 1)


def test_sensitivity_is_the_divergence_of_one_layer_alone(model):
    ids = text(60)

    def make(bits):
        return Quantised(bits, group=8, recent=0, at_once=8)

    with torch.no_grad():
        losses = sensitivity(model, ids, options=(1, 2, 8), make=make)
        exact = model(ids, cache=make(16)).log_softmax(-1)
        one = model(ids, cache=make([16, 1, 16])).log_softmax(-1)
    assert losses.shape == (3, 3)
    assert float(losses[1, 0]) == pytest.approx(float((exact.exp() * (exact - one)).sum(-1).mean()), rel=1e-9)
    assert (losses[:, 0] > losses[:, 2]).all()
    assert (losses >= 0).all()


@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(2, 9))
def test_assignment_is_the_best_within_the_budget(seed, layers, budget):
    options = (2, 3, 8)
    losses = torch.rand(layers, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = assign(losses, options=options, budget=budget)

    def total(columns):
        return sum(float(losses[i, c]) for i, c in enumerate(columns))

    allowed = [c for c in itertools.product(range(3), repeat=layers)
               if sum(options[i] for i in c) <= budget * layers + 1e-9]  # fmt: skip
    assert sum(chosen) <= budget * layers + 1e-9
    assert total([options.index(b) for b in chosen]) == pytest.approx(min(map(total, allowed)), abs=1e-12)


def test_the_sensitive_layer_gets_the_bits():
    losses = torch.tensor([[0.1, 0.01], [9.0, 0.01], [0.1, 0.01]])
    assert assign(losses, options=(2, 4), budget=8 / 3) == [2, 4, 2]
    assert assign(losses, options=(2, 4), budget=4) == [4, 4, 4]


def test_taps_show_levels_read_back_and_errors(model):
    ids = text(20, batch=1)
    with record() as recorder, torch.no_grad():
        decode(model, ids, Quantised(2, group=4, recent=2), 9)
    found = recorder.freeze()
    codes = found.stack("kv_bits.key_codes", layer=1)
    assert codes.shape == (1, 2, 16, 8)
    assert codes.max() == 3
    assert found.stack("kv_bits.values", layer=2).shape == (1, 2, 16, 8)
    assert np.abs(found.stack("kv_bits.value_error", layer=0)).max() > 0
    packed = [e.fields for e in found.happened("cache.pack") if e.fields["layer"] == 1]
    assert [e["first"] for e in packed] == [0, 4, 8, 12]
    assert packed[0] == {"layer": 1, "first": 0, "count": 4, "bits": 2, "cache": ""}


def test_logits_are_the_same_while_recording(model):
    ids = text(20)
    plain = decode(model, ids, Quantised(2, group=4, recent=2), 9)
    with record():
        assert torch.equal(decode(model, ids, Quantised(2, group=4, recent=2), 9), plain)


def test_bad_input_is_named(model):
    x = randn(1, 1, 4, 8)
    rope = model.rope(torch.zeros(1, dtype=torch.float64))
    for call, words in [
        (lambda: Quantised(0), "bits must be a whole number from 1 to 16, not 0"),
        (lambda: Quantised([4, 17]), "not 17"),
        (lambda: Quantised(4, keys="row"), "keys must be one of channel, token, tensor, not 'row'"),
        (lambda: Quantised(4, values="row"), "values must be one of"),
        (lambda: Quantised(4, group=0), "group must be 1 or more and recent 0 or more, not 0 and 32"),
        (lambda: Quantised(4, recent=-1), "not 32 and -1"),
        (lambda: Quantised(4, at_once=0), "at_once must be 1 or more tokens, or None, not 0"),
        (lambda: shrink(x, bits=4, along="token", group=3), "group must divide head_width=8"),
        (lambda: Quantised(4, group=3, recent=0).extend(0, x, x, rope), "group must divide head_width=8"),
        (lambda: shrink(x / 0, bits=4, along="token", group=4), "x must be finite"),
        (lambda: shrink(x[:, :, :0], bits=4, along="token", group=4), "x must hold a value"),
        (lambda: shrink(x * 1e6, bits=4, along="token", group=4), "x must stay within the range of torch.float16"),
        (lambda: assign(torch.zeros(2, 2), options=(2, 4), budget=1.5), "budget must be at least the fewest bits, 2"),
        (lambda: assign(torch.zeros(2, 2), options=(4, 2), budget=3), "options must be rising"),
        (lambda: assign(torch.zeros(2, 3), options=(2, 4), budget=3), "losses must have a column for each of the 2"),
        (lambda: sensitivity(model, text(4), options=(0, 2)), "options must be a whole number from 1 to 16, not 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
