"""Rooms, with both stores: whatever people do in whatever order, one leads, all see the same, votes count once."""

import asyncio
import itertools
import json
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from app import room_store, rooms
from app.room_store import EMPTY, LIFE, PRESENT, MemoryStore, StoreError
from app.rooms import LENGTH, LETTERS, Refused, Rooms, code_of, place_of, store_maker
from lessons import all_lessons
from tests.app.lessons.waves import LESSON
from tests.rooms import Somebody, redis_running

SLUG = LESSON.slug
POLL = f"{SLUG}/1"  # the beat that asks
FIRST = {"lesson": SLUG, "knobs": {}, "beat": 0, "step": 0}
ASKING = {**FIRST, "beat": 1}
OPTIONS = 3


@pytest.fixture(autouse=True)
def _waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own lesson, and counts told at once."""
    monkeypatch.setattr(rooms, "all_lessons", lambda: {SLUG: LESSON})
    monkeypatch.setattr(rooms, "SOON", 0.0)


@pytest.fixture(scope="module", params=["memory", "redis"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "memory":
        yield ""
    else:
        with redis_running() as address:
            yield address


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Story = Callable[[Rooms, Clock], Awaitable[None]]


def told(url: str, story: Story) -> None:
    """Run a story in rooms of their own, with nothing left of earlier ones."""
    if url:
        with Redis.from_url(url) as redis:
            redis.flushall()

    async def whole() -> None:
        clock = Clock()
        own = Rooms(store_maker(url), clock=clock)
        try:
            await story(own, clock)
        finally:
            await own.close()

    asyncio.run(whole())


async def opened(own: Rooms, place: dict[str, Any] = FIRST) -> tuple[Somebody, str]:
    leader = Somebody()
    return leader, await own.open(leader, place)


async def joined(own: Rooms, code: str, seat: str) -> Somebody:
    student = Somebody()
    await own.join(student, code, seat)
    return student


def seat(number: int) -> str:
    return f"seat-{number:016d}"


marks = itertools.count()


async def settled(own: Rooms, *members: Somebody) -> None:
    """Wait until all that was told has arrived: counts are told a moment later, and Redis takes its time."""
    while own._tasks:
        await asyncio.gather(*own._tasks)
    mark = next(marks)
    inside = [member for member in members if member.code]
    for code in {member.code for member in inside}:
        await own.store.tell(code, json.dumps({"type": "mark", "mark": mark}))
    for _ in range(2000):
        if all(member.got and {"type": "mark", "mark": mark} in member.got for member in inside):
            return
        await asyncio.sleep(0.002)
    raise AssertionError("what was told did not arrive")


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(0, 4)),
        st.tuples(st.just("leave"), st.integers(0, 4)),
        st.tuples(st.just("lead"), st.integers(0, 2), st.integers(0, 50), st.integers(1, 400)),
        st.tuples(st.just("forge"), st.integers(0, 4), st.sampled_from(["lead", "reveal", "end"])),
        st.tuples(st.just("vote"), st.integers(0, 4), st.integers(-1, OPTIONS)),
        st.tuples(st.just("reveal")),
        st.tuples(st.just("wait"), st.sampled_from([1.0, PRESENT / 2])),
    ),
    max_size=25,
)


@settings(max_examples=40)
@given(ACTIONS)
def test_the_law_of_rooms(url: str, actions: list[tuple[Any, ...]]) -> None:
    async def story(own: Rooms, clock: Clock) -> None:
        leader, key = await opened(own)
        code = leader.code
        here: dict[int, Somebody] = {}
        place = place_of(FIRST)
        votes: dict[int, int] = {}
        shown: list[int] | None = None
        everybody = [leader]
        for kind, *rest in actions:
            if kind == "join" and rest[0] not in here:
                here[rest[0]] = await joined(own, code, seat(rest[0]))
                everybody.append(here[rest[0]])
            elif kind == "leave" and rest[0] in here:
                gone = here.pop(rest[0])
                await own.leave(gone)
                gone.code = ""
            elif kind == "lead":
                asked = {"lesson": SLUG, "knobs": {"steps": rest[2]}, "beat": rest[0], "step": rest[1]}
                await own.lead(leader, asked)
                place = place_of(asked)
            elif kind == "forge" and rest[0] in here:
                forger = here[rest[0]]
                forged = {"lead": (ASKING,), "reveal": (POLL,), "end": ()}[rest[1]]
                with pytest.raises(Refused, match="Only the browser that opened the room"):
                    await getattr(own, rest[1])(forger, *forged)
            elif kind == "vote" and rest[0] in here:
                good = place["beat"] == 1 and 0 <= rest[1] < OPTIONS and shown is None
                # The place travels by the store, and a vote is for where the voter's process believes the leader to be.
                await settled(own, leader, *here.values())
                if good:
                    await own.vote(here[rest[0]], POLL, rest[1])
                    votes[rest[0]] = rest[1]
                else:
                    with pytest.raises(Refused):
                        await own.vote(here[rest[0]], POLL, rest[1])
            elif kind == "reveal" and place["beat"] == 1:
                await own.reveal(leader, POLL)
                shown = shown or [list(votes.values()).count(option) for option in range(OPTIONS)]
            elif kind == "wait":
                clock.now += rest[0]
                await own.pulse()
        await settled(own, leader, *here.values())

        late = Somebody()
        found = await own.join(late, code, seat(99))
        everybody.append(late)
        assert found["place"] == place, "who joins is where the leader is"
        assert found["revealed"] == ({POLL: shown} if shown else {})
        assert await own.store.people(code, clock()) == len(here) + 1
        for student in here.values():
            seen = student.of("place")
            assert not seen or seen[-1]["place"] == place, "all see the same"
        again = Somebody()
        back = await own.join(again, code, seat(0))
        assert back["mine"] == ({POLL: votes[0]} if 0 in votes else {}), "a vote is found again"
        revealed = [message for member in everybody for message in member.of("revealed")]
        assert all(message == {"type": "revealed", "poll": POLL, "counts": shown} for message in revealed)
        assert not any(member.leads for member in everybody if member is not leader)
        assert not any(key in json.dumps(member.got) for member in everybody), "nobody is told the key"
        assert not any(member.of("votes") for member in everybody if member is not leader), (
            "only the leader sees them come"
        )
        if place["beat"] == 1 and shown is None:
            assert leader.of("votes")[-1]["count"] == len(votes), "where the leader is, the count is right"

        await own.end(leader)
        for _ in range(1000):
            if all(member.of("ended") for member in (leader, late, *here.values())):
                break
            await asyncio.sleep(0.002)
        assert all(len(member.of("ended")) == 1 for member in (leader, late, *here.values()))
        with pytest.raises(Refused, match=f"Room {code} has ended"):
            await own.join(Somebody(), code, seat(7))

    told(url, story)


def test_only_the_key_opens_the_leaders_place(url: str) -> None:
    async def story(own: Rooms, clock: Clock) -> None:
        leader, key = await opened(own)
        for wrong in ("", "x", key[:-1], key + "x", key.swapcase(), "\udcff", 7, ["x"], {"a": 1}, True, float("nan")):
            with pytest.raises(Refused, match="not the key"):
                await own.join(Somebody(), leader.code, seat(1), wrong)
        second = Somebody()
        found = await own.join(second, leader.code, seat(2), key)
        assert found["leads"]
        assert second.leads
        await own.lead(second, ASKING)
        assert (await own.where(leader.code))["beat"] == 1
        assert key not in json.dumps(found)

    told(url, story)


def test_a_room_that_is_full_takes_nobody_but_its_own(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "PEOPLE", 3)

    async def story(own: Rooms, clock: Clock) -> None:
        leader, key = await opened(own)
        students = [await joined(own, leader.code, seat(n)) for n in range(3)]
        with pytest.raises(Refused, match=f"Room {leader.code} is full: 3 people are in it"):
            await joined(own, leader.code, seat(9))
        await joined(own, leader.code, seat(1))  # the same browser in another tab
        await own.join(Somebody(), leader.code, seat(10), key)  # whoever leads always gets in
        await own.leave(students[0])
        await joined(own, leader.code, seat(9))

    told(url, story)


def test_who_was_not_seen_for_a_while_makes_room(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a process that was killed: nobody said goodbye."""
    monkeypatch.setattr(rooms, "PEOPLE", 1)

    async def story(own: Rooms, clock: Clock) -> None:
        leader, _ = await opened(own)
        assert await own.store.enter(leader.code, seat(1), clock(), 1)
        with pytest.raises(Refused, match="is full"):
            await joined(own, leader.code, seat(2))
        clock.now += PRESENT + 1
        await joined(own, leader.code, seat(2))

    told(url, story)


def test_a_room_ends_when_it_was_empty_for_a_while_and_no_sooner(url: str) -> None:
    async def story(own: Rooms, clock: Clock) -> None:
        leader, _ = await opened(own)
        code = leader.code
        for _ in range(5):  # as long as anybody is there it goes on
            clock.now += EMPTY - 1
            await own.pulse()
        await own.leave(leader)
        clock.now += EMPTY - 1
        student = await joined(own, code, seat(1))
        await own.leave(student)
        clock.now += EMPTY + 1
        with pytest.raises(Refused, match=f"Room {code} has ended"):
            await joined(own, code, seat(1))

    told(url, story)


def test_no_room_lasts_for_ever(url: str) -> None:
    async def story(own: Rooms, clock: Clock) -> None:
        leader, _ = await opened(own)
        for _ in range(int(LIFE / EMPTY) * 2 + 2):
            clock.now += EMPTY / 2
            await own.pulse()
        assert leader.of("ended")
        assert not own._rooms

    told(url, story)


def test_rooms_are_bounded_and_those_that_ended_make_place(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_store, "ROOMS", 2)
    monkeypatch.setattr("app.room_redis.ROOMS", 2)

    async def story(own: Rooms, clock: Clock) -> None:
        await opened(own)
        clock.now += EMPTY / 2
        await opened(own)
        with pytest.raises(Refused, match="too many rooms"):
            await opened(own)
        clock.now += EMPTY / 2 + 1
        await opened(own)

    told(url, story)


def test_votes_are_bounded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "PEOPLE", 2)

    async def story(own: Rooms, clock: Clock) -> None:
        leader, _ = await opened(own, ASKING)
        for n in range(3):
            student = await joined(own, leader.code, seat(n))
            if n < 2:
                await own.vote(student, POLL, n)
            else:
                with pytest.raises(Refused, match="As many have voted"):
                    await own.vote(student, POLL, 0)
            await own.leave(student)
        with pytest.raises(Refused, match="leads does not vote"):
            await own.vote(leader, POLL, 0)

    told(url, story)


@pytest.mark.parametrize(
    ("poll", "option"),
    [
        (POLL, OPTIONS),
        (POLL, -1),
        (POLL, 1.0),
        (POLL, True),
        (POLL, "1"),
        (POLL, None),
        (POLL, [0]),
        (POLL, math.nan),
        (POLL, math.inf),
        (POLL, 10**400),
        (f"{SLUG}/0", 0),
        ("", 0),
        (None, 0),
        ([POLL], 0),
        ({}, 0),
    ],
)
def test_a_vote_that_is_none_is_refused(poll: Any, option: Any) -> None:
    async def story(own: Rooms, clock: Clock) -> None:
        leader, _ = await opened(own, ASKING)
        student = await joined(own, leader.code, seat(1))
        with pytest.raises(Refused, match=r"There is no such"):
            await own.vote(student, poll, option)
        assert await own.store.votes(leader.code, POLL) == 0

    told("", story)


NAMES = ("lesson", "knobs", "beat", "step", "scene", "speed", "playing", "steps", "text")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(SLUG),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=12,
)


@given(ANYTHING)
def test_no_place_that_anyone_writes_ends_in_anything_but_a_sentence(given_place: Any) -> None:
    try:
        place = place_of(given_place)
    except Refused:
        return
    assert place_of(place) == place
    json.dumps(place, allow_nan=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"lesson": "nope"},
        {"lesson": None},
        {"knobs": {"steps": 10**9}},
        {"knobs": {"steps": math.nan}},
        {"knobs": {"nope": 1}},
        {"knobs": []},
        {"knobs": {str(n): n for n in range(65)}},
        {"beat": 3},
        {"beat": -1},
        {"beat": 1.5},
        {"beat": True},
        {"step": -1},
        {"step": 10**7},
        {"step": math.inf},
        {"step": None},
    ],
)
def test_a_place_that_is_none_is_refused_whole(url: str, changes: dict[str, Any]) -> None:
    async def story(own: Rooms, clock: Clock) -> None:
        leader, _ = await opened(own)
        student = await joined(own, leader.code, seat(1))
        with pytest.raises(Refused):
            await own.lead(leader, {**FIRST, **changes})
        assert await own.where(leader.code) == place_of(FIRST)
        assert student.of("place") == []

    told(url if changes == {"lesson": "nope"} else "", story)


@given(st.text(LETTERS, min_size=LENGTH, max_size=LENGTH))
def test_a_code_may_be_typed_as_people_type(code: str) -> None:
    for typed in (code, code.lower(), f" {code[:3]} {code[3:]} ", f"{code[:3]}-{code[3:]}".lower()):
        assert code_of(typed) == code


@pytest.mark.parametrize(
    "text",
    ["", "CDF", "CDFGHJK", "CDFGH0", "CDFGHİ", "<b>CDF", "../../", "C" * 10**6, None, 7, ["CDFGHJ"], {}],
)
def test_what_is_no_code_is_told_so(text: Any) -> None:
    with pytest.raises(Refused, match="A room's code has 6 letters and digits"):
        code_of(text)


def test_letters_look_like_no_other() -> None:
    assert not set(LETTERS) & set("0O1IL2Z5S8BU")
    assert not set(LETTERS) & set("AEIOU")
    assert len(set(LETTERS)) == len(LETTERS) == 22


def test_two_processes_share_a_room() -> None:
    """Two services on one Redis: what happens in one is heard in the other, and votes are counted together."""
    with redis_running() as address:

        async def story(own: Rooms, clock: Clock) -> None:
            other = Rooms(store_maker(address), clock=clock)
            leader, _ = await opened(own, ASKING)
            near, far = await joined(own, leader.code, seat(1)), await joined(other, leader.code, seat(2))
            await own.lead(leader, {**ASKING, "step": 7})
            await settled(own, leader, near, far)
            assert [message["place"]["step"] for message in far.of("place")] == [7]
            await asyncio.gather(own.vote(near, POLL, 0), other.vote(far, POLL, 2))
            await settled(other, leader, near, far)
            await own.reveal(leader, POLL)
            await settled(own, leader, near, far)
            assert (
                far.of("revealed") == near.of("revealed") == [{"type": "revealed", "poll": POLL, "counts": [1, 0, 1]}]
            )
            assert leader.of("people")[-1]["count"] == 2
            await other.close()

        told(address, story)


def test_a_store_that_is_away_is_told_so() -> None:
    async def story(own: Rooms, clock: Clock) -> None:
        with pytest.raises(StoreError):
            await opened(own)

    async def whole() -> None:
        own = Rooms(store_maker("unix:///nowhere/at/all"), clock=Clock())
        try:
            await story(own, Clock())
        finally:
            await own.close()

    asyncio.run(whole())
    assert isinstance(store_maker("")(None), MemoryStore)
    with pytest.raises(ValueError, match="scheme"):
        store_maker("http://example.org")(None)


def test_each_question_of_a_lesson_can_be_put_to_a_room() -> None:
    for lesson in all_lessons().values():
        for beat in lesson.beats:
            assert beat.predict is None or 2 <= len(beat.predict.options) <= 12, lesson.slug


def test_what_was_told_while_redis_was_cut_off_is_caught_up_with() -> None:
    with redis_running() as address:

        async def story(own: Rooms, clock: Clock) -> None:
            leader, _ = await opened(own)
            student = await joined(own, leader.code, seat(1))
            with Redis.from_url(address) as redis:
                await own.store.put(leader.code, json.dumps(place_of({**FIRST, "step": 9})))  # told to nobody
                assert redis.client_kill_filter(_type="pubsub") == 1
            for _ in range(2000):
                if student.of("place"):
                    break
                await asyncio.sleep(0.005)
            assert [message["place"]["step"] for message in student.of("place")] == [9]
            await own.lead(leader, {**FIRST, "step": 11})
            await settled(own, leader, student)
            assert student.of("place")[-1]["place"]["step"] == 11

        told(address, story)
