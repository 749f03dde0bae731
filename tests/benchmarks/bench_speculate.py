"""How much faster SmolLM2-135M answers when tokens are guessed and checked, beside the plain loop, taking turns.

    python -m tests.benchmarks.bench_speculate [--rounds 3] [--new 64] [--draft PATH] [--temperature 0] [--rows]
        [--kinds "free chat"] [--only "draft 3"]

Every contender says the same prompt in every round, so that whatever else the machine does hits them alike. Ratios are
of sums over the prompts of a kind, of the best round of each; processor time beside wall time, since a busy machine
stretches the second. At temperature 0 the words are compared with those of the plain loop: in bfloat16 a pass over
several rows rounds differently from one over a single row, so a tie between two words may fall the other way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine import checkpoints, hardware
from engine.caches.full import Full
from engine.generate import generate
from engine.model import Decoder
from engine.packed import pack
from engine.recording import record
from engine.speculate import Drafter
from engine.speculate.adaptive import Adaptive
from engine.speculate.draft import DRAFT, load
from engine.speculate.feature import FeatureDraft
from engine.speculate.lookup import Either, Lookup
from engine.speculate.loop import speculate
from engine.speculate.seeds import chat

PASSAGE = (
    "The tide was low and the sand was hard and cold under her shoes. Gulls were crying above the rocks. By noon she "
    "stood in front of the door, which was painted green and had lost most of its colour to the wind. The key turned "
    "on the first try. Inside it smelled of salt and old paper."
)
CODE = "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n    return "
CODE += "area(width, height) * depth\n"
PROMPTS = {
    "copy and edit": (
        chat(f"Repeat this text word by word: {PASSAGE}"),
        chat(f"Correct the mistakes in this text, and write it again in full: {PASSAGE.replace('was', 'were')}"),
        chat(f"Rewrite this code with the word height replaced by length:\n\n{CODE}"),
    ),
    "summarise": (chat(f"Summarize this text: {PASSAGE}"), chat(f"Who is in this text, and what happens? {PASSAGE}")),
    "free chat": (
        chat("Explain how a rainbow comes about."),
        chat("Write a short story about a fox who cannot sleep."),
        chat("What should I cook with potatoes and eggs?"),
        chat("Give me five tips for learning to swim."),
    ),
}


def measure_rows(model: Decoder, *, rounds: int) -> None:
    """What a pass over 1 to 16 rows costs: the whole idea rests on a check being about as dear as a step."""
    ids = torch.randint(0, 49152, (1, 128), generator=torch.Generator().manual_seed(0))
    best: dict[int, tuple[float, float]] = {}
    with torch.inference_mode():
        cache = Full(capacity=256)
        model.hidden(ids, cache=cache)
        for _ in range(rounds):
            for rows in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16):
                wall, processor = time.perf_counter(), time.process_time()
                model.logits(model.hidden(ids[:, :rows], cache=cache)[0])
                took = time.perf_counter() - wall, time.process_time() - processor
                best[rows] = tuple(map(min, took, best.get(rows, took)))  # type: ignore[assignment]
                cache.crop(128)
    print("rows of a check, best of the rounds: ms of wall and of processor time, against one row")
    for rows, (wall, processor) in best.items():
        print(f"  {rows:3}{1e3 * wall:9.1f}{1e3 * processor:9.1f}{processor / best[1][1]:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--draft", type=Path, default=DRAFT)
    parser.add_argument("--kinds", nargs="*", default=list(PROMPTS), help="of prompts")
    parser.add_argument("--only", nargs="*", help="contenders beside the plain loop; all by default")
    parser.add_argument("--rows", action="store_true", help="only the cost of rows")
    options = parser.parse_args()
    dtype = hardware.fast_dtype(torch.device("cpu"))
    plain, tokenizer = checkpoints.load("smollm2", dtype=dtype, device="cpu")
    model = pack(plain)
    print(f"{hardware.describe().cpu}, {torch.get_num_threads()} threads, {dtype}; torch {torch.__version__}")
    measure_rows(model, rounds=5 * options.rounds)
    if options.rows:
        return

    contenders: dict[str, Callable[[], Drafter] | None] = {
        "plain loop": None,
        "lookup 8": lambda: Lookup(length=8),
        "lookup 8, ends of 2": lambda: Lookup(length=8, shortest=2),
        "lookup, adaptive": lambda: Adaptive(Lookup(length=8), cost=0.01, most=10),
    }
    if options.draft.exists():
        feature = load(model, options.draft)
        contenders |= {
            "draft 2": lambda: FeatureDraft(feature, length=2),
            "draft 3": lambda: FeatureDraft(feature, length=3),
            "draft 4": lambda: FeatureDraft(feature, length=4),
            "draft tree 4": lambda: FeatureDraft(feature, widths=(4,)),
            "draft tree 4 3": lambda: FeatureDraft(feature, widths=(4, 3)),
            "draft tree 3 2 1": lambda: FeatureDraft(feature, widths=(3, 2, 1)),
            "lookup, else draft 3": lambda: Either(Lookup(shortest=2), FeatureDraft(feature, length=3)),
            "lookup, else tree": lambda: Either(Lookup(shortest=2), FeatureDraft(feature, widths=(4, 3))),
            "draft, adaptive": lambda: Adaptive(FeatureDraft(feature), most=6),
        }

    if options.only is not None:
        contenders = {name: make for name, make in contenders.items() if make is None or name in options.only}

    def say(name: str, ids: list[int]) -> list[int]:
        make, temperature = contenders[name], options.temperature
        if make is None:
            return list(generate(model, ids, steps=options.new, cache=Full(), temperature=temperature, seed=1))
        return list(speculate(model, ids, steps=options.new, drafter=make(), temperature=temperature, seed=1))

    for kind in options.kinds:
        prompts = PROMPTS[kind]
        wall = dict.fromkeys(contenders, 0.0)
        processor = dict.fromkeys(contenders, 0.0)
        calls, looked, agreed, same = (dict.fromkeys(contenders, 0) for _ in range(4))
        for prompt in prompts:
            ids = tokenizer.encode(prompt)
            best: dict[str, tuple[float, float]] = {}
            said: dict[str, list[int]] = {}
            rounds: dict[str, list[Mapping[str, Any]]] = {}
            for _ in range(options.rounds):
                for name in contenders:
                    start = time.perf_counter(), time.process_time()
                    with record(keep={}) as recorder:  # which keeps nothing but events
                        said[name] = say(name, ids)
                    took = time.perf_counter() - start[0], time.process_time() - start[1]
                    best[name] = tuple(map(min, took, best.get(name, took)))  # type: ignore[assignment]
                    rounds[name] = [e.fields for e in recorder.freeze().happened("speculate.round")]
            for name, make in contenders.items():
                wall[name] += best[name][0]
                processor[name] += best[name][1]
                same[name] += said[name] == said["plain loop"]
                if make is None:
                    calls[name] += options.new
                    continue
                for fields in rounds[name]:
                    calls[name] += 1
                    agreed[name] += len(fields["accepted"])
                    looked[name] += len(fields["accepted"]) + len(fields["rejected"])
        print(f"\n{kind}, {len(prompts)} prompts of {options.new} new tokens, temperature {options.temperature}")
        print(
            f"  {'':22}{'ms a token':>12}{'processor':>11}{'speed':>8}{'proc.':>8}{'a pass':>8}{'alpha':>8}{'same':>6}"
        )
        tokens = len(prompts) * options.new
        for name in contenders:
            alpha = agreed[name] / looked[name] if looked[name] else float("nan")
            print(
                f"  {name:22}{1e3 * wall[name] / tokens:12.1f}{1e3 * processor[name] / tokens:11.1f}"
                f"{wall['plain loop'] / wall[name]:8.2f}{processor['plain loop'] / processor[name]:8.2f}"
                f"{tokens / calls[name]:8.2f}{alpha:8.2f}{same[name]:4}/{len(prompts)}"
            )


if __name__ == "__main__":
    main()
