"""Asking in the middle of a text: what a copy finds is what reading the whole anew finds, and nothing is changed."""

import pytest
import torch

from engine import checkpoints, zoo
from engine.caches.full import Full
from engine.evaluate import ask
from engine.probing import asked_now, asked_together
from engine.toyland import Grammar, Tokenizer
from engine.toyland.questions import pairs_question, passkey_question

NAMES = ("toy", "mamba", "rwkv", "hybrid", "titans", "linear")


@pytest.mark.parametrize("name", NAMES)
def test_asked_now_is_reading_it_all_and_changes_nothing(name):
    model = zoo.build(name)
    random = torch.Generator().manual_seed(1)
    told, ask_ids = (torch.randint(0, 256, size, generator=random) for size in ((1, 9), (3, 4)))
    after = torch.randint(0, 256, (1, 2), generator=random)
    cache, untouched = Full(), Full()
    model.hidden(told, cache=cache)
    model.hidden(told, cache=untouched)
    found = asked_now(model, cache, ask_ids)
    for row, question in zip(found, ask_ids, strict=True):
        wanted = model(torch.cat((told, question[None]), 1))[0, -1].softmax(-1)
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(after, cache=cache), model(after, cache=untouched), rtol=0, atol=0)


def test_asked_together_is_asking_one_by_one():
    pairs = [pairs_question(Grammar(), pairs=20, seed=n) for n in range(16)]
    codes = [passkey_question(Grammar(), before=1, after=6, seed=n) for n in range(6)]
    for name, questions in (("window", pairs), ("window", codes), ("toy", codes)):
        model, tokenizer = checkpoints.load(name)
        wanted = [ask(model, tokenizer, q).right for q in questions]
        assert asked_together(model, tokenizer, questions) == wanted
        assert (
            sum(wanted)
            in {("window", 16): range(1, 16), ("window", 6): range(6), ("toy", 6): range(1, 7)}[name, len(questions)]
        )


def test_bad_questions_get_a_sentence():
    model, tokenizer = zoo.build("toy"), Tokenizer()
    with pytest.raises(ValueError, match="one length"):
        asked_together(model, tokenizer, [pairs_question(Grammar(), pairs=n, seed=1) for n in (3, 4)])
    with pytest.raises(ValueError, match="one of each"):
        asked_now(model, Full(), torch.zeros(0, 3, dtype=torch.long))
    cache = Full()
    model.hidden(torch.zeros(2, 3, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="one text"):
        cache.copies(3)
