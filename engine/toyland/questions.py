"""What models of Toyland are asked, with the difficulty as a parameter: pairs to keep, filler to read past.

Each question is a text that the grammar could have written, cut off before the answer, so that it asks for nothing
that training did not show. `fact` are the tokens that tell the answer: a cache that has lost them can only guess.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count as counting

from engine.evaluate import Question
from engine.toyland.entropy import Process, Text, write
from engine.toyland.stories import FEWEST, Grammar, home, pairs, secret, song, text
from engine.toyland.tokenizer import Tokenizer
from engine.toyland.words import START

ENDLESS = 10_000  # words: longer than any one story


def pairs_question(grammar: Grammar, *, pairs: int, seed: int) -> Question:
    """Which value belongs to one key among `pairs` (associative recall): the key is any of them.

    More than `grammar.pairs` are more than training text ever holds.
    """
    keys = len(grammar.names) + len(grammar.things)
    if not FEWEST <= pairs <= keys:
        raise ValueError(f"pairs must be between {FEWEST} and {keys}, not {pairs}")
    told = _tell("remember", _pairs(grammar, pairs), seed)
    key = told.words.index(told.words[-3])  # ... key value .
    return _question(told.words[:-2], told.words[-2:-1], range(key, key + 2))


def passkey_question(grammar: Grammar, *, before: int, after: int, seed: int) -> Question:
    """A code of three digits with so many sentences of filler (six tokens each) before and after it."""
    if before < 0 or after < 0:
        raise ValueError(f"before and after must be 0 sentences or more, not {before} and {after}")
    told = _tell("in", secret(grammar, before=before, after=after), seed)
    code = told.words.index("is")
    return _question(told.words[:-4], told.words[-4:-1], range(code + 1, code + 4))


def song_question(grammar: Grammar, *, words: int, seed: int) -> Question:
    """The last word of a song of so many words, sung again (induction)."""
    if not 2 <= words <= len(grammar.song_words):
        raise ValueError(f"words must be between 2 and {len(grammar.song_words)}, not {words}")
    told = _tell("sing", song(grammar, count=words), seed).words
    again = told.index("again")
    return _question(told[: again + 1 + words], [told[again - 1]], range(again - 2, again))


def story_questions(grammar: Grammar, *, seed: int, tokens: int = 96) -> Iterator[Question]:
    """Endless questions about stories at home, each after at most `tokens` tokens, one a story.

    `fact` is the last sentence before the question that holds both what is asked about and the answer.
    """
    if tokens < 32:
        raise ValueError(f"tokens must be at least 32, which most first questions need, not {tokens}")
    for i in counting():
        words, answers = _told_and_asked(_tell("one", home(grammar), f"{seed} {i}", tokens - 2))
        if answers:
            at = answers[-1]
            yield _question(words[:at], [words[at]], _fact(words, at))


def story(*, seed: int, tokens: int, grammar: Grammar | None = None) -> str:
    """A text of Toyland, `tokens` tokens long: stories at home, one after the other."""
    if tokens < 1:
        raise ValueError(f"tokens must be a number of tokens above 0, not {tokens}")
    rng = random.Random(f"story {seed}")
    words = write(text((grammar or Grammar()).only("home")), rng, tokens + 1).words[1:]
    tokenizer = Tokenizer()
    return tokenizer.decode([tokenizer.ids[word] for word in words])


def _pairs(grammar: Grammar, count: int) -> Process:
    """`pairs` with so many pairs, one question, and "many" where a few would be a surprise."""
    kind = "few" if count <= 8 else "many"
    return pairs(grammar.only(kind), count=count, asked=1)


def _tell(first: str, process: Process, seed: int | str, length: int = ENDLESS) -> Text:
    told = write(process, random.Random(f"question {seed}"), length)
    return Text([START, first, *told.words], [0.0, 0.0, *told.nats], [False, False, *told.answers])


def _told_and_asked(told: Text) -> tuple[list[str], list[int]]:
    return told.words, [i for i, answer in enumerate(told.answers) if answer]


def _fact(words: list[str], at: int) -> range | None:
    """The last sentence before the question's that names both its subject and the answer."""
    ask = max(i for i in range(at) if words[i] in ("where", "who", "what"))
    subject = words[words.index("?", ask) - 1]
    ends = [i for i, word in enumerate(words[:ask]) if word == "."]
    for start, end in zip(reversed(ends[:-1]), reversed(ends), strict=False):
        sentence = words[start + 1 : end]
        if "?" not in sentence and subject in sentence and words[at] in sentence:
            return range(start + 1, end + 1)
    return None


def _question(prompt: list[str], answer: list[str], fact: range | None) -> Question:
    tokenizer = Tokenizer()
    asked, wanted = (tokenizer.decode([tokenizer.ids[word] for word in part]) for part in (prompt, answer))
    return Question(asked, wanted, fact)
