"""Oracles: torch's flop counter, module by module, and the bytes of real tensors. Laws: a slow part is found where it
is slow, and the model that was timed is left as it was."""

import time

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine import profile as profiling
from engine.caches.full import Full
from engine.mixers.latent import Latent
from engine.model import Decoder, Shape
from engine.profile import OPERATIONS, Clock, filled, profile
from engine.recording import record

SHAPE = Shape(97, 32, 3, 4, 2, 8, 48)
UNTIED = Shape(97, 32, 2, 4, 4, 8, 48, tied=False, activation="gelu")
shapes = pytest.mark.parametrize("shape", [SHAPE, UNTIED], ids=["tied, gqa", "untied, mha"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@shapes
@pytest.mark.parametrize(("phase", "queries", "keys"), [("decode", 1, 14), ("prefill", 13, 13)])
def test_flops_of_each_operation_are_those_of_the_flop_counter(shape, phase, queries, keys):
    model = Decoder(shape)
    found = profile(model, phase=phase, batch=2, tokens=13, budget=0)
    cache = filled(model, 2, 13, generator()) if phase == "decode" else Full()
    ids = torch.zeros(2, queries, dtype=torch.long)
    with FlopCounterMode(display=False, depth=9) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        x = model.hidden(ids, cache=cache)[:, -1:]
        layers = dict(counter.get_flop_counts())
        model.logits(x)
    counted = dict.fromkeys(OPERATIONS, 0)
    for name, flops in layers.items():
        part = name.removeprefix("Decoder.").split(".")
        total = sum(flops.values())
        if part[-1] in ("qkv", "out"):
            counted[part[-1]] += total
            counted["attention"] -= total
        elif part[-1] == "mixer":
            counted["attention"] += total
        elif part[-1] == "ffn":
            counted["ffn"] += total
    counted["head"] = counter.get_total_flops() - sum(counted.values())
    assert {w.name: w.flops for w in found.work} == counted
    assert found.flops == counter.get_total_flops()
    assert counted["attention"] == 2 * 2 * 2 * queries * keys * shape.heads * shape.head_width * shape.layers


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_decode_step_are_those_of_the_tensors(shape, dtype):
    model = Decoder(shape).to(dtype)
    found = profile(model, phase="decode", batch=3, tokens=10, budget=0)
    moved = {w.name: w.bytes for w in found.work}
    cache = filled(model, 3, 10, generator())
    with torch.inference_mode():
        model(torch.zeros(3, 1, dtype=torch.long), cache=cache)
    assert moved["attention"] == cache.nbytes
    weights = sum(p.nbytes for name, p in model.named_parameters() if shape.tied or not name.startswith("embed"))
    assert sum(moved.values()) - moved["attention"] - moved["embedding"] == weights
    assert moved["embedding"] == 3 * shape.width * dtype.itemsize


def took(model: Decoder, phase: str) -> dict[str, float]:
    found = profile(model, phase=phase, batch=1, tokens=4, least=1, budget=0)
    return dict(zip(OPERATIONS, found.seconds, strict=True))


class Slow(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        time.sleep(0.02)
        return self.inner(x)


@pytest.mark.parametrize("where", ["qkv", "out", "ffn", "norms"])
def test_a_slow_part_is_found_where_it_is_slow(where):
    model = Decoder(SHAPE)
    for block in model.blocks:
        if where in ("qkv", "out"):
            setattr(block.mixer, where, Slow(getattr(block.mixer, where)))
        elif where == "ffn":
            block.ffn = Slow(block.ffn)
        else:
            block.norm1, block.norm2 = Slow(block.norm1), Slow(block.norm2)
    took = dict(
        zip(OPERATIONS, profile(model, phase="decode", batch=1, tokens=4, least=1, budget=0).seconds, strict=True)
    )
    assert took[where] >= 3 * 0.02
    assert all(took[other] < 0.05 for other in OPERATIONS if other != where), took


def test_slow_attention_is_no_product_with_weights(monkeypatch):
    from engine.mixers import softmax

    attend = softmax.attend
    monkeypatch.setattr(softmax, "attend", lambda q, view: (time.sleep(0.02), attend(q, view))[1])
    took = dict(
        zip(
            OPERATIONS,
            profile(Decoder(SHAPE), phase="prefill", batch=1, tokens=4, least=1, budget=0).seconds,
            strict=True,
        )
    )
    assert took["attention"] >= 3 * 0.02
    assert took["qkv"] + took["out"] < 0.05


def test_the_model_is_left_as_it_was_and_its_weights_are_shared():
    model = Decoder(SHAPE)
    clock = Clock(torch.device("cpu"))
    watched = clock.on(model)
    assert [p.data_ptr() for p in watched.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    ids = torch.arange(5)[None]
    assert torch.equal(watched(ids), model(ids))
    assert set(clock.taken) == {"embedding", "norms", "mixer", "qkv", "out", "ffn"}


def test_operations_add_up_to_no_more_than_the_pass_and_are_medians(monkeypatch):
    model = Decoder(SHAPE)
    times = iter(range(10**6))
    monkeypatch.setattr(Clock, "now", lambda self: float(next(times)))  # every look at the clock is one tick
    found = profile(model, phase="decode", batch=1, tokens=4, least=2, budget=0)
    seconds = dict(zip(OPERATIONS, found.seconds, strict=True))
    # A part of one tick a layer; a mixer of five, with its two parts' own looks inside.
    assert seconds == {"embedding": 1, "qkv": 3, "attention": 9, "out": 3, "ffn": 3, "norms": 7, "head": 1}
    assert found.passes == (3.0, 3.0)
    assert (found.whole, found.best, found.spread) == (3.0, 3.0, 1.0)


def test_disturbed_layers_are_outvoted():
    clock = Clock(torch.device("cpu"))
    clock.taken = {name: [1.0, 1.0, 1.0] for name in (*OPERATIONS, "mixer")} | {
        "ffn": [2.0, 900.0, 900.0], "mixer": [7.0, 500.0, 7.0]
    }  # fmt: skip
    seconds = clock.operations()
    assert (seconds["ffn"], seconds["attention"], seconds["qkv"]) == (6.0, 15.0, 3.0)


def test_what_is_timed_is_tapped():
    with record() as recorder:
        found = profile(Decoder(SHAPE), phase="decode", batch=2, tokens=6, budget=0)
    recording = recorder.freeze()
    assert recording.stack(profiling.SECONDS, phase="decode")[0].tolist() == list(found.seconds)
    assert recording.stack(profiling.FLOPS, phase="decode")[0].sum() == found.flops
    assert recording.stack(profiling.BYTES, phase="decode")[0].sum() == found.bytes
    assert recording.stack(profiling.PASSES, phase="decode")[0].tolist() == list(found.passes)


def test_a_filled_cache_holds_what_a_prompt_would():
    model = Decoder(SHAPE)
    cache, real = filled(model, 2, 9, generator()), Full()
    with torch.inference_mode():
        model(torch.zeros(2, 9, dtype=torch.long), cache=real)
    assert (cache.seen, cache.nbytes) == (real.seen, real.nbytes)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"phase": "both"}, "phase must be one of decode, prefill"),
        ({"batch": 0}, "batch and least must be above 0"),
        ({"least": 0}, "batch and least must be above 0"),
        ({"tokens": 0}, "tokens from 1 to 8191"),
        ({"tokens": 8192}, "tokens from 1 to 8191"),
    ],
)
def test_what_makes_no_sense_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        profile(Decoder(SHAPE), **{"phase": "decode", "batch": 1, "tokens": 4, **given})


def test_other_mixers_are_refused():
    model = Decoder(SHAPE, mixer=lambda layer: Latent(SHAPE, layer, rank=8, rope_width=4))
    with pytest.raises(ValueError, match="softmax attention in all layers"):
        profile(model, phase="decode", batch=1, tokens=4)
