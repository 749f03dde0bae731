"""What lesson speculate adds to the engine: a learner's tree, rounds beside the plain loop, laws place by place."""

import pytest
import torch

from app.runs import execute
from engine import checkpoints
from engine.caches.full import Full
from engine.generate import generate
from engine.recording import record
from engine.speculate import ROOT, Dice, emitted
from engine.speculate.rounds import check_tree, laws_at, little_rounds, rounds
from engine.speculate.tree import LECTURE_PARENTS
from engine.toyland import Tokenizer
from lessons.guess_trees import drawn
from lessons.guessing import Pair, drafter, widths_of
from lessons.models import TOY
from lessons.speculate import ATTIC, CELLAR, LECTURE
from tests.lessons.pages import INSIDE, address, open_done
from tests.support import Server, Watched


class Letters:
    """A tokenizer whose words are their letters' sum, so that any word is one token."""

    def encode(self, text):
        return [sum(map(ord, text.strip()))]


@pytest.fixture(scope="module")
def pair():
    target, tokenizer = checkpoints.load("toy")
    return Pair(target, tokenizer, checkpoints.load("little")[0], toy=True)


def test_the_lectures_tree_is_that_of_the_engine():
    assert drawn(LECTURE, Letters(), follows="", toy=False).parents == LECTURE_PARENTS
    assert drawn(CELLAR, Tokenizer(), follows=ATTIC, toy=True).parents == LECTURE_PARENTS


def test_paths_that_begin_alike_share_nodes_however_they_are_written():
    tree = drawn("in the attic; in > the > cellar\n\n", Tokenizer(), follows="", toy=True)
    assert tree.parents == (ROOT, 0, 1, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (" >\n", "Your tree has no words"),
        ("in > the > spaceship", "“spaceship”, no word of Toyland"),
        ("the " * 9, "a path of 9 tokens"),
        (
            "\n".join(f"{a} > {b} > the" for a in ("in", "is", "has") for b in ("a", "to", "it", "on", "who")),
            "33 guesses",
        ),
    ],
)
def test_what_is_no_tree_is_refused_with_a_sentence(text, says):
    with pytest.raises(ValueError, match=says):
        drawn(text, Tokenizer(), follows="", toy=True)


def test_a_tree_accepts_what_the_plain_loop_says_and_adds_a_word(pair):
    ids = pair.tokenizer.prompt(ATTIC)
    draft = drawn(CELLAR, pair.tokenizer, follows=ATTIC, toy=True)
    checked = check_tree(pair.target, ids, draft, temperature=0.0, seed=0)
    said = [*(draft.tokens[node] for node in checked.verdict.accepted), checked.verdict.token]
    assert said == list(generate(pair.target, ids, steps=len(said), cache=Full()))
    assert checked.passes == 3
    assert checked.off < 1e-4


@pytest.mark.parametrize("kind", [{"width": 1}, {"width": 3}, {"adaptive": True}])
def test_rounds_say_what_the_plain_loop_says(pair, kind):
    ids = pair.tokenizer.prompt(ATTIC)
    with record(keep={}):
        turns = list(
            rounds(pair.target, ids, steps=16, guesser=drafter(pair, length=3, **kind), temperature=0.0, seed=0)
        )
        plain = list(generate(pair.target, ids, steps=16, cache=Full()))
    assert [token for one in turns for token in one.new] == plain
    for one in turns[1:]:
        assert one.new == [*(one.draft.tokens[node] for node in one.verdict.accepted), one.verdict.token]
        assert one.seconds > one.draft_seconds >= 0


def test_a_little_model_that_is_always_believed_has_the_last_word(pair):
    ids = pair.tokenizer.prompt(ATTIC)
    with record(keep={}):
        turns = list(little_rounds(pair.target, pair.small, ids, steps=8, fallback=0.0, rollback=float("inf"), most=4))
        alone = list(generate(pair.small, ids, steps=4, cache=Full()))
    assert [turns[0].draft.tokens[n] for n in turns[0].verdict.accepted] == alone


def test_laws_of_a_place_are_those_that_the_drafter_draws_from_and_together_they_give_p(pair):
    ids = pair.tokenizer.prompt(ATTIC)
    places = [5, len(ids) - 1]
    p, q, guessed = laws_at(pair.target, pair.small, ids, places, temperature=1.0)
    assert guessed == [True, True]
    for n, place in enumerate(places):
        draft = drafter(pair, length=1).draft(ids[:place], room=1, temperature=1.0, dice=Dice(0))
        assert torch.allclose(draft.laws[0], q[n], atol=1e-6)
        out = sum(q[n, x] * emitted(p[n], [x], [q[n]]) for x in range(len(p[n])) if q[n, x] > 0)
        assert torch.allclose(out, p[n], atol=1e-12)


def test_a_tree_gets_narrower_with_depth():
    assert widths_of(3, 5) == (3, 2, 1, 1, 1)
    assert widths_of(1, 2) == (1, 1)


@pytest.mark.parametrize("values", [{}, {"temperature": 1.0}, {"guesser": "bild"}, {"tree": "now > now"}])
def test_the_whole_run_tells_what_it_may_claim(values):
    recording = execute("speculate", {"model": TOY, "tokens": 16, **values})
    words = recording.meta["written"]["words"]
    assert words == 16
    if not values:
        assert recording.meta["written"]["same"] == 16
        assert recording.meta["tree"]["said"] == "in the cellar."
    if "tree" in values:
        assert recording.meta["tree"]["accepted"] == 0
    assert recording.meta["lossless"] is (values.get("guesser") != "bild")


@pytest.mark.browser
def test_a_tree_is_written_anew_walked_by_keyboard_and_read_as_a_table(server: Server, chromium_page: Watched) -> None:
    page = chromium_page
    open_done(page, address(server, "speculate", beat=1, step=9))
    words = f"[...{INSIDE}.querySelectorAll('[data-view=tree] .tree-word')].map((e) => e.textContent).join(' ')"
    page.until(f"{words} === '? in the a cellar attic box now now .'")
    page.until(f"{INSIDE}.querySelectorAll('[data-view=tree] .tree-node.fate-accepted').length === 3")
    assert page.page.evaluate(f"{INSIDE}.querySelectorAll('[data-view=tree] .tree-node.fate-rejected').length") == 1

    page.page.locator("[data-view=tree] .tree-scroll").focus()
    for _ in range(3):
        page.page.keyboard.press("ArrowRight")
    page.until(f"{INSIDE}.querySelectorAll('[data-view=tree] .tree-node.lit').length === 3")
    page.page.keyboard.press("Enter")
    page.until(f"{INSIDE}.querySelector('.cell-card:not([hidden]) .cell-title')?.textContent === 'guess 2: kept'")
    page.page.keyboard.press("Escape")

    field = page.page.get_by_label("Your tree", exact=True)
    field.fill("in > the > attic\nin > the > spaceship")
    field.press("Control+Enter")
    page.until(f"{INSIDE}.textContent.includes('no word of Toyland')")
    field.fill("in > the > attic\nin > the > cellar > .")
    field.press("Control+Enter")
    page.until(f"{words}.startsWith('? in the attic')", seconds=60)
