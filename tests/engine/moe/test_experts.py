"""Experts: dispatched equals the mixture written out, and a Mixtral block of `transformers` on the same weights."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from engine.auxiliary import auxiliary
from engine.caches.full import Full
from engine.generate import PARTS, multiplications
from engine.model import Decoder
from engine.moe.experts import Experts, dispatch, mixture
from engine.moe.router import ExpertChoice, TopK, balance_loss, z_loss
from engine.recording import record
from tests.engine.moe.common import SHAPE, SWITCH, decoder, experts, ids, randn

ROUTES = [SWITCH, TopK(2), TopK(3, renormalise=False), TopK(2, capacity=0.5), ExpertChoice(2.0), TopK(6)]


@given(st.sampled_from(ROUTES), st.integers(1, 20), st.integers(0, 2**31))
def test_dispatched_equals_the_mixture_written_out(route, tokens, seed):
    layer, x = experts(route=route), randn(tokens, 16, seed=seed)
    routing = route(layer.router(x))
    want = mixture(x, routing.gates, layer.experts)
    assert torch.allclose(dispatch(x, routing, layer.experts), want, rtol=0, atol=1e-12)
    assert torch.allclose(layer(x[None])[0], want, rtol=0, atol=1e-12)


def test_all_experts_without_renormalising_are_the_dense_mixture():
    layer, x = experts(route=TopK(6, renormalise=False)), randn(9, 16)
    dense = mixture(x, layer.router(x).softmax(-1), layer.experts)
    assert torch.allclose(layer(x), dense, rtol=0, atol=1e-12)
    assert torch.allclose(experts(route=TopK(6))(x), dense, rtol=0, atol=1e-12), "the sum of all is 1 either way"


def test_one_expert_is_the_plain_network_and_shared_ones_are_added():
    x = randn(2, 5, 16)
    layer = experts(1, route=TopK(1))
    assert torch.allclose(layer(x), layer.experts[0](x), rtol=0, atol=1e-12)
    layer = experts(4, shared=2, route=TopK(2))
    flat = x.flatten(0, 1)
    routed = dispatch(flat, TopK(2)(layer.router(flat)), layer.experts).view_as(x)
    assert torch.allclose(layer(x), routed + layer.shared[0](x) + layer.shared[1](x), rtol=0, atol=1e-12)


def test_a_dropped_token_passes_by_in_the_residual():
    model = decoder(4, route=TopK(1, renormalise=False, capacity=0.5))
    block = model.blocks[0]
    with record() as recorder:
        x = model.embed(ids())
        after = x + block.mixer(block.norm1(x), rope=model.rope(x))
        out = after + block.ffn(block.norm2(after))
    shown = recorder.freeze()
    dropped = torch.from_numpy(shown.stack("moe.dropped", layer=0)).any(-1).view(2, 20)
    assert 0 < dropped.sum() < 40
    assert torch.equal(out[dropped], after[dropped])
    assert not (out == after)[~dropped].all(-1).any()


def test_each_expert_works_on_its_own_tokens_alone():
    layer, seen = experts(route=TopK(2)), []
    for expert in layer.experts:
        expert.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    x = randn(2, 10, 16)
    layer(x)
    load = TopK(2)(layer.router(x.flatten(0, 1))).load
    assert seen == [n for n in load.tolist() if n]
    assert sum(seen) == 2 * 20


@pytest.mark.parametrize("route", [SWITCH, TopK(2)])
def test_word_by_word_equals_at_once(route):
    model, text = decoder(route=route, shared=1), ids(rows=1)
    at_once = model(text)
    cache = Full()
    one_by_one = torch.cat([model(text[:, t : t + 1], cache=cache) for t in range(20)], 1)
    assert torch.allclose(one_by_one, at_once, rtol=0, atol=1e-12)


def test_training_collects_the_losses_and_inference_computes_none(monkeypatch):
    model = decoder(balance=0.5, z=0.25).requires_grad_(True)
    logits = model(ids())
    with auxiliary() as extra:
        again = model(ids())
    assert torch.equal(logits, again)
    assert len(extra) == 2 * SHAPE.layers
    expected, hidden = [], []
    for block in model.blocks:
        block.ffn.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    model(ids())
    for block, x in zip(model.blocks, hidden, strict=True):
        scores = block.ffn.router(x.flatten(0, 1))
        expected += [0.5 * balance_loss(TopK(2)(scores)), 0.25 * z_loss(scores)]
    assert torch.equal(torch.stack(extra), torch.stack(expected))
    sum(extra).backward()
    assert all(block.ffn.router.weight.grad.abs().sum() > 0 for block in model.blocks)
    monkeypatch.setattr("engine.moe.experts.balance_loss", None)
    model(ids())  # outside nobody computes it


def test_without_weights_there_are_no_losses():
    with auxiliary() as extra, record():
        decoder(balance=0.0)(ids())
    assert extra == []


def test_the_router_learns_from_the_answer():
    layer = experts(route=SWITCH).requires_grad_(True)
    layer(randn(7, 16)).square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_taps_change_nothing_and_tell_what_happened():
    model = decoder(route=TopK(2, capacity=0.75), z=0.1)
    plain = model(ids())
    with record() as recorder:
        assert torch.equal(model(ids()), plain)
    shown = recorder.freeze()
    assert shown.nbytes < 200_000
    for i in range(SHAPE.layers):
        p, g, c, d = (shown.stack(f"moe.{name}", layer=i) for name in ("probability", "gate", "chosen", "dropped"))
        assert p.shape == g.shape == c.shape == d.shape == (40, 6)
        assert p.sum(-1) == pytest.approx(1)
        assert (c.sum(-1) == 2).all()
        assert ((g > 0) == (c & ~d)).all()
        assert d.any()
        assert (shown.track("moe.load", layer=i).latest() == c.sum(0)).all()
        balance = 6 * ((c.sum(0) / c.sum()) * p.mean(0)).sum()
        assert float(shown.track("moe.balance", layer=i).latest()) == pytest.approx(balance)
        assert float(shown.track("moe.z", layer=i).latest()) > 0


def test_a_decoder_of_experts_trains():
    model = Decoder(SHAPE, ffn=lambda layer: Experts(SHAPE, layer, count=4), seed=1)
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    text = ids(rows=4)
    for _ in range(20):
        with auxiliary() as extra:
            loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimiser.zero_grad()
        sum(extra, loss).backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(256), abs=0.2)
    assert losses[-1] < 0.8 * losses[0]


def test_widths_and_activations_are_those_asked_for():
    layer = Experts(replace(SHAPE, activation="relu"), 0, count=3, width=5, shared=1)
    assert [tuple(m.up.weight.shape) for m in (*layer.experts, *layer.shared)] == [(5, 16)] * 4


def test_bad_input_is_named():
    for options, words in [
        ({"count": 0}, "count must be 1 or more, not 0"),
        ({"count": 2, "route": TopK(3)}, "k must be at most the number of experts, 2, not 3"),
        ({"count": 2, "shared": -1}, "shared must be 0 or more, not -1"),
        ({"count": 2, "balance": -0.1}, "balance must be 0 or more, not -0.1"),
        ({"count": 2, "z": math.nan}, "z must be 0 or more, not nan"),
        ({"count": 2, "width": 0}, "ffn_width must be a whole number above 0, not 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            Experts(SHAPE, 0, **options)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_only_the_experts_that_are_called_are_counted(k, shared):
    model = decoder(route=TopK(k), shared=shared)
    text = torch.arange(9)[None]
    with FlopCounterMode(display=False) as counter:
        for block in model.blocks:
            block.ffn(model.embed(text))
    told = dict(zip(PARTS, multiplications(model, rows=9, keys=9), strict=True))["ffn"]
    assert 2 * told == counter.get_total_flops()
