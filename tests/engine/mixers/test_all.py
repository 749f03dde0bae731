"""What every mixer must hold, whatever it does inside: causality, carried state, recording, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.cost import growth_exponent
from engine.generate import generate
from engine.mixers.cross_layer import cla, yoco
from engine.mixers.hybrid import hybrid
from engine.mixers.latent import Latent
from engine.mixers.linear import LinearAttention
from engine.mixers.mamba import Mamba
from engine.mixers.performer import performer, trigonometric_features
from engine.mixers.retention import Retention
from engine.mixers.rwkv import Rwkv
from engine.mixers.softmax import SoftmaxAttention
from engine.mixers.state import state_bytes, tensors
from engine.mixers.titans_layers import MemoryAsContext, MemoryAsGate
from engine.mixers.windows import WindowAttention, interleaved
from engine.model import Decoder
from engine.recording import SITES, record

from .common import SHAPE, decoder, in_parts, multiplied, tokens

MIXERS = {
    "window": lambda i: WindowAttention(SHAPE, i, window=3),
    "window of one": lambda i: WindowAttention(SHAPE, i, window=1),
    "dilated": lambda i: WindowAttention(SHAPE, i, window=2, dilation=3),
    "local and global": lambda i: WindowAttention(SHAPE, i, window=2, global_tokens=2),
    "dilated and global": lambda i: WindowAttention(SHAPE, i, window=2, dilation=2, global_tokens=3),
    "interleaved": interleaved(SHAPE, window=3, every=2),
    "latent": lambda i: Latent(SHAPE, i, rank=5, rope_width=4),
    "latent, absorbed": lambda i: Latent(SHAPE, i, rank=5, rope_width=4, q_rank=7, form="absorbed"),
    "cla": cla(SHAPE, factor=2),
    "yoco": yoco(SHAPE, window=3),
    "linear": lambda i: LinearAttention(SHAPE, i, chunk=3),
    "performer": lambda i: performer(SHAPE, i, count=8, chunk=4),
    "retention": lambda i: Retention(SHAPE, i, chunk=4),
    "rwkv": lambda i: Rwkv(SHAPE, i, chunk=3),
    "mamba": lambda i: Mamba(SHAPE, i, state=4, chunk=4),
    "hybrid": hybrid(SHAPE, lambda i: Mamba(SHAPE, i, state=4), lambda i: SoftmaxAttention(SHAPE, i), at={1}),
    "titans gate": lambda i: MemoryAsGate(SHAPE, i, window=3, persistent=2, depth=2, chunk=4),
    "titans gate, no persistent": lambda i: MemoryAsGate(SHAPE, i, window=3, persistent=0, chunk=1),
    "titans context": lambda i: MemoryAsContext(SHAPE, i, segment=4, persistent=2, depth=2),
}
GROWING = {"interleaved", "hybrid", "yoco", "latent", "latent, absorbed", "cla"}  # they hold layers of full attention
CACHED = {"latent", "latent, absorbed", "cla", "window of one"}  # they carry nothing beside the cache
every = pytest.mark.parametrize("name", MIXERS)


@every
def test_a_token_changes_nothing_before_it(name):
    """Perturbing token t moves no logit before t (exactly 0 for the products of one row), and moves its own."""
    model, ids = decoder(MIXERS[name]), tokens(13)
    with torch.no_grad():
        logits = model(ids)
        for t in (0, 5, 12):
            other = ids.clone()
            other[0, t] = (other[0, t] + 1) % SHAPE.vocab
            change = (model(other) - logits).abs().amax((0, 2))
            assert change[:t].max().item() < 1e-12 if t else True
            assert change[t].item() > 1e-6


@every
@settings(max_examples=8)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_split_and_carried_equals_one_pass(name, sizes):
    model, ids = decoder(MIXERS[name]), tokens(sum(sizes), batch=2)
    with torch.no_grad():
        whole, parts = model(ids), in_parts(model, ids, sizes, Full())
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


@every
def test_generate_says_the_same_with_and_without_a_cache(name):
    model, prompt = decoder(MIXERS[name]), tokens(7)
    kept = list(generate(model, prompt, steps=12, cache=Full(), temperature=2.0))
    assert kept == list(generate(model, prompt, steps=12, cache=None, temperature=2.0))
    assert len(set(kept)) > 3  # a model that says one word proves little


@every
def test_what_is_carried_does_not_grow(name):
    """Once windows and segments are full, the state after 40 and after 80 tokens has the same bytes."""
    model, ids = decoder(MIXERS[name]), tokens(80)
    cache, sizes = Full(), []
    with torch.no_grad():
        for part in ids.split(40, 1):
            model(part, cache=cache)
            sizes.append((state_bytes(cache.states), cache.nbytes))
    assert sizes[0][0] == sizes[1][0] > 0 or name in CACHED
    assert (sizes[1][1] == 2 * sizes[0][1] > 0) == (name in GROWING)
    assert (sizes[1][1] == 0) == (name not in GROWING)


@every
def test_states_are_replaced_and_not_changed(name):
    """So a copy of the dict is a checkpoint: going back to it and reading on gives the same logits."""
    model, ids = decoder(MIXERS[name]), tokens(10)
    if name in GROWING:
        pytest.skip("full attention keeps its past in the cache itself")
    cache = Full()
    with torch.no_grad():
        model(ids[:, :6], cache=cache)
        checkpoint = dict(cache.states)
        before = [t.clone() for t in tensors(checkpoint)]
        first = model(ids[:, 6:], cache=cache)
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(checkpoint), strict=True))
        cache.states, cache.seen = dict(checkpoint), 6
        assert torch.equal(model(ids[:, 6:], cache=cache), first)


@every
def test_recording_changes_no_bit(name):
    model, ids = decoder(MIXERS[name]).float(), tokens(21, batch=2)
    with torch.no_grad():
        quiet, cache = [], Full()
        for part in ids.split([16, 1, 4], 1):
            quiet.append(model(part, cache=cache))
        with record() as recorder:
            cache = Full()
            loud = [model(part, cache=cache) for part in ids.split([16, 1, 4], 1)]
    assert all(torch.equal(a, b) for a, b in zip(quiet, loud, strict=True))
    tracks = recorder.freeze().tracks
    mixing = [t for t in tracks if not t.name.startswith("residual")]
    assert len({t.name for t in mixing}) >= 3
    assert all(SITES[t.name].meaning for t in tracks)
    assert all((t.stack() == t.stack()).all() for t in tracks)  # no NaN


@every
def test_only_the_last_rows_are_shown(name):
    model, ids = decoder(MIXERS[name]), tokens(11)
    with torch.no_grad(), record() as recorder:
        model.hidden(ids, show=2)
    with torch.no_grad(), record() as all_rows:
        model.hidden(ids)
    few, many = recorder.freeze(), all_rows.freeze()
    assert {t.key for t in few.tracks} == {t.key for t in many.tracks}
    for track in few.tracks:
        axis = next((i for i, word in enumerate(track.axes) if word in ("query", "key")), None)
        if axis is None or (track.axes[axis] == "key" and track.site.grows != "key"):
            continue
        array, full = track.chunks[0].array, many.track(track.name, **track.index).chunks[0].array
        assert array.shape[axis] == 2
        torch.testing.assert_close(
            torch.tensor(array), torch.tensor(full).narrow(axis, full.shape[axis] - 2, 2), rtol=1e-12, atol=1e-12
        )


@every
def test_seeds_alone_decide_the_weights(name):
    """Whatever the global generator did before, a decoder of one seed is the same."""
    torch.manual_seed(1)
    first = Decoder(SHAPE, mixer=MIXERS[name], seed=3).state_dict()
    torch.manual_seed(2)
    second = Decoder(SHAPE, mixer=MIXERS[name], seed=3).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@every
def test_gradients_reach_every_parameter(name):
    model, ids = Decoder(SHAPE, mixer=MIXERS[name], seed=0), tokens(19, batch=2)
    torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


@every
def test_bfloat16_stays_close(name):
    """Sums over time are kept in float32: half precision costs rounding, not the answer."""
    model, ids = decoder(MIXERS[name]), tokens(24)
    with torch.no_grad():
        exact, rough = model(ids), model.bfloat16()(ids)
    assert rough.dtype == torch.bfloat16
    assert rough.isfinite().all()
    # Random weights this large amplify rounding; the correlation still tells the answer from another one.
    assert torch.corrcoef(torch.stack((exact.flatten(), rough.double().flatten())))[0, 1] > 0.98


@every
def test_bad_input_is_named(name):
    model = decoder(MIXERS[name])
    mixer, rope = model.blocks[0].mixer, model.rope(torch.zeros(1, dtype=torch.float64))
    for shape in ((1, 0, 12), (1, 3, 11), (3, 12), (0, 3, 12)):
        with pytest.raises(ValueError, match=r"x must have shape \[batch, tokens, 12\]"):
            mixer(torch.zeros(shape, dtype=torch.float64), rope=rope)
    if name == "hybrid" or name == "interleaved":
        return
    cache = Full()
    with torch.no_grad():
        mixer(torch.ones(2, 3, 12, dtype=torch.float64), rope=rope, cache=cache)
        cache.advance(3)
        if state_bytes(cache.states):
            with pytest.raises(ValueError, match="batch of 2, and x of 3"):
                mixer(torch.ones(3, 1, 12, dtype=torch.float64), rope=rope, cache=cache)


@pytest.mark.parametrize("name", sorted(set(MIXERS) - GROWING))
def test_twice_the_length_is_twice_the_work(name):
    """Counted multiplications of one mixer grow with the length to the power of 1 (full attention: 2)."""
    shape = SHAPE
    model = decoder(MIXERS[name], shape=shape)
    mixer, rope = model.blocks[0].mixer, model.rope(torch.zeros(1, dtype=torch.float64))
    lengths = [24, 48, 96]
    counts = [multiplied(lambda n=n: mixer(torch.randn(1, n, 12).double(), rope=rope)) for n in lengths]
    assert abs(growth_exponent(lengths, counts) - 1) < 0.03


def test_trigonometric_features_run_too():
    model, ids = decoder(lambda i: performer(SHAPE, i, count=64, features=trigonometric_features)), tokens(9)
    with torch.no_grad():
        whole, parts = model(ids), in_parts(model, ids, [4, 1, 4], Full())
    torch.testing.assert_close(parts, whole, rtol=1e-8, atol=1e-8)
