"""Caches: each against the dense model, against StreamingLLM written as loops, and against itself in other portions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.caches import Cache
from engine.caches.full import Full
from engine.caches.lockstep import Lockstep
from engine.caches.recompute import Recompute
from engine.caches.sinks import Sinks
from engine.caches.window import Window
from engine.mixers.rope import rope_tables
from engine.read import Policy, read
from engine.recording import record, tap
from tests.engine.caches.common import fed, normed, portions
from tests.engine.test_model import EXACT, SHAPE, decoder, furthest, text, turned

VALUE = 8  # bytes of a float64
A_TOKEN = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_width * VALUE


# --- the oracle ----------------------------------------------------------------------------------------------


def streaming_llm(model, ids, sinks, window):
    """StreamingLLM by hand: token by token, layer by layer, head by head, on plain lists.

    A layer remembers (key before rotation, value) of the tokens that it keeps; a key's position is its place in the
    list; when the list is longer than sinks + window, the first one after the sinks goes.
    """
    s = model.shape
    H, G, D = s.heads, s.kv_heads, s.head_width
    memory = [[] for _ in model.blocks]
    rows = []
    for token in ids.tolist():
        x = model.embed.weight[token]
        for block, kept in zip(model.blocks, memory, strict=True):
            q, k, v = (block.mixer.qkv.weight @ normed(x, block.norm1)).split([H * D, G * D, G * D])
            kept.append((k.view(G, D), v.view(G, D)))
            if len(kept) > sinks + window:
                kept.pop(sinks)
            out = []
            for h in range(H):
                query = turned(q.view(H, D)[h], len(kept) - 1)
                g = h // (H // G)
                scores = [float(query @ turned(key[g], slot)) / math.sqrt(D) for slot, (key, _) in enumerate(kept)]
                weights = [math.exp(score - max(scores)) for score in scores]
                out.append(sum(w * value[g] for w, (_, value) in zip(weights, kept, strict=True)) / sum(weights))
            x = x + block.mixer.out.weight @ torch.cat(out)
            gate, up = (block.ffn.gate_up.weight @ normed(x, block.norm2)).chunk(2)
            x = x + block.ffn.down.weight @ (gate * gate.sigmoid() * up)
        rows.append((model.embed.weight if s.tied else model.head.weight) @ normed(x, model.norm))
    return torch.stack(rows)


@pytest.mark.parametrize(("sinks", "window"), [(0, 5), (1, 4), (4, 6), (3, 1)])
def test_sinks_equal_streaming_llm_by_hand(sinks, window):
    model, ids = decoder(layers=2), text(20)
    expected = streaming_llm(model, ids, sinks, window)
    assert furthest(fed(model, ids[None], Sinks(sinks, window))[0], expected) < EXACT
    assert furthest(model(ids[None], cache=Sinks(sinks, window))[0], expected) < EXACT
    if not sinks:
        assert furthest(fed(model, ids[None], Window(window))[0], expected) < EXACT


def test_the_oracle_is_the_dense_model_when_nothing_is_evicted():
    model, ids = decoder(layers=2), text(10)
    assert furthest(streaming_llm(model, ids, 2, 8), model(ids[None])[0]) < EXACT


def test_window_equals_a_banded_mask_in_one_layer():
    """With one layer no evicted token can be felt through another: window attention is dense with a band."""
    model, T, size = decoder(layers=1), 15, 4
    ids = text(T, batch=1)
    block = model.blocks[0]
    x = model.embed(ids)
    H, G, D = SHAPE.heads, SHAPE.kv_heads, SHAPE.head_width
    rope = rope_tables(D, base=10000.0, count=T, dtype=torch.float64, device=torch.device("cpu"))
    q, k, v = block.mixer.qkv(block.norm1(x)).view(1, T, H + 2 * G, D).transpose(1, 2).split([H, G, G], 1)
    q, k = rope.rotate(q, range(T)), rope.rotate(k, range(T)).repeat_interleave(H // G, 1)
    apart = torch.arange(T)[:, None] - torch.arange(T)
    scores = (q @ k.mT / D**0.5).masked_fill((apart < 0) | (apart >= size), -torch.inf)
    y = scores.softmax(-1) @ v.repeat_interleave(H // G, 1)
    x = x + block.mixer.out(y.transpose(1, 2).reshape(1, T, H * D))
    expected = model.logits(model.norm(x + block.ffn(block.norm2(x))))
    assert furthest(fed(model, ids, Window(size)), expected) < EXACT


# --- laws ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 14), st.integers(0, 6), st.data())
@settings(max_examples=40)
def test_a_cache_that_is_large_enough_is_dense(length, sinks, data):
    parts = data.draw(portions(length))
    model, ids = decoder(layers=2), text(length, batch=2)
    dense = model(ids)
    for cache in (Full(), Full(capacity=3), Window(length), Window(length + 3), Sinks(sinks, max(1, length - sinks))):
        assert furthest(fed(model, ids, cache, parts), dense) < EXACT
        assert cache.kept(0).tolist() == list(range(length))
        assert cache.nbytes == 2 * length * A_TOKEN * 2 // 3  # two rows, two layers of three


@given(st.integers(0, 4), st.integers(1, 7), st.integers(1, 30), st.data())
@settings(max_examples=60)
def test_portions_do_not_matter(sinks, window, length, data):
    """Whatever comes at once, and even where the model splits it: every query sees what it sees one by one."""
    parts = data.draw(portions(length))
    model, ids = decoder(layers=2), text(length, batch=2)
    one_by_one = fed(model, ids, Sinks(sinks, window))
    cache = Sinks(sinks, window)
    assert furthest(fed(model, ids, cache, parts), one_by_one) < EXACT
    cache = Sinks(sinks, window)
    cache.at_once = data.draw(st.integers(1, length))
    assert furthest(fed(model, ids, cache, parts), one_by_one) < EXACT


@given(st.integers(0, 5), st.integers(1, 8), st.integers(1, 40), st.data())
@settings(max_examples=60)
def test_what_is_kept(sinks, window, length, data):
    """The first and the last; contiguous slots; never more than the size, and no byte more either."""
    parts = data.draw(portions(length))
    model, ids = decoder(layers=1), text(length, batch=1)
    cache = Sinks(sinks, window)
    done, before = 0, set()
    for part in ids.split(parts, 1):
        with record() as recorder:
            model(part, cache=cache)
        done += part.shape[1]
        kept = cache.kept(0).tolist()
        assert kept == [p for p in range(done) if p < sinks or p >= done - window]
        assert cache.seen == done
        assert len(kept) == min(done, cache.bound)
        assert cache.nbytes == len(kept) * A_TOKEN // 3
        evicted = {e.fields["position"] for e in recorder.events}
        assert len(evicted) == len(recorder.events)
        assert evicted == (before | set(range(done))) - set(kept) - set(range(done - part.shape[1])).difference(before)
        before = set(kept)
    assert all(
        f"first {sinks}" in e.fields["reason"] and f"last {window}" in e.fields["reason"] for e in recorder.events
    )


@given(st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=30)
def test_turning_a_key_to_its_new_slot(old, new):
    """RoPE at `old`, then by new - old, is RoPE at `new`; and it is a rotation, pair by pair."""
    rope = rope_tables(8, base=10000.0, count=64, dtype=torch.float64, device=torch.device("cpu"))
    k = torch.randn(1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direct = rope.rotate(k, range(new, new + 1))
    assert furthest(direct.view(8), turned(k.view(8), new)) < 1e-15 * 8
    assert furthest(turned(turned(k.view(8), old), new - old), direct.view(8)) < 1e-15 * 8
    assert furthest(rope.rotate(k, torch.tensor([new])), direct) == 0
    assert furthest(rope.rotate(k, torch.tensor([[new]])), direct) == 0


@given(
    st.lists(st.sampled_from(["full", "window", "sinks", "short"]), min_size=1, max_size=4),
    st.integers(1, 18),
    st.data(),
)
@settings(max_examples=40)
def test_lockstep_rows_equal_each_cache_alone(names, length, data):
    parts = data.draw(portions(length))
    make = {"full": Full, "window": lambda: Window(6), "sinks": lambda: Sinks(2, 3), "short": lambda: Window(1)}
    model, ids = decoder(layers=2), text(length, batch=len(names))
    lockstep = Lockstep([make[name]() for name in names])
    together = fed(model, ids, lockstep, parts)
    for i, name in enumerate(names):
        alone = make[name]()
        assert furthest(together[i], fed(model, ids[i : i + 1], alone)[0]) < EXACT
        kept = lockstep.kept(0)[i].tolist()
        assert [p for p in kept if p >= 0] == alone.kept(0).tolist()
        assert lockstep.caches[i].nbytes == alone.nbytes
    assert lockstep.seen == length
    assert lockstep.nbytes == sum(cache.nbytes for cache in lockstep.caches)


@given(st.integers(1, 9), st.integers(1, 14))
@settings(max_examples=30)
def test_recomputing_equals_the_model_on_the_last_tokens(size, length):
    model, ids = decoder(layers=2), text(length, batch=2)
    expected = model(ids[:, -size:])[:, -1]
    assert furthest(model.logits(Recompute(size).hidden(model, ids))[:, 0], expected) < EXACT
    assert furthest(model.logits(Recompute().hidden(model, ids))[:, 0], model(ids)[:, -1]) < EXACT
    assert Recompute(size).rows(length) == min(size, length)


class Onlooker(Full):
    """Keeps the patterns that it is shown."""

    watches = True

    def __init__(self):
        super().__init__()
        self.shown = []

    def observe(self, layer, pattern):
        self.shown.append((layer, pattern))


def test_a_watching_cache_sees_every_pattern_recorded_or_not():
    model, ids = decoder(), text(7, batch=1)
    plain, watching = Full(), Onlooker()
    assert torch.equal(fed(model, ids, plain, [5, 1, 1]), fed(model, ids, watching, [5, 1, 1]))
    assert [layer for layer, _ in watching.shown] == [0, 1, 2] * 3
    assert [tuple(p.shape) for _, p in watching.shown[::3]] == [(1, 4, 5, 5), (1, 4, 1, 6), (1, 4, 1, 7)]
    assert all(furthest(p.sum(-1), torch.ones(())) < EXACT for _, p in watching.shown)
    older = Full()  # its row has more slots, so that the watching one is padded
    model(text(4, batch=1), cache=older)
    rows = Lockstep([older, watching := Onlooker()])
    fed(model, ids.repeat(2, 1), rows, [5, 1, 1])
    alone = Onlooker()
    fed(model, ids, alone, [5, 1, 1])
    pairs = list(zip(watching.shown, alone.shown, strict=True))
    assert len(pairs) == 9
    assert all(a[0] == b[0] and a[1].shape == b[1].shape and furthest(a[1], b[1]) < EXACT for a, b in pairs)


@pytest.mark.parametrize("parts", [[1] * 12, [9, 3], [12]])
def test_patterns_of_a_full_window_are_slot_by_slot(parts):
    """A portion is recorded as its tokens one by one would be: keys by slot, not by place in the text."""
    model, ids = decoder(layers=1), text(12, batch=1)
    with record() as recorder:
        fed(model, ids, Sinks(2, 3), parts)
    with record() as one_by_one:
        fed(model, ids, Sinks(2, 3))
    got, expected = recorder.freeze(), one_by_one.freeze()
    for name in ("attention.pattern", "attention.q", "attention.k", "attention.v"):
        assert furthest(torch.tensor(got.stack(name)), torch.tensor(expected.stack(name))) < EXACT
    pattern = got.stack("attention.pattern")[0]  # head query slot
    assert pattern.shape == (4, 12, 5)
    assert np.allclose(pattern.sum(-1), 1, atol=EXACT)


# --- reading -------------------------------------------------------------------------------------------------


def policies():
    return {
        "dense": Policy(Full()),
        "window": Policy(Window(6)),
        "sinks": Policy(Sinks(2, 4)),
        "breaks": Policy(Sinks(2, 4), (7, 7)),
        "recompute": Policy(Recompute(6)),
    }


def test_reading_gives_each_policy_its_own_surprisal():
    model, ids = decoder(), text(20)
    steps = []
    with record(on_step=lambda recorder: steps.append(recorder.step)) as recorder:
        surprisals = read(model, ids, policies())
    recording = recorder.freeze()
    assert recording.steps == 20
    assert steps == list(range(1, 21))
    changed = torch.cat((torch.tensor([7, 7]), ids[2:]))
    recomputed = torch.stack([model(ids[None, max(0, t - 5) : t + 1])[0, -1] for t in range(20)])
    expected = {
        "dense": (ids, model(ids[None])[0]),
        "window": (ids, streaming_llm(model, ids, 0, 6)),
        "sinks": (ids, streaming_llm(model, ids, 2, 4)),
        "breaks": (changed, streaming_llm(model, changed, 2, 4)),
        "recompute": (ids, recomputed),
    }
    for name, (tokens, logits) in expected.items():
        nats = -logits[:-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        # The logits are rounded to float32 before the logarithm.
        assert np.abs(np.array(surprisals[name]) - nats.numpy()).max() < 1e-5
        track = recording.track("surprisal", strategy=name)
        assert track.at.tolist() == list(range(20))
        assert np.isnan(track.stack()[0])
        assert np.allclose(track.stack()[1:], surprisals[name], atol=1e-6)
    kept = [row.tolist() for _, row in recording.track("cache.kept", strategy="sinks").rows()]
    assert kept[-1] == [0, 1, 16, 17, 18, 19]
    assert [row.tolist() for _, row in recording.track("cache.kept", strategy="recompute").rows()][-1] == [
        *range(14, 20)
    ]
    evicted = [(e.step, e.fields["cache"], e.fields["position"]) for e in recording.happened("cache.evict")]
    assert [e for e in evicted if e[1] == "window"] == [(t, "window", t - 6) for t in range(6, 20)]
    assert [e for e in evicted if e[1] == "sinks"] == [(t, "sinks", t - 4) for t in range(6, 20)]
    assert recording.stack("read.rows", strategy="recompute").tolist() == [1, 2, 3, 4, 5, *[6] * 15]


def test_reading_shows_the_first_token_as_it_is():
    model, ids = decoder(), text(12)
    with record() as recorder:
        read(model, ids, policies())
    recording = recorder.freeze()
    with record() as recorder:
        model(ids[None])
    dense = recorder.freeze()
    patterns = np.stack([dense.stack("attention.pattern", layer=i)[0] for i in range(SHAPE.layers)])  # layer head T T
    norms = np.stack([dense.stack("residual.norm", layer=i)[0] for i in range(SHAPE.layers)])  # layer T
    first = recording.stack("attention.first", strategy="dense")  # T layer head
    assert np.abs(np.moveaxis(first, 0, -1) - patterns[..., 0]).max() < EXACT
    assert np.abs(recording.stack("residual.now", strategy="dense").T - norms).max() < EXACT
    assert recording.track("residual.first", strategy="dense").at.tolist() == [0]
    assert np.abs(recording.stack("residual.first", strategy="dense")[0] - norms[:, 0]).max() < EXACT
    # Recomputing, the first token of each window is new: it is seen by all others and sees none.
    again = recording.stack("residual.first", strategy="recompute")
    assert again.shape == (12, SHAPE.layers)
    with record() as recorder:
        model(ids[None, 6:12])
    window = recorder.freeze()
    assert abs(again[11, 2] - window.stack("residual.norm", layer=2)[0, 0]) < EXACT
    last = recording.stack("attention.first", strategy="recompute")[11, 2]
    assert np.abs(last - window.stack("attention.pattern", layer=2)[0, :, -1, 0]).max() < EXACT


def test_reading_is_the_same_unrecorded_and_can_be_stopped():
    model, ids = decoder(), text(12)
    with record():
        recorded = read(model, ids, policies())
    assert read(model, ids, policies()) == recorded
    assert read(model, ids.tolist(), {"anew": Policy(Recompute(6))})["anew"] == pytest.approx(recorded["recompute"])

    taps = []
    with record() as recorder:
        read(model, ids, policies(), on_token=lambda t: taps.append((t, tap("mine", t, ""))))
    assert taps == [(t, t) for t in range(12)]
    assert recorder.freeze().track("mine").at.tolist() == list(range(12))

    def stop(recorder):
        if recorder.step == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError), record(on_step=stop) as recorder:
        read(model, ids, policies())
    assert recorder.so_far().stack("surprisal", strategy="window").shape == (4,)


# --- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Full(capacity=-1), "capacity must be 0 or a number of tokens, not -1"),
        (lambda: Window(0), "size must be a number of tokens above 0, not 0"),
        (lambda: Window(2.5), "size must be a number of tokens above 0, not 2.5"),
        (lambda: Sinks(-1, 3), "sinks must be a number of tokens, 0 or more, not -1"),
        (lambda: Sinks(2, 0), "window must be a number of tokens above 0, not 0"),
        (lambda: Recompute(0), "size must be None or a number of tokens above 0, not 0"),
        (lambda: Lockstep([]), "caches must hold at least one cache"),
        (lambda: Lockstep([Lockstep([Full()])]), "one of them is a Lockstep itself"),
    ],
)
def test_impossible_caches(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_cache_of_another_batch():
    model = decoder()
    with pytest.raises(ValueError, match="a row for each of the 2 caches, not 3"):
        model(text(4, batch=3), cache=Lockstep([Full(), Full()]))


def test_a_full_cache_past_the_positions_of_the_model():
    model, cache = decoder(), Full()
    model(text(64, batch=1), cache=cache)
    with pytest.raises(ValueError, match="position 64 is past max_positions=64"):
        model(text(1, batch=1), cache=cache)
    model(text(200, batch=1), cache=Window(64))  # positions are counted in the cache: no bound on the text


def test_the_contract_has_no_default_memory():
    for use in (lambda c: c.extend(0, None, None, None), lambda c: c.kept(0), lambda c: c.nbytes):
        with pytest.raises(NotImplementedError):
            use(Cache())
