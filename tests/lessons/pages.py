"""A lesson's page in a test: its address, and opening it."""

from app.link import Place, encode
from lessons import all_lessons
from lessons.knobs import check
from lessons.models import TOY
from tests.support import Server, Watched

INSIDE = "document.querySelector('#leanscope').firstElementChild.shadowRoot"
# Sizes at which a lesson shows all that it has in little time.
QUICK = {
    "decode": {"tokens": 12},
    "sinks": {"tokens": 96, "window": 32},
    "heavy-hitters": {"tokens": 96, "steps": 6},
    "heads": {"steps": 10},
    "ssm": {"pairs": 4},
    "ring": {"ranks": 2, "length": 64},
    "outliers": {"tokens": 64},
    "qat": {"steps": 10},
    "prune": {"steps": 10, "seeds": 1},
    "experts": {"steps": 20},
    "contextual": {"tokens": 16},
    "offload": {"tokens": 8},
    "distil": {"steps": 20, "seeds": 1},
    "lora": {"steps": 10},
    "build": {"heads": "all", "cache": "full", "cache_bits": 16, "tokens": 96, "words": 8},
    "search": {"population": 6, "generations": 2},
    "speculate": {"tokens": 16},
}
TRAINS = ("heads", "qat", "prune", "experts", "lora", "distil")  # steps of training: more of them only take longer
REFUSED = {"search": {"budget", "memory"}}  # knobs whose low end no run can meet: their lesson says so, and its tests


def address(server: Server, slug: str, *, beat: int = 0, step: int = 0, **values: object) -> str:
    """A link into a lesson, on the toy and of QUICK's size unless `values` say otherwise."""
    lesson = all_lessons()[slug]
    toy = {"model": TOY} if "model" in lesson.knobs.names() else {}
    knobs, problems = check(lesson.knobs, {**toy, **QUICK.get(slug, {}), **values})
    assert problems == []
    return f"{server.url}/lesson/{slug}?s={encode(lesson, Place(knobs, beat, step))}"


def open_done(page: Watched, url: str) -> None:
    """Open a lesson and wait until its run is done: its claims have been measured."""
    page.open(url)
    page.until("window.leanscope?.ready", seconds=60)
    page.until(f"{INSIDE}.querySelectorAll('[role=tabpanel] table tbody tr').length > 0", seconds=200)
