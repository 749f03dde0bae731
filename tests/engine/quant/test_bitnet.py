"""BitNet b1.58: three weights, additions only, packing, and the layer as transformers has it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quant import linears
from engine.quant.affine import quantise
from engine.quant.bitnet import (
    EPS,
    TOKENS,
    BitLinear,
    bitnet,
    pack_ternary,
    pack_trits,
    signed_additions,
    ternary,
    unpack_ternary,
    unpack_trits,
)
from engine.recording import record
from tests.engine.quant.test_integer import randn, tokens, toy
from tests.engine.quant.test_qat import loss_of, train


def trits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_weights_are_ternary_by_their_mean_magnitude(seed, size):
    weight = randn(5, 12, seed=seed) * size
    codes, gamma = ternary(weight)
    assert set(codes.flatten().tolist()) <= {-1, 0, 1}
    mean = sum(abs(w) for w in weight.flatten().tolist()) / 60
    assert float(gamma) == pytest.approx(mean + 1e-5, rel=1e-12)
    for w, c in zip(weight.flatten().tolist(), codes.flatten().tolist(), strict=True):
        assert c == max(-1, min(1, round(w / (mean + 1e-5))))


def test_the_layer_computes_with_ternary_weights_on_normed_8_bit_tokens():
    layer = BitLinear(torch.nn.Linear(16, 6).double())
    with torch.no_grad():
        layer.norm.weight.copy_(1 + 0.3 * randn(16))
    x = randn(2, 5, 16) * 40
    codes, gamma = ternary(layer.weight)
    normed = quantise(layer.norm(x).detach(), TOKENS)
    sums, _ = signed_additions(normed.codes, codes)
    by_additions = sums.double() * normed.scale.view(2, 5, 1) * gamma + layer.bias
    assert torch.allclose(layer(x), by_additions, rtol=0, atol=1e-12)


def test_equals_transformers_formulas():
    integration = pytest.importorskip("transformers.integrations.bitnet")
    import inspect

    if not hasattr(integration, "WeightQuant"):
        pytest.skip("this transformers has no WeightQuant")
    weight, x = randn(6, 16).float(), randn(5, 16, seed=1).float()
    # Their functions are wrapped in torch.compile, which needs a compiler: the wrapped function is called.
    theirs = inspect.unwrap(integration.WeightQuant.forward)(None, weight)
    codes, gamma = ternary(weight)
    assert torch.allclose(theirs, codes * (gamma - EPS), rtol=1e-5, atol=1e-6)
    acts = inspect.unwrap(integration.ActQuant.forward)(None, x)
    assert torch.allclose(acts, quantise(x, TOKENS).reconstruct(), rtol=1e-5, atol=1e-6)


def test_gradients_pass_unchanged_to_weights_and_inputs():
    layer = BitLinear(torch.nn.Linear(8, 3, bias=False).double())
    layer.norm = torch.nn.Identity()
    with torch.no_grad():
        layer.weight[0, 0] = 50  # clipped: and still its gradient comes
    x = randn(4, 8).requires_grad_()
    g = randn(4, 3, seed=1)
    (layer(x) * g).sum().backward()
    codes, gamma = ternary(layer.weight)
    assert torch.allclose(x.grad, g @ (codes * gamma), atol=1e-12)
    assert torch.allclose(layer.weight.grad, g.mT @ quantise(x.detach(), TOKENS).reconstruct(), atol=1e-12)


@given(st.integers(1, 4), st.integers(0, 33), st.integers(0, 2**31))
def test_packing_round_trips(rows, count, seed):
    codes = trits(rows, count, seed=seed)
    two, five = pack_ternary(codes), pack_trits(codes)
    assert two.shape == (rows, -(-count // 4))
    assert five.shape == (rows, -(-count // 5))
    assert torch.equal(unpack_ternary(two, count), codes)
    assert torch.equal(unpack_trits(five, count), codes)


@given(st.integers(0, 2**31), st.sampled_from([(4,), (2, 3)]))
def test_a_ternary_product_is_signed_additions(seed, rows):
    codes = trits(7, 12, seed=seed)
    x = torch.randint(-127, 128, (*rows, 12), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    y, count = signed_additions(x, codes)
    assert torch.equal(y, x.int() @ codes.int().mT)
    tokens_ = x[..., 0].numel()
    assert (count.additions, count.subtractions) == (
        tokens_ * int((codes == 1).sum()),
        tokens_ * int((codes == -1).sum()),
    )
    assert count.multiplications == 0
    real = randn(*rows, 12, seed=seed)
    assert torch.allclose(signed_additions(real, codes)[0], real @ codes.double().mT, atol=1e-12)


def test_sums_of_8_bit_codes_do_not_wrap():
    x = torch.full((1, 1000), 127, dtype=torch.int8)
    assert int(signed_additions(x, torch.ones(1, 1000, dtype=torch.int8))[0]) == 127000


def test_a_decoder_becomes_a_bitnet_that_learns_and_is_its_own():
    model, ids = toy(), tokens()
    before = model(ids).detach()
    twin = bitnet(model)
    assert not linears(twin)
    assert all(isinstance(b.norm1, torch.nn.Identity) and isinstance(b.norm2, torch.nn.Identity) for b in twin.blocks)
    assert twin.norm.weight.shape == (32,)
    start = float(loss_of(twin, ids).detach())
    assert train(twin, ids, steps=40) < start - 1
    assert torch.equal(model(ids).detach(), before)
    assert all(
        set(ternary(m.weight)[0].unique().tolist()) <= {-1, 0, 1} for m in twin.modules() if isinstance(m, BitLinear)
    )


def test_taps_show_the_ternary_map():
    layer = BitLinear(torch.nn.Linear(8, 4).double(), name="a")
    with record() as recorder:
        layer(randn(2, 8))
    found = recorder.freeze()
    codes, gamma = ternary(layer.weight)
    assert (found.track("bitnet.ternary", linear="a").latest() == codes.numpy()).all()
    assert float(found.track("bitnet.gamma").latest()) == float(gamma)


def test_bad_input_is_named():
    for call, words in [
        (lambda: ternary(torch.ones(0, 2)), "weight must hold a value"),
        (lambda: ternary(torch.full((2, 2), torch.nan)), "weight must be finite"),
        (lambda: pack_ternary(torch.tensor([2])), "codes must be the whole numbers -1, 0 and 1"),
        (lambda: pack_trits(torch.tensor([0.5])), "codes must be the whole numbers"),
        (lambda: signed_additions(torch.ones(2, 3), trits(2, 4)), "x must have 4 values along its last axis, not 3"),
        (lambda: unpack_ternary(torch.tensor([255], dtype=torch.uint8), 4), "codes 0, 1 and 2, not 3"),
        (lambda: unpack_trits(torch.tensor([250], dtype=torch.uint8), 5), "1 bytes below 243"),
        (lambda: unpack_trits(torch.tensor([1], dtype=torch.uint8), 6), "2 bytes below 243"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
