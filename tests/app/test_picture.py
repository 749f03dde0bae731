"""What travels to the browser decodes to what the recording holds."""

import json

import numpy as np
import param
import pytest

from app.picture import EXACT, MESSAGE, Feed, exact_row, find, packed, plain, track_id
from engine.recording import event, record, site, step, tap
from lessons.knobs import Knobs
from lessons.lesson import Scene
from lessons.views import Curves, Heatmaps, Line, knob, of

site("test.pattern", "attention", grows="query", low=0, high=1, symbol="A")
site("test.values", "anything")


class Turn(Knobs):
    layer = param.Integer(1, bounds=(0, 3))
    head = param.Integer(0, bounds=(0, 3))


def decoded(message):
    """Rows as the browser decodes them."""
    rows = np.asarray(message["data"]).reshape(len(message["at"]), -1)
    if len(message["lo"]):
        lo, hi = message["lo"][:, None], message["hi"][:, None]
        rows = lo + (hi - lo) * (rows / 255.0) ** message["power"]
    return rows.reshape(len(message["at"]), *message["shape"])


@pytest.fixture
def recording():
    rng = np.random.default_rng(1)
    with record() as recorder:
        for t in range(1, 60):
            for layer in range(2):
                scores = np.exp(rng.normal(0, 3, (12, 1, t)).astype(np.float32))
                tap("test.pattern", scores / scores.sum(-1, keepdims=True), "head query key", layer=layer)
            tap("test.values", rng.normal(0, 100, (4, 5)).astype(np.float32), "layer head")
            event("text.token", piece=f"t{t}")
            step()
    return recorder.freeze()


def sent(recording, scene, knobs, feed=None):
    messages = []
    feed = feed or Feed(messages.append)
    feed.show("run1", recording, scene, knobs)
    return messages


PATTERN = of("test.pattern", layer=knob("layer"))
SCENE = Scene("main", (Heatmaps(tensor=PATTERN, rows="query", columns="key", facet="head", focus=knob("head")),))


def test_packed_attention_decodes_within_half_a_code(recording):
    knobs = Turn(layer=1)
    messages = sent(recording, SCENE, knobs)
    picture = messages[0]
    about = picture["tracks"]["test.pattern[layer=1]"]
    rows = next(m for m in messages if m["type"] == "rows")
    assert rows["data"].dtype == np.uint8
    truth = recording.stack("test.pattern", layer=1)
    for r in range(59):
        width = rows["widths"][r]
        assert width == r + 1
        got = decoded({**rows, "power": about["power"]})[r, :, :width]
        want = truth[:, r, :width]
        # codes are spaced by squares: half a code off in the root is at most this in the value
        np.testing.assert_allclose(np.sqrt(got), np.sqrt(want), atol=0.5 / 255 + 1e-6)


def test_small_rows_travel_exactly(recording):
    view = Heatmaps(tensor=of("test.values"), rows="layer", columns="head")
    rows = sent(recording, Scene("s", (view,)), Turn())[1]
    assert rows["data"].dtype == np.float32
    np.testing.assert_array_equal(decoded(rows), recording.stack("test.values"))


def test_a_position_along_an_axis_is_picked(recording):
    tensor = of("test.pattern", layer=0, head=knob("head"))
    knobs = Turn(head=3)
    track, picks = find(recording, tensor, knobs)
    assert picks == {"head": 3}
    message = next(packed(track, picks))
    assert message["shape"] == [59]
    assert track_id(tensor, knobs) == "test.pattern[head=3,layer=0]"
    np.testing.assert_array_equal(
        exact_row(recording, tensor, knobs, 20), recording.stack("test.pattern", layer=0)[3, 20, :21]
    )
    assert exact_row(recording, tensor, knobs, 59) is None
    assert exact_row(recording, tensor, knobs, -1) is None


def test_a_feed_sends_each_row_and_each_piece_once_while_the_run_goes_on():
    messages = []
    feed = Feed(messages.append)
    with record() as recorder:
        for t in range(1, 7):
            tap("test.pattern", np.full((2, 1, t), 1 / t, np.float32), "head query key", layer=1)
            event("text.token", piece=str(t))
            step()
            if t % 2 == 0:
                feed.show("run1", recorder.so_far(), SCENE, Turn(), steps=6)
    assert [m["type"] for m in messages].count("picture") == 1
    at = np.concatenate([m["at"] for m in messages if m["type"] == "rows"])
    assert at.tolist() == [0, 1, 2, 3, 4, 5]
    assert [p for m in messages if m["type"] == "pieces" for p in m["pieces"]] == list("123456")


def test_another_run_or_layer_starts_a_new_picture(recording):
    messages = []
    feed = Feed(messages.append)
    feed.show("run1", recording, SCENE, Turn(layer=1))
    feed.show("run1", recording, SCENE, Turn(layer=1))
    once = len(messages)
    feed.show("run1", recording, SCENE, Turn(layer=0))
    assert [m["type"] for m in messages[once:]] == ["picture", "rows"]
    feed.show("run1", recording, SCENE, Turn(layer=1))
    assert [m["type"] for m in messages[once + 2 :]] == ["picture"], "rows already sent are not sent again"
    feed.show("run2", recording, SCENE, Turn(layer=1))
    assert messages[-1]["type"] == "pieces"


def test_no_message_is_too_large():
    with record(budget=100_000_000) as recorder:
        for _ in range(40):
            tap("test.values", np.zeros((300, 300), np.float32), "a b")
            step()
    track = recorder.freeze().track("test.values")
    messages = list(packed(track, {}))
    assert len(messages) > 1
    assert all(m["data"].nbytes <= MESSAGE for m in messages)
    assert sum(len(m["at"]) for m in messages) == 40


def test_views_become_plain_data():
    view = Curves(lines=(Line("loss", of("test.values", layer=knob("layer"))),), log=True)
    data = plain(view, Turn(layer=2))
    assert json.loads(json.dumps(data))["lines"][0]["tensor"] == {"track": "test.values[layer=2]"}
    assert data["kind"] == "curves"


def test_nans_and_infinities_do_not_break_packing():
    row = np.zeros((EXACT + 1,), np.float32)
    row[:3] = np.nan, np.inf, -np.inf
    with record() as recorder:
        tap("test.values", row, "a")
    message = next(packed(recorder.freeze().track("test.values"), {}))
    assert np.isfinite(message["lo"]).all()
    assert np.isfinite(message["hi"]).all()
