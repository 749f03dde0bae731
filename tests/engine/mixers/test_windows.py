"""Windows: one mask, four ways to compute it, and how far back a layer can see."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.caches.window import Window
from engine.cost import growth_exponent
from engine.mixers.softmax import SoftmaxAttention
from engine.mixers.state import state_bytes
from engine.mixers.windows import (
    WindowAttention,
    attended_cells,
    banded_attention,
    interleaved,
    kept_positions,
    measured_reach,
    receptive_field,
    window_mask,
)
from engine.model import Decoder, Shape
from engine.recording import record

from .common import SHAPE, decoder, in_parts, multiplied, rand, tokens

sizes = st.fixed_dictionaries(
    {"window": st.integers(1, 9), "dilation": st.integers(1, 4), "global_tokens": st.integers(0, 5)}
)


def test_the_mask_is_what_the_papers_draw():
    """Mistral's figure 1 has a window of 3; a window holds the token itself; dilation leaves gaps."""
    plain = window_mask(5, window=3).int().tolist()
    assert plain == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert window_mask(6, window=2, dilation=3)[5].int().tolist() == [0, 0, 1, 0, 0, 1]
    assert window_mask(6, window=2, global_tokens=1)[5].int().tolist() == [1, 0, 0, 0, 1, 1]


@given(T=st.integers(1, 40), how=sizes)
def test_cells_are_counted_without_the_mask(T, how):
    assert attended_cells(T, **how) == int(window_mask(T, **how).sum())


def test_the_two_ratios_of_the_chapter():
    """n = 512, w = 128: n² against n·w is 4.0; the causal cells counted exactly, 2.29."""
    n, w = 512, 128
    assert n * n / (n * w) == 4.0
    assert round(attended_cells(n, window=n) / attended_cells(n, window=w), 2) == 2.29
    assert attended_cells(n, window=n) == n * (n + 1) // 2


@given(T=st.integers(1, 60), how=sizes, groups=st.sampled_from([1, 2, 4]))
def test_banded_equals_masked_dense(T, how, groups):
    q, k, v = rand(2, 4, T, 6), rand(2, groups, T, 6, seed=1), rand(2, groups, T, 6, seed=2)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=window_mask(T, **how), enable_gqa=True)
    torch.testing.assert_close(banded_attention(q, k, v, **how), dense, rtol=0, atol=1e-13)


def test_a_window_of_the_text_is_full_attention():
    ids = tokens(12, batch=2)
    full = decoder(lambda i: SoftmaxAttention(SHAPE, i))
    for window in (12, 40):
        model = decoder(lambda i, w=window: WindowAttention(SHAPE, i, window=w))
        model.load_state_dict(full.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model(ids), full(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 5, 30])
def test_it_equals_the_window_cache_of_full_attention(window):
    """Full attention that remembers `window` tokens and positions counted in its cache: RoPE knows only distances."""
    ids = tokens(23)
    full = decoder(lambda i: SoftmaxAttention(SHAPE, i))
    model = decoder(lambda i: WindowAttention(SHAPE, i, window=window))
    model.load_state_dict(full.state_dict())
    with torch.no_grad():
        rolling = in_parts(model, ids, [9, 1, 6, 7], Full())
        cached = in_parts(full, ids, [1] * 23, Window(window))
        torch.testing.assert_close(model(ids), cached, rtol=0, atol=1e-11)
        torch.testing.assert_close(rolling, cached, rtol=0, atol=1e-11)


@given(seen=st.integers(0, 60), how=sizes)
def test_the_buffer_keeps_just_what_a_later_token_may_read(seen, how):
    later = window_mask(seen + 40, **how)[seen:, :seen]
    needed = later.any(0)
    kept = kept_positions(seen, **how)
    assert set(needed.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    assert len(kept) <= (how["window"] - 1) * how["dilation"] + how["global_tokens"]
    if how["window"] > 1:
        assert needed[kept].all()  # and nothing that none of them reads


def test_weights_are_shared_with_full_attention_and_not_copied():
    """A model converted to windows without retraining: built on the meta device, its tensors are the other's."""
    full = Decoder(SHAPE)
    with torch.device("meta"):
        model = Decoder(SHAPE, mixer=lambda i: WindowAttention(SHAPE, i, window=4))
    model.load_state_dict(full.state_dict(), assign=True)
    assert model.blocks[0].mixer.qkv.weight.data_ptr() == full.blocks[0].mixer.qkv.weight.data_ptr()
    with torch.no_grad():
        assert not torch.equal(model(tokens(9)), full(tokens(9)))


@pytest.mark.parametrize(
    ("layers", "window", "dilation"), [(1, 3, 1), (2, 3, 1), (3, 4, 1), (4, 2, 1), (2, 3, 2), (3, 1, 1)]
)
def test_gradients_reach_as_far_as_the_formula(layers, window, dilation):
    shape = Shape(vocab=17, width=12, layers=layers, heads=2, kv_heads=1, head_width=6, ffn_width=16)
    model = decoder(lambda i: WindowAttention(shape, i, window=window, dilation=dilation), shape=shape)
    reach = measured_reach(model, tokens(20))
    assert reach.shape == (layers, 20)
    for layer in range(layers):
        field = receptive_field(layers - layer, window=window, dilation=dilation)
        places = (reach[layer] > 0).nonzero()[:, 0]
        assert 20 - int(places.min()) == field
        assert (reach[layer].flip(0)[:field:dilation] > 0).all()
        assert (reach[layer] > 0).sum() == (field - 1) // dilation + 1


def test_reach_is_measured_under_inference_mode_and_shown():
    model = decoder(lambda i: WindowAttention(SHAPE, i, window=3))
    plain = measured_reach(model, tokens(9))
    with torch.inference_mode(), record() as recorder:
        assert torch.equal(measured_reach(model, tokens(9)), plain)
    assert recorder.freeze().track("window.reach").latest().shape == (2, 9)


def test_interleaving_puts_full_attention_where_it_says():
    shape = Shape(vocab=17, width=12, layers=6, heads=2, kv_heads=1, head_width=6, ffn_width=16)
    for every, kinds in ((1, "ffffff"), (2, "wfwfwf"), (3, "wwfwwf"), (7, "wwwwww")):
        model = Decoder(shape, mixer=interleaved(shape, window=3, every=every))
        assert "".join("w" if isinstance(b.mixer, WindowAttention) else "f" for b in model.blocks) == kinds


def test_bytes_kept_are_those_of_the_window():
    """2 layers, 1 key head of 6, float64: (window - 1) keys and values each, whatever the length."""
    model, cache = decoder(lambda i: WindowAttention(SHAPE, i, window=5)), Full()
    with torch.no_grad():
        model(tokens(50), cache=cache)
    assert state_bytes(cache.states) == 2 * 2 * 4 * 6 * 8


def test_decoded_patterns_stack_to_the_masked_triangle():
    model = decoder(lambda i: WindowAttention(SHAPE, i, window=3, global_tokens=1))
    ids = tokens(14)
    with torch.no_grad(), record() as recorder:
        in_parts(model, ids, [5, 1, 1, 4, 3], Full())
    with torch.no_grad(), record() as whole:
        model(ids)
    parts, one = recorder.freeze(), whole.freeze()
    mask = window_mask(14, window=3, global_tokens=1).numpy()
    for layer in (0, 1):
        pattern = torch.tensor(parts.stack("attention.pattern", layer=layer))
        assert ((pattern.numpy() > 0) == mask).all()
        assert (parts.stack("window.mask", layer=layer) == mask).all()
        torch.testing.assert_close(pattern.sum(-1), torch.ones(1, 2, 14).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            pattern, torch.tensor(one.stack("attention.pattern", layer=layer)), rtol=0, atol=1e-12
        )


def test_banded_work_grows_with_the_length_and_dense_with_its_square():
    lengths = [64, 128, 256]

    def scores(work):
        return [multiplied(lambda n=n: work(*(rand(1, 2, n, 6, seed=s) for s in range(3)))) for n in lengths]

    banded = scores(lambda q, k, v: banded_attention(q, k, v, window=8))
    # A block of 8 queries meets 16 keys: 2 products of 6 numbers, in 2 heads.
    assert banded == [n * 16 * 6 * 2 * 2 for n in lengths]
    dense = scores(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)
    assert abs(growth_exponent(lengths, banded) - 1) < 1e-9
    assert abs(growth_exponent(lengths, dense) - 2) < 1e-9


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"window": 0}, "window must be a whole number from 1 on, not 0"),
        ({"window": 2.5}, "window must be a whole number from 1 on, not 2.5"),
        ({"window": 2, "dilation": 0}, "dilation must be a whole number from 1 on, not 0"),
        ({"window": 2, "global_tokens": -1}, "global_tokens must be a whole number from 0 on, not -1"),
    ],
)
def test_impossible_windows_are_named(how, message):
    for call in (
        lambda: WindowAttention(SHAPE, 0, **how),
        lambda: window_mask(4, **how),
        lambda: attended_cells(4, **how),
        lambda: banded_attention(*(rand(1, 1, 4, 6) for _ in range(3)), **how),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="T must be a whole number from 1 on, not 0"):
        window_mask(0, window=3)
    with pytest.raises(ValueError, match="every must be a whole number from 1 on, not 0"):
        interleaved(SHAPE, window=3, every=0)
    model, cache = decoder(lambda i: WindowAttention(SHAPE, i, window=3)), Full()
    cache.seen = 4  # a cache that was continued by another model
    with pytest.raises(ValueError, match="0 keys are kept, where after 4 tokens there must be 2"):
        model(tokens(3), cache=cache)
