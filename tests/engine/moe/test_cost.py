"""What mixtures cost: by formula, and counted on models that are built."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine import cost
from engine.caches.full import Full
from engine.cost import Mixture
from engine.model import Decoder
from engine.moe.experts import Experts
from engine.moe.router import TopK
from engine.published import PUBLISHED
from tests.engine.moe.common import SHAPE, ids

MIXTRAL = Mixture(8, 2)


def test_mixtral_has_the_parameters_it_reports():
    published = PUBLISHED["mixtral-8x7b"]
    total = sum(cost.moe_parameters(published.shape, MIXTRAL).values())
    active = sum(cost.moe_parameters(published.shape, MIXTRAL, active=True).values())
    assert (total, active) == (published.parameters(), published.parameters(active=True))
    assert f"{total / 1e9:.1f} {active / 1e9:.1f}" == "46.7 12.9"


@pytest.mark.parametrize(("count", "k", "shared"), [(6, 2, 0), (4, 1, 2), (5, 5, 1)])
def test_parameters_and_flops_are_those_of_a_model(count, k, shared):
    model = Decoder(SHAPE, ffn=lambda i: Experts(SHAPE, i, count=count, route=TopK(k), shared=shared))
    mixture = Mixture(count, k, shared)
    assert sum(cost.moe_parameters(SHAPE, mixture).values()) == sum(p.numel() for p in model.parameters())
    cache, text = Full(), ids(7, rows=1)
    model(text[:, :6], cache=cache)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the fused one
        model(text[:, 6:], cache=cache)
    assert counter.get_total_flops() == cost.moe_token_flops(SHAPE, mixture, context=7)
    parts = cost.moe_parameters(SHAPE, mixture), cost.moe_parameters(SHAPE, mixture, active=True)
    assert parts[1]["ffn"] * (count + shared) == parts[0]["ffn"] * (k + shared)
    dense = cost.moe_token_flops(SHAPE, mixture, dense=True) - cost.moe_token_flops(SHAPE, mixture)
    assert dense == 2 * (parts[0]["ffn"] - parts[1]["ffn"] - parts[0]["router"])


def test_one_expert_is_a_plain_model_and_first_layers_may_be():
    plain = cost.parameters(SHAPE)
    assert cost.moe_parameters(SHAPE, Mixture(1, 1)) == plain | {"router": SHAPE.layers * SHAPE.width}
    mixed = cost.moe_parameters(SHAPE, Mixture(4, 1, dense_layers=1, dense_width=48))
    assert mixed["ffn"] == 3 * 16 * (2 * 4 * 12 + 48)
    assert mixed["router"] == 2 * 16 * 4


def test_a_large_batch_calls_every_expert():
    assert cost.expected_experts(MIXTRAL, tokens=0) == 0
    assert cost.expected_experts(MIXTRAL, tokens=1) == pytest.approx(2)
    assert cost.expected_experts(MIXTRAL, tokens=100) == pytest.approx(8)
    assert cost.expected_experts(MIXTRAL, tokens=2) == pytest.approx(8 * (1 - 0.75**2))


def test_bad_input_is_named():
    for call, words in [
        (lambda: Mixture(4, 0), "used must be from 1 to the 4 experts, not 0"),
        (lambda: Mixture(4, 5), "used must be from 1 to the 4 experts, not 5"),
        (lambda: Mixture(4, 1, dense_layers=1), "dense_width go with dense_layers"),
        (
            lambda: cost.moe_parameters(SHAPE, Mixture(4, 1, dense_layers=3, dense_width=9)),
            "dense_layers must be below",
        ),
        (lambda: cost.expected_experts(MIXTRAL, tokens=-1), "tokens must be 0 or more, not -1"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
