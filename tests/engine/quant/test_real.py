"""On SmolLM2-135M: what per-tensor int8 breaks and what repairs it, its weights' own grid, its cache in few bits."""

import pytest
import torch

from engine.caches.quantised import Quantised
from engine.evaluate import perplexity, surprisal
from engine.quant import capture_inputs, integer, linears, llm_int8, quantised
from engine.quant.affine import Grid, quantise
from engine.quant.awq import grid, search
from engine.quant.smoothquant import largest, smoothed

pytestmark = pytest.mark.real

TEXT = """
The old lighthouse at the end of the harbour wall had not been lit for eleven years when Marta came to live in
it. She had bought it from the council for less than the price of a small car, on the condition that she would
repair the roof before winter and let the school children climb the stairs once a year. The first week it
rained so hard that the water ran down the inside of the tower and gathered in the kitchen, and she slept on
the table with her coat over her head. Then the wind turned to the north, the sky cleared, and in the morning
she could see the islands, each one sharp and separate, as if somebody had cut them out of blue paper.

Machines remember in a different way from people. A person who reads a long letter keeps the tone of it and a
few of its sentences; a language model keeps two lists of numbers for every word, and looks through all of
them each time it writes the next one. The lists grow as the text grows. After a few thousand words they are
larger than the model itself, and most of the time is spent waiting for them to arrive from memory. There are
several ways to make the lists shorter: to share them between layers, to forget what nobody looks at, or to
write the numbers down with fewer digits. None of these is free, and the honest question is always the same:
what did we lose, and would anybody have noticed?

In the evening she carried the lamp up the stairs, one hundred and twelve of them, and set it behind the great
lens.
"""  # written for this test

CALIBRATION = """
Rivers do not run straight because the ground is never even. Where the water meets a stone it slows, drops its
sand, and builds a bank; on the other side it runs faster and eats the shore away. To cook rice, rinse it
twice, add one and a half cups of water for each cup, bring it to the boil, cover it and turn the heat down as
low as it goes. The function returns the sum of its two arguments, or raises an error if either of them is
missing.
"""

TENSOR, TOKEN, CHANNEL = (Grid(8, granularity=g) for g in ("tensor", "token", "channel"))


def reading(model, ids, cache=None) -> float:
    return perplexity(surprisal(model, ids, cache=cache))


@pytest.fixture(scope="module")
def real(smollm2):
    model, tokenizer = smollm2
    texts = (" ".join(text.split()) for text in (TEXT, CALIBRATION))
    return model, *(torch.tensor(tokenizer.encode(text)) for text in texts)


def test_per_tensor_w8a8_hurts_and_llm_int8_and_smoothquant_recover_it(real):
    model, ids, calibration = real
    ids = ids[:192]
    down = [name for name in linears(model) if name.endswith("down")]  # a quarter of the work, nearly all the harm
    full = reading(model, ids)
    plain = reading(quantised(model, integer.recipe(weights=TENSOR, activations=TENSOR), names=down), ids)
    mixed = reading(quantised(model, llm_int8.recipe(), names=down), ids)
    with torch.inference_mode(), capture_inputs(model) as inputs:
        model(calibration[None])
    smooth = smoothed(model, largest(inputs), down=True)
    repaired = reading(quantised(smooth, integer.recipe(weights=CHANNEL, activations=TOKEN), names=down), ids)
    assert plain > 1.4 * full
    assert mixed < 1.03 * full
    assert repaired < 1.03 * full


def test_its_weights_lie_on_a_4_bit_grid_of_groups_of_32(real):
    model, _, _ = real
    found = Grid(4, symmetric=False, granularity="group", group=32, whole_zero=False)
    errors = {}
    for name in list(linears(model))[::13]:
        weight = linears(model)[name].weight.detach()
        assert (quantise(weight, found).reconstruct() - weight).norm() < 1e-5 * weight.norm()
        for by, group in (("tensor", None), ("channel", None), ("group", 64)):
            back = quantise(weight, Grid(3, symmetric=False, granularity=by, group=group)).reconstruct()
            errors[by] = errors.get(by, 0.0) + float((back - weight).norm() / weight.norm())
    assert errors["group"] < 0.8 * errors["channel"]
    assert errors["channel"] < 0.6 * errors["tensor"]


def test_awq_s_search_never_loses_to_plain_rounding_and_outliers_sit_in_few_channels(real):
    model, _, calibration = real
    names = ["blocks.12.mixer.qkv", "blocks.12.ffn.down", "blocks.20.mixer.out"]
    with torch.inference_mode(), capture_inputs(model, names=names, rows=64) as inputs:
        model(calibration[None])
        for name in names:
            found = search(model.get_submodule(name).weight, inputs[name], grid(3, group=64))
            assert found.losses.min() <= found.losses[0]
        assert search(model.get_submodule(names[0]).weight, inputs[names[0]], grid(3, group=64)).ratio > 0
    reaches = (inputs[names[0]].abs() >= 6).any(0)
    assert 1 <= int(reaches.sum()) <= 3


def test_its_cache_bears_two_bits_by_channel_and_token_but_not_by_tensor(real):
    model, ids, _ = real
    ids = ids[:128]
    full = reading(model, ids)
    kivi = Quantised(2, group=16, recent=16, at_once=16)
    naive = Quantised(2, keys="tensor", values="tensor", group=16, recent=16, at_once=16)
    assert reading(model, ids, kivi) < 1.2 * full
    assert reading(model, ids, naive) > 3 * full
    assert kivi.nbytes < 0.25 * 128 * model.shape.layers * 2 * 3 * 64 * 4  # of the plain cache in float32
