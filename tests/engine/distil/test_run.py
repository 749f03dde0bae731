"""Four students at equal steps: same starts, same texts, each learns; and the work they save is counted."""

import pytest
import torch

from engine import cost
from engine.distil import run
from engine.distil.run import Plan, distil, over, saving, small
from engine.model import Decoder, Shape
from engine.recording import record

TEACHER = Shape(vocab=256, width=32, layers=4, heads=4, kv_heads=2, head_width=8, ffn_width=48, max_positions=64)
STUDENT = small(TEACHER)
PLAN = Plan(steps=6, rows=2, length=8, seeds=(0, 1), look=3, corpus=4, unseen_rows=2)


class StoppedError(Exception):
    pass


def teacher():
    return Decoder(TEACHER, seed=9).requires_grad_(False)


def test_students_start_alike_and_every_way_learns():
    with record() as recorder:
        students = distil(teacher(), STUDENT, PLAN)
    shown = recorder.freeze()
    assert shown.steps == 6
    assert set(students) == {(way, seed) for way in run.WAYS for seed in (0, 1)}
    for seed in (0, 1):
        fresh = run.Student("hard", teacher(), STUDENT, PLAN, seed=seed).model
        for way in run.WAYS:
            losses = shown.stack("distil.loss", way=way, seed=seed)
            assert losses.shape == (6,)
            unseen = shown.track("distil.unseen", way=way, seed=seed)
            assert unseen.at.tolist() == [0, 3, 5]
            assert not torch.equal(students[way, seed].model.embed.weight, fresh.embed.weight)
        terms = {t.index["term"]: t for t in shown.tracks if t.name == "distil.term" and t.index["way"] == "layers"}
        assert set(terms) == {"soft", "hard", "hidden", "attention"}
    first = [shown.stack("distil.term", term="hard", way=way, seed=0)[0] for way in ("hard", "soft", "layers")]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    assert first[0] == pytest.approx(first[2], rel=1e-6)
    assert shown.stack("distil.alignment", way="soft").shape == (3, 3, 5)


def test_recording_changes_nothing_and_may_stop_it():
    plain = distil(teacher(), STUDENT, PLAN, ways=("layers", "synthetic"))
    with record():
        watched = distil(teacher(), STUDENT, PLAN, ways=("layers", "synthetic"))
    for key, student in plain.items():
        pairs = zip(student.model.parameters(), watched[key].model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def stop(recorder):
        if recorder.step == 2:
            raise StoppedError

    with record(on_step=stop) as recorder, pytest.raises(StoppedError):
        distil(teacher(), STUDENT, PLAN, ways=("hard",))
    assert recorder.step == 2


def test_alpha_and_temperature_are_mapped():
    plan = Plan(steps=2, rows=2, length=8, seeds=(0,), look=5, unseen_rows=2)
    with record(keep={"distil.map": {}}) as recorder:
        rows = over(teacher(), STUDENT, plan, alphas=(0.0, 0.9), temperatures=(1.0, 4.0))
    assert rows.shape == (2, 2)
    assert rows[0, 0] == rows[0, 1]  # without the soft term no temperature matters
    assert rows[1, 0] != rows[1, 1]
    assert recorder.freeze().track("distil.map").latest().shape == (2, 2)


def test_the_saving_is_counted_from_the_shapes():
    assert STUDENT.layers == 2
    assert (STUDENT.width, STUDENT.head_width, STUDENT.ffn_width, STUDENT.vocab) == (16, 4, 24, 256)
    times = saving(TEACHER, STUDENT, context=8)
    assert times["parameters"] == cost.parameter_count(TEACHER) / cost.parameter_count(STUDENT)
    assert times["flops"] == cost.decode_flops(TEACHER, context=8) / cost.decode_flops(STUDENT, context=8)
    assert set(saving(TEACHER, TEACHER, context=8).values()) == {1.0}


def test_bad_input_is_named():
    for call, said in [
        (lambda: Plan(steps=0), "steps must be a number above 0"),
        (lambda: Plan(seeds=(1, 1)), "seeds must hold different numbers"),
        (lambda: small(TEACHER, narrower=3), "narrower must divide"),
        (lambda: distil(teacher(), STUDENT, PLAN, ways=("luck",)), "way must be one of"),
        (lambda: distil(teacher(), Shape(**{**STUDENT.__dict__, "vocab": 9}), PLAN), "shape must have the teacher's"),
        (lambda: over(teacher(), STUDENT, PLAN, alphas=(), temperatures=(1.0,)), "alphas and temperatures must hold"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
