"""Knobs: what is taken, and the sentence that says why not."""

import param
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lessons.knobs import TEXT_LIMIT, Knobs, check


class Turn(Knobs):
    window = param.Integer(64, bounds=(8, 128), label="Window", doc="Slots of the cache.")
    heat = param.Number(0.5, bounds=(0, 2), label="Temperature")
    on = param.Boolean(True, label="Sink switch")
    model = param.Selector(default="smollm2", objects={"SmolLM2-135M": "smollm2", "Toyland": "toy"}, label="Model")
    text = param.String("a word", label="Text")


@pytest.mark.parametrize(
    ("given_", "sentence"),
    [
        ({"window": 7}, "Window must be from 8 to 128, not 7."),
        ({"window": True}, "Window must be a whole number, not True."),
        ({"window": 10**5000}, "Window must be from 8 to 128, not a number of more than 20 digits."),
        ({"window": 9.5}, "Window must be a whole number, not 9.5."),
        ({"window": "many"}, "Window must be a whole number, not “many”."),
        ({"window": None}, "Window must be a whole number, not None."),
        ({"heat": float("nan")}, "Temperature must be a number, not nan."),
        ({"heat": float("inf")}, "Temperature must be from 0 to 2, not inf."),
        ({"on": "perhaps"}, "Sink switch must be on or off, not “perhaps”."),
        ({"model": "gpt-5"}, "Model must be one of smollm2, toy, not “gpt-5”."),
        ({"model": ["toy"]}, "Model must be one of smollm2, toy, not ['toy']."),
        ({"text": " \n"}, "Text is empty; type at least one word."),
        ({"text": "x" * (TEXT_LIMIT + 1)}, "Text has 4,001 characters; at most 4,000 fit."),
        ({"text": "a\0b"}, "Text holds control characters; plain text is expected."),
        ({"text": 3}, "Text must be text, not 3."),
        ({"nope": 1}, "There is no knob called “nope”; this lesson has window, heat, on, model, text."),
        ({"name": "x"}, "There is no knob called “name”; this lesson has window, heat, on, model, text."),
    ],
)
def test_what_does_not_fit_gets_one_sentence_and_the_default(given_, sentence):
    knobs, problems = check(Turn, given_)
    assert problems == [sentence]
    assert knobs.values() == Turn().values()


def test_what_fits_is_taken_and_text_from_a_command_line_is_read():
    knobs, problems = check(Turn, {"window": "32", "heat": "1.5", "on": "off", "model": "toy", "text": "<b>🙂</b>"})
    assert problems == []
    assert knobs.values() == {"window": 32, "heat": 1.5, "on": False, "model": "toy", "text": "<b>🙂</b>"}
    assert isinstance(knobs.window, int)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*Turn.names(), "zz"]), json_values))
def test_nothing_from_outside_raises(values):
    knobs, problems = check(Turn, values)
    assert 8 <= knobs.window <= 128
    assert len(problems) <= len(values)
    assert all(p.endswith(".") and len(p) < 200 for p in problems)


def test_the_spec_has_all_that_a_widget_needs():
    spec = {entry["name"]: entry for entry in Turn.spec()}
    assert list(spec) == ["window", "heat", "on", "model", "text"]
    assert spec["window"] == {
        "name": "window",
        "label": "Window",
        "doc": "Slots of the cache.",
        "default": 64,
        "kind": "slider",
        "low": 8,
        "high": 128,
        "step": 1,
    }
    assert spec["model"]["options"][1] == {"value": "toy", "label": "Toyland"}
