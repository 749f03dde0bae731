"""Every lesson, by the same rules: it runs at its defaults and at its knobs' ends, draws, measures its claims."""

import ast
import functools
import inspect
import json
import re
import string
from pathlib import Path

import numpy as np
import param
import pytest

import lessons
from app.answers import cell, sources
from app.picture import Feed, find, plain
from app.runs import execute, findings, is_available
from engine.weights import ModelUnavailable
from lessons import all_lessons
from lessons.knobs import check
from lessons.lesson import PARTS
from lessons.models import REAL, TOY
from tests.app.still import check as plays_as_files
from tests.lessons.pages import QUICK, REFUSED, TRAINS

SLUGS = list(all_lessons())
VERDICTS = {"agrees", "differs", "untestable"}
LINES = 450  # of a lesson's file, formatted


def ends(lesson, *, low):
    """All bounded knobs at one end; texts and choices at their defaults."""
    knobs = lesson.knobs.param.objects("existing")
    refused = REFUSED.get(lesson.slug, set()) if low else set()
    return {n: p.bounds[0 if low else 1] for n, p in knobs.items() if isinstance(p, param.Number) and n not in refused}


def cases():
    """Each lesson at its defaults on the model it starts with; ends on the toy, and every choice at a quick size.

    What comes to the same knobs is one case.
    """
    for slug, lesson in all_lessons().items():
        models = "model" in lesson.knobs.names()
        real = models and lesson.knobs.param["model"].default == REAL
        toy = {"model": TOY} if models else {}
        found = {
            f"{slug}-defaults": {},
            f"{slug}-toy": toy,
            f"{slug}-low": toy | ends(lesson, low=True),
            f"{slug}-high": toy | ends(lesson, low=False) | ({"steps": QUICK[slug]["steps"]} if slug in TRAINS else {}),
        }
        quick = toy | QUICK.get(slug, {})
        for name, p in lesson.knobs.param.objects("existing").items():
            if isinstance(p, param.Boolean):
                found[f"{slug}-{name}-switched"] = quick | {name: not p.default}
            elif isinstance(p, param.Selector) and name != "model":
                found |= {f"{slug}-{name}-{o}": quick | {name: o} for o in p.objects if o not in (p.default, "own")}
        seen = []
        for name, values in found.items():
            meant = check(lesson.knobs, values)[0].values()
            if meant not in seen:
                seen.append(meant)
                marks = [pytest.mark.real] * (real and not values)
                yield pytest.param(slug, values, marks=[*marks, pytest.mark.xdist_group(slug)], id=name)


def ran(slug, values):
    """The recording of a lesson; knobs that only look at a run share it, as they do on the page."""
    lesson = all_lessons()[slug]
    knobs, problems = check(lesson.knobs, values)
    assert problems == []
    if isinstance(model := getattr(knobs, "model", None), str):
        there, why = is_available(model)
        if not there:
            pytest.skip(why)
    return recorded(slug, json.dumps(lesson.run_values(knobs), sort_keys=True))


@functools.lru_cache(maxsize=4)
def recorded(slug, values):
    try:
        return execute(slug, json.loads(values))
    except ModelUnavailable as error:  # a toy that is still to be trained
        pytest.skip(str(error))


@pytest.mark.parametrize(("slug", "values"), list(cases()))
def test_a_lesson_runs_draws_opens_cells_and_measures_its_claims(slug, values):
    lesson = lessons.lesson(slug)
    knobs, problems = check(lesson.knobs, values)
    assert problems == []
    recording = ran(slug, values)
    assert recording.steps > 0
    assert recording.cut == {}
    assert recording.nbytes <= lesson.budget

    for scene in lesson.scenes:
        messages = []
        Feed(messages.append).show("run", recording, scene, knobs)
        shown = {m["track"] for m in messages if m["type"] == "rows"}
        for view in scene.views:
            for tensor in view.tensors():
                assert find(recording, tensor, knobs), f"{view.name} shows {tensor}, which was not recorded"
            assert view.title, f"{view} has no title"
        for message in messages:
            if message["type"] == "rows":
                assert np.isfinite(np.asarray(message["data"], np.float64)).any() or len(message["data"]) <= 1
                assert (np.diff(message["at"]) >= 0).all()
                assert message["at"][-1] < recording.steps
        assert shown
        for view in scene.views:
            if getattr(view, "cell", None):
                (message,) = cell(recording, view, knobs, {}, request=1, index=0)
                assert "error" in message, "a cell without a place must get a sentence"

    found = findings(lesson, recording)
    assert len(found.claims) == len(lesson.claims) > 0
    for claim in found.claims:
        assert claim["verdict"] in VERDICTS
        assert claim["measured"]
        assert "could not be computed" not in claim["why"], claim
        if claim["verdict"] != "agrees":
            assert claim["why"], f"{claim}: {claim['verdict']}, but not why"
    for mark in found.marks:
        assert 0 <= mark["step"] < recording.steps
        assert mark["label"]

    if values == ({"model": TOY} if "model" in lesson.knobs.names() else {}):
        plays_as_files(lesson, knobs, recording)

    for beat in lesson.beats:
        for fact in facts_in(beat):
            assert fact in found.facts or fact in lesson.knobs.names() or fact == "name", f"{fact} is no fact of {slug}"
        if isinstance(beat.step, str):
            assert 0 <= found.facts[beat.step] < recording.steps
        if beat.predict:
            assert np.isfinite(found.facts[beat.predict.answer])


def facts_in(beat):
    texts = [beat.text, beat.predict.question if beat.predict else ""]
    return {name for text in texts for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("slug", SLUGS)
def test_a_lesson_is_told_as_the_curriculum_asks(slug):
    lesson = lessons.lesson(slug)
    assert lesson.part in PARTS
    assert lesson.question.endswith("?")
    assert 5 <= len(lesson.beats) <= 9
    for beat in lesson.beats:
        words = len(re.findall(r"[\w’'-]+", re.sub(r"\|\w+==|\{[^}]*\}", "", beat.text)))
        assert words <= 60, f"{words} words: {beat.text}"
    assert any(beat.predict for beat in lesson.beats)
    assert any(beat.do for beat in lesson.beats)
    assert "break it" in lesson.beats[-1].text.lower()
    used = {term for beat in lesson.beats for term in re.findall(r"\[\[(.+?)\]\]", beat.text)}
    assert used <= set(lesson.glossary)
    views = {view.name for scene in lesson.scenes for view in scene.views}
    assert {name for beat in lesson.beats for name in re.findall(r"\|(\w+)==", beat.text)} <= views
    for beat in lesson.beats:
        if beat.do:
            assert not beat.do.knob or beat.do.knob in lesson.knobs.names()
            assert not beat.do.cell or beat.do.cell in views


@pytest.mark.parametrize("slug", SLUGS)
def test_a_lesson_is_one_short_file_that_shows_the_engines_code(slug):
    module = inspect.getmodule(lessons.lesson(slug).run)
    path = Path(module.__file__)
    assert path.name == slug.replace("-", "_") + ".py"
    assert len(path.read_text().splitlines()) <= LINES
    assert ast.get_docstring(ast.parse(path.read_text()))
    found = sources(lessons.lesson(slug).code)
    assert found
    assert all(source["file"].startswith("engine/") for source in found)
    assert any(source["taps"] for source in found), "none of the code shown has a tap"


@pytest.mark.parametrize("slug", SLUGS)
def test_views_are_plain_data(slug):
    lesson = lessons.lesson(slug)
    for scene in lesson.scenes:
        json.dumps(plain(scene.views, lesson.knobs()))
