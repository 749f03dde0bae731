"""What is asked of every lesson as files: its first picture is small, and its answers are those of the live page."""

from typing import Any

import numpy as np

from app import answers, stage
from app.picture import Feed
from app.pieces import packed
from app.runs import Run, findings
from app.still import Limits, Still, still
from engine.recording import Recording
from lessons.knobs import Knobs
from lessons.lesson import Lesson

FIRST = 2_000_000  # bytes for the first picture
FONTS = 230_000
FEW = Limits(cells=60, all_cells=60)


def check(lesson: Lesson, knobs: Knobs, recording: Recording) -> None:
    """Pack a finished run as `leanscope export` does, and compare it with what a live page is told."""
    run = Run("key", lesson, knobs, "done", recording=recording, findings=findings(lesson, recording), id="run")
    made = still(lesson, "As it opens", run, "s0-", FEW)
    script = len(stage.script().encode())
    for number, scene in enumerate(lesson.scenes):
        first = packed([made.told, made.pieces.get(f"s0-{number}")])
        assert script + FONTS + len(first) * 4 / 3 < FIRST, f"{scene.name} of {lesson.slug} is too large"
        _check_scene(lesson, number, knobs, recording, made)
        for index, view in enumerate(scene.views):
            known = made.told["cells"].get(f"{scene.name}/{index}")
            if getattr(view, "cell", None):
                assert known, f"{lesson.slug} has no arithmetic in {view.name}"
                cells = made.pieces[next(iter(known["pieces"].values()))]
                assert len(cells["keys"]), f"no cell of {view.name} could be opened"
                for place in (0, len(cells["keys"]) // 2, len(cells["keys"]) - 1):
                    _check_cell(recording, view, knobs, cells, place)


def _check_scene(lesson: Lesson, number: int, knobs: Knobs, recording: Recording, made: Still) -> None:
    """The rows that a live page gets for a scene are in the pieces, byte by byte."""
    sent: list[dict[str, Any]] = []
    Feed(sent.append).show("run", recording, lesson.scenes[number], knobs)
    for name, about in sent[0]["tracks"].items():
        kept = made.told["tracks"][name]
        assert kept["about"] == about
        home, index = kept["rows"]
        live = [message for message in sent if message["type"] == "rows" and message["track"] == name]
        assert len(made.pieces[home][index]) == len(live)
        for mine, theirs in zip(made.pieces[home][index], live, strict=True):
            assert mine.keys() <= theirs.keys()
            for key, value in mine.items():
                np.testing.assert_array_equal(value, theirs[key])
    assert [m for m in sent if m["type"] in ("pieces", "words")] or not made.told["texts"]


def _check_cell(recording: Recording, view: Any, knobs: Knobs, cells: dict[str, Any], place: int) -> None:
    """One answer, put together as the page does it (app/stage/kept.js), is the live page's."""
    frames = max(1, len(cells["frames"]))
    number, frame = divmod(int(cells["keys"][place]), frames)
    at = dict(zip(cells["axes"], map(int, np.unravel_index(number, cells["sizes"])), strict=True))
    step = cells["frames"][frame] if cells["frames"] else recording.steps - 1
    (live,) = answers.cell(recording, view, knobs, at, request=0, index=0, step=step)
    assert "error" not in live, (at, step, live)
    answer = put_together(cells, place)
    assert answer["title"] == live["title"]
    assert answer["note"] == live["note"]
    assert answer["lines"] == live["lines"]
    assert [name for name, _ in answer["vectors"]] == [name for name, _ in live["vectors"]]
    for (_, mine), (_, theirs) in zip(answer["vectors"], live["vectors"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-30)


def put_together(cells: dict[str, Any], place: int) -> dict[str, Any]:
    words = bars = 0
    for form in cells["form"][:place]:
        lines, vectors = cells["forms"][form]
        words, bars = words + 2 + 2 * lines + vectors, bars + vectors
    lines, vectors = cells["forms"][cells["form"][place]]
    texts = [cells["texts"][i] for i in cells["words"][words : words + 2 + 2 * lines + vectors]]
    starts = np.concatenate([[0], np.cumsum(cells["lengths"])])
    own: list[np.ndarray] = []
    for bar in cells["bars"][bars : bars + vectors]:
        product = divmod(-int(bar) - 1, 16)
        own.append(
            cells["numbers"][starts[bar] : starts[bar + 1]].astype(np.float64)
            if bar >= 0
            else own[product[0]] * own[product[1]]
        )
    return {
        "title": texts[0],
        "note": texts[1],
        "lines": [texts[2 + 2 * i : 4 + 2 * i] for i in range(lines)],
        "vectors": list(zip(texts[2 + 2 * lines :], own, strict=True)),
    }
