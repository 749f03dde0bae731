"""Jupyter Server, as a JupyterHub gives it to each user: under a path, behind a proxy. Its preview opens lessons."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app import fonts
from app.link import Place, encode
from lessons import all_lessons
from tests.support import REAL, ROOT, Watched, environment, serving

BASE = "/user/ann/"
TOKEN = "a-token-of-the-tests"
INSIDE = "[...document.querySelectorAll('*')].find(e => e.shadowRoot?.querySelector('.leanscope')).shadowRoot"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Proxy(threading.Thread):
    """A proxy in front, as a hub has one: it hands on bytes, WebSockets too, to the server behind `target`."""

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self.target = target
        self.front = socket.create_server(("127.0.0.1", 0))
        self.port = self.front.getsockname()[1]
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.front.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pipe, args=(source, sink), daemon=True).start()

    def _pipe(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address, by the proxy, of a Jupyter Server whose folder is this checkout; toys alone."""
    home = tmp_path_factory.mktemp("jupyter")
    port = free_port()
    env = environment(home / "cache", {"LEANSCOPE_NO_MODELS": "1", "OMP_NUM_THREADS": "1"})
    env |= {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    if built := fonts.folder():
        link = home / "cache" / built.relative_to(fonts.cache_folder())
        link.parent.mkdir(parents=True)
        link.symlink_to(built)
    env["IPYTHONDIR"] = str(home / "ipython")
    options = [f"--ServerApp.{name}" for name in (f"port={port}", f"base_url={BASE}", f"root_dir={ROOT}")]
    command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--ip=127.0.0.1", *options]
    command += [f"--IdentityProvider.token={TOKEN}", *(["--allow-root"] if os.geteuid() == 0 else [])]
    log = (home / "log").open("w")
    process = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 200
        while "is running at" not in (home / "log").read_text():
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.1)
        proxy = Proxy(port)
        yield f"http://127.0.0.1:{proxy.port}{BASE}"
        proxy.front.close()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def ask(url: str, token: str = "") -> tuple[int, str]:
    headers = {"Authorization": f"token {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def kernels(jupyter: str) -> list[Any]:
    return json.loads(ask(f"{jupyter}api/kernels", TOKEN)[1])


def test_without_the_token_nothing_opens_and_nothing_runs(jupyter: str) -> None:
    for slug in ("decode", "sinks"):
        for token in ("", "another"):
            status, body = ask(f"{jupyter}panel-preview/render/lessons/{slug}.py?token={token}")
            assert status == 403
            assert "bokeh" not in body.lower()
    assert kernels(jupyter) == []


def preview(page: Watched, jupyter: str, file: str, query: str = "") -> None:
    """Open a file's preview; a kernel that is too slow on a busy machine is asked once more."""
    for _ in range(2):
        page.open(f"{jupyter}panel-preview/render/{file}?token={TOKEN}{query}", timeout=150_000)
        if "Kernel Error" not in page.page.title():
            return
    raise AssertionError(page.page.inner_text("body"))


@pytest.mark.parametrize("slug", ["decode", "sinks"])
def test_a_lessons_file_opens_as_its_page_and_stays_alive(jupyter: str, chromium_page: Watched, slug: str) -> None:
    lesson = all_lessons()[slug]
    low = lesson.knobs.param["tokens"].bounds[0]
    query = f"&s={encode(lesson, Place(lesson.knobs(model='toy', tokens=low)))}"
    preview(chromium_page, jupyter, f"lessons/{slug}.py", query)
    chromium_page.until("window.leanscope?.ready && leanscope.steps > 0", seconds=60)
    chromium_page.until(f"leanscope.steps === {low}", seconds=60)
    text = chromium_page.page.evaluate(f"{INSIDE}.querySelector('main').textContent")
    assert lesson.question in text
    assert "followed" not in text, "the link's knobs must hold"
    if fonts.folder():
        chromium_page.until("[...document.fonts].filter(f => f.status === 'loaded').length >= 3")
    # A knob runs the engine in the kernel, and the address follows.
    chromium_page.page.evaluate(
        f"""(() => {{
            const label = [...{INSIDE}.querySelectorAll("label")].find((l) => /tokens/i.test(l.textContent));
            const slider = {INSIDE}.getElementById(label.htmlFor);
            slider.value = {low + 2};
            for (const kind of ["input", "change"]) slider.dispatchEvent(new Event(kind, {{ bubbles: true }}));
        }})()"""
    )
    chromium_page.until(f"leanscope.steps >= {low + 2} && location.search.startsWith('?s=')", seconds=60)
    assert f"/lessons/{slug}.py?s=" in chromium_page.page.url
    others = chromium_page.page.evaluate(f"[...{INSIDE}.querySelectorAll('.crumbs .menu a')].map((a) => a.href)")
    assert any(href.endswith("/lessons/heads.py") for href in others)
    assert len(kernels(jupyter)) == 1
    chromium_page.page.goto("about:blank")
    deadline = time.monotonic() + 20
    while kernels(jupyter):
        assert time.monotonic() < deadline, "a kernel outlives its page"
        time.sleep(0.1)
    # Panel's page asks for an icon that its extension does not serve.
    chromium_page.wrongs[:] = [wrong for wrong in chromium_page.wrongs if "404 (Not Found)" not in wrong]


def test_our_own_server_under_a_path_behind_a_proxy(tmp_path: Path, chromium_page: Watched) -> None:
    """As a service of a hub, or behind jupyter-server-proxy."""
    port = free_port()
    proxy = Proxy(port)
    origin = ("--allow-origin", f"127.0.0.1:{proxy.port}")
    with serving(
        "--prefix", "/services/lean/", *origin, "--no-warm", "--no-models", cache=tmp_path, program=REAL, port=port
    ) as server:
        assert server.url.endswith("/services/lean")
        site = f"http://127.0.0.1:{proxy.port}/services/lean"
        assert ask(f"{site}/healthz")[0] == 200
        assert ask(f"http://127.0.0.1:{proxy.port}/healthz")[0] == 404
        status, body = ask(f"{site}/lesson/nope")
        assert status == 404
        assert re.search(r'href="\.\./"', body), "the way home stays under the path"
        chromium_page.open(site)
        chromium_page.until("location.pathname === '/services/lean/'")
        inside = "document.querySelector('#leanscope').firstElementChild?.shadowRoot"
        chromium_page.until(f"{inside}?.querySelector('a[href$=\"lesson/decode\"]')")
        chromium_page.open(f"{site}/lesson/decode")
        chromium_page.until("window.leanscope?.ready && leanscope.steps > 0", seconds=60)
        assert all("/services/lean" in url for url in chromium_page.requests if url.startswith("http"))
    proxy.front.close()
    chromium_page.forget()  # the server went away under the page


@pytest.mark.parametrize("prefix", ["a b", "/x/../y", "http://else.where/x", "/a//b"])
def test_a_prefix_that_is_no_path(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    from app.cli import main

    assert main(["serve", "--prefix", prefix]) == 2
    assert "a prefix is a path" in capsys.readouterr().err
