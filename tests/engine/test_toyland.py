"""Toyland: its probabilities are exact, its questions follow from the text, its words go to ids and back."""

import itertools
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import evaluate
from engine.model import Decoder, Shape
from engine.toyland import Grammar, Tokenizer, batch, story
from engine.toyland.entropy import (
    Answer,
    any_of,
    continuations,
    distributions,
    follow,
    offer,
    probability,
    surprisal,
    write,
)
from engine.toyland.habits import STYLES, facts, likings, styled
from engine.toyland.questions import pairs_question, passkey_question, song_question, story_questions
from engine.toyland.stories import KINDS, home, text
from engine.toyland.words import STYLE_WORDS, VOCABULARY

EXACT = 1e-12
FULL = Grammar()
TINY = Grammar(
    names=("anna", "ben"), colours=("red", "blue"), things=("ball", "kite"), places=("attic", "mill"),
    digits=("one", "two"), topics={"mill": ("cook", "stirs bakes", "soup")}, song_words=("rose", "bean"),
    people=2, goods=1, pairs=3, song_length=2,
)  # fmt: skip
WORDS = Tokenizer()


def told(kind, seed=0, length=400):
    return write(text(FULL.only(kind)), random.Random(seed), length)


# --- exact probabilities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "length"), [*((kind, 15) for kind in KINDS), ("home", 17), ("song", 18)])
def test_probabilities_of_all_texts_sum_to_one(kind, length):
    texts = list(continuations(lambda: text(TINY.only(kind)), length))
    assert len(texts) > 8
    assert len({tuple(words) for words, _ in texts}) == len(texts), "two ways to write one text: a hidden choice"
    assert sum(p for _, p in texts) == pytest.approx(1, abs=EXACT)


def test_conditionals_are_those_of_the_enumerated_joint():
    """Bayes by brute force: p(next | prefix) from sums over all texts, against what the process says of itself."""
    length = 9
    joint = {tuple(words): p for words, p in continuations(lambda: text(TINY), length)}
    index = {word: i for i, word in enumerate(VOCABULARY)}
    compared = 0
    for words in list(joint)[:: max(1, len(joint) // 60)]:
        rows = distributions(text(TINY), words, index)
        assert rows.sum(1) == pytest.approx(1, abs=EXACT)
        for t in range(1, length):
            same = {other: p for other, p in joint.items() if other[:t] == words[:t]}
            for word in {other[t] for other in same}:
                true = sum(p for other, p in same.items() if other[t] == word) / sum(same.values())
                assert rows[t - 1, index[word]] == pytest.approx(true, abs=EXACT)
                compared += 1
    assert compared > 500


def test_no_reader_beats_the_floor_on_average():
    """Over all texts of a tiny grammar: the expected surprisal of any other reader is above the entropy (Gibbs)."""
    joint = list(continuations(lambda: text(TINY), 10))
    entropy = sum(-p * math.log(p) for _, p in joint)
    nats = sum(p * surprisal(text(TINY), words).sum() for words, p in joint)
    assert nats == pytest.approx(entropy, abs=1e-10)
    shape = Shape(vocab=256, width=16, layers=1, heads=2, kv_heads=2, head_width=8, ffn_width=16)
    for trial in range(12):
        if trial < 3:  # networks
            model = Decoder(shape, seed=trial).double()
            ids = torch.tensor([[WORDS.ids[word] for word in words] for words, _ in joint])
            paid = evaluate.surprisal(model, ids).sum(1).tolist()
        else:  # the truth, a little off: a reader that would win if the floor were a little too high
            paid = []
            noise = np.random.default_rng(trial).uniform(0.9, 1.1, 256) ** (0.1, 1, 3)[trial % 3]
            for words, _ in joint:
                rows = distributions(text(TINY), words, WORDS.ids)
                rows = rows * noise / (rows * noise).sum(1, keepdims=True)
                at = [WORDS.ids[word] for word in words[1:]]
                paid.append(-np.log(rows[np.arange(len(at)), at]).sum())
        assert sum(p * x for (_, p), x in zip(joint, paid, strict=True)) > entropy


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_text_costs_what_following_it_says(kind):
    for seed in range(5):
        drawn = told(kind, seed)
        assert surprisal(text(FULL.only(kind)), drawn.words) == pytest.approx(np.array(drawn.nats), abs=EXACT)


def test_floor_is_the_mean_surprisal_of_the_tokens_after_the_first():
    drawn = batch(FULL, seed=3, step=0, rows=4, length=100)
    nats = [surprisal(text(FULL), WORDS.pieces(row.tolist()))[1:].mean() for row in drawn.ids]
    assert drawn.floor == pytest.approx(math.exp(np.mean(nats)), abs=1e-10)


def test_words_come_as_often_as_offered():
    """10,000 draws from one offer, each word within five standard deviations."""

    def once():
        yield offer((0.25, ["a", "b"]), (0.7, ["the"]), (0.05, ["on"]), (3.0, []))

    rng = random.Random(0)
    drawn = [write(once(), rng, 9).words[0] for _ in range(10_000)]
    for word, p in {"a": 0.125, "b": 0.125, "the": 0.7, "on": 0.05}.items():
        assert probability(next(once()), word) == pytest.approx(p)
        assert drawn.count(word) == pytest.approx(10_000 * p, abs=5 * math.sqrt(10_000 * p * (1 - p)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_offer_is_sound(kind):
    """Groups share no word, all words are Toyland's, none is a style word, weights sum to 1."""
    for seed in range(10):
        for said in follow(text(FULL.only(kind)), told(kind, seed).words):
            if isinstance(said, list):
                words = [word for _, group in said for word in group]
                assert len(set(words)) == len(words)
                assert set(words) <= set(VOCABULARY) - set(STYLE_WORDS)
                assert sum(weight for weight, _ in said) == pytest.approx(1, abs=EXACT)


# --- questions follow from the text -----------------------------------------------------------------------------


def sentences(words):
    """(words, index of the first) of each sentence; commas and colons end one too, in lists."""
    start = 0
    for i, word in enumerate(words):
        if word in (".", ",", ":"):
            yield words[start:i], start
            start = i + 1


def answers_by_reading(words):
    """A reader of its own: keeps the world in a few tables and says what each question's answer is.

    Shares nothing with the grammar: it matches the finished text with regular expressions.
    """
    found = {}
    people, things, coloured, notes, code, asking = {}, {}, {}, {}, None, False
    for sentence, at in sentences(words):
        line = " ".join(w for w in sentence if w != "<s>")
        if m := re.fullmatch(r"one day in the \w+|sing|remember \w+|in the \w+", line):
            people, things, coloured, notes, code, asking = {}, {}, {}, {}, None, False
        elif m := re.fullmatch(r"where is (?:the \w+ )?(\w+) \? in the (\w+)", line):
            holder = things.get(m[1]) if m[1] in things else people[m[1]]
            found[at + len(sentence) - 1] = holder
        elif m := re.fullmatch(r"who has the (\w+) (\w+) \? (\w+)", line):
            assert coloured[m[2]] == m[1]
            found[at + len(sentence) - 1] = things[m[2]]
        elif m := re.fullmatch(r"what colour is the (\w+) \? (\w+)", line):
            found[at + len(sentence) - 1] = coloured[m[1]]
        elif m := re.fullmatch(r"what is the code \? the code is (\w+) (\w+) (\w+)", line):
            found |= dict(zip(range(at + len(sentence) - 3, at + len(sentence)), code, strict=True))
        elif m := re.fullmatch(r"the code is (\w+) (\w+) (\w+)", line):
            code = m.groups()
        elif m := re.fullmatch(r"the (\w+) (\w+) is in the (\w+)", line):
            coloured[m[2]], things[m[2]] = m[1], m[3]
        elif m := re.fullmatch(r"(\w+) (?:is in|goes to) the (\w+)", line):
            people[m[1]] = m[2]
        elif m := re.fullmatch(r"(\w+) takes the (\w+) (\w+)", line):
            assert coloured[m[3]] == m[2]
            assert things[m[3]] not in people
            things[m[3]] = m[1]
        elif m := re.fullmatch(r"(\w+) puts the (\w+) (\w+) in the (\w+)", line):
            assert (coloured[m[3]], things[m[3]]) == (m[2], m[1])
            things[m[3]] = m[4]
        elif m := re.fullmatch(r"(\w+) gives the (\w+) (\w+) to (\w+)", line):
            assert (coloured[m[3]], things[m[3]]) == (m[2], m[1])
            assert m[4] in people
            assert m[4] != m[1]
            things[m[3]] = m[4]
        elif m := re.fullmatch(r"now \? (\w+) (\w+)", line):
            found[at + 3], asking = notes[m[1]], True
        elif m := re.fullmatch(r"(\w+) (\w+)", line):
            if asking:
                found[at + 1] = notes[m[1]]
            elif line != "night falls":
                assert m[1] not in notes
                notes[m[1]] = m[2]
        else:
            assert re.fullmatch(r"the (\w+) \w+ the \w+|(\w+ )*again|(\w+ ?)+", line), line
    return found


@pytest.mark.parametrize("kind", ["home", "few", "many", "secret"])
def test_every_answer_follows_from_the_text_before(kind):
    asked = 0
    for seed in range(30):
        drawn = told(kind, seed, 300)
        words = drawn.words[: len(drawn.words) - drawn.words[::-1].index(".")]  # whole sentences
        found = answers_by_reading(words)
        assert found == {i: words[i] for i, answer in enumerate(drawn.answers[: len(words)]) if answer}
        asked += len(found)
    assert asked > 100


def test_answers_are_certain_and_nothing_else_is_asked():
    """An answer costs nothing, a question mark stands before it in its sentence, and singing again is no answer."""
    for kind in ("home", "few", "many", "secret"):
        drawn = told(kind)
        for i, answer in enumerate(drawn.answers):
            if answer:
                assert drawn.nats[i] == 0
                since = drawn.words[i - 1 :: -1]
                assert since.index("?") < since.index(".")
    assert not any(told("song").answers)


@given(st.integers(3, 48), st.integers(0, 10_000))
@settings(max_examples=40)
def test_pairs_question(pairs, seed):
    question = pairs_question(FULL, pairs=pairs, seed=seed)
    ids = WORDS.encode(question.prompt)
    prompt = WORDS.pieces(ids)
    listed = prompt[prompt.index(":") + 1 : prompt.index(".")]
    assert len(listed) == 3 * pairs - 1
    table = dict(zip(listed[::3], listed[1::3], strict=True))
    assert len(table) == pairs
    assert table[prompt[-1]] == question.answer
    assert [prompt[i] for i in question.fact] == [prompt[-1], question.answer]
    if pairs <= FULL.pairs:  # a text of the very grammar that models are trained on
        assert len(list(follow(text(FULL), [*prompt, question.answer]))) == len(ids) + 2


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 10_000))
@settings(max_examples=30)
def test_passkey_question(before, after, seed):
    question = passkey_question(FULL, before=before, after=after, seed=seed)
    ids = WORDS.encode(question.prompt)
    assert len(ids) == 5 + 6 * before + 7 + 6 * after + 8
    assert WORDS.decode([ids[i] for i in question.fact]) == question.answer
    assert question.fact.start == 5 + 6 * before + 3
    assert list(follow(text(FULL), WORDS.pieces(ids + WORDS.encode(question.answer))))


def test_song_and_story_questions():
    question = song_question(FULL, words=7, seed=1)
    prompt = WORDS.pieces(WORDS.encode(question.prompt))
    assert prompt[-6:] == prompt[3:9]
    assert prompt[9] == question.answer == prompt[question.fact[-1]]
    for question in itertools.islice(story_questions(FULL, seed=5), 60):
        prompt = WORDS.pieces(WORDS.encode(question.prompt))
        assert len(prompt) < 96
        found = answers_by_reading([*prompt, question.answer, "."])
        assert found[len(prompt)] == question.answer
        assert question.answer in [prompt[i] for i in question.fact]


def test_stories_grow_as_their_size_says():
    for _, group in itertools.groupby(told("home", length=5000).words, lambda word: word == "night"):
        tale = " ".join(group)
        assert len(set(re.findall(r"(\w+) is in the", tale)) - set(FULL.things)) <= FULL.people
    drawn = batch(FULL, seed=0, step=0, rows=32, length=512)
    assert drawn.ids.shape == (32, 512)
    assert 0.04 < drawn.answers.double().mean() < 0.2, "questions too rare to learn from, or all there is"


# --- determinism, tokens, habits --------------------------------------------------------------------------------


def test_batches_follow_from_seed_and_step():
    drawn = [batch(FULL, seed=s, step=t, rows=2, length=40, stream=x) for s, t, x in
             [(1, 2, "train"), (1, 2, "train"), (2, 1, "train"), (1, 3, "train"), (1, 2, "test")]]  # fmt: skip
    assert torch.equal(drawn[0].ids, drawn[1].ids)
    assert torch.equal(drawn[0].nats, drawn[1].nats)
    for other in drawn[2:]:
        assert not torch.equal(drawn[0].ids, other.ids)
    longer = batch(FULL, seed=1, step=2, rows=1, length=60)
    assert torch.equal(longer.ids[0, :40], drawn[0].ids[0]), "a longer text begins as the shorter one"
    assert story(seed=4, tokens=50) == story(seed=4, tokens=50) != story(seed=5, tokens=50)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_ids_survive_text(ids):
    assert WORDS.encode(WORDS.decode(ids)) == ids


def test_text_reads_as_english():
    ids = WORDS.encode("Where is the RED ball ?   in the attic.")
    assert WORDS.decode(ids) == "where is the red ball? in the attic."
    assert WORDS.pieces(ids)[:3] == ["where", "is", "the"]
    assert WORDS.prompt("anna")[0] == WORDS.bos == WORDS.prompt("<s> anna")[0]
    assert len(WORDS.prompt("<s> anna")) == len(WORDS.prompt("anna")) == 2
    assert len(set(VOCABULARY)) == len(VOCABULARY) == WORDS.size == 256
    assert len(WORDS.encode(story(seed=0, tokens=77))) == 77


def test_habits_have_exact_floors_too():
    for style in STYLES:
        drawn = write(styled(home(FULL), style), random.Random(1), 80)
        assert surprisal(styled(home(FULL), style), drawn.words) == pytest.approx(np.array(drawn.nats), abs=EXACT)
        plain = [w for w in drawn.words if w not in STYLES[style].split()]
        assert plain == write(home(FULL), random.Random(1), len(plain)).words
        assert drawn.words.count(STYLES[style].split()[0]) >= drawn.words[:-3].count(".") > 2
    table = likings(FULL, seed=2)
    assert table == likings(FULL, seed=2) != likings(FULL, seed=3)
    drawn = write(facts(table), random.Random(0), 81).words[1:]
    assert len(drawn) == 80
    for name, _, colour, _ in zip(*[iter(drawn)] * 4, strict=True):
        assert table[name] == colour


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (lambda: WORDS.encode("anna eats a zeppelin"), "eats"),
        (lambda: WORDS.encode("anna 🙂"), "🙂"),
        (lambda: WORDS.decode([256]), "256"),
        (lambda: WORDS.decode([-1]), "-1"),
        (lambda: batch(FULL, seed=0, step=0, rows=0, length=8), "0 rows"),
        (lambda: batch(FULL, seed=0, step=0, rows=1, length=1), "rows of 1"),
        (lambda: Grammar(people=1), "people"),
        (lambda: Grammar(goods=13), "goods"),
        (lambda: Grammar(pairs=49), "pairs"),
        (lambda: Grammar(song_length=0), "song_length"),
        (lambda: Grammar(home=-1.0), "weights"),
        (lambda: FULL.only("opera"), "opera"),
        (lambda: replace(FULL, home=0.0, few=0.0, many=0.0, song=0.0, secret=0.0), "weights"),
        (lambda: pairs_question(FULL, pairs=2, seed=0), "pairs"),
        (lambda: pairs_question(FULL, pairs=49, seed=0), "pairs"),
        (lambda: passkey_question(FULL, before=-1, after=0, seed=0), "before"),
        (lambda: song_question(FULL, words=1, seed=0), "words"),
        (lambda: next(story_questions(FULL, seed=0, tokens=8)), "tokens"),
        (lambda: story(seed=0, tokens=0), "tokens"),
        (lambda: write(text(FULL), random.Random(0), 0), "length"),
        (lambda: offer((1.0, [])), "word"),
        (lambda: next(styled(home(FULL), "opera")), "opera"),
        (lambda: next(facts({})), "table"),
        (lambda: surprisal(text(FULL), ["<s>", "one", "night"]), "night"),
    ],
)
def test_bad_input_is_named(wrong, names):
    with pytest.raises(ValueError, match=re.escape(names)):
        wrong()


def test_a_text_past_its_end_is_refused():
    def short():
        yield Answer("the")
        yield any_of(["red", "blue"])

    assert len(list(follow(short(), ["the", "red"]))) == 2
    with pytest.raises(ValueError, match="after its end"):
        list(follow(short(), ["the", "red", "ball"]))
    with pytest.raises(ValueError, match="never says 'ball'"):
        list(follow(short(), ["the", "ball"]))
