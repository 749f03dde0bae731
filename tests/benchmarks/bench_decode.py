"""How fast SmolLM2-135M decodes and reads here, beside transformers on the same weights, and what watching it costs.

    python -m tests.benchmarks.bench_decode [--dtype bfloat16] [--rounds 5] [--random] [--read 256]

All contenders take turns in every round, so that whatever else the machine does hits them alike. Medians and the
best are shown; ratios are of medians.
"""

from __future__ import annotations

import argparse
import time

import torch

from app.bench import Seconds, race, twin, watched
from engine import checkpoints, cost, hardware
from engine.caches.full import Full
from engine.caches.recompute import Recompute
from engine.caches.sinks import Sinks
from engine.caches.window import Window
from engine.generate import generate
from engine.model import Decoder, Shape
from engine.packed import pack
from engine.read import Policy, read
from engine.recording import recording_on

SMOLLM2 = Shape(
    vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_width=64, ffn_width=1536, rope_base=1e5
)  # fmt: skip
PROMPT, NEW, LONG = 32, 64, 256


def show(title: str, seconds: dict[str, Seconds], *, per: int, base: str) -> None:
    print(f"\n{title:<44}{'median':>9}{'best':>12}{'a second':>11}{'speed':>9}")
    for name, taken in seconds.items():
        median, best = 1e3 * taken.median / per, 1e3 * taken.best / per
        speed = seconds[base].median / taken.median
        print(f"  {name:<42}{median:9.2f} ms{best:9.2f} ms{per / taken.median:11.1f}{speed:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--random", action="store_true", help="random weights of SmolLM2's shape")
    parser.add_argument("--read", type=int, default=256, help="tokens to read under four policies; 0: none")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)

    if options.random or not checkpoints.available("smollm2")[0]:
        plain = Decoder(SMOLLM2).to(dtype).eval()
        print("random weights of SmolLM2's shape")
    else:
        plain = checkpoints.load("smollm2", dtype=dtype, device="cpu")[0]
    ours = pack(plain)
    theirs = twin(plain)
    if theirs is None:
        raise SystemExit("transformers is not installed: `leanscope bench` measures without it")
    ids = torch.randint(0, 49152, (LONG,), generator=torch.Generator().manual_seed(0))

    def hf(count: int, new: int) -> torch.Tensor:
        prompt = ids[None, :count]
        mask = torch.ones_like(prompt)
        return theirs.generate(
            prompt, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )

    def leanscope(model: Decoder, count: int, new: int) -> list[int]:
        return list(generate(model, ids[:count], steps=new, cache=Full()))

    bandwidth = hardware.bandwidth(torch.device("cpu"))
    step_bytes = cost.decode_bytes(
        plain.shape, context=PROMPT + NEW // 2, weight_bytes=dtype.itemsize, cache_bytes=dtype.itemsize
    )
    bound = cost.decode_bound(bandwidth, step_bytes=step_bytes)
    print(f"{hardware.describe().cpu}, {torch.get_num_threads()} threads, {dtype}; torch {torch.__version__}")
    print(
        f"memory reads {bandwidth / 1e9:.1f} GB/s; a step reads {step_bytes / 1e6:.0f} MB: at most {bound:.1f} tokens/s"
    )

    taken = race(
        {
            "transformers generate": lambda: hf(PROMPT, NEW),
            "leanscope": lambda: leanscope(plain, PROMPT, NEW),
            "leanscope, packed": lambda: leanscope(ours, PROMPT, NEW),
        },
        rounds=options.rounds,
    )
    show(f"{NEW} tokens after a prompt of {PROMPT}, per token", taken, per=NEW, base="transformers generate")
    print(f"  share of the memory bound: {', '.join(f'{n} {NEW / t.median / bound:.0%}' for n, t in taken.items())}")

    taken = race(
        {
            "transformers generate": lambda: hf(LONG, 1),
            "leanscope": lambda: leanscope(plain, LONG, 1),
            "leanscope, packed": lambda: leanscope(ours, LONG, 1),
        },
        rounds=options.rounds,
    )
    show(f"prefill of {LONG} and the first token, per prompt", taken, per=1, base="transformers generate")

    def decode() -> object:
        return leanscope(ours, PROMPT, NEW)

    taken = race(
        {
            "packed, not recorded": decode,
            "recording that keeps nothing": watched(decode, nothing={}),
            "recording attention.pattern, every layer": watched(decode, attention_pattern={}),
            "recording everything": watched(decode),
        },
        rounds=options.rounds,
    )
    show(f"watching those {NEW} tokens, per token", taken, per=NEW, base="packed, not recorded")
    start = time.perf_counter()
    for _ in range(100_000):
        recording_on("attention.pattern", layer=1)
    asked = (time.perf_counter() - start) / 100_000
    share = asked * 6 * plain.shape.layers / (taken["packed, not recorded"].median / NEW)
    print(f"  not recording: 6 questions a layer of {asked * 1e9:.0f} ns are {share:.2%} of a token")

    if options.read:
        text = torch.randint(0, 49152, (options.read,), generator=torch.Generator().manual_seed(1))

        def policies(*names: str) -> dict[str, Policy]:
            every = {
                "dense": Policy(Full()),
                "window": Policy(Window(64)),
                "sinks": Policy(Sinks(4, 60)),
                "breaks": Policy(Sinks(4, 60), (198,) * 4),
                "recompute": Policy(Recompute(64)),
            }
            return {name: every[name] for name in names or every}

        cached = ("dense", "window", "sinks")
        taken = race(
            {
                "dense, window, sinks, recompute": lambda: read(ours, text, policies(*cached, "recompute")),
                "the same, recorded": watched(
                    lambda: read(ours, text, policies(*cached, "recompute")), attention_first={}, residual_first={}
                ),
                "and line breaks, recorded": watched(lambda: read(ours, text, policies()), attention_first={}),
                "dense, window, sinks": lambda: read(ours, text, policies(*cached)),
                "recompute": lambda: read(ours, text, policies("recompute")),
            },
            rounds=1,
        )
        show(f"reading {options.read} tokens, window 64, per token", taken, per=options.read, base="recompute")
        print(f"  {', '.join(f'{name}: {t.median:.1f} s' for name, t in taken.items())}")


if __name__ == "__main__":
    main()
