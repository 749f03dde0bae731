"""Affine quantisation: the lecture's matrix to the digit, the laws of rounding, torchao on equal terms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quant.affine import GRANULARITIES, Grid, choose, quantise, snap
from engine.recording import record

# The example of the lecture (and of MIT 6.5940): 4 x 4 weights.
LECTURE = torch.tensor(
    [[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12], [-0.91, 1.92, 0.0, -1.03], [1.87, 0.0, 1.53, 1.49]],
    dtype=torch.float64,
)


@st.composite
def cases(draw, *, symmetric=None):
    granularity = draw(st.sampled_from(GRANULARITIES))
    even = draw(st.booleans()) if symmetric is None else symmetric
    bits = draw(st.integers(2 if even else 1, 16))
    group = draw(st.sampled_from([1, 2, 4, 8])) if granularity == "group" else None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(1, 6)), 8, dtype=torch.float64, generator=generator)
    x = (x + draw(st.sampled_from([0.0, 3.0, -50.0]))) * 10.0 ** draw(st.integers(-6, 6))
    return x, Grid(bits, symmetric=even, granularity=granularity, group=group)


def test_the_lecture_s_matrix_in_two_bits():
    done = quantise(LECTURE, Grid(2, symmetric=False))
    assert float(done.scale) == pytest.approx(3.2 / 3, abs=1e-12)  # (2.12 + 1.08) / 3, which the lecture prints as 1.07
    assert round(float(done.scale), 2) == 1.07
    assert int(done.zero) == -1
    assert done.codes.tolist() == [[1, -2, 0, -1], [-1, -1, -2, 1], [-2, 1, -1, -2], [1, -1, 0, 0]]
    # The lecture rounds the scale to 1.07 before it multiplies: 2.14 where 2 * 3.2 / 3 is 2.1333.
    with_107 = (done.codes - done.zero).double() * 1.07
    lecture = [[2.14, -1.07, 1.07, 0], [0, 0, -1.07, 2.14], [-1.07, 2.14, 0, -1.07], [2.14, 0, 1.07, 1.07]]
    assert torch.allclose(with_107, torch.tensor(lecture, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(done.reconstruct(), with_107 / 1.07 * 3.2 / 3, atol=1e-12)
    assert done.storage_bits == 16 * 2 + 64 + 2  # codes, a float64 scale, a zero point


@given(cases())
def test_error_is_at_most_half_a_step(case):
    x, grid = case
    done = quantise(x, grid)
    error = grid.blocks((done.reconstruct() - x).abs())
    # The division and the product each round once: a relative 1e-15 of up to 2^16 steps.
    assert (error <= done.scale * (0.5 + 1e-10)).all()
    assert int(done.codes.min()) >= grid.low
    assert int(done.codes.max()) <= grid.high


@given(cases())
def test_quantising_again_on_the_same_grid_changes_nothing(case):
    x, grid = case
    done = quantise(x, grid)
    assert torch.equal(snap(done.reconstruct(), done.scale, done.zero, grid), done.codes)


@given(cases(symmetric=True))
def test_a_symmetric_grid_found_again_is_the_same(case):
    x, grid = case
    once = quantise(x, grid)
    assert torch.equal(quantise(once.reconstruct(), grid).codes, once.codes)


@given(cases())
def test_zero_is_exact(case):
    x, grid = case
    x[:, 3] = 0
    assert (quantise(x, grid).reconstruct()[:, 3] == 0).all()


@given(cases(), st.booleans())
def test_finer_blocks_have_tighter_bounds(case, symmetric):
    x, grid = case
    bits = max(2, grid.bits)

    def bound(granularity, group=None):
        made = Grid(bits, symmetric=symmetric, granularity=granularity, group=group)
        scale = quantise(x, made).scale
        return (scale.expand_as(made.blocks(x)) / 2).reshape(x.shape)

    tensor, channel, group, finest = bound("tensor"), bound("channel"), bound("group", 4), bound("group", 2)
    assert (channel <= tensor).all()
    assert (group <= channel).all()
    assert (finest <= group).all()


@given(cases(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_narrow_scales_are_rounded_up_so_that_the_bound_holds(case, dtype):
    x, grid = case
    if dtype == torch.float16:
        x = x.clamp(-60000, 60000)
    narrow = Grid(
        grid.bits, symmetric=grid.symmetric, granularity=grid.granularity, group=grid.group, scale_dtype=dtype
    )
    done = quantise(x, narrow)
    assert done.scale.dtype == dtype
    # With narrow scales the product is taken in float32: a relative 6e-8 of up to 2^16 steps.
    assert (narrow.blocks((done.reconstruct() - x).abs()) <= done.scale.double() * 0.51).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_blocks_and_storage(granularity):
    group = 4 if granularity == "group" else None
    x = torch.arange(48, dtype=torch.float32).view(2, 3, 8) - 20
    count = {"tensor": 1, "channel": 2, "token": 6, "group": 12}[granularity]
    done = quantise(x, Grid(3, granularity=granularity, group=group, symmetric=False, scale_dtype=torch.float16))
    assert done.scale.shape == done.zero.shape == (count, 1)
    assert done.storage_bits == 48 * 3 + count * (16 + 3)
    even = quantise(x, Grid(3, granularity=granularity, group=group))
    assert even.storage_bits == 48 * 3 + count * 32


def test_a_block_of_zeros_and_a_constant_are_held():
    grid = Grid(4, granularity="channel")
    assert (quantise(torch.zeros(2, 3), grid).reconstruct() == 0).all()
    constant = torch.full((2, 3), 7.0, dtype=torch.float64)
    for symmetric in (True, False):
        assert torch.allclose(quantise(constant, Grid(4, symmetric=symmetric)).reconstruct(), constant, rtol=1e-14)


def test_extremes_do_not_overflow():
    x = torch.tensor([-3e38, 3e38, 0.0, 1.0])
    for symmetric in (True, False):
        back = quantise(x, Grid(8, symmetric=symmetric)).reconstruct()
        assert back.isfinite().all()
        assert (back - x).abs().max() <= 6e38 / 255 / 2 * 1.01
    tiny = torch.tensor([1e-42, -1e-42, 0.0])
    assert (quantise(tiny, Grid(8)).reconstruct() - tiny).abs().max() <= torch.finfo(torch.float32).smallest_normal / 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_equals_torchao(symmetric, bits, granularity):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives", exc_type=ImportError)
    x = torch.randn(6, 32, dtype=torch.float32, generator=torch.Generator().manual_seed(bits)) + 0.3
    grid = Grid(bits, symmetric=symmetric, granularity=granularity, group=8 if granularity == "group" else None)
    block = {"tensor": (6, 32), "channel": (1, 32), "token": (1, 32), "group": (1, 8)}[granularity]
    mapping = primitives.MappingType
    scale, zero = primitives.choose_qparams_affine(
        x,
        # The larger of min / low and max / high; torchao's plain SYMMETRIC divides by 2^bits - 1 halves instead.
        mapping.SYMMETRIC_NO_CLIPPING_ERR if symmetric else mapping.ASYMMETRIC,
        block,
        torch.int8,
        quant_min=grid.low,
        quant_max=grid.high,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    done = quantise(x, grid)
    assert torch.allclose(done.scale.flatten(), scale.flatten(), rtol=1e-6, atol=0)
    codes = primitives.quantize_affine(x, block, done.scale.view_as(scale), zero, torch.int8, grid.low, grid.high)
    # torchao multiplies by 1 / scale where this divides: a value on a tie may fall on either side.
    assert (codes.int() - done.codes.int()).abs().max() <= 1
    assert (codes != done.codes).float().mean() < 0.01
    back = primitives.dequantize_affine(done.codes, block, scale, zero, torch.int8, grid.low, grid.high)
    assert torch.equal(zero.flatten(), done.zero.flatten())
    assert torch.allclose(back, done.reconstruct(), rtol=1e-5, atol=1e-6)


def test_a_brute_force_search_finds_no_nearer_line():
    x = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grid = Grid(3, symmetric=False)
    done = quantise(x, grid)
    lines = float(done.scale) * (np.arange(grid.low, grid.high + 1) - int(done.zero))
    nearest = np.abs(x.numpy()[:, None] - lines).min(1)
    assert np.allclose((done.reconstruct() - x).abs().numpy(), nearest, atol=1e-12)


def test_taps_show_the_matrix_its_codes_and_the_error():
    with record() as recorder:
        quantise(LECTURE, Grid(2, symmetric=False), method="linear")
    recording = recorder.freeze()
    assert recording.track("affine.codes", method="linear").latest().tolist()[0] == [1, -2, 0, -1]
    x, back, error = (recording.track(f"affine.{n}").latest() for n in ("x", "reconstruction", "error"))
    assert np.allclose(back - x, error)


@given(st.integers(0, 2**31), st.integers(1, 16), st.sampled_from([0.0, 5.0, -300.0]))
def test_an_offset_grid_spends_no_line_on_zero(seed, bits, offset):
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + offset
    grid = Grid(bits, symmetric=False, granularity="channel", whole_zero=False)
    done = quantise(x, grid)
    span = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    assert torch.allclose(done.scale, span / (2**bits - 1), rtol=1e-12)
    assert ((done.reconstruct() - x).abs() <= done.scale * (0.5 + 1e-6)).all()
    assert torch.equal(snap(done.reconstruct(), done.scale, done.zero, grid), done.codes)
    assert done.storage_bits == 24 * bits + 3 * 128


def test_a_grid_is_found_again():
    # 4-bit codes with a float minimum, both ends used, as llama.cpp's Q4_1 stores weights.
    codes = torch.randint(0, 16, (6, 32), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 15
    x = codes * 0.013 - 0.0871
    grid = Grid(4, symmetric=False, granularity="group", group=32, whole_zero=False)
    assert (quantise(x, grid).reconstruct() - x).abs().max() < 1e-7
    whole = Grid(4, symmetric=False, granularity="group", group=32)
    assert (quantise(x, whole).reconstruct() - x).abs().max() > 0.003  # its lines lie between those of x


def test_bad_input_is_named():
    for call, words in [
        (lambda: Grid(0), "bits must be a whole number from 1 to 16, not 0"),
        (lambda: Grid(17), "not 17"),
        (lambda: Grid(True), "not True"),
        (lambda: Grid(1), "bits must be from 2 to 16 on a symmetric grid"),
        (lambda: Grid(4, whole_zero=False), "whole_zero must be True on a symmetric grid"),
        (lambda: Grid(4, granularity="row"), "granularity must be one of tensor, channel, group, token, not 'row'"),
        (lambda: Grid(4, granularity="group"), "group must be a size above 0"),
        (lambda: Grid(4, granularity="group", group=0), "group must be a size above 0"),
        (lambda: Grid(4, group=8), "group must be a size above 0 with granularity"),
        (lambda: quantise(torch.ones(2, 6), Grid(4, granularity="group", group=4)), "group must divide the 6 values"),
        (lambda: quantise(torch.ones(0, 6), Grid(4)), "x must hold a value"),
        (lambda: quantise(torch.tensor([1.0, torch.nan]), Grid(4)), "x must be finite, and 1 of its values"),
        (lambda: quantise(torch.tensor([1.0, torch.inf]), Grid(4)), "x must be finite"),
        (lambda: quantise(torch.tensor([1, 2]), Grid(4)), "floating-point values, not torch.int64"),
        (lambda: quantise(torch.tensor([1e38]), Grid(4, scale_dtype=torch.float16)), "scale_dtype must hold scales"),
        (lambda: choose(torch.tensor(1.0), Grid(4, granularity="token")), "x must have axes"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
