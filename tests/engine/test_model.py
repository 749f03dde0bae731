"""The decoder: laws in float64, and transformers' Llama as the oracle."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine.caches.full import Full
from engine.caches.recompute import Recompute
from engine.caches.sinks import Sinks
from engine.generate import PARTS, generate, multiplications
from engine.mixers.rope import rope_tables
from engine.mixers.softmax import SoftmaxAttention
from engine.model import Decoder, Shape
from engine.norm import RMSNorm
from engine.packed import Packed, pack
from engine.read import Policy, read
from engine.recording import record

EXACT = 1e-12  # float64, sums in another order
SHAPE = Shape(vocab=61, width=32, layers=3, heads=4, kv_heads=2, head_width=8, ffn_width=48, max_positions=64)


def decoder(seed=0, **changes):
    """A random model in float64 whose logits differ plainly: weights five times as wide as at the start of training.

    Free embeddings unless told otherwise: tied ones make a random model repeat its last token for ever.
    """
    shape = dataclasses.replace(SHAPE, **{"tied": False, **changes})
    model = Decoder(shape, seed=seed).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(5)
    return model


def text(count, *, batch=None, seed=1):
    size = (count,) if batch is None else (batch, count)
    return torch.randint(0, SHAPE.vocab, size, generator=torch.Generator().manual_seed(seed))


def furthest(a, b):
    return float((a - b).abs().max())


# --- laws ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([1, 2, 4]), st.booleans())
@settings(max_examples=40)
def test_cache_on_equals_cache_off(parts, kv_heads, tied):
    model = decoder(kv_heads=kv_heads, tied=tied)
    ids = text(sum(parts), batch=2)
    cache = Full()
    pieces = [model(part, cache=cache) for part in ids.split(parts, 1)]
    assert furthest(torch.cat(pieces, 1), model(ids)) < EXACT


@given(st.integers(2, 20), st.data())
@settings(max_examples=30)
def test_a_token_changes_nothing_before_it(length, data):
    at = data.draw(st.integers(1, length - 1))
    model, ids = decoder(), text(length, batch=1)
    other = ids.clone()
    other[0, at] = (other[0, at] + 1) % SHAPE.vocab
    before, after = model(ids), model(other)
    assert torch.equal(before[:, :at], after[:, :at])
    assert furthest(before[:, at], after[:, at]) > 1e-3


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gqa_is_mha_with_repeated_heads(kv_heads):
    few = decoder(kv_heads=kv_heads)
    many = decoder(kv_heads=SHAPE.heads)
    state = few.state_dict()
    H, D, W = SHAPE.heads, SHAPE.head_width, SHAPE.width
    for name in [n for n in state if n.endswith("qkv.weight")]:
        q, k, v = state[name].split([H * D, kv_heads * D, kv_heads * D])
        k, v = (x.view(kv_heads, D, W).repeat_interleave(H // kv_heads, 0).reshape(H * D, W) for x in (k, v))
        state[name] = torch.cat((q, k, v))
    many.load_state_dict(state)
    ids = text(17, batch=2)
    assert furthest(few(ids), many(ids)) < EXACT
    a, b = Full(), Full()
    steps = [(few(part, cache=a), many(part, cache=b)) for part in ids.split(1, 1)]
    assert max(furthest(x, y) for x, y in steps) < EXACT
    assert a.nbytes * H == b.nbytes * kv_heads


def test_mha_equals_attention_by_hand():
    """One layer of kv_heads == heads, written as loops over heads and queries."""
    model = decoder(kv_heads=4, layers=1)
    mixer = model.blocks[0].mixer
    T, H, D = 9, SHAPE.heads, SHAPE.head_width
    x = torch.randn(1, T, SHAPE.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rope = rope_tables(D, base=10000.0, count=T, dtype=torch.float64, device=torch.device("cpu"))
    q, k, v = (mixer.qkv.weight @ x[0].T).T.view(T, 3, H, D).unbind(1)
    expected = torch.zeros(T, H, D, dtype=torch.float64)
    for h in range(H):
        for t in range(T):
            scores = torch.stack([turned(q[t, h], t) @ turned(k[s, h], s) for s in range(t + 1)]) / D**0.5
            expected[t, h] = scores.exp() @ v[: t + 1, h] / scores.exp().sum()
    assert furthest(mixer(x, rope=rope)[0], expected.view(T, H * D) @ mixer.out.weight.T) < EXACT


def turned(x, position, base=10000.0):
    """RoPE of one vector, pair by pair: a rotation by position * base^(-2i/d)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = torch.tensor(position * base ** (-2 * i / len(x)), dtype=torch.float64)
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


def test_rmsnorm_equals_its_formula():
    norm = RMSNorm(24, eps=1e-5).double().requires_grad_(False)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 24, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 30.0, 2e4, 0.0]).view(1, 5, 1)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert furthest(norm(x), expected) < EXACT
    norm.requires_grad_(True)
    assert torch.autograd.gradcheck(norm, (x[:, :3].clone().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_are_the_same_products(dtype):
    model = decoder().to(dtype)
    twin = pack(model)
    if twin is model:
        pytest.skip("this processor has no blocked products")
    assert sum(isinstance(m, Packed) for m in twin.modules()) == 4 * SHAPE.layers + 1
    assert twin.embed.weight is model.embed.weight
    assert not any(isinstance(m, Packed) for m in model.modules())
    ids = text(20, batch=2)
    rounding = 1e-4 if dtype == torch.float32 else 0.25  # logits reach 10: bfloat16 steps are 0.03 to 0.06 there
    assert furthest(twin(ids).float(), model(ids).float()) < rounding
    assert multiplications(twin, rows=3, keys=5) == multiplications(model, rows=3, keys=5)


def test_packing_what_cannot_be_packed_changes_nothing():
    model = decoder()
    assert pack(model) is model


# --- the oracle ----------------------------------------------------------------------------------------------


def llama(model):
    """transformers' Llama with the weights of `model`."""
    transformers = pytest.importorskip("transformers")
    s = model.shape
    config = transformers.LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.width, intermediate_size=s.ffn_width, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_width,
        max_position_embeddings=s.max_positions, rms_norm_eps=s.norm_eps, tie_word_embeddings=s.tied,
        rope_theta=s.rope_base, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).to(model.embed.weight.dtype).eval().requires_grad_(False)
    state = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    state["lm_head.weight"] = model.embed.weight if s.tied else model.head.weight
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}."
        H, G = s.heads * s.head_width, s.kv_heads * s.head_width
        q, k, v = block.mixer.qkv.weight.split([H, G, G])
        gate, up = block.ffn.gate_up.weight.chunk(2)
        state |= {
            at + "input_layernorm.weight": block.norm1.weight,
            at + "post_attention_layernorm.weight": block.norm2.weight,
            at + "self_attn.q_proj.weight": q,
            at + "self_attn.k_proj.weight": k,
            at + "self_attn.v_proj.weight": v,
            at + "self_attn.o_proj.weight": block.mixer.out.weight,
            at + "mlp.gate_proj.weight": gate,
            at + "mlp.up_proj.weight": up,
            at + "mlp.down_proj.weight": block.ffn.down.weight,
        }
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, True), (2, False), (1, True)])
def test_llama_same_weights_same_logits(kv_heads, tied):
    model = decoder(kv_heads=kv_heads, tied=tied, rope_base=1e5)
    with torch.no_grad():
        for norm in [m for m in model.modules() if isinstance(m, RMSNorm)]:
            norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(3))
    theirs = llama(model)
    ids = text(40, batch=2)
    # Llama rounds its angles and its norms to float32, whatever the dtype of its weights.
    assert furthest(model(ids), theirs(ids).logits) < 1e-5

    tables = rope_tables(SHAPE.head_width, base=1e5, count=40, dtype=torch.float64, device=torch.device("cpu"))
    cos, sin = tables.at(range(40))
    sin = sin * torch.tensor([-1.0] * 4 + [1.0] * 4, dtype=torch.float64)  # ours has the sign of rotate_half inside
    theirs.model.rotary_emb.forward = lambda x, position_ids: (cos[None], sin[None])
    for module in theirs.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: m.weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert furthest(model(ids), theirs(ids).logits) < EXACT


# --- recording -----------------------------------------------------------------------------------------------

CACHES = {"none": lambda: None, "full": Full, "sinks": lambda: Sinks(2, 6), "recompute": lambda: Recompute(7)}


def logits_of_a_generation(model, ids, cache):
    """Every logit that the model gave while it wrote eight tokens, in order."""
    given = []
    inner = model.logits
    model.logits = lambda x: given.append(inner(x)) or given[-1]
    try:
        tokens = list(generate(model, ids, steps=8, cache=cache))
    finally:
        del model.logits
    return tokens, given


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", CACHES)
def test_recording_changes_no_bit(cache, dtype):
    model, ids = decoder().to(dtype), text(11)
    tokens, plain = logits_of_a_generation(model, ids, CACHES[cache]())
    everything_but_top = {"attention.*": {}, "residual.*": {}, "work.*": {}, "next.token": {}}
    with record(keep=everything_but_top):
        seen_tokens, seen = logits_of_a_generation(model, ids, CACHES[cache]())
    assert seen_tokens == tokens
    assert len(seen) == len(plain) == 8
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    with record():
        assert list(generate(model, ids, steps=8, cache=CACHES[cache]())) == tokens


@pytest.mark.parametrize("cache", ["none", "full"])
def test_patterns_are_what_attention_did(cache):
    """Pattern times values through `out` is the mixer's answer; the rows of a decode are one triangle."""
    model, ids = decoder(kv_heads=2), text(6)
    with record() as recorder:
        tokens = list(generate(model, ids, steps=5, cache=CACHES[cache]()))
    recording = recorder.freeze()
    assert recording.steps == 5
    whole = torch.cat((ids, torch.tensor(tokens[:-1])))[None]  # the last new token is never read
    with record() as recorder:
        model(whole)
    at_once = recorder.freeze()
    for layer in range(SHAPE.layers):
        for name in ("attention.q", "attention.k", "attention.v", "attention.pattern", "residual.norm"):
            grown = recording.stack(name, layer=layer)
            assert np.abs(grown - at_once.stack(name, layer=layer)).max() < EXACT
        pattern = recording.stack("attention.pattern", layer=layer)[0]  # head query key
        assert np.allclose(pattern.sum(-1), 1, atol=EXACT)
        assert np.array_equal(pattern, np.tril(pattern))
        q, k = (recording.stack(f"attention.{name}", layer=layer)[0] for name in "qk")
        k = k.repeat(SHAPE.heads // SHAPE.kv_heads, 0)
        scores = np.where(np.tri(10) > 0, q @ k.swapaxes(1, 2) / SHAPE.head_width**0.5, -np.inf)
        exp = np.exp(scores - scores.max(-1, keepdims=True))
        assert np.abs(exp / exp.sum(-1, keepdims=True) - pattern).max() < EXACT
    assert recording.track("attention.pattern", layer=0).at.tolist() == [0] * 6 + [1, 2, 3, 4]
    assert recording.stack("next.token").tolist() == [*ids[1:].tolist(), *tokens]
    assert recording.stack("next.top.ids")[:, 0].tolist()[-5:] == tokens
    reference = model(whole)[0].softmax(-1).topk(10).values
    assert np.abs(recording.stack("next.top.probability") - reference.numpy()).max() < 1e-6
    assert recording.stack("work.rows").tolist() == ([6, 7, 8, 9, 10] if cache == "none" else [6, 1, 1, 1, 1])


def test_multiplications_are_those_of_torch():
    for activation in ("swiglu", "gelu", "relu"):
        model = decoder(activation=activation)
        with FlopCounterMode(display=False) as counter:
            model.logits(model.hidden(text(7, batch=1))[:, -1:])
        count = dict(zip(PARTS, multiplications(model, rows=7, keys=7), strict=True))
        products = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "attention" not in str(k))
        assert count["scores"] == count["values"] == 7 * 7 * SHAPE.heads * SHAPE.head_width * SHAPE.layers
        assert 2 * (sum(count.values()) - count["scores"] - count["values"]) == products


# --- generating ----------------------------------------------------------------------------------------------


def test_greedy_tokens_are_the_same_with_every_exact_memory():
    model, ids = decoder(), text(9)
    plain = list(generate(model, ids, steps=12))
    assert len(set(plain)) > 3  # a model that says one thing for ever would prove little
    for cache in (Full(), Full(capacity=1), Sinks(4, 30), Recompute(40)):
        assert list(generate(model, ids, steps=12, cache=cache)) == plain
    cache = Full()
    first = list(generate(model, ids, steps=5, cache=cache))
    assert first + list(generate(model, [first[-1]], steps=7, cache=cache)) == plain


def test_sampling_follows_seed_and_temperature():
    model, ids = decoder(), text(5).tolist()

    def draw(temperature, seed):
        return list(generate(model, ids, steps=10, cache=Full(), temperature=temperature, seed=seed))

    assert draw(1.0, 3) == draw(1.0, 3) != draw(1.0, 4)
    assert draw(1e-6, 3) == draw(0.0, 0)
    share = model(torch.tensor([ids]))[0, -1].div(2.0).softmax(-1)
    firsts = [next(generate(model, ids, steps=1, temperature=2.0, seed=seed)) for seed in range(400)]
    likeliest = int(share.argmax())
    spread = float((share[likeliest] * (1 - share[likeliest]) / 400).sqrt())
    assert abs(firsts.count(likeliest) / 400 - float(share[likeliest])) < 4 * spread


def test_inference_mode_does_not_leak_from_a_generation():
    words = generate(decoder(), text(3), steps=3)
    next(words)
    assert not torch.is_inference_mode_enabled()


def test_a_model_that_has_generated_can_still_be_trained():
    model = Decoder(SHAPE)
    list(generate(model, text(4), steps=2, cache=Full()))
    model(text(8, batch=2)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    one = Decoder(SHAPE, seed=5)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), Decoder(SHAPE, seed=5).parameters(), strict=True))
    assert not torch.equal(one.embed.weight, Decoder(SHAPE, seed=6).embed.weight)
    assert 0.015 < float(one.embed.weight.detach().std()) < 0.025


def test_parts_are_composed():
    class Nothing(nn.Module):
        def forward(self, x, **context):
            return torch.zeros_like(x)

    model = Decoder(SHAPE, mixer=lambda layer: Nothing() if layer == 1 else SoftmaxAttention(SHAPE, layer))
    assert [type(block.mixer).__name__ for block in model.blocks] == ["SoftmaxAttention", "Nothing", "SoftmaxAttention"]
    assert model(text(4, batch=1)).shape == (1, 4, SHAPE.vocab)
    names = set(Decoder(dataclasses.replace(SHAPE, layers=1, tied=False)).state_dict())
    attention = {"norm1.weight", "mixer.qkv.weight", "mixer.out.weight"}
    ffn = {"norm2.weight", "ffn.gate_up.weight", "ffn.down.weight"}
    assert names == {"embed.weight", *(f"blocks.0.{name}" for name in attention | ffn), "norm.weight", "head.weight"}
    assert "blocks.0.ffn.up.weight" in Decoder(dataclasses.replace(SHAPE, activation="gelu")).state_dict()
    assert "head.weight" not in Decoder(SHAPE).state_dict()


def test_meta_device_and_copies():
    with torch.device("meta"):
        empty = Decoder(SHAPE)
    full = Decoder(SHAPE, seed=3)
    empty.load_state_dict(full.state_dict(), assign=True)
    ids = text(5, batch=1)
    assert torch.equal(empty(ids), full(ids))
    assert torch.equal(copy.deepcopy(full)(ids), full(ids))


# --- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab": 0}, "vocab must be a whole number above 0, not 0"),
        ({"width": 32.0}, "width must be a whole number above 0, not 32.0"),
        ({"layers": True}, "layers must be a whole number above 0, not True"),
        ({"kv_heads": 3}, "kv_heads must divide heads=4, and 3 does not"),
        ({"head_width": 7}, "head_width must be even"),
        ({"activation": "tanh"}, "activation must be"),
        ({"norm_eps": 0.0}, "norm_eps must be a number above 0, not 0.0"),
        ({"rope_base": float("nan")}, "rope_base must be a number above 0, not nan"),
    ],
)
def test_impossible_shapes(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SHAPE, **changes)


def test_impossible_generations():
    model = decoder()
    for ids, options, words in [
        (text(60), {"steps": 6}, "60 tokens and 6 new ones need 65 positions, and the model has max_positions=64"),
        (text(65), {"steps": 1, "cache": Full()}, "need 65 positions"),
        (text(5), {"steps": 1, "cache": Sinks(4, 61)}, None),
        (text(5), {"steps": 61, "cache": Sinks(4, 61)}, "need 65 positions"),
        (text(65), {"steps": 2, "cache": Sinks(4, 60)}, None),
        (text(65), {"steps": 2, "cache": Recompute(64)}, None),
        (text(5), {"steps": 0}, "steps must be a number of tokens above 0, not 0"),
        (text(5), {"steps": 1, "temperature": -1.0}, "temperature must be 0 or a number above, not -1.0"),
        (text(5), {"steps": 1, "temperature": float("nan")}, "temperature must be 0 or a number above, not nan"),
        ([], {"steps": 1}, "ids must be whole numbers"),
        ([0.5], {"steps": 1}, "ids must be whole numbers"),
        (text(3, batch=2), {"steps": 1}, "ids must be whole numbers"),
        ([1, 61], {"steps": 1}, "ids must lie between 0 and 60, and run from 1 to 61"),
        ([-1, 3], {"steps": 1}, "ids must lie between 0 and 60, and run from -1 to 3"),
    ]:
        if words is None:
            list(generate(model, ids, **options))
        else:
            with pytest.raises(ValueError, match=words):
                generate(model, ids, **options)


def test_impossible_passes():
    model = decoder()
    for ids, words in [
        (text(3), r"ids must have shape \[batch, tokens\] with a token at least, not \[3\]"),
        (text(0, batch=1), r"not \[1, 0\]"),
        (text(65, batch=1), "position 64 is past max_positions=64"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(ids)


def test_impossible_readings():
    model = decoder()
    used = Full()
    model(text(3, batch=1), cache=used)
    for ids, policies, words in [
        (text(1), {"a": Policy(Full())}, "two tokens at least"),
        (text(5), {}, "policies must name at least one policy"),
        (text(5), {"a": Policy(used)}, r"policies\['a'\] must come with a fresh cache, and it has seen 3 tokens"),
        (text(65), {"a": Policy(Full())}, r"policies\['a'\] needs 65 positions, and the model has max_positions=64"),
        (text(5), {"a": Policy(Full(), (1,) * 5)}, "opening must be shorter than the text of 5 tokens"),
        (text(5), {"a": Policy(Full(), (61,))}, "ids must lie between 0 and 60"),
    ]:
        with pytest.raises(ValueError, match=words):
            read(model, ids, policies)
