"""A lesson for the server's tests: it computes nothing worth knowing, at a pace that a test can set."""

import os
import time
from pathlib import Path

import numpy as np
import param

from engine.recording import event, note, site, step, tap
from lessons.knobs import Knobs
from lessons.lesson import Beat, Claim, Finding, Lesson, Mark, Predict, Scene
from lessons.views import Arithmetic, Heatmaps, Number, Numbers, Tokens, knob, of

WAVE = site("waves.matrix", "a wave for each head", symbol="W", grows="query", low=0.0, high=1.0)
LEVEL = site("waves.level", "the mean of the newest row", symbol="m")


class WavesKnobs(Knobs):
    steps = param.Integer(default=8, bounds=(1, 400), label="Steps", doc="How many steps it makes.")
    pause = param.Number(default=0.0, bounds=(0, 2), label="Pause", doc="Seconds a step takes.")
    text = param.String(default="one two three", label="Text", doc="What it reads.")
    trouble = param.Selector(default="none", objects=["none", "crash", "sentence", "memory", "greedy"], label="Trouble")
    bold = param.Boolean(default=False, label="Bold", doc="Nothing.")
    head = param.Integer(default=0, bounds=(0, 3), label="Head", doc="Which head is drawn large.")


def run(knobs):
    if mark := os.environ.get("LEANSCOPE_TEST_MARK"):
        Path(mark).touch()
    note(total_steps=knobs.steps, model={"name": "waves", "kind": "toy"})
    words = knobs.text.split()
    kept = []
    for i in range(knobs.steps):
        time.sleep(knobs.pause)
        row = (1 + np.sin(np.arange(4)[:, None] + np.arange(i + 1) / 3)) / 2
        event("text.token", piece=words[i % len(words)] + " ")
        tap(WAVE, row[:, None].astype(np.float32), "head query key")
        tap(LEVEL, np.float32(row.mean()), "")
        if i == 2 and knobs.trouble == "crash":
            raise RuntimeError("secret <script>alert(1)</script>")
        if i == 2 and knobs.trouble == "sentence":
            raise ValueError("the text has no verb.")
        if i == 2 and knobs.trouble == "memory":
            raise MemoryError
        if knobs.trouble == "greedy":
            kept.append(np.ones(40_000_000, np.uint8))
        step()


def cell(recording, knobs, at):
    value = recording.stack(WAVE)[at["head"], at["query"], at["key"]]
    return Arithmetic(f"head {at['head']}", (("W", f"{value:.6f}"),), values={"W": float(value)})


def broken(recording):
    raise ZeroDivisionError("no waves today")


LESSON = Lesson(
    slug="waves",
    title="Waves <b>and</b> water",
    question="Does a wave have a length?",
    part="Where the time goes",
    order=99,
    sources=("a test",),
    knobs=WavesKnobs,
    run=run,
    keep=lambda knobs: {"waves.*": {}},
    beats=(
        Beat("First.", scene="all", step=0),
        Beat("Then {steps}.", scene="all", predict=Predict("How many steps?", (4, 8, 16), "steps", format=",d")),
        Beat("Last.", scene="level"),
    ),
    scenes=(
        Scene(
            "all",
            (
                Heatmaps(tensor=of(WAVE), rows="query", columns="key", facet="head", focus=knob("head"), cell=cell),
                Tokens(),
            ),
        ),
        Scene("level", (Numbers(numbers=(Number("level", of(LEVEL)),)),)),
    ),
    claims=(
        Claim(
            "A wave has a length.",
            "a test",
            "n",
            "8",
            lambda r: Finding(str(r.steps), "agrees", formula=f"n = {r.steps}"),
        ),
        Claim("A wave breaks.", "a test", "1/0", "?", broken),
    ),
    code=("engine.recording:Recorder", "engine.recording:tap"),
    looks=frozenset({"head"}),
    facts=lambda r: {"steps": r.steps, "top": np.float32(r.stack(WAVE).max())},
    marks=lambda r: [Mark(r.steps - 1, "end")],
    glossary={"wave": "what water does"},
    seconds=3.0,
)
