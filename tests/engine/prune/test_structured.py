"""Structured pruning: the smaller model gives what the masked one gives, whatever heads share."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.generate import generate
from engine.prune import apply
from engine.prune.structured import (
    attention,
    best,
    cut,
    cut_masks,
    head_errors,
    head_outputs,
    head_scores,
    heads_of,
    layer_scores,
    neuron_scores,
    neurons_of,
    relative_error,
    written,
)
from engine.recording import record
from tests.engine.prune.test_masks import same
from tests.engine.quant.test_integer import randn, tokens, toy

TIGHT = 1e-12


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from(["swiglu", "gelu", "relu"]))
def test_the_smaller_model_equals_the_masked_one(data, activation):
    """Nine query heads on three key heads, as SmolLM2: any heads may go, a key head goes with its last."""
    model = toy(heads=9, kv_heads=3, activation=activation)
    ids = tokens(9)
    some = st.sets(st.integers(0, 8), min_size=1).map(sorted)
    heads = {0: data.draw(some), 1: data.draw(some)}
    neurons = {1: data.draw(st.sets(st.integers(0, 47), min_size=1).map(sorted))}
    before = copy.deepcopy(model)
    small = cut(model, heads=heads, neurons=neurons)
    masked = apply(model, cut_masks(model, heads=heads, neurons=neurons))
    assert (small(ids) - masked(ids)).abs().max() < TIGHT
    assert same(model, before)
    mixer = small.blocks[0].mixer
    used = {head // 3 for head in heads[0]}
    assert mixer.qkv.weight.shape == ((len(heads[0]) + 2 * len(used)) * 8, 32)
    assert mixer.out.weight.shape == (32, len(heads[0]) * 8)
    assert small.blocks[1].ffn.down.weight.shape == (32, len(neurons[1]))
    assert small.blocks[0].ffn is not model.blocks[0].ffn
    assert small.blocks[0].ffn.down.weight is model.blocks[0].ffn.down.weight  # what is not cut is shared


@pytest.mark.parametrize("kept", [[0, 3, 6], [0, 1, 5], [4], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_with_a_cache_as_without_and_taps_have_the_heads_left(kept):
    model = cut(toy(heads=9, kv_heads=3), heads={0: kept, 1: kept})
    ids = tokens(7)
    cache = Full()
    pieces = torch.cat([model(ids[:, :4], cache=cache), *(model(ids[:, t : t + 1], cache=cache) for t in (4, 5, 6))], 1)
    assert (pieces - model(ids)).abs().max() < TIGHT
    with record() as recorder:
        assert torch.equal(model(ids), model(ids))
    shown = recorder.freeze()
    assert shown.track("attention.pattern", layer=1).latest(0).shape[0] == 2
    assert shown.stack("attention.pattern", layer=1).shape[1] == len(kept)
    assert list(generate(model, ids[0], steps=3, cache=Full())) == list(generate(model, ids[0], steps=3))


def test_cutting_twice_is_cutting_once():
    model, ids = toy(heads=9, kv_heads=3), tokens(6)
    once = cut(model, heads={0: [1, 5, 8]})
    twice = cut(cut(model, heads={0: [1, 4, 5, 8]}), heads={0: [0, 2, 3]})
    assert (once(ids) - twice(ids)).abs().max() < TIGHT
    assert once.blocks[0].mixer.qkv.weight.shape == twice.blocks[0].mixer.qkv.weight.shape


def test_layers_go_and_are_counted_anew():
    model, ids = toy(layers=4), tokens(6)
    small = cut(model, layers=[0, 3])
    x = model.embed(ids)
    for block in (model.blocks[0], model.blocks[3]):
        x = block(x, rope=model.rope(x))
    assert torch.equal(small(ids), model.logits(model.norm(x)))
    assert [block.mixer.layer for block in small.blocks] == [0, 1]
    assert [block.mixer.layer for block in model.blocks] == [0, 1, 2, 3]
    assert small.shape.layers == 2
    assert (small(ids, cache=Full()) - small(ids)).abs().max() < TIGHT


def test_the_smaller_model_is_smaller_and_its_shape_says_so():
    model = toy()
    small = cut(model, neurons=neurons_of(model, share=0.25), heads=heads_of(model, tokens(), keep=2))
    assert small.shape.ffn_width == 12
    # heads 2 of 4; which key heads stay depends on the scores
    assert all(block.mixer.heads == 2 and block.mixer.kv_heads in (1, 2) for block in small.blocks)
    count = [sum(p.numel() for p in m.blocks.parameters()) for m in (model, small)]
    assert count[1] < count[0] / 2


def test_scores_are_the_norms_they_say():
    model, ids = toy(), tokens(6)
    model.requires_grad_(False)
    outputs = head_outputs(model, ids)
    y, out = outputs[1], attention(model, 1).out.weight
    assert y.shape == (12, 4, 8)
    parts = written(y, out)
    x = y.flatten(1) @ out.mT
    assert (parts.sum(1) - x).abs().max() < TIGHT
    for head in range(4):
        alone = torch.zeros_like(y)
        alone[:, head] = y[:, head]
        assert (parts[:, head] - alone.flatten(1) @ out.mT).abs().max() < TIGHT
        assert float(head_scores(y, out)[head]) == pytest.approx(float((alone.flatten(1) @ out.mT).norm()), rel=1e-12)
        assert float(head_scores(y, out, by="output")[head]) == pytest.approx(float(y[:, head].norm()), rel=1e-12)
    ffn = model.blocks[0].ffn
    gate, up = ffn.gate_up.weight.chunk(2)
    neuron = torch.cat((gate[5], up[5])).norm() * ffn.down.weight[:, 5].norm()
    assert float(neuron_scores(model, 0)[5]) == pytest.approx(float(neuron), rel=1e-12)
    x = model.embed(ids)
    after = model.blocks[0](x, rope=model.rope(x))
    added = ((after - x).norm(dim=-1) / x.norm(dim=-1)).mean()
    assert float(layer_scores(model, ids)[0]) == pytest.approx(float(added), rel=1e-12)


def test_the_relative_error_is_that_of_a_pruned_layer_and_falls_to_zero():
    """Eight heads, of which 8, 6, 4 and 2 stay: `architectures` task 3, with the head axis kept."""
    model, ids = toy(heads=8, kv_heads=8).requires_grad_(False), tokens(8)
    y, out = head_outputs(model, ids)[0], attention(model, 0).out.weight
    with record() as recorder:
        errors = head_errors(y, out, keep=(8, 6, 4, 2), layer=0)
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert 0 < errors[1] < errors[3] < 2
    kept = best(head_scores(y, out), 4)
    x, rope = model.blocks[0].norm1(model.embed(ids)), model.rope(model.embed(ids))
    full = attention(model, 0)(x, rope=rope)
    pruned = attention(cut(model, heads={0: kept}), 0)(x, rope=rope)
    assert errors[2] == pytest.approx(float((full - pruned).norm() / full.norm()), rel=1e-9)
    shown = recorder.freeze()
    assert shown.track("prune.head.error", layer=0).latest() == pytest.approx(errors)
    assert shown.track("prune.head.score", layer=0).latest() == pytest.approx(head_scores(y, out).numpy())


def test_the_best_heads_are_the_highest_and_ties_keep_the_first():
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2) == [1, 3]
    assert best(torch.tensor([2.0, 1.0, 2.0, 2.0]), 2) == [0, 2]


def test_events_and_taps_tell_what_went():
    model = toy()
    with record() as recorder:
        cut(model, heads={1: [0, 3]}, neurons={0: [1, 2, 4]})
    shown = recorder.freeze()
    assert shown.track("prune.head.kept", layer=1).latest().tolist() == [True, False, False, True]
    assert dict(shown.happened("prune.heads")[0].fields) == {"layer": 1, "kept": [0, 3], "of": 4}
    assert dict(shown.happened("prune.neurons")[0].fields) == {"layer": 0, "kept": 3, "of": 48}


def test_bad_input_is_named():
    model, y, out = toy(), randn(5, 4, 8), randn(32, 32)
    odd = toy()
    odd.blocks[0].mixer = odd.blocks[0].ffn = torch.nn.Identity()
    for call, words in [
        (lambda: cut(model, heads={0: []}), r"heads\[0\] must be rising numbers from 0 to 3, one at least, not \[\]"),
        (lambda: cut(model, heads={0: [4]}), r"heads\[0\] must be"),
        (lambda: cut(model, heads={0: [2, 1]}), r"heads\[0\] must be"),
        (lambda: cut(model, heads={2: [1]}), "layer must be from 0 to 1, not 2"),
        (lambda: cut(model, neurons={0: [48]}), r"neurons\[0\] must be"),
        (lambda: cut(model, layers=[]), "layers must be"),
        (lambda: cut(odd, heads={0: [1]}), "layer 0 must have softmax attention"),
        (lambda: cut_masks(odd, neurons={0: [1]}), "layer 0 must have a SwiGLU, GELU or ReLU"),
        (lambda: best(torch.ones(3), 0), "keep must be from 1 to 3, not 0"),
        (lambda: best(torch.ones(3), 4), "keep must be from 1 to 3, not 4"),
        (lambda: head_scores(y, out, by="luck"), "by must be"),
        (lambda: written(y, randn(32, 30)), "y and out must have shapes"),
        (lambda: relative_error(y * 0, out, [1]), "y must give an output that is not zero"),
        (lambda: relative_error(y, out, [9]), "kept must be"),
        (lambda: neurons_of(model, share=2), "share must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.real
def test_smollm2_loses_heads_one_by_one(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris, and the capital of Italy is Rome.")])
    y, out = head_outputs(model, ids)[10], attention(model, 10).out.weight.detach()
    errors = head_errors(y, out, keep=(9, 8, 6, 4, 2))
    assert errors[0] == 0
    assert errors == sorted(errors)
    heads = {10: best(head_scores(y, out), 5)}
    small, masked = cut(model, heads=heads), apply(model, cut_masks(model, heads=heads))
    assert torch.allclose(small(ids), masked(ids), rtol=0, atol=2e-3)
    assert model.blocks[10].mixer.heads == 9
