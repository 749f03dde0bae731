"""Synthetic text: drawn from the teacher's own probabilities and nothing else, again by its seed."""

import pytest
import torch

from engine.distil import restricted, synthetic
from engine.generate import generate
from engine.recording import record
from tests.engine.quant.test_integer import tokens, toy

START = torch.tensor([3, 4])


def sharp():
    """A teacher that has opinions."""
    model = toy(tied=False)
    with torch.no_grad():
        model.head.weight *= 15
    return model.requires_grad_(False)


def test_each_token_is_a_draw_from_what_the_teacher_says_there():
    teacher = sharp()
    corpus = synthetic.write(teacher, START, rows=4000, length=4, seed=1, keep_logits=True)
    assert torch.equal(corpus.ids[:, :2], START.expand(4000, 2))
    logp = teacher(corpus.ids[:50, :-1])[:, 1:].log_softmax(-1)
    mine = logp.gather(-1, corpus.ids[:50, 2:, None])[..., 0]
    assert float((mine - corpus.logp[:50]).abs().max()) < 1e-5
    assert float((corpus.logits[:50].log_softmax(-1) - logp).abs().max()) < 1e-5
    p = teacher(START[None])[0, -1].softmax(-1)
    seen = torch.bincount(corpus.ids[:, 2], minlength=31) / 4000
    spread = (p * (1 - p) / 4000).sqrt()
    assert bool(((seen - p).abs() <= 5 * spread + 1e-12).all())  # 31 words: 5 sigma
    assert float((seen - 1 / 31).abs().max()) > 0.02  # and it is not just any distribution
    later = corpus.ids[corpus.ids[:, 2] == int(p.argmax())]
    after = teacher(later[:1, :3])[0, -1].softmax(-1)
    seen = torch.bincount(later[:, 3], minlength=31) / len(later)
    assert bool(((seen - after).abs() <= 5 * (after * (1 - after) / len(later)).sqrt() + 1e-12).all())


def test_the_seed_and_the_teacher_decide_all():
    teacher = sharp()
    first = synthetic.write(teacher, START, rows=5, length=9, seed=3)
    with record() as recorder:
        again = synthetic.write(teacher, START, rows=5, length=9, seed=3)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(torch.tensor(recorder.freeze().track("distil.corpus").latest()), first.ids)
    assert not torch.equal(first.ids, synthetic.write(teacher, START, rows=5, length=9, seed=4).ids)
    assert first.entropy == pytest.approx(-float(first.logp.mean()))
    greedy = synthetic.write(teacher, START, rows=1, length=9, temperature=0.0)
    assert greedy.ids[0, 2:].tolist() == list(generate(teacher, START, steps=7))


def test_allowed_words_alone_are_said_and_renormalised():
    teacher, allowed = sharp(), torch.tensor([3, 4, 8, 20])
    held = restricted.lesson(teacher, allowed, START, rows=6, length=8)
    assert held.ids.max() < 4
    whole = allowed[held.ids]
    logits = teacher(whole[:, :-1])[:, 1:][..., allowed]
    assert float((logits - held.logits).abs().max()) < 1e-4
    student = toy(vocab=4)
    terms = held.terms(student, slice(0, 3), temperature=2.0, alpha=0.5)
    assert terms.total.requires_grad
    chosen = restricted.choose(teacher, tokens()[0], size=25)
    assert set(tokens()[0].tolist()) <= set(chosen.tolist())
    assert len(chosen.unique()) == 25
    assert chosen.tolist() == sorted(chosen.tolist())


def test_bad_input_is_named():
    teacher = toy()
    for call, said in [
        (lambda: synthetic.write(teacher, START, rows=0, length=4), "rows and length must be numbers above 0"),
        (lambda: synthetic.write(teacher, START, rows=1, length=2), "rows and length must be numbers above 0"),
        (lambda: synthetic.write(teacher, START[:0], rows=1, length=2), "rows and length must be numbers above 0"),
        (lambda: synthetic.write(teacher, START + 40, rows=1, length=4), "start must hold ids from 0 to 30"),
        (lambda: synthetic.write(teacher, START, rows=1, length=4, temperature=-1.0), "temperature must be 0 or"),
        (lambda: synthetic.write(teacher, START, rows=1, length=4, allowed=START[:0]), "allowed must hold a token"),
        (lambda: restricted.lesson(teacher, torch.tensor([3, 5]), START, rows=1, length=4), "start must be of allowed"),
        (lambda: restricted.choose(teacher, tokens()[0], size=1), "size must be from"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
