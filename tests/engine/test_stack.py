"""Techniques on top of each other: each is the engine's own, bytes are those of the parts, clashes are told."""

import math
from dataclasses import replace

import pytest
import torch

from engine import cost
from engine.caches.full import Full
from engine.caches.quantised import Quantised
from engine.caches.sinks import Sinks
from engine.caches.snapped import Snapped
from engine.caches.window import Window
from engine.evaluate import perplexity, surprisal
from engine.generate import generate
from engine.ledger import judge, paces
from engine.mixers.pooling import pool
from engine.model import Decoder, Shape
from engine.moe.experts import Experts
from engine.prune import apply, two_four, zeros
from engine.prune.magnitude import magnitude
from engine.quant import linears
from engine.quant.affine import Grid, quantise
from engine.recording import record
from engine.stack import (
    EMBEDDING,
    FLOAT,
    GROUP,
    Lean,
    Memory,
    cache_bytes,
    group_of,
    guessing,
    mended,
    merged,
    multiplications,
    pruned,
    remembering,
    rounded,
    two_of_four,
    weight_bits,
    weight_bytes,
    with_fewer_heads,
)
from engine.toyland.words import SIZE

SHAPE = Shape(vocab=40, width=32, layers=2, heads=4, kv_heads=4, head_width=8, ffn_width=48, max_positions=128)
IDS = torch.arange(60).remainder(37)[None]


@pytest.fixture(scope="module")
def model():
    return Decoder(SHAPE, seed=3).eval().requires_grad_(False)


@pytest.fixture
def lean(model):
    return Lean(model)


def test_the_original_takes_sixteen_bits_a_number_and_its_cache_by_the_formula(lean, model):
    assert weight_bytes(lean) == 2 * sum(p.numel() for p in model.parameters())
    judged = judge(lean, IDS)
    assert judged.bytes == cost.kv_bytes(SHAPE, tokens=60)
    assert judged.keys == 60
    assert judged.perplexity == pytest.approx(perplexity(surprisal(model, IDS)), rel=1e-5)
    assert sum(multiplications(lean, keys=60).values()) == cost.decode_flops(SHAPE, context=60) / 2


def test_merged_and_pruned_are_the_engines_own(lean, model):
    assert torch.equal(merged(lean, groups=1).model(IDS), pool(model, groups=1)(IDS))
    fewer = pruned(lean, share=0.4)
    assert torch.equal(fewer.model(IDS), apply(model, magnitude(model, sparsity=0.4, scope="layer"))(IDS))
    assert torch.equal(two_of_four(lean).model(IDS), apply(model, two_four.masks(model))(IDS))
    cut = with_fewer_heads(lean, IDS[:, :20], gone=1)
    assert all(block.mixer.heads == 3 for block in cut.model.blocks)
    assert judge(cut, IDS).bytes == judge(lean, IDS).bytes * 3 / 4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_the_engines_grid_and_moves_no_weight_by_more_than_half_a_step(lean, model, bits):
    done = rounded(lean, bits=bits)
    for name, linear in linears(model).items():
        w, back = linear.weight, done.model.get_submodule(name).weight
        grid = Grid(bits, symmetric=False, granularity="group", group=group_of(w), whole_zero=False)
        # The same grid but for its constants, which have sixteen bits: their rounding is a thousandth of a code.
        step = quantise(w, grid).scale.expand(-1, group_of(w)).reshape(w.shape)
        assert (back - w).abs().le(step * (0.5 + 2**bits * 2e-3)).all()
        assert back.view(-1, group_of(w)).unique(dim=1).shape[0] > 0
        assert max(len(row.unique()) for row in back.view(-1, group_of(w))) <= 2**bits
    assert max(len(row.unique()) for row in done.model.embed.weight.view(-1, GROUP)) <= 2**EMBEDDING
    assert not any(torch.equal(p, q) for (n, p), q in
                   zip(model.named_parameters(), done.model.parameters(), strict=True) if "norm" not in n)  # fmt: skip


def test_bits_are_codes_and_constants_and_a_map_of_what_is_kept(lean):
    name, every = "blocks.0.ffn.down", 32 * 48  # rows of 48 hold groups of 16
    constants = every // 16 * 2 * FLOAT
    assert weight_bits(lean, name) == every * FLOAT
    assert weight_bits(rounded(lean, bits=3), name) == every * 3 + constants
    half = pruned(lean, share=0.5)
    assert weight_bits(half, name) == every // 2 * FLOAT + every
    assert weight_bits(rounded(half, bits=2), name) == every // 2 * 2 + every + constants
    few = rounded(pruned(lean, share=0.25), bits=2)  # the map costs more than a quarter of two bits saves: dense
    assert weight_bits(few, name) == every * 2 + constants
    fours = two_of_four(lean)
    assert weight_bits(fours, name) == every // 2 * FLOAT + every // 2 * 2
    assert two_four.fp16_bytes((32, 48), sparse=True) == weight_bits(fours, name) / 8


def test_what_is_pruned_stays_zero_however_it_is_rounded_and_mended():
    toyish = Decoder(replace(SHAPE, vocab=SIZE), seed=3).eval().requires_grad_(False)
    before = pruned(Lean(toyish), share=0.5)
    after = rounded(before, bits=4)
    assert zeros(after.model) >= zeros(before.model) == pytest.approx(0.5, abs=0.01)
    healed = mended(after, steps=2, before=before.model)
    for name, mask in before.masks.items():
        layer, _, last = name.rpartition(".")
        assert not getattr(healed.model.get_submodule(layer), last)[~mask].any()
    assert not torch.equal(healed.model(IDS), after.model(IDS))
    assert weight_bytes(healed) == weight_bytes(after)


def test_mending_lowers_the_loss_of_a_rounded_toy():
    from engine.checkpoints import available, load
    from engine.toyland import Grammar, batch

    if not available("toy")[0]:
        pytest.skip("the toy is not trained")
    whole = Lean(load("toy")[0])
    small = rounded(whole, bits=2)
    ids = batch(Grammar(), seed=0, step=0, rows=4, length=96, stream="test").ids
    assert judge(mended(small, steps=6, before=whole.model), ids).perplexity < 0.95 * judge(small, ids).perplexity
    assert weight_bytes(whole) > 4 * weight_bytes(small)


def test_half_of_a_two_of_four_matrix_is_not_multiplied_routers_are(model):
    parts, sparse = (multiplications(x, keys=9) for x in (Lean(model), two_of_four(Lean(model))))
    assert {n: parts[n] / sparse[n] for n in ("qkv", "out", "ffn")} == {"qkv": 2, "out": 2, "ffn": 2}
    assert [sparse[n] for n in ("scores", "values", "head")] == [parts[n] for n in ("scores", "values", "head")]
    mixed = Decoder(SHAPE, ffn=lambda layer: Experts(SHAPE, layer, count=4), seed=1).eval().requires_grad_(False)
    routers = 2 * SHAPE.width * 4
    whole, half = (multiplications(x, keys=9)["ffn"] for x in (Lean(mixed), two_of_four(Lean(mixed))))
    assert half == (whole - routers) / 2 + routers
    assert "blocks.0.ffn.router" not in {n.removesuffix(".weight") for n in two_of_four(Lean(mixed)).masks}
    assert torch.equal(
        rounded(Lean(mixed), bits=2).model.blocks[0].ffn.router.weight, mixed.blocks[0].ffn.router.weight
    )


@pytest.mark.parametrize(
    ("memory", "kind", "slots"),
    [
        (Memory(), Full, 60),
        (Memory("full", bits=4), Quantised, 60),
        (Memory("window", 20), Window, 20),
        (Memory("sinks", 20), Sinks, 20),
        (Memory("sinks", 20, 4), Snapped, 20),
        (Memory("heavy", 20, 4), Snapped, 20),
    ],
)
def test_a_memory_is_the_cache_that_it_says_and_weighs_what_it_holds(lean, model, memory, kind, slots):
    held = remembering(lean, kind=memory.kind, budget=memory.budget, bits=memory.bits)
    assert type(held.cache()) is kind
    judged = judge(held, IDS)
    values = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_width * slots
    if memory.bits == FLOAT:
        assert judged.bytes == values * 2
    else:
        bookkeeping = SHAPE.layers * SHAPE.kv_heads * slots * 12 if memory.kind == "heavy" else 0  # places and scores
        tail = values / slots * 12 if memory.kind == "full" else 0  # of 60 tokens, 12 wait for their chunk of 8
        packed = values - tail
        assert judged.bytes == tail * 2 + packed * (memory.bits / 8 + 4 / SHAPE.head_width) + bookkeeping
    two = judge(held, torch.cat((IDS, IDS)))
    assert two.bytes == judged.bytes
    assert two.perplexity == pytest.approx(judged.perplexity, rel=1e-5)


def test_recall_counts_the_answers_that_come_first(lean, model):
    said = model(IDS)[0].argmax(-1)  # after token t
    ids = torch.cat((IDS, said[-1:][None]), 1)
    answers = torch.zeros(1, 61, dtype=torch.bool)
    answers[0, 60] = True
    assert judge(lean, ids, answers=answers).recall == 1.0
    assert judge(lean, ids).recall != judge(lean, ids).recall  # not a number
    answers[0, 30] = ids[0, 30] != said[29]
    assert judge(lean, ids, answers=answers).recall == (0.5 if bool(answers[0, 30]) else 1.0)
    with pytest.raises(ValueError, match="answers must name"):
        judge(lean, ids, answers=torch.zeros(1, 61, dtype=torch.bool))
    with pytest.raises(ValueError, match="two tokens"):
        judge(lean, ids[:, :1])


def test_guessing_changes_no_word_and_paces_are_told_for_all(lean, model):
    prompt = [1, 2, 3, 4, 1, 2, 3]
    say = guessing(lean, length=3).say(prompt, steps=12)
    assert [say() for _ in range(12)] == list(generate(model, prompt, steps=12, cache=Full()))
    found = paces({"a": lean, "b": guessing(lean, length=3)}, prompt, chunk=3, rounds=2)
    assert set(found) == {"a", "b"}
    assert all(math.isfinite(pace) and pace > 0 for pace in found.values())


def test_what_does_not_go_together_is_one_sentence(lean):
    with pytest.raises(ValueError, match="merged first"):
        merged(rounded(lean, bits=4), groups=1)
    with pytest.raises(ValueError, match="cut before"):
        with_fewer_heads(pruned(lean, share=0.1), IDS, gone=1)
    with pytest.raises(ValueError, match="pruned before they are rounded"):
        pruned(rounded(lean, bits=4), share=0.1)
    with pytest.raises(ValueError, match="pruned before they are rounded"):
        two_of_four(pruned(lean, share=0.1))
    with pytest.raises(ValueError, match="rounded already"):
        rounded(rounded(lean, bits=4), bits=2)
    with pytest.raises(ValueError, match="guesses are taken back"):
        guessing(remembering(lean, kind="window", budget=8), length=2)
    with pytest.raises(ValueError, match="guesses are taken back"):
        remembering(guessing(lean, length=2), kind="full", bits=4)
    wrongs = (
        lambda: with_fewer_heads(lean, IDS, gone=4),
        lambda: mended(lean, steps=0),
        lambda: guessing(lean, length=0),
        lambda: Memory("some"),
        lambda: Memory("sinks", 4),
        lambda: Memory("window", 0),
        lambda: Memory("full", bits=17),
        lambda: rounded(lean, bits=16),
    )
    for wrong in wrongs:
        with pytest.raises(ValueError, match="must be"):
            wrong()


def test_looking_changes_nothing(lean):
    plain = rounded(pruned(lean, share=0.3), bits=4)
    with record() as recorder:
        seen = rounded(pruned(lean, share=0.3), bits=4)
        weight_bytes(seen)
        judge(remembering(seen, kind="sinks", budget=20, bits=4), IDS)
    assert torch.equal(seen.model(IDS), plain.model(IDS))
    names = {track.name for track in recorder.freeze().tracks}
    assert {"stack.error", "stack.parts", "ledger.held", "ledger.nats", "snapped.keys"} <= names


def test_cache_bytes_count_a_full_cache_by_the_tokens_it_has_seen(lean, model):
    cache = Full(capacity=100)
    model.hidden(IDS, cache=cache)
    assert cache_bytes(lean, cache) == cost.kv_bytes(SHAPE, tokens=60) < cache.nbytes
