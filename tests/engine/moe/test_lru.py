"""LRU: its order is an OrderedDict's, whatever is asked; the replay is the same cache."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.moe.lru import LRU, Counts, asked, hit_rate, served_first

uses = st.lists(st.integers(0, 6), max_size=60)
passes = st.lists(
    st.tuples(st.integers(0, 2), st.sets(st.integers(0, 5), max_size=4)).map(lambda p: [(p[0], e) for e in p[1]]),
    max_size=40,
)


@given(uses, st.integers(1, 8))
def test_order_hits_and_evictions_are_those_of_an_ordered_dict(uses, size):
    cache, model = LRU(size), OrderedDict()
    for item in uses:
        expected = item in model
        model[item] = None
        model.move_to_end(item)
        gone = model.popitem(last=False)[0] if len(model) > size else None
        assert cache.use(item) == (expected, gone)
        assert list(cache) == list(model)
        assert len(list(cache)) <= size


@given(uses, st.integers(1, 8))
def test_it_holds_the_last_different_items(uses, size):
    cache = LRU(size)
    for item in uses:
        cache.use(item)
    last = list(dict.fromkeys(reversed(uses)))[:size]
    assert list(cache) == last[::-1]
    assert all(item in cache for item in last)


@given(passes.filter(any), st.integers(1, 6), st.booleans())
def test_the_replay_counts_what_a_cache_hits(passes, size, shared):
    caches, hits, requests = {}, 0, 0
    for keys in passes:
        cache = caches.setdefault(0 if shared else keys[0][0] if keys else 0, LRU(size))
        held = set(cache)
        for key in [k for k in keys if k in held] + [k for k in keys if k not in held]:
            hits += cache.use(key)[0]
            requests += 1
    assert hit_rate(passes, size=size, shared=shared) == hits / requests


@settings(max_examples=40)
@given(passes.filter(any))
def test_a_larger_cache_hits_as_often_at_least(passes):
    """Of each layer's own cache, when a pass asks for one expert: LRU has no Belady anomaly."""
    single = [keys[:1] for keys in passes]
    rates = [hit_rate(single, size=size) for size in range(1, 7)]
    assert rates == sorted(rates)
    different = len({key for keys in single for key in keys})
    assert rates[-1] == pytest.approx(1 - different / sum(map(len, single)))


def test_those_in_memory_are_served_first():
    cache = LRU(2)
    cache.use(5)
    assert served_first([1, 5, 3], cache) == [5, 1, 3]


def test_decoding_asks_token_by_token_and_layer_by_layer():
    chosen = {2: torch.tensor([[1, 1, 0], [0, 0, 1]]).bool(), 0: torch.tensor([[0, 1, 0], [1, 0, 1]]).bool()}
    assert asked(chosen) == [[(0, 1)], [(2, 0), (2, 1)], [(0, 0), (0, 2)], [(2, 2)]]


def test_bad_input_is_named():
    for call, words in [
        (lambda: LRU(0), "size must be a number of experts above 0, not 0"),
        (lambda: hit_rate([[(0, 1)]], size=0), "size must be a number of experts above 0, not 0"),
        (lambda: hit_rate([[]], size=1), "asked must hold one request"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    assert Counts().hit_rate != Counts().hit_rate  # NaN: nothing was asked
