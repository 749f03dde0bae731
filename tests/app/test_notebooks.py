"""The `leanscope` package and "Open as notebook": arrays with names, plain sentences, notebooks that run as is."""

import ast
import asyncio
import json
import re
from pathlib import Path
from typing import Any

import leanscope
import nbformat
import numpy as np
import pytest

from app import ipynb
from app.arrays import Arrays, Missing, Tensor, Unfit
from app.runs import perform
from lessons import all_lessons
from tests.app.lessons.waves import LESSON, WAVE, WavesKnobs
from tests.app.test_session import visit
from tests.support import environment

WAVES = Arrays(perform(LESSON, WavesKnobs()), LESSON, WavesKnobs())


def test_a_run_is_a_mapping_of_named_arrays() -> None:
    assert WAVE in WAVES
    assert len(WAVES) == len(list(WAVES)) == len(WAVES.recording.tracks)
    wave = WAVES[WAVE]
    assert isinstance(wave, np.ndarray)
    np.testing.assert_array_equal(np.asarray(wave), WAVES.recording.stack(WAVE))
    assert len(wave.axes) == wave.ndim
    assert wave.meaning == WAVES.recording.track(WAVE).site.meaning
    assert WAVES.facts["steps"] == 8
    assert list(WAVES.claims["verdict"]) == ["agrees", "differs"]
    assert WAVES.stack(WAVE) is not None, "it answers what the recording does"
    for text in (repr(WAVES), WAVES._repr_html_()):
        assert wave.axes[0] in text
    assert "<b>and</b>" not in WAVES._repr_html_(), "the title is text"


def test_axes_are_sliced_by_name_and_what_is_computed_is_plain() -> None:
    wave = WAVES[WAVE]
    first, last = wave.axes[0], wave.axes[-1]
    part = wave.at(**{first: 1})
    assert part.axes == wave.axes[1:]
    np.testing.assert_array_equal(np.asarray(part), np.asarray(wave)[1])
    both = wave.at(**{first: slice(0, 2), last: -1})
    np.testing.assert_array_equal(np.asarray(both), np.asarray(wave)[:2, ..., -1])
    for computed in (wave + 1, wave * wave, wave[0], wave.mean(0), np.exp(wave), wave.sum()):
        assert not isinstance(computed, Tensor)
    assert wave.T.axes == ()
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(wave)[0] = 1


def test_what_does_not_exist_is_told_in_one_sentence(tmp_path: Path) -> None:
    wave = WAVES[WAVE]
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"x" * 100)
    for wrong, told in [
        (lambda: WAVES["nope"], "This run has no tensor called 'nope'; it has "),
        (lambda: wave.at(nope=1), f"{WAVE} has no axis 'nope'; its axes are "),
        (lambda: wave.at(**{wave.axes[0]: 10**9}), f"The axis {wave.axes[0]} of {WAVE} goes from 0 to "),
        (lambda: leanscope.run("nope"), "There is no lesson called 'nope'; there are decode, "),
        (lambda: leanscope.run("sinks", nope=1), "There is no knob called “nope”; this lesson has "),
        (lambda: leanscope.run("sinks", window=10**30), "Window must be from 16 to 128, not a number of more than 20"),
        (lambda: leanscope.run("sinks", window="x"), "Window must be a whole number, not “x”."),
        (
            lambda: all_lessons()["sinks"].show(window=64),
            "A lesson is shown in a notebook; elsewhere `leanscope serve`",
        ),
        (lambda: leanscope.load(tmp_path / "none", "sinks"), f"There is no file {tmp_path / 'none'}."),
        (lambda: leanscope.load(damaged, "sinks"), f"{damaged} is not a Leanscope recording, or it is damaged"),
    ]:
        with pytest.raises(Unfit) as caught:
            wrong()
        assert str(caught.value).startswith(told)
        assert "\n" not in str(caught.value)
        assert caught.value._render_traceback_() == [str(caught.value)], "all that a notebook shows"
    assert WAVES.get("nope") is None
    with pytest.raises(KeyError):
        WAVES["nope"]
    assert issubclass(Missing, Unfit)


def test_a_recording_from_another_version_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    WAVES.save(path)
    monkeypatch.setattr("engine.recording.FORMAT", 10**6)
    with pytest.raises(Unfit, match=r"is a recording of format \d+; this version reads 1000000"):
        leanscope.load(path, "decode")


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    WAVES.save(tmp_path / "run")
    again = leanscope.load(tmp_path / "run", "decode")
    np.testing.assert_array_equal(np.asarray(again[WAVE]), np.asarray(WAVES[WAVE]))


@pytest.mark.parametrize("slug", all_lessons())
def test_every_lesson_makes_a_notebook(slug: str) -> None:
    lesson = all_lessons()[slug]
    knobs = lesson.knobs()
    made = nbformat.reads(ipynb.text(lesson, knobs), 4)
    nbformat.validate(made)
    for cell in made.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
    assert ipynb.text(lesson, knobs) == ipynb.text(lesson, lesson.knobs()), "the same place, the same file"


def test_hostile_text_stays_text_in_a_notebook() -> None:
    lesson = all_lessons()["decode"]
    text = '"); import os; os.system("x") #\n\'\'\'"""\\'
    made = nbformat.reads(ipynb.text(lesson, lesson.knobs(prompt=text)), 4)
    (shown,) = [cell.source for cell in made.cells if "leanscope.show" in cell.source]
    call = ast.parse(shown).body[-1].value  # type: ignore[attr-defined]
    assert [ast.literal_eval(k.value) for k in call.keywords if k.arg == "prompt"] == [text]


def test_the_page_offers_the_notebook_with_its_knobs() -> None:
    async def story() -> None:
        async with visit() as page:
            await page.done()
            page.turn(steps=11)
            await page.until(lambda: page.session.knobs.values()["steps"] == 11)
            page.say("download", what="notebook")
            file = await page.hear("file")
            assert file["name"] == "leanscope-waves.ipynb"
            assert "steps=11" in "".join(json.loads(bytes(file["data"]))["cells"][1]["source"])

    asyncio.run(story())


@pytest.mark.slow
@pytest.mark.parametrize(("slug", "turned"), [("decode", {"tokens": 12}), ("sinks", {"window": 16, "tokens": 96})])
def test_a_notebook_runs_as_it_is(
    slug: str, turned: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    for name, value in environment(tmp_path / "cache", {"IPYTHONDIR": str(tmp_path / "ipython")}).items():
        monkeypatch.setenv(name, value)
    lesson = all_lessons()[slug]
    made = nbformat.reads(ipynb.text(lesson, lesson.knobs(model="toy", **turned)), 4)
    wrong = nbformat.v4.new_code_cell(f"leanscope.run({slug!r}, nope=1)")
    wrong.metadata["tags"] = ["raises-exception"]
    claim = nbformat.v4.new_code_cell("print(recording.claims['measured'][0])")
    made.cells += [wrong, claim]
    NotebookClient(made, timeout=200, startup_timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = {cell.source: cell.outputs for cell in made.cells if cell.cell_type == "code"}

    def result(word: str) -> Any:
        outputs = next(outputs for source, outputs in code.items() if word in source)
        return [one.data for one in outputs if one.output_type == "execute_result"][-1]

    shown = result("leanscope.show")
    assert "application/vnd.holoviews_exec.v0+json" in shown, "a live component"
    assert lesson.question in shown["text/html"]
    for outputs in code.values():
        for one in outputs:
            for kind, data in one.get("data", {}).items():
                assert not re.search(r"https?://cdn\.(bokeh|holoviz)\.org", data), f"{kind} asks another host"
    assert f"{lesson.slug}(" in result("leanscope.run(")["text/plain"]
    assert ":Image" in result("leanscope.explore")["text/plain"]
    (fault,) = code[wrong.source]
    assert fault["traceback"][-1].startswith("There is no knob called “nope”")
    assert len(fault["traceback"]) == 1
    (recomputed,) = [outputs[-1].data["text/plain"] for source, outputs in code.items() if "\ndef " in source]
    assert code[claim.source][0].text.strip() in recomputed, "by hand, the same as on the page"
