"""What the zoo has to show: the order that the sources tell of, in the figures of the models that ship.

The figures themselves are measured anew by test_train.py. A model that is not there yet is passed over here and missed
in the card.
"""

import pytest

from engine import checkpoints, zoo

ZOO = checkpoints.manifest()


def needs(*names):
    missing = [name for name in names if name not in ZOO]
    return pytest.mark.skipif(bool(missing), reason=f"not trained yet: {', '.join(missing)}")


def above(name):
    """How far a model's perplexity lies above the grammar's own."""
    return ZOO[name]["perplexity"] / ZOO[name]["floor"] - 1


def test_the_baseline_is_near_the_floor_and_remembers():
    assert above("toy") < 0.05
    assert ZOO["toy"]["recall"] > 0.95


@needs("gqa4", "gqa2")
def test_grouped_queries_read_about_as_well():
    assert abs(above("gqa4") - above("toy")) < 0.02
    assert abs(above("gqa2") - above("toy")) < 0.02


def test_what_is_compared_was_trained_alike():
    for name, entry in ZOO.items():
        recipe = zoo.RECIPES[name]
        if not recipe.start and not name.startswith("recall-"):
            assert (entry["steps"], entry["tokens"], entry["data"]) == tuple(
                ZOO["toy"][key] for key in ("steps", "tokens", "data")
            ), name


@needs("mqa")
def test_one_key_head_for_all_costs_more_than_two():
    assert above("toy") < above("mqa")
    assert above("gqa2") < above("mqa")


@needs("window")
def test_a_window_forgets_what_full_attention_keeps():
    for kind in ("recall_many", "recall_secret"):
        assert ZOO["window"][kind] < ZOO["toy"][kind] - 0.1


@needs("interleaved", "window")
def test_full_layers_in_between_bring_it_back():
    for kind in ("recall_many", "recall_secret"):
        assert ZOO["interleaved"][kind] > ZOO["window"][kind] + 0.1


@needs("hybrid", "mamba")
def test_one_attention_layer_among_mamba_recalls_more():
    assert ZOO["hybrid"]["recall_many"] > ZOO["mamba"]["recall_many"]
