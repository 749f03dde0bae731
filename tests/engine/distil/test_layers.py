"""Layer matching: a copied layer has nothing to learn, traces are what the model computes, CKA knows a rotation."""

import copy

import pytest
import torch

from engine.distil import layers
from engine.recording import record
from tests.engine.quant.test_integer import randn, tokens, toy


def far(a, b):
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_trace_is_what_the_model_computes(kv_heads):
    model, ids = toy(kv_heads=kv_heads), tokens()
    with record(keep={"attention.scores": {}, "residual.norm": {}}) as recorder:
        logits = model(ids)
    shown = recorder.freeze()
    seen = layers.trace(model, ids)
    assert torch.equal(seen.logits, logits)
    assert torch.equal(seen.hidden[0], model.embed(ids))
    assert torch.equal(model.logits(model.norm(seen.hidden[-1])), logits)
    for layer, scores in enumerate(seen.scores):
        theirs = torch.tensor(shown.stack("attention.scores", layer=layer))
        assert torch.equal(theirs.isfinite(), scores.isfinite())
        assert far(theirs[theirs.isfinite()], scores[scores.isfinite()]) < 1e-12
        norm = torch.tensor(shown.stack("residual.norm", layer=layer))
        assert far(seen.hidden[layer].norm(dim=-1), norm) < 1e-12
    assert not model.blocks[0]._forward_hooks
    assert not model.blocks[0].mixer.qkv._forward_hooks


def test_a_copied_layer_has_nothing_to_learn():
    teacher, ids = toy(), tokens()
    student = copy.deepcopy(teacher)
    maps = layers.Projections(3, 32, 32)
    assert not list(maps.parameters())
    taught, own = layers.trace(teacher, ids), layers.trace(student, ids)
    total = layers.hidden_loss(own, taught, [0, 1, 2], maps) + layers.attention_loss(own, taught, [0, 1, 2])
    assert float(total.detach()) == 0.0
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():
        student.blocks[1].mixer.out.weight += 0.1
    own = layers.trace(student, ids)
    assert float(layers.attention_loss(own, taught, [0, 1, 2]).detach()) == 0.0  # it attends as before
    assert float(layers.hidden_loss(own, taught, [0, 1, 2], maps).detach()) > 0


def test_losses_are_mean_squares_of_what_is_matched():
    teacher, ids = toy(layers=4), tokens()
    student = toy(width=16, head_width=4, kv_heads=2, layers=2)
    g = layers.layer_map(2, 4)
    maps = layers.Projections(3, 16, 32, seed=1).double()
    taught, own = layers.trace(teacher, ids), layers.trace(student, ids)
    expected = sum(
        (own.hidden[m] @ maps.maps[m].weight.mT - taught.hidden[n]).square().mean() for m, n in enumerate([0, 2, 4])
    )
    assert far(layers.hidden_loss(own, taught, g, maps), expected / 3) < 1e-14
    below = torch.ones(20, 20, dtype=torch.bool).tril()
    pairs = [(own.scores[0], taught.scores[1]), (own.scores[1], taught.scores[3])]
    expected = sum((a - b)[..., below].square().mean() for a, b in pairs) / 2
    assert far(layers.attention_loss(own, taught, g), expected) < 1e-14
    (layers.hidden_loss(own, taught, g, maps) + layers.attention_loss(own, taught, g)).backward()
    assert all(p.grad is not None for p in maps.parameters())
    assert student.blocks[0].mixer.qkv.weight.grad.any()


def test_layers_are_spread_evenly_to_the_last():
    assert layers.layer_map(2, 4) == [0, 2, 4]
    assert layers.layer_map(4, 12) == [0, 3, 6, 9, 12]  # TinyBERT's g(m) = 3m
    assert layers.layer_map(3, 4) == [0, 2, 3, 4]
    assert layers.layer_map(1, 30) == [0, 30]
    assert layers.layer_map(4, 4) == [0, 1, 2, 3, 4]


def test_cka_knows_a_turned_and_scaled_view():
    x = randn(50, 6)
    turn = torch.linalg.qr(randn(6, 6, seed=1)).Q
    assert layers.cka(x, 3 * x @ turn + 5) == pytest.approx(1.0, abs=1e-12)
    assert layers.cka(x, randn(50, 6, seed=2)) < 0.5
    assert layers.cka(x, torch.ones(50, 2)) == 0.0
    gram_x, gram_y = (v @ v.mT for v in (x - x.mean(0), x[:, :2] - x[:, :2].mean(0)))
    expected = float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))
    assert layers.cka(x, x[:, :2]) == pytest.approx(expected, abs=1e-12)


def test_alignment_is_tapped_and_one_with_oneself():
    seen = layers.trace(toy(), tokens())
    with record() as recorder:
        rows = layers.alignment(seen, seen, way="soft")
    assert rows.shape == (3, 3)
    assert float((rows.diagonal() - 1).abs().max()) < 1e-6
    assert recorder.freeze().track("distil.alignment", way="soft").latest().shape == (3, 3)


def test_bad_input_is_named():
    seen, other = layers.trace(toy(), tokens()), layers.trace(toy(heads=2, head_width=16), tokens())
    maps = layers.Projections(3, 32, 32)
    for call, said in [
        (lambda: layers.layer_map(5, 4), "student must have from 1 to 4 layers"),
        (lambda: layers.layer_map(0, 4), "student must have from 1 to 4 layers"),
        (lambda: layers.hidden_loss(seen, seen, [0, 1], maps), "g must give 0 and one of the teacher's layers 1..2"),
        (lambda: layers.hidden_loss(seen, seen, [0, 1, 3], maps), "g must give"),
        (lambda: layers.attention_loss(other, seen, [0, 1, 2]), "student must have as many heads as its teacher, 4"),
        (lambda: layers.cka(randn(3, 2), randn(4, 2)), "x and y must be"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
