"""Oracle: the whole network with the neurons and heads that a subnet lacks set to zero, and its last layers taken out.
Laws: the largest subnet is the supernet bit for bit; taken out or in place is the same; sorting changes no output."""

import copy
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine.caches.full import Full
from engine.mixers.linear import LinearAttention
from engine.model import Decoder, Shape
from engine.recipes import Recipe, Stage
from engine.recording import record
from engine.search import supernet
from engine.search.supernet import Space, Subnet, chosen, extract, run, sandwich, slices, sort_channels, whole
from engine.train import train

SHAPE = Shape(vocab=50, width=32, layers=3, heads=4, kv_heads=2, head_width=8, ffn_width=24, max_positions=64)
SPACE = Space(layers=(1, 2, 3), heads=(2, 4), ffn_width=(8, 16, 24))
IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def made(**changes) -> Decoder:
    model = Decoder(replace(SHAPE, **changes), seed=1).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter *= 6  # far from uniform guesses
    return model


def zeroed(model: Decoder, subnet: Subnet) -> Decoder:
    twin = copy.deepcopy(model)
    twin.blocks = nn.ModuleList(list(twin.blocks)[: subnet.layers])
    twin.shape = replace(model.shape, layers=subnet.layers)
    for block, heads, width in zip(twin.blocks, subnet.heads, subnet.ffn_width, strict=True):
        block.mixer.out.weight[:, heads * model.shape.head_width :] = 0
        block.ffn.down.weight[:, width:] = 0
    return twin


subnets = st.integers(0, 10**6).map(lambda seed: SPACE.draw(random.Random(seed)))


@pytest.mark.parametrize("changes", [{}, {"activation": "gelu"}, {"activation": "relu", "tied": False}])
def test_largest_is_the_supernet_bit_for_bit(changes):
    model = made(**changes)
    assert torch.equal(run(model, IDS, whole(model)), model(IDS))
    assert torch.equal(extract(model, whole(model))(IDS), model(IDS))
    assert whole(model) == SPACE.largest


@settings(max_examples=25, deadline=None)
@given(subnet=subnets, activation=st.sampled_from(["swiglu", "gelu", "relu"]), tied=st.booleans())
def test_extracted_and_in_place_are_the_whole_with_the_rest_zeroed(subnet, activation, tied):
    model = made(activation=activation, tied=tied)
    alone = extract(model, subnet)
    assert torch.equal(alone(IDS), run(model, IDS, subnet))
    torch.testing.assert_close(alone(IDS), zeroed(model, subnet)(IDS), rtol=0, atol=1e-11)


def test_extracted_is_truly_smaller_with_memory_of_its_own():
    model = made()
    alone = extract(model, Subnet((2, 4), (8, 16)))
    assert [b.mixer.heads for b in alone.blocks] == [2, 4]
    assert [b.mixer.kv_heads for b in alone.blocks] == [1, 2]
    assert alone.blocks[0].mixer.qkv.weight.shape == (4 * 8, 32)
    assert [b.ffn.down.in_features for b in alone.blocks] == [8, 16]
    assert alone.shape.layers == 2
    before = alone(IDS)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(alone(IDS), before)
    assert float(before.abs().max()) > 0.1


def test_subnets_run_with_a_cache():
    model, subnet = made(), Subnet((2, 4), (8, 16))
    cache = Full()
    parts = [run(model, IDS[:, :5], subnet, cache=cache), run(model, IDS[:, 5:], subnet, cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), run(model, IDS, subnet), rtol=0, atol=1e-11)


@pytest.mark.parametrize("changes", [{}, {"activation": "gelu"}, {"kv_heads": 4}, {"kv_heads": 1}])
def test_sorting_leaves_outputs_unchanged_and_puts_what_matters_in_front(changes):
    model = made(**changes)
    before = model(IDS)
    down = model.blocks[0].ffn.down.weight.clone()
    with record() as recorder:
        sort_channels(model)
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-12 * float(before.abs().max()) * 10)
    assert not torch.equal(model.blocks[0].ffn.down.weight, down)  # it did something
    recording = recorder.freeze()
    assert {t.index["part"] for t in recording.tracks} == {"head", "neuron"}
    with record() as again:
        sort_channels(model)
    for track in again.freeze().tracks:
        values = track.latest()
        assert (values[:-1] >= values[1:] - 1e-12).all()


@pytest.mark.parametrize(
    ("subnet", "words"),
    [
        (Subnet.even(4, heads=2, ffn_width=8), "layers must be at most 3"),
        (Subnet.even(2, heads=3, ffn_width=8), "heads of layer 0 must be a multiple of 2"),
        (Subnet.even(2, heads=6, ffn_width=8), "heads of layer 0"),
        (Subnet((2, 2), (8, 25)), "ffn_width of layer 1 must be at most 24"),
    ],
)
def test_sizes_that_the_supernet_lacks_are_refused(subnet, words):
    for use in (lambda m: run(m, IDS, subnet), lambda m: extract(m, subnet)):
        with pytest.raises(ValueError, match=words):
            use(made())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Subnet((), ()), "heads must be"),
        (lambda: Subnet((0,), (4,)), "heads must be"),
        (lambda: Subnet((2,), (4, 4)), "as many"),
        (lambda: Subnet((2.0,), (4,)), "heads must be"),
        (lambda: Subnet.even(0, heads=2, ffn_width=4), "layers must be"),
        (lambda: Space((), (2,), (8,)), "layers must be rising"),
        (lambda: Space((2, 1), (2,), (8,)), "layers must be rising"),
        (lambda: Space((1,), (0, 2), (8,)), "heads must be rising"),
        (lambda: SPACE.opened(4), "phase"),
        (lambda: sandwich(SPACE, randoms=-1), "randoms"),
        (lambda: sandwich(SPACE, starts=(3, 2, 4)), "starts"),
        (lambda: sandwich(SPACE, starts=(0, 0)), "starts"),
        (lambda: whole(Decoder(SHAPE, mixer=lambda i: LinearAttention(SHAPE, i))), "plain softmax attention"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_phases_open_depth_then_heads_then_neurons():
    sizes = [SPACE.opened(phase).smallest for phase in range(4)]
    assert sizes == [SPACE.largest, *(Subnet.even(1, heads=h, ffn_width=w) for h, w in ((4, 24), (2, 24), (2, 8)))]
    assert SPACE.opened(0).count == 1
    assert SPACE.count == sum(6**n for n in (1, 2, 3))
    assert chosen(SPACE, 4, starts=(5, 6, 7)) == [SPACE.largest]
    assert chosen(SPACE, 5, starts=(5, 6, 7), randoms=0) == [SPACE.largest, sizes[1]]
    drawn = [chosen(SPACE, at, seed=1) for at in range(20)]
    assert drawn == [chosen(SPACE, at, seed=1) for at in range(20)] != [chosen(SPACE, at, seed=2) for at in range(20)]
    assert all(step[:2] == [SPACE.largest, SPACE.smallest] and len(step) <= 4 for step in drawn)


def test_loss_is_the_sandwich_written_out():
    model = made().requires_grad_(True)
    loss = sandwich(SPACE, randoms=2, distil=True, seed=3)(model, IDS, 7)
    subnets = chosen(SPACE, 7, randoms=2, seed=3)
    assert len(subnets) == 4
    logp = [extract(model, subnet)(IDS[:, :-1]).log_softmax(-1) for subnet in subnets]
    truth = -logp[0].gather(-1, IDS[:, 1:, None]).mean()
    taught = [-(logp[0].detach().exp() * other).sum(-1).mean() for other in logp[1:]]
    torch.testing.assert_close(loss, (truth + sum(taught)) / 4, rtol=0, atol=1e-11)
    plain = sandwich(SPACE, randoms=0, distil=False)(model, IDS, 0)
    both = [-extract(model, s)(IDS[:, :-1]).log_softmax(-1).gather(-1, IDS[:, 1:, None]).mean() for s in
            (SPACE.largest, SPACE.smallest)]  # fmt: skip
    torch.testing.assert_close(plain, sum(both) / 2, rtol=0, atol=1e-11)


def test_gradients_flow_back_to_the_slices_alone():
    model, subnet = made().requires_grad_(True), Subnet((2,), (8,))
    F.cross_entropy(run(model, IDS[:, :-1], subnet).flatten(0, 1), IDS[:, 1:].flatten()).backward()
    first = model.blocks[0]
    assert float(first.ffn.down.weight.grad[:, :8].abs().min(0).values.max()) > 0
    assert not first.ffn.down.weight.grad[:, 8:].any()
    assert not first.mixer.out.weight.grad[:, 16:].any()
    assert not first.mixer.qkv.weight.grad[16:32].any()
    assert first.mixer.qkv.weight.grad[32:40].any()
    assert all(p.grad is None for p in model.blocks[1:].parameters())
    assert set(slices(model, SPACE.largest)) == set(model.state_dict())


def test_training_lowers_the_loss_of_all_sizes_and_taps_change_nothing():
    rule = sandwich(SPACE, starts=(2, 4, 6))
    recipe = Recipe(lambda seed: Decoder(replace(SHAPE, vocab=256), seed=seed), "x", (Stage(30, 4, 24),), warmup=5,
                    rate=1e-2, loss=rule)  # fmt: skip
    held = recipe.text(1000 % recipe.steps).ids
    model, other = recipe.make(0), recipe.make(0)
    sizes = [SPACE.largest, SPACE.smallest, Subnet((4, 2), (8, 24))]

    def losses():
        with torch.no_grad():
            return [
                float(F.cross_entropy(run(model, held[:, :-1], s).flatten(0, 1), held[:, 1:].flatten())) for s in sizes
            ]

    before = losses()
    with record() as recorder:
        train(model, recipe)
    assert all(now < was - 0.5 for now, was in zip(losses(), before, strict=True))
    train(other, recipe)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    recording = recorder.freeze()
    assert len(recording.track(supernet.SUBNET_LOSS, subnet="largest").chunks) == 30
    assert len(recording.track(supernet.SUBNET_LOSS, subnet="smallest").chunks) == 28
