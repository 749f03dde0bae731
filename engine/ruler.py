"""Harder than a passkey: one needle among many, and a value handed from variable to variable.

RULER (Hsieh et al. 2024, arXiv:2404.06654). Paper -> here: multi-keys NIAH = `needles`; variable tracking (VT) with
chains and hops = `variables`; its Toyland form, one thing that goes from hand to hand = `handed_on` (needles of Toyland
are `engine.toyland.questions.pairs_question`: as many keys as you like).
Texts end before the answer, which is judged word for word by `engine.evaluate.ask`. Sizes are in tokens; the seed
decides all else.
Errors: ValueError for sizes that leave no room, and counts below 1 or above the names there are.
Deviations: filler is that of the passkey test, not essays; sentences are shorter than RULER's; variable tracking asks
for the value of a chain's last variable, where RULER asks for the names of all that share a value.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from engine.evaluate import Question, Speaks
from engine.toyland.stories import Grammar
from engine.toyland.tokenizer import Tokenizer
from engine.toyland.words import PLACES, START, THINGS

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEYS = (*THINGS, *PLACES)


@dataclass(frozen=True)
class Linked(Question):
    """A question whose answer needs several places at once: `links` are their tokens in order, `fact` one of them."""

    links: tuple[range, ...] = ()


def needles(tokenizer: Speaks, *, tokens: int, keys: int, seed: int, digits: int = 5) -> Question:
    """The number of one word among `keys` words, told at random places of about `tokens` tokens of filler."""
    if not 1 <= keys <= len(KEYS):
        raise ValueError(f"keys must be from 1 to {len(KEYS)}, not {keys}")
    rng = random.Random(f"needles {seed}")
    words = rng.sample(KEYS, keys)
    numbers = _numbers(rng, keys, digits)
    told = [f" The magic number of the {word} is {number}." for word, number in zip(words, numbers, strict=True)]
    asked = rng.randrange(keys)
    begin = "Some magic numbers are hidden in this text. Memorize them."
    end = f" What is the magic number of the {words[asked]}? The magic number of the {words[asked]} is "
    text, places = _hidden(tokenizer, begin, told, end, tokens=tokens, rng=rng)
    return Question(text, numbers[asked], places[asked])


def variables(tokenizer: Speaks, *, tokens: int, hops: int, chains: int = 2, seed: int, digits: int = 5) -> Linked:
    """The value of the last of `hops` + 1 variables, each set to the one before, among other such chains.

    `fact` is where the number stands, `links` are all assignments of the chain.
    """
    names = (hops + 1) * chains
    if hops < 0 or chains < 1 or names > 26 * 26:
        raise ValueError(f"hops must be 0 or more and chains 1 or more, 676 names in all, not {hops} and {chains}")
    rng = random.Random(f"variables {seed}")
    drawn = rng.sample([a + b for a in ascii_uppercase for b in ascii_uppercase], names)
    numbers = _numbers(rng, chains, digits)
    lines = []
    for chain in range(chains):
        mine = drawn[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        lines.append([f" VAR {new} = {old}." for new, old in zip(mine, [numbers[chain], *mine], strict=False)])
    order = [chain for chain in range(chains) for _ in range(hops + 1)]  # whose line comes next
    rng.shuffle(order)
    left = [iter(chain) for chain in lines]
    told = [next(left[chain]) for chain in order]
    asked = rng.randrange(chains)
    last = drawn[asked * (hops + 1) + hops]
    begin = "Variables are set in this text. Track what each of them stands for."
    text, places = _hidden(tokenizer, begin, told, f" What is the value of VAR {last}? VAR {last} = ",
                           tokens=tokens, rng=rng)  # fmt: skip
    links = tuple(place for place, chain in zip(places, order, strict=True) if chain == asked)
    return Linked(text, numbers[asked], links[0], links)


def handed_on(grammar: Grammar, *, hops: int, filler: int = 0, seed: int) -> Linked:
    """Toyland: one takes a thing, it is given on `hops` times, and who has it is asked for.

    `filler` sentences of the topic stand after each. The grammar could have written it all; `fact` is the last gift.
    """
    if hops < 0 or filler < 0:
        raise ValueError(f"hops and filler must be 0 or more, not {hops} and {filler}")
    rng = random.Random(f"handed on {seed}")
    topic = rng.choice(list(grammar.topics))
    actors, verbs, objects = (part.split() for part in grammar.topics[topic])
    people = rng.sample(grammar.names, grammar.people)
    what = f"{rng.choice(grammar.colours)} {rng.choice(grammar.things)}"
    told = [f"{name} is in the {rng.choice(grammar.places)} ." for name in people]
    told.append(f"the {what} is in the {rng.choice(grammar.places)} .")
    rng.shuffle(told)
    has = rng.choice(people)
    moves = [f"{has} takes the {what} ."]
    for _ in range(hops):
        to = rng.choice([name for name in people if name != has])
        moves.append(f"{has} gives the {what} to {to} .")
        has = to
    words = [START, *f"one day in the {topic} .".split()]
    links = []
    for sentence in (*told, *moves):
        links.append(range(len(words), len(words) + len(sentence.split())))
        words += sentence.split()
        for _ in range(filler):
            words += f"the {rng.choice(actors)} {rng.choice(verbs)} the {rng.choice(objects)} .".split()
    words += f"who has the {what} ?".split()
    return Linked(_text(words), _text([has]), links[-1], tuple(links[len(told) :]))


def _hidden(tokenizer: Speaks, begin: str, told: Sequence[str], end: str, *, tokens: int,
            rng: random.Random) -> tuple[str, list[range]]:  # fmt: skip
    """The sentences, in their order, at random places of the filler: the text, and where the tokens of each are."""
    fixed = sum(len(tokenizer.encode(part)) for part in (begin, *told, end))
    each = len(tokenizer.encode(FILLER))
    repeats = (tokens - fixed) // each
    if repeats < 1:
        raise ValueError(f"tokens must be at least {fixed + each}, not {tokens}")
    gaps = sorted(rng.randint(0, repeats) for _ in told)  # how much filler stands before each
    text, places, written = begin, [], 0
    for sentence, gap in zip(told, gaps, strict=True):
        text += FILLER * (gap - written)
        written = gap
        start = len(tokenizer.prompt(text))
        text += sentence
        places.append(range(start, len(tokenizer.prompt(text))))
    return text + FILLER * (repeats - written) + end, places


def _numbers(rng: random.Random, count: int, digits: int) -> list[str]:
    if digits < 1 or 9 * 10 ** (digits - 1) < count:
        raise ValueError(f"digits must be enough for {count} different numbers, not {digits}")
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def _text(words: list[str]) -> str:
    tokenizer = Tokenizer()
    return tokenizer.decode([tokenizer.ids[word] for word in words])
