"""The server as people and machines meet it: addresses, headers, hostile requests, WebSockets, both ways to start."""

import asyncio
import gzip
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from app.link import Place, encode
from tests.app.lessons.waves import LESSON, WavesKnobs
from tests.support import OWN, ROOT, SOCKETS, Server, Visitor, environment, serving, tried

STAGE = {"LEANSCOPE_TEST_STAGE": "1"}
PANEL = ("-m", "tests.app.server", "panel")


@pytest.fixture(scope="module", params=["leanscope serve", "panel serve"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same pages by both documented ways."""
    cache = tmp_path_factory.mktemp("server")
    if request.param == "leanscope serve":
        with serving(cache=cache, env=STAGE) as running:
            yield running
    else:
        # As in the README and the Procfile.
        line = ("app/site.py", "--plugins", "app.plugin", "--unused-session-lifetime", "90000")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        origin = ("--allow-websocket-origin", f"localhost:{port}", "--websocket-max-message-size", "1000000")
        with serving(*line, *origin, cache=cache, env=STAGE, program=PANEL, port=port) as running:
            yield running


def get(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One request, its path sent as it is."""
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def unexpected(server: Server) -> bool:
    """Whether its log tells of an error besides the one claim of this lesson that is meant to fail."""
    return server.said().count("Traceback") > server.said().count("ZeroDivisionError: no waves today")


def page(server: Server, path: str = "/lesson/waves") -> str:
    status, _, body = get(server, path)
    assert status == 200, body[:300]
    return body.decode()


def test_both_pages_are_there(server: Server) -> None:
    home, lesson = page(server, "/"), page(server)
    assert "<title>Leanscope</title>" in home
    assert "<title>Waves &lt;b&gt;and&lt;/b&gt; water · Leanscope</title>" in lesson
    for text in (home, lesson):
        assert '<html lang="en">' in text
        assert 'name="viewport"' in text
        assert text.count('name="theme-color"') == 2
        assert "<noscript>" in text
        assert "prefers-color-scheme:dark" in text


def test_a_page_names_only_files_of_this_server_that_exist(server: Server) -> None:
    for path in ("/", "/lesson/waves"):
        text = page(server, path)
        assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", text)
        assert not re.search(r"<script(?![^>]*\bsrc=)", text), "an inline script would break the policy"
        names = re.findall(r'(?:src|href)="(?:\.\./|\./)(assets/[^"]+)"', text)
        assert len(names) >= 6
        for name in names:
            assert get(server, f"/{name}")[0] == 200


def test_files_are_packed_and_kept(server: Server) -> None:
    total = 0
    for name in set(re.findall(r"assets/[^\"]+", page(server))):
        status, headers, plain = get(server, f"/{name}")
        assert (status, "content-encoding" in headers) == (200, False)
        assert "immutable" in headers["cache-control"]
        _, headers, packed = get(server, f"/{name}", Accept_Encoding="gzip, br")
        assert (gzip.decompress(packed) if headers.get("content-encoding") == "gzip" else packed) == plain
        assert headers["vary"] == "Accept-Encoding"
        assert headers["content-type"].startswith("text/javascript") or name.endswith(".svg")
        total += len(packed)
        assert get(server, f"/{name}", "HEAD")[2] == b""
    assert 300_000 < total < 1_000_000


@pytest.mark.parametrize(
    "path", ["/", "/lesson/waves", "/lesson/nope", "/assets/nope.js", "/fonts/nope.woff2", "/healthz"]
)
def test_every_answer_carries_the_headers(server: Server, path: str) -> None:
    _, headers, _ = get(server, path)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["script-src"] == "'self' blob:"
    assert "unsafe-eval" not in headers["content-security-policy"]
    assert policy["frame-ancestors"] == "'self'"
    assert policy["default-src"] == "'none'"
    assert "server" not in headers


def test_a_host_that_is_none_does_not_get_into_the_policy(server: Server) -> None:
    for host in ("evil.example; script-src *", "a b", "<script>", "x\ty"):
        _, headers, _ = (
            get(server, "/healthz", Host=host) if host.isprintable() else (0, {"content-security-policy": ""}, b"")
        )
        assert "evil" not in headers.get("content-security-policy", "")
        assert "<" not in headers.get("content-security-policy", "")


def test_an_unknown_lesson_is_told_friendly(server: Server) -> None:
    for path in (
        "/lesson/nope",
        "/lesson/%3Cscript%3Ealert(1)%3C/script%3E",
        "/lesson/waves%00",
        "/lesson/" + "9" * 5000,
    ):
        status, _, body = get(server, path)
        assert status == 404
        assert b"There is no such" in body
        assert b'href="../' in body
        assert b"<script>alert" not in body


def test_head_tells_that_a_page_is_there_and_makes_no_session(server: Server) -> None:
    page(server)  # everything is loaded
    before = server.cpu()
    for _ in range(200):
        status, _, body = get(server, "/lesson/waves?s=abc", "HEAD")
        assert (status, body) == (200, b"")
    assert (server.cpu() - before) / 200 < 0.004, "a session was built"
    assert get(server, "/lesson/nope", "HEAD")[0] == 404
    assert get(server, "/", "HEAD")[0] == 200


def test_a_slash_too_many_is_corrected(server: Server) -> None:
    status, headers, _ = get(server, "/lesson/waves/?s=abc")
    assert (status, headers["location"]) == (301, "../waves?s=abc")
    assert get(server, "/lesson/%2F%2Fevil.example/")[0] == 404


QUERIES = [
    "a=1?b=2",
    "layer=" + "9" * 5000,
    "s=" + "9" * 5000,
    "s=%%%",
    "s=<script>alert(1)</script>",
    "s=%3Cscript%3Ealert(1)%3C/script%3E&s=2",
    "%FF%FE=%00",
    "s=%FF%FE",
    "&&&===;;;",
    "bokeh-session-id=",
    "bokeh-session-id=abc",
    "bokeh-token=abc",
    "bokeh-session-id=abc&bokeh-token=abc",
    "bokeh-absolute-url=%FF",
    "bokeh-app-path=//evil.example",
    "theme=%FF",
    "x=" + "[" * 3000,
    "&".join(f"a{i}={i}" for i in range(500)),
    "present=" + "1" * 5000,
    "s=" + encode(LESSON, Place(WavesKnobs(steps=9))),
]


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_no_query_ends_in_an_error(server: Server, query: str) -> None:
    for path in ("/", "/lesson/waves"):
        status, _, body = get(server, f"{path}?{query}")
        assert status == 200
        assert b'id="leanscope"' in body
        assert b"<script>alert" not in body
        assert b"evil" not in body


@pytest.mark.parametrize(
    "path",
    [
        "/assets/../app/cli.py",
        "/assets/..%2f..%2fetc%2fpasswd",
        "/assets/%2e%2e/pyproject.toml",
        "/fonts/../../etc/passwd.woff2",
        "/fonts/%2e%2e.woff2",
        "/fonts/inter.ttf",
        "/lesson/../../etc/passwd",
        "/nothing",
    ],
)
def test_nothing_else_can_be_read(server: Server, path: str) -> None:
    assert get(server, path)[0] == 404


def test_the_health_of_the_server_can_be_asked(server: Server) -> None:
    status, headers, body = get(server, "/healthz")
    assert (status, json.loads(body)["status"]) == (200, "ok")
    assert headers["cache-control"] == "no-store"


def test_other_methods_are_refused(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert get(server, "/lesson/waves", method, Content_Length="0")[0] == 405


def test_a_visitor_gets_the_run_and_turns_a_knob(server: Server) -> None:
    async def story() -> None:
        url = f"{server.url}/lesson/waves"
        visitor = await Visitor.arrive(url, page(server))
        visitor.say({"type": "ready"})
        facts = await visitor.hear_type("facts")
        assert facts["facts"]["steps"] == 8
        visitor.say({"type": "knobs", "values": {"steps": 12}})
        facts = await visitor.hear(lambda m: m["type"] == "facts" and m["facts"]["steps"] == 12)
        rows = visitor.of_type("rows")[-1]
        assert rows["data"].dtype == "float32"
        link = visitor.of_type("link")[-1]["href"]
        linked = await Visitor.arrive(url, page(server, f"/lesson/{link}"))
        linked.say({"type": "ready"})
        assert (await linked.hear_type("facts"))["facts"]["steps"] == 12
        visitor.socket.close()
        linked.socket.close()

    tried(story)


def test_the_first_rows_of_a_new_run_come_while_it_runs(server: Server) -> None:
    async def story() -> None:
        visitor = await Visitor.arrive(f"{server.url}/lesson/waves", page(server))
        visitor.say({"type": "ready"})
        await visitor.hear_type("facts")
        visitor.say({"type": "knobs", "values": {"steps": 250, "pause": 0.01}})
        run = (await visitor.hear(lambda m: m["type"] == "run" and m["state"] == "running"))["run"]
        rows = await visitor.hear(lambda m: m["type"] == "rows" and m["run"] == run)
        assert len(rows["at"]) < 250
        assert not any(m["type"] == "run" and m["run"] == run and m["state"] == "done" for m in visitor.heard)
        visitor.socket.close()

    tried(story)


def test_a_bad_link_opens_the_lesson_with_a_sentence(server: Server) -> None:
    async def story() -> None:
        text = page(server, "/lesson/waves?s=%3Cscript%3E")
        visitor = await Visitor.arrive(f"{server.url}/lesson/waves", text)
        start = _start(visitor.document)
        reason = "it holds characters that no link of ours has."
        assert start["notices"] == [f"The link could not be followed: {reason} Everything is at its defaults."]
        assert start["knobs"] == WavesKnobs().values()
        visitor.socket.close()

    tried(story)


def _start(document: dict[str, Any]) -> dict[str, Any]:
    return document["roots"][0]["attributes"]["data"]["attributes"]["start"]


def knock(server: Server, origin: str, token: str) -> int:
    """The answer to a WebSocket's handshake."""
    wanted = {"Upgrade": "websocket", "Connection": "Upgrade", "Origin": origin, "Sec-WebSocket-Version": "13"}
    wanted |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol": f"bokeh, {token}"}
    return get(server, "/lesson/waves/ws", **wanted)[0]


def test_another_sites_page_cannot_open_a_websocket(server: Server) -> None:
    port = urlsplit(server.url).port
    token = re.search(r"token&quot;: &quot;([^&]+)&quot;", page(server))[1]  # type: ignore[index]
    assert knock(server, f"http://localhost:{port}", token) == 101
    for origin in ("http://evil.example", f"http://localhost.evil.example:{port}", f"http://localhost:{port}1", "null"):
        assert knock(server, origin, token) == 403


@pytest.mark.parametrize("token", ["abc", "a.b", "", "eyJzZXNzaW9uX2lkIjoiYWJjIn0", "<script>", "é"])
def test_a_session_that_is_not_here_is_closed_cleanly(server: Server, token: str) -> None:
    async def story() -> None:
        port = urlsplit(server.url).port
        request = HTTPRequest(f"ws://localhost:{port}/lesson/waves/ws", headers={"Origin": f"http://localhost:{port}"})
        try:
            socket = await websocket_connect(request, subprotocols=["bokeh", token] if token else ["bokeh"])
        except (HTTPClientError, UnicodeEncodeError):
            return
        SOCKETS.append(socket)
        assert await asyncio.wait_for(socket.read_message(), 5) is None

    tried(story)
    assert get(server, "/healthz")[0] == 200


def test_hostile_messages_do_not_break_a_session(server: Server) -> None:
    async def story() -> None:
        visitor = await Visitor.arrive(f"{server.url}/lesson/waves", page(server))
        visitor.say({"type": "ready"})
        await visitor.hear_type("facts")
        for message in (
            None,
            7,
            "ready",
            ["ready"],
            {},
            {"type": None},
            {"type": ["knobs"]},
            {"type": "__init__"},
            {"type": "close"},
            {"type": "knobs"},
            {"type": "knobs", "values": {"steps": 10**400, "pause": float("nan"), "text": "x" * 500_000}},
            # The latest knobs win: those before may never be looked at.
            {"type": "knobs", "values": {"pause": float("inf"), "model": "../../etc/passwd", "steps": 10**400}},
            {"type": "place", "beat": 10**30, "step": -1},
            {"type": "cell", "view": 0, "at": {"head": 10**30}},
            {"type": "download", "what": "../../etc/passwd"},
            {"type": "tensor", "key": "<img src=x onerror=alert(1)>", "step": 0},
        ):
            visitor.say(message)
        visitor.say({"type": "ping"})
        await visitor.hear_type("pong")
        notices = [notice["text"] for notice in visitor.of_type("notice")]
        assert "Steps must be from 1 to 400, not a number of more than 20 digits." in notices
        visitor.socket.close()

    tried(story)
    assert not unexpected(server)


def test_a_browser_cannot_write_into_the_page_of_the_server(server: Server) -> None:
    """A PATCH-DOC that sets a property changes the sender's own document and nothing that the server reads."""

    async def story() -> None:
        visitor = await Visitor.arrive(f"{server.url}/lesson/waves", page(server))
        visitor.say({"type": "ready"})
        await visitor.hear_type("facts")
        data = visitor.document["roots"][0]["attributes"]["data"]["id"]
        event = {"kind": "ModelChanged", "model": {"id": data}, "attr": "lesson", "new": {"type": "map", "entries": []}}
        visitor._send("PATCH-DOC", {"events": [event]})
        visitor.say({"type": "knobs", "values": {"steps": 9}})
        await visitor.hear(lambda m: m["type"] == "facts" and m["facts"]["steps"] == 9)
        visitor.socket.close()

    tried(story)


def test_a_message_too_large_closes_that_session_alone(server: Server) -> None:
    async def story() -> None:
        one, two = [await Visitor.arrive(f"{server.url}/lesson/waves", page(server)) for _ in range(2)]
        one.say({"type": "knobs", "values": {"text": "x" * 2_000_000}})
        with pytest.raises(ConnectionError):
            await one.hear_type("pong", seconds=10)
        two.say({"type": "ready"})
        await two.hear_type("facts")
        two.socket.close()

    tried(story)


def test_sessions_do_not_mix(server: Server) -> None:
    async def story() -> None:
        visitors = [await Visitor.arrive(f"{server.url}/lesson/waves", page(server)) for _ in range(5)]
        for i, visitor in enumerate(visitors):
            visitor.say({"type": "ready"})
            visitor.say({"type": "knobs", "values": {"steps": 20 + i, "text": f"visitor{i}"}})
        for i, visitor in enumerate(visitors):
            await visitor.hear(lambda m, i=i: m["type"] == "facts" and m["facts"]["steps"] == 20 + i)  # type: ignore[misc]
            pieces = {p for m in visitor.of_type("pieces")[1:] for p in m["pieces"]}
            assert not any(f"visitor{j} " in pieces for j in range(5) if j != i)
            visitor.socket.close()

    tried(story)


def test_a_slow_visitor_does_not_hold_up_another(server: Server) -> None:
    """While one session streams a long run, pages are built and other sessions answer."""

    async def story() -> None:
        busy = await Visitor.arrive(f"{server.url}/lesson/waves", page(server))
        busy.say({"type": "ready"})
        busy.say({"type": "knobs", "values": {"steps": 280, "pause": 0.01}})
        await busy.hear(lambda m: m["type"] == "run" and m["total"] == 280)
        other = await Visitor.arrive(f"{server.url}/lesson/waves", await asyncio.to_thread(page, server))
        other.say({"type": "ready"})
        await other.hear_type("facts")
        assert not any(m["type"] == "run" and m["state"] == "done" and m["total"] == 280 for m in busy.heard)
        busy.socket.close()
        other.socket.close()

    tried(story)


def test_who_closes_the_page_takes_the_run_along(server: Server) -> None:
    async def story() -> None:
        visitor = await Visitor.arrive(f"{server.url}/lesson/waves", page(server))
        visitor.say({"type": "ready"})
        visitor.say({"type": "knobs", "values": {"steps": 290, "pause": 0.05}})
        await visitor.hear(lambda m: m["type"] == "rows" and m["start"] > 5)
        assert json.loads(get(server, "/healthz")[2])["runs"]["live"] == 1
        visitor.socket.close()
        began = time.monotonic()
        while json.loads(get(server, "/healthz")[2])["runs"]["live"]:
            assert time.monotonic() - began < 8, "it runs on for nobody: alone it takes 14 seconds"
            await asyncio.sleep(0.05)

    tried(story)


# One server of its own for each of these


def test_a_port_in_use_gets_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, *OWN, "serve", "--port", str(port)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"leanscope: Port {port} is in use. Choose another with --port, or --port 0 for any that is free.\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_stops_cleanly_while_it_runs_a_lesson(tmp_path: Path, number: signal.Signals) -> None:
    with serving("--no-warm", cache=tmp_path, env=STAGE) as server:

        async def story() -> None:
            visitor = await Visitor.arrive(f"{server.url}/lesson/waves", page(server))
            visitor.say({"type": "ready"})
            visitor.say({"type": "knobs", "values": {"steps": 400, "pause": 0.005}})
            await visitor.hear(lambda m: m["type"] == "rows" and m["start"] > 10)

        tried(story)
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
        assert not unexpected(server)


def test_a_restarted_server_closes_old_sessions_and_serves_new_ones(tmp_path: Path) -> None:
    with serving(cache=tmp_path, env=STAGE) as server:
        old = page(server)
        port = urlsplit(server.url).port or 0
        server.process.kill()
        server.process.wait()
    with serving(cache=tmp_path, env=STAGE, port=port) as server:

        async def story() -> None:
            with pytest.raises(ConnectionError, match="4404"):
                await Visitor.arrive(f"{server.url}/lesson/waves", old)
            visitor = await Visitor.arrive(f"{server.url}/lesson/waves", page(server))
            visitor.say({"type": "ready"})
            await visitor.hear_type("facts")
            assert visitor.of_type("run")[-1]["cached"] is True

        tried(story)


def test_frames_and_origins_can_be_allowed(tmp_path: Path) -> None:
    env = {**STAGE, "LEANSCOPE_FRAME_ANCESTORS": "'self' https://lms.example", "LEANSCOPE_ALLOW_ORIGIN": "a.example"}
    with serving("--allow-origin", "b.example:8443", "--no-warm", cache=tmp_path, env=env) as server:
        _, headers, _ = get(server, "/lesson/waves")
        assert "frame-ancestors 'self' https://lms.example" in headers["content-security-policy"]

        async def story() -> None:
            for origin in ("https://a.example", "https://b.example:8443"):
                await Visitor.arrive(f"{server.url}/lesson/waves", page(server), origin=origin)

        tried(story)
        assert knock(server, "https://c.example", "a.b") == 403


def test_a_cache_folder_that_cannot_be_written_is_told_where_people_look(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    env = {**STAGE, "LEANSCOPE_CACHE": str(tmp_path / "file")}
    with serving(cache=tmp_path / "log", env=env) as server:

        async def story() -> None:
            visitor = await Visitor.arrive(f"{server.url}/lesson/waves", page(server))
            (notice,) = _start(visitor.document)["notices"]
            assert notice.startswith(f"The folder {tmp_path / 'file' / 'runs'} can't be written")
            visitor.say({"type": "ready"})
            await visitor.hear_type("facts")

        tried(story)
        end = time.monotonic() + 5
        while "can't be written" not in server.said():
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.mark.slow
def test_sessions_that_are_gone_leave_nothing_behind(tmp_path: Path) -> None:
    """After 120 visits the process holds about what it held after 40."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = (
        "app/site.py",
        "--plugins",
        "app.plugin",
        "--unused-session-lifetime",
        "300",
        "--check-unused-sessions",
        "300",
    )
    with serving(*line, cache=tmp_path, env=STAGE, program=PANEL, port=port) as server:

        def resident() -> int:
            return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096

        async def visits(count: int) -> None:
            for _ in range(count):
                visitor = await Visitor.arrive(f"{server.url}/lesson/waves", page(server))
                visitor.say({"type": "ready"})
                await visitor.hear_type("facts")
                visitor.socket.close()
            await asyncio.sleep(1.5)

        tried(lambda: visits(40))
        before = resident()
        tried(lambda: visits(80))
        assert resident() - before < 15_000_000
