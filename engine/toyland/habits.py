"""What a trained model can be taught later: a way of speaking, and facts that no story told.

Both are processes (see `entropy`), so their perplexity has an exact floor too. They use words that training text
never holds: a base model gives them next to no probability until it is fine-tuned.
"""

from __future__ import annotations

import random

from engine.toyland.entropy import Process, any_of
from engine.toyland.stories import Grammar
from engine.toyland.words import START

STYLES = {"pirate": "arr matey !", "polite": "thanks !", "bard": "behold !"}


def styled(process: Process, style: str) -> Process:
    """The same text with a refrain after each full stop: "the red ball is in the attic. arr matey!" """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, not {style!r}")
    said = next(process)
    while True:
        word = yield said
        if word == ".":
            for refrain in STYLES[style].split():  # noqa: UP028  a list takes no word back
                yield refrain
        try:
            said = process.send(word)
        except StopIteration:
            return


def likings(grammar: Grammar, *, seed: int) -> dict[str, str]:
    """Who likes which colour: a table drawn once from the seed."""
    rng = random.Random(f"likings {seed}")
    return {name: grammar.colours[int(rng.random() * len(grammar.colours))] for name in grammar.names}


def facts(table: dict[str, str]) -> Process:
    """ "anna likes red. ben likes blue." without end: whom is a choice, what they like follows from the table."""
    if not table:
        raise ValueError("table must hold a fact at least")
    yield START
    while True:
        name = yield any_of(tuple(table))
        yield "likes"
        yield table[name]
        yield "."
