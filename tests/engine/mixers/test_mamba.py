"""Mamba: scan, recurrence, convolution, and transformers' own slow path."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.cost import growth_exponent
from engine.mixers.mamba import (
    Mamba,
    chunked,
    discretise,
    impulse_response,
    multiplications,
    recurrent,
    scan,
)
from engine.model import Shape
from engine.recording import record

from .common import SHAPE, decoder, in_parts, multiplied, rand, tokens


def selective(T, *, E=3, N=2, batch=2):
    """u, delta, A, B and C as a layer would make them."""
    u, delta = rand(batch, T, E), F.softplus(rand(batch, T, E, seed=1))
    return u, delta, -rand(E, N, seed=2).exp(), rand(batch, T, N, seed=3), rand(batch, T, N, seed=4)


def by_hand(u, delta, A, B, C):
    """Algorithm 2 with loops over batch, token, channel and state: the oracle."""
    y = torch.zeros_like(u)
    for b in range(u.shape[0]):
        for e in range(u.shape[2]):
            h = [0.0] * A.shape[1]
            for t in range(u.shape[1]):
                for n in range(A.shape[1]):
                    step = delta[b, t, e]
                    h[n] = torch.exp(step * A[e, n]) * h[n] + step * B[b, t, n] * u[b, t, e]
                    y[b, t, e] += C[b, t, n] * h[n]
    return y


@pytest.mark.parametrize("T", [1, 2, 3, 7, 8])
def test_recurrence_is_algorithm_2(T):
    x = selective(T)
    torch.testing.assert_close(recurrent(*x)[0], by_hand(*x), rtol=0, atol=1e-12)


@given(T=st.integers(1, 33), chunk=st.integers(1, 40))
def test_scan_and_chunks_equal_the_recurrence(T, chunk):
    x = selective(T)
    (y, h), (z, g) = recurrent(*x), chunked(*x, chunk=chunk)
    torch.testing.assert_close(z, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(g, h, rtol=0, atol=1e-12)
    assert h.shape == (2, 3, 2)
    states = scan(*discretise(x[0], x[1], x[2], x[3]))
    torch.testing.assert_close(states[:, -1], h, rtol=0, atol=1e-12)


@given(sizes=st.lists(st.integers(1, 7), min_size=2, max_size=4), chunk=st.integers(1, 5))
def test_a_carried_state_stands_for_the_past(sizes, chunk):
    u, delta, A, B, C = selective(sum(sizes))
    h, y = None, []
    for number, (uc, dc, Bc, Cc) in enumerate(zip(*(t.split(sizes, 1) for t in (u, delta, B, C)), strict=True)):
        one = recurrent(uc, dc, A, Bc, Cc, h) if number % 2 else chunked(uc, dc, A, Bc, Cc, h, chunk=chunk)
        y.append(one[0])
        h = one[1]
    torch.testing.assert_close(torch.cat(y, 1), recurrent(u, delta, A, B, C)[0], rtol=0, atol=1e-12)


def test_gradients_of_scan_and_recurrence_agree():
    x = [t.requires_grad_() for t in selective(11)]
    one = torch.autograd.grad(recurrent(*x)[0].square().sum(), x)
    other = torch.autograd.grad(chunked(*x, chunk=4)[0].square().sum(), x)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@given(T=st.integers(1, 24))
def test_constant_steps_are_a_convolution(T):
    """With Delta, B and C the same for all tokens, y is u convolved with C Abarⁿ Bbar."""
    E, N = 3, 4
    u, A = rand(2, T, E), -rand(E, N, seed=1).exp()
    delta, B, C = F.softplus(rand(E, seed=2)), rand(N, seed=3), rand(N, seed=4)
    kernel = impulse_response(delta, A, B, C, count=T)  # E T
    convolved = F.conv1d(F.pad(u.mT, (T - 1, 0)), kernel.flip(1)[:, None], groups=E).mT
    found, _ = recurrent(u, delta.expand(2, T, E), A, B.expand(2, T, N), C.expand(2, T, N))
    torch.testing.assert_close(found, convolved, rtol=0, atol=1e-12)


def test_b_is_discretised_by_euler():
    """Equation 4 would give (exp(Delta A) - 1) / A B. The two agree to first order in Delta, and differ beyond."""
    A, B, u = torch.tensor([[-2.0]]).double(), torch.ones(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    for delta, share in ((1e-4, 1e-3), (0.5, 0.5)):
        step = torch.full((1, 1, 1), delta, dtype=torch.float64)
        kept, added = discretise(u, step, A, B)
        hold = (torch.exp(step * A) - 1) / A
        assert kept.item() == torch.exp(step * A).item()
        assert added.item() == delta
        assert (abs(added.item() / hold.item() - 1) < share) == (delta < 0.1)


def test_it_equals_transformers_on_shared_weights():
    """Their slow path works in float32: a relative 1e-5. In one pass, and with the state carried."""
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = pytest.importorskip("transformers").MambaConfig(
        vocab_size=17, hidden_size=12, state_size=5, num_hidden_layers=1, conv_kernel=4, expand=2, time_step_rank=3
    )
    theirs = modeling.MambaMixer(config, layer_idx=0).eval()
    ours = Mamba(SHAPE, 0, state=5, expand=2, conv=4, rank=3, chunk=5)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) / 2)
        for mine, other in (
            (ours.inp.weight, theirs.in_proj.weight), (ours.conv, theirs.conv1d.weight),
            (ours.conv_bias, theirs.conv1d.bias), (ours.select.weight, theirs.x_proj.weight),
            (ours.to_delta, theirs.dt_proj.weight), (ours.delta_bias, theirs.dt_proj.bias),
            (ours.A_log, theirs.A_log), (ours.skip, theirs.D), (ours.out.weight, theirs.out_proj.weight),
        ):  # fmt: skip
            mine.copy_(other)
        x = rand(2, 14, 12).float()
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)
        cache = Full()
        steps = [ours(part, cache=cache) for part in x.split([3, 1, 1, 9], 1)]
        torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-5, atol=1e-6)


def test_it_starts_as_in_the_paper():
    model = Mamba(Shape(vocab=17, width=64, layers=1, heads=2, kv_heads=1, head_width=6, ffn_width=16), 0, state=8)
    step = F.softplus(model.delta_bias)
    assert step.min() >= 0.000999
    assert step.max() <= 0.1001
    assert step.log().std() > 1  # spread over the two decades
    torch.testing.assert_close(-model.A_log.exp()[3], -torch.arange(1.0, 9.0))
    assert model.to_delta.abs().max() <= 4**-0.5  # rank 64 / 16


def test_recorded_states_follow_the_recurrence():
    model, ids, cache = decoder(lambda i: Mamba(SHAPE, i, state=4)), tokens(9), Full()
    with torch.no_grad(), record() as recorder:
        in_parts(model, ids, [6, 1, 2], cache)
    recording = recorder.freeze()
    for layer in (0, 1):
        h, kept, delta = (torch.tensor(recording.stack(f"mamba.{n}", layer=layer)) for n in ("state", "kept", "delta"))
        assert h.shape == (1, 9, 24, 4)
        A = -model.blocks[layer].mixer.A_log.detach().exp()
        torch.testing.assert_close(kept, (delta[..., None] * A).exp(), rtol=0, atol=1e-14)
        torch.testing.assert_close(h[:, -1], cache.states[layer][1], rtol=0, atol=1e-12)
        wrote = torch.tensor(recording.stack("mamba.write", layer=layer))
        # What is added at each token is one vector over states, B_t, times one over channels.
        added = h[:, 1:] - kept[:, 1:] * h[:, :-1]
        ratio = added / wrote[:, 1:, None]
        torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-6, atol=1e-9)


@given(T=st.integers(1, 40), E=st.integers(1, 4), N=st.integers(1, 4))
def test_multiplications_are_those_executed(T, E, N):
    x = selective(T, E=E, N=N, batch=1)
    assert multiplied(lambda: recurrent(*x)) == multiplications("recurrent", T, E, N)
    assert multiplied(lambda: chunked(*x, chunk=T)) == multiplications("scan", T, E, N)


def test_work_grows_as_claimed():
    lengths = [64, 128, 256]
    for form, tolerance in (("recurrent", 1e-9), ("scan", 0.02)):
        counts = [multiplications(form, n, 8, 4) for n in lengths]
        assert abs(growth_exponent(lengths, counts) - 1) < tolerance
    assert multiplications("scan", 256, 8, 4) < 2 * multiplications("recurrent", 256, 8, 4)


def test_bad_input_is_named():
    u, delta, A, B, C = selective(4)
    for form in (recurrent, lambda *x: chunked(*x, chunk=2)):
        with pytest.raises(ValueError, match=r"u and delta must have one shape \[batch, tokens, E\]"):
            form(u[:, :0], delta[:, :0], A, B[:, :0], C[:, :0])
        with pytest.raises(ValueError, match=r"A must have shape \[3, N\], not \[2, 2\]"):
            form(u, delta, A[:2], B, C)
        with pytest.raises(ValueError, match=r"C must have shape \[2, 4, 2\], not \[2, 4, 1\]"):
            form(u, delta, A, B, C[..., :1])
    with pytest.raises(ValueError, match="chunk must be a whole number from 1 on, not 0"):
        chunked(u, delta, A, B, C, chunk=0)
    for name in ("state", "expand", "conv", "rank", "chunk"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number from 1 on, not 0"):
            Mamba(SHAPE, 0, **{name: 0})
    with pytest.raises(ValueError, match="not 'serial'"):
        multiplications("serial", 1, 1, 1)
