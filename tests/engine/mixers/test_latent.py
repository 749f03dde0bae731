"""Latent attention: two forms of one sum, DeepSeek-V3's own attention, and what is cached."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from engine import cost
from engine.caches.full import Full
from engine.caches.sinks import Sinks
from engine.caches.window import Window
from engine.generate import PARTS, generate, multiplications
from engine.mixers.head_start import head_start
from engine.mixers.latent import ROPE_KEY, Latent, in_form, with_rope
from engine.mixers.low_rank import kept_share, keys_and_values, rank_for, singular_values, spectra
from engine.mixers.softmax import SoftmaxAttention
from engine.model import Decoder, Shape
from engine.published import PUBLISHED
from engine.recording import record

from .common import SHAPE, decoder, in_parts, rand, tokens

WIDE = Shape(vocab=17, width=12, layers=2, heads=4, kv_heads=1, head_width=6, ffn_width=16, max_positions=128)
latent = {"rank": 5, "rope_width": 4}


@pytest.mark.parametrize("q_rank", [None, 7])
def test_it_is_the_attention_of_deepseek_v3(q_rank):
    """`transformers` pairs neighbours in RoPE, we pair halves: rows 0, 2, 4, ... of the rotated part come first."""
    W, H, D, R, rank, T = 20, 4, 6, 8, 5, 11
    config = DeepseekV3Config(
        hidden_size=W, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=q_rank, kv_lora_rank=rank,
        qk_nope_head_dim=D, v_head_dim=D, qk_rope_head_dim=R, rope_interleave=True, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = DeepseekV3Attention(config, 0)
    for name, module in list(theirs.named_children()):
        if name.endswith("layernorm"):  # theirs go by way of float32
            setattr(theirs, name, torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon))
    theirs.double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.5 * torch.randn_like(p) + (p.dim() == 1))
    shape = Shape(vocab=3, width=W, layers=1, heads=H, kv_heads=H, head_width=D, ffn_width=4, norm_eps=1e-6)
    ours = Latent(shape, 0, rank=rank, rope_width=R, q_rank=q_rank).double()
    halves = torch.cat((torch.arange(0, R, 2), torch.arange(1, R, 2)))
    q = (theirs.q_proj if q_rank is None else theirs.q_b_proj).weight.unflatten(0, (H, D + R))
    kv_a = theirs.kv_a_proj_with_mqa.weight
    weights = {
        "q.weight": torch.cat((q[:, :D], q[:, D:][:, halves]), 1).flatten(0, 1),
        "compress.weight": torch.cat((kv_a[:rank], kv_a[rank:][halves])),
        "norm.weight": theirs.kv_a_layernorm.weight,
        "rebuild.weight": theirs.kv_b_proj.weight,
        "out.weight": theirs.o_proj.weight,
    }
    if q_rank is not None:
        weights |= {"q_compress.0.weight": theirs.q_a_proj.weight, "q_compress.1.weight": theirs.q_a_layernorm.weight}
    ours.load_state_dict(weights)
    x = rand(2, T, W)
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    their_cos, _ = DeepseekV3RotaryEmbedding(config)(x.float(), torch.arange(T)[None])
    cos, sin = (torch.cat((f(angle), f(angle)), -1)[None] for f in (torch.cos, torch.sin))
    torch.testing.assert_close(their_cos.double(), cos, rtol=0, atol=1e-5)  # theirs are made in float32
    mask = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = theirs(x, (cos, sin), mask)
        rope = Decoder(shape).rope(x)
        for form in ("naive", "absorbed"):
            ours.form = form
            torch.testing.assert_close(ours(x, rope=rope), expected, rtol=0, atol=1e-12)


@settings(max_examples=25)
@given(
    rank=st.integers(1, 9),
    half=st.integers(1, 4),
    q_rank=st.sampled_from([None, 1, 6]),
    heads=st.sampled_from([1, 2, 4]),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_absorbed_equals_naive(rank, half, q_rank, heads, sizes):
    shape = Shape(vocab=17, width=12, layers=2, heads=heads, kv_heads=1, head_width=6, ffn_width=16, max_positions=64)
    model = decoder(lambda i: Latent(shape, i, rank=rank, rope_width=2 * half, q_rank=q_rank), shape=shape)
    other, ids = in_form(model, "absorbed"), tokens(sum(sizes), batch=2)
    assert [b.mixer.form for b in other.blocks] == ["absorbed"] * 2
    with torch.no_grad():
        whole = model(ids)
        torch.testing.assert_close(other(ids), whole, rtol=0, atol=1e-10)
        for form in (model, other):
            torch.testing.assert_close(in_parts(form, ids, sizes, Full()), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cache", [lambda: Window(6), lambda: Sinks(2, 4)])
def test_caches_that_evict_keep_latents_as_they_keep_keys(cache):
    """Both forms read the same slots, and a text read in passes is the text read a token at a time."""
    model, ids = decoder(lambda i: Latent(WIDE, i, **latent), shape=WIDE), tokens(17, batch=2)
    with torch.no_grad():
        one = in_parts(model, ids, [1] * 17, cache())
        for form in ("naive", "absorbed"):
            other = in_form(model, form)
            torch.testing.assert_close(in_parts(other, ids, [9, 1, 7], cache()), one, rtol=0, atol=1e-10)
        assert (one[:, 8:] - model(ids)[:, 8:]).abs().max() > 0.01


@pytest.mark.parametrize("heads", [1, 2, 4, 12])
def test_cached_values_do_not_hang_on_the_number_of_heads(heads):
    shape = Shape(vocab=17, width=12, layers=3, heads=heads, kv_heads=1, head_width=6, ffn_width=16, max_positions=64)
    model, cache = decoder(lambda i: Latent(shape, i, **latent), shape=shape), Full()
    with torch.no_grad():
        model(tokens(7, batch=2), cache=cache)
    assert cache.nbytes == 8 * 2 * cost.latent_values(3, rank=5, rope_width=4, tokens=7)
    assert cost.latent_values(3, rank=5, rope_width=4) == 3 * (5 + 4)
    assert not cache.states


def test_the_form_is_no_matter_of_weights():
    model = decoder(lambda i: Latent(WIDE, i, q_rank=3, **latent), shape=WIDE)
    twin = in_form(model, "absorbed")
    ours, theirs = model.state_dict(), twin.state_dict()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    assert {b.mixer.form for b in model.blocks} == {"naive"}


def test_what_the_scores_are_divided_by():
    """Of one token's score with itself: q · k over the root of both parts of a head, unrotated at a distance of 0."""
    model, ids = decoder(lambda i: Latent(WIDE, i, **latent), shape=WIDE), tokens(5)
    for form in ("naive", "absorbed"):
        with torch.no_grad(), record() as recorder:
            in_form(model, form)(ids)
        seen = recorder.freeze()
        if form == "naive":
            q, k = (torch.tensor(seen.stack(f"attention.{name}", layer=1)) for name in "qk")
            assert k.shape == (1, 4, 5, 6 + 4)
            expected = q @ k.mT / (6 + 4) ** 0.5
        scores = torch.tensor(seen.stack("attention.scores", layer=1))
        below = torch.ones(5, 5).tril().bool()
        torch.testing.assert_close(scores[..., below], expected[..., below], rtol=0, atol=1e-10)


def test_keys_and_values_are_redrawn_from_what_is_shown():
    model, ids = decoder(lambda i: Latent(WIDE, i, **latent), shape=WIDE), tokens(9)
    with torch.no_grad(), record() as recorder:
        in_parts(model, ids, [4, 1, 4], Full())
    seen = recorder.freeze()
    c, key = (torch.tensor(seen.stack(f"latent.{name}", layer=1)) for name in ("c", "rope_key"))  # B T rank, B T R
    made = (c @ model.blocks[1].mixer.rebuild.weight.mT).view(1, 9, 4, 12).transpose(1, 2)  # B H T 2D
    k, v = (torch.tensor(seen.stack(f"attention.{name}", layer=1)) for name in "kv")
    torch.testing.assert_close(k, torch.cat((made[..., :6], key[:, None].expand(1, 4, 9, 4)), -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(v, made[..., 6:], rtol=0, atol=1e-12)
    # The norm sits before the cache.
    weight = model.blocks[1].mixer.norm.weight
    torch.testing.assert_close((c / weight).square().mean(-1), torch.ones(1, 9).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", ["naive", "absorbed"])
@pytest.mark.parametrize("q_rank", [None, 7])
def test_multiplications_are_those_of_the_products(form, q_rank):
    model = decoder(lambda i: Latent(WIDE, i, q_rank=q_rank, form=form, **latent), shape=WIDE)
    mixer, rope = model.blocks[0].mixer, model.rope(torch.zeros(1, dtype=torch.float64))
    for prompt, rows in ((0, 9), (20, 1)):
        cache = Full()
        if prompt:
            with torch.no_grad():
                mixer(rand(1, prompt, 12), rope=rope, cache=cache)
            cache.advance(prompt)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            mixer(rand(1, rows, 12), rope=rope, cache=cache)
        formula = sum(mixer.multiplications(rows=rows, keys=prompt + rows).values()) + rows * 24 * 12
        assert counter.get_total_flops() == 2 * formula
        parts = dict(zip(PARTS, multiplications(model, rows=rows, keys=prompt + rows), strict=True))
        assert parts["qkv"] + parts["scores"] + parts["values"] + parts["out"] == 2 * formula


def test_rebuilding_computes_more_and_absorbing_moves_less_for_one_token():
    naive = Latent(WIDE, 0, **latent)
    absorbed = Latent(WIDE, 0, form="absorbed", **latent)
    for keys in (50, 500):
        work = [sum(m.multiplications(rows=1, keys=keys).values()) for m in (naive, absorbed)]
        moved = [m.values_moved(keys=keys) for m in (naive, absorbed)]
        assert work[0] > work[1]
        assert moved[0]["cache"] == moved[1]["cache"] == keys * 9
        assert moved[0]["rebuilt"] == 2 * keys * 4 * (6 + 4 + 6)
        assert moved[1]["rebuilt"] == 0
    # A whole text at once is another matter: rebuilt once for all queries, keys are narrower than latents in
    # DeepSeek-V2's own sizes, and the naive form multiplies less. That is why it reads prompts so.
    big = Shape(vocab=3, width=64, layers=1, heads=16, kv_heads=1, head_width=8, ffn_width=4)
    forms = [Latent(big, 0, rank=32, rope_width=4, form=form) for form in ("naive", "absorbed")]
    work = [sum(m.multiplications(rows=512, keys=512).values()) for m in forms]
    assert work[0] < work[1]


def test_the_sizes_of_the_paper():
    v2, old = PUBLISHED["deepseek-v2"], PUBLISHED["deepseek-67b"]
    assert v2.kv_values() == cost.latent_values(60, rank=512, rope_width=64) == 60 * 576
    assert old.kv_values() == 95 * 2 * 8 * 128
    assert round(cost.cache_saved(v2.kv_values(), old.kv_values(), bits=6), 3) == 0.933
    assert round(cost.cache_saved(v2.kv_values(), old.kv_values()), 3) == 0.822
    assert round(cost.cache_saved(v2.kv_values(), cost.kv_values(v2.shape)), 3) == 0.982
    assert cost.gqa_groups_of_latent(rank=512, rope_width=64, head_width=128) == 2.25
    assert old.parameters() == pytest.approx(67e9, rel=0.01)
    with pytest.raises(ValueError, match="against must be a cache of more than nothing"):
        cost.cache_saved(1, 0)


def test_singular_values_of_a_low_rank_are_few():
    x = rand(2, 15, 3) @ rand(3, 8, seed=1)
    s = singular_values(x)
    assert s.shape == (8,)
    assert rank_for(s, 1.0) == 3
    torch.testing.assert_close(s.square().sum(), x.square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(s, singular_values(x[:, :, torch.randperm(8)]), rtol=0, atol=1e-12)
    share = kept_share(s)
    torch.testing.assert_close(share[1], (s[:2].square().sum() / s.square().sum()), rtol=1e-12, atol=0)
    assert rank_for(s, float(share[0])) == 1
    assert rank_for(s, float(share[0]) + 1e-6) == 2
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="share must lie above 0 and up to 1"):
            rank_for(s, bad)
    with pytest.raises(ValueError, match="x must have shape"):
        singular_values(torch.zeros(0, 3))


def test_spectra_are_of_the_keys_before_rotation():
    model, ids = decoder(lambda i: SoftmaxAttention(SHAPE, i)), tokens(9, batch=2)
    kv = keys_and_values(model, ids)
    assert {layer: [tuple(x.shape) for x in pair] for layer, pair in kv.items()} == {
        0: [(2, 9, 6)] * 2,
        1: [(2, 9, 6)] * 2,
    }
    with torch.no_grad():
        x = model.blocks[0].norm1(model.embed(ids))
        torch.testing.assert_close(kv[0][0], x @ model.blocks[0].mixer.qkv.weight[12:18].T, rtol=0, atol=1e-12)
        torch.testing.assert_close(kv[0][1], x @ model.blocks[0].mixer.qkv.weight[18:].T, rtol=0, atol=1e-12)
    with record() as recorder:
        found = spectra(model, ids)
    assert set(found) == {(layer, of) for layer in (0, 1) for of in ("k", "v", "kv")}
    assert (recorder.freeze().track("latent.singular", layer=1, of="kv").latest() == found[1, "kv"].numpy()).all()
    assert not model.blocks[0].mixer.qkv._forward_hooks
    with pytest.raises(ValueError, match="model must have a layer of softmax attention"):
        keys_and_values(decoder(lambda i: Latent(SHAPE, i, **latent)), ids)


def test_the_head_start_looks_back():
    """As mimetic's first layer: head i pays most of its attention to the token i + 1 back, through the rope key."""
    shape = Shape(vocab=64, width=64, layers=2, heads=4, kv_heads=4, head_width=16, ffn_width=64)
    model = head_start(Decoder(shape, mixer=lambda i: Latent(shape, i, rank=16, rope_width=16)), seed=0)
    ids = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), record() as recorder:
        model(ids)
    pattern = torch.tensor(recorder.freeze().stack("attention.pattern", layer=0))[0]
    for head in range(3):
        assert pattern[head].diagonal(-head - 1)[4:].mean() > 0.6
    for block in model.blocks:
        m = block.mixer
        copies = m.out.weight @ m._matrices()[:, 16:].flatten(0, 1) @ m.compress.weight[:16]  # W W
        assert copies.trace() > 0.5 * copies.norm() > 0
    again = head_start(Decoder(shape, mixer=lambda i: Latent(shape, i, rank=16, rope_width=16)), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_generate_goes_on_in_either_form():
    model = decoder(lambda i: Latent(WIDE, i, **latent), shape=WIDE)
    said = [
        list(generate(in_form(model, form), tokens(6), steps=10, cache=cache, temperature=2.0))
        for form in ("naive", "absorbed")
        for cache in (Full(), None)
    ]
    assert said[0] == said[1] == said[2] == said[3]
    assert len(set(said[0])) > 3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rank": 0, "rope_width": 4}, "rank must be a whole number from 1 on, not 0"),
        ({"rank": 4, "rope_width": 0}, "rope_width must be a whole number from 2 on, not 0"),
        ({"rank": 4, "rope_width": 3}, "rope_width must be even, since RoPE turns pairs, not 3"),
        ({"rank": 4, "rope_width": 4, "q_rank": 0}, "q_rank must be a whole number from 1 on, not 0"),
        ({"rank": 4, "rope_width": 4, "form": "fast"}, "form must be one of naive, absorbed, not 'fast'"),
    ],
)
def test_impossible_sizes_are_named(how, message):
    with pytest.raises(ValueError, match=message):
        Latent(SHAPE, 0, **how)


def test_other_mixers_have_no_form():
    with pytest.raises(ValueError, match="model must have latent attention in all layers, and has it in 0"):
        in_form(decoder(None), "absorbed")


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_without_its_rope_key_a_layer_knows_no_order(form):
    shape = Shape(vocab=17, width=12, layers=1, heads=4, kv_heads=4, head_width=6, ffn_width=16, max_positions=64)
    model = decoder(lambda i: Latent(shape, i, rank=5, rope_width=8, form=form), shape=shape)
    ids = tokens(9)
    mixed = torch.cat((ids[:, torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])], ids[:, 8:]), 1)
    assert torch.equal(with_rope(model, width=8)(ids), model(ids))
    silent = with_rope(model, width=0)
    torch.testing.assert_close(silent(mixed)[:, -1], silent(ids)[:, -1], rtol=1e-10, atol=1e-10)
    for width in (2, 8):
        heard = with_rope(model, width=width)
        assert not torch.allclose(heard(mixed)[:, -1], heard(ids)[:, -1], rtol=1e-6, atol=1e-6)


def test_the_quickest_pairs_of_a_rope_key_are_kept_and_the_model_is_not_altered():
    model = decoder(lambda i: Latent(WIDE, i, rank=5, rope_width=8), shape=WIDE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with record(keep={ROPE_KEY: {}}) as recorder:
        with_rope(model, width=4)(tokens(6))
    for layer in range(WIDE.layers):
        key = torch.tensor(recorder.freeze().stack(ROPE_KEY, layer=layer))[0]  # T R
        assert (key != 0).all(0).tolist() == [True, True, False, False] * 2  # a pair is one value of each half
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("width", [-2, 3, 10])
def test_impossible_widths_of_the_rope_key_are_named(width):
    model = decoder(lambda i: Latent(WIDE, i, rank=5, rope_width=8), shape=WIDE)
    with pytest.raises(ValueError, match="width must be even and from 0 to rope_width=8"):
        with_rope(model, width=width)


def test_other_mixers_have_no_rope_key_of_their_own():
    with pytest.raises(ValueError, match="a layer has another mixer"):
        with_rope(decoder(None), width=0)
