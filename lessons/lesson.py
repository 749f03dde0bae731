"""What a lesson is made of. A lesson is one file in this folder that ends in `LESSON = Lesson(...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal

from engine.recording import Recording
from lessons.knobs import Knobs
from lessons.views import View

PARTS = (
    "Where the time goes",
    "Share the cache",
    "The same answer, computed better",
    "Keep the right things",
    "Fewer bits",
    "Fewer weights at work",
    "Several tokens at a time",
    "Teach it cheaply",
    "Put it together",
)

# What Bokeh calls a file that it runs as an application, as Jupyter's preview does with a lesson's: then the lesson
# shows itself.
SERVED = "bokeh_app_"

Verdict = Literal["agrees", "differs", "untestable"]


@dataclass(frozen=True)
class Predict:
    """A guess before the reveal, scored against the fact called `answer`; always skippable."""

    question: str
    options: tuple[float, ...]
    answer: str
    format: str = ".1f"
    unit: str = ""


@dataclass(frozen=True)
class Do:
    """Something for the learner to do before going on: turn a knob, click a cell of a view, scrub to a step."""

    text: str
    knob: str = ""
    cell: str = ""  # a view's name
    play: bool = False


@dataclass(frozen=True)
class Beat:
    """A short text and the place that it speaks of.

    In `text`, **bold**, *emphasis*, [[term]] (a glossary entry on hover), ==words|view== (a highlight that
    lights the view) and {fact:.1f} (a measured number of this run) are understood; a blank line starts a
    paragraph. `step` is a step's number or the name of a fact that holds one; None stays where the player is.
    """

    text: str
    scene: str = ""
    step: int | str | None = None
    focus: str = ""  # the view in the spotlight
    knobs: Mapping[str, Any] = field(default_factory=dict)  # turned when the beat opens
    predict: Predict | None = None
    do: Do | None = None
    play: bool = False  # run the player from the last beat's step to this one's
    notes: str = ""  # for whoever presents


@dataclass(frozen=True)
class Scene:
    """Views over tensors of the recording, laid out in reading order on twelve columns."""

    name: str
    views: tuple[View, ...]


@dataclass(frozen=True)
class Finding:
    """What a claim came to in one run. `formula` is the claim's formula with this run's numbers in it."""

    measured: str
    verdict: Verdict
    why: str = ""
    formula: str = ""


@dataclass(frozen=True)
class Claim:
    """What a source says, and the function of the recording that says what we got."""

    text: str
    source: str
    formula: str
    reported: str
    measure: Callable[[Recording], Finding]
    unit: str = ""


@dataclass(frozen=True)
class Mark:
    """A step worth a tick on the transport bar."""

    step: int
    label: str


def _nothing(recording: Recording) -> dict[str, Any]:
    return {}


def _no_marks(recording: Recording) -> list[Mark]:
    return []


@dataclass(frozen=True)
class Lesson:
    """One lesson: its question, its knobs, what it runs, what it shows and what it claims.

    `run(knobs)` calls the engine, which taps; it is given a recorder from outside and returns nothing.
    `keep(knobs)` says which taps the recording holds (see `engine.recording.record`). `looks` are the knobs
    that only choose what is looked at: turning one draws again without running again. `bounded_by` ties a knob's
    upper end to a count of the run's model ({"layer": "layers"}: the slider ends at layers - 1). `facts` are measured
    numbers that beats and predictions use by name. `code` names what the Code tab shows ("engine.caches.sinks:Sinks").
    `snapshots` are named settings of knobs that a page without an engine has besides those that its beats ask for
    (`app/snapshots.py`): {"No sinks at all": {"sinks": 0}}.
    """

    slug: str
    title: str
    question: str
    part: str
    order: int
    sources: tuple[str, ...]
    knobs: type[Knobs]
    run: Callable[[Any], None]
    keep: Callable[[Any], Mapping[str, Mapping[str, Any]]]
    beats: tuple[Beat, ...]
    scenes: tuple[Scene, ...]
    claims: tuple[Claim, ...]
    code: tuple[str, ...]
    looks: frozenset[str] = frozenset()
    bounded_by: Mapping[str, str] = field(default_factory=dict)
    snapshots: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    facts: Callable[[Recording], dict[str, Any]] = _nothing
    marks: Callable[[Recording], list[Mark]] = _no_marks
    glossary: Mapping[str, str] = field(default_factory=dict)
    step_word: str = "step"
    footnote: str = ""  # under the claim table: whose numbers the reported ones are
    budget: int = 20_000_000
    seconds: float = 120.0  # a run that takes longer is stopped, and shows what it has
    trains: bool = False  # its run needs gradients; other runs are executed in torch's inference mode

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, not {self.part!r}")
        scenes = {scene.name for scene in self.scenes}
        views = {view.name for scene in self.scenes for view in scene.views if view.name}
        for beat in self.beats:
            if beat.scene and beat.scene not in scenes:
                raise ValueError(
                    f"a beat of {self.slug} points at the scene {beat.scene!r}; there are {sorted(scenes)}"
                )
            if beat.focus and beat.focus not in views:
                raise ValueError(f"a beat of {self.slug} points at the view {beat.focus!r}; there are {sorted(views)}")
        unknown = self.looks - set(self.knobs.names())
        if unknown:
            raise ValueError(f"looks of {self.slug} names no knob: {sorted(unknown)}")
        strange = {name for knobs in self.snapshots.values() for name in knobs} - set(self.knobs.names())
        if strange:
            raise ValueError(f"snapshots of {self.slug} names no knob: {sorted(strange)}")
        if str(self.run.__module__).startswith(SERVED):
            self.show()

    def show(self, **knobs: Any) -> Any:
        """This lesson, live, in a notebook; `knobs` are turned to what is given.

        What draws it is looked up under the entry point "leanscope: show", so that no lesson knows of a screen.
        """
        found = tuple(entry_points(group="leanscope", name="show"))
        if not found:
            raise RuntimeError("Nothing here can show a lesson: install Leanscope itself, by `pip install -e .`.")
        return found[0].load()(self, knobs)

    def run_values(self, knobs: Knobs) -> dict[str, Any]:
        """The knobs that decide what is computed: a run's identity."""
        return {name: value for name, value in knobs.values().items() if name not in self.looks}

    def scene(self, name: str) -> Scene:
        return next((s for s in self.scenes if s.name == name), self.scenes[0])
