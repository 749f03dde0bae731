"""Recording: what is kept, what it costs, and that it comes back the same."""

import contextvars
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.recording import (
    Recording,
    event,
    labelled,
    note,
    record,
    recording_on,
    site,
    step,
    tap,
)

ROWS = site("test.rows", "rows that grow", grows="query", low=0, high=1)
FRAME = site("test.frame", "a whole frame")


def decode(lengths: list[int], *, heads: int = 2) -> tuple[Recording, np.ndarray]:
    """A recording of a prefill and single steps, and the lower-triangular matrix that it must stack to."""
    total = sum(lengths)
    full = np.tril(np.random.default_rng(0).random((heads, total, total), np.float32))
    done = 0
    with record() as recorder:
        for count in lengths:
            done += count
            tap(ROWS, torch.tensor(full[:, done - count : done, :done]), "head query key", layer=1)
            step()
    return recorder.freeze(), full


def test_tap_returns_the_very_tensor_on_and_off():
    x = torch.rand(3)
    assert tap(FRAME, x, "a") is x
    with record():
        assert tap(FRAME, x, "a") is x


def test_copies_survive_mutation_and_are_read_only():
    x = torch.zeros(4)
    with record() as recorder:
        tap(FRAME, x, "slot")
        x.fill_(7)
    kept = recorder.freeze().track(FRAME).latest()
    assert (kept == 0).all()
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_growing_rows_stack_to_one_lower_triangular_matrix(lengths):
    recording, full = decode(lengths)
    track = recording.track(ROWS, layer=1)
    np.testing.assert_array_equal(track.stack(), full)
    np.testing.assert_array_equal(track.at, np.repeat(np.arange(len(lengths)), lengths))


def test_rows_from_the_middle_equal_the_tail_of_all_rows():
    recording, _ = decode([3, 1, 2])
    track = recording.track(ROWS)
    for start in range(7):
        tail, whole = list(track.rows(start)), list(track.rows())[start:]
        assert [at for at, _ in tail] == [at for at, _ in whole]
        assert all((a == b).all() for (_, a), (_, b) in zip(tail, whole, strict=True))


def test_a_step_of_many_spreads_its_rows():
    with record() as recorder:
        tap(ROWS, torch.rand(1, 4, 4), "head query key")
        step(4)
        tap(ROWS, torch.rand(1, 1, 5), "head query key")
        step()
    track = recorder.freeze().track(ROWS)
    assert track.at.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_saved_recordings_come_back_identical(tmp_path, dtype):
    with record() as recorder:
        note(tokens=["a", "é", "🙂"])
        for t in range(1, 4):
            tap(ROWS, (torch.rand(2, 1, t) * 9).to(dtype), "head query key", layer=t % 2)
            event("test.happened", slot=t, why="because")
            step(label=f"token {t}")
    saved = recorder.freeze()
    saved.save(tmp_path / "run.safetensors")
    loaded = Recording.load(tmp_path / "run.safetensors")
    assert (loaded.steps, loaded.labels, loaded.meta, loaded.events) == (
        saved.steps,
        saved.labels,
        saved.meta,
        saved.events,
    )
    assert [t.key for t in loaded.tracks] == [t.key for t in saved.tracks]
    for ours, theirs in zip(saved.tracks, loaded.tracks, strict=True):
        assert ours.axes == theirs.axes
        for a, b in zip(ours.chunks, theirs.chunks, strict=True):
            assert (a.step, a.span, a.array.dtype) == (b.step, b.span, b.array.dtype)
            np.testing.assert_array_equal(a.array, b.array)


@pytest.mark.parametrize("content", [b"", b"not a recording", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_file_gets_one_sentence(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a Leanscope recording"):
        Recording.load(path)


def test_a_recording_of_another_format_is_named(tmp_path, monkeypatch):
    recording, _ = decode([2])
    monkeypatch.setattr("engine.recording.FORMAT", 99)
    recording.save(tmp_path / "new.safetensors")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 99"):
        Recording.load(tmp_path / "new.safetensors")


def test_the_filter_keeps_what_is_asked():
    with record(keep={"test.*": {"layer": {1, 2}}}) as recorder:
        for layer in range(4):
            assert recording_on(FRAME, layer=layer) == (layer in (1, 2))
            tap(FRAME, torch.rand(2), "slot", layer=layer)
        tap("other.thing", torch.rand(2), "slot", layer=1)
    assert [t.key for t in recorder.freeze().tracks] == ["test.frame[layer=1]", "test.frame[layer=2]"]
    assert not recording_on(FRAME, layer=1)


def test_the_budget_cuts_and_says_so():
    with record(budget=100) as recorder:
        tap(FRAME, torch.rand(20), "slot", layer=0)
        tap(FRAME, torch.rand(20), "slot", layer=1)
    recording = recorder.freeze()
    assert recording.nbytes == 80
    assert recording.cut == {"test.frame[layer=1]": 80}
    with pytest.raises(ValueError, match="budget"), record(budget=0):
        pass


def test_what_is_read_meanwhile_is_a_finished_prefix():
    with record() as recorder:
        for value in range(3):
            tap(FRAME, torch.full((2,), float(value)), "slot")
            seen = recorder.so_far()
            assert seen.steps == value
            assert sum(len(t.chunks) for t in seen.tracks) == value
            step()


def test_labels_tell_runs_apart_and_end_with_their_block():
    with record() as recorder:
        for strategy in ("dense", "window"):
            with labelled(strategy=strategy):
                tap(FRAME, torch.rand(2), "slot")
        tap(FRAME, torch.rand(2), "slot")
    keys = [t.key for t in recorder.freeze().tracks]
    assert keys == ["test.frame[strategy=dense]", "test.frame[strategy=window]", "test.frame"]


def test_threads_never_mix():
    """A recorder belongs to its context: another thread's taps do not land in it."""
    with record() as recorder:
        thread = threading.Thread(target=contextvars.Context().run, args=(tap, FRAME, torch.rand(1), "slot"))
        thread.start()
        thread.join()
    assert recorder.freeze().tracks == ()


def test_wrong_axes_are_named():
    with record(), pytest.raises(ValueError, match="2 axes"):
        tap(FRAME, torch.rand(3), "head key")


def test_a_site_means_one_thing():
    site("test.frame", "a whole frame")
    with pytest.raises(ValueError, match="declared twice"):
        site("test.frame", "something else")


def test_an_ambiguous_track_is_refused_with_what_there_is():
    with record() as recorder:
        tap(FRAME, torch.rand(1), "slot", layer=0)
        tap(FRAME, torch.rand(1), "slot", layer=1)
    recording = recorder.freeze()
    with pytest.raises(KeyError, match=r"layer=0.*layer=1"):
        recording.track(FRAME)
    with pytest.raises(KeyError, match=r"test\.frame"):
        recording.track("test.missing")


def test_on_step_may_stop_the_run():
    class StopError(Exception):
        pass

    def stop(recorder):
        if recorder.step == 2:
            raise StopError

    def work():
        for _ in range(5):
            tap(FRAME, torch.rand(1), "slot")
            step()

    with record(on_step=stop) as recorder, pytest.raises(StopError):
        work()
    assert recorder.so_far().steps == 2
