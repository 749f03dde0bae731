"""The lesson on search: budgets that nothing meets, searches look for look, shapes as drawn, models that agree."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from app.runs import execute, is_available
from engine.recording import record
from engine.search.latency import Predictor
from engine.search.supernet import Subnet, extract
from engine.toyland import Tokenizer
from engine.zoo import SPACE, build
from lessons import shapes
from tests.lessons.pages import INSIDE, QUICK, address, open_done
from tests.support import Server, Watched

PRICE = Predictor(0.1, 0.2, 0.01, 0.001)
SMALL = Subnet((2, 8), (64, 384))


@pytest.fixture(scope="module")
def model() -> Any:
    """The supernet's shape, untrained."""
    return build("supernet").eval().requires_grad_(False)


@pytest.fixture
def search(model: Any) -> shapes.Search:
    return shapes.Search(model, {"ms": PRICE, "MB": shapes.megabytes(model)}, population=6, generations=3)


def test_what_is_drawn_is_what_the_shape_keeps() -> None:
    codes = shapes.parts(SMALL)
    assert codes.shape == (4, 8 + 6)
    assert [(row == 1).sum() for row in codes] == [2, 8, 0, 0]
    assert [(row == 2).sum() * shapes.PART for row in codes] == [64, 384, 0, 0]
    assert not shapes.parts(None).any()
    assert shapes.parts(SPACE.largest).all()


def test_what_a_shape_weighs_is_what_its_extracted_model_holds(model: Any) -> None:
    held = sum(p.numel() * p.element_size() for p in extract(model, SMALL).parameters())
    assert shapes.megabytes(model)(SMALL) == pytest.approx(held / 1e6)


def test_a_budget_that_nothing_meets_is_told_with_what_would_do(search: shapes.Search) -> None:
    least, most = PRICE(SPACE.smallest), PRICE(SPACE.largest)
    shapes.fits(search.costs, {"ms": least, "MB": 1.0}, 50)
    with pytest.raises(
        ValueError, match=r"10% of .* is 0\.\d\d ms, and even the smallest needs .* Allow (\d+)%"
    ) as told:
        shapes.fits(search.costs, {"ms": 0.1 * most, "MB": 1.0}, 10)
    enough = int(str(told.value).split("Allow ")[1].split("%")[0])
    shapes.fits(search.costs, {"ms": enough / 100 * most, "MB": 1.0}, enough)
    assert enough - 5 < 100 * least / most
    with pytest.raises(ValueError, match=r"memory budget is 0\.2 MB, and even the smallest shape weighs 0\.32 MB"):
        shapes.fits(search.costs, {"ms": most, "MB": 0.2}, 100)


def test_evolution_and_chance_look_as_often_within_the_budget_and_measure_nothing_twice(search: shapes.Search) -> None:
    asked: Counter[Subnet] = Counter()

    def judge(subnet: Subnet) -> float:
        asked[subnet] += 1
        return 5 - math.log(sum(subnet.heads) + sum(subnet.ffn_width))

    search.judge = judge
    search.read = judge  # type: ignore[method-assign]
    limits = {"ms": 0.6 * PRICE(SPACE.largest), "MB": 1.5}
    with record(keep={"shapes.*": {}}) as recorder:
        best = shapes.compete(search, limits, seed=3)
    recording = recorder.freeze()
    assert recording.steps == 2 * shapes.SEEDS * search.generations
    for seed in range(shapes.SEEDS):
        evolution, chance = (recording.stack(shapes.LOOKS, by=by, seed=seed) for by in ("evolution", "chance"))
        assert evolution.tolist() == chance.tolist()
        assert recording.meta["looks"][seed] == evolution[-1]
        for by in ("evolution", "chance"):
            falling = recording.stack(shapes.BEST, by=by, seed=seed)
            assert (np.diff(falling) <= 0).all()
            assert falling[-1] == recording.meta["results"][by][seed]
    ms = recording.stack(shapes.CANDIDATES)
    assert np.nanmax(ms) <= limits["ms"] + 1e-6
    assert np.isfinite(ms[:, 0]).sum() == np.isfinite(ms[:, 1]).sum() == recording.meta["looks"][0]
    sizes, group = recording.stack(shapes.SIZES), (0, 1, 0)
    layers, heads, neurons = (int(n) for n in sizes[group])
    assert ms[group] == pytest.approx(PRICE(Subnet.even(1, heads=heads, ffn_width=neurons)) + 0.2 * (layers - 1))
    assert best.costs["MB"] <= limits["MB"]
    assert len(search.known) == len([s for s in asked if s in search.known])
    winners = recording.meta["results"]["evolution"] + recording.meta["results"]["chance"]
    assert sum(asked.values()) == len(search.known) + len(winners)  # `read` asks for the winners once more


def test_roomier_budgets_never_read_worse_where_size_is_all(search: shapes.Search) -> None:
    search.judge = lambda subnet: 9 - PRICE(subnet)
    limits = {"ms": 0.5 * PRICE(SPACE.largest), "MB": 2.5}
    best = next(iter(search.evolved(limits, 0))).best
    found, budgets = shapes.several(search, limits, best, seed=0)
    assert tuple(found) == shapes.FINAL
    assert budgets["tight"] < budgets["yours"] < budgets["roomy"]
    for name, limit in budgets.items():
        assert PRICE(found[name]) <= limit
    assert PRICE(found["roomy"]) > PRICE(found["tight"])


def test_the_models_that_are_compared_are_the_same(model: Any) -> None:
    ids = torch.randint(0, model.shape.vocab, (2, 12), generator=torch.Generator().manual_seed(0))
    made = extract(model, SMALL)
    with record() as recorder:
        shapes.same(model, made, SMALL, ids)
        made.embed.weight += 0.1
        shapes.same(model, made, SMALL, ids)
    equal, spoiled = recorder.freeze().stack(shapes.APART, of="extracted")
    assert equal < 1e-4 < spoiled
    for of in ("largest", "sorted"):
        assert recorder.freeze().stack(shapes.APART, of=of).max() < 1e-4


def test_models_speak_in_turns_from_the_same_words(model: Any) -> None:
    models = {"largest": model, "yours": extract(model, SMALL)}
    prompt = Tokenizer().prompt("where is anna?")
    with record(keep={"shapes.*": {}}) as recorder:
        said = shapes.speak(models, prompt)
    recording = recorder.freeze()
    assert recording.steps == shapes.WORDS
    assert recording.track(shapes.PROMPT).latest().tolist() == prompt[1:]
    for name in models:
        assert recording.stack(shapes.SAID, model=name).tolist() == said[name]
        assert recording.track(shapes.SAID, model=name).at.tolist() == list(range(shapes.WORDS))


def trained() -> None:
    there, why = is_available("supernet")
    if not there:
        pytest.skip(why)


@pytest.mark.parametrize("values", [{"budget": 5}, {"memory": 0.2}])
def test_the_lowest_budgets_are_refused(values: dict[str, Any]) -> None:
    trained()
    with pytest.raises(ValueError, match="Nothing fits"):
        execute("search", {**QUICK["search"], **values})


@pytest.mark.browser
def test_what_the_shapes_say_and_that_nothing_fits_stand_on_the_page(server: Server, chromium: Any) -> None:
    trained()
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    page = Watched(context.new_page())
    last = shapes.LAPS + (2 * shapes.SEEDS + 2) * QUICK["search"]["generations"] + shapes.WORDS
    open_done(page, address(server, "search", beat=7, step=last))
    page.until(f"{INSIDE}.querySelectorAll('.saying').length === 5", seconds=20)
    page.until(f"{INSIDE}.querySelectorAll('.saying-word').length === {5 * shapes.WORDS}", seconds=30)
    rows = page.page.evaluate(f"[...{INSIDE}.querySelectorAll('.saying')].map((row) => row.textContent)")
    assert [next(n for n in ("largest", "Roomy", "Yours", "Tight", "smallest") if n in row) for row in rows]
    assert all("perplexity" in row and " ms" in row and " MB" in row for row in rows)
    assert not page.page.evaluate(f"{INSIDE}.querySelector('.saying').querySelectorAll('.other').length")
    assert not page.wrongs
    page.open(address(server, "search", budget=5))
    page.until("window.leanscope?.ready", seconds=60)
    page.until(f"{INSIDE}.textContent.includes('Nothing fits: 5% of the largest')", seconds=60)
    context.close()
