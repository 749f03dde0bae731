"""Titans' memory: gradients against autograd, chunks against the loop, the delta rule, surprise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from engine.caches.full import Full
from engine.cost import growth_exponent
from engine.mixers.neural_memory import MAX_RATE, NeuralMemory, steering
from engine.mixers.state import state_bytes
from engine.mixers.titans import (
    Memory,
    chunked,
    gradients,
    multiplications,
    recall,
    running_products,
    sequential,
    shares,
)
from engine.mixers.titans_layers import MemoryAsContext, MemoryAsGate
from engine.recording import record

from .common import SHAPE, decoder, in_parts, multiplied, rand, tokens

B, H, D = 2, 2, 3


def network(depth, seed=0):
    return tuple(rand(B, H, D, D, seed=seed + i) for i in range(depth))


def text(T, seed=10):
    """q, k, v and the three controls between 0 and 1; keys of length 1 and small rates, as the layer makes them."""
    q, k, v = (rand(B, H, T, D, seed=seed + i) for i in range(3))
    rate, momentum, forgetting = (torch.sigmoid(rand(B, H, T, seed=seed + 3 + i)) for i in range(3))
    return (q, k / k.norm(dim=-1, keepdim=True), v), {"rate": rate / 8, "momentum": momentum, "forgetting": forgetting}


def by_hand(memory, q, k, v, *, rate, momentum, forgetting, chunk):
    """Equations 13 to 18 with autograd for the gradients, at the weights that each chunk started with: the oracle."""
    weights, surprise, y = list(memory.weights), list(memory.surprise), []
    for t in range(q.shape[2]):
        if t % chunk == 0:
            anchor = [w.detach().requires_grad_() for w in weights]
        loss = (recall(tuple(anchor), k[:, :, t : t + 1]) - v[:, :, t : t + 1]).square().sum()
        for i, g in enumerate(torch.autograd.grad(loss, anchor)):
            theta, eta, alpha = (x[:, :, t, None, None] for x in (rate, momentum, forgetting))
            surprise[i] = eta * surprise[i] - theta * g
            weights[i] = (1 - alpha) * weights[i] + surprise[i]
        y.append(recall(tuple(weights), q[:, :, t : t + 1]))
    return torch.cat(y, 2), weights, surprise


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradients_are_those_of_autograd(depth):
    """Every token's gradient of every layer, and the sum over tokens; finite differences agree too."""
    weights = tuple(w.requires_grad_() for w in network(depth))
    (_, k, v), _ = text(5)
    inputs, errors = gradients(weights, k, v)
    assert len(inputs) == len(errors) == depth
    for t in range(5):
        loss = recall(weights, k[:, :, t]) if depth == 0 else recall(weights, k[:, :, t : t + 1]) - v[:, :, t : t + 1]
        for a, e, g in zip(inputs, errors, torch.autograd.grad(loss.square().sum(), weights), strict=True):
            torch.testing.assert_close(a[:, :, t, :, None] * e[:, :, t, None, :], g, rtol=0, atol=1e-12)
    whole = torch.autograd.grad((recall(weights, k) - v).square().sum(), weights)
    for a, e, g in zip(inputs, errors, whole, strict=True):
        torch.testing.assert_close(a.mT @ e, g, rtol=0, atol=1e-12)
    small = 1e-6 * rand(B, H, D, D, seed=99)
    moved = [(recall((weights[0] + s * small, *weights[1:]), k) - v).square().sum() for s in (1, -1)]
    predicted = 2 * (inputs[0].mT @ errors[0] * small).sum()
    torch.testing.assert_close(moved[0] - moved[1], predicted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_loop_is_the_equations(depth):
    (q, k, v), controls = text(7)
    start = Memory(network(depth), network(depth, seed=5), network(depth), 0)
    y, after = sequential(start, q, k, v, **controls)
    expected, weights, surprise = by_hand(start, q, k, v, **controls, chunk=1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close((*after.weights, *after.surprise), (*weights, *surprise), rtol=0, atol=1e-12)


@given(T=st.integers(1, 14), chunk=st.integers(1, 16), depth=st.integers(1, 3))
def test_chunks_take_gradients_at_their_start(T, chunk, depth):
    """Against the oracle with frozen gradients, at any chunk and length; a chunk of 1 is the loop."""
    (q, k, v), controls = text(T)
    start = Memory.fresh(network(depth))
    y, after = chunked(start, q, k, v, **controls, chunk=chunk)
    expected, weights, surprise = by_hand(start, q, k, v, **controls, chunk=chunk)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close((*after.weights, *after.surprise), (*weights, *surprise), rtol=0, atol=1e-11)
    if chunk == 1:
        loop, memory = sequential(start, q, k, v, **controls)
        torch.testing.assert_close(y, loop, rtol=0, atol=1e-12)
        torch.testing.assert_close(after.weights, memory.weights, rtol=0, atol=1e-12)


def test_a_larger_chunk_is_another_memory():
    """Chunks are an approximation of the loop, not another order of it: the page must not say otherwise."""
    (q, k, v), controls = text(8)
    one, four = (chunked(Memory.fresh(network(1)), q, k, v, **controls, chunk=c)[0] for c in (1, 4))
    assert (one - four).abs().max() > 1e-3
    torch.testing.assert_close(one[:, :, :1], four[:, :, :1], rtol=0, atol=1e-12)


@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5), chunk=st.integers(1, 7))
def test_a_chunk_goes_on_in_the_next_call(sizes, chunk):
    (q, k, v), controls = text(sum(sizes))
    start = Memory.fresh(network(2))
    whole, after = chunked(start, q, k, v, **controls, chunk=chunk)
    memory, y, place = start, [], 0
    for size in sizes:
        part = slice(place, place + size)
        found, memory = chunked(
            memory, *(x[:, :, part] for x in (q, k, v)), **{n: x[:, :, part] for n, x in controls.items()}, chunk=chunk
        )
        y.append(found)
        place += size
    torch.testing.assert_close(torch.cat(y, 2), whole, rtol=0, atol=1e-12)
    assert memory.age == after.age == sum(sizes) % chunk
    for ours, theirs in zip(memory[:3], after[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_without_momentum_and_forgetting_it_is_the_delta_rule():
    """A linear memory then does M += beta kᵀ (v - k M) with beta = 2 theta; at beta = 1 it recalls the last value."""
    (q, k, v), controls = text(6)
    nothing = torch.zeros(B, H, 6).double()
    for rate in (controls["rate"], nothing + 0.5):
        y, memory = sequential(Memory.fresh(network(1)), q, k, v, rate=rate, momentum=nothing, forgetting=nothing)
        (M,) = network(1)
        for t in range(6):
            kt, vt, beta = k[:, :, t, None], v[:, :, t, None], 2 * rate[:, :, t, None, None]
            M = M + beta * kt.mT @ (vt - kt @ M)
            torch.testing.assert_close(y[:, :, t : t + 1], q[:, :, t : t + 1] @ M, rtol=0, atol=1e-12)
        torch.testing.assert_close(memory.weights[0], M, rtol=0, atol=1e-12)
    torch.testing.assert_close(recall(memory.weights, k[:, :, -1:]), v[:, :, -1:], rtol=0, atol=1e-12)


def surprises(memory, k, v, **controls):
    """The length of the gradient of each token, as the loop meets them."""
    found = []
    for t in range(k.shape[2]):
        part = slice(t, t + 1)
        a, e = gradients(memory.weights, k[:, :, part], v[:, :, part])
        found.append(sum((x.mT @ y).square().sum((-1, -2)) for x, y in zip(a, e, strict=True)).sqrt())
        _, memory = sequential(
            memory, k[:, :, part], k[:, :, part], v[:, :, part], **{n: x[:, :, part] for n, x in controls.items()}
        )
    return torch.stack(found, -1)


def repeated(*, rate, momentum=0.0, forgetting=0.0):
    """One fact eight times, then another whose key is orthogonal; and the controls of all nine tokens."""
    (_, k, v), _ = text(2)
    other = k[:, :, 1:] - (k[:, :, 1:] * k[:, :, :1]).sum(-1, keepdim=True) * k[:, :, :1]
    k = torch.cat((k[:, :, :1].expand(-1, -1, 8, -1), other / other.norm(dim=-1, keepdim=True)), 2)
    v = torch.cat((v[:, :, :1].expand(-1, -1, 8, -1), v[:, :, 1:]), 2)
    how = {"rate": rate, "momentum": momentum, "forgetting": forgetting}
    return k, v, {name: torch.full((B, H, 9), value, dtype=torch.float64) for name, value in how.items()}


def test_surprise_falls_on_repetition():
    """A linear memory: by just 1 - 2 theta each time, since keys have length 1; a new fact surprises as it would have
    at the start. Without learning nothing ever gets less surprising."""
    memory = Memory.fresh(network(1))
    k, v, controls = repeated(rate=0.05)
    found = surprises(memory, k, v, **controls)
    torch.testing.assert_close(found[..., 1:8], 0.9 * found[..., :7], rtol=1e-12, atol=0)
    k, v, controls = repeated(rate=0.0)
    still = surprises(memory, k, v, **controls)
    torch.testing.assert_close(still[..., :8], still[..., :1].expand(-1, -1, 8), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[..., 8], still[..., 8], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("depth", "momentum"), [(1, 0.3), (2, 0.0), (2, 0.3)])
def test_with_depth_and_momentum_surprise_still_falls(depth, momentum):
    """After eight times at most 60% of the surprise is left. Not every single step falls: the gradient of a deep memory
    also grows with its weights."""
    k, v, controls = repeated(rate=0.05, momentum=momentum)
    found = surprises(Memory.fresh(network(depth)), k, v, **controls)
    assert (found[..., 7] < 0.6 * found[..., 0]).all()


def test_forgetting_all_leaves_only_the_last_gradient():
    (q, k, v), controls = text(4)
    controls |= {"forgetting": torch.ones(B, H, 4).double(), "momentum": torch.zeros(B, H, 4).double()}
    first = [x[:, :, :3] for x in (q, k, v)], {n: x[:, :, :3] for n, x in controls.items()}
    _, before = sequential(Memory.fresh(network(1)), *first[0], **first[1])
    _, after = sequential(Memory.fresh(network(1)), q, k, v, **controls)
    a, e = gradients(before.weights, k[:, :, 3:], v[:, :, 3:])
    gradient = controls["rate"][:, :, 3, None, None] * (a[0].mT @ e[0])
    torch.testing.assert_close(after.weights[0], -gradient, rtol=0, atol=1e-12)


def test_running_products_survive_zeros():
    x = torch.tensor([0.5, 0.0, 2.0, 3.0]).double()
    assert running_products(x).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 2, 1, 0], [0, 6, 3, 1]]
    controls = [torch.zeros(1, 1, 3).double().requires_grad_() for _ in range(3)]
    s = shares(*controls)
    sum(t.sum() for t in s).backward()
    assert all(c.grad.isfinite().all() for c in controls)


@settings(max_examples=20)
@given(T=st.integers(1, 20), chunk=st.integers(1, 8), depth=st.integers(1, 3))
def test_multiplications_are_those_executed(T, chunk, depth):
    """Exactly the formula, by PyTorch's own counter, which counts 2 for a multiplication in a product of matrices."""
    one = {n: torch.full((1, 1, T), 0.1).double() for n in ("rate", "momentum", "forgetting")}
    x = rand(1, 1, T, 16)
    memory = Memory.fresh(tuple(rand(1, 1, 16, 16, seed=i) for i in range(depth)))
    for form, work in (
        ("sequential", lambda: sequential(memory, x, x, x, **one)),
        ("chunked", lambda: chunked(memory, x, x, x, **one, chunk=chunk)),
    ):
        with FlopCounterMode(display=False) as counter:
            work()
        assert counter.get_total_flops() == 2 * multiplications(form, T, 16, depth=depth, chunk=chunk)


def test_work_grows_as_claimed():
    lengths = [32, 64, 128]
    for form in ("sequential", "chunked"):
        counts = [multiplications(form, n, 8, depth=2, chunk=16) for n in lengths]
        assert abs(growth_exponent(lengths, counts) - 1) < 1e-9

    def layer(n):
        one = {name: torch.full((1, 1, n), 0.1).double() for name in ("rate", "momentum", "forgetting")}
        return multiplied(lambda: chunked(Memory.fresh(tuple(rand(1, 1, 8, 8) for _ in "ab")), *[rand(1, 1, n, 8)] * 3,
                                          **one, chunk=16))  # fmt: skip

    assert abs(growth_exponent(lengths, [layer(n) for n in lengths]) - 1) < 1e-9


def test_shown_surprise_and_weights_are_those_of_the_loop():
    model, ids = decoder(lambda i: MemoryAsGate(SHAPE, i, window=3, depth=1, chunk=1)), tokens(9)
    mixer = model.blocks[0].mixer
    with torch.no_grad(), record() as recorder:
        in_parts(model, ids, [5, 1, 3], Full())
    recording = recorder.freeze()
    x = model.blocks[0].norm1(model.embed(ids)).detach()
    q, k, v = mixer.memory.project(x)
    controls = dict(zip(("rate", "momentum", "forgetting"), mixer.memory.control(x), strict=True))
    expected = surprises(mixer.memory.fresh(x), k, v, **controls)
    torch.testing.assert_close(
        torch.tensor(recording.stack("titans.surprise", layer=0)), expected, rtol=1e-9, atol=1e-9
    )
    _, after = sequential(mixer.memory.fresh(x), q, k, v, **controls)
    weights = torch.tensor(recording.stack("titans.weights", layer=0))  # 1 H T D D
    torch.testing.assert_close(weights[:, :, -1], after.weights[0], rtol=0, atol=1e-10)
    for name, low, high in (("rate", 0, MAX_RATE), ("momentum", 0, 1), ("forgetting", 0, 1)):
        shown = torch.tensor(recording.stack(f"titans.{name}", layer=0))
        torch.testing.assert_close(shown, controls[name], rtol=0, atol=1e-12)
        assert low < shown.min()
        assert shown.max() < high


@pytest.mark.parametrize("make", [
    lambda i: MemoryAsGate(SHAPE, i, window=4, persistent=3),
    lambda i: MemoryAsContext(SHAPE, i, segment=4, persistent=3),
])  # fmt: skip
def test_shares_of_attention_add_up(make):
    """Persistent tokens, the memory's answers and the window or segment share all of it."""
    model = decoder(make)
    with torch.no_grad(), record() as recorder:
        in_parts(model, tokens(11), [9, 1, 1], Full())
    recording = recorder.freeze()
    names = [n for n in ("titans.persistent", "titans.context", "attention.pattern") if recording.has(n, layer=1)]
    total = sum(torch.tensor(recording.stack(n, layer=1)).sum(-1) for n in names)
    torch.testing.assert_close(total, torch.ones(1, 2, 11).double(), rtol=0, atol=1e-12)
    assert recording.stack("titans.persistent", layer=1).shape == (1, 2, 11, 3)


@pytest.mark.parametrize("make", [
    lambda i: MemoryAsGate(SHAPE, i, window=3), lambda i: MemoryAsContext(SHAPE, i, segment=3)
])  # fmt: skip
def test_the_memory_reaches_beyond_the_window(make):
    """With learning on, the first token moves logits that no window or segment of two layers sees; with learning off
    it does not. And steering ends with its context."""
    model, ids = decoder(make), tokens(16)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % SHAPE.vocab
    with torch.no_grad():
        before = model(ids)
        assert (model(other) - before)[0, -1].abs().max() > 1e-9
        with steering(learning=False):
            assert (model(other) - model(ids))[0, -1].abs().max() == 0
        assert torch.equal(model(ids), before)


def test_steering_replaces_what_the_layer_computes():
    memory, x = NeuralMemory(SHAPE, 0, depth=1, chunk=2, seed=0).double(), rand(1, 5, 12)
    with steering(rate=0.25, forgetting=0.0):
        rate, momentum, forgetting = memory.control(x)
        assert (rate == 0.25).all()
        assert (forgetting == 0).all()
        assert 0 < momentum.min() < momentum.max() < 1
    with pytest.raises(ValueError, match=r"momentum must be between 0 and 1, not 1\.5"), steering(momentum=1.5):
        pass


def test_bytes_of_the_memory_are_counted():
    """Weights, surprise and anchor: 3 depths of heads times D² doubles, and the window beside them."""
    model, cache = decoder(lambda i: MemoryAsGate(SHAPE, i, window=4, depth=2, chunk=3)), Full()
    with torch.no_grad():
        model(tokens(20), cache=cache)
    assert state_bytes(cache.states) == 2 * 8 * (3 * 2 * 2 * 36 + 2 * 2 * 3 * 6)


def test_bad_input_is_named():
    (q, k, v), controls = text(4)
    memory = Memory.fresh(network(1))
    for form in (sequential, lambda *x, **y: chunked(*x, **y, chunk=2)):
        with pytest.raises(ValueError, match=r"q must have shape \[2, 2, tokens, 3\], a token at least"):
            form(memory, q[:, :, :0], k[:, :, :0], v[:, :, :0], **controls)
        with pytest.raises(ValueError, match=r"v must have shape .*, not \[2, 2, 3, 3\]"):
            form(memory, q, k, v[:, :, :3], **controls)
        with pytest.raises(ValueError, match=r"momentum must have shape \[2, 2, 4\], a number a token, not \[2, 2\]"):
            form(memory, q, k, v, **{**controls, "momentum": controls["momentum"][..., 0]})
    with pytest.raises(ValueError, match="chunk must be a whole number from 1 on, not 0"):
        chunked(memory, q, k, v, **controls, chunk=0)
    with pytest.raises(ValueError, match="chunk must be above the 3 tokens"):
        chunked(memory._replace(age=3), q, k, v, **controls, chunk=3)
    for name in ("window", "depth", "chunk"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number from 1 on, not 0"):
            MemoryAsGate(SHAPE, 0, **{"window": 3, name: 0})
    with pytest.raises(ValueError, match="segment must be a whole number from 1 on, not 0"):
        MemoryAsContext(SHAPE, 0, segment=0)
    with pytest.raises(ValueError, match="persistent must be a whole number from 0 on, not -1"):
        MemoryAsContext(SHAPE, 0, segment=2, persistent=-1)
    with pytest.raises(ValueError, match="not 'parallel'"):
        multiplications("parallel", 1, 1)
