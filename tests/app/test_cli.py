"""`leanscope` as people type it: what it prints, where, and with which exit code."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import cli
from engine import checkpoints
from engine.recording import Recording
from tests.app.lessons.waves import LESSON, WAVE
from tests.support import OWN, ROOT, environment


@pytest.fixture(autouse=True)
def own_lesson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lessons.all_lessons", lambda: {"waves": LESSON})
    monkeypatch.setenv("LEANSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_lessons_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lessons"]) == 0
    assert capsys.readouterr().out == "waves            Waves <b>and</b> water: Does a wave have a length?\n"
    assert cli.main(["lessons", "--json"]) == 0
    fields = {name: getattr(LESSON, name) for name in ("slug", "title", "question", "part")}
    assert json.loads(capsys.readouterr().out) == [fields]


def test_a_run_prints_its_facts_and_saves_its_recording(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["run", "waves", "--set", "steps=5", "--set", "bold=on", "-o", "here.st"]) == 0
    out, err = capsys.readouterr()
    assert out == "steps: 5\ntop: 0.997704\n"
    assert err.splitlines()[0].startswith("5 steps in ")
    assert err.splitlines()[-1].startswith("saved here.st")
    assert Recording.load(tmp_path / "here.st").stack(WAVE).shape == (4, 5, 5)
    assert cli.main(["run", "waves", "-o"]) == 0
    assert Recording.load(tmp_path / "leanscope-waves.safetensors").steps == 8


def test_claims_are_checked_and_one_that_cannot_be_computed_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claims", "waves", "--json"]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert list(good) == ["lesson", "claim", "source", "formula", "reported", "measured", "unit", "verdict", "why"]
    assert (good["lesson"], good["claim"], good["formula"]) == ("waves", "A wave has a length.", "n = 8")
    assert (good["measured"], good["verdict"]) == ("8", "agrees")
    assert (bad["verdict"], bad["why"]) == ("differs", "could not be computed: no waves today")
    assert cli.main(["claims"]) == 1
    assert "A wave breaks. (a test)" in capsys.readouterr().out


def test_claims_that_can_all_be_computed_succeed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    good = dataclasses.replace(LESSON, claims=LESSON.claims[:1])
    monkeypatch.setattr("lessons.all_lessons", lambda: {"waves": good})
    assert cli.main(["claims", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


WRONG = {
    "nothing": [],
    "an unknown command": ["sreve"],
    "an unknown option": ["serve", "--prot", "1"],
    "a port that is none": ["serve", "--port", "http"],
    "a port too high": ["serve", "--port", "65536"],
    "a port of 5,000 digits": ["serve", "--port", "9" * 5000],
    "a negative port": ["serve", "--port", "-1"],
    "an address that is none": ["serve", "--address", "no such host", "--port", "0"],
    "a Redis that is none": ["serve", "--port", "0", "--redis", "http://user:secret@localhost"],
    "an address of another machine": ["serve", "--address", "192.0.2.1", "--port", "0"],
    "an unknown lesson": ["run", "nope"],
    "an unknown lesson's claims": ["claims", "waves", "nope"],
    "a lesson called like a path": ["run", "../../etc/passwd"],
    "an unknown knob": ["run", "waves", "--set", "speed=3"],
    "a knob without a value": ["run", "waves", "--set", "steps"],
    "a knob out of range": ["run", "waves", "--set", "steps=401"],
    "a knob of 5,000 digits": ["run", "waves", "--set", "steps=" + "9" * 5000],
    "a knob that is nan": ["run", "waves", "--set", "pause=nan"],
    "an empty text": ["run", "waves", "--set", "text="],
    "a model where there is no such knob": ["run", "waves", "--model", "smollm2"],
    "an output that is a folder": ["run", "waves", "-o", "/tmp"],
    "an output in no folder": ["run", "waves", "-o", "/nope/x.st"],
    "an output on a file": ["run", "waves", "-o", "/dev/null/x.st"],
    "an unknown thing to do with models": ["models", "burn"],
    "nothing to train": ["train"],
    "a name and all to train": ["train", "toy", "--all"],
}


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG.keys())
def test_wrong_use_gets_one_line_and_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("leanscope: ")
    assert err.count("\n") == 1
    assert len(err) < 400


def test_a_run_that_fails_gets_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "waves", "--set", "trouble=sentence"]) == 1
    assert capsys.readouterr().err == "leanscope: waves: the text has no verb.\n"
    assert cli.main(["run", "waves", "--set", "trouble=crash"]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "leanscope: waves: Something went wrong in the engine (RuntimeError)."
    assert out == ""


def test_one_lesson_that_fails_does_not_hide_the_claims_of_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    def broken(knobs: Any) -> None:
        raise ValueError("no water.")

    dry = dataclasses.replace(LESSON, slug="dry", run=broken)
    monkeypatch.setattr("lessons.all_lessons", lambda: {"dry": dry, "waves": LESSON})
    assert cli.main(["claims", "--json"]) == 1
    out, err = capsys.readouterr()
    assert {row["lesson"] for row in json.loads(out)} == {"waves"}
    assert "leanscope: dry: no water." in err


def test_models_are_listed_with_why_one_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("smollm2          real  not here: ")
    assert cli.main(["models", "verify"]) == 1
    assert "fail  smollm2: " in capsys.readouterr().out


def test_a_model_that_cannot_be_fetched_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(*, progress: Any) -> Path:
        progress("download", 10, 93_000_000)
        raise checkpoints.ModelUnavailable("there is no network: try again later.")

    monkeypatch.setattr(checkpoints, "fetch_smollm2", fetch)
    assert cli.main(["models", "fetch"]) == 1
    assert capsys.readouterr().err == "leanscope: there is no network: try again later.\n"


def test_the_doctor_looks_at_everything_and_fails_where_something_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in lines)
    told = {line[6:].split(":")[0] for line in lines}
    assert {
        "Python",
        "packages",
        "torch",
        "device",
        "cache folder",
        "disk",
        "lessons",
        "browser",
        "fonts",
        "port",
    } <= told
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LEANSCOPE_CACHE", str(tmp_path / "file"))
    assert cli.main(["doctor"]) == 1
    assert f"fail  cache folder: {tmp_path / 'file'} can't be written" in capsys.readouterr().out


def test_a_local_folder_can_be_named_as_the_model_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import dataclasses

    import param

    from lessons.knobs import Knobs
    from lessons.lesson import Lesson

    seen: list[str] = []

    class Chosen(Knobs):
        model = param.Selector(default="toy", objects=["toy"])

    lesson: Lesson = dataclasses.replace(
        LESSON,
        knobs=Chosen,
        looks=frozenset(),
        run=lambda knobs: seen.append(knobs.model),
        facts=lambda r: {},
        claims=(),
    )
    lesson = dataclasses.replace(lesson, marks=lambda r: [])
    monkeypatch.setattr("lessons.all_lessons", lambda: {"waves": lesson})
    assert cli.main(["run", "waves", "--model", str(tmp_path)]) == 0
    assert cli.main(["run", "waves", "--model", str(tmp_path / "nope")]) == 2
    assert seen == [str(tmp_path)]
    assert Chosen.param["model"].objects == ["toy"], "a folder of one run must not be offered to others"


def test_ctrl_c_ends_a_run_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, *OWN, "run", "waves", "--set", "steps=400", "--set", "pause=0.05"]
    env = environment(tmp_path, {"LEANSCOPE_TEST_MARK": str(tmp_path / "began")})
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "began").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=15)
    assert (process.returncode, out, err) == (130, "", "\n")


@pytest.mark.parametrize("stop", [False, True])
def test_a_model_can_be_trained_and_a_training_stopped(
    stop: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from engine import train

    def train_to_assets(name: str, *, folder: Path, work: Path, progress: Any) -> dict[str, Any]:
        assert folder == checkpoints.ZOO
        progress(1, 10, 2.0)
        progress(2, 10, 1.5)
        if stop:
            raise KeyboardInterrupt
        return {"loss": 1.5}

    monkeypatch.setattr(train, "train_to_assets", train_to_assets)
    assert cli.main(["train", "toy"]) == (130 if stop else 0)
    out, err = capsys.readouterr()
    assert ("the same command goes on where it was" in err) == stop
    assert out == ("" if stop else '{\n  "toy": {\n    "loss": 1.5\n  }\n}\n')
    assert cli.main(["train", "nope"]) == 2


@pytest.mark.parametrize("fault", [None, KeyboardInterrupt(), ValueError("no texts")])
def test_the_draft_can_be_trained_and_a_training_stopped(
    fault: BaseException | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine.speculate import draft

    def make(work: Path, *, progress: Any) -> int:
        assert work == cli.WORK / "draft"
        progress("texts", 1, 3)
        progress("training", 2, 9)
        if fault is not None:
            raise fault
        return 1

    monkeypatch.setattr(draft, "make", make)
    monkeypatch.setattr(draft, "about", lambda: {"steps": 9})
    wanted = {type(None): 0, KeyboardInterrupt: 130, ValueError: 1}[type(fault)]
    assert cli.main(["train", "draft"]) == wanted
    out, err = capsys.readouterr()
    assert out == ("" if fault else '{\n  "draft": {\n    "steps": 9\n  }\n}\n')
    assert ("the same command goes on" in err) == (wanted == 130)
    assert ("draft could not be trained: no texts" in err) == (wanted == 1)


def test_output_into_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} {' '.join(OWN)} claims | head -1"
    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "waves: A wave has a length. (a test)\n"
    assert "BrokenPipe" not in done.stderr


def test_the_recording_of_a_run_is_the_engines_own(tmp_path: Path) -> None:
    assert cli.main(["run", "waves", "--set", "steps=3", "-o", "a.st"]) == 0
    matrix = Recording.load(tmp_path / "a.st").stack(WAVE)
    np.testing.assert_allclose(matrix[1, 2, :3], (1 + np.sin(1 + np.arange(3) / 3)) / 2, atol=1e-6)
