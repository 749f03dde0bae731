"""Offloading: the same bits whatever is kept and whenever it comes; hits and evictions are an OrderedDict's."""

from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.moe.lru import asked, hit_rate
from engine.moe.offload import Offload, store_experts
from engine.moe.router import TopK
from engine.moe.usage import calls
from engine.recording import record
from tests.engine.moe.common import SHAPE, SWITCH, decoder, ids

LAYERS, E = SHAPE.layers, 6


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A model and the file of its experts."""
    model, path = decoder(shared=1), tmp_path_factory.mktemp("experts") / "e.safetensors"
    store_experts(model, path)
    return model, path


def read(model, text, *, chunk=1):
    """Logits of text [1, T], read `chunk` tokens at a time."""
    cache = Full()
    with torch.inference_mode():
        return torch.cat([model(part, cache=cache) for part in text.split(chunk, 1)], 1)


@settings(max_examples=20)
@given(st.integers(1, E), st.booleans(), st.integers(0, 4), st.sampled_from([1, 3, 10]), st.integers(0, 2**31))
def test_no_cache_and_no_guess_changes_a_bit(kept, size, shared, ahead, chunk, seed):
    model, path = kept
    text = ids(10, rows=1, seed=seed)
    with Offload(model, path, size=size, shared=shared, ahead=ahead, cold=False) as shelf:
        assert torch.equal(read(shelf.model, text, chunk=chunk), read(model, text, chunk=chunk))
        counts = shelf.counts
    assert counts.hits + counts.misses == counts.requests > 0
    assert counts.early <= counts.hits
    assert counts.right <= min(counts.guessed, counts.foreseeable)
    assert (counts.guessed > 0) == (ahead > 0)


@settings(max_examples=20)
@given(st.integers(1, E), st.booleans(), st.integers(0, 3), st.sampled_from([1, 4]), st.integers(0, 2**31))
def test_events_are_those_of_an_ordered_dict(kept, size, shared, ahead, chunk, seed):
    model, path = kept
    with Offload(model, path, size=size, shared=shared, ahead=ahead, cold=False) as shelf, record() as recorder:
        read(shelf.model, ids(8, rows=1, seed=seed), chunk=chunk)
    shown = recorder.freeze()
    caches, gone, evicted, hits, early = {}, [], [], 0, 0
    for e in shown.events:
        key = (e.fields["layer"], e.fields["expert"])
        if e.name == "offload.evict":
            evicted.append(key)
        elif e.name in ("offload.hit", "offload.miss"):
            lru = caches.setdefault(0 if shared else key[0], OrderedDict())
            found = key in lru
            lru[key] = None
            lru.move_to_end(key)
            if len(lru) > size:
                gone.append(lru.popitem(last=False)[0])
            hits += e.name == "offload.hit"
            early += e.fields.get("early", False)
            assert found == (e.name == "offload.hit" and not e.fields["early"])
    assert evicted == gone
    counts = shelf.counts
    assert (counts.hits, counts.early, counts.evictions) == (hits, early, len(evicted))
    assert counts.misses == len(shown.happened("offload.miss"))
    loads = [e for e in shown.happened("offload.load") if e.fields["why"] != "wasted"]
    assert len(loads) == counts.misses + counts.early
    assert {k for c in caches.values() for k in c} == {
        (i, e) for i in range(LAYERS) for e in range(E) if (i, e) in shelf._held
    }


@settings(max_examples=12)
@given(st.integers(1, E), st.booleans(), st.integers(0, 2**31))
def test_a_run_hits_what_the_replay_says(kept, size, shared, seed):
    model, path = kept
    text = ids(10, rows=1, seed=seed)
    with Offload(model, path, size=size, shared=shared, cold=False) as shelf:
        read(shelf.model, text)
    assert shelf.counts.hit_rate == hit_rate(asked(calls(model, text)), size=size, shared=shared)


@pytest.mark.parametrize("shared", [False, True])
def test_loading_ahead_leaves_the_cache_as_it_is_and_misses_less(kept, shared):
    model, path = kept
    seen = []
    for ahead in (0, 2):
        with Offload(model, path, size=2, shared=shared, ahead=ahead) as shelf, record() as recorder:
            read(shelf.model, ids(30, rows=1))
        shown = recorder.freeze()
        evicted = [(e.fields["layer"], e.fields["expert"]) for e in shown.happened("offload.evict")]
        seen.append((evicted, [shown.stack("offload.resident", layer=i).tolist() for i in range(LAYERS)], shelf.counts))
    (evicted, resident, plain), (evicted_too, resident_too, guessed) = seen
    assert evicted == evicted_too
    assert resident == resident_too
    assert guessed.misses < plain.misses
    assert plain.misses == guessed.misses + guessed.early
    assert guessed.recall > 2 / E  # better than by chance


@pytest.mark.parametrize("ahead", [0, 3])
def test_no_more_is_held_than_the_budget(kept, ahead):
    model, path = kept
    with Offload(model, path, size=2, ahead=ahead) as shelf:
        assert shelf.budget == (2 * LAYERS + ahead) * shelf.expert_bytes
        most, fetch = [], shelf._fetch

        def watched(key):
            slot = fetch(key)
            most.append(shelf.resident_bytes)
            buffers = {s.flat.data_ptr() for s in (*shelf._held.values(), *shelf._free, *shelf._beside)}
            buffers |= {a.slot.flat.data_ptr() for a in shelf._coming.values()}
            assert len(buffers) * shelf.expert_bytes == shelf.budget  # every buffer is somewhere, and only there
            return slot

        shelf._fetch = watched
        read(shelf.model, ids(20, rows=1))
        assert max(most) <= shelf.budget
        assert max(most) >= 2 * LAYERS * shelf.expert_bytes
        weights = sum(p.nbytes for b in shelf.model.blocks for p in b.ffn.parameters())
        assert weights < sum(p.nbytes for b in model.blocks for p in b.ffn.parameters()) / 3  # no routed expert


def test_a_slow_link_is_waited_for_and_loading_ahead_overlaps(kept):
    model, path = kept
    waited = {}
    for ahead in (0, E):
        with Offload(model, path, size=1, ahead=ahead, bandwidth=4e6) as shelf, record() as recorder:
            read(shelf.model, ids(6, rows=1))
        waited[ahead] = shelf.counts.waited
        loads = [(e.fields["start"], e.fields["seconds"]) for e in recorder.freeze().happened("offload.load")]
        assert all(seconds >= shelf.expert_bytes / 4e6 for _, seconds in loads)
        loads.sort()
        assert all(a + s <= b for (a, s), (b, _) in pairwise(loads)), "one load at a time"
        hits = [e for e in recorder.freeze().happened("offload.hit") if e.fields["early"]]
        assert bool(hits) == bool(ahead)
    assert waited[0] >= shelf.expert_bytes / 4e6


def test_the_timeline_adds_up(kept):
    model, path = kept
    with Offload(model, path, size=2) as shelf, record() as recorder:
        read(shelf.model, ids(5, rows=1))
    shown = recorder.freeze()
    spans = sorted(
        (e.fields["start"], e.fields["start"] + e.fields["seconds"], e.name)
        for e in shown.events
        if e.name in ("offload.expert", "offload.others", "offload.miss")
    )
    assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans)), "computing and waiting in turn"
    assert len(shown.happened("offload.expert")) == shelf.counts.requests
    assert len(shown.happened("offload.others")) == 5 * (LAYERS - 1)
    assert shelf.counts.waited == pytest.approx(sum(e.fields["seconds"] for e in shown.happened("offload.miss")))


def test_taps_change_nothing_and_are_small(kept):
    model, path = kept
    text = ids(12, rows=1)
    with Offload(model, path, size=2, ahead=2) as shelf:
        plain = read(shelf.model, text)
    with Offload(model, path, size=2, ahead=2) as shelf, record() as recorder:
        assert torch.equal(read(shelf.model, text), plain)
    shown = recorder.freeze()
    assert shown.nbytes < 100_000
    assert shown.stack("offload.resident", layer=0).sum(-1).max() == 2
    assert shown.stack("offload.guess", layer=1).sum(-1) == pytest.approx(1)
    assert not shown.has("offload.guess", layer=0)
    assert shown.stack("moe.chosen", layer=2).shape == (12, E)


def test_the_model_given_stays_as_it_was(kept):
    model, path = kept
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with Offload(model, path, size=1, ahead=1) as shelf:
        read(shelf.model, ids(5, rows=1))
    assert shelf.model is not model
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert shelf.model.embed.weight is model.embed.weight  # shared, not copied


def test_it_works_in_inference_mode_and_with_one_expert_a_token(tmp_path):
    model = decoder(route=SWITCH)
    store_experts(model, tmp_path / "e")
    with torch.inference_mode(), Offload(model, tmp_path / "e", size=1, ahead=1) as shelf:
        assert torch.equal(read(shelf.model, ids(6, rows=1)), read(model, ids(6, rows=1)))


def test_a_layer_that_drops_everybody_asks_for_nobody(tmp_path):
    model = decoder(route=TopK(1, renormalise=False, capacity=0.01))
    store_experts(model, tmp_path / "e")
    with Offload(model, tmp_path / "e", size=2, ahead=2) as shelf:
        assert torch.equal(shelf.model(ids(9)), model(ids(9)))
        assert shelf.counts.requests <= LAYERS * E


def test_bad_input_is_named(kept, tmp_path):
    model, path = kept
    dense = decoder()
    for block in dense.blocks:
        block.ffn = torch.nn.Identity()
    for call, words in [
        (lambda: Offload(model, path, size=0), "size must be a number of experts above 0, not 0"),
        (lambda: Offload(model, path, size=1, ahead=-1), "ahead must be a number of experts from 0 to 6, not -1"),
        (lambda: Offload(model, path, size=1, ahead=7), "ahead must be a number of experts from 0 to 6, not 7"),
        (lambda: Offload(model, path, size=1, bandwidth=-1.0), "bandwidth must be .* not -1.0"),
        (lambda: store_experts(dense, tmp_path / "x"), "model must have a layer of experts"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
