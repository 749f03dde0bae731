"""The link: what goes in comes out, and nothing that anyone could write into it does any harm."""

import base64
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import link
from app.link import LIMIT, Place, decode, encode, first, fits
from tests.app.lessons.waves import LESSON, WavesKnobs

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=300).filter(str.strip)
PLACES = st.builds(
    Place,
    st.builds(
        WavesKnobs,
        steps=st.integers(1, 400),
        pause=st.floats(0, 2),
        text=TEXTS,
        trouble=st.sampled_from(["none", "crash"]),
        bold=st.booleans(),
        head=st.integers(0, 3),
    ),
    st.integers(0, 2),
    st.integers(0, link.STEPS),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


def token_of(text: str | bytes) -> str:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def state(**fields: object) -> str:
    return token_of(json.dumps({"v": 1, **fields}))


@given(PLACES)
def test_a_place_comes_back_as_it_was(place: Place) -> None:
    token = encode(LESSON, place)
    assert len(token) <= LIMIT
    assert fits(LESSON, place)
    read, problems = decode(LESSON, token)
    assert problems == []
    assert (read.knobs.values(), read.beat, read.step) == (place.knobs.values(), place.beat, place.step)


def test_the_beginning_needs_no_token() -> None:
    assert encode(LESSON, Place(WavesKnobs())) == ""
    place, problems = decode(LESSON, "")
    assert (place.knobs.values(), place.beat, place.step, problems) == (WavesKnobs().values(), 0, 0, [])


def test_only_turned_knobs_are_in_it_and_keys_are_sorted() -> None:
    token = encode(LESSON, Place(WavesKnobs(steps=9, head=2), 1, 5))
    text = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
    assert text == '{"beat":1,"knobs":{"head":2,"steps":9},"step":5,"v":1}'


def test_a_text_too_long_for_a_link_is_left_out_of_it() -> None:
    place = Place(WavesKnobs(text="word " * 700, steps=9), 1)
    assert not fits(LESSON, place)
    read, problems = decode(LESSON, encode(LESSON, place))
    assert problems == []
    assert (read.knobs.steps, read.knobs.text, read.beat) == (9, WavesKnobs().text, 1)


BAD = {
    "no base64": "%%%",
    "html": "<script>alert(1)</script>",
    "padding inside": "e30=e30=",
    "five thousand digits": "9" * 5000,
    "five thousand digits inside": token_of('{"v":1,"knobs":{"steps":' + "9" * 1400 + "}}"),
    "too long": "A" * (LIMIT + 1),
    "no utf-8": token_of(b"\xff\xfe{}"),
    "no json": token_of("{v:1}"),
    "cut short": state(knobs={"steps": 9})[:-5],
    "a list": token_of("[1]"),
    "a number": token_of("1"),
    "no version": token_of('{"knobs":{}}'),
    "another version": token_of('{"v":2}'),
    "a version that is true": token_of('{"v":true}'),
    "a version that is 1.0": token_of('{"v":1.0}'),
    "an unknown field": state(extra=1),
    "a field twice": token_of('{"v":1,"step":1,"step":2}'),
    "a knob twice": token_of('{"v":1,"knobs":{"steps":3,"steps":4}}'),
    "nan": token_of('{"v":1,"knobs":{"pause":NaN}}'),
    "infinity": token_of('{"v":1,"knobs":{"pause":-Infinity}}'),
    "a huge float": token_of('{"v":1,"knobs":{"pause":1e999}}'),
    "deep": token_of('{"v":1,"knobs":' + "[" * 700 + "]" * 700 + "}"),
    "knobs as a list": state(knobs=[1]),
    "an unknown knob": state(knobs={"model_path": "/etc/passwd"}),
    "a knob called name": state(knobs={"name": "x"}),
    "a dunder": state(knobs={"__class__": "x"}),
    "out of range": state(knobs={"steps": 401}),
    "one of two out of range": state(knobs={"bold": True, "steps": 0}),
    "true for a number": state(knobs={"steps": True}),
    "a number for a switch": state(knobs={"bold": 1}),
    "a list for a text": state(knobs={"text": ["x"]}),
    "an empty text": state(knobs={"text": "  "}),
    "control characters": state(knobs={"text": "a\x00b\x1b[2J"}),
    "half a character": token_of('{"v":1,"knobs":{"text":"a\\ud800"}}'),
    "no such option": state(knobs={"trouble": "../../etc"}),
    "a negative beat": state(beat=-1),
    "a beat beyond": state(beat=3),
    "a beat that is true": state(beat=True),
    "a fractional step": state(step=1.5),
    "a huge step": state(step=10**30),
    "null": state(step=None),
}


@pytest.mark.parametrize("token", BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_gives_one_sentence_and_all_defaults(token: str) -> None:
    place, problems = decode(LESSON, token)
    assert (place.knobs.values(), place.beat, place.step) == (WavesKnobs().values(), 0, 0)
    assert len(problems) == 1
    assert problems[0].startswith("The link could not be followed: ")
    assert len(problems[0]) < 300


def test_html_in_a_text_is_only_text() -> None:
    text = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
    place, problems = decode(LESSON, encode(LESSON, Place(WavesKnobs(text=text))))
    assert (place.knobs.text, problems) == (text, [])


@given(st.text(max_size=3000))
def test_any_text_is_survived(token: str) -> None:
    place, problems = decode(LESSON, token)
    assert isinstance(place, Place)
    assert len(problems) <= 1


@given(JSON)
def test_any_json_is_survived(value: object) -> None:
    for token in (token_of(json.dumps(value)), state(knobs=value), state(beat=value), state(step=value)):
        place, problems = decode(LESSON, token)
        assert problems or place.knobs.values().keys() == WavesKnobs().values().keys()


@given(st.text(max_size=400), st.text(max_size=5))
def test_any_query_is_survived(query: str, name: str) -> None:
    assert isinstance(first(query, name), str)


def test_a_query_is_read_for_one_name() -> None:
    assert first("a=1?b=2&s=abc&s=def", "s") == "abc"
    assert first("?s=abc", "s") == ""
    assert first("s=%FF%FE", "s") == "��"
    assert first("&".join("a=1" for _ in range(1000)) + "&s=abc", "s") == ""
    assert first("s=" + "9" * 5000, "s") == "9" * 5000


def test_the_worst_token_is_refused_quickly() -> None:
    began = time.process_time()
    for token in BAD.values():
        decode(LESSON, token)
    assert time.process_time() - began < 1
