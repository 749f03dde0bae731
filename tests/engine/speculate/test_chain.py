"""Chains: the closed-form law, every outcome of the real loop, greedy against the plain loop, and the cache after."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.generate import generate
from engine.mixers.linear import LinearAttention
from engine.mixers.state import tensors
from engine.model import Decoder, Shape
from engine.recording import record
from engine.speculate import Dice, Draft, Drafter, acceptance, chance, emitted, in_a_row, law, rejected, residual
from engine.speculate.chain import Chain, verify
from engine.speculate.loop import speculate

EXACT = 1e-12
WORDS = 3


def toy(seed, *, vocab=WORDS, layers=2):
    shape = Shape(
        vocab=vocab, width=16, layers=layers, heads=2, kv_heads=1, head_width=8, ffn_width=24, max_positions=64,
        tied=False,
    )  # fmt: skip
    model = Decoder(shape, seed=seed).double().eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(12 if p.dim() > 1 else 1)  # laws far from flat and from one another
    return model


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def random_law(draw, size):
    weights = draw(st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any))
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


@st.composite
def pairs(draw):
    size = draw(st.integers(1, 6))
    return random_law(draw, size), random_law(draw, size)


class Every(Dice):
    """Goes through every outcome: `paths` runs `work` once for each, and tells with what probability it happens."""

    def __init__(self, script):
        self.script, self.at, self.probability = script, 0, 1.0
        self.widths = []

    def _choose(self, weights):
        possible = [i for i, w in enumerate(weights) if w > 0]
        pick = self.script[self.at] if self.at < len(self.script) else 0
        self.widths.append(len(possible))
        self.at += 1
        self.probability *= weights[possible[pick]]
        return possible[pick]

    def accepts(self, probability):
        return self._choose([1.0 - probability, probability]) == 1

    def draw(self, p):
        return self._choose(p.tolist())


def paths(work):
    """Yield (probability, result) of every outcome of `work(dice)`."""
    script = []
    while True:
        dice = Every(script)
        result = work(dice)
        yield dice.probability, result
        script = (script + [0] * len(dice.widths))[: len(dice.widths)]
        while script and script[-1] + 1 == dice.widths[len(script) - 1]:
            script.pop()
        if not script:
            return
        script[-1] += 1


def plain_law(model, prompt, steps, temperature):
    """The probability of every continuation, from the model alone."""
    found = {}
    for tokens in itertools.product(range(model.shape.vocab), repeat=steps):
        ids = torch.tensor([[*prompt, *tokens]])
        rows = law(model(ids)[0, len(prompt) - 1 : -1], temperature=temperature)
        found[tokens] = float(rows.gather(1, torch.tensor(tokens)[:, None]).prod())
    return found


def furthest_law(work, expected):
    out = dict.fromkeys(expected, 0.0)
    for probability, tokens in paths(work):
        out[tuple(tokens)] += probability
    return max(abs(out[key] - expected[key]) for key in expected)


# --- one position ----------------------------------------------------------------------------------------------


@given(pairs())
def test_one_position_gives_p(pq):
    p, q = pq
    out = sum(q[x] * emitted(p, [x], [q]) for x in range(len(p)) if q[x] > 0)
    assert (out - p).abs().max() < EXACT


@given(pairs())
def test_a_chosen_guess_gives_p(pq):
    p, _ = pq
    for x in range(len(p)):
        assert (emitted(p, [x], [None]) - p).abs().max() < EXACT


@given(pairs())
def test_acceptance_is_one_minus_total_variation(pq):
    p, q = pq
    accepted = sum(float(q[x]) * chance(p, x, q) for x in range(len(p)) if q[x] > 0)
    assert accepted == pytest.approx(1 - 0.5 * float((p - q).abs().sum()), abs=EXACT)
    assert accepted == pytest.approx(float(acceptance(p, q)), abs=EXACT)


def test_the_residual_is_what_p_has_more():
    p, q = tensor([0.5, 0.3, 0.2]), tensor([0.2, 0.7, 0.1])
    assert (residual(p, q) - tensor([0.75, 0.0, 0.25])).abs().max() < EXACT
    assert torch.equal(residual(p, p), p)


def test_drawing_from_p_after_a_rejection_is_biased():
    """The usual mistake: the law is then off by a tenth."""
    p, q = tensor([0.5, 0.3, 0.2]), tensor([0.2, 0.7, 0.1])
    wrong = torch.minimum(p, q) + (1 - acceptance(p, q)) * p
    assert (wrong - p).abs().max() > 0.1


def test_a_guess_that_its_drafter_could_not_make_is_refused():
    p = tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="its own q gives it probability 0"):
        chance(p, 0, tensor([0.0, 1.0]))


def test_temperature_bends_p_and_q_alike():
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    assert torch.equal(law(logits, temperature=0.0), torch.tensor([[0.0, 0.0, 1.0]]).double())
    assert (law(logits, temperature=2.0) - (logits.double() / 2).softmax(-1)).abs().max() == 0
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            law(logits, temperature=wrong)


def test_dice_draw_by_the_law():
    """Against the law itself at six standard deviations; a word of probability 0 never comes, not even at the ends."""
    p, dice, count = tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]), Dice(0), 3000
    found = torch.bincount(tensor([dice.draw(p) for _ in range(count)]).long(), minlength=6) / count
    assert (found[p == 0] == 0).all()
    assert ((found - p).abs() <= 6 * (p * (1 - p) / count).sqrt()).all()
    for number, token in ((0.0, 1), (1.0 - 2**-53, 4), (1.0, 4)):
        dice._generator, real = None, torch.rand
        torch.rand = lambda *_, number=number, **__: tensor(number)
        try:
            assert dice.draw(p) == token
        finally:
            torch.rand = real


# --- the real loop, every outcome ------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "temperature"), [(1, 1.0), (2, 1.0), (2, 0.6), (3, 1.7)])
def test_the_loop_has_the_law_of_the_target(length, temperature):
    target, small = toy(1), toy(2, layers=1)
    prompt, steps = [0, 2], 3

    def work(dice):
        drafter = Chain(small, length=length)
        return list(
            speculate(target, prompt, steps=steps, drafter=drafter, temperature=temperature, dice=dice)
        )  # fmt: skip

    assert furthest_law(work, plain_law(target, prompt, steps, temperature)) < EXACT


def test_a_draft_equal_to_the_target_is_always_accepted():
    target = toy(1, vocab=30)
    for temperature in (0.0, 1.0):
        with record() as recorder:
            list(speculate(target, [1, 2], steps=16, drafter=Chain(target, length=4), temperature=temperature))
        rounds = [e.fields for e in recorder.freeze().happened("speculate.round")][1:]
        assert [len(r["accepted"]) for r in rounds] == [r["drafted"] for r in rounds]
        assert [r["drafted"] for r in rounds] == [4, 4, 4]


@pytest.mark.parametrize("length", [1, 3, 7])
def test_greedy_equals_the_plain_loop(length):
    for seed in range(4):
        target, small = toy(seed, vocab=9), toy(seed + 10, vocab=9, layers=1)
        expected = list(generate(target, [1, 2, 3], steps=20, cache=Full()))
        assert list(speculate(target, [1, 2, 3], steps=20, drafter=Chain(small, length=length))) == expected


@pytest.mark.parametrize("steps", [1, 2, 7, 12])
def test_the_cache_afterwards_is_a_fresh_one(steps):
    target, small, cache = toy(3, vocab=9), toy(4, vocab=9, layers=1), Full()
    drafter = Chain(small, length=3)
    out = list(speculate(target, [1, 2], steps=steps, drafter=drafter, cache=cache, temperature=1.0, seed=steps))
    fresh = Full()
    with torch.no_grad():
        target(torch.tensor([[1, 2, *out[:-1]]]), cache=fresh)
        assert cache.seen == fresh.seen == 2 + steps - 1
        for layer in range(2):
            for mine, theirs in ((cache._k, fresh._k), (cache._v, fresh._v)):
                assert (mine[layer][:, :, : cache.seen] - theirs[layer][:, :, : cache.seen]).abs().max() < EXACT


def test_recording_changes_nothing_and_stays_small():
    target, small = toy(3, vocab=300), toy(4, vocab=300, layers=1)

    def run():
        drafter = Chain(small, length=4)
        return list(speculate(target, [1, 2], steps=40, drafter=drafter, temperature=1.0, seed=5))

    plain = run()
    with record() as recorder:
        assert run() == plain
    recording = recorder.freeze()
    assert recording.steps == len(recording.happened("speculate.round"))
    assert recording.nbytes < 2_000_000
    assert recording.stack("next.token").tolist() == [2, *plain]
    assert recording.stack("speculate.given").sum() == 40


def test_the_seed_decides():
    target, small = toy(3, vocab=30), toy(4, vocab=30, layers=1)
    runs = [
        list(speculate(target, [1], steps=12, drafter=Chain(small, length=2), temperature=1.0, seed=seed))
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_recurrent_target_goes_back_to_its_checkpoint(temperature):
    """A state cannot be cropped: after a rejection the accepted tokens are read again from a copy of it."""
    shape = toy(1).shape
    target = Decoder(shape, mixer=lambda layer: LinearAttention(shape, layer), seed=3).double().eval()
    target.requires_grad_(False)
    with torch.no_grad():
        for p in target.parameters():
            p.mul_(12 if p.dim() > 1 else 1)
    small, cache = toy(2, layers=1), Full()
    if temperature:

        def work(dice):
            drafter = Chain(small, length=2)
            return list(speculate(target, [0, 2], steps=3, drafter=drafter, temperature=1.0, dice=dice))

        assert furthest_law(work, plain_law(target, [0, 2], 3, 1.0)) < EXACT
        return
    out = list(speculate(target, [0, 2], steps=20, drafter=Chain(small, length=3), cache=cache))
    assert out == list(generate(target, [0, 2], steps=20, cache=Full()))
    fresh = Full()
    target(torch.tensor([[0, 2, *out[:-1]]]), cache=fresh)
    assert cache.seen == fresh.seen
    for mine, theirs in zip(tensors(cache.states), tensors(fresh.states), strict=True):
        assert (mine - theirs).abs().max() < EXACT * theirs.abs().max()


# --- what is refused -------------------------------------------------------------------------------------------


def test_wrong_arguments():
    target = toy(1)
    drafter = Chain(target, length=1)
    with pytest.raises(ValueError, match="length must be"):
        Chain(target, length=0)
    with pytest.raises(ValueError, match="steps must be"):
        speculate(target, [1], steps=0, drafter=drafter)
    with pytest.raises(ValueError, match="temperature must be"):
        speculate(target, [1], steps=1, drafter=drafter, temperature=-1)
    with pytest.raises(ValueError, match="max_positions=64"):
        speculate(target, [1], steps=65, drafter=drafter)
    cache = Full()
    with torch.no_grad():
        target(torch.tensor([[1]]), cache=cache)
    with pytest.raises(ValueError, match="empty Full"):
        speculate(target, [1], steps=1, drafter=drafter, cache=cache)
    with pytest.raises(ValueError, match="needs 2 laws"):
        verify(in_a_row([1]), [torch.ones(3)], dice=Dice(0))
    with pytest.raises(ValueError, match="parent for each token"):
        Draft((-1,), (1, 2))
    with pytest.raises(ValueError, match="a node before it"):
        Draft((0,), (1,))
    with pytest.raises(ValueError, match="the same token"):
        Draft((-1, -1), (4, 4))


def test_the_last_token_may_reach_the_last_position():
    target = toy(1)
    assert len(list(speculate(target, [1], steps=64, drafter=Chain(toy(2), length=5), temperature=1.0))) == 64


class Stubborn(Drafter):
    """Always guesses the same."""

    def __init__(self, tokens):
        self.tokens = tokens

    def draft(self, text, *, room, temperature, dice):
        return in_a_row(self.tokens[:room])


def test_any_guess_at_all_is_lossless():
    target = toy(1)
    expected = plain_law(target, [0], 3, 1.0)
    for tokens in ([0, 0], [1, 2, 0], []):

        def work(dice, tokens=tokens):
            return list(speculate(target, [0], steps=3, drafter=Stubborn(tokens), temperature=1.0, dice=dice))

        assert furthest_law(work, expected) < EXACT


def test_rejecting_a_chosen_guess_takes_it_out():
    p = tensor([0.5, 0.3, 0.2])
    assert (rejected(p, 0, None) - tensor([0.0, 0.6, 0.4])).abs().max() < EXACT
