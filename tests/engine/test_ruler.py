"""Laws: what is asked for was told, where `fact` and `links` say; the grammar could have written Toyland's; the seed
decides. Oracle: a reader of the sentences, who follows the assignments and the gifts."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.evaluate import ask
from engine.model import Decoder, Shape
from engine.recording import record
from engine.ruler import KEYS, handed_on, needles, variables
from engine.speed import FIRST, PACE, speed
from engine.toyland import Grammar, Tokenizer
from engine.toyland.entropy import surprisal
from engine.toyland.stories import text


class Letters:
    """A token a character, after a start token of its own."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def prompt(self, text):
        return [0, *self.encode(text)]

    def decode(self, ids):
        return "".join(map(chr, ids))


def told(question, place: range) -> str:
    return Letters().decode(Letters().prompt(question.prompt)[place.start : place.stop])


@settings(max_examples=30, deadline=None)
@given(keys=st.integers(1, 20), seed=st.integers(0, 999), tokens=st.integers(1500, 4000))
def test_needles(keys, seed, tokens):
    question = needles(Letters(), tokens=tokens, keys=keys, seed=seed)
    pairs = dict(re.findall(r"magic number of the (\w+) is (\d+)\.", question.prompt))
    assert len(pairs) == len(set(pairs.values())) == keys
    asked = re.search(r"What is the magic number of the (\w+)\?", question.prompt)[1]
    assert question.prompt.endswith(f"The magic number of the {asked} is ")
    assert question.answer == pairs[asked]
    assert told(question, question.fact) == f" The magic number of the {asked} is {question.answer}."
    assert tokens - 100 < len(question.prompt) <= tokens
    assert question == needles(Letters(), tokens=tokens, keys=keys, seed=seed)


@settings(max_examples=30, deadline=None)
@given(hops=st.integers(0, 6), chains=st.integers(1, 5), seed=st.integers(0, 999))
def test_variables(hops, chains, seed):
    question = variables(Letters(), tokens=2000, hops=hops, chains=chains, seed=seed)
    value: dict[str, str] = {}
    for name, number, other in re.findall(r" VAR (\w+) = (?:(\d+)|(\w+))\.", question.prompt):
        value[name] = number or value[other]  # KeyError if a variable were used before it is set
    assert len(value) == (hops + 1) * chains
    assert len(set(value.values())) == chains
    asked = re.search(r"What is the value of VAR (\w+)\?", question.prompt)[1]
    assert question.prompt.endswith(f"VAR {asked} = ")
    assert question.answer == value[asked]
    sentences = [told(question, place) for place in question.links]
    assert len(sentences) == hops + 1
    assert sentences[0].endswith(f" = {question.answer}.")
    assert sentences[-1].startswith(f" VAR {asked} =")
    for before, after in pairwise(sentences):
        assert after.endswith(f"= {before.split()[1]}.")
    assert question.fact == question.links[0]


@settings(max_examples=30, deadline=None)
@given(hops=st.integers(0, 6), filler=st.integers(0, 3), seed=st.integers(0, 999))
def test_handed_on_is_toyland(hops, filler, seed):
    grammar, tokenizer = Grammar(), Tokenizer()
    question = handed_on(grammar, hops=hops, filler=filler, seed=seed)
    words = tokenizer.pieces(tokenizer.prompt(question.prompt))
    nats = surprisal(text(grammar), [*words, question.answer])
    assert all(0 <= value < 20 for value in nats)
    assert nats[-1] == pytest.approx(0, abs=1e-9)  # the answer follows
    links = [" ".join(words[place.start : place.stop]) for place in question.links]
    assert len(links) == hops + 1
    holder = links[0].split()[0]
    for sentence in links[1:]:
        assert sentence.split()[0] == holder
        holder = sentence.split()[-2]
    assert holder == question.answer
    assert question.fact == question.links[-1]


def test_a_model_can_be_asked():
    shape = Shape(vocab=256, width=16, layers=1, heads=2, kv_heads=2, head_width=8, ffn_width=16, max_positions=4096)
    model = Decoder(shape).eval()
    for question in (needles(Letters(), tokens=600, keys=2, seed=0), variables(Letters(), tokens=600, hops=1, seed=0)):
        said = ask(model, Letters(), question, cache=Full())
        assert len(said.text) == 5
        assert said.nats > 0
    assert ask(model, Tokenizer(), handed_on(Grammar(), hops=2, seed=0)).nats > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: needles(Letters(), tokens=900, keys=0, seed=0), "keys"),
        (lambda: needles(Letters(), tokens=900, keys=len(KEYS) + 1, seed=0), "keys"),
        (lambda: needles(Letters(), tokens=200, keys=1, seed=0), "tokens must be at least"),
        (lambda: needles(Letters(), tokens=900, keys=10, digits=1, seed=0), "digits"),
        (lambda: needles(Letters(), tokens=900, keys=1, digits=0, seed=0), "digits"),
        (lambda: variables(Letters(), tokens=900, hops=-1, seed=0), "hops"),
        (lambda: variables(Letters(), tokens=900, hops=1, chains=0, seed=0), "chains"),
        (lambda: variables(Letters(), tokens=900, hops=676, chains=1, seed=0), "676"),
        (lambda: variables(Letters(), tokens=100, hops=1, seed=0), "tokens must be at least"),
        (lambda: handed_on(Grammar(), hops=-1, seed=0), "hops"),
        (lambda: handed_on(Grammar(), hops=1, filler=-1, seed=0), "filler"),
        (lambda: speed(None, [1], steps=1), "steps"),
        (lambda: speed(None, [1], steps=3, repeats=0), "repeats"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_keys_are_different_words():
    assert len(set(KEYS)) == len(KEYS)


def test_speed_is_of_fresh_runs(monkeypatch):
    shape = Shape(vocab=256, width=16, layers=1, heads=2, kv_heads=2, head_width=8, ffn_width=16, max_positions=256)
    model = Decoder(shape).eval()
    now = iter([0.0, 2.0, 3.0, 10.0, 11.0, 15.0, 20.0, 24.0, 26.0, 30.0, 31.0, 33.0])
    monkeypatch.setattr("engine.speed.time.perf_counter", lambda: next(now))
    made = []

    def cache():
        made.append(Full())
        return made[-1]

    with record(keep={"speed.*": {}}) as recorder:
        found = speed(model, [1, 2, 3], steps=5, cache=cache, repeats=3)
    assert found.firsts == (1.0, 4.0, 1.0)  # the first run warms up
    assert found.paces == (1.0, 2.0, 2.0)
    assert (found.first, found.pace) == (1.0, 2.0)
    assert [each.seen for each in made] == [3 + 4] * 4
    recording = recorder.freeze()
    assert len(recording.track(FIRST).chunks) == len(recording.track(PACE).chunks) == 3


def test_speed_without_a_cache():
    shape = Shape(vocab=256, width=16, layers=1, heads=2, kv_heads=2, head_width=8, ffn_width=16, max_positions=256)
    found = speed(Decoder(shape).eval(), [1, 2, 3], steps=3, repeats=2, warm=0)
    assert len(found.firsts) == len(found.paces) == 2
    assert min(*found.firsts, *found.paces) > 0
