"""Paged memory: a random life of sequences against plain lists, and the engine against its contiguous cache."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.caches.blocks import EMPTY, Tables
from engine.caches.full import Full
from engine.caches.paged import Paged, Pages
from engine.caches.pool import ExhaustedError, Pool, chained
from engine.caches.reserved import KINDS, Request, Reserved
from engine.caches.scheduler import serve
from engine.generate import generate
from engine.recording import record
from tests.engine.caches.common import fed, portions
from tests.engine.test_model import EXACT, SHAPE, decoder, furthest, text

BLOCKS, SIZE = 7, 3


class Life(RuleBasedStateMachine):
    """Sequences open, grow, fork, forget, move out and in, and close. Beside the pages stand plain lists: for each
    sequence its tokens, and for each token a number that depends on all that came before it, as a key does."""

    def __init__(self):
        super().__init__()
        self.pages = Pages(BLOCKS, block_size=SIZE)
        self.tokens, self.values, self.dropped, self.salt = {}, {}, {}, {}
        self.swapped, self.born = {}, 0

    def value(self, name, at):
        return float(hash((self.salt[name], *self.tokens[name][: at + 1])) % 1000003)

    def one(self, data):
        return data.draw(st.sampled_from(sorted(self.pages.tables)))

    def new(self):
        self.born += 1
        return f"s{self.born}"

    def write(self, name, start, slots):
        blocks, places = (torch.tensor([list(part)]) for part in zip(*slots, strict=True))
        values = torch.tensor(self.values[name][start:], dtype=torch.float64).view(1, 1, -1, 1)
        self.pages.write(0, blocks, places, values.repeat(1, 2, 1, 4), -values.repeat(1, 2, 1, 4))
        self.pages.table(name).written = len(self.tokens[name])

    def seen_by_others(self, name):
        """All that tables but one point to."""
        tables = [table for other, table in self.pages.tables.items() if other != name]
        return sorted({block for table in tables for block in table.blocks if block is not None})

    def grow(self, name, tokens):
        table, free = self.pages.table(name), len(self.pages.pool.free)
        others = self.seen_by_others(name)
        before = self.pages.contents.copy(), {i: t.clone() for i, t in self.pages._k.items()}
        entries, needed = list(table.blocks), self.pages.needs(name, len(tokens))
        try:
            slots = self.pages.append(name, tokens)
        except (ExhaustedError, ValueError):
            assert needed > free
            assert (entries, free) == (table.blocks, len(self.pages.pool.free))
            return
        assert len(self.pages.pool.free) == free - needed
        start = len(self.tokens[name])
        self.tokens[name] += tokens
        self.values[name] += [self.value(name, at) for at in range(start, len(self.tokens[name]))]
        if tokens:
            self.write(name, start, slots)
        # A write never changes a block that another table points to.
        assert np.array_equal(self.pages.contents[others], before[0][others])
        assert all(torch.equal(self.pages._k[i][others], k[others]) for i, k in before[1].items())

    @rule(tokens=st.lists(st.integers(0, 1), max_size=8))
    def open(self, tokens):
        name = self.new()
        cost, free = self.pages.cost(tokens), len(self.pages.pool.free)
        spared = self.pages.open(name, tokens)
        assert spared % SIZE == 0
        assert not spared or spared < len(tokens)
        self.salt[name], self.dropped[name] = 0, set()
        self.tokens[name] = list(tokens[:spared])
        self.values[name] = [self.value(name, at) for at in range(spared)]
        self.grow(name, tokens[spared:])
        if len(self.tokens[name]) == len(tokens):
            assert len(self.pages.pool.free) == free - cost

    @precondition(lambda self: self.pages.tables)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def append(self, data, tokens):
        self.grow(self.one(data), tokens)

    @precondition(lambda self: self.pages.tables)
    @rule(data=st.data())
    def fork(self, data):
        name = self.one(data)
        child, free = self.new(), len(self.pages.pool.free)
        self.pages.fork(name, child)
        for held in (self.tokens, self.values):
            held[child] = list(held[name])
        self.salt[child], self.dropped[child] = self.salt[name], set(self.dropped[name])
        assert len(self.pages.pool.free) == free

    @precondition(lambda self: self.pages.tables)
    @rule(data=st.data())
    def close(self, data):
        name = self.one(data)
        mine = {block for block in self.pages.table(name).blocks if block is not None}
        expected = mine - set(self.seen_by_others(name))
        assert set(self.pages.close(name)) == expected

    @precondition(lambda self: self.pages.tables)
    @rule(data=st.data())
    def drop(self, data):
        name = self.one(data)
        count = len(self.tokens[name])
        gone = data.draw(st.sets(st.integers(0, count - 1), max_size=4)) if count else set()
        free, table = len(self.pages.pool.free), self.pages.table(name)
        mine = {block for block in table.blocks if block is not None}
        freed = self.pages.drop(name, gone)
        assert len(self.pages.pool.free) == free + len(freed)
        if gone:
            self.dropped[name] |= gone
            self.born += 1
            self.salt[name] = self.born  # what comes now is read without them
        left = {number for number in range(count) if number not in self.dropped[name]}
        emptied = mine - {block for block in table.blocks if block is not None}
        assert set(freed) == emptied - set(self.seen_by_others(name))
        assert {i for i, block in enumerate(table.blocks) if block is not None} == {at // SIZE for at in left}

    @precondition(lambda self: self.pages.tables)
    @rule(data=st.data())
    def swap_out(self, data):
        name = self.one(data)
        self.swapped[name] = self.pages.swap_out(name)

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def swap_in(self, data):
        name = data.draw(st.sampled_from(sorted(self.swapped)))
        count = sum(block is not None for block in self.swapped[name].table.blocks)
        if count > len(self.pages.pool.free):
            with pytest.raises(ExhaustedError, match=f"needs {count} blocks"):
                self.pages.swap_in(name, self.swapped[name])
        else:
            self.pages.swap_in(name, self.swapped.pop(name))

    @invariant()
    def free_and_used_are_the_pool(self):
        pool = self.pages.pool
        used = {block for block, refs in enumerate(pool.refs) if refs}
        assert used.isdisjoint(pool.free)
        assert used | set(pool.free) == set(range(BLOCKS))

    @invariant()
    def references_are_tables_that_point(self):
        tables = self.pages.tables.values()
        count = collections.Counter(block for table in tables for block in table.blocks if block is not None)
        assert [count[block] for block in range(BLOCKS)] == self.pages.pool.refs

    @invariant()
    def gathered_is_contiguous(self):
        for name, table in self.pages.tables.items():
            assert table.tokens == self.tokens[name]
            assert table.dropped == self.dropped[name]
            live = [at for at in range(len(table.tokens)) if at not in table.dropped]
            if not live:
                continue
            k, v = self.pages.gather(0, torch.tensor([[block or 0 for block in table.blocks]]))
            expected = torch.tensor([self.values[name][at] for at in live], dtype=torch.float64)
            assert torch.equal(k[0, :, live], expected[None, :, None].expand(2, -1, 4))
            assert torch.equal(v[0, :, live], -expected[None, :, None].expand(2, -1, 4))

    @invariant()
    def waste_is_less_than_a_block_each(self):
        live = self.pages.live()
        used = sum(refs > 0 for refs in self.pages.pool.refs)
        if not any(self.dropped[name] for name in self.pages.tables):
            assert used * SIZE - sum(live) <= (SIZE - 1) * len(self.pages.tables)
        assert all(count <= SIZE for count in live)
        assert all((count > 0) == (refs > 0) for count, refs in zip(live, self.pages.pool.refs, strict=True))

    @invariant()
    def what_is_found_holds_the_text(self):
        pool = self.pages.pool
        for sealed, block in pool._block.items():
            assert pool._text[block] == sealed
            assert EMPTY not in self.pages.contents[block]


Life.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLife = Life.TestCase


# --- blocks -------------------------------------------------------------------------------------------------------


def test_copy_on_write():
    """A fork copies nothing; the first to write into the last block gets a copy of it, the other keeps it."""
    tables = Tables(6, block_size=4)
    tables.open("a")
    tables.append("a", [1, 2, 3, 4, 5])
    tables.fork("a", "b")
    assert tables.table("a").blocks == tables.table("b").blocks == [0, 1]
    assert tables.pool.refs == [2, 2, 0, 0, 0, 0]
    with record() as recorder:
        assert tables.append("b", [6]) == [(2, 1)]
    assert tables.table("a").blocks == [0, 1]
    assert tables.table("b").blocks == [0, 2]
    assert tables.pool.refs == [2, 1, 1, 0, 0, 0]
    assert tables.contents[:3].tolist() == [[1, 2, 3, 4], [5, -1, -1, -1], [5, 6, -1, -1]]
    assert [event.name for event in recorder.events] == ["block.allocate", "block.copy"]
    assert tables.needs("a", 1) == 0  # it is alone in its last block by now


def test_a_shared_prefix_is_found_by_its_chained_hash():
    tables = Tables(8, block_size=2)
    assert tables.open("a", [1, 2, 3, 4, 5]) == 0
    tables.append("a", [1, 2, 3, 4, 5])
    assert tables.cost([1, 2, 3, 4, 9]) == 1
    assert tables.open("b", [1, 2, 3, 4, 9]) == 4
    assert tables.table("b").blocks == [0, 1]
    assert tables.open("c", [9, 9, 3, 4, 5]) == 0  # the same block after another text is another block
    assert tables.open("d", [1, 2, 3, 4]) == 2  # one token is left to read
    for name in "abd":
        tables.close(name)
    assert len(tables.pool.free) == 8
    assert tables.cost([1, 2, 3, 4, 9]) == 3
    assert tables.open("e", [1, 2, 3, 4, 9]) == 4  # freed, and not given away yet
    assert tables.table("e").blocks == [0, 1]
    tables.close("e")
    tables.append("c", [7] * 16)
    tables.close("c")
    assert tables.open("f", [1, 2, 3, 4, 9]) == 0  # given away by now
    assert chained(chained(b"", [1, 2]), [3]) != chained(chained(b"", [1]), [2, 3])


def test_the_free_list_is_a_queue():
    pool = Pool(3, block_size=2)
    assert [pool.allocate("a") for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ExhaustedError, match="all 3 blocks of 2 tokens are in use"):
        pool.allocate("a")
    for block in (1, 0):
        pool.release(block, "a")
    assert list(pool.free) == [1, 0]
    assert pool.allocate("a") == 1


def test_evicting_single_tokens_frees_no_block_unless_it_empties():
    model, ids = decoder(layers=2), text(12)
    cache = Paged.alone(blocks=4, block_size=4)
    model(ids[None], cache=cache)
    held = cache.nbytes
    assert cache.drop([0, 1, 2, 4, 5, 6, 8, 9, 10]) == []  # three quarters of the text, and no block
    assert cache.nbytes == held
    assert cache.kept(0).tolist() == [3, 7, 11]
    assert cache.drop([7]) == [1]
    assert cache.nbytes == held * 2 // 3
    assert cache.pages.live() == [1, 0, 1, 0]


def test_a_block_that_others_see_does_not_come_free():
    tables = Tables(4, block_size=2)
    tables.open("a")
    tables.append("a", [1, 2, 3])
    tables.table("a").written = 3
    tables.fork("a", "b")
    assert tables.drop("a", [0, 1]) == []
    assert tables.drop("b", [0, 1]) == [0]
    assert tables.drop("b", [2]) == []
    assert tables.table("b").blocks == [None, None]
    tables.append("b", [4])
    assert tables.table("b").blocks[0] is None
    assert tables.pool.refs[tables.table("b").blocks[1]] == 1
    assert tables.contents[tables.table("b").blocks[1]].tolist() == [-1, 4]


# --- the cache ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 14), st.integers(1, 6), st.data())
@settings(max_examples=25)
def test_paged_equals_contiguous(length, size, data):
    model, ids = decoder(layers=2), text(length, batch=1)
    cache = Paged.alone(blocks=-(-length // size), block_size=size)
    assert furthest(fed(model, ids, cache, data.draw(portions(length))), model(ids)) < EXACT
    assert cache.kept(0).tolist() == list(range(length))
    assert cache.seen == length
    used = -(-length // size) * size
    assert cache.nbytes == used * 2 * 2 * SHAPE.kv_heads * SHAPE.head_width * 8


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=25)
def test_rows_of_different_length_in_one_pass(lengths, size, count):
    """Each row is what the sequence says alone, one or several tokens at a time; bit for bit when recorded."""
    model = decoder(layers=2)
    pages = Pages(100, block_size=size)
    texts = [text(length + count, seed=i) for i, length in enumerate(lengths)]
    for i, ids in enumerate(texts):
        pages.open(str(i))
        model(ids[None, :-count], cache=Paged(pages, [str(i)]))
    names = [str(i) for i in range(len(texts))]
    together = model(torch.stack([ids[-count:] for ids in texts]), cache=Paged(pages, names))
    for ids, row in zip(texts, together, strict=True):
        assert furthest(row, model(ids[None])[0, -count:]) < EXACT
    cache = Paged(pages, names)
    kept = cache.kept(0)
    assert [[p for p in row if p >= 0] for row in (kept if len(names) > 1 else kept[None]).tolist()] == [
        list(range(len(ids))) for ids in texts
    ]
    column = torch.zeros(len(names), 1, dtype=torch.long)
    children = [f"{name}/child" for name in names]
    for name, child in zip(names, children, strict=True):
        pages.fork(name, child)
    plain = model(column, cache=Paged(pages, names))
    with record() as recorder:
        assert torch.equal(model(column, cache=Paged(pages, children)), plain)
    assert recorder.freeze().stack("attention.pattern", layer=0).shape[0] == len(names)


def test_generate_through_a_table():
    model, ids = decoder(), text(9)
    expected = list(generate(model, ids, steps=12, cache=Full()))
    assert list(generate(model, ids, steps=12, cache=Paged.alone(blocks=5, block_size=4))) == expected
    with pytest.raises(ValueError, match="needs 17 tokens, and the pool of 4 blocks of 4 tokens holds 16"):
        list(generate(model, ids, steps=12, cache=Paged.alone(blocks=4, block_size=4)))


class Masked(Full):
    """The contiguous cache, blind to some positions."""

    gone = ()

    def extend(self, layer, k, v, rope):
        view = super().extend(layer, k, v, rope)
        view.mask = torch.ones(1, view.k.shape[2], dtype=torch.bool)
        view.mask[:, list(self.gone)] = False
        return view


def test_dropped_tokens_are_not_seen():
    model, ids = decoder(layers=2), text(14, batch=1)
    paged, masked = Paged.alone(blocks=6, block_size=3), Masked()
    for cache in (paged, masked):
        model(ids[:, :1], cache=cache)
    for t in range(1, 14):
        assert furthest(model(ids[:, t : t + 1], cache=paged), model(ids[:, t : t + 1], cache=masked)) < EXACT
        if t == 9:
            assert paged.drop([3, 4, 5, 7, 9]) == [1, 3]  # the last block held 9 alone
            masked.gone = (3, 4, 5, 7, 9)
    assert furthest(model(ids)[:, -1:], model(ids[:, :1], cache=masked)) > 1e-3
    assert paged.kept(0).tolist() == [0, 1, 2, 6, 8, 10, 11, 12, 13]


# --- serving ------------------------------------------------------------------------------------------------------


def requests(*, limit=None):
    """Four texts, two of which begin alike, one of which is written twice."""
    alike = text(9, seed=5).tolist()
    return [
        Request("a", tuple(alike), 7, arrival=0, limit=limit),
        Request("b", tuple(text(4, seed=6).tolist()), 9, arrival=0, limit=limit),
        Request("c", (*alike[:8], 1, 2), 5, arrival=1, limit=limit),
        Request("d", tuple(text(6, seed=7).tolist()), 6, arrival=2, copies=2, limit=limit),
    ]


def alone(model, request):
    """What each copy of a request says by itself."""
    prompt = list(request.prompt)
    first = model(torch.tensor([prompt]))[0, -1].topk(request.copies).indices.tolist()
    later = (generate(model, [*prompt, one], steps=request.steps, cache=Full()) for one in first)
    return {name: [one, *rest][: request.steps] for name, one, rest in zip(request.names, first, later, strict=True)}


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
@pytest.mark.parametrize("blocks", [4, 5, 7, 9, 40])
@pytest.mark.parametrize("size", [4])
def test_everybody_says_what_they_say_alone(blocks, size, preempt):
    model, pages = decoder(layers=2), Pages(blocks, block_size=size)
    with record() as recorder:
        service = serve(model, pages, requests(), preempt=preempt)
    expected = {}
    for request in requests():
        expected |= alone(model, request)
    assert service.texts == expected
    assert set(service.finished) == set(expected)
    assert bool(service.preempted) == (blocks < 40)
    assert not pages.tables
    assert len(pages.pool.free) == blocks
    recording = recorder.freeze()
    assert recording.steps == max(service.finished.values()) + 1 == len(service.paged)
    for use in service.paged:
        assert use.total == blocks * size
        assert use.internal <= (size - 1) * use.running
    away = [event.fields["sequence"] for event in recording.happened("serve.preempt")]
    assert away == service.preempted
    again = serve(model, Pages(blocks, block_size=size), requests(), preempt=preempt)
    assert again == service
    refs, free = recording.track("pages.refs"), recording.track("pages.free")
    for (_, counts), (_, row) in zip(refs.rows(), free.rows(), strict=True):
        assert (counts == 0).sum() == len(row)
    assert recording.nbytes < 2_000_000


def test_a_shared_prompt_is_read_once():
    model = decoder(layers=2)
    pages = Pages(40, block_size=4)
    service = serve(model, pages, requests())
    positions = sum(len(r.prompt) + r.copies * (r.steps - 1) for r in requests())
    assert service.read == positions - 8  # of c, two blocks were there


def test_reservation_beside_paging():
    """Slots by kind, counted by hand in the first steps; paging finishes no later and wastes less."""
    model, few = decoder(layers=2), requests(limit=16)
    beside = Reserved(few, slots=36)
    with record() as recorder:
        service = serve(model, Pages(9, block_size=4), few, beside=beside)
    # Step 0: a (9 of 15) and b (4 of 12) in stretches of 16, and 4 slots are left, too few for c.
    first = service.reserved[0]
    assert (first.used, first.reserved, first.internal, first.external, first.free) == (13, 14, 5, 4, 0)
    second = service.reserved[1]
    assert (second.used, second.reserved, second.internal, second.external, second.free) == (15, 12, 5, 4, 0)
    assert set(beside.finished) == set(service.finished)
    assert max(service.finished.values()) <= max(beside.finished.values())
    assert all(use.total == 36 for use in service.reserved)
    assert sum(u.utilisation for u in service.paged) / len(service.paged) > 0.75
    recording = recorder.freeze()
    assert recording.steps == len(service.reserved) == len(service.paged) == max(beside.finished.values()) + 1
    for strategy, uses in (("paged", service.paged), ("reserved", service.reserved)):
        expected = [[getattr(use, kind) for kind in KINDS] for use in uses]
        assert recording.stack("memory.use", strategy=strategy).tolist() == expected


def test_gaps_between_stretches_are_external():
    """Whoever leaves in the middle leaves a gap, and a longer request cannot use two of them."""
    reserved = Reserved(
        [
            Request("a", (1,), 2, limit=4), Request("b", (1,), 9, limit=10), Request("c", (1,), 2, limit=4),
            Request("d", (1,), 6, arrival=1, limit=6),
        ], slots=18,
    )  # fmt: skip
    uses = [reserved.tick(t) for t in range(4)]
    assert uses[0].external == 0
    assert (uses[2].used, uses[2].external, uses[2].free) == (3, 8, 0)  # two gaps of 4, and d wants 6
    while reserved.busy:
        reserved.tick(len(uses))
        uses.append(None)
    assert set(reserved.finished) == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Pages(0, block_size=4), "blocks must be a whole number above 0, not 0"),
        (lambda: Pages(4, block_size=0), "block_size must be a whole number above 0, not 0"),
        (lambda: Paged(Pages(4, block_size=2), []), "names must be different sequences, one at least"),
        (lambda: Paged(Pages(4, block_size=2), ["x"]), "name must be one of no sequence at all, not 'x'"),
        (lambda: Request("a", (), 3), "prompt of 'a' must hold a token"),
        (lambda: Request("a", (1,), 0), "steps of 'a' must be a whole number of 1 or more, not 0"),
        (lambda: Request("a", (1, 2), 4, limit=4), "limit of 'a' must be at least its 5 tokens, not 4"),
        (lambda: Reserved([Request("a", (1, 2), 4)], slots=4), "slots must hold the 5 of 'a', not 4"),
        (lambda: serve(decoder(), Pages(3, block_size=4), requests()),
         "the request needs 15 tokens, and the pool of 3 blocks of 4 tokens holds 12"),
        (lambda: serve(decoder(), Pages(30, block_size=4), requests(), preempt="never"), "preempt must be"),
        (lambda: serve(decoder(), Pages(30, block_size=4), []), "requests must have different names"),
        (lambda: serve(decoder(), Pages(30, block_size=4), [Request("a", (99,), 2)]), "ids must lie between 0 and 60"),
        (lambda: serve(decoder(), Pages(30, block_size=4), [Request("a", (1,), 99)]), "needs 99 positions"),
    ],
)  # fmt: skip
def test_impossible(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_batch_of_another_size():
    pages = Pages(4, block_size=2)
    pages.open("a")
    with pytest.raises(ValueError, match="a row for each of the 1 sequences, not 2"):
        decoder()(text(2, batch=2), cache=Paged(pages, ["a"]))


# --- SmolLM2 ------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_serves_the_default_requests(smollm2):
    model, tokenizer = smollm2
    prompts = [
        "Alan Turing is a computer scientist and mathematician renowned",
        "Artificial Intelligence is the future of technology",
    ]
    few = [Request(f"r{i}", tuple(tokenizer.encode(p)), 8, arrival=i, limit=32) for i, p in enumerate(prompts)]
    service = serve(model, Pages(8, block_size=4), few, beside=Reserved(few, slots=32))
    for request in few:
        assert service.texts[request.name] == list(generate(model, list(request.prompt), steps=8, cache=Full()))
    assert max(service.finished.values()) < max(len(service.reserved), 1)
