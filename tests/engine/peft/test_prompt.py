"""Prompt tuning: n learned words are n tokens read first; oracle: peft's prompt tuning on the same weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.caches.recompute import Recompute
from engine.generate import generate
from engine.peft import detach, prompt, trainable, trained_count
from engine.recording import record
from tests.engine.peft.test_lora import furthest, shaken
from tests.engine.quant.test_integer import tokens, toy
from tests.engine.test_model import decoder, llama, text


@settings(max_examples=12)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31))
def test_embeddings_of_tokens_are_the_tokens_read_first(n, count, seed):
    base, ids = toy(), tokens(count, seed)
    first = torch.randint(0, 31, (n,), generator=torch.Generator().manual_seed(seed))
    model = prompt.attach(base, n=n, ids=first)
    whole = torch.cat((first.expand(2, n), ids), 1)
    assert torch.equal(model.hidden(ids), base.hidden(whole)[:, n:])
    assert furthest(model(ids), base(whole)[:, n:]) < 1e-14
    assert trained_count(model) == n * 32
    assert torch.equal(detach(shaken(model))(ids), base(ids))


def test_any_vectors_are_concatenated_and_positions_shift():
    base, ids = toy(), tokens()
    model = shaken(prompt.attach(base, n=5))
    x = torch.cat((model.embed.prompt.expand(2, 5, 32), base.embed(ids)), 1)
    rope = base.rope(x)
    for block in base.blocks:
        x = block(x, rope=rope)
    assert torch.equal(model.hidden(ids), base.norm(x)[:, 5:])


@pytest.mark.parametrize("make", [Full, Recompute, lambda: None])
def test_the_prompt_is_read_once_whatever_remembers(make):
    model, ids = shaken(prompt.attach(toy(), n=4)), tokens()[0, :6]
    said = list(generate(model, ids, steps=8, cache=make()))
    text = ids.tolist()
    for token in said:
        assert token == int(model(torch.tensor([text]))[0, -1].argmax())
        text.append(token)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_same_as_peft():
    peft = pytest.importorskip("peft")
    base, ids = decoder(kv_heads=2), text(20, batch=2)
    ours = shaken(prompt.attach(base, n=6))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    theirs = peft.get_peft_model(llama(base), config)
    theirs.prompt_encoder["default"].embedding.weight.data = ours.embed.prompt.data.clone()
    # Llama rounds its angles and its norms to float32, whatever the dtype of its weights.
    assert furthest(ours(ids), theirs(ids).logits[:, 6:]) < 1e-5
    assert furthest(ours(ids), base(ids)) > 1e-3


def test_only_the_prompt_learns():
    base, ids = toy(), tokens()
    model = prompt.attach(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(ids).square().mean().backward()
    torch.optim.SGD(trainable(model).values(), lr=1.0).step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (name == "embed.prompt")
    with record(keep={"prompt.*": {}}) as recorder:
        model(ids)
    shown = recorder.freeze().track("prompt.embeddings").latest()
    assert torch.equal(torch.tensor(shown), model.embed.prompt.detach())


def test_bad_input_is_named():
    for options, words in [
        ({"n": 0}, "n must be a whole number from 1 to 63, not 0"),
        ({"n": 64}, "n must be a whole number from 1 to 63, not 64"),
        ({"n": 2, "ids": [1, 2, 3]}, "ids must be n=2 tokens, not 3"),
        ({"n": 1, "ids": [31]}, "ids must lie between 0 and 30"),
    ]:
        with pytest.raises(ValueError, match=words):
            prompt.attach(toy(), **options)
    with pytest.raises(ValueError, match="past max_positions=64"):
        prompt.attach(toy(), n=50)(tokens())
