"""README.md is true: its lesson runs, its commands and variables exist, its links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

from app import cli, runs
from lessons.lesson import Lesson

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = "".join(file.read_text(encoding="utf-8") for top in ("app", "engine") for file in (ROOT / top).rglob("*.py"))


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    """The lesson of "Adding a lesson", read as a file of its own."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    path = tmp_path_factory.mktemp("lesson") / "readme_lesson.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("readme_lesson", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LESSON


def test_the_lesson_runs_and_its_claim_is_computed(lesson: Lesson):
    knobs, _ = runs.with_available_model(lesson.knobs(tokens=9))
    if not runs.is_available(knobs.model)[0]:
        pytest.skip("no model is here")
    recording = runs.perform(lesson, knobs)
    assert recording.steps == 9
    assert recording.stack("sure.best").shape == (9,)
    (claim,) = runs.claims(lesson, recording)
    assert claim["verdict"] in ("agrees", "differs")
    assert re.fullmatch(r"\d+% → \d+%", claim["measured"])


def test_every_command_is_understood(capsys: pytest.CaptureFixture[str]):
    named = set(re.findall(r"\bleanscope ([a-z]+)", README)) - {"in"}
    assert named >= {"serve", "lessons", "run", "claims", "models", "train", "doctor"}
    for command in named:
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0
    options = capsys.readouterr().out
    for option in re.findall(r"leanscope [^`\n]*", README):
        for word in re.findall(r"--[a-z-]+", option):
            assert word in options, word


def test_every_variable_does_something():
    named = set(re.findall(r"`(LEANSCOPE_[A-Z_]+|PORT)`", README))
    assert len(named) >= 6
    assert {name for name in named if f'"{name}"' not in SOURCES} == set()


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+)\b(?! takes)", README.partition("## What is real")[0]):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_link_leads_to_a_file():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_panel_line_is_that_of_the_procfile():
    (line,) = re.findall(r"^BOKEH_RESOURCES=.*?(?=\n```)", README, re.DOTALL | re.MULTILINE)
    here = line.replace("\\\n", " ").replace(".venv/bin/", "")
    web = (ROOT / "Procfile").read_text().removeprefix("web:")
    assert here.split() == web.replace("$PORT", "5006").replace("$APP_HOST", "lessons.example.org").split()
