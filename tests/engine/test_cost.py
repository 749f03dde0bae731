"""Oracles: torch's flop counter and the bytes of real tensors. Laws: the sources' numbers, and closed forms that
equal the sums they stand for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine import cost
from engine.caches.full import Full
from engine.caches.recompute import Recompute
from engine.caches.sinks import Sinks
from engine.caches.window import Window
from engine.model import Decoder, Shape
from engine.published import PUBLISHED
from engine.read import Policy, read
from engine.recording import record

POST = Shape(vocab=32000, width=4096, layers=32, heads=32, kv_heads=32, head_width=128, ffn_width=11008, tied=False)
TINY = {
    "mha": Shape(97, 32, 2, 4, 4, 8, 48),
    "gqa": Shape(97, 32, 3, 4, 2, 8, 48, tied=False),
    "mqa, gelu, wide heads": Shape(97, 32, 2, 4, 1, 16, 40, activation="gelu"),
}
shapes = pytest.mark.parametrize("shape", TINY.values(), ids=TINY)


def counted(work) -> int:
    # Without a fused kernel, attention is two plain products: those are counted wherever they run.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        work()
    return counter.get_total_flops()


def test_one_attention_layer_costs_what_the_post_says():
    N, D, H = 7, 24, 16
    x, to = torch.randn(N, D), torch.randn(D, H)

    def layer():
        q, k, v = x @ to, x @ to, x @ to
        return ((q @ k.T).softmax(-1) @ v) @ to.T

    assert cost.attention_multiplications(N, D, H) * 2 == counted(layer)
    assert cost.attention_multiplications(N, D, H) == 3 * N * D * H + 2 * N * N * H + N * H * D


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9))
def test_a_step_is_the_last_row_of_the_layer(N, M, D, H):
    # All rows of a layer, each against every key, are the layer.
    assert N * cost.step_multiplications(N, D, H) == cost.attention_multiplications(N, D, H)
    again = sum(cost.attention_multiplications(n, D, H) for n in range(N, N + M))
    assert cost.generation_multiplications(N, M, D, H, cached=False) == again
    rows = sum(cost.step_multiplications(n, D, H) for n in range(N + 1, N + M))
    once = cost.attention_multiplications(N, D, H) + rows
    assert cost.generation_multiplications(N, M, D, H, cached=True) == once


def test_a_cache_turns_cubes_into_squares():
    sizes = [2**i for i in range(12, 16)]
    for cached, power in ((False, 3), (True, 2)):
        total = [cost.generation_multiplications(1, n, 8, 8, cached=cached) for n in sizes]
        assert cost.growth_exponent(sizes, total) == pytest.approx(power, abs=0.01)


@given(st.floats(-3, 3), st.floats(0.1, 10), st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True))
def test_the_exponent_of_a_power_law_is_found(power, factor, sizes):
    assert cost.growth_exponent(sizes, [factor * n**power for n in sizes]) == pytest.approx(power, abs=1e-6)


def test_impossible_questions_are_refused():
    for call, said in (
        (lambda: cost.growth_exponent([4, 4], [1, 1]), "two different sizes"),
        (lambda: cost.generation_multiplications(0, 3, 4, 4, cached=True), "N=0"),
        (lambda: cost.forward_work(POST, queries=3, keys=2), "queries must be between 1 and the 2 keys, not 3"),
        (lambda: cost.streaming("oldest", 3, L=2), "policy must be dense, window, recompute or sinks, not 'oldest'"),
        (lambda: cost.streaming("window", 3), "L=0"),
        (lambda: PUBLISHED["deepseek-v2"].parameters(), "latent attention"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_the_cache_of_the_post_is_one_mebibyte_a_token():
    per_token = cost.kv_bytes(POST, value_bytes=4)  # float32, 32 layers, 32 heads of 128
    assert per_token == 2**20
    assert cost.tokens_that_fit(80e9, per_token) == 76293


def test_the_caches_of_the_primer_and_the_chapter():
    layer = 32 * 128 * 2 * 2  # bytes a token and layer of 32 heads at 16 bits
    assert cost.kv_bytes(POST, tokens=2048) / 32 == 2048 * layer == pytest.approx(33.5e6, rel=2e-3)
    assert cost.kv_bytes(PUBLISHED["llama-3-8b"].shape, tokens=2048) / 32 == pytest.approx(8.4e6, rel=2e-3)
    assert cost.kv_bytes(POST, tokens=32768) / 32 == pytest.approx(537e6, rel=1e-3)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_real_tensors(shape, dtype):
    model = Decoder(shape).to(dtype)
    size = dtype.itemsize
    weights = sum(p.nbytes for p in model.parameters())
    assert cost.parameter_count(shape) * size == weights
    cache = Full()
    with torch.inference_mode():
        model(torch.zeros(3, 11, dtype=torch.long), cache=cache)
    assert cost.kv_bytes(shape, tokens=11, batch=3, value_bytes=size) == cache.nbytes

    moved = {w.name: w.bytes for w in cost.forward_work(
        shape, queries=1, keys=11, batch=3, weight_bytes=size, cache_bytes=size
    )}  # fmt: skip
    assert moved["attention"] == cache.nbytes
    assert moved["embedding"] == 3 * model.embed.weight[0].nbytes
    assert moved["qkv"] == sum(block.mixer.qkv.weight.nbytes for block in model.blocks)
    assert moved["out"] == sum(block.mixer.out.weight.nbytes for block in model.blocks)
    assert moved["ffn"] == sum(p.nbytes for block in model.blocks for p in block.ffn.parameters())
    assert moved["head"] == (model.head or model.embed).weight.nbytes
    assert sum(moved.values()) == cost.decode_bytes(shape, context=11, batch=3, weight_bytes=size, cache_bytes=size)
    # Every weight once: an untied embedding is looked up, not read through.
    looked_up = 0 if shape.tied else model.embed.weight.nbytes
    assert sum(moved.values()) == weights - looked_up + moved["embedding"] + cache.nbytes


@shapes
def test_flops_are_those_of_the_flop_counter(shape):
    model = Decoder(shape)
    ids = torch.zeros(2, 13, dtype=torch.long)
    assert counted(lambda: model(ids)) == cost.prefill_flops(shape, tokens=13, batch=2)
    cache = Full()
    with torch.inference_mode():
        model(ids, cache=cache)
    assert counted(lambda: model(ids[:, :1], cache=cache)) == cost.decode_flops(shape, context=14, batch=2)
    last = sum(w.flops for w in cost.forward_work(shape, queries=5, keys=19, batch=2, logits=1))
    assert counted(lambda: model.logits(model.hidden(ids[:, :5], cache=cache)[:, -1:])) == last


@pytest.mark.real
def test_flops_and_bytes_of_smollm2(smollm2):
    model, _ = smollm2
    assert model.shape == PUBLISHED["smollm2"].shape
    ids = torch.zeros(1, 24, dtype=torch.long)
    cache = Full()
    assert counted(lambda: model(ids, cache=cache)) == cost.prefill_flops(model.shape, tokens=24)
    assert counted(lambda: model(ids[:, :1], cache=cache)) == cost.decode_flops(model.shape, context=25)
    assert sum(p.nbytes for p in model.parameters()) == cost.parameter_count(model.shape) * 4 == 538_060_032


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("llama-2-7b", 6_738_415_616, None),
        ("llama-3-8b", 8_030_261_248, None),
        ("mistral-7b", 7_241_732_096, None),
        ("mixtral-8x7b", 46_702_792_704, 12.9e9),
        ("smollm2", 134_515_008, None),
    ],
)
def test_published_models_have_the_published_parameters(name, total, active):
    model = PUBLISHED[name]
    assert model.parameters() == total
    assert model.parameters(active=True) == pytest.approx(active or total, rel=2e-3)


def test_published_caches():
    kib = {name: model.kv_values() * 2 / 1024 for name, model in PUBLISHED.items()}
    assert (kib["llama-2-7b"], kib["llama-3-8b"], kib["deepseek-v2"]) == (512, 128, 60 * 576 * 2 / 1024)
    assert PUBLISHED["mistral-7b"].kv_values(tokens=9999) == PUBLISHED["mistral-7b"].kv_values(tokens=4096)


def test_decode_waits_for_memory_and_prefill_does_not():
    machine = {"flops_per_second": 200e9, "bytes_per_second": 40e9}
    ridge = cost.ridge_point(**machine)
    assert ridge == 5
    for queries, bound in ((1, True), (64, False)):
        qkv = cost.forward_work(POST, queries=queries, keys=64)[1]
        assert qkv.intensity == queries / 2  # 2 FLOPs a weight and query, 4 bytes a weight
        roof = cost.attainable_flops(qkv.intensity, **machine)
        assert roof == (qkv.intensity * 40e9 if bound else 200e9)
    step = cost.decode_bytes(POST, context=1)
    assert cost.decode_bound(40e9, step_bytes=step) == pytest.approx(40e9 / (4 * 6.74e9), rel=0.03)
    assert cost.decode_bound(40e9, step_bytes=step, batch=8) == 8 * cost.decode_bound(40e9, step_bytes=step)


def test_energy_is_horowitz_table_added_up():
    spent = cost.energy(2e12, 8e12)  # 10¹² multiply-adds, 10¹² DRAM reads of 64 bits
    assert spent.arithmetic == pytest.approx(3.7 + 0.9)
    assert (spent.memory_low, spent.memory_high) == (pytest.approx(1300), pytest.approx(2600))
    assert cost.energy(2e12, 0, kind="int8").arithmetic == pytest.approx(0.23)


READERS = {
    "dense": lambda L: Full(),
    "window": Window,
    "sinks": lambda L: Sinks(1, L - 1),
    "recompute": Recompute,
}


@pytest.mark.parametrize("policy", READERS)
@pytest.mark.parametrize(("T", "L"), [(12, 5), (5, 12), (9, 9), (7, 2)])
def test_streaming_counts_are_those_of_a_real_reading(policy, T, L):
    model = Decoder(TINY["gqa"])
    with record(keep={"read.rows": {}, "read.scores": {}}) as recorder:
        read(model, torch.arange(T), {policy: Policy(READERS[policy](L))})
    recording = recorder.freeze()
    found = cost.streaming(policy, T, L=L)
    assert found.scores == recording.stack("read.scores").sum()
    assert found.tokens == recording.stack("read.rows").sum()


def test_streaming_grows_as_the_paper_says():
    def slope(policy, L):
        sizes = [2**i for i in range(14, 18)]
        return cost.growth_exponent(sizes, [cost.streaming(policy, T, L=L).scores for T in sizes])

    assert slope("dense", 0) == pytest.approx(2, abs=0.01)
    assert [slope(policy, 64) for policy in ("window", "sinks", "recompute")] == [pytest.approx(1, abs=0.01)] * 3
    T = 10**6
    by_window = [cost.streaming("recompute", T, L=L).scores for L in (64, 128, 256)]
    assert cost.growth_exponent([64, 128, 256], by_window) == pytest.approx(2, abs=0.02)
    assert math.isclose(cost.streaming("window", T, L=64).scores, T * 64, rel_tol=1e-4)
