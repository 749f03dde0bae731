"""How fast this machine runs what the lessons teach, beside what it could do at most: `leanscope bench`.

Contenders take turns in every round, so that whatever else the machine does hits them alike; medians are told, and the
best. The limit beside a row is arithmetic: measured bytes or FLOPs a second over the bytes or FLOPs of the work.
"""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine import checkpoints, cost, hardware
from engine.caches import Cache
from engine.caches.full import Full
from engine.caches.heavy_hitters import HeavyHitters
from engine.caches.quantised import Quantised
from engine.caches.sinks import Sinks
from engine.caches.window import Window
from engine.generate import generate
from engine.model import Decoder
from engine.packed import pack
from engine.recording import record
from engine.speculate.lookup import Lookup
from engine.speculate.loop import speculate
from engine.timing import in_turns
from engine.train import train
from engine.zoo import find

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How much is measured: tokens of the prompts, new tokens, the context of the policies and what they keep of it."""

    rounds: int = 5
    prompt: int = 32
    new: int = 64
    long: int = 256
    context: int = 4096
    kept: int = 256
    policy_new: int = 16
    train_steps: int = 5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be above 0, not {value}")
        if self.kept < 8:
            raise ValueError(f"kept must be 8 tokens at least, not {self.kept}")


QUICK = Settings(rounds=1, prompt=8, new=8, long=32, context=64, kept=16, policy_new=4, train_steps=1)


@dataclass(frozen=True)
class Seconds:
    median: float
    best: float


@dataclass(frozen=True)
class Row:
    """One measurement: `median` and `best` of `unit` a second, the `limit` of this machine, bytes of the cache."""

    group: str
    name: str
    unit: str
    median: float
    best: float
    limit: float | None = None
    cache_bytes: int | None = None
    note: str = ""


def race(contenders: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, Seconds]:
    """Seconds of each, taking turns; the first round warms up and does not count."""
    times = in_turns(contenders, rounds=rounds, where=hardware.device())
    return {name: Seconds(statistics.median(taken), min(taken)) for name, taken in times.items()}


def watched(work: Callable[[], object], **keep: dict[str, int]) -> Callable[[], object]:
    """The same with a recording on, of the taps named (`attention_pattern={}`) or of all."""

    def run() -> None:
        with record(keep={name.replace("_", "."): {} for name in keep} or None, budget=10**9):
            work()

    return run


def measure(model: Decoder, settings: Settings, *, say: Say = lambda text: None) -> Iterator[Row]:
    """Every group in turn, a row as soon as it is known."""
    model = model.eval().requires_grad_(False)
    ours = pack(model)
    for group in (reading, watching, speculating, policies):
        say(group.__name__)
        yield from group(model, ours, settings)
    say("training")
    yield from training(settings)


def reading(model: Decoder, ours: Decoder, s: Settings) -> Iterator[Row]:
    """Decode and prefill, beside transformers on the same weights where it is installed."""
    theirs = twin(model)
    ids = _text(model, max(s.prompt, s.long))
    where, dtype = _where(model)
    size = dtype.itemsize
    step = cost.decode_bytes(model.shape, context=s.prompt + s.new // 2, weight_bytes=size, cache_bytes=size)
    work = cost.prefill_flops(model.shape, tokens=s.long, logits=1)
    limits = {
        "decode": cost.decode_bound(hardware.bandwidth(where), step_bytes=step),
        "prefill": s.long * hardware.flops(dtype, where) / work,
    }
    for group, count, new, per in (("decode", s.prompt, s.new, s.new), ("prefill", s.long, 1, s.long)):
        contenders: dict[str, Callable[[], object]] = {
            "leanscope": lambda c=count, n=new: _generate(model, ids[:c], n),  # type: ignore[misc]
            "leanscope, packed": lambda c=count, n=new: _generate(ours, ids[:c], n),  # type: ignore[misc]
        }
        if theirs is not None:
            contenders["transformers"] = lambda c=count, n=new: _theirs(theirs, ids[:c], n)  # type: ignore[misc]
        note = "the prompt is read too" if group == "decode" else "with the first token"
        yield from _rows(group, "tokens", race(contenders, rounds=s.rounds), per, limit=limits[group], note=note)


def watching(model: Decoder, ours: Decoder, s: Settings) -> Iterator[Row]:
    """What a recording costs."""
    ids = _text(model, s.prompt)

    def decode() -> object:
        return _generate(ours, ids, s.new)

    contenders: dict[str, Callable[[], object]] = {
        "not recorded": decode,
        "a recording that keeps nothing": watched(decode, nothing={}),
        "attention.pattern of every layer": watched(decode, attention_pattern={}),
        "everything": watched(decode),
    }
    yield from _rows("recording", "tokens", race(contenders, rounds=s.rounds), s.new)


def speculating(model: Decoder, ours: Decoder, s: Settings) -> Iterator[Row]:
    """Prompt lookup on a text that repeats itself, beside plain decoding of the same tokens."""
    ids = _text(model, max(1, s.prompt // 4)).repeat(4)
    contenders: dict[str, Callable[[], object]] = {
        "plain": lambda: _generate(ours, ids, s.new),
        "prompt lookup": lambda: list(speculate(ours, ids, steps=s.new, drafter=Lookup())),
    }
    yield from _rows("speculation", "tokens", race(contenders, rounds=s.rounds), s.new, note="same tokens at the end")


def policies(model: Decoder, ours: Decoder, s: Settings) -> Iterator[Row]:
    """Decoding behind a long context, by what the cache keeps of it. The text grows from round to round."""
    where, dtype = _where(model)
    text = _text(model, s.context)
    caches: dict[str, Cache] = {
        "full": Full(),
        "window": Window(s.kept),
        "sinks": Sinks(4, s.kept - 4),
        "heavy hitters": HeavyHitters(s.kept // 2, recent=s.kept - s.kept // 2),
        "quantised, 4 bits": Quantised(4, group=math.gcd(32, model.shape.head_width), recent=min(32, s.kept)),
    }
    for cache in caches.values():
        with torch.inference_mode():
            ours.hidden(text[None], cache=cache)
    held = {name: cache.nbytes for name, cache in caches.items()}
    taken = race(
        {name: lambda c=cache: _generate(ours, text[-1:], s.policy_new, c) for name, cache in caches.items()},  # type: ignore[misc]
        rounds=s.rounds,
    )
    weights = cost.decode_bytes(model.shape, context=1, weight_bytes=dtype.itemsize, cache_bytes=0)
    for name, seconds in taken.items():
        limit = cost.decode_bound(hardware.bandwidth(where), step_bytes=weights + held[name])
        for row in _rows("policies", "tokens", {name: seconds}, s.policy_new, limit=limit):
            yield replace(row, cache_bytes=held[name], note=f"{s.context} tokens of context")


def training(s: Settings) -> Iterator[Row]:
    """Steps of the toy's own recipe a second, from an untrained model, on its last and longest texts."""
    recipe = find("toy")
    stage = replace(recipe.stages[-1], steps=s.train_steps)
    recipe = replace(recipe, stages=(stage,))
    where = hardware.device()
    model = recipe.make(0).to(where)
    taken = race({"toy": lambda: train(model, recipe)}, rounds=s.rounds)
    # Backwards is twice the work of forwards: a product for the input and one for the weights.
    forward = cost.prefill_flops(model.shape, tokens=stage.length - 1, batch=stage.rows)
    limit = hardware.flops(torch.float32, where) / (3 * forward)
    note = f"{stage.rows} texts of {stage.length} tokens"
    yield from _rows("training", "steps", taken, s.train_steps, limit=limit, note=note)


def machine() -> dict[str, Any]:
    """What was measured on, and its two limits."""
    where = hardware.device()
    return {
        **asdict(hardware.describe()),
        "device": str(where),
        "threads": torch.get_num_threads(),
        "bytes_per_second": hardware.bandwidth(where),
        "flops_per_second": {str(d).removeprefix("torch."): hardware.flops(d, where) for d in _dtypes(where)},
    }


def choose(name: str | None) -> tuple[str, Decoder]:
    """The model to measure: the one named, else SmolLM2 if it is here, else the toy. In its fastest dtype."""
    if name is None:
        name = "smollm2" if checkpoints.available("smollm2")[0] else "toy"
    dtype = hardware.fast_dtype() if name == "smollm2" else torch.float32
    return name, checkpoints.load(name, dtype=dtype, device=hardware.device())[0]


def twin(model: Decoder) -> Any | None:
    """transformers' Llama with the weights of `model`, or None: not installed, or not of that kind."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        return None
    s = model.shape
    if s.activation != "swiglu":
        return None
    config = transformers.LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.width, intermediate_size=s.ffn_width, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_width,
        max_position_embeddings=s.max_positions, rms_norm_eps=s.norm_eps, tie_word_embeddings=s.tied,
        rope_theta=s.rope_base, attn_implementation="sdpa",
    )  # fmt: skip
    head: Any = model.embed if s.tied else model.head
    state = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    state["lm_head.weight"] = head.weight
    blocks: Any = model.blocks
    for i, block in enumerate(blocks):
        at = f"model.layers.{i}."
        H, G = s.heads * s.head_width, s.kv_heads * s.head_width
        q, k, v = block.mixer.qkv.weight.split([H, G, G])
        gate, up = block.ffn.gate_up.weight.chunk(2)
        state |= {
            f"{at}input_layernorm.weight": block.norm1.weight,
            f"{at}post_attention_layernorm.weight": block.norm2.weight,
            f"{at}self_attn.q_proj.weight": q,
            f"{at}self_attn.k_proj.weight": k,
            f"{at}self_attn.v_proj.weight": v,
            f"{at}self_attn.o_proj.weight": block.mixer.out.weight,
            f"{at}mlp.gate_proj.weight": gate,
            f"{at}mlp.up_proj.weight": up,
            f"{at}mlp.down_proj.weight": block.ffn.down.weight,
        }
    theirs = transformers.LlamaForCausalLM(config).to(model.embed.weight).eval().requires_grad_(False)
    theirs.load_state_dict(state)
    return theirs


def _theirs(theirs: Any, ids: Tensor, new: int) -> Any:
    prompt = ids[None]
    mask = torch.ones_like(prompt)
    return theirs.generate(
        prompt, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )


def _generate(model: Decoder, ids: Tensor, new: int, cache: Cache | None = None) -> list[int]:
    return list(itertools.islice(generate(model, ids, steps=new, cache=cache or Full()), new))


def _text(model: Decoder, count: int) -> Tensor:
    ids = torch.randint(0, model.shape.vocab, (count,), generator=torch.Generator().manual_seed(0))
    return ids.to(model.embed.weight.device)


def _where(model: Decoder) -> tuple[torch.device, torch.dtype]:
    return model.embed.weight.device, model.embed.weight.dtype


def _dtypes(where: torch.device) -> list[torch.dtype]:
    return list(dict.fromkeys((torch.float32, hardware.fast_dtype(where))))


def _rows(
    group: str, unit: str, taken: dict[str, Seconds], per: int, *, limit: float | None = None, note: str = ""
) -> Iterator[Row]:
    for name, seconds in taken.items():
        yield Row(group, name, unit, per / seconds.median, per / seconds.best, limit, None, note)
