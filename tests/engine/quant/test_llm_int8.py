"""LLM.int8(): exact at threshold 0, vector-wise without outliers, bitsandbytes' int8 parts, and what outliers cost."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quant.affine import Grid, quantise
from engine.quant.integer import integer_matmul
from engine.quant.llm_int8 import OUTPUTS, ROWS, LLMInt8Linear, llm_int8_matmul, outlier_channels
from engine.quant.smoothquant import migration
from engine.recording import record
from tests.engine.quant.test_integer import randn


def with_outliers(*, size: float = 60.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with two channels `size` times as large, weights that undo it: the product is an ordinary one."""
    x, w = randn(64, 64, seed=seed), randn(64, 64, seed=seed + 1)
    x[:, [5, 40]] *= size
    w[:, [5, 40]] /= size
    return x, w


@given(st.integers(0, 2**31), st.sampled_from([(3,), (2, 5)]))
def test_threshold_zero_is_exact(seed, rows):
    x, w = randn(*rows, 16, seed=seed), randn(7, 16, seed=seed + 1)
    parts = llm_int8_matmul(x, w, threshold=0.0)
    assert parts.outliers.all()
    assert torch.equal(parts.float_part, x @ w.mT)
    assert (parts.int8_part == 0).all()
    linear = torch.nn.Linear(16, 7).double()
    assert torch.allclose(LLMInt8Linear(linear, threshold=0.0)(x), linear(x), rtol=0, atol=1e-14)


def test_a_channel_is_an_outlier_when_any_token_reaches_the_threshold():
    x = torch.tensor([[1.0, -6.0, 5.9, 0.0], [1.0, 2.0, -5.9, 0.0]])
    assert outlier_channels(x, threshold=6.0).tolist() == [False, True, False, False]
    assert outlier_channels(x, threshold=0.0).all()


@given(st.integers(0, 2**31))
def test_without_outliers_it_is_vector_wise_quantisation(seed):
    x, w = randn(5, 16, seed=seed), randn(7, 16, seed=seed + 1)
    parts = llm_int8_matmul(x, w, threshold=math.inf)
    assert not parts.outliers.any()
    assert (parts.float_part == 0).all()
    rows, outputs = x.abs().amax(1, keepdim=True) / 127, w.abs().amax(1, keepdim=True) / 127
    by_hand = ((x / rows).round() @ (w / outputs).round().mT) * rows * outputs.mT
    assert torch.allclose(parts.int8_part, by_hand, rtol=0, atol=1e-12)
    assert torch.equal(parts.int8_part, integer_matmul(quantise(x, ROWS), quantise(w, OUTPUTS))[0])


@given(st.integers(0, 2**31), st.floats(0.1, 4.0))
def test_the_layer_equals_the_clear_form(seed, threshold):
    linear = torch.nn.Linear(16, 7).double()
    x = randn(3, 4, 16, seed=seed)
    parts = llm_int8_matmul(x, linear.weight.detach(), threshold=threshold)
    assert torch.equal(parts.outliers, (x.abs() >= threshold).any(0).any(0))
    expected = parts.float_part + parts.int8_part + linear.bias
    assert torch.allclose(LLMInt8Linear(linear, threshold=threshold)(x), expected, rtol=0, atol=1e-12)


def test_two_channels_spoil_per_tensor_and_decomposition_restores():
    x, w = with_outliers()
    exact = x @ w.mT

    def error(y):
        return float((y - exact).norm() / exact.norm())

    plain = error(integer_matmul(quantise(x, Grid(8)), quantise(w, Grid(8)))[0])
    vector = error(llm_int8_matmul(x, w, threshold=math.inf).int8_part)
    parts = llm_int8_matmul(x, w, threshold=6.0)
    both = error(parts.float_part + parts.int8_part)
    scale = migration(x.abs().amax(0), w.abs().amax(0))
    smooth = error(integer_matmul(quantise(x / scale, Grid(8)), quantise(w * scale, Grid(8)))[0])
    assert parts.outliers.nonzero().flatten().tolist() == [5, 40]
    assert plain > 0.2
    assert vector > 0.05
    assert both < 0.012
    assert smooth < 0.015


def test_int8_parts_equal_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    x = randn(6, 32, seed=2).float()
    x[:, 4] = x[:, 4].sign() * 9  # a channel all of which is an outlier
    codes, scales, columns = functional.int8_vectorwise_quant(x.clone(), threshold=6.0)
    outliers = outlier_channels(x, threshold=6.0)
    assert columns.tolist() == outliers.nonzero().flatten().tolist() == [4]
    ours = quantise(x.masked_fill(outliers, 0.0), ROWS)
    # It multiplies by 127 / max where this divides by max / 127: a value on a tie may fall on either side.
    assert (codes.int() - ours.codes.int()).abs().max() <= 1
    assert (codes != ours.codes).sum() <= 2
    assert torch.allclose(scales / 127, ours.scale.flatten(), rtol=1e-6)
    w = randn(8, 32, seed=3).float()
    w_codes, w_scales, _ = functional.int8_vectorwise_quant(w)
    theirs = functional.int8_mm_dequant(functional.int8_linear_matmul(codes, w_codes), scales, w_scales)
    mine = llm_int8_matmul(x, w, threshold=6.0).int8_part
    assert torch.allclose(theirs.float(), mine, rtol=0, atol=2e-2)  # bitsandbytes answers in float16


def test_memory_counts_both_sides():
    linear = torch.nn.Linear(32, 8, bias=False)
    outliers = torch.zeros(32, dtype=torch.bool)
    outliers[:2] = True
    assert LLMInt8Linear(linear).storage_bits(outliers) == 32 * 8 * 8 + 8 * 32 + 2 * 8 * 16


def test_taps_show_landscape_outliers_and_both_parts():
    x, w = with_outliers()
    linear = torch.nn.Linear(64, 64, bias=False).double()
    linear.weight.data = w
    with record() as recorder:
        y = LLMInt8Linear(linear, name="ffn.down")(x)
    found = recorder.freeze()
    assert found.track("llm_int8.landscape", linear="ffn.down").latest().shape == (64, 64)
    assert found.track("llm_int8.outliers").latest().nonzero()[0].tolist() == [5, 40]
    both = found.track("llm_int8.float_part").latest() + found.track("llm_int8.int8_part").latest()
    assert both == pytest.approx(y.detach().numpy())


def test_bad_input_is_named():
    x, w = with_outliers()
    for call, words in [
        (lambda: llm_int8_matmul(x, w, threshold=-1.0), "threshold must be 0 or above, not -1.0"),
        (lambda: llm_int8_matmul(x, w, threshold=math.nan), "threshold must be 0 or above, not nan"),
        (lambda: LLMInt8Linear(torch.nn.Linear(2, 2), threshold=-1.0), "threshold must be 0 or above"),
        (lambda: llm_int8_matmul(x / 0, w), "x must be finite"),
        (lambda: llm_int8_matmul(x[:0], w), "x must hold a value"),
        (lambda: llm_int8_matmul(x, w / 0), "weight must be finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
