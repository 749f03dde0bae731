"""What the lessons on sharing the cache have in common: figures that a calculator or the engine's tensors give."""

import functools

import numpy as np
import pytest

from app.runs import execute
from engine import checkpoints, cost
from engine.mixers.pooling import repeat
from engine.published import PUBLISHED
from lessons.heads import LESSON as HEADS
from lessons.heads import lost_cell
from lessons.layers_share import DONE, KIND, LIT, READS, done_cell
from lessons.layers_share import LESSON as LAYERS
from lessons.looking import GROUPS, OFFERED, OVERLAP, PATTERN, WIRES, look_cell
from lessons.sharing import BYTES, FIELDS, MODELS, calculator, compute, toy, weigh
from tests.lessons.pages import INSIDE, address, open_done

TYPED = {f.name: f.value for f in FIELDS}
IDS = list(range(3, 40))


@functools.cache
def ran(slug, **values):
    return execute(slug, values)


def heads():
    return ran("heads", steps=10)


def layers():
    return ran("layers-share", prompt=24)


@pytest.mark.parametrize("preset", calculator().presets, ids=lambda p: p[0])
def test_a_preset_gives_the_published_models_cache(preset):
    label, values = preset
    model = next(PUBLISHED[name] for name, said in MODELS.items() if said == label)
    found = compute(TYPED | values).values
    assert found["values"] == model.kv_values()
    assert found["bytes"] == 2 * model.kv_values()


@pytest.mark.parametrize(
    ("label", "size"), [("Llama-2-7B", 512 * 1024), ("Llama-3-8B", 128 * 1024), ("DeepSeek-V2", 60 * 576 * 2)]
)
def test_known_bytes_a_token(label, size):
    assert compute(TYPED | dict(calculator().presets)[label]).values["bytes"] == size


def test_fewer_bits_shared_layers_and_a_window_shrink_it():
    whole = compute(TYPED).values
    assert compute(TYPED | {"bits": 4}).values["bytes"] == whole["bytes"] / 4
    assert compute(TYPED | {"share": 2}).values["bytes"] == whole["bytes"] / 2
    assert compute(TYPED | {"kv_heads": 8}).values["times"] == 4
    assert whole["fit"] == int(80e9 // whole["bytes"])
    last = dict(compute(TYPED | {"window": 1000}).lines)
    assert last["All layers at 1,000 tokens"] == "524.3 MB"
    assert last["Tokens that fit in 80 GB"] == "any number"


@pytest.mark.parametrize(
    ("typed", "label"), [({"kv_heads": 5}, "Key heads"), ({"width": 7}, "Head width"), ({"share": 3}, "Layers a cache")]
)
def test_a_shape_that_makes_no_sense_gets_a_sentence_at_its_field(typed, label):
    with pytest.raises(ValueError, match=f"^{label} must "):
        compute(TYPED | typed)
    assert label in {f.label for f in FIELDS}


@pytest.mark.parametrize(("name", "factor"), [("toy", 1), ("gqa2", 1), ("mqa", 1), ("cla2", 2), ("cla2-mqa", 2)])
def test_what_a_layer_hands_to_the_cache_is_what_the_formula_says(name, factor):
    model, _ = toy(name)
    kept = weigh(name, model, IDS)
    assert kept.sum() == 4 * cost.cla_values(model.shape, factor=factor)
    assert (kept > 0).tolist() == [layer % factor == 0 for layer in range(model.shape.layers)]


def test_latents_and_windows_are_weighed_too():
    latent, _ = toy("mla32")
    assert (weigh("mla32", latent, IDS) == 4 * (32 + 16)).all()
    assert (weigh("yoco", toy("yoco")[0], IDS) > 0).tolist() == [False, False, True, False]
    whole = toy("gqa2")[0]
    assert weigh("wide", repeat(whole), IDS).sum() == 4 * weigh("gqa2", whole, IDS).sum()


def test_neighbours_share_a_key_head_and_the_strip_shrinks_with_the_wires():
    recording = heads()
    counts = [int(row) for _, row in recording.track(GROUPS).rows()]
    wires = [row for _, row in recording.track(WIRES).rows()]
    kept = [int(row.sum()) for _, row in recording.track(BYTES, design="now").rows()]
    assert counts == [8, 4, 2, 1]
    assert [w.tolist() for w in wires[1:3]] == [[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert [k * 8 for k in kept] == [kept[0] * n for n in counts]


def test_patterns_are_shares_and_a_head_overlaps_with_itself_alone_in_full():
    recording = heads()
    for _, pattern in recording.track(PATTERN, layer=1).rows():
        assert np.allclose(pattern.sum(-1), 1, atol=1e-5)
    for _, overlap in recording.track(OVERLAP, layer=1).rows():
        assert np.allclose(np.diag(overlap), 1, atol=1e-5)
        assert np.allclose(overlap, overlap.T, atol=1e-6)
        assert overlap[~np.eye(len(overlap), dtype=bool)].max() < 0.999


def test_a_share_is_opened_in_the_model_that_stands_on_the_stage():
    recording = heads()
    for step in range(4):
        cell = look_cell(recording, HEADS.knobs(), {"query": 9, "key": 4, "head": 6, "step": step})
        pattern = recording.track(PATTERN, layer=1).latest(step)
        assert cell.values["share"] == pytest.approx(float(pattern[6, 9, 4]), abs=1e-4)
        assert ("serves this head" in cell.note) == (len(recording.track(OFFERED, layer=1).latest(step)) < 8)


def test_merging_hurts_and_training_mends():
    facts = HEADS.facts(heads())
    assert facts["ppl_merged"] > 10 * facts["ppl_before"]
    assert facts["ppl_before"] < facts["ppl_after"] < facts["ppl_merged"] / 5
    assert facts["recall_merged"] < 0.2 < facts["recall_before"]
    cell = lost_cell(heads(), HEADS.knobs(), {"matrix": 0, "layer": 1, "head": 5})
    assert cell.lines[0] == ("W′1", "0.25 · W4 + 0.25 · W5 + 0.25 · W6 + 0.25 · W7")


@pytest.mark.slow
def test_the_default_training_wins_four_fifths_back():
    assert HEADS.facts(ran("heads"))["won_back"] >= 0.8


def test_only_owners_keep_and_the_others_read_downwards():
    recording = layers()
    kept, reads, kinds = (recording.track(BYTES, design="now"), recording.track(READS), recording.track(KIND))
    for first, owners in ((0, [0, 1, 2, 3]), (4, [0, 0, 2, 2]), (8, [-1, -1, 2, 2])):
        assert reads.latest(first + 3).tolist() == owners
        assert (kept.latest(first) > 0).tolist() == [own == i for i, own in enumerate(owners)]
        assert (kinds.latest(first) == 0).tolist() == [own == i for i, own in enumerate(owners)]
        for layer in range(4):
            assert recording.track(LIT).latest(first + layer).argmax() == layer
            assert (reads.latest(first + layer)[layer + 1 :] == -1).all()


def test_leaving_early_computes_half_and_says_the_same():
    recording = layers()
    done, facts = recording.track(DONE).latest(), LAYERS.facts(recording)
    assert (done[0] == 1).all()
    assert (done[1, :2] == 1).all()
    assert (done[1, 2, :-1] == 0.5).all()
    assert (done[1, 3, :-1] == 0).all()
    assert (done[1, 2:, -1] == 1).all()
    assert facts["apart"] < 1e-4
    assert 1.5 < facts["less"] < 2.5
    cell = done_cell(recording, LAYERS.knobs(), {"way": 1, "layer": 2, "token": 3})
    assert cell.lines[0][1] == "keys and values alone"
    assert cell.values["rows"] == 2 * 24 + 2


def test_cutting_caches_out_of_a_trained_model_is_not_cla():
    facts = LAYERS.facts(layers())
    assert facts["ppl_cut"] > 3 * facts["ppl_base"]
    assert facts["recall_cut"] < 0.2 < 0.8 < facts["recall_base"]
    assert facts["small"] == 16


def test_a_toy_without_weights_shows_its_cache_and_no_judgement(monkeypatch):
    there = checkpoints.available
    monkeypatch.setattr(checkpoints, "available", lambda name: (name != "yoco" and there(name)[0], "gone"))
    recording = execute("layers-share", {"prompt": 16})
    assert "YOCO" in recording.meta["missing"]
    assert np.isnan(LAYERS.facts(recording)["ppl_yoco"])
    assert recording.track(BYTES, design="yoco").latest().sum() == 768


def text_of(view):
    return f"{INSIDE}.querySelector('[data-view={view}]').textContent"


@pytest.mark.browser
def test_wires_run_together_and_the_strip_shrinks_on_the_page(server, chromium_page):
    open_done(chromium_page, address(server, "heads"))
    chromium_page.until(f"{text_of('wires')}.includes('8 key heads') && {text_of('strip')}.includes('3,072')")
    for heads_left, kept in (("4 key heads", "1,536"), ("2 key heads", "768"), ("1 key head", "384")):
        chromium_page.page.keyboard.press(".")
        chromium_page.until(f"{text_of('wires')}.includes('{heads_left}') && {text_of('strip')}.includes('{kept}')")
    parts = f"[...{INSIDE}.querySelectorAll('[data-view=strip] .footprint-part')].map((p) => p.offsetWidth)"
    ground = f"{INSIDE}.querySelector('[data-view=strip] .footprint-ground').offsetWidth"
    chromium_page.until(f"Math.abs({parts}.reduce((a, b) => a + b + 3, 0) - {ground} / 8) < 4")


@pytest.mark.browser
def test_layers_that_only_ask_point_down_and_the_calculator_answers_at_its_field(server, chromium_page):
    open_done(chromium_page, address(server, "layers-share", beat=2, step=11, prompt=24))
    chromium_page.until("leanscope.step === 11")
    stack = f"{INSIDE}.querySelector('[data-view=stack] svg').getAttribute('aria-label')"
    chromium_page.until(f"{stack}.includes('layer 3, only asks, reads the cache of layer 2, stores 0')")
    open_done(chromium_page, address(server, "layers-share", beat=8, prompt=24))
    chromium_page.until(f"{text_of('calculator')}.includes('524.3 kB')")
    field = chromium_page.page.locator("#calculator-kv_heads")
    field.fill("8")
    chromium_page.until(f"{text_of('calculator')}.includes('131.1 kB')")
    field.fill("5")
    error = f"{INSIDE}.querySelector('#calculator-kv_heads-error').textContent"
    chromium_page.until(f"{error}.startsWith('Key heads must divide the 32 query heads')")
