"""FlashAttention: any tiling is exact, at every step it is the softmax over the keys so far, and its bytes add up."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import cost
from engine.exact.flash import choose_blocks, flash_attention, online_softmax, tiles
from engine.exact.fused import (
    enabled,
    flash_on_layer,
    fused_against_naive,
    kernel_that_ran,
    kernels_that_can,
    layer_qkv,
    naive_attention,
)
from engine.mixers.softmax import SoftmaxAttention
from engine.model import Decoder, Shape
from engine.recording import record

tilings = st.fixed_dictionaries(
    {
        "Br": st.integers(1, 12),
        "Bc": st.integers(1, 12),
        "causal": st.booleans(),
        "order": st.sampled_from(["keys", "queries"]),
    }
)


def qkv(N: int, *, D: int = 4, B: int = 1, H: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(B, H, N, D, dtype=dtype, generator=generator) for _ in range(3)]


def lse(q, k, *, causal: bool) -> torch.Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores + torch.full_like(scores, -torch.inf).triu(1) if causal else scores).logsumexp(-1)


@settings(max_examples=40)
@given(N=st.integers(1, 24), how=tilings)
def test_any_tiling_is_exact_in_float64(N, how):
    q, k, v = qkv(N, B=2)
    done = flash_attention(q, k, v, **how)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=how["causal"])
    torch.testing.assert_close(done.output, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(done.lse, lse(q, k, causal=how["causal"]), rtol=0, atol=1e-12)


def test_ordinary_values_in_float32_stay_within_a_millionth():
    q, k, v = (t / 3 for t in qkv(96, D=16, dtype=torch.float32))
    for Br, Bc in ((1, 1), (16, 32), (31, 7), (200, 200)):
        done = flash_attention(q, k, v, Br=Br, Bc=Bc)
        exact = naive_attention(q.double(), k.double(), v.double(), causal=True)
        torch.testing.assert_close(done.output.double(), exact, rtol=0, atol=1e-6)
    steep = flash_attention(1e4 * q, k, v, Br=16, Bc=16).output  # exp would overflow without the running maximum
    assert torch.isfinite(steep).all()


@settings(max_examples=25)
@given(N=st.integers(1, 14), how=tilings)
def test_at_every_step_it_is_the_softmax_over_the_keys_so_far(N, how):
    q, k, v = qkv(N)
    with record() as recorder:
        flash_attention(q, k, v, **how, head=1, row=N // 2, whole=True)
    recording = recorder.freeze()
    scores = (q @ k.mT / 2)[0, 1]
    met, all_rows = recording.stack("flash.met"), recording.stack("flash.output.all")
    m, l, chosen = (recording.stack(f"flash.{name}") for name in ("max", "sum", "row"))
    happened = recording.happened("flash.tile")
    assert len(happened) == recording.steps == len(met)
    seen = torch.zeros(N, N, dtype=torch.bool)
    for i, tile in enumerate(happened):
        (a, b), (c, d) = tile.fields["rows"], tile.fields["columns"]
        mine = torch.ones(N, N).bool().tril() if how["causal"] else torch.ones(N, N).bool()
        seen[a:b, c:d] = mine[a:b, c:d]
        assert tile.fields["skipped"] == (not mine[a:b, c:d].any())
        np.testing.assert_array_equal(met[i], seen.sum(-1))
        so_far = scores.masked_fill(~seen, -torch.inf)
        some = seen.any(-1).numpy()
        goal = (so_far.softmax(-1).nan_to_num() @ v[0, 1]).float()
        np.testing.assert_allclose(all_rows[i], goal, atol=1e-6)
        np.testing.assert_allclose(chosen[i], goal[N // 2], atol=1e-6)
        np.testing.assert_allclose(m[i][some], so_far.amax(-1).numpy()[some], atol=1e-6)
        np.testing.assert_allclose(m[i][some] + np.log(l[i][some]), so_far.logsumexp(-1).numpy()[some], atol=2e-6)
    assert (m[1:] >= m[:-1]).all()
    assert np.isfinite(all_rows).all()
    shown = [t for t in happened if not t.fields["skipped"]]
    assert len(recording.track("flash.output").chunks) == len(recording.track("flash.scores").chunks) == len(shown)
    for tile, chunk in zip(shown, recording.track("flash.output").chunks, strict=True):
        a, b = tile.fields["rows"]
        np.testing.assert_array_equal(chunk.array, all_rows[tile.step][a:b])


def test_a_fully_masked_tile_is_the_trap():
    """On its own it would be exp(-inf - -inf); guarded, it changes nothing, before the first key and after."""
    scores = torch.full((3, 2), -torch.inf).double()
    assert torch.isnan((scores - scores.amax(-1, keepdim=True)).exp()).all()
    v = torch.ones(2, 4).double()
    nothing = torch.full((3,), -torch.inf).double(), torch.zeros(3).double(), torch.zeros(3, 4).double()
    for before in (nothing, (torch.ones(3).double(), torch.ones(3).double(), torch.ones(3, 4).double())):
        for was, became in zip(before, online_softmax(*before, scores, v), strict=True):
            assert torch.equal(was, became)


@settings(max_examples=40)
@given(N=st.integers(1, 24), D=st.integers(1, 6), how=tilings)
def test_the_formula_gives_the_bytes_that_the_loop_counts(N, D, how):
    q, k, v = qkv(N, D=D)
    done = flash_attention(q, k, v, **how)
    assert done.moved == cost.flash_accesses(N, D, **how) * 8
    assert done.naive_moved == cost.naive_accesses(N, D) * 8
    counted = list(tiles(N, **how))
    assert done.computed + done.skipped == len(counted) == math.ceil(N / how["Br"]) * math.ceil(N / how["Bc"])
    assert done.skipped == sum(tile.masked for tile in counted)
    height, width = min(how["Br"], N), min(how["Bc"], N)
    assert done.sram == 8 * (2 * (height + width) * D + height * width + 2 * height)


def test_one_tile_by_hand():
    """N = 2, d = 1, tiles of 1 by 1, not causal, by the first paper's loop."""
    assert cost.naive_accesses(2, 1) == 2 + 2 + 4 + 4 + 4 + 4 + 2 + 2
    keys = 2 * (1 + 1) + 4 * (1 + 3) + 2 * 3  # K, V twice; Q in and O, m, l out four times; O, m, l in twice
    assert cost.flash_accesses(2, 1, Br=1, Bc=1) == keys
    assert cost.flash_accesses(2, 1, Br=1, Bc=1, order="queries") == 2 * (1 + 1 + 1 + 2 * 2)
    with pytest.raises(ValueError, match="order"):
        cost.flash_accesses(2, 1, Br=1, Bc=1, order="rows")


def test_the_bytes_grow_as_the_paper_says():
    """Θ(N²d²/M) against Θ(Nd + N²): twice the SRAM, half the bytes; both square in N; memory straight in N."""
    d, M = 64, 64 * 1024
    Ns = [2**13, 2**14, 2**15]

    def moved(N: int, sram: int) -> int:
        Br, Bc = choose_blocks(sram, d, value_bytes=1)
        return cost.flash_accesses(N, d, Br=Br, Bc=Bc)

    assert cost.growth_exponent(Ns, [moved(N, M) for N in Ns]) == pytest.approx(2, abs=0.01)
    assert cost.growth_exponent(Ns, [cost.naive_accesses(N, d) for N in Ns]) == pytest.approx(2, abs=0.01)
    assert moved(2**15, M) / moved(2**15, 2 * M) == pytest.approx(2, abs=0.03)
    assert cost.growth_exponent(Ns, [cost.flash_peak(N, d) for N in Ns]) == pytest.approx(1)
    assert cost.growth_exponent(Ns, [cost.naive_peak(N, d) for N in Ns]) > 1.95
    assert moved(2**13, M) < cost.naive_accesses(2**13, d)


def test_naive_bytes_so_far_and_moved_bytes_only_grow():
    q, k, v = qkv(24)
    with record() as recorder:
        done = flash_attention(q, k, v, Br=5, Bc=7)
    recording = recorder.freeze()
    for name, end in (("moved", done.moved), ("naive", done.naive_moved)):
        so_far = recording.stack(f"flash.{name}")
        assert (np.diff(so_far) >= 0).all()
        assert so_far[-1] == end
    assert recording.stack("flash.sram").max() == done.sram


def test_blocks_are_chosen_from_the_sram_as_in_the_paper():
    assert choose_blocks(4 * 64 * 32 * 4, 64) == (32, 32)
    assert choose_blocks(4 * 64 * 100 * 2, 64, value_bytes=2) == (64, 100)  # no more rows than the head is wide
    assert choose_blocks(4 * 64 * 4, 64) == (1, 1)
    with pytest.raises(ValueError, match="sram must hold a row"):
        choose_blocks(4 * 64 * 4 - 1, 64)
    q, k, v = qkv(32, dtype=torch.float32)
    for sram in range(128, 3000, 301):
        Br, Bc = choose_blocks(sram, 4)
        done = flash_attention(q, k, v, Br=Br, Bc=Bc, sram=sram)
        assert done.sram <= sram * 5 / 4 + 8 * Br
    with pytest.raises(ValueError, match="sram must hold the blocks"):
        flash_attention(q, k, v, Br=8, Bc=8, sram=8 * 4 * 4 * 4 - 1)


@pytest.mark.parametrize(
    "how",
    [{"Br": 0, "Bc": 2}, {"Br": 2, "Bc": 0}, {"Br": 2, "Bc": 2, "order": "rows"}, {"Br": 2, "Bc": 2, "head": 2},
     {"Br": 2, "Bc": 2, "row": 5}],
)  # fmt: skip
def test_what_cannot_be_is_refused(how):
    q, k, v = qkv(5)
    with pytest.raises(ValueError, match="must be"):
        flash_attention(q, k, v, **how)
    with pytest.raises(ValueError, match="same sizes"):
        flash_attention(q, k[:, :, :4], v, Br=2, Bc=2)
    with pytest.raises(ValueError, match="same sizes"):
        flash_attention(*(t[:, :, :0] for t in (q, k, v)), Br=2, Bc=2)


def test_recording_changes_nothing_and_stays_small():
    q, k, v = qkv(256, D=64, H=1, dtype=torch.float32)
    silent = flash_attention(q, k, v, Br=16, Bc=16)
    with record() as recorder:
        watched = flash_attention(q, k, v, Br=16, Bc=16)
    assert torch.equal(silent.output, watched.output)
    assert torch.equal(silent.lse, watched.lse)
    recording = recorder.freeze()
    assert recording.nbytes < 5_000_000
    assert not recording.cut
    assert recording.steps == 256


def test_the_values_of_a_models_layer():
    shape = Shape(vocab=17, width=12, layers=2, heads=4, kv_heads=2, head_width=6, ffn_width=16)
    model = Decoder(shape).double().eval()
    ids = torch.arange(11) % 17
    q, k, v = layer_qkv(model, ids, layer=1)
    assert q.shape == k.shape == v.shape == (1, 4, 11, 6)
    assert torch.equal(k[:, 0], k[:, 1])
    seen = []
    model.blocks[1].mixer.out.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        model(ids[None])
    done = flash_on_layer(model, ids, layer=1, Br=3, Bc=4)
    torch.testing.assert_close(done.output.transpose(1, 2).reshape(1, 11, 24), seen[0], rtol=0, atol=1e-12)
    assert isinstance(model.blocks[1].mixer, SoftmaxAttention)
    with pytest.raises(ValueError, match="layer must be one of"):
        layer_qkv(model, ids, layer=2)


def test_which_kernel_ran_is_what_pytorch_says():
    q, k, v = qkv(16, D=8, dtype=torch.float32)
    kind, name = kernel_that_ran(q, k, v)
    assert kind in ("flash", "efficient", "cudnn")
    assert kind in name
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert kernel_that_ran(q, k, v)[0] == "math"
    with torch.inference_mode():
        assert kernel_that_ran(q, k, v)[0] == kind
    can = kernels_that_can(q, k, v)
    assert can[kind]
    assert can["math"]
    assert set(enabled()) == set(can)
    if not torch.cuda.is_available():
        assert not can["cudnn"]


def test_both_forms_are_timed_on_the_same_tensors():
    q, k, v = qkv(64, D=8, dtype=torch.float32)
    times = fused_against_naive(q, k, v, rounds=3)
    assert times.naive > 0 < times.fused
    assert times.speedup == times.naive / times.fused
    torch.testing.assert_close(
        naive_attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )


@pytest.mark.real
def test_the_real_models_layer_is_exact_too(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.encode("The cat sat on the mat because it was warm, and the dog lay beside it.")
    q, k, v = layer_qkv(model, ids, layer=3)
    exact = naive_attention(q.double(), k.double(), v.double(), causal=True)
    done = flash_on_layer(model, ids, layer=3, Br=4, Bc=8)
    torch.testing.assert_close(done.output.double(), exact, rtol=0, atol=1e-6 * float(v.abs().max()))
    done = flash_attention(q.double(), k.double(), v.double(), Br=4, Bc=8)
    torch.testing.assert_close(done.output, exact, rtol=0, atol=1e-12)
