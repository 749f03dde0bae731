"""H2O against itself written as loops, and the laws of eviction that all policies share."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.caches.compare import ask_each, compare, held_share
from engine.caches.full import Full
from engine.caches.heavy_hitters import HeavyHitters
from engine.caches.lockstep import Lockstep
from engine.caches.norm import LowNorm
from engine.caches.selected import REASONS, Selected
from engine.caches.sinks import Sinks
from engine.caches.window import Window
from engine.evaluate import passkey
from engine.generate import generate
from engine.mixers.rope import rope_tables
from engine.read import Policy, read
from engine.recording import record
from tests.engine.caches.common import by_hand, fed, peaked, portions
from tests.engine.test_model import EXACT, SHAPE, decoder, furthest, text

POLICIES = {
    "h2o": HeavyHitters,
    "normalised": lambda heavy, **more: HeavyHitters(heavy, normalised=True, **more),
    "norm": LowNorm,
}
policies = st.sampled_from(sorted(POLICIES))


def raw(one, coming):
    return one["paid"]


def normalised(one, coming):
    return one["paid"] / (coming - one["position"])


@pytest.mark.parametrize(("heavy", "recent", "sinks"), [(3, 3, 0), (4, 1, 1), (1, 4, 2)])
@pytest.mark.parametrize("worth", [raw, normalised])
def test_equals_the_algorithm_by_hand(heavy, recent, sinks, worth):
    model, ids = peaked(layers=2), text(20)
    expected, kept = by_hand(model, ids, worth, chosen=heavy, recent=recent, sinks=sinks)

    def make():
        return HeavyHitters(heavy, recent=recent, sinks=sinks, normalised=worth is normalised)

    cache, rows = make(), []
    for t in range(20):
        rows.append(model(ids[None, t : t + 1], cache=cache)[0])
        assert [cache.kept(layer).tolist() for layer in range(2)] == kept[t]
    assert furthest(torch.cat(rows), expected) < EXACT
    assert furthest(model(ids[None], cache=make())[0], expected) < EXACT
    assert kept[-1][0][0] != kept[-1][0][1] or sinks  # heads do differ


# --- laws of every policy -----------------------------------------------------------------------------------------


@given(policies, st.integers(0, 4), st.integers(1, 4), st.integers(0, 2), st.integers(1, 15), st.data())
@settings(max_examples=12)
def test_what_is_kept(policy, chosen, recent, sinks, length, data):
    """Budget never exceeded, recent and sinks never evicted, nothing comes back, slots in the order of the text."""
    parts = data.draw(portions(length))
    model, ids = peaked(layers=2), text(length, batch=1)
    cache = POLICIES[policy](chosen, recent=recent, sinks=sinks)
    budget, done = sinks + chosen + recent, 0
    assert cache.bound == budget
    before = [[set()] * SHAPE.kv_heads] * 2
    with record() as recorder:
        for part in ids.split(parts, 1):
            model(part, cache=cache)
            done += part.shape[1]
            fresh = set(range(done - part.shape[1], done))
            for layer in range(2):
                kept = cache.kept(layer)
                assert kept.shape == (SHAPE.kv_heads, min(done, budget))
                for head, row in enumerate(kept.tolist()):
                    assert row == sorted(set(row))
                    assert set(row) >= set(range(max(0, done - recent), done)) | set(range(min(sinks, done)))
                    assert set(row) <= before[layer][head] | fresh
            before = [[set(row) for row in cache.kept(layer).tolist()] for layer in range(2)]
    assert cache.nbytes == 2 * SHAPE.kv_heads * min(done, budget) * (2 * SHAPE.head_width * 8 + 8 + 8)
    evicted = {(e.fields["layer"], e.fields["head"], e.fields["position"]) for e in recorder.events}
    assert len(evicted) == len(recorder.events)
    everything = {(i, g, p) for i in range(2) for g in range(SHAPE.kv_heads) for p in range(length)}
    assert everything - evicted == {(i, g, p) for i in range(2) for g in range(SHAPE.kv_heads) for p in before[i][g]}


@given(policies, st.integers(0, 4), st.integers(1, 4), st.integers(0, 2), st.integers(1, 15), st.data())
@settings(max_examples=12)
def test_portions_do_not_matter(policy, chosen, recent, sinks, length, data):
    """A pass of many tokens is the tokens one by one, whatever the portions, in a batch as for each row alone."""
    model, ids = peaked(layers=2), text(length, batch=2)
    make = POLICIES[policy]
    caches = [make(chosen, recent=recent, sinks=sinks) for _ in range(4)]
    one_by_one = fed(model, ids, caches[0])
    assert furthest(fed(model, ids, caches[1], data.draw(portions(length))), one_by_one) < EXACT
    assert furthest(fed(model, ids, caches[2], [length]), one_by_one) < EXACT
    assert furthest(fed(model, ids[1:], caches[3]), one_by_one[1:]) < EXACT
    for layer in range(2):
        assert caches[0].kept(layer).shape == (2, SHAPE.kv_heads, min(length, chosen + recent + sinks))
        for other in caches[1:3]:
            assert torch.equal(caches[0].kept(layer), other.kept(layer))
        assert torch.equal(caches[0].kept(layer)[1], caches[3].kept(layer))


@given(policies, st.integers(1, 16), st.integers(0, 3), st.data())
@settings(max_examples=12)
def test_a_budget_for_all_is_dense(policy, length, spare, data):
    recent = data.draw(st.integers(1, length))
    model, ids = peaked(layers=2), text(length, batch=2)
    cache = POLICIES[policy](length - recent + spare, recent=recent)
    assert furthest(fed(model, ids, cache, data.draw(portions(length))), model(ids)) < EXACT


@given(policies, st.integers(2, 20), st.data())
@settings(max_examples=12)
def test_scores_use_past_queries_only(policy, length, data):
    """What is kept after a token depends neither on what follows nor on the query of the token itself."""
    at = data.draw(st.integers(0, length - 1))
    model, ids = peaked(layers=2), text(length)
    other = ids.clone()
    other[at:] = (other[at:] + 7) % SHAPE.vocab
    caches = [POLICIES[policy](3, recent=2) for _ in range(2)]
    for cache, tokens in zip(caches, (ids, other), strict=True):
        fed(model, tokens[None, : at + 1], cache)
    for layer in range(2):
        assert torch.equal(caches[0].kept(layer), caches[1].kept(layer))


@given(policies, st.integers(0, 3), st.integers(1, 5), st.integers(1, 16))
@settings(max_examples=12)
def test_with_nothing_to_choose_it_is_streaming_llm(policy, sinks, recent, length):
    model, ids = peaked(layers=2), text(length, batch=1)
    cache, plain = POLICIES[policy](0, recent=recent, sinks=sinks), Sinks(sinks, recent)
    assert furthest(fed(model, ids, cache), fed(model, ids, plain)) < EXACT
    assert cache.kept(1).tolist() == [plain.kept(1).tolist()] * SHAPE.kv_heads


@given(st.lists(st.sampled_from([*sorted(POLICIES), "full", "window"]), min_size=1, max_size=4),
       st.integers(1, 18), st.data())  # fmt: skip
@settings(max_examples=12)
def test_lockstep_rows_equal_each_cache_alone(names, length, data):
    make = {
        "full": Full, "window": lambda: Window(6),
        **{name: lambda name=name: POLICIES[name](2, recent=3) for name in POLICIES},
    }  # fmt: skip
    model, ids = peaked(layers=2), text(length, batch=len(names))
    lockstep = Lockstep([make[name]() for name in names])
    together = fed(model, ids, lockstep, data.draw(portions(length)))
    for i, name in enumerate(names):
        alone = make[name]()
        assert furthest(together[i], fed(model, ids[i : i + 1], alone)[0]) < EXACT
        for layer in range(2):
            kept = lockstep.kept(layer)[i]
            heads = kept if kept.dim() == 2 else kept[None]
            expected = alone.kept(layer).expand(len(heads), -1)
            assert [[p for p in row if p >= 0] for row in heads.tolist()] == expected.tolist()


def test_budgets_by_layer():
    model, ids = peaked(), text(15, batch=1)
    cache = HeavyHitters([1, 5, 20], recent=2)
    assert furthest(fed(model, ids, cache, [15]), fed(model, ids, (one := HeavyHitters([1, 5, 20], recent=2)))) < EXACT
    assert [cache.kept(i).shape[1] for i in range(3)] == [3, 7, 15]
    assert all(torch.equal(cache.kept(i), one.kept(i)) for i in range(3))
    assert cache.bound == 22
    with pytest.raises(ValueError, match="heavy must name a number for every layer, and has 2 for layer 2"):
        model(ids, cache=HeavyHitters([1, 2], recent=2))


# --- scores -------------------------------------------------------------------------------------------------------


def shown(cache, patterns):
    """Feed one layer of one KV head by hand: the pattern of each token's two queries over its slots."""
    rope = rope_tables(4, base=10000.0, count=16, dtype=torch.float64, device=torch.device("cpu"))
    for pattern in patterns:
        cache.extend(0, torch.ones(1, 1, 1, 4).double(), torch.ones(1, 1, 1, 4).double(), rope)
        cache.observe(0, torch.tensor(pattern, dtype=torch.float64)[None, :, None])
        cache.advance(1)


PATTERNS = [
    [[1.0], [1.0]],  # token 0 gets 2
    [[0.9, 0.1], [0.7, 0.3]],  # 0: 3.6, 1: 0.4
    [[0.2, 0.1, 0.7], [0.1, 0.1, 0.8]],  # 0: 3.9, 1: 0.6, 2: 1.5
    [[0.0, 0.5, 0.5], [0.0, 0.0, 1.0]],  # token 1 went: 0: 3.9, 2: 2.0, 3: 1.5
]


def test_scores_are_sums_over_the_group():
    cache = HeavyHitters(1, recent=2)
    with record() as recorder:
        shown(cache, PATTERNS)
    recording = recorder.freeze()
    assert cache.kept(0).tolist() == [[0, 2, 3]]
    worth = recording.track("selected.worth", layer=0).latest()
    assert np.abs(worth - [[3.9, 2.0, 1.5]]).max() < 1e-6  # tapped in float32
    [event] = recording.happened("cache.evict")
    assert (event.fields["layer"], event.fields["head"], event.fields["position"]) == (0, 0, 1)
    assert "0.6 in all" in event.fields["reason"]


def test_normalised_scores_are_means_over_the_queries_that_could_see():
    cache = HeavyHitters(1, recent=2, normalised=True)
    with record() as recorder:
        shown(cache, PATTERNS)
    worth = recorder.freeze().track("selected.worth", layer=0).latest()
    assert np.abs(worth - [[3.9 / 4, 2.0 / 2, 1.5 / 1]]).max() < 1e-6


def test_raw_sums_favour_early_tokens():
    """A token that its only query looked at hardest of all is the first to go by the raw sum, not by the mean."""
    patterns = [*([[1 / n] * n] * 2 for n in (1, 2, 3)), [[0.7 / 3] * 3 + [0.3]] * 2, [[0.25] * 4] * 2]
    kept = {}
    for by_mean in (False, True):
        cache = HeavyHitters(3, recent=1, normalised=by_mean)
        shown(cache, patterns)
        kept[by_mean] = cache.kept(0).tolist()
    assert kept == {False: [[0, 1, 2, 4]], True: [[0, 1, 3, 4]]}


def test_a_pattern_of_too_few_queries_is_refused():
    model, ids = decoder(layers=1), text(6, batch=1)
    with pytest.raises(
        ValueError, match=re.escape("pattern must show all 6 queries of the pass and 6 slots, not [1, 6]")
    ):
        model.hidden(ids, cache=HeavyHitters(4, recent=4), show=1)


# --- what a lesson sees -------------------------------------------------------------------------------------------


def test_taps_say_what_is_kept_and_why():
    model, ids = peaked(layers=2), text(16)
    cache = HeavyHitters(3, recent=3, sinks=1)
    with record() as recorder:
        tokens = list(generate(model, ids, steps=5, cache=cache))
    assert tokens == list(generate(model, ids, steps=5, cache=HeavyHitters(3, recent=3, sinks=1)))
    recording = recorder.freeze()
    positions = recording.track("selected.positions", layer=1).latest()
    assert positions.tolist() == cache.kept(1).tolist()
    assert recording.track("selected.positions", layer=1).axes == ("head", "slot")
    why = [[REASONS[code] for code in row] for row in recording.track("selected.why", layer=1).latest().tolist()]
    assert why == [["sink", *["chosen"] * 3, *["recent"] * 3]] * SHAPE.kv_heads
    with record(keep={"cache.evict": {"layer": 1}}) as recorder:
        fed(model, ids[None], HeavyHitters(3, recent=3))
    assert {e.fields["layer"] for e in recorder.events} == {1}


def side_by_side():
    return {
        "full": Full(), "window": Window(8), "sinks": Sinks(2, 6), "h2o": HeavyHitters(4, recent=4),
        "normalised": HeavyHitters(4, recent=4, normalised=True), "norm": LowNorm(4, recent=4),
    }  # fmt: skip


def test_reading_side_by_side():
    model, ids = peaked(), text(24)
    plain = read(model, ids, {name: Policy(cache) for name, cache in side_by_side().items()})
    with record() as recorder:
        recorded = read(model, ids, {name: Policy(cache) for name, cache in side_by_side().items()})
    assert plain == recorded
    recording = recorder.freeze()
    for name, cache in side_by_side().items():
        logits = fed(model, ids[None], cache)[0, :-1].log_softmax(-1)
        nats = -logits.gather(1, ids[1:, None])[:, 0]
        assert np.abs(np.array(plain[name]) - nats.numpy()).max() < 1e-5  # read rounds logits to float32
        kept = recording.track("cache.kept", strategy=name)
        assert kept.latest().tolist() == cache.kept(0).tolist()
        assert kept.axes == (("head", "slot") if isinstance(cache, Selected) else ("slot",))
        assert recording.track("read.scores", strategy=name).latest() == cache.kept(0).shape[-1]
    assert recording.track("selected.why", layer=2, strategy="h2o").latest().shape == (SHAPE.kv_heads, 8)


def test_compare_decodes_one_prompt_by_all():
    model, ids, steps = decoder(), text(20), 8
    plain = compare(model, ids, side_by_side(), steps=steps)
    with record() as recorder:
        assert compare(model, ids, side_by_side(), steps=steps) == plain
    recording = recorder.freeze()
    assert recording.steps == 20 + steps - 1
    base = list(generate(model, ids, steps=steps, cache=Full()))
    whole = torch.cat((ids, torch.tensor(base[:-1])))[None]
    full = model(whole)[0].log_softmax(-1)
    for name, cache in side_by_side().items():
        course = plain[name]
        own = list(generate(model, ids, steps=steps, cache=side_by_side()[name]))
        assert course.text == own
        assert course.parts == next((i for i, (a, b) in enumerate(zip(own, base, strict=True)) if a != b), None)
        other = fed(model, whole, cache)[0].log_softmax(-1)
        kl = (full.exp() * (full - other)).sum(-1)
        assert np.abs(np.array(course.kl) - kl.numpy()).max() < 1e-12
        assert np.abs(recording.stack("compare.kl", strategy=name) - kl.numpy()).max() < 1e-6
        assert recording.stack("compare.own", strategy=name)[19:].tolist() == own
        assert recording.stack("compare.token", strategy=name).tolist() == other.argmax(-1).tolist()
        assert recording.stack("compare.held", strategy=name)[-1].tolist() == [cache.kept(0).shape[-1]] * SHAPE.layers
    assert plain["full"].parts is None
    assert any(course.parts is not None for course in plain.values())


def test_held_share():
    assert held_share(torch.tensor([0, 1, 5, 6]), range(4, 8)) == 0.5
    assert held_share(torch.tensor([[0, 1, 5, 6], [4, 5, 6, 7]]), range(4, 8)) == 0.75
    assert held_share(torch.empty(0, dtype=torch.long), range(4, 8)) == 0
    with pytest.raises(ValueError, match="fact must hold a position"):
        held_share(torch.tensor([1]), range(0))


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HeavyHitters(-1, recent=2), "heavy must be a number of tokens, 0 or more, or one a layer, not -1"),
        (lambda: HeavyHitters([], recent=2), r"heavy must be a number of tokens, 0 or more, or one a layer, not \[\]"),
        (lambda: HeavyHitters([2, 1.5], recent=2), "heavy must be a number of tokens"),
        (lambda: HeavyHitters(True, recent=2), "heavy must be a number of tokens"),
        (lambda: HeavyHitters(2, recent=0), "recent must be a number of tokens above 0, not 0"),
        (lambda: HeavyHitters(2, recent=2, sinks=-1), "sinks must be a number of tokens, 0 or more, not -1"),
        (lambda: LowNorm(-2, recent=2), "low must be a number of tokens, 0 or more, or one a layer, not -2"),
        (lambda: compare(decoder(), text(4), {"h2o": Full()}, steps=2), "policies must name 'full', the yardstick"),
        (lambda: compare(decoder(), text(4), {"full": Full()}, steps=0), "steps must be a number of tokens above 0"),
        (lambda: compare(decoder(), text(60), {"full": Full()}, steps=9), "needs 68 positions, and the model has"),
        (lambda: ask_each(decoder(), None, None, {}), "policies must name at least one"),
    ],
)
def test_impossible(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_used_cache_is_refused():
    model, cache = decoder(), Full()
    model(text(3, batch=1), cache=cache)
    with pytest.raises(ValueError, match="must come with a fresh cache, and it has seen 3 tokens"):
        compare(model, text(4), {"full": cache}, steps=2)


def test_too_long_a_pass_is_refused():
    cache = HeavyHitters(2, recent=2)
    k = torch.ones(1, 1, 5, 4)
    rope = rope_tables(4, base=10000.0, count=16, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="a pass may bring 4 tokens to this cache now, as at_once says, not 5"):
        cache.extend(0, k, k, rope)


# --- SmolLM2 ------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
def test_smollm2(smollm2):
    """Side by side on the real model: budgets hold, raw sums keep earlier tokens, a passkey is asked of each."""
    model, tokenizer = smollm2
    question = passkey(tokenizer, tokens=120, depth=0.2, seed=3)
    ids = tokenizer.prompt(question.prompt)
    caches = {
        "full": Full(), "h2o": HeavyHitters(8, recent=8), "norm": LowNorm(8, recent=8),
        "normalised": HeavyHitters(8, recent=8, normalised=True),
    }  # fmt: skip
    courses = compare(model, ids[:48], caches, steps=2)
    assert max(courses["full"].kl) == 0
    assert all(max(course.kl[:16]) < 1e-3 for course in courses.values())  # nothing evicted yet
    assert all(max(courses[name].kl[16:]) > 0.01 for name in caches if name != "full")
    layers = range(model.shape.layers)

    def age(name):
        return sum(float(caches[name].kept(i)[:, :8].double().mean()) for i in layers) / len(layers)

    assert age("h2o") < age("normalised")
    found = ask_each(model, tokenizer, question, {"full": Full, "window": lambda: Window(32)})
    assert found["full"].held == 1.0
    assert found["window"].held == 0.0
    assert found["full"].answer.right
    assert not found["window"].answer.right
