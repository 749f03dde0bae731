"""Oracles: the definitions as loops, and closed forms for made patterns. Laws: coupling that is there is found, and
where there is none p is spread evenly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import rhythm
from engine.mixers.softmax import PATTERN
from engine.model import Decoder, Shape
from engine.recording import record
from engine.rhythm import beat, coupled, coupling, listen, measure, near_and_far, peaks, shuffled

SHAPE = Shape(vocab=50, width=32, layers=3, heads=4, kv_heads=2, head_width=8, ffn_width=24, max_positions=128)


def uniform(tokens: int) -> torch.Tensor:
    tril = torch.ones(1, tokens, tokens, dtype=torch.float64).tril()
    return tril / tril.sum(-1, keepdim=True)


def causal(heads: int, tokens: int, seed: int) -> torch.Tensor:
    scores = 3 * torch.randn(heads, tokens, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 14), window=st.integers(1, 9), first=st.integers(1, 5), more=st.integers(0, 6),
       sinks=st.integers(0, 3), seed=st.integers(0, 99))  # fmt: skip
def test_measures_are_their_definitions_as_loops(tokens, window, first, more, sinks, seed):
    sinks = min(sinks, tokens - 1)
    a = causal(2, tokens, seed)
    far, waad, fai = measure(a, window=window, first=first, last=first + more, sinks=sinks)
    for h in range(2):
        share = [[0.0] * tokens for _ in range(tokens)]
        for t in range(tokens):
            rest = sum(float(a[h, t, s]) for s in range(sinks, t + 1))
            for s in range(sinks, t + 1):
                share[t][s] = float(a[h, t, s]) / rest
        looks = [sum(share[t][s] * (t - s) for s in range(t + 1)) for t in range(tokens)]
        assert float(far[h]) == pytest.approx(sum(looks[sinks:]) / (tokens - sinks), abs=1e-12)
        for t in range(tokens):
            clipped = sum(share[t][s] * min(t - s, window) for s in range(t + 1))
            assert float(waad[h, t]) == pytest.approx(clipped, abs=1e-12)
            later = [share[u][t] for u in range(t + first, min(t + first + more, tokens - 1) + 1)]
            expected = sum(later) / len(later) if later else math.nan
            assert float(fai[h, t]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_closed_forms():
    T = 40
    far, waad, fai = measure(uniform(T), window=T, first=1, last=T)
    t = torch.arange(T, dtype=torch.float64)
    torch.testing.assert_close(waad[0], t / 2)  # the mean of 0..t
    assert float(far[0]) == pytest.approx((T - 1) / 4)
    assert float(fai[0, 0]) == pytest.approx(sum(1 / n for n in range(2, T + 1)) / (T - 1))
    own = torch.eye(T)[None]
    far, waad, fai = measure(own)
    assert not far.any()
    assert not waad.any()
    assert not fai[0, : T - 4].any()
    rests = torch.zeros(1, T, T)
    rests[..., 0] = 1  # all look at the first token
    far, waad, fai = measure(rests, window=7)
    assert waad[0].tolist() == [min(n, 7) for n in range(T)]
    assert float(far[0]) == (T - 1) / 2
    assert float(fai[0, 0]) == 1
    assert not measure(rests, sinks=1)[1].any()


def test_listening_keeps_nothing_and_equals_the_recorded_pattern():
    model = Decoder(SHAPE, seed=1).eval().requires_grad_(False)
    ids = torch.randint(0, 50, (60,), generator=torch.Generator().manual_seed(0))
    with record() as recorder:
        found = listen(model, ids, sinks=1)
    recording = recorder.freeze()
    patterns = [torch.tensor(recording.stack(PATTERN, layer=layer)[0]) for layer in range(3)]
    stored = rhythm.rhythm(patterns, sinks=1)
    for name in ("distance", "waad", "fai"):
        torch.testing.assert_close(getattr(found, name), getattr(stored, name), rtol=0, atol=0, equal_nan=True)
    assert found.waad.shape == (3, 4, 60)
    quiet = listen(model, ids, sinks=1)
    assert torch.equal(quiet.waad, found.waad)


def test_heads_that_look_near_and_far():
    distance = torch.tensor([[5.0, 1.0, 9.0, 3.0], [2.0, 8.0, 4.0, 7.0]])
    assert near_and_far(distance, share=0.25) == ([(0, 1), (1, 0)], [(1, 1), (0, 2)])
    assert near_and_far(distance, share=0.01) == ([(0, 1)], [(0, 2)])


def test_means_over_heads():
    found = listen(Decoder(SHAPE, seed=1).eval().requires_grad_(False), torch.arange(30))
    waad, fai = found.over([(0, 1), (2, 3)])
    torch.testing.assert_close(waad, (found.waad[0, 1] + found.waad[2, 3]) / 2)
    torch.testing.assert_close(fai, (found.fai[0, 1] + found.fai[2, 3]) / 2, equal_nan=True)


def test_peaks():
    curve = torch.tensor([0.0, 5, 0, 1, 0, 7, 7, 0, 2, torch.nan, 9])
    assert peaks(curve, share=0.5).nonzero()[:, 0].tolist() == [1, 5, 6, 8, 10]
    assert peaks(curve, share=0.35).nonzero()[:, 0].tolist() == [1, 5, 6, 10]
    assert not peaks(torch.ones(9)).any()
    assert peaks(torch.arange(5.0)).nonzero()[:, 0].tolist() == [4]


def marks(*at: int, tokens: int = 100) -> torch.Tensor:
    found = torch.zeros(tokens, dtype=torch.bool)
    found[list(at)] = True
    return found


def test_coupling_by_hand():
    assert coupled(marks(3, 10, 50), marks(3, 12, 49), within=2) == pytest.approx(2 / 3)
    assert coupled(marks(3, 10, 50), marks(3, 12, 49), within=0) == pytest.approx(1 / 3)
    assert coupled(marks(98, 99), marks(0, 1), within=5) == 0  # the end does not reach round to the start


@pytest.mark.parametrize("turned", [True, False])
def test_true_coupling_is_rare_by_chance_and_chance_is_not(turned):
    generator = torch.Generator().manual_seed(0)
    first = marks(*torch.randperm(290, generator=generator)[:30].tolist(), tokens=300)
    after = first.roll(1)
    found = coupling(first, after, within=1, shuffles=299, turned=turned)
    assert found.share == 1
    assert 1 / 300 <= found.p <= 5 / 300
    assert len(found.chance) == 299
    p = []
    for seed in range(40):
        alone = marks(*torch.randperm(300, generator=generator)[:30].tolist(), tokens=300)
        p.append(coupling(first, alone, within=1, shuffles=99, seed=seed, turned=turned).p)
    assert sum(value <= 0.05 for value in p) <= 6
    assert 0.3 < sum(p) / len(p) < 0.8


def test_coupling_is_a_function_of_its_seed():
    a, b = marks(1, 20, 40, 77), marks(2, 22, 60)
    one, two, three = (coupling(a, b, shuffles=50, seed=seed, turned=False) for seed in (1, 1, 2))
    assert torch.equal(one.chance, two.chance)
    assert not torch.equal(one.chance, three.chance)
    assert one.p == (1 + sum(one.chance.ge(one.share).tolist())) / 51


def test_all_of_it_is_tapped_and_taps_change_nothing():
    model = Decoder(SHAPE, seed=1).eval().requires_grad_(False)
    ids = torch.randint(0, 50, (90,), generator=torch.Generator().manual_seed(0))
    plain = beat(listen(model, ids), shuffles=20)
    with record(keep={"rhythm.*": {}}) as recorder:
        seen = beat(listen(model, ids), shuffles=20)
    assert torch.equal(plain[0], seen[0])
    assert plain[2].p == seen[2].p
    recording = recorder.freeze()
    assert recording.stack(rhythm.DISTANCE).shape == (1, 3, 4)
    assert recording.stack(rhythm.WAAD).shape == recording.stack(rhythm.FAI).shape == (1, 90)
    for measured in ("waad", "fai"):
        assert recording.track(rhythm.PEAKS, measure=measured).latest().any()
    assert recording.stack(rhythm.CHANCE).shape == (1, 20)


def test_shuffled_text_has_the_same_tokens():
    ids = torch.arange(50)
    mixed = shuffled(ids, seed=3)
    assert mixed[0] == 0
    assert not torch.equal(mixed, ids)
    assert torch.equal(mixed.sort().values, ids)
    assert torch.equal(mixed, shuffled(ids, seed=3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: measure(torch.ones(2, 3, 4)), "both as many"),
        (lambda: measure(torch.ones(1, 3, 3) / 3), "no query looks ahead"),
        (lambda: measure(uniform(5) / 2), "sums to 1"),
        (lambda: measure(uniform(5), window=0), "window"),
        (lambda: measure(uniform(5), first=0), "first"),
        (lambda: measure(uniform(5), first=5, last=4), "first"),
        (lambda: measure(uniform(5), sinks=5), "sinks"),
        (lambda: rhythm.rhythm([]), "one layer"),
        (lambda: listen(None, torch.zeros(2, 3)), "one text"),
        (lambda: near_and_far(torch.ones(2, 2), share=0.6), "share"),
        (lambda: peaks(torch.ones(2)), "three tokens"),
        (lambda: peaks(torch.ones(4), share=1.0), "share"),
        (lambda: peaks(torch.full((4,), torch.nan)), "NaN"),
        (lambda: coupled(marks(), marks(1)), "a peak each"),
        (lambda: coupled(marks(1), torch.ones(100)), "true or false"),
        (lambda: coupled(marks(1), marks(1), within=-1), "within"),
        (lambda: coupling(marks(1), marks(1), shuffles=0), "shuffles"),
        (lambda: shuffled(torch.arange(3), seed=0, fixed=4), "fixed"),
        (lambda: listen(Decoder(SHAPE), torch.arange(9)).over([]), "heads"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_has_heads_that_look_near_and_far(smollm2):
    model, tokenizer = smollm2
    text = ("To bake bread, first mix flour and water. Then add salt and yeast, and knead the dough for ten minutes. "
            "Let it rest until it has doubled. After that, shape a loaf, and bake it in a hot oven. ") * 2  # fmt: skip
    found = listen(model, torch.tensor(tokenizer.prompt(text)), sinks=1)
    near, far = near_and_far(found.distance)
    assert float(found.distance.flatten().quantile(0.9)) > 3 * float(found.distance.flatten().quantile(0.1))
    *_, together = beat(found)
    assert float(found.over(near)[0][20:].mean()) < float(found.over(far)[0][20:].mean())
    assert 0 < together.p <= 1
