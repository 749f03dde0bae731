"""Layers that share keys and values: CLA, YOCO, leaving a prompt early, and what no training cannot do."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine import cost
from engine.caches.full import Full
from engine.caches.sinks import Sinks
from engine.caches.window import Window
from engine.generate import generate
from engine.mixers.cross_layer import Borrower, Owner, borrowed, cla, owners, yoco
from engine.mixers.early_exit import early_exit, exit_layer, prefill_multiplications
from engine.mixers.head_start import head_start
from engine.mixers.softmax import SoftmaxAttention
from engine.mixers.state import state_bytes
from engine.mixers.windows import WindowAttention
from engine.model import Decoder, Shape
from engine.recording import record

from .common import decoder, in_parts, rand, tokens

FOUR = Shape(vocab=17, width=12, layers=4, heads=4, kv_heads=2, head_width=6, ffn_width=16, max_positions=128)
DESIGNS = {
    "cla 2": lambda s: cla(s, factor=2),
    "cla 4": lambda s: cla(s, factor=4),
    "yoco": lambda s: yoco(s, window=3),
}
designs = pytest.mark.parametrize("name", DESIGNS)


def made(name: str, shape: Shape = FOUR) -> Decoder:
    return decoder(DESIGNS[name](shape), shape=shape)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cla_1_is_the_base_to_the_last_bit(kv_heads):
    shape, ids = replace(FOUR, kv_heads=kv_heads), tokens(15, batch=2)
    base = decoder(None, shape=shape)
    model = decoder(cla(shape, factor=1), shape=shape)
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        assert torch.equal(model(ids), base(ids))
        for one, other in ((Full(), Full()), (Window(6), Window(6))):
            assert torch.equal(in_parts(model, ids, [9, 1, 5], one), in_parts(base, ids, [9, 1, 5], other))


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_tied_weights_and_equal_inputs_give_equal_outputs(factor, kv_heads):
    """If nothing is added to the stream and all layers ask alike, every layer of the group answers as the base does."""
    shape = replace(FOUR, kv_heads=kv_heads)
    base = decoder(None, shape=shape)
    first = base.blocks[0].mixer.state_dict()
    model = decoder(cla(shape, factor=factor), shape=shape)
    x, shared, answers = rand(2, 9, 12), {}, []
    for layer, block in enumerate(model.blocks):
        rows = slice(None) if isinstance(block.mixer, Owner) else slice(4 * 6)
        block.mixer.load_state_dict({"qkv.weight": first["qkv.weight"][rows], "out.weight": first["out.weight"]})
        with torch.no_grad():
            answers.append(block.mixer(x, rope=model.rope(x), shared=shared))
        assert list(shared) == list(range(0, layer + 1, factor))
    with torch.no_grad():
        expected = base.blocks[0].mixer(x, rope=base.rope(x))
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-13)


def test_a_borrower_reads_its_owner_and_nobody_else():
    """Oracle: plain attention with the borrower's queries and the owner's keys and values, by hand."""
    model, ids = made("cla 2"), tokens(9)
    inputs = {}
    for layer, block in enumerate(model.blocks):
        block.mixer.register_forward_pre_hook(lambda _, args, layer=layer: inputs.__setitem__(layer, args[0]))
    with torch.no_grad(), record() as recorder:
        model(ids)
        seen = recorder.freeze()
        rope = model.rope(inputs[0])
        for layer, owner in ((1, 0), (3, 2)):
            q = model.blocks[layer].mixer.qkv(inputs[layer]).view(1, 9, 4, 6).transpose(1, 2)
            made_by = model.blocks[owner].mixer.qkv(inputs[owner]).view(1, 9, 8, 6).transpose(1, 2)
            q, k = rope.rotate(q, range(9)), rope.rotate(made_by[:, 4:6], range(9)).repeat_interleave(2, 1)
            scores = (q @ k.mT / 6**0.5).masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
            pattern = torch.tensor(seen.stack("attention.pattern", layer=layer))
            torch.testing.assert_close(pattern, scores.softmax(-1), rtol=0, atol=1e-12)
    read = [(e.fields["layer"], e.fields["owner"]) for e in seen.happened("layers.read")]
    assert read == [(1, 0), (3, 2)]
    assert [(e.fields["layer"], e.fields["values"]) for e in seen.happened("layers.keep")] == [(0, 24), (2, 24)]
    assert owners(model) == [0, 0, 2, 2]


def test_the_designs():
    kinds = {Owner: "o", Borrower: "b", WindowAttention: "w"}
    for name, letters in (("cla 2", "obob"), ("cla 4", "obbb"), ("yoco", "wwob")):
        model = made(name)
        assert "".join(kinds[type(block.mixer)] for block in model.blocks) == letters
    assert owners(made("yoco")) == [0, 1, 2, 2]
    assert [exit_layer(made(name)) for name in DESIGNS] == [2, 0, 2]


@designs
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_token_changes_nothing_before_it(name, kv_heads):
    model, ids = made(name, replace(FOUR, kv_heads=kv_heads)), tokens(13)
    with torch.no_grad():
        logits = model(ids)
        for t in (0, 5, 12):
            other = ids.clone()
            other[0, t] = (other[0, t] + 1) % 17
            change = (model(other) - logits).abs().amax((0, 2))
            assert not t or change[:t].max() < 1e-12
            assert change[t] > 1e-6


@designs
@settings(max_examples=10)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_cache_on_equals_off(name, sizes):
    model, ids = made(name), tokens(sum(sizes), batch=2)
    with torch.no_grad():
        torch.testing.assert_close(in_parts(model, ids, sizes, Full()), model(ids), rtol=0, atol=1e-10)


@designs
@pytest.mark.parametrize("cache", [lambda: Window(6), lambda: Sinks(2, 4)])
def test_caches_that_evict_serve_borrowers_too(name, cache):
    model, ids = made(name), tokens(17, batch=2)
    with torch.no_grad():
        one = in_parts(model, ids, [1] * 17, cache())
        torch.testing.assert_close(in_parts(model, ids, [9, 1, 7], cache()), one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_cla_caches_a_share_of_the_layers(factor, kv_heads):
    shape, cache = replace(FOUR, kv_heads=kv_heads), Full()
    with torch.no_grad():
        decoder(cla(shape, factor=factor), shape=shape)(tokens(11), cache=cache)
    assert cache.nbytes == 8 * cost.cla_values(shape, factor=factor, tokens=11)
    assert cost.cla_values(shape, factor=factor) == 2 * kv_heads * 6 * 4 / factor
    assert not cache.states


@pytest.mark.parametrize("window", [1, 3, 40])
@pytest.mark.parametrize("count", [1, 2, 11, 30])
def test_yoco_caches_one_global_layer_and_windows(window, count):
    cache = Full()
    with torch.no_grad():
        decoder(yoco(FOUR, window=window), shape=FOUR)(tokens(count), cache=cache)
    assert cache.nbytes == 8 * 2 * 2 * 6 * count
    assert state_bytes(cache.states) == 8 * 2 * 2 * 6 * 2 * min(count, window - 1)
    assert cache.nbytes + state_bytes(cache.states) == 8 * cost.yoco_values(FOUR, window=window, tokens=count)


@designs
@pytest.mark.parametrize("cache", [lambda: Full(), lambda: Window(50), lambda: Window(5), lambda: None])
@pytest.mark.parametrize("count", [1, 2, 14])
def test_leaving_early_is_the_full_pass_for_the_last_token(name, cache, count):
    """The same last row, and a cache that goes on the same way."""
    model, ids = made(name), tokens(count + 4, batch=2)
    early, full = cache(), cache()
    with torch.no_grad():
        last = model.hidden(ids[:, :count], cache=full)[:, -1:]
        torch.testing.assert_close(early_exit(model, ids[:, :count], cache=early), last, rtol=0, atol=1e-11)
        if early is not None:
            assert (early.seen, early.nbytes) == (full.seen, full.nbytes)
            assert state_bytes(early.states) == state_bytes(full.states)
            rest = [in_parts(model, ids[:, count:], [1, 3], each) for each in (early, full)]
            torch.testing.assert_close(*rest, rtol=0, atol=1e-10)
            # and once more into the same cache: a prompt that continues
            torch.testing.assert_close(
                early_exit(model, ids, cache=early), model.hidden(ids, cache=full)[:, -1:], rtol=0, atol=1e-10
            )


@designs
def test_a_prompt_too_long_for_one_pass_leaves_early_too(name):
    model, ids = made(name), tokens(14, batch=2)
    early, full = Window(5), Window(5)
    early.at_once = full.at_once = 4
    with torch.no_grad():
        last = model.hidden(ids, cache=full)[:, -1:]
        torch.testing.assert_close(early_exit(model, ids, cache=early), last, rtol=0, atol=1e-11)
    assert early.nbytes == full.nbytes


@designs
def test_only_one_row_passes_the_layers_after_the_exit(name):
    model, ids = made(name), tokens(14)
    rows = {}
    for layer, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, layer=layer: rows.__setitem__(layer, args[0].shape[1]))
    with torch.no_grad(), record() as recorder:
        early_exit(model, ids)
    last = exit_layer(model)
    assert rows == {layer: 14 if layer < last else 1 for layer in range(4)}
    (left,) = recorder.freeze().happened("layers.exit")
    assert left.fields == {"layer": last, "rows": 13}
    with torch.no_grad(), record() as recorder:
        quiet = early_exit(model, ids)
    assert torch.equal(quiet, early_exit(model, ids))


@designs
def test_multiplications_of_a_prompt_are_those_of_the_products(name):
    """A window of the whole text, so that every attention is the rectangle of the formula."""
    mixer = yoco(FOUR, window=20) if name == "yoco" else DESIGNS[name](FOUR)
    model, ids = decoder(mixer, shape=FOUR), tokens(20)

    def counted(work) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            work()
        return counter.get_total_flops() // 2

    full, early = prefill_multiplications(model, tokens=20)
    assert full == counted(lambda: model.hidden(ids))
    assert early == counted(lambda: early_exit(model, ids))
    assert early < full


def test_half_of_a_long_prompt_s_work_is_saved():
    shape = replace(FOUR, max_positions=4096)
    model = Decoder(shape, mixer=yoco(shape, window=4))
    full, early = prefill_multiplications(model, tokens=4000)
    assert early < full / 4  # the global layers are all quadratic and the windows are not
    with pytest.raises(ValueError, match="tokens must be a whole number from 1 on, not 0"):
        prefill_multiplications(model, tokens=0)


def test_generate_says_the_same_with_and_without_a_cache():
    for name in DESIGNS:
        model, prompt = made(name), tokens(7)
        kept = list(generate(model, prompt, steps=12, cache=Full(), temperature=2.0))
        assert kept == list(generate(model, prompt, steps=12, cache=None, temperature=2.0))
        assert len(set(kept)) > 3


def test_two_readers_of_one_model_never_meet():
    """What layers hand on belongs to a pass: threads that read other texts in turn, layer by layer, do not mix."""
    model, texts = made("cla 4"), [tokens(12, seed=s) for s in (1, 2)]
    with torch.no_grad():
        alone = [model(ids) for ids in texts]
    turn = threading.Barrier(2, timeout=20)

    def meet(*_) -> None:
        turn.wait()

    handles = [block.register_forward_hook(meet) for block in model.blocks]
    got = [None, None]

    def read(i):
        with torch.no_grad():
            got[i] = model(texts[i])

    threads = [threading.Thread(target=read, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(alone, got, strict=True))


class Watching(Full):
    watches = True

    def __init__(self) -> None:
        super().__init__()
        self.paid: dict[int, int] = {}

    def observe(self, layer, pattern):
        assert pattern.shape[-1] == self._k[layer][:, :, : self.seen + pattern.shape[2]].shape[2]
        self.paid[layer] = self.paid.get(layer, 0) + 1


def test_a_watching_cache_sees_borrowers_pay_to_their_owner():
    model, cache = made("cla 2"), Watching()
    with torch.no_grad():
        assert torch.equal(model(tokens(9), cache=cache), model(tokens(9), cache=Full()))
    assert cache.paid == {0: 2, 2: 2}


def test_borrowing_without_training_changes_what_a_model_says():
    base, ids = decoder(None, shape=FOUR), tokens(15, batch=2)
    with torch.no_grad():
        assert torch.equal(borrowed(base, factor=1)(ids), base(ids))
        two = borrowed(base, factor=2)
        assert (two(ids) - base(ids)).abs().max() > 0.1
        # The first layer is untouched, so the residual stream agrees up to where the second borrows.
        x = [m.through(m.embed(ids), range(1), shared={}) for m in (base, two)]
        assert torch.equal(*x)
    for layer in (1, 3):
        old, new = base.blocks[layer].mixer, two.blocks[layer].mixer
        assert torch.equal(new.qkv.weight, old.qkv.weight[:24])
        assert new.qkv.weight.data_ptr() != old.qkv.weight.data_ptr()
    with pytest.raises(ValueError, match="model must have softmax attention in all layers, not"):
        borrowed(two, factor=2)


@pytest.mark.real
def test_the_trained_toy_collapses_when_layers_borrow_untrained():
    from engine.checkpoints import load
    from engine.toyland import Grammar
    from engine.train import measure

    model, _ = load("toy")
    base, two = (measure(m, Grammar(), rows=8, length=128)["recall"] for m in (model, borrowed(model, factor=2)))
    assert two < base / 3


def test_the_head_start_reaches_borrowers():
    shape = replace(FOUR, width=32)
    model = head_start(Decoder(shape, mixer=cla(shape, factor=2)), seed=0)
    plain = head_start(Decoder(shape), seed=0)
    assert torch.equal(model.blocks[0].mixer.qkv.weight, plain.blocks[0].mixer.qkv.weight)
    v = model.blocks[0].mixer.qkv.weight[-12:].view(2, 6, 32).repeat_interleave(2, 0).flatten(0, 1)
    torch.testing.assert_close(model.blocks[1].mixer.out.weight, 0.1 * v.T, rtol=0, atol=0)


def test_bad_input_is_named():
    for factor in (3, 8):
        with pytest.raises(ValueError, match=f"factor must divide layers=4, and {factor} does not"):
            cla(FOUR, factor=factor)
        with pytest.raises(ValueError, match=f"factor must divide layers=4, and {factor} does not"):
            cost.cla_values(FOUR, factor=factor)
    with pytest.raises(ValueError, match="factor must be a whole number from 1 on, not 0"):
        cla(FOUR, factor=0)
    with pytest.raises(ValueError, match="layers must be even, so that it has two halves, not 3"):
        yoco(replace(FOUR, layers=3), window=4)
    with pytest.raises(ValueError, match="window must be a whole number from 1 on, not 0"):
        yoco(FOUR, window=0)
    with pytest.raises(ValueError, match="window=0 must be from 1"):
        cost.yoco_values(FOUR, window=0, tokens=3)
    with pytest.raises(ValueError, match="owner must be a layer before layer 1, not 1"):
        Borrower(FOUR, 1, owner=1)
    model, x = made("cla 2"), rand(1, 3, 12)
    for shared in (None, {2: "another layer's"}):
        with pytest.raises(ValueError, match="shared must hold what layer 0 remembered"):
            model.blocks[1].mixer(x, rope=model.rope(x), shared=shared)
    with pytest.raises(ValueError, match="ids must have shape"):
        early_exit(model, torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="model must have layers that share keys and values, and layer 3 shares none"):
        early_exit(decoder(lambda i: SoftmaxAttention(FOUR, i), shape=FOUR), tokens(3))
