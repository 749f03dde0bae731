"""Our experts against the Mixtral block of `transformers`, on the same weights under both of their names."""

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from engine.moe.experts import Experts
from engine.moe.mixtral import from_mixtral
from engine.moe.router import TopK
from tests.engine.moe.common import SHAPE, randn


def block(k: int) -> MixtralSparseMoeBlock:
    config = MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=6, num_experts_per_tok=k)
    config._experts_implementation = "eager"
    made = MixtralSparseMoeBlock(config).double()
    for i, p in enumerate(made.parameters()):
        p.data = randn(*p.shape, seed=i) / 3
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("fused", [True, False])
def test_equals_the_block_of_transformers(k, fused):
    theirs, x = block(k), randn(3, 7, 16, seed=9)
    state = theirs.state_dict()
    if not fused:  # the names of versions before 5
        halves = state.pop("experts.gate_up_proj").chunk(2, 1)
        for e in range(6):
            for name, stacked in (("w1", halves[0]), ("w3", halves[1]), ("w2", state["experts.down_proj"])):
                state[f"experts.{e}.{name}.weight"] = stacked[e]
        del state["experts.down_proj"]
    ours = Experts(SHAPE, 0, count=6, route=TopK(k)).double()
    ours.load_state_dict(from_mixtral(state))
    want = theirs(x)
    assert torch.allclose(ours(x), want, rtol=0, atol=2e-6 * float(want.abs().max()))  # their router is float32


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"tensors must hold the router, gate\.weight, and hold nothing"):
        from_mixtral({})
