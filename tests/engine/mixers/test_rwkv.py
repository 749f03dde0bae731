"""RWKV-4: three forms, the sum of the paper term by term, and transformers' own slow path."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.cost import growth_exponent
from engine.mixers.rwkv import Rwkv, State, chunked, merge, multiplications, parallel, recurrent
from engine.model import Shape
from engine.recording import record

from .common import SHAPE, decoder, in_parts, multiplied, rand, tokens

DECAY, BONUS = torch.tensor([0.01, 0.7, 6.0]).double(), torch.tensor([0.3, -1.0, 2.0]).double()


def by_hand(k, v):
    """The fraction of the WKV operator, term by term: the oracle."""
    wkv = torch.zeros_like(v)
    for t in range(k.shape[1]):
        above, below = (BONUS + k[:, t]).exp() * v[:, t], (BONUS + k[:, t]).exp()
        for i in range(t):
            weight = (k[:, i] - (t - 1 - i) * DECAY).exp()
            above, below = above + weight * v[:, i], below + weight
        wkv[:, t] = above / below
    return wkv


@given(T=st.integers(1, 20), chunk=st.integers(1, 25))
def test_three_forms_of_one_average(T, chunk):
    k, v = 2 * rand(2, T, 3), rand(2, T, 3, seed=1)
    expected = by_hand(k, v)
    one, other = recurrent(k, v, decay=DECAY, bonus=BONUS), chunked(k, v, decay=DECAY, bonus=BONUS, chunk=chunk)
    for wkv in (parallel(k, v, decay=DECAY, bonus=BONUS), one[0], other[0]):
        torch.testing.assert_close(wkv, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-11)
    assert all(t.shape == (2, 3) for t in one[1])


@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4), chunk=st.integers(1, 5))
def test_a_carried_state_stands_for_the_past(sizes, chunk):
    k, v, state, wkv = rand(1, sum(sizes), 3), rand(1, sum(sizes), 3, seed=1), None, []
    for number, (kc, vc) in enumerate(zip(k.split(sizes, 1), v.split(sizes, 1), strict=True)):
        form = recurrent if number % 2 else (lambda *x, **y: chunked(*x, **y, chunk=chunk))
        found, state = form(kc, vc, state, decay=DECAY, bonus=BONUS)
        wkv.append(found)
    torch.testing.assert_close(torch.cat(wkv, 1), by_hand(k, v), rtol=0, atol=1e-12)


def test_keys_of_any_size_stay_finite():
    """exp(500) overflows even float64 (from 710 on) and float32 by far; averages do not."""
    for scale in (500.0, 5000.0):
        k, v = (scale * rand(1, 12, 3)).float().requires_grad_(), rand(1, 12, 3, seed=1).float()
        how = {"decay": DECAY.float(), "bonus": BONUS.float()}
        for wkv in (parallel(k, v, **how), recurrent(k, v, **how)[0], chunked(k, v, **how, chunk=5)[0]):
            assert wkv.isfinite().all()
            assert wkv.abs().max() <= v.abs().max() + 1e-5  # an average lies among what it averages
            assert torch.autograd.grad(wkv.sum(), k, retain_graph=True)[0].isfinite().all()


def test_merging_is_weighing():
    a, b = State(rand(4, 3), rand(4, 3, seed=1)), State(rand(4, 3, seed=2), rand(4, 3, seed=3))
    both = merge(a, b)
    total = a.log_mass.exp() + b.log_mass.exp()
    average = (a.average * a.log_mass.exp() + b.average * b.log_mass.exp()) / total
    torch.testing.assert_close(both, State(average, total.log()), rtol=0, atol=1e-12)


@pytest.fixture
def pair():
    """Our module and that of `transformers` on the same weights, far from their starting values."""
    modeling = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    config = pytest.importorskip("transformers").RwkvConfig(
        vocab_size=17, hidden_size=12, attention_hidden_size=12, num_hidden_layers=2, context_length=64
    )
    theirs, ours = modeling.RwkvSelfAttention(config, layer_id=0), Rwkv(SHAPE, 0, chunk=5)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.rand_like(p) if "mix" in "".join(n for n, q in theirs.named_parameters() if q is p) else
                    torch.randn_like(p) / 2)  # fmt: skip
        ours.log_decay.copy_(theirs.time_decay)
        ours.bonus.copy_(theirs.time_first)
        ours.mix.copy_(torch.cat((theirs.time_mix_key, theirs.time_mix_value, theirs.time_mix_receptance))[:, 0])
        for mine, other in ((ours.key, theirs.key), (ours.value, theirs.value), (ours.receptance, theirs.receptance),
                            (ours.out, theirs.output)):  # fmt: skip
            mine.weight.copy_(other.weight)
    return ours, theirs


def test_it_equals_transformers_on_shared_weights(pair):
    """Their slow path works in float32: 1e-6. In one pass, and token by token with the state carried."""
    ours, theirs = pair
    x = rand(2, 14, 12).float()
    with torch.no_grad():
        expected, _ = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-6)
        cache = Full()
        steps = [ours(part, cache=cache) for part in x.split([3, 1, 1, 9], 1)]
        torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-6)


def test_it_starts_as_the_published_code_does():
    modeling = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    config = pytest.importorskip("transformers").RwkvConfig(
        vocab_size=17, hidden_size=12, attention_hidden_size=12, num_hidden_layers=3, context_length=64
    )
    theirs = modeling.RwkvModel(config)
    shape = Shape(vocab=17, width=12, layers=3, heads=2, kv_heads=1, head_width=6, ffn_width=16)
    for layer in range(3):
        attention, ours = theirs.blocks[layer].attention, Rwkv(shape, layer)
        mix = (attention.time_mix_key, attention.time_mix_value, attention.time_mix_receptance)
        torch.testing.assert_close(ours.log_decay, attention.time_decay, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.mix, torch.cat(mix)[:, 0], rtol=0, atol=1e-6)
        # `transformers` sets every bonus to 1 (it takes ones_like of the formula); the formula is log 0.3 + zigzag / 2.
        expected = torch.tensor([0.0, 0.5, -0.5] * 4) + torch.tensor(0.3).log()
        torch.testing.assert_close(ours.bonus, expected, rtol=0, atol=1e-6)


def test_recorded_state_is_the_carried_one():
    model, ids, cache = decoder(lambda i: Rwkv(SHAPE, i, chunk=3)), tokens(9), Full()
    with torch.no_grad(), record() as recorder:
        in_parts(model, ids, [7, 1, 1], cache)
    recording = recorder.freeze()
    for layer in (0, 1):
        _, state = cache.states[layer]
        average, mass = (torch.tensor(recording.stack(n, layer=layer)) for n in ("rwkv.state", "rwkv.mass"))
        torch.testing.assert_close(State(average[:, -1], mass[:, -1]), state, rtol=0, atol=1e-12)
        receptance = recording.stack("rwkv.receptance", layer=layer)
        assert receptance.shape == (1, 9, 12)
        assert receptance.min() > 0
        assert receptance.max() < 1
        kept = recording.track("rwkv.decay", layer=layer).latest()
        torch.testing.assert_close(
            torch.tensor(kept), (-model.blocks[layer].mixer.log_decay.exp()).exp().detach(), rtol=1e-12, atol=0
        )


@given(T=st.integers(1, 24), chunk=st.integers(1, 9))
def test_multiplications_are_those_executed(T, chunk):
    k, v, how = rand(1, T, 3), rand(1, T, 3, seed=1), {"decay": DECAY, "bonus": BONUS}
    assert multiplied(lambda: parallel(k, v, **how)) == multiplications("parallel", T, 3)
    assert multiplied(lambda: recurrent(k, v, **how)) == multiplications("recurrent", T, 3)
    assert multiplied(lambda: chunked(k, v, **how, chunk=chunk)) == multiplications("chunked", T, 3, chunk=chunk)


def test_work_grows_as_claimed():
    lengths = [64, 128, 256]
    for form, exponent in (("parallel", 2), ("recurrent", 1), ("chunked", 1)):
        counts = [multiplications(form, n, 12, chunk=16) for n in lengths]
        assert abs(growth_exponent(lengths, counts) - exponent) < 1e-9


def test_bad_input_is_named():
    k, how = rand(1, 4, 3), {"decay": DECAY, "bonus": BONUS}
    for form in (parallel, recurrent, lambda *x, **y: chunked(*x, **y, chunk=2)):
        with pytest.raises(ValueError, match=r"k and v must have one shape \[batch, tokens, channels\]"):
            form(k[:, :0], k[:, :0], **how)
        with pytest.raises(ValueError, match=r"bonus must have shape \[3\], one number a channel, not \[2\]"):
            form(k, k, decay=DECAY, bonus=BONUS[:2])
    with pytest.raises(ValueError, match="chunk must be a whole number from 1 on, not 0"):
        chunked(k, k, **how, chunk=0)
    with pytest.raises(ValueError, match="not 'serial'"):
        multiplications("serial", 1, 1)
