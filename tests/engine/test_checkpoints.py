"""Laws of loading: one frozen instance for all who ask alike, mapped from a file that it can never change, and one
sentence for whatever is not there. Folders and SmolLM2 have tests of their own."""

import json
import threading
import time
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import checkpoints
from engine.checkpoints import ModelUnavailable, load
from engine.model import Decoder, Shape
from engine.weights import sha256, unfilled

SHAPE = Shape(vocab=20, width=16, layers=2, heads=2, kv_heads=1, head_width=8, ffn_width=24)


def entry(path, **changes):
    return {"recipe": "tiny", "shape": asdict(SHAPE), "sha256": sha256(path), "bytes": path.stat().st_size, **changes}


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A zoo of one toy, "tiny", and nothing loaded yet."""
    monkeypatch.setattr(checkpoints, "ZOO", tmp_path)
    monkeypatch.setattr(checkpoints, "_loaded", {})
    monkeypatch.setenv("LEANSCOPE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.safetensors"
    save_file(Decoder(SHAPE, seed=5).state_dict(), path)
    (tmp_path / "manifest.json").write_text(json.dumps({"tiny": entry(path)}))
    monkeypatch.setattr(checkpoints, "_toy_parts", lambda recipe: (Decoder(SHAPE), f"tokenizer of {recipe}"))
    return tmp_path


def refused(work, said: str) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        work()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_toy_comes_back_as_it_was_trained(zoo):
    model, tokenizer = load("tiny", device="cpu")
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids), Decoder(SHAPE, seed=5)(ids))
    assert tokenizer == "tokenizer of tiny"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_toys_shipped_in_half_precision_run_in_float32(zoo):
    path = zoo / "tiny.safetensors"
    save_file({name: value.half() for name, value in Decoder(SHAPE, seed=5).state_dict().items()}, path)
    (zoo / "manifest.json").write_text(json.dumps({"tiny": entry(path)}))
    model, _ = load("tiny", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.embed.weight, Decoder(SHAPE, seed=5).embed.weight.half().float())


def test_the_parts_of_a_toy_come_from_its_recipe():
    model, tokenizer = checkpoints._toy_parts("toy")
    assert model.shape.vocab == tokenizer.size
    refused(lambda: checkpoints._toy_parts("unheard of"), "does not fit this version")


def test_the_same_question_gets_the_same_instance(zoo):
    model, _ = load("tiny", device="cpu")
    assert load("tiny", device="cpu")[0] is model
    assert load("tiny", device=torch.device("cpu"))[0] is model
    half, _ = load("tiny", dtype=torch.bfloat16, device="cpu")
    assert half is not model
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_threads_that_ask_at_once_share_one_instance(zoo, monkeypatch):
    together = threading.Barrier(4)
    made = []
    parts = checkpoints._toy_parts
    found = []

    def slowly(recipe):
        made.append(recipe)
        time.sleep(0.05)  # so that whoever does not wait its turn is seen
        return parts(recipe)

    monkeypatch.setattr(checkpoints, "_toy_parts", slowly)

    def ask():
        together.wait()
        found.append(load("tiny", device="cpu")[0])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(model) for model in found}) == 1
    assert made == ["tiny"]


def test_weights_are_mapped_and_writing_to_them_never_reaches_the_file(zoo):
    path = zoo / "tiny.safetensors"
    before = path.read_bytes()
    model, _ = load("tiny", device="cpu")
    model.embed.weight.fill_(7.0)
    assert path.read_bytes() == before
    assert not torch.equal(load_file(path)["embed.weight"], model.embed.weight)


def test_weights_loaded_in_inference_mode_can_still_be_copied_into_training(zoo):
    with torch.inference_mode():
        model, _ = load("tiny", device="cpu")
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_a_model_without_weights_is_made_without_filling_any():
    empty = unfilled(lambda: Decoder(SHAPE))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert torch.nn.Linear(3, 3).weight.abs().sum() > 0  # outside, layers fill as ever


def test_a_damaged_toy_is_told(zoo):
    path = zoo / "tiny.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    refused(lambda: load("tiny"), "were expected: run `leanscope train tiny`.")
    assert checkpoints.available("tiny")[0] is False
    path.write_bytes(content[:-4] + b"\x00\x00\x80\x40")
    refused(lambda: load("tiny"), "was altered since it was trained")
    refused(lambda: checkpoints.verify("tiny"), "was altered since it was trained")
    path.unlink()
    refused(lambda: load("tiny"), "is missing: run `leanscope train tiny`.")
    path.write_bytes(content)
    checkpoints.verify("tiny")
    assert checkpoints.available("tiny") == (True, "")


@pytest.mark.parametrize("change", ["less", "more", "wider"])
def test_weights_that_do_not_fit_are_told(zoo, change):
    path = zoo / "tiny.safetensors"
    weights = load_file(path)
    if change == "less":
        del weights["norm.weight"]
    elif change == "more":
        weights["head.weight"] = torch.zeros(20, 16)
    else:
        weights["norm.weight"] = torch.ones(17)
    save_file(weights, path)
    (zoo / "manifest.json").write_text(json.dumps({"tiny": entry(path)}))
    said = {
        "less": "norm.weight should be (16,), and is absent",
        "more": "head.weight should be absent, and is (20, 16)",
        "wider": "norm.weight should be (16,), and is (17,)",
    }
    refused(lambda: load("tiny"), said[change])


@pytest.mark.parametrize("content", ["{", "[]", '{"tiny": 3}', "\x00"])
def test_a_damaged_manifest_is_told(zoo, content):
    (zoo / "manifest.json").write_text(content)
    refused(lambda: load("tiny"), "manifest.json cannot be read")
    assert checkpoints.available("tiny")[0] is False


def test_an_unknown_name_is_told_with_the_names_there_are(zoo):
    refused(lambda: load("nobody"), "there is no model 'nobody': take smollm2, a toy (tiny) or a folder.")
    refused(lambda: load("../tiny"), "there is no model '../tiny'")
    refused(lambda: load("x" * 5000 + "\n\x00"), "there is no model")
    refused(lambda: checkpoints.verify("nobody"), "there is no model 'nobody'")
    assert checkpoints.available("nobody") == (False, "there is no model 'nobody'.")
    (zoo / "manifest.json").unlink()
    refused(lambda: load("tiny"), "a toy (none yet)")


def test_the_catalogue_lists_what_has_a_name(zoo):
    real, tiny = checkpoints.catalogue()
    assert (real.name, real.kind, real.available) == ("smollm2", "real", False)
    assert "leanscope models fetch" in real.reason
    assert (tiny.name, tiny.kind, tiny.available, tiny.reason) == ("tiny", "toy", True, "")
    assert tiny.facts["shape"] == asdict(SHAPE)


def test_the_shipped_zoo_is_whole():
    for name in checkpoints.manifest():
        checkpoints.verify(name)
        model, tokenizer = load(name, device="cpu")
        assert tokenizer.decode(tokenizer.encode(tokenizer.decode([model.shape.vocab - 1])))


@pytest.mark.real
def test_smollm2_is_shared_and_mapped(smollm2):
    model, tokenizer = smollm2
    again, same = load("smollm2", device="cpu")
    assert again is model
    assert same is tokenizer
    assert checkpoints.available("smollm2") == (True, "")
    checkpoints.verify("smollm2")
