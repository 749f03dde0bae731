"""What the last lesson stacks: the steps in their order, what does not go together, one row of the ledger a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine import checkpoints
from engine.evaluate import passkey
from engine.generate import MULTIPLICATIONS, checked_ids
from engine.ledger import judge, paces
from engine.probing import asked_together
from engine.recording import note, record, site, step, tap
from engine.speculate.loop import GIVEN
from engine.stack import (
    Lean,
    guessing,
    mended,
    merged,
    multiplications,
    pruned,
    remembering,
    rounded,
    two_of_four,
    weight_bytes,
    with_fewer_heads,
)
from engine.toyland import Grammar, batch, story
from lessons.models import TOY, name_ids
from lessons.texts import TEXTS, text_ids

COLUMNS = ("bytes", "FLOPs", "tokens/s", "by bytes alone", "perplexity", "recall")
BYTES, FLOPS, PACE, BOUND, PERPLEXITY, RECALL = range(len(COLUMNS))
STEPS = ("original", "heads", "experts", "pruned", "rounded", "mended", "kept", "cached", "guessed")

ROWS = site("build.ledger", "figures of each step of the stack")
USED = site("build.used", "which steps belong to this stack", low=0.0, high=1.0)
WAY_X = site("build.bytes", "bytes of weights and cache after each step", low=0.0, unit="B")
WAY_Y = site("build.perplexity", "perplexity after each step", low=0.0)
DONE = site("build.done", "how many steps this stack has, once all are measured")
SMALLER = site("build.smaller", "how many times smaller weights and cache are", low=0.0)
SHARES = site("build.parts", "bytes of weights and of the cache after each step", low=0.0, unit="B")
FASTER = site("build.faster", "times as fast as the original, in turns with it", low=0.0)
FOUND = site("build.recall", "share of answers that come first", low=0.0, high=1.0)
SAID = site("build.said", "what it has said so far, as token ids")
ASKED = site("build.prompt", "the prompt, as token ids")

TEXTS_READ = 8  # Toyland's texts are short: so many are read at once
QUESTIONS, LENGTH = 6, 160  # of SmolLM2: a number told, then filler, then asked for
GUESSED = 6  # tokens looked up at a time
DRAWN = 48  # tokens by which the work of a guessing model is counted
QUESTION = "<|im_start|>user\nWhy does bread rise when it is baked?<|im_end|>\n<|im_start|>assistant\n"
TEMPERATURE = 0.7  # of the answers


def refuse(knobs: Any) -> None:
    """One sentence, beginning with a knob's label, for what cannot stand on top of each other."""
    toy = knobs.model == TOY
    if knobs.heads == "MQA" and not toy:
        raise ValueError("Key heads cannot be MQA here: no SmolLM2 was trained with one; merge its three instead.")
    if knobs.experts and not toy:
        raise ValueError("Experts are the toy’s alone: SmolLM2 has none, and they cannot be put in afterwards.")
    if knobs.experts and knobs.heads != "all":
        raise ValueError("Experts were trained with all key heads: set Key heads to All.")
    if knobs.mend and not toy:
        raise ValueError("Mending steps are the toy’s alone: training SmolLM2 takes more than this page’s minute.")
    if knobs.mend and not _changed(knobs):
        raise ValueError("Mending steps have nothing to mend: merge heads, prune, or round weights first.")
    if knobs.guess and (knobs.cache != "full" or knobs.cache_bits != 16):
        raise ValueError("Guess ahead takes wrong guesses back, which only a full cache of 16 bits allows.")


def _changed(knobs: Any) -> bool:
    return knobs.heads == "merged" or knobs.prune != "nothing" or knobs.bits != 16


@dataclass
class Bench:
    """What every step is measured with: texts, questions, a prompt, and the original."""

    original: Lean
    ids: Any
    answers: Any  # None where the text asks nothing
    ask: Callable[[Lean], float] | None  # the share of other questions that a model answers
    prompt: list[int]
    rows: np.ndarray = field(default_factory=lambda: np.full((len(STEPS), len(COLUMNS)), np.nan))
    parts: np.ndarray = field(default_factory=lambda: np.full((len(STEPS), 2), np.nan))
    used: np.ndarray = field(default_factory=lambda: np.zeros(len(STEPS), np.float32))
    faster: float = 1.0

    def count(self, row: int, lean: Lean, cache: float, keys: int) -> None:
        """What needs no clock: bytes and products."""
        weights = weight_bytes(lean)
        self.parts[row] = weights, cache
        self.rows[row, BYTES] = weights + cache
        products, tokens = float(sum(multiplications(lean, keys=keys).values())), 1.0
        if lean.guesses:
            products, tokens = self._drawn(lean)
        self.rows[row, FLOPS] = 2 * products
        self.rows[row, BOUND] = self.rows[0, BYTES] / self.rows[row, BYTES] * tokens

    def measure(self, row: int, lean: Lean) -> None:
        """All of a row, read and timed."""
        with record(keep={}):
            judged = judge(lean, self.ids, answers=self.answers)
            recall = self.ask(lean) if self.ask is not None else judged.recall
        self.count(row, lean, judged.bytes, judged.keys)
        self.rows[row, PERPLEXITY], self.rows[row, RECALL] = judged.perplexity, recall
        with record(keep={}):
            both = {"original": self.original} | ({"lean": lean} if row else {})
            found = paces(both, self.prompt)
        self.rows[row, PACE] = found["lean" if row else "original"]
        self.faster = found["lean"] / found["original"] if row else 1.0

    def show(self, row: int) -> None:
        """Tap the ledger so far; one step of the recording."""
        tap(ROWS, self.rows.astype(np.float32), "row column")
        tap(USED, self.used, "row")
        tap(SHARES, self.parts.astype(np.float32), "row part")
        here = np.isfinite(self.rows[:, PERPLEXITY]) & np.isfinite(self.rows[:, BYTES])
        tap(WAY_X, np.where(here, self.rows[:, BYTES], np.nan).astype(np.float32), "row")
        tap(WAY_Y, np.where(here, self.rows[:, PERPLEXITY], np.nan).astype(np.float32), "row")
        tap(SMALLER, self.rows[0, BYTES] / self.rows[row, BYTES], "")
        tap(FOUND, self.rows[row, RECALL], "")
        tap(FASTER, self.faster, "")
        step(label=STEPS[row])

    def _drawn(self, lean: Lean) -> tuple[float, float]:
        """Of a model that guesses: multiplications a token, and tokens a pass."""
        with record(keep={MULTIPLICATIONS: {}, GIVEN: {}}) as recorder:
            said = lean.say(self.prompt, steps=DRAWN)
            for _ in range(DRAWN):
                said()
        seen = recorder.freeze()
        given = seen.stack(GIVEN)[1:]  # the first pass reads the prompt
        return float(seen.stack(MULTIPLICATIONS)[1:].sum() / given.sum()), float(given.mean())


def bench(knobs: Any, model: Any, tokenizer: Any) -> Bench:
    """The texts, the questions and the prompt for this model."""
    prompt = prompt_ids(knobs, tokenizer)
    if knobs.model == TOY:
        read = batch(Grammar(), seed=0, step=list(TEXTS).index(knobs.text), rows=TEXTS_READ, length=knobs.tokens,
                     stream="test")  # fmt: skip
        return Bench(Lean(model), read.ids, read.answers, None, prompt)
    ids = text_ids(tokenizer, knobs.text, "", toy=False, tokens=knobs.tokens)
    depths = [i / (QUESTIONS - 1) for i in range(QUESTIONS)]
    keys = [passkey(tokenizer, tokens=LENGTH, depth=depth, seed=i) for i, depth in enumerate(depths)]
    text = checked_ids(ids, model.shape.vocab)[None]

    def ask(lean: Lean) -> float:
        return float(np.mean(asked_together(lean.model, tokenizer, keys, cache=lean.cache())))

    return Bench(Lean(model), text, None, ask, prompt)


def prompt_ids(knobs: Any, tokenizer: Any) -> list[int]:
    """What both are asked to go on from."""
    asked = story(seed=4, tokens=140) if knobs.model == TOY else QUESTION
    text = knobs.own if knobs.prompt == "own" else asked
    return list(tokenizer.prompt(text)[:200])


def stack(knobs: Any, at: Bench) -> Iterator[tuple[int, Lean]]:
    """Apply what is turned on, step by step; each gives its row and the model so far."""
    lean = at.original
    toy = knobs.model == TOY
    if knobs.heads != "all":
        lean = _heads(knobs, lean, toy)
        yield 1, lean
    if knobs.experts:
        lean = Lean(checkpoints.load("experts-top2")[0])
        yield 2, lean
    if knobs.prune != "nothing":
        lean = _pruned(knobs, lean, at)
        yield 3, lean
    before = lean.model
    if knobs.bits != 16:
        lean = rounded(lean, bits=knobs.bits)
        yield 4, lean
    if knobs.mend:
        lean = mended(lean, steps=knobs.mend, before=before)
        yield 5, lean
    if knobs.cache != "full":
        lean = remembering(lean, kind=knobs.cache, budget=knobs.budget)
        yield 6, lean
    if knobs.cache_bits != 16:
        lean = remembering(lean, kind=knobs.cache, budget=lean.memory.budget, bits=knobs.cache_bits)
        yield 7, lean
    if knobs.guess:
        yield 8, guessing(lean, length=GUESSED)


def chosen(knobs: Any) -> np.ndarray:
    """Which rows this stack has."""
    on = [True, knobs.heads != "all", knobs.experts, knobs.prune != "nothing", knobs.bits != 16, knobs.mend > 0,
          knobs.cache != "full", knobs.cache_bits != 16, knobs.guess]  # fmt: skip
    return np.array(on, np.float32)


def _heads(knobs: Any, lean: Lean, toy: bool) -> Lean:
    if knobs.heads == "merged":
        return merged(lean, groups=1)
    if toy:
        return Lean(checkpoints.load({"GQA": "gqa2", "MQA": "mqa"}[knobs.heads])[0])
    return lean  # SmolLM2 comes with grouped queries


def _pruned(knobs: Any, lean: Lean, at: Bench) -> Lean:
    if knobs.prune == "heads":
        return with_fewer_heads(lean, at.ids[:2, :96], gone=1)
    return two_of_four(lean) if knobs.prune == "2:4" else pruned(lean, share=knobs.share / 100)


def answer(at: Bench, lean: Lean, tokenizer: Any, words: int) -> None:
    """The original and the lean model go on from the same prompt, a token a step: by the same dice, or, where guesses
    are checked, whose dice are their own, without any."""
    warm = 0.0 if lean.guesses else TEMPERATURE
    both = {
        name: one.say(at.prompt, steps=words, temperature=warm)
        for name, one in (("original", at.original), ("lean", lean))
    }
    said: dict[str, list[int]] = {name: [] for name in both}
    tap(ASKED, np.array(at.prompt, np.int32), "token")
    name_ids(tokenizer, np.array(at.prompt))
    for _ in range(words):
        for name, tell in both.items():
            with record(keep={}):
                said[name].append(tell())
            tap(SAID, np.array(said[name], np.int32), "token", of=name)
        name_ids(tokenizer, np.array([ids[-1] for ids in said.values()]))
        step(label="answer")
    pairs = list(zip(said["original"], said["lean"], strict=True))
    note(parted=next((i for i, (a, b) in enumerate(pairs) if a != b), -1), said=len(pairs))
