"""Rooms over the network: what a hostile visitor sends does no harm, both ways to start have them, and a killed
process loses none."""

import asyncio
import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError

from app.link import decode
from app.room_socket import BURST, LARGEST, PATIENCE, TRIES
from tests.app.lessons.waves import LESSON
from tests.app.test_server import PANEL, STAGE, get
from tests.rooms import Guest, redis_running
from tests.support import Server, serving, tried

pytestmark = pytest.mark.xdist_group("rooms")  # one pair of servers for all of them

HERE = {"lesson": LESSON.slug, "knobs": {"steps": 9}, "beat": 1, "step": 4}
POLL = f"{LESSON.slug}/1"
HTML = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    """Where there is no Redis, rooms live in memory, and the tests of one process run all the same."""
    if shutil.which("redis-server") is None:
        yield ""
        return
    with redis_running() as address:
        yield address


@pytest.fixture(scope="module")
def server(redis: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--redis", redis) if redis else ()
    with serving("--no-warm", *options, cache=tmp_path_factory.mktemp("rooms"), env=STAGE) as running:
        yield running


@pytest.fixture(scope="module")
def other(redis: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Panel's own command, beside the first server."""
    if not redis:
        pytest.skip("no redis-server on this machine (Debian's package redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = ("app/site.py", "--plugins", "app.plugin", "--allow-websocket-origin", f"localhost:{port}")
    env = {**STAGE, "LEANSCOPE_REDIS": redis, "LEANSCOPE_WARM": "0"}
    with serving(*line, cache=tmp_path_factory.mktemp("more"), env=env, program=PANEL, port=port) as running:
        yield running


async def opened(server: Server, place: dict[str, Any] = HERE) -> tuple[Guest, str, str]:
    leader = await Guest.arrive(server.url)
    leader.say("open", place=place)
    told = await leader.hear("opened")
    return leader, told["code"], told["key"]


async def goes_on(leader: Guest, student: Guest, step: int) -> None:
    """Nobody else is disturbed: the leader leads, and the student follows."""
    leader.say("lead", place={**HERE, "step": step})
    while (await student.hear("place"))["place"]["step"] != step:
        pass


def test_pages_of_other_hosts_are_refused(server: Server) -> None:
    async def story() -> None:
        for origin in ("http://evil.example", server.url.replace("localhost", "localhost.evil.example"), "null"):
            with pytest.raises(HTTPClientError, match="403"):
                await Guest.arrive(server.url, origin=origin)

    tried(story)


def test_the_short_address_leads_to_the_leader(server: Server) -> None:
    async def story() -> None:
        _, code, key = await opened(server)
        for typed in (code, code.lower(), f"{code[:3]}-{code[3:]}", f"{code}/"):
            status, headers, _ = await asyncio.to_thread(get, server, f"/room/{typed}")
            assert status == 302
            path, _, query = headers["location"].partition("?")
            assert path == ("../../lesson/waves" if typed.endswith("/") else "../lesson/waves")
            room, token = re.fullmatch(r"room=(\w+)&s=([\w-]+)", query).groups()  # type: ignore[union-attr]
            place, problems = decode(LESSON, token)
            assert (room, place.knobs.steps, place.beat, place.step, problems) == (code, 9, 1, 4, [])  # type: ignore[attr-defined]
            assert key not in headers["location"]
            assert headers["cache-control"] == "no-store"
        sentences = {
            "CCCCCC": "There is no room CCCCCC",
            "abc": "A room's code has 6",
            "%3Cb%3E": "A room's code has 6",
        }
        for typed, sentence in sentences.items():
            status, headers, body = await asyncio.to_thread(get, server, f"/room/{typed}")
            assert status == 404
            assert sentence.replace("'", "&#x27;") in body.decode()
            assert headers["x-content-type-options"] == "nosniff"

    tried(story)


def test_whoever_opens_gets_link_and_qr_code_of_this_site_alone(server: Server) -> None:
    async def story() -> None:
        leader = await Guest.arrive(server.url)
        leader.say("open", place=HERE, base=f"{server.url}/under/a/prefix/")
        told = await leader.hear("opened")
        assert told["link"] == f"{server.url}/under/a/prefix/room/{told['code']}"
        assert told["qr"].startswith("data:image/svg+xml")
        assert told["key"] not in told["link"] + told["qr"]
        student = await Guest.arrive(server.url)
        joined = await student.join(told["code"], base=f"{server.url}/")
        assert joined["link"] == f"{server.url}/room/{told['code']}"
        assert "key" not in joined
        assert "qr" not in joined
        own = server.url
        for base in ("http://evil.example/", f"{own}@evil.example/", f"{own}/{'a' * 300}", "javascript:x", 7, None):
            guest = await Guest.arrive(server.url)
            assert "link" not in await guest.join(told["code"], base=base)

    tried(story)


def test_students_see_where_the_leader_is_and_vote(server: Server) -> None:
    async def story() -> None:
        leader, code, _ = await opened(server)
        student = await Guest.arrive(server.url)
        found = await student.join(code.lower(), seat="s" * 20, name=HTML, knobs={"steps": 1})
        assert (found["leads"], found["place"]["knobs"]["steps"], found["place"]["step"]) == (False, 9, 4)
        assert HTML not in json.dumps(found)
        assert (await leader.hear("people"))["count"] == 1
        await goes_on(leader, student, 6)
        for option in (0, 2):
            student.say("vote", poll=POLL, option=option)
            assert (await student.hear("voted"))["option"] == option
        while (await leader.hear("votes"))["count"] != 1:
            pass
        assert not [message for message in student.heard if "counts" in message or message["type"] == "votes"]
        leader.say("reveal", poll=POLL)
        for guest in (leader, student):
            assert (await guest.hear("revealed"))["counts"] == [0, 0, 1]
        student.say("vote", poll=POLL, option=1)
        assert "revealed" in await student.refused()
        again = await Guest.arrive(server.url)
        back = await again.join(code, seat="s" * 20)
        assert (back["mine"], back["revealed"]) == ({POLL: 2}, {POLL: [0, 0, 1]})
        leader.say("end")
        for guest in (leader, student, again):
            assert (await guest.hear("ended"))["text"] == "The room has ended."
        student.say("join", code=code)
        assert await student.refused() == f"Room {code} has ended."

    tried(story)


def test_a_student_forges_the_leader_in_vain(server: Server) -> None:
    async def story() -> None:
        leader, code, key = await opened(server)
        forger, student = await Guest.arrive(server.url), await Guest.arrive(server.url)
        await forger.join(code)
        await student.join(code)
        for forged in (
            {"type": "lead", "place": {**HERE, "step": 0}},
            {"type": "lead", "place": {**HERE, "step": 0}, "leads": True, "key": "x"},
            {"type": "reveal", "poll": POLL},
            {"type": "end"},
        ):
            forger.write(json.dumps(forged))
            assert await forger.refused() == "Only the browser that opened the room can do that."
        for wrong in ("", "x" * 43, key[:-1], key + "=", [key], {"key": key}, 7, True):
            forger.say("join", code=code, key=wrong)
            assert await forger.refused() == "This is not the key of that room."
        for _ in range(TRIES):
            forger.say("join", code=code, key="again")
            told = await forger.refused()
        assert told == "Too many attempts: load the page again.", "nobody guesses for long"
        await goes_on(leader, student, 8)
        assert not [message for message in student.heard if message["type"] in ("revealed", "ended")]

    tried(story)


BAD = [
    "",
    "null",
    "[]",
    "7",
    '"lead"',
    "{}",
    '{"type": "nope"}',
    '{"type": ["lead"]}',
    '{"type": "vote", "poll": NaN}',
    '{"type": "vote", "poll": "waves/1", "option": NaN}',
    '{"type": "vote", "poll": "waves/1", "option": 1e400}',
    '{"type": "vote", "poll": "waves/1", "option": -1e400}',
    '{"type": "vote", "poll": "waves/1", "option": "0"}',
    '{"type": "vote", "poll": "waves/1", "option": ' + "9" * 5000 + "}",
    '{"type": "vote", "poll": "waves/1", "option": {}}',
    '{"type": "vote", "poll": "' + "p" * 9000 + '", "option": 0}',
    '{"type": "vote", "poll": "\\ud800", "option": 0}',
    '{"type": "vote"',
    "[" * 20_000,
    '{"type": "open"}',
    '{"type": "open", "place": {"lesson": "waves", "knobs": {"text": "' + "x" * 9000 + '"}, "beat": 0, "step": 0}}',
    b"\x00\xff\xfe",
    b"",
]


def test_every_wrong_message_gets_one_sentence_and_harms_nobody(server: Server) -> None:
    async def story() -> None:
        leader, code, _ = await opened(server)
        student = await Guest.arrive(server.url)
        await student.join(code)
        for n, text in enumerate(BAD):
            hostile = await Guest.arrive(server.url)
            await hostile.join(code, seat="h" * 20)
            hostile.write(text)
            assert re.fullmatch(r"[A-Z][^<>{}]{8,160}[.]", await hostile.refused()), BAD[n]
            hostile.socket.close()
        await goes_on(leader, student, 3)
        student.say("vote", poll=POLL, option=1)
        await student.hear("voted")
        leader.say("reveal", poll=POLL)
        assert (await leader.hear("revealed"))["counts"] == [0, 1, 0], "no wrong vote was counted"

    tried(story)
    assert "Traceback" not in server.said()


def test_ten_megabytes_are_hung_up_on(server: Server) -> None:
    async def story() -> None:
        leader, code, _ = await opened(server)
        student, hostile = await Guest.arrive(server.url), await Guest.arrive(server.url)
        await student.join(code)
        await hostile.join(code)
        hostile.write(json.dumps({"type": "vote", "poll": POLL, "option": "x" * 10_000_000}))
        assert LARGEST < 10_000_000
        with pytest.raises((ConnectionError, OSError)):
            await hostile.hear("voted")
        await goes_on(leader, student, 2)

    tried(story)


def test_a_flood_is_told_once_and_then_hung_up_on(server: Server) -> None:
    async def story() -> None:
        leader, code, _ = await opened(server)
        student, flood = await Guest.arrive(server.url), await Guest.arrive(server.url)
        await student.join(code)
        await flood.join(code)
        for _ in range(int(BURST) + PATIENCE + 400):
            flood.say("vote", poll=POLL, option=0)
        began = time.monotonic()
        await goes_on(leader, student, 1)
        assert time.monotonic() - began < 5
        with pytest.raises(ConnectionError, match="4429"):
            await flood.hear("nothing")
        told = [message["text"] for message in flood.heard if message["type"] == "refused"]
        assert told == ["That was too much at once: some of it was left out."]
        assert len([message for message in flood.heard if message["type"] == "voted"]) < 4 * BURST

    tried(story)


def test_neither_key_nor_code_is_in_the_log(server: Server) -> None:
    async def story() -> None:
        _, code, key = await opened(server)
        back = await Guest.arrive(server.url)
        assert (await back.join(code, key=key))["leads"]
        await asyncio.to_thread(get, server, f"/room/{code}")
        assert key not in server.said()
        assert "/room/ws?" not in server.said()

    tried(story)


def test_a_killed_process_loses_no_room(server: Server, other: Server) -> None:
    """Leader and students of a killed process come to the other one, and find place, votes and rights as they were."""

    async def story() -> None:
        leader, code, key = await opened(server)
        near, far = await Guest.arrive(server.url), await Guest.arrive(other.url)
        await near.join(code, seat="n" * 20)
        found = await far.join(code, seat="f" * 20)
        assert found["place"]["step"] == HERE["step"]
        near.say("vote", poll=POLL, option=0)
        far.say("vote", poll=POLL, option=2)
        await near.hear("voted")
        await far.hear("voted")
        await goes_on(leader, far, 5)
        server.process.kill()
        server.process.wait()
        with pytest.raises(ConnectionError):
            await leader.hear("nothing")

        leader, near = await Guest.arrive(other.url), await Guest.arrive(other.url)
        assert (await leader.join(code, key=key))["leads"]
        back = await near.join(code, seat="n" * 20)
        assert (back["mine"], back["place"]["step"]) == ({POLL: 0}, 5)
        await goes_on(leader, far, 7)
        leader.say("reveal", poll=POLL)
        for guest in (near, far):
            assert (await guest.hear("revealed"))["counts"] == [1, 0, 1]

    tried(story)
