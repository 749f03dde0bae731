"""Retention: three forms, and what decay and normalisation do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.cost import growth_exponent
from engine.mixers import linear
from engine.mixers.retention import Retention, chunked, decay_mask, head_decays, parallel, recurrent
from engine.recording import record

from .common import SHAPE, decoder, in_parts, multiplied, rand, tokens

decays = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=2).map(lambda x: torch.tensor(x, dtype=torch.float64))


def by_hand(q, k, v, decay):
    """The sum over m <= n of gamma^(n-m) (q_n·k_m) v_m, term by term: the oracle."""
    y = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for h in range(q.shape[-3]):
        for n in range(q.shape[-2]):
            for m in range(n + 1):
                weight = (q[..., h, n, :] * k[..., h, m, :]).sum(-1, keepdim=True) * decay[h] ** (n - m)
                y[..., h, n, :] += weight * v[..., h, m, :]
    return y


@given(T=st.integers(1, 16), chunk=st.integers(1, 20), decay=decays)
def test_three_forms_of_one_sum(T, chunk, decay):
    q, k, v = rand(2, 2, T, 3), rand(2, 2, T, 3, seed=1), rand(2, 2, T, 4, seed=2)
    expected = by_hand(q, k, v, decay)
    (one, S), (other, R) = recurrent(q, k, v, decay=decay), chunked(q, k, v, decay=decay, chunk=chunk)
    for y in (parallel(q, k, v, decay=decay), one, other):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(S, R, rtol=0, atol=1e-12)
    assert S.shape == (2, 2, 3, 4)


@given(sizes=st.lists(st.integers(1, 7), min_size=2, max_size=4), chunk=st.integers(1, 5), decay=decays)
def test_a_carried_state_stands_for_the_past(sizes, chunk, decay):
    q, k, v = rand(1, 2, sum(sizes), 3), rand(1, 2, sum(sizes), 3, seed=1), rand(1, 2, sum(sizes), 3, seed=2)
    S, y = None, []
    for number, part in enumerate(zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)):
        one = recurrent(*part, S, decay=decay) if number % 2 else chunked(*part, S, decay=decay, chunk=chunk)
        y.append(one[0])
        S = one[1]
    torch.testing.assert_close(torch.cat(y, 2), parallel(q, k, v, decay=decay), rtol=0, atol=1e-12)


@given(T=st.integers(1, 20), chunk=st.integers(1, 9))
def test_without_decay_it_is_linear_attention_not_normalised(T, chunk):
    q, k, v, one = rand(2, 2, T, 4), rand(2, 2, T, 4, seed=1), rand(2, 2, T, 4, seed=2), torch.ones(2).double()
    torch.testing.assert_close(parallel(q, k, v, decay=one), linear.parallel(q, k, v), rtol=0, atol=1e-12)
    for ours, theirs in (
        (recurrent(q, k, v, decay=one), linear.recurrent(q, k, v)),
        (chunked(q, k, v, decay=one, chunk=chunk), linear.chunked(q, k, v, chunk=chunk)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_decays_and_mask_are_those_of_the_paper():
    assert head_decays(3).tolist() == [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]
    mask = decay_mask(torch.tensor([0.5, 1.0]).double(), 3)
    assert mask[0].tolist() == [[1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]]
    assert mask[1].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    halves = [round(torch.log(torch.tensor(0.5)).item() / torch.log(g).item()) for g in head_decays(3)]
    assert halves == [22, 44, 88]  # what the docstring says


def test_the_papers_other_normalisers_cancel_in_group_norm():
    """Row sums of the decay mask and of the scores (section 2.1) scale rows of a head: after GroupNorm nothing is left
    of them but eps; with eps at 1e-12 the outputs agree to 1e-9."""
    model = Retention(SHAPE, 0).double()
    torch.manual_seed(0)
    x, rope = torch.randn(1, 9, 12).double(), decoder(None).rope(torch.zeros(1, dtype=torch.float64))
    model.norm.eps = 1e-12
    plain = model(x, rope=rope)
    qkv = model.qkv(x).view(1, 9, 6, 6).transpose(1, 2)
    q, k, v = qkv.chunk(3, 1)
    q, k = rope.rotate(q, range(9)), rope.rotate(k, range(9)) / 6**0.5
    mask = decay_mask(model.decay, 9)
    scores = q @ k.mT * (mask / mask.sum(-1, keepdim=True).sqrt())
    scores = scores / scores.detach().sum(-1, keepdim=True).abs().clamp(min=1)
    y = model.norm((scores @ v).transpose(1, 2).reshape(9, 12)).view(1, 9, 12)
    gated = model.out(torch.nn.functional.silu(model.gate(x)) * y)
    torch.testing.assert_close(plain, gated, rtol=0, atol=1e-9)


def test_positions_matter_only_through_distance():
    """Rotation and decay know how far apart tokens are: the same words later in a text give the same scores."""
    model, ids = Retention(SHAPE, 0).double(), rand(1, 5, 12)
    rope = decoder(None).rope(torch.zeros(1, dtype=torch.float64))
    found = []
    for start in (0, 50):
        cache = Full()
        cache.seen = start
        found.append(model(ids, rope=rope, cache=cache))
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


def test_recorded_states_fade_and_grow():
    model, ids = decoder(lambda i: Retention(SHAPE, i, decay=(0.5, 0.9))), tokens(10)
    cache = Full()
    with torch.no_grad(), record() as recorder:
        in_parts(model, ids, [8, 1, 1], cache)
    recording = recorder.freeze()
    S, k, v = (torch.tensor(recording.stack(n, layer=0)) for n in ("retention.state", "attention.k", "attention.v"))
    decay = torch.tensor([0.5, 0.9]).float().double()[:, None, None, None]
    grown = S[:, :, 1:] - decay * S[:, :, :-1]
    torch.testing.assert_close(grown, k[:, :, 1:, :, None] * v[:, :, 1:, None], rtol=0, atol=1e-7)
    torch.testing.assert_close(S[:, :, -1], cache.states[0], rtol=0, atol=1e-12)
    mask = recording.track("retention.decay", layer=0).chunks[0].array
    assert mask.shape == (2, 8, 8)
    assert mask.min() == 0
    assert mask.max() == 1
    scores = recording.track("retention.scores", layer=0).chunks[0].array
    q = torch.tensor(recording.stack("attention.q", layer=0))[:, :, :8]
    x = model.blocks[0].norm1(model.embed(ids)).detach()
    plain = model.blocks[0].mixer.qkv(x).view(1, 10, 6, 6).transpose(1, 2)[:, 2:4].detach()
    rotated = model.rope(x).rotate(plain, range(10))[:, :, :8]
    expected = q @ rotated.mT / 6**0.5 * torch.tensor(mask)  # the paper's root of the key width
    torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-12)
    assert recording.has("retention.gate", layer=0)


@given(T=st.integers(1, 30), chunk=st.integers(1, 12))
def test_the_matrix_products_are_those_of_linear_attention(T, chunk):
    """Decay is pointwise: what is beyond the counted products is at most one more for each entry of mask and state."""
    q, k, v, decay = (
        rand(1, 1, T, 5),
        rand(1, 1, T, 5, seed=1),
        rand(1, 1, T, 5, seed=2),
        torch.full((1,), 0.9).double(),
    )
    for form, work, extra in (
        ("parallel", lambda: parallel(q, k, v, decay=decay), 2 * T * T),
        ("recurrent", lambda: recurrent(q, k, v, decay=decay), 25 * T),
        ("chunked", lambda: chunked(q, k, v, decay=decay, chunk=chunk), T * (2 * chunk + 10) + 25 * -(-T // chunk)),
    ):
        counted, formula = multiplied(work), linear.multiplications(form, T, 5, 5, chunk=chunk)
        assert formula <= counted <= formula + extra, form


def test_work_grows_as_claimed():
    lengths, decay = [32, 64, 128], torch.full((2,), 0.9).double()
    for exponent, work in (
        (2, lambda *x: parallel(*x, decay=decay)),
        (1, lambda *x: recurrent(*x, decay=decay)),
        (1, lambda *x: chunked(*x, decay=decay, chunk=16)),
    ):
        counts = [multiplied(lambda n=n, w=work: w(*(rand(1, 2, n, 8, seed=s) for s in range(3)))) for n in lengths]
        assert abs(growth_exponent(lengths, counts) - exponent) < 1e-9


def test_bad_input_is_named():
    q, decay = rand(1, 2, 4, 3), torch.ones(2).double()
    for form in (parallel, recurrent, lambda *x, decay: chunked(*x, decay=decay, chunk=2)):
        with pytest.raises(ValueError, match="q, k and v must have shapes"):
            form(q, q[..., :2], q, decay=decay)
        with pytest.raises(ValueError, match=r"decay must have one number a head of q \[1, 2, 4, 3\], not shape \[3\]"):
            form(q, q, q, decay=torch.ones(3))
    with pytest.raises(ValueError, match="chunk must be a whole number from 1 on, not 0"):
        chunked(q, q, q, decay=decay, chunk=0)
    for bad in ((0.5,), (0.5, 0.0), (0.5, 1.5), (0.5, float("nan"))):
        with pytest.raises(ValueError, match="decay must be 2 numbers above 0 and at most 1"):
            Retention(SHAPE, 0, decay=bad)
    with pytest.raises(ValueError, match="heads must be a whole number from 1 on, not 0"):
        head_decays(0)
