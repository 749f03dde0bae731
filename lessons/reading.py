"""What lesson titans asks of the trained model: what its three memories did with a text, and codes told long ago."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine import checkpoints
from engine.generate import checked_ids
from engine.mixers.following import CHANGE, SURPRISE
from engine.mixers.hybrid import remixed
from engine.mixers.neural_memory import steering
from engine.mixers.softmax import PATTERN
from engine.mixers.titans_layers import MemoryAsGate
from engine.probing import asked_together
from engine.recording import Recording, note, record, site, step, tap
from engine.toyland.questions import passkey_question
from engine.toyland.stories import Grammar
from lessons.recall import here
from lessons.views import Arithmetic

FILLER = (0, 2, 4, 6, 8, 12, 16)  # sentences of six tokens between a code and the question
ASKED = 16  # codes for each
READERS = {"toy": ("full attention", "ink"), "window": ("a window alone", "alarm")}
ON, OFF = "memory on", "memory off"

RECALLED = site("reading.recalled", "how near the memory’s answer to a key is to the fact’s value; 1: the value itself",
                symbol="M(k)·v")  # fmt: skip
COURSE = site("reading.course", "how near the answer to each fact’s key is to its value, word by word",
              symbol="M(k)·v", grows="query", low=0.0, high=1.0)  # fmt: skip
SHORT = site("reading.short", "what a layer’s window looks at", grows="query", low=0.0, high=1.0)
LONG = site("reading.long", "the memory of one head after this token", symbol="M")
TASK = site("reading.task", "the share of attention on each persistent token", grows="query", low=0.0, high=1.0)
INSIDE = site(
    "reading.inside", "how surprised the trained memory of each head is", symbol="‖dℓ/dM‖", grows="query", low=0.0
)
FOUND = site("reading.found", "share of codes found", low=0.0, high=1.0)
BACK = site("reading.back", "tokens between the code and the question")


def steered(knobs: Any) -> Any:
    """The knobs in the trained layers, or nothing of theirs."""
    if not knobs.by_hand:
        return steering()
    return steering(rate=knobs.rate, momentum=knobs.momentum, forgetting=knobs.forgetting)


def trained(window: int) -> Any:
    """The trained model with windows of that size, converted without retraining; None where it is not here yet."""
    if not checkpoints.available("titans")[0]:
        return None
    model = checkpoints.load("titans")[0]
    return remixed(model, lambda layer: MemoryAsGate(model.shape, layer, window=window))


def layers_read(knobs: Any, ids: list[int]) -> dict[int, dict[str, np.ndarray]]:
    """What the trained layers did with the text: window, memory and persistent tokens, layer by layer."""
    model = trained(knobs.window)
    note(here=model is not None)
    if model is None:
        return {}
    with record(keep={"titans.*": {}, PATTERN: {}}, budget=300_000_000) as inner, steered(knobs):
        model.hidden(checked_ids(ids, model.shape.vocab)[None].to(model.embed.weight.device))
    seen = inner.freeze()
    names = {"short": PATTERN, "long": "titans.weights", "task": "titans.persistent", "inside": "titans.surprise"}
    return {
        layer: {name: seen.track(tensor, layer=layer).chunks[0].array[0] for name, tensor in names.items()}
        for layer in range(model.shape.layers)
    }


def show_layers(layers: Mapping[int, Mapping[str, np.ndarray]], t: int) -> None:
    for layer, got in layers.items():
        tap(SHORT, got["short"][:, t : t + 1, : t + 1], "head query key", layer=layer)
        tap(LONG, got["long"][:, t], "head in out", layer=layer)
        tap(TASK, got["task"][:, t : t + 1], "head query persistent", layer=layer)
        tap(INSIDE, got["inside"][:, t : t + 1].T, "query head", layer=layer)
    if not layers and not t:
        tap(SHORT, np.full((1, 1, 1), np.nan, np.float32), "head query key", layer=0)
        tap(LONG, np.full((1, 1, 1), np.nan, np.float32), "head in out", layer=0)
        tap(TASK, np.full((1, 1, 1), np.nan, np.float32), "head query persistent", layer=0)
        tap(INSIDE, np.full((1, 1), np.nan, np.float32), "query head", layer=0)


def distances(tokenizer: Any, knobs: Any) -> None:
    """Codes told ever longer ago, a point a step: memory on and off, a window alone, full attention."""
    titans, others = trained(knobs.window), here(READERS)
    for name in (ON, OFF) if titans is None else ():
        tap(FOUND, float("nan"), "", of=name)
    for name in set(READERS) - set(others):
        tap(FOUND, float("nan"), "", of=name)
    for after in FILLER:
        codes = [passkey_question(Grammar(), before=1, after=after, seed=100 * after + n) for n in range(ASKED)]
        tap(BACK, float(6 * after + 7), "")  # the full stop and the question stand between, too
        found = {name: asked_together(model, tokenizer, codes) for name, model in others.items()}
        if titans is not None:
            with steered(knobs):
                found[ON] = asked_together(titans, tokenizer, codes)
            with steering(learning=False):
                found[OFF] = asked_together(titans, tokenizer, codes)
        for name, right in found.items():
            tap(FOUND, sum(right) / ASKED, "", of=name)
        step()


def course_cell(recording: Recording, knobs: Any, at: Mapping[str, int]) -> Arithmetic:
    """What a word did to one fact."""
    t, n = at["query"], at["fact"]
    course, told = recording.stack(COURSE), recording.meta["told"]
    if not (0 <= t < len(course) and 0 <= n < len(told)):
        raise ValueError(f"there is no fact {n} at token {t}")
    pieces = [e.fields["piece"].strip() for e in recording.happened("text.token")]
    where = told[n][2]
    before, now = float(course[t - 1, n]) if t else 0.0, float(course[t, n])
    return Arithmetic(
        title=f"“{pieces[where - 1]} {pieces[where]}” when “{pieces[t]}” is read",
        lines=(
            ("M(k)·v before this word", f"{before:.3f}"),
            ("surprise of this word ‖dℓ/dM‖", f"{float(recording.stack(SURPRISE)[t]):.3f}"),
            (f"of that, θ = {knobs.rate:g} is a step", f"{knobs.rate * float(recording.stack(SURPRISE)[t]):.3f}"),
            ("how far the matrix moved", f"{float(recording.stack(CHANGE)[t]):.3f}"),
            ("M(k)·v now", f"{now:.3f}"),
        ),
        note=f"The fact was told first at token {where}. 1 is the value itself, 0 knows nothing of it.",
        vectors=(("token by token", tuple(course[:, n].tolist())),),
        values={"before": before, "now": now},
    )
