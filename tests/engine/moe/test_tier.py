"""The slow tier: what is read is what was stored, bit for bit, and takes the time it says."""

import time

import pytest
import torch
from safetensors.torch import load_file

from engine.moe.tier import Slot, Tier, flat_size, flattened, store
from tests.engine.moe.common import experts, randn


@pytest.fixture
def kept(tmp_path):
    layer = experts(4)
    store({(2, e): m for e, m in enumerate(layer.experts)}, tmp_path / "e.safetensors")
    return layer, tmp_path / "e.safetensors"


@pytest.mark.parametrize("cold", [True, False])
def test_a_slot_computes_what_the_expert_did(kept, cold):
    layer, path = kept
    tier, slot, x = Tier(path, cold=cold), Slot(layer.experts[0]), randn(5, 16)
    for e in (3, 0, 3, 1):
        read = tier.read((2, e), slot.flat)
        assert torch.equal(slot.module(x), layer.experts[e](x))
        assert read.bytes == slot.flat.nbytes
        assert read.seconds > 0
        assert read.simulated == 0
    tier.close()


def test_each_expert_is_one_aligned_piece_of_a_safetensors_file(kept):
    layer, path = kept
    stored = load_file(path)
    assert len(stored) == 4
    assert all(torch.equal(a, flattened(m)) for a, m in zip(stored.values(), layer.experts, strict=True))
    assert flat_size(layer.experts[0]) == 2 * 12 * 16 + 12 * 16
    odd = torch.nn.Linear(3, 1)  # 3 values and 1: each begins 64 bytes after the other
    assert flattened(odd).nonzero().flatten().tolist() == [0, 1, 2, 16]
    slot = Slot(odd)
    slot.flat.copy_(flattened(odd))
    assert torch.equal(slot.module.weight, odd.weight)
    assert torch.equal(slot.module.bias, odd.bias)


def test_a_made_up_bandwidth_is_kept_and_said(kept):
    layer, path = kept
    slot = Slot(layer.experts[0])
    tier = Tier(path, bandwidth=slot.flat.nbytes / 0.05)
    began = time.perf_counter()
    read = tier.read((2, 1), slot.flat)
    assert time.perf_counter() - began >= 0.05
    assert read.seconds >= 0.05
    assert 0 < read.simulated <= read.seconds
    tier.close()


def test_bad_input_is_named(kept):
    layer, path = kept
    tier, slot = Tier(path), Slot(layer.experts[0])
    for call, words in [
        (lambda: Tier(path, bandwidth=0), "bandwidth must be a number of bytes a second above 0, not 0"),
        (lambda: tier.read((0, 1), slot.flat), "the file holds no expert 1 of layer 0"),
        (lambda: tier.read((2, 1), slot.flat[:-8]), "an expert in the file has 4608 bytes, and the model's have 4544"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    tier.close()
