"""Who calls whom, against counting by hand; how uneven, against what even and collapsed loads must give."""

import math
from collections import Counter

import pytest
import torch

from engine.moe.router import TopK
from engine.moe.usage import busiest, by_topic, calls, counted, evenness, favourites, told_by, topic_text
from engine.recording import record
from engine.toyland import Tokenizer
from engine.toyland.words import TOPICS
from tests.engine.moe.common import SHAPE, decoder, ids


def test_calls_are_those_of_the_router_and_leave_an_outer_recording_alone():
    model = decoder()
    with record() as recorder:
        found = calls(model, ids())
    assert not recorder.freeze().tracks
    with record() as recorder:
        model(ids())
    shown = recorder.freeze()
    assert sorted(found) == list(range(SHAPE.layers))
    for i, called in found.items():
        assert called.shape == (40, 6)
        assert (called.numpy() == shown.stack("moe.chosen", layer=i)).all()


def test_words_are_counted_as_by_hand():
    model, text = decoder(), ids()
    called = calls(model, text)[1]
    counts = counted(called, text, classes=256)
    by_hand = Counter(
        (e, word) for word, row in zip(text.flatten().tolist(), called.tolist(), strict=True)
        for e, yes in enumerate(row) if yes
    )  # fmt: skip
    assert {(e, v): int(counts[e, v]) for e, v in counts.nonzero().tolist()} == by_hand
    assert int(counts.sum()) == 2 * 40


def test_favourites_come_by_share_then_by_count():
    counts = torch.tensor([[8, 9, 2, 1], [0, 9, 0, 9]])
    first, second = favourites(counts, ["a", "b", "c", "d"], top=2, least=2)
    assert [(f.word, f.count, f.share) for f in first] == [("a", 8, 1.0), ("c", 2, 1.0)]
    assert [(f.word, f.count) for f in second] == [("d", 9), ("b", 9)]
    assert second[0].share == pytest.approx(0.9)
    assert favourites(counts, ["a", "b", "c", "d"], least=100) == [[], []]


def test_what_the_word_tells_is_mutual_information():
    assert told_by(torch.tensor([[5, 0, 3], [0, 8, 0]])) == pytest.approx(1)  # the word decides
    assert told_by(torch.tensor([[2, 4, 6], [1, 2, 3]])) == pytest.approx(0, abs=1e-12)  # nobody cares
    assert told_by(torch.tensor([[2, 4], [0, 0]])) == 0.0  # nothing to choose
    p = torch.tensor([[3.0, 1.0], [1.0, 3.0]]) / 8
    want = (2 * 3 / 8 * math.log(1.5) + 2 * 1 / 8 * math.log(0.5)) / math.log(2)
    assert told_by(p * 8) == pytest.approx(want)


def test_collapse_is_measured():
    load = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]])
    assert evenness(load).tolist() == pytest.approx([1, 0, 0.5])
    assert busiest(load).tolist() == pytest.approx([0.25, 1, 0.5])


def test_texts_on_a_topic_hold_its_words_and_no_others():
    of = {topic: {w for words in scene for w in words.split()} for topic, scene in TOPICS.items()}
    words = Tokenizer()
    for topic in TOPICS:
        told = set(words.pieces(topic_text(topic, tokens=200)[0].tolist()))
        assert told & of[topic]
        assert not told & set().union(*(of[other] for other in TOPICS if other != topic))
    mixed = set(words.pieces(topic_text(None, tokens=600)[0].tolist()))
    assert sum(bool(mixed & of[topic]) for topic in TOPICS) >= 3
    assert torch.equal(topic_text("school", tokens=50, seed=3), topic_text("school", tokens=50, seed=3))


def test_topics_are_counted_by_expert():
    model = decoder(route=TopK(2))
    found = by_topic(model, tokens=30)
    assert all((counts.sum(0) == 60).all() for counts in found.values())
    harbour = calls(model, topic_text("harbour", tokens=30))[0].sum(0)
    assert torch.equal(found[0][:, list(TOPICS).index("harbour")], harbour)


def test_bad_input_is_named():
    called = torch.ones(4, 2, dtype=torch.bool)
    dense = decoder()
    for block in dense.blocks:
        block.ffn = torch.nn.Identity()
    for call, words in [
        (lambda: calls(dense, ids()), "model must have a layer of experts"),
        (lambda: counted(called, torch.zeros(3), classes=2), "labels must name a class for each of the 4 tokens"),
        (lambda: counted(called, torch.tensor([0, 1, 2, 0]), classes=2), r"between 0 and 1, not 0\.\.2"),
        (lambda: favourites(torch.ones(2, 3), ["a"]), "words must be 3"),
        (lambda: favourites(torch.ones(2, 1), ["a"], top=0), "top and least must be above 0, not 0 and 5"),
        (lambda: evenness(torch.zeros(3)), "load must hold a call"),
        (lambda: busiest(torch.tensor([[1, 2], [0, 0]])), "load must hold a call"),
        (lambda: told_by(torch.zeros(2, 2)), "load must hold a call"),
        (lambda: topic_text("moon", tokens=9), "topic must be one of kitchen.* not 'moon'"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
