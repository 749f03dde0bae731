"""Trees: the mask by hand, every path against the plain model, the law of every way to make siblings, the loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.caches.full import Full
from engine.caches.window import Window
from engine.generate import generate
from engine.recording import record
from engine.speculate import ROOT, Dice, Draft, Drafter, emitted, in_a_row
from engine.speculate.chain import verify as verify_chain
from engine.speculate.loop import check, speculate
from engine.speculate.tree import (
    LECTURE_PARENTS,
    LECTURE_WORDS,
    Branches,
    Tree,
    node_count,
    siblings,
    tree_mask,
    tree_positions,
    verify,
)
from tests.engine.speculate.test_chain import EXACT, furthest_law, pairs, paths, plain_law, tensor, toy


def random_parents(most=9):
    return st.lists(st.integers(0, 100), min_size=1, max_size=most).map(
        lambda picks: [pick % (i + 1) - 1 for i, pick in enumerate(picks)]
    )


def path_to(parents, node):
    path = []
    while node != ROOT:
        path.insert(0, node)
        node = parents[node]
    return path


# --- the mask --------------------------------------------------------------------------------------------------


def test_the_tree_of_the_lecture():
    assert len(LECTURE_WORDS) == 8
    rows = [
        "x.......",  # It
        "xx......",  # It is
        "x.x.....",  # It has
        "xx.x....",  # It is a
        "xx..x...",  # It is the
        "x.x..x..",  # It has to
        "xx.x..x.",  # It is a good
        "x.x..x.x",  # It has to be
    ]
    assert tree_mask(LECTURE_PARENTS).tolist() == [[c == "x" for c in row] for row in rows]
    assert tree_positions(LECTURE_PARENTS, seen=5).tolist() == [5, 6, 6, 7, 7, 7, 8, 8]


@given(random_parents(), st.integers(0, 4))
def test_a_node_sees_the_text_and_its_path(parents, seen):
    mask, positions = tree_mask(parents, seen=seen), tree_positions(parents, seen=seen)
    assert mask.shape == (len(parents), seen + len(parents))
    assert mask[:, :seen].all()
    for node in range(len(parents)):
        assert mask[node, seen:].nonzero()[:, 0].tolist() == path_to(parents, node)
        assert positions[node] == seen + len(path_to(parents, node)) - 1


@given(random_parents(), st.integers(0, 5), st.data())
@settings(max_examples=25)
def test_every_path_reads_as_if_it_were_alone(parents, seen, data):
    model = toy(5, vocab=7)
    prompt = [i % 7 for i in range(3, 3 + seen)]
    tokens = data.draw(st.lists(st.integers(0, 6), min_size=len(parents), max_size=len(parents)))
    split = data.draw(st.integers(0, len(parents)))
    cache = Full()
    if prompt:
        model(torch.tensor([prompt]), cache=cache)
    branches, rows = Branches(cache), []
    for part in (slice(0, split), slice(split, None)):  # a tree may be read in portions
        if tokens[part]:
            branches.grow(parents[part])
            rows.append(model(torch.tensor([tokens[part]]), cache=branches)[0])
    rows = torch.cat(rows)
    for node in range(len(parents)):
        path = path_to(parents, node)
        alone = model(torch.tensor([[*prompt, *(tokens[i] for i in path)]]))[0, -1]
        assert (rows[node] - alone).abs().max() < EXACT
    path = path_to(parents, len(parents) - 1)
    cache.keep(seen, path)
    fresh = Full()
    model(torch.tensor([[*prompt, *(tokens[i] for i in path)]]), cache=fresh)
    assert cache.seen == fresh.seen
    assert cache.nbytes == fresh.nbytes
    for layer in cache._k:
        assert (cache._k[layer] - fresh._k[layer])[:, :, : fresh.seen].abs().max() < EXACT
        assert (cache._v[layer] - fresh._v[layer])[:, :, : fresh.seen].abs().max() < EXACT


# --- the law ---------------------------------------------------------------------------------------------------


@given(pairs(), st.integers(1, 3), st.sampled_from(["replaced", "distinct"]))
@settings(max_examples=60)
def test_siblings_give_p(pq, width, ways):
    """Averaged over all that the drafter may draw, with and without replacement."""
    p, q = pq
    logits = q.log()

    def work(dice):
        found = siblings(logits, width, ways=ways, temperature=1.0, dice=dice)
        return emitted(p, *zip(*found, strict=True))

    out = sum(probability * law for probability, law in paths(work))
    assert (out - p).abs().max() < EXACT


@given(pairs(), st.data())
def test_chosen_siblings_give_p(pq, data):
    p, _ = pq
    tokens = data.draw(st.lists(st.integers(0, len(p) - 1), unique=True, max_size=len(p)))
    assert (emitted(p, tokens, [None] * len(tokens)) - p).abs().max() < EXACT


def test_more_siblings_are_accepted_more_often():
    p, q = tensor([0.5, 0.3, 0.2]), tensor([0.2, 0.7, 0.1])

    def accepted(width, ways):
        chances = paths(lambda dice: _any_accepted(p, siblings(q.log(), width, ways=ways, temperature=1.0, dice=dice)))
        return sum(probability * chance for probability, chance in chances)

    one, two, three = (accepted(width, "distinct") for width in (1, 2, 3))
    assert one == pytest.approx(0.6)
    assert one < two < three
    assert accepted(2, "replaced") < two
    assert three == pytest.approx(1.0)


def _any_accepted(p, found):
    from engine.speculate import chance, rejected

    none = 1.0
    for token, q in found:
        none *= 1 - chance(p, token, q)
        if none <= 0:
            return 1.0
        p = rejected(p, token, q)
    return 1 - none


@pytest.mark.parametrize("ways", ["likeliest", "replaced", "distinct"])
def test_the_loop_has_the_law_of_the_target(ways):
    target, small = toy(1), toy(2, layers=1)

    def work(dice):
        drafter = Tree(small, widths=(2, 1), ways=ways)
        return list(speculate(target, [0, 2], steps=3, drafter=drafter, temperature=1.0, dice=dice))

    assert furthest_law(work, plain_law(target, [0, 2], 3, 1.0)) < EXACT


@pytest.mark.parametrize("widths", [(2,), (3, 2), (2, 2, 2), (1, 1, 1)])
def test_greedy_equals_the_plain_loop(widths):
    for seed in range(3):
        target, small = toy(seed, vocab=9), toy(seed + 10, vocab=9, layers=1)
        expected = list(generate(target, [1, 2, 3], steps=20, cache=Full()))
        cache = Full()
        assert list(speculate(target, [1, 2, 3], steps=20, drafter=Tree(small, widths=widths), cache=cache)) == expected
        fresh = Full()
        target(torch.tensor([[1, 2, 3, *expected[:-1]]]), cache=fresh)
        assert cache.seen == fresh.seen
        for layer in range(2):
            assert (cache._k[layer] - fresh._k[layer])[:, :, : fresh.seen].abs().max() < EXACT


def test_a_chain_is_a_tree_without_branches():
    q = tensor([0.2, 0.5, 0.3])
    laws = torch.stack([tensor([0.6, 0.3, 0.1]), tensor([0.1, 0.2, 0.7]), tensor([0.3, 0.3, 0.4])])
    draft = in_a_row([1, 2], [q, q])
    for seed in range(40):
        one, other = verify_chain(draft, laws, dice=Dice(seed)), verify(draft, laws, dice=Dice(seed))
        assert (one.accepted, one.rejected, one.token) == (other.accepted, other.rejected, other.token)
        assert torch.equal(one.rest, other.rest)
        assert one.corrected == other.corrected


def test_a_wider_tree_needs_fewer_passes():
    target, small = toy(3, vocab=12), toy(13, vocab=12, layers=1)

    def passes(widths):
        with record(keep={}) as recorder:
            list(speculate(target, [1], steps=40, drafter=Tree(small, widths=widths)))
        return recorder.freeze().steps

    assert passes((4, 2)) < passes((1, 1)) <= 40


def test_a_tree_edited_by_hand_is_checked():
    """Parents and tokens from outside: the likeliest path is found wherever it stands."""
    target = toy(4, vocab=9)
    expected = list(generate(target, [1, 2], steps=4, cache=Full()))
    others = [(token + 1) % 9 for token in expected]
    draft = Draft((ROOT, ROOT, 1, 1, 3), (others[0], expected[0], others[1], expected[1], expected[2]))
    cache = Full()
    target(torch.tensor([[1]]), cache=cache)
    verdict, laws, hidden = check(target, [1, 2], draft, cache, temperature=0.0, dice=Dice(0))
    assert verdict.accepted == [1, 3, 4]
    assert verdict.rejected == [0, 2]
    assert verdict.token == expected[3]
    assert not verdict.corrected
    assert laws.shape == (6, 9)
    assert hidden.shape == (4, 16)
    assert cache.seen == 5


class Edited(Drafter):
    def __init__(self, draft):
        self.given = draft

    def draft(self, text, *, room, temperature, dice):
        keep = [i for i, depth in enumerate(self.given.depths) if depth <= room]
        assert keep == list(range(len(keep)))
        return Draft(self.given.parents[: len(keep)], self.given.tokens[: len(keep)])


def test_the_law_of_an_edited_tree():
    target = toy(1)
    draft = Draft((ROOT, ROOT, 0, 0, 1), (2, 0, 1, 0, 2))

    def work(dice):
        return list(speculate(target, [1], steps=3, drafter=Edited(draft), temperature=1.0, dice=dice))

    assert furthest_law(work, plain_law(target, [1], 3, 1.0)) < EXACT


def test_what_is_recorded():
    target, small = toy(3, vocab=12), toy(13, vocab=12, layers=1)
    with record() as recorder:
        drafter = Tree(small, widths=(2, 2))
        list(speculate(target, [1, 5], steps=12, drafter=drafter, temperature=1.0, seed=2))
    recording = recorder.freeze()
    rounds = recording.happened("speculate.round")
    for at, masks in recording.track("speculate.mask").rows():
        parents = recording.track("speculate.parents").latest(at)
        assert torch.equal(torch.tensor(masks), tree_mask([ROOT, *(parents + 1)]))
        outcome = recording.track("speculate.outcome").latest(at)
        assert (outcome == 1).sum() == len(rounds[at].fields["accepted"])
        assert (outcome == 2).sum() == len(rounds[at].fields["rejected"])
        p, q, rest = (recording.track(f"speculate.law.{x}").latest(at) for x in ("p", "q", "rest"))
        expected = (p - q).clip(0)
        assert abs(rest - expected / expected.sum()).max() < EXACT
    assert set(recording.stack("work.rows")) <= {1, 2, 3, 7}


# --- what is refused -------------------------------------------------------------------------------------------


def test_wrong_arguments():
    small = toy(2)
    for widths in ((), (0,), (2, -1)):
        with pytest.raises(ValueError, match="widths must be"):
            Tree(small, widths=widths)
    with pytest.raises(ValueError, match="at most 256"):
        Tree(small, widths=(4, 4, 4, 4))
    with pytest.raises(ValueError, match="ways must be"):
        Tree(small, widths=(2,), ways="best")
    with pytest.raises(ValueError, match="needs 2 laws"):
        verify(in_a_row([1]), torch.ones(1, 3), dice=Dice(0))
    with pytest.raises(ValueError, match="must be -1 or a node before it"):
        Draft((5,), (1,))
    with pytest.raises(ValueError, match="only 1 were announced"):
        small(torch.tensor([[1, 2]]), cache=Branches(Full(), [ROOT]))
    assert node_count((3, 2)) == 9


def test_what_a_cache_can_take_back():
    model, cache = toy(1), Full()
    model(torch.tensor([[0, 1, 2, 0]]), cache=cache)
    cache.crop(4)
    assert cache.seen == 4
    for seen, places in ((5, ()), (-1, ()), (2, (2,)), (2, (-1,))):
        with pytest.raises(ValueError, match="must lie within the 4 tokens"):
            cache.keep(seen, places)
    with pytest.raises(ValueError, match="must grow"):
        cache.keep(0, (1, 0))
    cache.keep(1, (0, 2))
    assert cache.seen == 3
    window = Window(2)
    model(torch.tensor([[0, 1, 2]]), cache=window)
    with pytest.raises(ValueError, match="Window cannot forget"):
        window.crop(1)
    cache.states[0] = torch.zeros(1)
    with pytest.raises(ValueError, match="recurrent state"):
        cache.crop(1)
    with pytest.raises(ValueError, match="draft a chain"):
        Branches(cache)


def test_siblings_stop_where_the_law_ends():
    found = siblings(tensor([0.5, 0.5, 0.0]).log(), 3, ways="distinct", temperature=1.0, dice=Dice(0))
    assert sorted(token for token, _ in found) == [0, 1]
    drawn = siblings(torch.ones(2), 5, ways="likeliest", temperature=1.0, dice=Dice(0))
    assert sorted(drawn) == [(0, None), (1, None)]
