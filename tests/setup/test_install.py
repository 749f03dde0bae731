"""What set-up decides and says, without installing anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app import browser, install


def test_packages_are_installed_once_for_the_same_pins(tmp_path: Path):
    stamp = tmp_path / "stamp.json"
    assert install.missing_extras(stamp, "k", ["fonts"]) == ["fonts"]
    stamp.write_text(json.dumps({"key": "k", "extras": ["fonts"]}))
    assert install.missing_extras(stamp, "k", ["fonts"]) == []
    assert install.missing_extras(stamp, "k", ["fonts", "test"]) == ["fonts", "test"]


def test_changed_pins_bring_back_all_that_was_there(tmp_path: Path):
    stamp = tmp_path / "stamp.json"
    stamp.write_text(json.dumps({"key": "old", "extras": ["fonts", "oracle", "test"]}))
    assert install.missing_extras(stamp, "new", ["fonts"]) == ["fonts", "oracle", "test"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": "k"}', '{"key": "k", "extras": 3}', "\udcff"])
def test_a_damaged_stamp_counts_as_none(tmp_path: Path, text: str):
    stamp = tmp_path / "stamp.json"
    stamp.write_bytes(text.encode(errors="surrogateescape"))
    assert install.missing_extras(stamp, "k", ["fonts"]) == ["fonts"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_the_key_follows_what_is_installed(tmp_path: Path, name: str):
    for file in ("pyproject.toml", "constraints.txt"):
        (tmp_path / file).write_text("a")
    before = install.packages_key(tmp_path)
    assert install.packages_key(tmp_path) == before
    (tmp_path / name).write_text("b")
    assert install.packages_key(tmp_path) != before


def test_pip_is_asked_for_pins_and_extras():
    command = install.pip_command(["fonts", "test"], {}, terminal=False)
    assert command[-4:] == ["--constraint", "constraints.txt", "--editable", ".[fonts,test]"]
    assert "--quiet" in command
    assert "--extra-index-url" not in command
    command = install.pip_command(["fonts"], {"LEANSCOPE_TORCH_INDEX": "file:///wheels"}, terminal=True)
    assert command[command.index("--extra-index-url") + 1] == "file:///wheels"
    assert "--quiet" not in command


def test_jupyter_is_told_once_what_to_load(tmp_path: Path):
    for _ in range(2):
        install.tell_jupyter(tmp_path)
    (told,) = tmp_path.rglob("*.json")
    assert told.parent == tmp_path / "etc" / "jupyter" / "jupyter_server_config.d"
    assert json.loads(told.read_text())["ServerApp"]["jpserver_extensions"] == {"app.jupyter": True}


def test_no_network_is_told_in_one_sentence(tmp_path: Path):
    """With pip's own words: it asks a port where nothing listens."""
    command = [sys.executable, "-m", "pip", "--isolated", "download", "--no-deps", "--retries", "1", "--no-cache-dir"]
    nowhere = ["--index-url", "http://127.0.0.1:9/", "--dest", str(tmp_path), "nothing-of-this-name"]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([*command, *nowhere], env=env, capture_output=True, text=True, check=False)
    assert done.returncode
    told = install.explain_pip(done.stderr)
    assert told == "The package index can't be reached: check the network (or pip's proxy settings), then make again."


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: 'x'", "permission denied"),
        (
            "WARNING: Retrying: Temporary failure in name resolution\nERROR: No matching distribution",
            "can't be reached",
        ),
        ("ReadTimeoutError: Read timed out.", "can't be reached"),
        (
            "WARNING: x\nERROR: No matching distribution found for torch==9",
            "No matching distribution found for torch==9",
        ),
        ("", "it gave no reason"),
    ],
)
def test_what_pip_says_becomes_one_sentence(said: str, told: str):
    sentence = install.explain_pip(said)
    assert told in sentence
    assert "\n" not in sentence


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(install.InstallError, match="can't be made"):
        install.make_venv(tmp_path / "file" / ".venv")
    told = install.explain_venv("Error: [Errno 13] Permission denied: '/x/.venv'", Path("/x/.venv"))
    assert told.startswith("The folder /x/.venv can't be made (permission denied)")


@pytest.mark.slow
def test_a_virtual_environment_is_made_once_and_again_when_it_was_moved(tmp_path: Path):
    venv, moved = tmp_path / "a" / ".venv", tmp_path / "b" / ".venv"
    install.make_venv(venv)
    (venv / "mark").write_text("")
    install.make_venv(venv)
    assert (venv / "mark").exists()
    (tmp_path / "a").rename(tmp_path / "b")
    assert not install.is_whole(moved)
    install.make_venv(moved)
    assert install.is_whole(moved)
    assert not (moved / "mark").exists()


@pytest.mark.parametrize("broken", ["bin/python", "pyvenv.cfg"])
def test_a_broken_one_is_not_whole(tmp_path: Path, broken: str):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    assert not install.is_whole(tmp_path / ".venv")  # no pip in it
    (site,) = (tmp_path / ".venv").glob("lib/python*/site-packages")
    (site / "pip.py").write_text("")
    assert install.is_whole(tmp_path / ".venv")
    (tmp_path / ".venv" / broken).unlink()
    assert not install.is_whole(tmp_path / ".venv")


def test_one_of_another_python_is_not_whole(tmp_path: Path):
    (tmp_path / "pyvenv.cfg").write_text(f"command = python -m venv {tmp_path}")
    program(tmp_path, "bin/python", 0)
    assert install.is_whole(tmp_path)
    program(tmp_path, "bin/python", 1)
    assert not install.is_whole(tmp_path)


def test_a_python_without_the_venv_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(install, "works", lambda *words: False)
    monkeypatch.setattr(install, "apt_install", lambda package: False)
    with pytest.raises(install.InstallError, match=r"no venv module: as root, apt-get install python3\.\d+-venv"):
        install.make_venv(tmp_path / ".venv")
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
@pytest.mark.parametrize("missing", ["get_browser", "get_redis"])
def test_missing_tests_fail_in_ci_only(monkeypatch: pytest.MonkeyPatch, ci: str, code: int, missing: str):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(install, "install_packages", lambda extras: None)
    monkeypatch.setattr(install, "tell_jupyter", lambda: None)
    monkeypatch.setattr(install, "make_fonts", lambda: True)
    monkeypatch.setattr(install, "fetch_model", lambda: True)
    monkeypatch.setattr(install, "get_browser", lambda python: missing != "get_browser")
    monkeypatch.setattr(install, "get_redis", lambda: missing != "get_redis")
    assert install.main(["test"]) == code
    assert install.main(["serve"]) == 0


def test_redis_is_looked_for_before_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked: list[str] = []
    monkeypatch.setattr(install.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(install, "apt_install", lambda package: bool(asked.append(package)))
    assert install.get_redis()
    assert asked == []
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    assert not install.get_redis()
    assert asked == ["redis-server"]
    assert "Its tests are left out" in capsys.readouterr().out


def test_without_the_real_model_serving_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("LEANSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(install, "BIN", Path("/bin"))
    (fake := tmp_path / "leanscope").write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(install, "BIN", tmp_path)
    monkeypatch.setattr(install, "install_packages", lambda extras: None)
    monkeypatch.setattr(install, "tell_jupyter", lambda: None)
    monkeypatch.setattr(install, "make_fonts", lambda: True)
    assert install.main(["serve"]) == 0
    assert "goes on without the real model" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["all"], ["serve", "test"]])
def test_wrong_use(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert install.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def program(folder: Path, name: str, code: int) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


def test_the_browser_named_goes_first(tmp_path: Path):
    own = program(tmp_path, "own", 0)
    assert browser.find_browser(environ={"LEANSCOPE_BROWSER": own}) == own
    assert browser.find_browser(environ={"LEANSCOPE_BROWSER": str(tmp_path / "none")}) is None


def test_a_browser_that_does_not_start_is_passed_over(tmp_path: Path):
    programs = {
        "chromium": program(tmp_path, "chromium", 1),
        "google-chrome": program(tmp_path, "google-chrome", 0),
    }
    assert browser.find_browser(programs.get, {}) == programs["google-chrome"]


def test_playwrights_own_is_the_last_resort(tmp_path: Path):
    assert browser.find_browser(lambda name: None, {"HOME": str(tmp_path)}) is None
    fetched = program(tmp_path, ".cache/ms-playwright/chromium-1200/chrome-linux64/chrome", 0)
    assert browser.find_browser(lambda name: None, {"HOME": str(tmp_path)}) == fetched


def test_no_browser_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(browser, "find_browser", lambda: None)
    monkeypatch.setattr(browser, "apt_install", lambda package: False)
    assert browser.get_browser(Path("/bin/false")) is False
    assert (
        "install the package chromium, or name a Chromium or Chrome with LEANSCOPE_BROWSER" in capsys.readouterr().out
    )
