"""The norm policy against itself written as loops; the laws that it shares with H2O are in test_heavy_hitters.py."""

import numpy as np
import pytest
import torch

from engine.caches.norm import LowNorm
from engine.mixers.rope import rope_tables
from engine.recording import record
from tests.engine.caches.common import by_hand, fed, peaked
from tests.engine.test_model import EXACT, furthest, text


@pytest.mark.parametrize(("low", "recent", "sinks"), [(3, 3, 0), (4, 1, 1), (1, 4, 2)])
def test_equals_the_algorithm_by_hand(low, recent, sinks):
    model, ids = peaked(layers=2), text(20)
    expected, kept = by_hand(
        model, ids, lambda one, coming: -float(one["key"].norm()), chosen=low, recent=recent, sinks=sinks
    )
    cache, rows = LowNorm(low, recent=recent, sinks=sinks), []
    for t in range(20):
        rows.append(model(ids[None, t : t + 1], cache=cache)[0])
        assert [cache.kept(layer).tolist() for layer in range(2)] == kept[t]
    assert furthest(torch.cat(rows), expected) < EXACT


def test_the_longest_key_goes_head_by_head():
    """Norms written by hand: of what is not recent the shortest are left, whatever anybody looked at."""
    norms = torch.tensor([[3.0, 1.0, 5.0, 2.0, 9.0, 9.0], [1.0, 4.0, 2.0, 3.0, 9.0, 9.0]])  # H_kv T
    rope = rope_tables(4, base=10000.0, count=8, dtype=torch.float32, device=torch.device("cpu"))
    cache = LowNorm(2, recent=2)
    assert not cache.watches
    with record() as recorder:
        for t in range(6):
            k = torch.zeros(1, 2, 1, 4)
            k[0, :, 0, t % 4] = -norms[:, t]
            cache.extend(0, k, k, rope)
            cache.advance(1)
    assert cache.kept(0).tolist() == [[1, 3, 4, 5], [0, 2, 4, 5]]
    recording = recorder.freeze()
    assert recording.track("selected.worth", layer=0).latest().tolist() == [[-1, -2, -9, -9], [-1, -2, -9, -9]]
    gone = [(e.fields["head"], e.fields["position"], e.fields["reason"]) for e in recording.happened("cache.evict")]
    assert [(head, position) for head, position, _ in gone] == [(0, 2), (1, 1), (0, 0), (1, 3)]
    assert "longest of its head: 5" in gone[0][2]


def test_rotation_leaves_the_norm():
    """Why the score may be taken before rotation."""
    rope = rope_tables(8, base=10000.0, count=64, dtype=torch.float64, device=torch.device("cpu"))
    k = torch.randn(1, 2, 64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cache = LowNorm(1, recent=1)
    assert np.allclose(cache.first_score(k), cache.first_score(rope.rotate(k, range(64))), atol=1e-14)


def test_bfloat16_norms_are_taken_in_float32():
    k = torch.full((1, 1, 1, 64), 1.01, dtype=torch.bfloat16)
    assert LowNorm(1, recent=1).first_score(k).dtype == torch.float32
    model, ids = peaked(layers=2), text(12, batch=1)
    assert fed(model.bfloat16(), ids, LowNorm(2, recent=2)).dtype == torch.bfloat16
