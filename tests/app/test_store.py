"""Recordings on disk: they come back identical, nothing is ever unpickled, and a bad disk costs no pictures."""

import os
import pickle
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.runs import perform
from app.store import Files, Store
from engine.recording import Recording
from tests.app.lessons.waves import LESSON, WavesKnobs
from tests.support import ROOT


@pytest.fixture
def recording() -> Recording:
    return perform(LESSON, WavesKnobs(steps=5))


def test_a_recording_comes_back_identical_for_another_process(tmp_path: Path, recording: Recording) -> None:
    store, other = Store(tmp_path), Store(tmp_path)
    store.put("a", recording)
    read = other.get("a")
    assert read is not None
    assert read.steps == recording.steps
    assert read.meta == recording.meta
    for mine, theirs in zip(recording.tracks, read.tracks, strict=True):
        np.testing.assert_array_equal(mine.stack(), theirs.stack())
    assert store.get("b") is None
    store.close()
    other.close()


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch " + os.environ["LEANSCOPE_BOMB"],))


@pytest.mark.parametrize("where", ["value", "key", "file"])
def test_a_pickle_planted_in_the_cache_is_never_read(
    tmp_path: Path, recording: Recording, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "exploded"
    monkeypatch.setenv("LEANSCOPE_BOMB", str(mark))
    store = Store(tmp_path / "cache")
    store.put("a", recording)
    bomb = pickle.dumps(Bomb())
    with sqlite3.connect(tmp_path / "cache" / "cache.db") as base:
        if where == "value":
            base.execute("UPDATE Cache SET mode = 4, filename = NULL, value = ?", (bomb,))
        elif where == "key":
            base.execute("UPDATE Cache SET key = ?, raw = 0", (bomb,))
        else:
            (name,) = base.execute("SELECT filename FROM Cache").fetchone()
            (tmp_path / "cache" / name).write_bytes(bomb)
            base.execute("UPDATE Cache SET mode = 4")
    base.close()
    assert store.get("a") is None
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists(), "the bomb was a dud: this test would not notice an explosion"
    store.close()


def test_the_disk_refuses_what_is_no_bytes(tmp_path: Path) -> None:
    disk = Files(str(tmp_path))
    for value in ("text", 1, None, ["list"]):
        with pytest.raises(TypeError):
            disk.store(value, False)
    with pytest.raises(TypeError):
        disk.put(("tuple", "key"))
    with pytest.raises(ValueError, match="outside"):
        disk.fetch(2, "../../etc/passwd", None, True)


@pytest.mark.parametrize("harm", ["cut", "altered", "gone", "emptied"])
def test_a_damaged_file_is_a_miss_and_can_be_replaced(tmp_path: Path, recording: Recording, harm: str) -> None:
    store = Store(tmp_path)
    store.put("a", recording)
    (file,) = tmp_path.rglob("*.val")
    data = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": data[:-9], "altered": b"\xff" * 64 + data[64:], "emptied": b""}[harm])
    assert store.get("a") is None
    store.put("a", recording)
    assert store.get("a") is not None
    store.close()


@pytest.mark.parametrize("place", ["a file", "under a file", "/proc/leanscope"])
def test_a_folder_that_cannot_be_written_is_told_and_survived(tmp_path: Path, recording: Recording, place: str) -> None:
    (tmp_path / "file").write_text("x")
    folder = {"a file": tmp_path / "file", "under a file": tmp_path / "file" / "runs"}.get(place, Path(place))
    store = Store(folder)
    assert store.problem.startswith(f"The folder {folder} can't be written: finished runs are kept in memory only")
    store.put("a", recording)
    assert store.get("a") is None


def test_no_room_on_the_disk_is_told_and_survived(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from app.runs import perform\n"
        "from app.store import Store\n"
        "from tests.app.lessons.waves import LESSON, WavesKnobs\n"
        "recording = perform(LESSON, WavesKnobs(steps=200))\n"
        f"store = Store(Path({str(tmp_path)!r}))\n"
        "small = perform(LESSON, WavesKnobs(steps=2))\n"
        "store.put('small', small)\n"
        "assert not store.problem\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))\n"
        "store.put('big', recording)\n"
        "print(store.problem)\n"
        "assert store.get('big') is None\n"
        "assert store.get('small') is not None\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "store.put('big', recording)\n"
        "assert not store.problem, store.problem\n"
        "assert store.get('big') is not None\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"There is no room in {tmp_path}: finished runs are kept in memory only")
    assert not list(tmp_path.glob("run-*")), "a half-written file was left"


def test_the_folder_stays_within_its_bound(tmp_path: Path, recording: Recording) -> None:
    big = perform(LESSON, WavesKnobs(steps=100))
    store = Store(tmp_path, size=8 * big.nbytes)
    for i in range(40):
        store.put(f"key {i}", big)
    kept = sum(file.stat().st_size for file in tmp_path.rglob("*.val"))
    assert 0 < kept < 12 * big.nbytes
    assert store.get("key 39") is not None
    assert store.get("key 0") is None
    store.close()


def test_without_a_folder_it_is_a_store_that_keeps_nothing(recording: Recording) -> None:
    store = Store(None)
    store.put("a", recording)
    assert (store.get("a"), store.problem) == (None, "")
