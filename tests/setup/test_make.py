"""The Makefile: its targets, and the Python that it chooses."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make(*words: str) -> subprocess.CompletedProcess[str]:
    # Without the variables of a make around us, which would print its folder.
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    return subprocess.run(["make", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def python(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("target", ["serve", "check", "test", "bench", "pins", "clean", "help"])
def test_targets(target: str):
    done = make("--dry-run", target)
    assert done.returncode == 0, done.stderr
    assert f"make {target}\t" in make("help").stdout


def test_without_a_python_that_is_new_enough_one_sentence_says_so(tmp_path: Path):
    old = python(tmp_path, "old", "exit 1")
    done = make("--dry-run", "serve", f"PYTHONS={old} {tmp_path}/none")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Leanscope needs Python 3.11 or newer: apt-get install python3 python3-venv" in done.stderr


def test_the_first_that_is_new_enough_is_chosen(tmp_path: Path):
    old, new, newer = (
        python(tmp_path, name, script) for name, script in (("old", "exit 1"), ("new", "exit 0"), ("newer", "exit 0"))
    )
    assert f"{new} -m app.install serve" in make("--dry-run", "serve", f"PYTHONS={old} {new} {newer}").stdout


def test_one_with_the_venv_module_goes_before_one_without(tmp_path: Path):
    bare = python(tmp_path, "bare", 'case "$2" in *ensurepip*) exit 1;; esac')
    full = python(tmp_path, "full", "exit 0")
    assert f"{full} -m app.install serve" in make("--dry-run", "serve", f"PYTHONS={bare} {full}").stdout
    assert f"{bare} -m app.install serve" in make("--dry-run", "serve", f"PYTHONS={bare}").stdout


def test_ci_runs_make_test():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.splitlines()[-1] == "exec make test"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
