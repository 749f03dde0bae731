"""Adapters: the identity at first, where Houlsby puts them, and as many parameters as the formula says."""

import pytest
import torch
import torch.nn.functional as F

from engine.caches.full import Full
from engine.generate import generate
from engine.peft import adapter, detach, trainable, trained_count
from engine.recording import record
from tests.engine.peft.test_lora import furthest, shaken
from tests.engine.quant.test_integer import tokens, toy


@pytest.mark.parametrize("m", [1, 5, 40])
def test_the_start_is_the_identity_and_the_count_is_the_formula(m):
    base, ids = toy(), tokens()
    model = adapter.attach(base, bottleneck=m)
    assert torch.equal(model(ids), base(ids))
    assert trained_count(model) == 2 * 2 * (2 * m * 32 + m + 32)
    assert torch.equal(detach(shaken(model))(ids), base(ids))
    assert not torch.equal(model(ids), base(ids))
    with_norms = adapter.attach(base, bottleneck=m, norms=True)
    assert trained_count(with_norms) - trained_count(model) == 2 * 2 * 32
    assert torch.equal(with_norms(ids), base(ids))


def test_it_stands_between_a_sublayer_and_its_skip_connection():
    base, ids = toy(), tokens()
    model = shaken(adapter.attach(base, bottleneck=3))

    def through(adapted, h):
        narrow = F.gelu(h @ adapted.down.weight.mT + adapted.down.bias)
        return h + narrow @ adapted.up.weight.mT + adapted.up.bias

    x = base.embed(ids)
    rope = base.rope(x)
    for block, adapted in zip(base.blocks, model.blocks, strict=True):
        x = x + through(adapted.after_mixer, block.mixer(block.norm1(x), rope=rope))
        x = x + through(adapted.after_ffn, block.ffn(block.norm2(x)))
    assert furthest(base.logits(base.norm(x)), model(ids)) < 1e-12


def test_only_adapters_learn_and_the_model_still_generates():
    base, ids = toy(), tokens()
    model = adapter.attach(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for _ in range(2):
        model(ids).square().mean().backward()
        optimiser.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (".after_" in name)
    prompt = ids[0, :5]
    assert list(generate(model, prompt, steps=6, cache=Full())) == list(generate(model, prompt, steps=6))


def test_taps_show_the_length_of_each_detour():
    model, ids = shaken(adapter.attach(toy())), tokens()
    exact = model(ids)
    with record(keep={"adapter.*": {}}) as recorder:
        assert torch.equal(model(ids), exact)
    shown = recorder.freeze()
    assert shown.track("adapter.detour", place="1.ffn").latest().shape == (2, 20)
    assert len(shown.tracks) == 4


def test_bad_input_is_named():
    for bottleneck in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="bottleneck must be a whole number above 0"):
            adapter.attach(toy(), bottleneck=bottleneck)
    with pytest.raises(ValueError, match="model must have plain blocks"):
        adapter.attach(adapter.attach(toy()))
