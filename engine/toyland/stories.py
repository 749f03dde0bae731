"""What is told in Toyland: four kinds of story, each a process whose every choice is a visible word.

    home    one day in the harbour. the red ball is in the attic. the sailor mends the net. anna is in the mill.
            anna takes the red ball. who has the red ball? anna. ... night falls.       (facts that change)
    pairs   remember few: anna red, kite attic. now? kite attic, anna red.              (associative recall)
    song    sing: rose bean owl again: rose bean owl.                                   (induction)
    secret  in the school. the poet reads the letter. the code is two six six. ... what is the code? the code is
            two six six.                                                                (a passkey in filler)

A text is the start token and then story after story without end. The first word of a story gives away its kind,
the next ones its topic, so that nothing is hidden (see `entropy`). A question is asked only when the text before
has the answer, and always about the story it stands in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.toyland.entropy import Answer, Offer, Process, any_of, offer
from engine.toyland.words import COLOURS, DIGITS, NAMES, PLACES, START, THINGS, TOPIC_WORDS, TOPICS

KINDS = ("home", "few", "many", "song", "secret")
FEWEST = 3  # pairs in a list: fewer would ask for next to no memory
ASKING = ("home", "few", "many", "secret")  # the kinds with questions


@dataclass(frozen=True)
class Grammar:
    """Which words there are, how often each kind of story comes, and how large stories grow."""

    home: float = 0.27
    few: float = 0.22
    many: float = 0.07
    song: float = 0.22
    secret: float = 0.22
    names: tuple[str, ...] = NAMES
    colours: tuple[str, ...] = COLOURS
    things: tuple[str, ...] = THINGS
    places: tuple[str, ...] = PLACES
    digits: tuple[str, ...] = DIGITS
    topics: Mapping[str, tuple[str, str, str]] = field(default_factory=lambda: dict(TOPICS))
    song_words: tuple[str, ...] = (*TOPIC_WORDS, *THINGS, *COLOURS)
    people: int = 3  # in one story at home, at most; so are goods
    goods: int = 3
    pairs: int = 40
    song_length: int = 24

    def __post_init__(self) -> None:
        keys = len(self.names) + len(self.things)
        for name, value, low, high in (
            ("people", self.people, 2, len(self.names)),
            ("goods", self.goods, 1, min(len(self.things), len(self.colours))),
            ("pairs", self.pairs, FEWEST, keys),
            ("song_length", self.song_length, 1, len(self.song_words)),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} must be between {low} and {high}, not {value}")
        if min(self.weights.values()) < 0 or not sum(self.weights.values()):
            raise ValueError(f"the weights of the kinds must be 0 or more and not all 0, not {self.weights}")

    @property
    def weights(self) -> dict[str, float]:
        return {kind: getattr(self, kind) for kind in KINDS}

    def only(self, kind: str) -> Grammar:
        """The same words, and only that kind of story."""
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        weights: dict[str, Any] = {**dict.fromkeys(KINDS, 0.0), kind: 1.0}
        return replace(self, **weights)


def text(grammar: Grammar) -> Process:
    """The start token, then stories without end."""
    g = grammar
    kinds = offer((g.home, ["one"]), (g.few + g.many, ["remember"]), (g.song, ["sing"]), (g.secret, ["in"]))
    tell = {"one": home, "remember": pairs, "sing": song, "in": secret}
    yield START
    while True:
        kind = yield kinds
        yield from tell[kind](g)


def say(words: str) -> Process:
    """Words that must come."""
    for word in words.split():  # noqa: UP028  a list takes no word back, so `yield from` would not do
        yield word


def filler(scene: tuple[str, str, str], actor: str | None = None) -> Process:
    """(the) sailor mends the net ."""
    actors, verbs, objects = scene
    if actor is None:
        yield any_of(actors.split())
    yield any_of(verbs.split())
    yield "the"
    yield any_of(objects.split())
    yield "."


def pairs(grammar: Grammar, *, count: int | None = None, asked: int | None = None) -> Process:
    """(remember) few: anna red, kite attic. now? kite attic, anna red. Given `count`, so many pairs and no choice."""
    g = grammar
    size = yield offer((g.few, ["few"]), (g.many, ["many"]))
    on = 0.95 if size == "many" else 0.7
    further = offer((on, [","]), (1 - on, ["."]))
    keys, values = (*g.names, *g.things), any_of((*g.colours, *g.places))
    known: dict[str, str] = {}
    limit = g.pairs if count is None else count
    yield ":"
    while True:
        key = yield any_of([k for k in keys if k not in known])
        known[key] = yield values
        if len(known) == limit:
            yield "."
            break
        mark = yield further if count is None and len(known) >= FEWEST else ","
        if mark == ".":
            break
    yield from say("now ?")
    any_known, done = any_of(tuple(known)), 0
    further = offer((0.88, [","]), (0.12, ["."]))
    while True:
        key = yield any_known
        yield Answer(known[key])
        done += 1
        mark = yield further if asked is None else "." if done == asked else ","
        if mark == ".":
            return


def song(grammar: Grammar, *, count: int | None = None) -> Process:
    """(sing) : rose bean owl again : rose bean owl . No word comes twice in the first verse."""
    g = grammar
    words: list[str] = []
    limit = g.song_length if count is None else count
    yield ":"
    while len(words) < limit:
        stop = 0.1 if words and count is None else 0.0
        word = yield offer((1 - stop, [w for w in g.song_words if w not in words]), (stop, ["again"]))
        if word == "again":
            break
        words.append(word)
    else:
        yield "again"
    end = offer((0.3, ["again"]), (0.7, ["."]))
    while True:
        yield ":"
        yield from say(" ".join(words))
        if (yield end) == ".":
            return


def secret(grammar: Grammar, *, before: int | None = None, after: int | None = None) -> Process:
    """(in) the school . <filler> the code is two six six . <filler> what is the code ? the code is two six six ."""
    g = grammar
    yield "the"
    scene = g.topics[(yield any_of(tuple(g.topics)))]
    actors = scene[0].split()
    yield "."
    told = offer((0.7, actors), (0.3, ["code"]))
    passed = 0
    while True:
        yield "the"
        word = yield told if before is None else any_of(actors) if passed < before else "code"
        if word == "code":
            break
        yield from filler(scene, word)
        passed += 1
    yield "is"
    code = []
    for _ in range(3):
        code.append((yield any_of(g.digits)))
    yield "."
    ask = offer((0.8, ["the"]), (0.2, ["what"]))
    passed = 0
    while True:
        word = yield ask if after is None else "the" if passed < after else "what"
        if word == "what":
            break
        yield from filler(scene)
        passed += 1
    yield from say("is the code ? the code is")
    for digit in code:
        yield Answer(digit)
    yield "."


def home(grammar: Grammar) -> Process:
    """(one) day in the harbour . then facts, doings, talk of the topic and questions, until night falls ."""
    g = grammar
    yield from say("day in the")
    scene = g.topics[(yield any_of(tuple(g.topics)))]
    yield "."
    where: dict[str, str] = {}  # name → place
    colour: dict[str, str] = {}  # thing → colour
    lies: dict[str, str] = {}  # thing → the place it lies in, or the name of who holds it
    while True:
        held = [t for t in lies if lies[t] in where]
        laid = [t for t in lies if lies[t] not in where]
        start = yield _next_sentence(g, where, lies, held)
        if start == "night":
            yield from say("falls .")
            return
        if start == "the":
            fresh = [c for c in g.colours if c not in colour.values()] if len(lies) < g.goods else []
            word = yield offer((0.7, fresh), (0.3, scene[0].split()))
            if word not in fresh:
                yield from filler(scene, word)
                continue
            thing = yield any_of([t for t in g.things if t not in lies])
            yield from say("is in the")
            colour[thing], lies[thing] = word, (yield any_of(g.places))
            yield "."
        elif start == "where":
            yield "is"
            who = yield offer((0.5, tuple(where)), (0.5, ["the"] if laid else []))
            if who == "the":
                who = yield from _which(colour, laid)
            yield from say("? in the")
            yield Answer(where[who] if who in where else lies[who])
            yield "."
        elif start == "who":
            yield from say("has the")
            thing = yield from _which(colour, held)
            yield "?"
            yield Answer(lies[thing])
            yield "."
        elif start == "what":
            yield from say("colour is the")
            thing = yield any_of(tuple(lies))
            yield "?"
            yield Answer(colour[thing])
            yield "."
        elif start not in where:
            yield from say("is in the")
            where[start] = yield any_of(g.places)
            yield "."
        else:
            yield from _act(g, start, where, colour, lies)


def _next_sentence(g: Grammar, where: dict[str, str], lies: dict[str, str], held: list[str]) -> Offer:
    """How the next sentence may begin: each beginning is another kind of sentence."""
    return offer(
        (0.24, ["the"]),
        (0.10, [n for n in g.names if n not in where] if len(where) < g.people else []),
        (0.24, tuple(where)),
        (0.20, ["where"] if where or len(held) < len(lies) else []),
        (0.09, ["who"] if held else []),
        (0.08, ["what"] if lies else []),
        (0.12, ["night"] if where and lies else []),
    )


def _which(colour: Mapping[str, str], things: list[str]) -> Process:
    """(the) red ball: a choice of colour; what has that colour then follows."""
    chosen = yield any_of([colour[t] for t in things])
    thing = next(t for t in things if colour[t] == chosen)
    yield thing
    return thing


def _act(g: Grammar, name: str, where: dict[str, str], colour: dict[str, str], lies: dict[str, str]) -> Process:
    """(anna) goes to the mill | takes, puts or gives the red ball."""
    own = [t for t in lies if lies[t] == name]
    laid = [t for t in lies if lies[t] not in where]
    others = [n for n in where if n != name]
    verb = yield offer(
        (0.30, ["goes"]),
        (0.30, ["takes"] if laid else []),
        (0.25, ["puts"] if own else []),
        (0.15, ["gives"] if own and others else []),
    )
    if verb == "goes":
        yield from say("to the")
        where[name] = yield any_of(g.places)
        yield "."
        return
    yield "the"
    thing = yield from _which(colour, laid if verb == "takes" else own)
    if verb == "takes":
        lies[thing] = name
    elif verb == "puts":
        yield from say("in the")
        lies[thing] = yield any_of(g.places)
    else:
        yield "to"
        lies[thing] = yield any_of(others)
    yield "."
