"""Distillation: the loss that the page tells is the engine's, the story has a question, T turns without a new run."""

import json

import numpy as np
import pytest
import torch

from app.picture import Feed
from app.runs import execute
from engine.distil import logits
from engine.toyland.words import VOCABULARY
from lessons import distil, pupils
from lessons.knobs import check
from tests.lessons.pages import INSIDE, QUICK, address, open_done
from tests.support import Server, Watched


def knobs_of(**values):
    knobs, problems = check(distil.Turn, {**QUICK["distil"], **values})
    assert problems == []
    return knobs


@pytest.fixture(scope="module")
def recording():
    return execute("distil", distil.LESSON.run_values(knobs_of()))


@pytest.mark.parametrize("name", ["soft", "layers"])
def test_a_cell_tells_the_loss_of_the_engine(recording, name):
    token, meta = 4, recording.meta
    student, teacher = (
        torch.tensor(recording.track(pupils.SAYS, reader=reader).latest()[token : token + 1]).double()
        for reader in (name, "teacher")
    )
    came = torch.tensor([meta["story"][token + 1]])
    terms = logits.loss(student, teacher, came, temperature=meta["temperature"], alpha=meta["alpha"])
    shown = pupils.loss_cell(recording, knobs_of(), {"reader": pupils.READERS.index(name), "token": token})
    assert shown.values["total"] == pytest.approx(float(terms.total), rel=1e-9)
    assert shown.values["ce"] == pytest.approx(float(terms.hard), rel=1e-9)
    heard = recording.track(pupils.HEARD).latest()[pupils.READERS.index(name), token]
    assert heard == pytest.approx(shown.values["ce"], rel=1e-4)


def test_before_training_a_students_cell_says_so(recording):
    with pytest.raises(ValueError, match="training begins later"):
        pupils.loss_cell(recording, knobs_of(), {"reader": 3, "token": 4, "step": 0})


def test_the_story_asks_and_its_odds_are_those_of_the_grammar():
    school, _ = pupils.open_school(knobs_of())
    row, asked = school.story()
    ids = school.unseen.ids[row]
    assert VOCABULARY[int(ids[asked - 1])] == "?"
    assert school.unseen.answers[row, asked:].any()
    odds = school.odds(ids[:-1])
    assert odds.sum(1) == pytest.approx(np.ones(len(ids) - 1))
    nats = -np.log(odds[np.arange(len(ids) - 1), ids[1:].numpy()])
    assert nats == pytest.approx(school.unseen.nats[row, 1:].numpy(), abs=1e-9)
    first = school.texts(0, 0).ids
    assert torch.equal(first, school.texts(0, 32 // pupils.ROWS).ids)  # 32 texts, again and again
    assert not torch.equal(first, school.texts(0, 1).ids)
    again = school.teach(first[:, :-1])
    assert school.teach(first[:, :-1]) is again
    assert torch.equal(school.read(first[:, :-1]).logits, again.logits)


def test_looking_at_another_temperature_asks_for_no_new_run(recording):
    odds = {}
    for look in (1, 4):
        knobs = knobs_of(place=2, look=look)
        assert distil.LESSON.run_values(knobs) == distil.LESSON.run_values(knobs_of())
        sent = []
        Feed(sent.append).show("run", recording, distil.LESSON.scene("doubts"), knobs)
        key = f"{pupils.SOFT}[place=2,reader=teacher,temperature={look}]"
        odds[look] = np.array(next(m["data"] for m in sent if m["type"] == "rows" and m["track"] == key)).ravel()
    assert odds[1].max() > 0.9
    assert odds[4].max() < 0.5
    assert json.dumps(recording.meta["places"])


@pytest.mark.browser
def test_turning_t_moves_the_bars_at_once(server: Server, chromium_page: Watched) -> None:
    page = chromium_page
    open_done(page, address(server, "distil", beat=1, step=1, place=2))
    figure = f"{INSIDE}.querySelectorAll('.facing-figure')"
    read = f"[...{figure}].map((one) => one.textContent).join()"
    page.until(f"{figure}.length > 8")
    before, steps = page.page.evaluate(read), page.page.evaluate("leanscope.steps")
    page.page.get_by_label("Look at T", exact=True).select_option(label="4")
    page.until(f"{read} !== {json.dumps(before)}")
    assert page.page.evaluate("leanscope.steps") == steps
