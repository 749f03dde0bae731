"""LoRA: the start is the base, merged is unmerged, the rank is what was promised; oracle: peft on shared weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.peft import deltas, detach, lora, rank_of, trainable
from engine.recording import record
from tests.engine.quant.test_integer import tokens, toy
from tests.engine.test_model import decoder, llama, text


def furthest(a, b):
    return float((a - b).detach().abs().max())


def shaken(model, seed=1):
    """The tuned model, its trained tensors moved as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(model).values():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


targets = st.sampled_from([("q", "v"), ("qkv",), ("k",), ("out", "down"), ("gate", "up"), ("q", "gate_up", "down")])


@settings(max_examples=12)
@given(st.integers(1, 8), st.floats(0.5, 32), targets, st.integers(0, 2**31))
def test_laws_of_the_start_of_merging_and_of_rank(rank, alpha, names, seed):
    base, ids = toy(), tokens()
    model = lora.attach(base, rank=rank, alpha=alpha, targets=names, seed=seed)
    exact = base(ids)
    assert torch.equal(model(ids), exact)
    shaken(model, seed)
    moved = model(ids)
    assert not torch.allclose(moved, exact, atol=1e-6)
    merged = lora.merge(model)
    assert not lora.layers(merged)
    assert furthest(merged(ids), moved) < 1e-12
    back = lora.unmerge(merged, model)
    for name, layer in lora.layers(back).items():
        assert furthest(layer.base(), base.get_submodule(name).weight) < 1e-14
    assert furthest(back(ids), moved) < 1e-12
    assert torch.equal(detach(model)(ids), exact)
    for name, delta in deltas(model, base).items():
        held = lora.layers(model).get(name)
        parts = held.rows if held else {}
        for start, stop in parts.values():
            assert rank_of(delta[start:stop]) == rank
        outside = torch.ones(len(delta), dtype=torch.bool)
        for start, stop in parts.values():
            outside[start:stop] = False
        assert not delta[outside].any()


def test_the_scale_is_alpha_over_the_rank():
    model = shaken(lora.attach(toy(), rank=4, alpha=6.0, targets=("down",)))
    layer = lora.layers(model)["blocks.1.ffn.down"]
    expected = layer.base() + 1.5 * layer.B["down"] @ layer.A["down"]
    assert furthest(layer.effective_weight(), expected) < 1e-15


@pytest.mark.parametrize("whole", ["qkv", "out", "gate_up", "down"])
def test_the_same_as_peft_put_into_our_own_model(whole):
    peft = pytest.importorskip("peft")
    base, ids = toy(), tokens()
    ours = shaken(lora.attach(base, rank=3, alpha=12.0, targets=(whole,)))
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=12, target_modules=[whole]), toy())
    theirs.load_state_dict(base.state_dict(), strict=False)
    for name, layer in lora.layers(ours).items():
        other = theirs.get_submodule(name)
        other.lora_A["default"].weight.data = layer.A[whole].data.clone()
        other.lora_B["default"].weight.data = layer.B[whole].data.clone()
    assert furthest(theirs(ids), ours(ids)) < 1e-12
    assert furthest(theirs(ids), base(ids)) > 1e-3
    ours(ids).square().mean().backward()
    theirs(ids).square().mean().backward()
    for name, layer in lora.layers(ours).items():
        other = theirs.get_submodule(name)
        assert furthest(layer.A[whole].grad, other.lora_A["default"].weight.grad) < 1e-12
        assert furthest(layer.B[whole].grad, other.lora_B["default"].weight.grad) < 1e-12


def test_rows_of_the_fused_matrix_are_the_projections_of_a_llama_under_peft():
    peft = pytest.importorskip("peft")
    base, ids = decoder(kv_heads=2), text(20, batch=2)
    ours = shaken(lora.attach(base, rank=2, alpha=8.0, targets=("q", "v", "gate")))
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj"])
    theirs = peft.inject_adapter_in_model(config, llama(base))
    for name, layer in lora.layers(ours).items():
        at = f"model.layers.{name.split('.')[1]}."
        for part in layer.rows:
            place = "mlp.gate_proj" if part == "gate" else f"self_attn.{part}_proj"
            other = theirs.get_submodule(at + place)
            other.lora_A["default"].weight.data = layer.A[part].data.clone()
            other.lora_B["default"].weight.data = layer.B[part].data.clone()
    # Llama rounds its angles and its norms to float32, whatever the dtype of its weights.
    assert furthest(ours(ids), theirs(ids).logits) < 1e-5
    assert furthest(ours(ids), base(ids)) > 1e-3


def test_taps_show_both_thin_matrices():
    model = shaken(lora.attach(toy(), rank=2))
    with record() as recorder:
        lora.show(model, method="lora")
    shown = recorder.freeze()
    layer = lora.layers(model)["blocks.0.mixer.qkv"]
    for name, held in (("lora.a", layer.A["v"]), ("lora.b", layer.B["v"])):
        track = shown.track(name, matrix="blocks.0.mixer.qkv", part="v", method="lora")
        assert torch.equal(torch.tensor(track.latest()), held.detach())


def test_bad_input_is_named():
    for options, words in [
        ({"rank": 0}, "rank must be a whole number from 1 to 32 for q"),
        ({"rank": 17, "targets": ("v",)}, r"rank must be .* from 1 to 16 for v \[16, 32\], not 17"),
        ({"rank": 2.0}, "rank must be .* not 2.0"),
        ({"alpha": 0.0}, "alpha must be a number above 0"),
        ({"targets": ()}, "targets must be a list"),
        ({"targets": "qkv"}, "targets must be a list"),
        ({"targets": ("gait",)}, "targets must be layers of the model .* not 'gait'"),
        ({"targets": ("q", "qkv")}, "targets must not overlap"),
    ]:
        with pytest.raises(ValueError, match=words):
            lora.attach(toy(), **options)
    model = lora.attach(toy())
    with pytest.raises(ValueError, match="merged must have a plain layer"):
        lora.unmerge(model, model)
