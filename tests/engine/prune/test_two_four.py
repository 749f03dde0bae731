"""2:4: the masks of torch's sparsifier, the bytes that are really held, and a product that meets half the inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.prune import apply, sparsity
from engine.prune.two_four import (
    TwoFourLinear,
    compress,
    fp16_bytes,
    mask,
    masks,
    matmul,
    multiplications,
    timed_on_cuda,
)
from engine.quant import quantised
from engine.recording import record
from tests.engine.quant.test_integer import randn, tokens, toy


def test_masks_are_those_of_torch():
    oracle = pytest.importorskip("torch.ao.pruning").WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2
    )
    model = torch.nn.Sequential(torch.nn.Linear(32, 24)).double()
    model[0].weight.data = randn(24, 32)
    oracle.prepare(model, [{"tensor_fqn": "0.weight"}])
    oracle.step()
    assert torch.equal(model[0].parametrizations.weight[0].mask.bool(), mask(randn(24, 32)))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_two_of_each_four_stay_the_largest_and_the_product_is_the_masked_one(out, fours, seed, ties):
    weight, x = randn(out, 4 * fours, seed=seed), randn(3, 4 * fours, seed=seed + 1)
    if ties:
        weight = (weight * 2).round() / 2  # with equals, and zeros
    chosen = mask(weight)
    groups, kept = weight.abs().view(out, fours, 4), chosen.view(out, fours, 4)
    assert (kept.sum(-1) == 2).all()
    assert (groups.masked_fill(~kept, torch.inf).amin(-1) >= groups.masked_fill(kept, 0).amax(-1)).all()
    made = compress(weight)
    assert torch.equal(made.restored(), weight * chosen)
    expected = x @ (weight * chosen).mT
    assert torch.allclose(matmul(x, made), expected, rtol=0, atol=1e-12)


def test_on_a_tie_the_first_stay():
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, -2.0, 2.0]])
    assert mask(weight).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0]]
    made = compress(weight)
    assert made.values.tolist() == [[1, -1, 0, 0, 2, -2]]
    # Places 0 1, 0 1, 1 2 as bits, the first in the highest: 00 01 00 01 | 01 10 and the rest empty.
    assert made.places.tolist() == [[0b00010001, 0b01100000]]


def test_bytes_held_are_nine_sixteenths_and_multiplications_half():
    weight = randn(24, 64).half()
    made = compress(weight)
    assert made.nbytes == fp16_bytes((24, 64), sparse=True)
    assert made.nbytes * 16 == weight.nbytes * 9
    assert weight.nbytes == fp16_bytes((24, 64), sparse=False)
    assert multiplications((24, 64), rows=5, sparse=True) == 5 * made.values.numel()
    assert multiplications((24, 64), rows=5, sparse=False) == 2 * 5 * made.values.numel()


def test_a_whole_model_is_the_masked_one():
    model, ids = toy(), tokens()
    found = masks(model)
    assert sparsity(found) == 0.5
    sparse = quantised(model, TwoFourLinear.of)
    assert (sparse(ids) - apply(model, found)(ids)).abs().max() < 1e-12
    assert (sparse(ids) - model(ids)).abs().max() > 1e-4


def test_taps_show_the_first_values_and_places():
    with record() as recorder:
        made = compress(randn(40, 200), linear="a")
    shown = recorder.freeze()
    assert shown.stack("two_four.values").shape == (1, 32, 64)
    places = shown.track("two_four.places", linear="a").latest()
    columns = made.columns()[:32, :64]
    assert (places == (columns % 4).numpy()).all()
    assert (places[:, 0] < places[:, 1]).all()


def test_without_cuda_nothing_is_timed():
    took = timed_on_cuda(256, rows=64, tries=3)
    assert (took is None) if not torch.cuda.is_available() else (took is None or min(took) > 0)


def test_bad_input_is_named():
    made = compress(randn(4, 8))
    for call, words in [
        (lambda: mask(randn(4, 6)), r"weight must have shape .* not \[4, 6\]"),
        (lambda: mask(randn(8)), "weight must have shape"),
        (lambda: mask(randn(4, 8) / 0), "weight must be finite"),
        (lambda: mask(randn(4, 0)), "weight must hold a value"),
        (lambda: matmul(randn(2, 4), made), r"x must have shape \[N, 8\], not \[2, 4\]"),
        (lambda: fp16_bytes((4, 6), sparse=True), "that 4 divides, not 6"),
        (lambda: multiplications((4, 6), rows=1, sparse=True), "that 4 divides, not 6"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
