"""Oracles: cross-entropy written out over full passes, and greedy decoding. Law: how a text is cut into chunks, and
which exact way it is read, changes nothing; what a cache has evicted it cannot recall."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from engine import evaluate
from engine.caches.full import Full
from engine.caches.recompute import Recompute
from engine.caches.sinks import Sinks
from engine.caches.window import Window
from engine.evaluate import Question
from engine.generate import generate
from engine.model import Decoder, Shape
from engine.recording import record

SHAPE = Shape(vocab=50, width=32, layers=2, heads=4, kv_heads=2, head_width=8, ffn_width=48, max_positions=256)


@pytest.fixture(scope="module")
def model():
    model = Decoder(SHAPE, seed=3).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter *= 8  # far from uniform guesses
    return model


class Letters:
    """A token a character."""

    def encode(self, text):
        return [ord(letter) - ord(" ") for letter in text]

    prompt = encode

    def decode(self, ids):
        return "".join(chr(token + ord(" ")) for token in ids)


FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def text(count: int, *, batch: int = 1, seed: int = 0):
    return torch.randint(0, 50, (batch, count), generator=torch.Generator().manual_seed(seed))


READERS = {
    "one pass": lambda: None,
    "full": Full,
    "window": lambda: Window(7),
    "sinks": lambda: Sinks(2, 5),
    "recompute": lambda: Recompute(7),
    "recompute all": lambda: Recompute(),
}


def by_hand(model, row, reader):
    """The surprisal of each token but the first, by a pass for every prefix (or its last 7 tokens)."""
    nats = []
    cache = reader()
    for t in range(len(row) - 1):
        if isinstance(cache, Full | Window):
            logits = model(row[None, t : t + 1], cache=cache)[0, -1]
        elif cache is None or cache.size is None:
            logits = model(row[None, : t + 1])[0, -1]
        else:
            logits = model(row[None, max(0, t - 6) : t + 1])[0, -1]
        nats.append(F.cross_entropy(logits, row[t + 1]))
    return torch.stack(nats)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("chunk", [1, 6, 256])
def test_surprisal_is_the_cross_entropy_of_each_token(model, reader, chunk):
    ids = text(31, batch=2)
    found = evaluate.surprisal(model, ids, cache=reader(), chunk=chunk)
    expected = torch.stack([by_hand(model, row, reader) for row in ids])
    assert found.shape == (2, 30)
    assert (found - expected).abs().max() < 1e-10
    alone = evaluate.surprisal(model, ids[0], cache=reader(), chunk=chunk)
    assert (alone - expected[0]).abs().max() < 1e-10


@given(count=st.integers(1, 24), chunk=st.integers(1, 30), name=st.sampled_from(sorted(READERS)))
def test_chunks_cover_every_token_once(count, chunk, name):
    model = Decoder(SHAPE)
    parts = list(evaluate.surprisals(model, text(count), cache=READERS[name](), chunk=chunk))
    nats = torch.cat(parts, 1)
    assert nats.shape == (1, count)
    assert nats[0].isnan().tolist() == [True] + [False] * (count - 1)


def test_half_precision_is_scored_in_float32(model):
    assert evaluate.surprisal(Decoder(SHAPE).to(torch.bfloat16), text(9)[0]).dtype == torch.float32


def test_reading_leaves_the_callers_mode_alone(model):
    for _ in evaluate.surprisals(model, text(20), chunk=4):
        assert not torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()


def test_a_recording_holds_the_surprisal_of_each_token_read(model):
    ids = text(20)
    with record(keep={"surprisal": {}}) as recorder:
        found = evaluate.surprisal(model, ids, cache=Full(), chunk=6)
    kept = recorder.freeze().stack("surprisal")
    assert kept.shape == (1, 20)
    assert torch.equal(torch.from_numpy(kept[:, 1:].copy()), found)


def test_perplexity_counts_equally_likely_choices():
    assert evaluate.perplexity(torch.full((9,), math.log(7))) == pytest.approx(7)
    nats = torch.rand(40, generator=torch.Generator().manual_seed(0)) * 5
    running = evaluate.running_perplexity(nats)
    for t in (0, 1, 17, 39):
        assert running[t].item() == pytest.approx(evaluate.perplexity(nats[: t + 1]), rel=1e-12)
    assert evaluate.running_perplexity(nats.view(2, 20))[1, -1].item() == pytest.approx(evaluate.perplexity(nats[20:]))


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_an_answer_is_right_when_greedy_decoding_says_it(model, reader, chunk):
    letters = Letters()
    prompt = letters.decode(text(23, seed=5)[0].tolist())
    said = letters.decode(list(generate(model, letters.encode(prompt), steps=4, cache=reader())))
    answer = evaluate.ask(model, letters, Question(prompt, said), cache=reader(), chunk=chunk)
    assert (answer.text, answer.right) == (said, True)
    wrong = said[:3] + chr((ord(said[3]) - 31) % 50 + 32)
    answer = evaluate.ask(model, letters, Question(prompt, wrong), cache=reader(), chunk=chunk)
    assert (answer.text, answer.right) == (said, False)
    everything = torch.tensor(letters.encode(prompt + wrong))
    nats = evaluate.surprisal(model, everything, cache=reader())[-4:].sum()
    assert answer.nats == pytest.approx(nats.item(), rel=1e-4)


def test_a_prompt_starts_as_the_model_expects_it(model):
    class Starting(Letters):
        def prompt(self, text):
            return [7, *self.encode(text)]

    prompt = Letters().decode(text(9)[0].tolist())
    said = Letters().decode(list(generate(model, [7, *Letters().encode(prompt)], steps=3)))
    assert evaluate.ask(model, Starting(), Question(prompt, said)).right
    plain, started = (evaluate.passkey(t, tokens=500, depth=0.4, seed=1).fact for t in (Letters(), Starting()))
    assert (started.start, started.stop) == (plain.start + 1, plain.stop + 1)


def test_recall_is_the_share_of_right_answers_each_with_its_own_cache(model):
    letters, made = Letters(), []
    prompt = letters.decode(text(12)[0].tolist())
    said = letters.decode(list(generate(model, letters.encode(prompt), steps=1)))
    other = chr((ord(said) - 31) % 50 + 32)
    questions = [Question(prompt, said)] * 3 + [Question(prompt, other)]
    assert evaluate.recall(model, letters, questions, cache=lambda: made.append(Full()) or made[-1]) == 0.75
    assert len(made) == 4
    assert evaluate.recall(model, letters, iter(questions[2:])) == 0.5


@given(tokens=st.integers(280, 3000), depth=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_passkey_lies_where_it_is_said_to(tokens, depth, seed):
    letters = Letters()
    question = evaluate.passkey(letters, tokens=tokens, depth=depth, seed=seed)
    ids = letters.encode(question.prompt)
    assert tokens - len(FILLER) < len(ids) <= tokens
    assert question.fact is not None
    told = letters.decode(ids[question.fact.start : question.fact.stop])
    assert told == f" The pass key is {question.answer}. Remember it. {question.answer} is the pass key."
    assert question.prompt.count(question.answer) == 2
    above, below = question.prompt.split(told)
    repeats = (above + below).count(FILLER)
    assert abs(above.count(FILLER) - depth * repeats) <= 0.5  # as deep as whole sentences allow
    assert evaluate.passkey(letters, tokens=tokens, depth=depth, seed=seed) == question


def test_wrong_questions_are_refused(model):
    letters = Letters()
    for call, said in (
        (lambda: evaluate.surprisal(model, torch.zeros(0, dtype=torch.long)), "with a token at least"),
        (lambda: evaluate.surprisal(model, text(3)[0], chunk=0), "chunk must be"),
        (lambda: evaluate.perplexity(torch.zeros(0)), "one token at least"),
        (lambda: evaluate.recall(model, letters, []), "one question at least"),
        (lambda: evaluate.ask(model, letters, Question("", "a")), "needs a prompt"),
        (lambda: evaluate.ask(model, letters, Question("a", "")), "needs a prompt"),
        (lambda: evaluate.passkey(letters, tokens=50, depth=0.5, seed=0), "tokens must be at least"),
        (lambda: evaluate.passkey(letters, tokens=500, depth=1.1, seed=0), "depth must be between"),
        (lambda: evaluate.passkey(letters, tokens=500, depth=0.5, seed=0, digits=0), "digits must be"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.real
def test_smollm2_finds_a_passkey_and_a_window_that_lost_it_does_not(smollm2):
    model, tokenizer = smollm2
    question = evaluate.passkey(tokenizer, tokens=200, depth=0.0, seed=1)
    whole = Full()
    assert evaluate.ask(model, tokenizer, question, cache=whole).right
    assert set(question.fact or ()) <= set(whole.kept(0).tolist())
    for cache in (Window(64), Sinks(4, 60)):
        answer = evaluate.ask(model, tokenizer, question, cache=cache)
        assert not set(question.fact or ()) & set(cache.kept(0).tolist())  # evicted, so it can only guess
        assert not answer.right
        assert answer.nats > 5
    assert evaluate.ask(model, tokenizer, question, cache=Window(256)).right  # a window that is wide enough


@pytest.mark.real
def test_smollm2_loses_the_text_with_its_first_token_and_finds_it_with_a_sink(smollm2):
    model, tokenizer = smollm2
    words = "A cache keeps what was read, so that a model need not read it again. When it is full, something must go. "
    ids = torch.tensor(tokenizer.encode(words + "The oldest token is a poor choice, for it is where attention rests. "))
    ids = ids.repeat(4)[:120]
    past = {
        name: evaluate.perplexity(evaluate.surprisal(model, ids, cache=cache)[40:])
        for name, cache in {"dense": None, "window": Window(32), "sink": Sinks(1, 31)}.items()
    }
    assert past["dense"] < past["sink"] < past["window"] / 1.5
