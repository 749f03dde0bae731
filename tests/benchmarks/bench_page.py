"""What a visitor waits for, in headless Chromium against a warm server: the budgets of the page, measured.

    python -m tests.benchmarks.bench_page [--rounds 5] [--real] [--lessons MODEL]

First picture and its bytes, a session's share of the server, frames a second of 32 heads of 128 by 128, a knob of a
toy lesson to its new picture, and with `--real` the first new token of SmolLM2. Medians, and the 95th percentile
of knobs. A blank page's frames are counted beside ours, since a busy machine slows both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import param
from playwright.sync_api import sync_playwright

from app.browser import find_browser
from app.link import Place, encode
from engine import smollm2
from lessons import all_lessons
from lessons.knobs import check
from tests.stage_harness import html
from tests.support import REAL, Server, Watched, serving

TURNS = 20  # knobs turned
# Scrubs on with every frame that the browser offers: how many can the stage draw?
FRAMES = """new Promise((done) => {
  const find = (node) => node.querySelector('.scrub') || [...node.querySelectorAll('*')]
    .map((n) => n.shadowRoot && find(n.shadowRoot)).find(Boolean);
  const scrub = find(document);
  const before = leanscope.frames; const end = performance.now() + 3000; let n = 0;
  const tick = () => {
    scrub.value = (n += 1) % leanscope.steps; scrub.dispatchEvent(new Event('input'));
    performance.now() < end ? requestAnimationFrame(tick) : done(leanscope.frames - before);
  };
  tick();
})"""
BLANK = """new Promise((done) => { let n = 0; const end = performance.now() + 3000;
  const tick = () => { n += 1; performance.now() < end ? requestAnimationFrame(tick) : done(n); }; tick(); })"""
# Turns a knob's slider by hand, and says how long until a frame of the new run is drawn.
TURN = """([knob, value]) => new Promise((done) => {
  const root = document.querySelector('#leanscope').firstElementChild.shadowRoot;
  const slider = root.querySelector(`#knob-${knob}`);
  const run = leanscope.run; const began = performance.now();
  slider.value = value;
  for (const kind of ['input', 'change']) slider.dispatchEvent(new Event(kind, { bubbles: true }));
  const look = () => leanscope.run !== run ? done(performance.now() - began) : setTimeout(look, 1);
  look();
})"""


# The run on the page has ended: the transport bar says how long it took.
ENDED = """leanscope?.ready && /computed in|from the cache/.test(
  document.querySelector('#leanscope').firstElementChild.shadowRoot.querySelector('.transport').textContent)"""


def address(server: Server, slug: str = "decode", **values: Any) -> str:
    lesson = all_lessons()[slug]
    knobs, problems = check(lesson.knobs, values)
    if problems:
        raise ValueError(" ".join(problems))
    return f"{server.url}/lesson/{slug}?s={encode(lesson, Place(knobs, 0, 0))}"


def first_pictures(browser: Any, url: str, *, rounds: int) -> tuple[list[float], int]:
    """Milliseconds from opening to the first picture of real data, each in a fresh profile; and the bytes of one."""
    times, sizes = [], []
    for _ in range(rounds + 1):
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        page = context.new_page()
        counted: list[int] = []
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        session.on("Network.loadingFinished", lambda event, into=counted: into.append(event["encodedDataLength"]))
        session.on(
            "Network.webSocketFrameReceived",
            lambda event, into=counted: into.append(len(event["response"]["payloadData"])),
        )
        began = time.perf_counter()
        page.goto(url, wait_until="commit")
        Watched(page).until("window.leanscope?.ready", seconds=60)
        times.append((time.perf_counter() - began) * 1e3)
        page.wait_for_timeout(300)
        sizes.append(sum(counted))
        context.close()
    return times[1:], max(sizes)


def session_cpu(server: Server, path: str, *, count: int = 40) -> float:
    """Milliseconds of the server's processor time for building one session."""
    for _ in range(3):
        urllib.request.urlopen(server.url + path).read()
    before = server.cpu()
    for _ in range(count):
        urllib.request.urlopen(server.url + path).read()
    return (server.cpu() - before) / count * 1e3


def frames(browser: Any, folder: Path) -> tuple[float, float]:
    """Frames a second of 32 heads of 128 by 128 scrubbed without pause, and of a blank page just before."""
    blank = browser.new_page()
    blank.goto("about:blank")
    possible = blank.evaluate(BLANK) / 3
    blank.close()
    file = folder / "many.html"
    file.write_text(html("many"))
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.goto(file.as_uri())
    Watched(page).until("window.leanscope?.ready", seconds=30)
    drawn = page.evaluate(FRAMES) / 3
    page.close()
    return drawn, possible


def turned(browser: Any, url: str) -> list[float]:
    """Milliseconds from a turned knob of the toy lesson to its new picture."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(url)
    Watched(page).until("window.leanscope?.ready", seconds=60)
    page.wait_for_timeout(500)
    times = []
    for value in range(20, 20 + TURNS):
        times.append(page.evaluate(TURN, ["tokens", value]))
        page.wait_for_timeout(800)
    page.close()
    return times


def first_token(browser: Any, server: Server) -> list[float]:
    """Milliseconds from asking for a run of SmolLM2 that nobody made to its first row on the page."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(address(server, model="smollm2", tokens=8))
    Watched(page).until("leanscope.ready && leanscope.steps === 8", seconds=90)
    times = []
    for value in (11, 12, 13):
        page.wait_for_timeout(500)
        times.append(page.evaluate(TURN, ["tokens", value]))
        Watched(page).until(f"leanscope.steps === {value}", seconds=90)
    page.close()
    return times


def each_lesson(browser: Any, server: Server, *, model: str) -> None:
    """Print for every lesson what a run that nobody made takes: knob to first picture, and to its end."""
    for slug, lesson in all_lessons().items():
        knobs = lesson.knobs.param.objects("existing")
        sliders = [n for n, p in knobs.items() if isinstance(p, param.Number) and n not in lesson.looks]
        if not sliders or ("model" not in knobs and model != "toy"):
            continue
        p = knobs[sliders[0]]
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        try:
            page.goto(address(server, slug, **({"model": model} if "model" in knobs else {})))
            Watched(page).until(ENDED, seconds=300)
            grain = p.step or (1 if isinstance(p, param.Integer) else (p.bounds[1] - p.bounds[0]) / 100)
            value = p.default + grain if p.default + grain <= p.bounds[1] else p.default - grain
            began = time.perf_counter()
            first = page.evaluate(TURN, [sliders[0], value])
            Watched(page).until(ENDED, seconds=300)
            print(f"{slug:16} {sliders[0]:10} first picture {first:7.0f} ms, end {time.perf_counter() - began:6.1f} s")
        except Exception as error:  # one lesson that fails shall not hide the others
            print(f"{slug:16} {type(error).__name__}: {str(error).splitlines()[0][:90]}")
        page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--real", action="store_true")
    parser.add_argument(
        "--lessons", metavar="MODEL", help="only: a new run of each lesson on this model, toy or smollm2"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        cache = Path(name)
        if smollm2.folder().is_dir():
            (cache / smollm2.folder().name).symlink_to(smollm2.folder())
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        with serving("--no-warm", cache=cache, program=REAL) as server:
            if options.lessons:
                each_lesson(browser, server, model=options.lessons)
                browser.close()
                return
            toy = address(server, model="toy", tokens=12)
            times, size = first_pictures(browser, toy, rounds=options.rounds)
            print(f"first picture          {statistics.median(times):7.0f} ms   (budget 1500)")
            print(f"bytes for it           {size / 1e6:7.2f} MB   (budget 2.5)")
            print(f"a session's CPU        {session_cpu(server, '/lesson/decode'):7.1f} ms   (budget 60)")
            knobs = sorted(turned(browser, toy))
            at95 = knobs[int(0.95 * (len(knobs) - 1))]
            print(f"knob to picture        {statistics.median(knobs):7.0f} ms   95%: {at95:.0f} ms (budget 150)")
            if options.real:
                print(
                    f"first new token        {statistics.median(first_token(browser, server)):7.0f} ms   (budget 500)"
                )
            rates = [frames(browser, cache) for _ in range(options.rounds)]
            ours, blank = statistics.median(r[0] for r in rates), statistics.median(r[1] for r in rates)
            print(f"32 heads of 128x128    {ours:7.1f} frames/s (budget 58); a blank page here: {blank:.1f}")
        browser.close()


if __name__ == "__main__":
    main()
