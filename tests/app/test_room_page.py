"""Rooms in browsers: a leader and three students, each with a browser of their own, through two lessons and a poll."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from app.link import Place, encode
from lessons import all_lessons
from lessons.knobs import check
from lessons.models import TOY
from tests.support import REAL, Server, Watched, serving

pytestmark = pytest.mark.browser

INSIDE = "document.querySelector('#leanscope')?.firstElementChild?.shadowRoot"
BEAT = f"[...{INSIDE}.querySelectorAll('.dash')].findIndex((d) => d.getAttribute('aria-current') === 'step')"
ASKING = next(n for n, beat in enumerate(all_lessons()["decode"].beats) if beat.predict)
# What a student who knows the protocol could try from the page itself; what the room says comes back.
FORGE = """(messages) => new Promise((done) => {
  const heard = [];
  const socket = new WebSocket(new URL("/room/ws", location.href).href.replace("http", "ws"));
  socket.onopen = () => messages.forEach((message) => socket.send(JSON.stringify(message)));
  socket.onmessage = (event) => heard.push(JSON.parse(event.data));
  setTimeout(() => { socket.close(); done(heard); }, 1500);
})"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving("--no-warm", "--no-models", cache=tmp_path_factory.mktemp("rooms"), program=REAL) as running:
        yield running


@pytest.fixture
def people(chromium: Any) -> Iterator[list[Watched]]:
    """A leader and three students; each page fails the test by any complaint of its own."""
    contexts = [chromium.new_context(viewport={"width": 1280, "height": 900}) for _ in range(4)]
    pages = [Watched(context.new_page()) for context in contexts]
    yield pages
    for context in contexts:
        context.close()
    for page in pages:
        assert not page.wrongs, page.wrongs


def address(server: Server, slug: str, **values: object) -> str:
    lesson = all_lessons()[slug]
    knobs, problems = check(lesson.knobs, {"model": TOY, **values})
    assert problems == []
    return f"{server.url}/lesson/{slug}?s={encode(lesson, Place(knobs))}"


def text(page: Watched) -> str:
    shown: str = page.page.evaluate(f"{INSIDE}.textContent")
    return shown


def says(page: Watched, words: str, *, seconds: float = 30) -> None:
    page.until(f"{INSIDE}?.textContent.includes({json.dumps(words)})", seconds=seconds)


def press(page: Watched, name: str) -> None:
    page.page.get_by_role("button", name=name, exact=True).click()


def choose(page: Watched, option: int) -> None:
    page.page.locator(".poll-card .guess").nth(option).click()


def open_room(leader: Watched, url: str) -> str:
    leader.open(url)
    leader.until("window.leanscope?.ready", seconds=60)
    leader.page.get_by_text("More", exact=True).click()
    press(leader, "Open a room")
    leader.until(f"{INSIDE}.querySelector('dialog.invite')?.open")
    code: str = leader.page.evaluate(f"{INSIDE}.querySelector('.invite-code').textContent").replace(" ", "")
    return code


def test_a_class_follows_its_leader_through_two_lessons(server: Server, people: list[Watched]) -> None:
    leader, ann, bob, eve = people
    code = open_room(leader, address(server, "decode", tokens=12))
    link = leader.page.evaluate(f"{INSIDE}.querySelector('.invite-link').href")
    assert link == f"{server.url}/room/{code}"
    assert leader.page.evaluate(f"{INSIDE}.querySelector('.invite-qr').naturalWidth") > 20
    key = leader.page.evaluate("JSON.parse(sessionStorage.getItem('leanscope-room')).key")
    assert len(key) > 40
    press(leader, "Close")

    # By link, and by the door on the index.
    for student in (ann, eve):
        student.open(link)
        student.until("window.leanscope?.ready && leanscope.steps === 12", seconds=60)
        says(student, "You follow the leader.")
    bob.open(server.url)
    bob.until("window.leanscope?.ready", seconds=60)
    bob.page.get_by_label("Code of a room").fill(f"{code[:3]} {code[3:]}".lower())
    press(bob, "Join")
    says(bob, "You follow the leader.", seconds=60)
    says(leader, "3 students")
    assert all(key not in page.page.url + json.dumps(page.requests) for page in people)

    # Step and beat.
    leader.page.keyboard.press(".")
    leader.page.keyboard.press(".")
    step = leader.until("leanscope.step")
    for student in (ann, bob, eve):
        student.until(f"leanscope.step === {step}")
    for n in range(ASKING):
        leader.page.keyboard.press("ArrowRight")
        leader.until(f"{BEAT} === {n + 1}")

    # A poll: nothing is seen of it before the leader reveals it.
    for student in (ann, bob, eve):
        student.until(f"{BEAT} === {ASKING} && {INSIDE}.querySelector('.poll-card')")
    choose(ann, 0)
    choose(ann, 2)
    choose(bob, 2)
    choose(eve, 1)
    says(leader, "3 of 3 have voted")
    for page in people:
        assert page.page.evaluate(f"{INSIDE}.querySelector('.poll-bars').hidden")
        assert "Measured just now" not in text(page)
    says(ann, "Your vote is in.")

    # One of them forges the leader, in vain.
    poll = f"decode/{ASKING}"
    place = {"lesson": "sinks", "knobs": {}, "beat": 0, "step": 0}
    heard = eve.page.evaluate(
        FORGE,
        [
            {"type": "join", "code": code, "key": "A" * 43},
            {"type": "join", "code": code},
            {"type": "lead", "place": place, "key": "A" * 43, "leads": True},
            {"type": "reveal", "poll": poll},
            {"type": "end"},
        ],
    )
    refused = [message["text"] for message in heard if message["type"] == "refused"]
    assert refused == ["This is not the key of that room."] + 3 * ["Only the browser that opened the room can do that."]
    assert [message["leads"] for message in heard if message["type"] == "joined"] == [False]
    assert not any(message["type"] in ("revealed", "votes", "ended") for message in heard)
    for student in (ann, bob, eve):
        assert student.page.evaluate(f"leanscope.lesson === 'decode' && {INSIDE}.querySelector('.poll-bars').hidden")

    press(leader, "Reveal")
    for page in people:
        page.until(f"!{INSIDE}.querySelector('.poll-bars').hidden")
        counts = page.page.evaluate(
            f"[...{INSIDE}.querySelectorAll('.poll-count')].map((n) => parseInt(n.textContent))"
        )
        assert counts == [0, 1, 2, 0]
        says(page, "Measured just now")
    assert bob.page.evaluate(f"{INSIDE}.querySelectorAll('.poll-bar')[2].classList.contains('mine')")

    # On one's own, and back with one click.
    bob.page.keyboard.press("ArrowRight")
    says(bob, "You are on your own.")
    leader.page.keyboard.press("ArrowLeft")
    ann.until(f"{BEAT} === {ASKING - 1}")
    assert bob.page.evaluate(BEAT) == ASKING + 1
    press(bob, "Follow")
    bob.until(f"{BEAT} === {ASKING - 1}")

    # A knob: everybody's page runs the same run.
    leader.page.evaluate(
        f"(() => {{ const s = [...{INSIDE}.querySelectorAll('input[type=range]')].find((i) => i.max === '96');"
        "s.value = 17; s.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    for page in people:
        page.until("leanscope.steps === 17", seconds=60)

    # Another lesson; and a page that is loaded again is where it was.
    leader.open(address(server, "sinks", tokens=96, window=32))
    says(leader, "You lead.", seconds=60)
    for student in (ann, bob, eve):
        student.until("window.leanscope?.lesson === 'sinks'", seconds=60)
        says(student, "You follow the leader.", seconds=60)
    ann.page.reload()
    says(ann, "You follow the leader.", seconds=60)
    assert "room=" not in ann.page.url
    leader.page.keyboard.press("ArrowRight")
    for student in (ann, bob, eve):
        student.until(f"{BEAT} === 1")

    press(leader, "End the room")
    press(leader, "End it for everybody")
    for page in people:
        says(page, "The room has ended.")
        page.until(f"{INSIDE}.querySelector('.room-bar').hidden")
    ann.open(f"{server.url}/room/{code}")
    assert f"Room {code} has ended." in ann.page.inner_text("body")
    ann.forget()  # the browser itself complains of the 404


def test_a_room_is_sound_for_axe_and_scrolls_no_page_sideways(server: Server, people: list[Watched]) -> None:
    from axe_playwright_python.sync_playwright import Axe

    leader, student, *_ = people
    code = open_room(leader, address(server, "decode", tokens=12))

    def sound(page: Watched) -> None:
        for theme in ("light", "dark"):
            # Colours that fade from one theme to the other would be taken for what they are half-way.
            page.page.emulate_media(color_scheme=theme, reduced_motion="reduce")
            page.until(f"{INSIDE}.querySelector('.leanscope').dataset.theme === '{theme}'")
            found = Axe().run(page.page).response["violations"]
            grave = [violation for violation in found if violation["impact"] in ("critical", "serious")]
            assert not [f"{v['id']}: {node['html'][:160]}" for v in grave for node in v["nodes"]]
        for width in (1440, 1024, 390):
            page.page.set_viewport_size({"width": width, "height": 844})
            assert page.page.evaluate("document.scrollingElement.scrollWidth") <= width

    sound(leader)
    press(leader, "Close")
    student.open(server.url)
    student.until("window.leanscope?.ready", seconds=60)
    sound(student)
    student.open(f"{server.url}/room/{code}")
    says(student, "You follow the leader.", seconds=60)
    for n in range(ASKING):
        leader.page.keyboard.press("ArrowRight")
        leader.until(f"{BEAT} === {n + 1}")
    student.until(f"{INSIDE}.querySelector('.poll-card')")
    choose(student, 1)
    says(leader, "1 of 1 has voted")
    for page in (leader, student):
        sound(page)
    press(leader, "Reveal")
    says(student, "Measured just now")
    for page in (leader, student):
        sound(page)
