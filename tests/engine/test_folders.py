"""Oracle: transformers' LlamaForCausalLM on folders that it saved itself. Law: what cannot be honoured is refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

from engine.checkpoints import ModelUnavailable, load

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def save_tokenizer(folder: Path, *, bos: bool = False) -> None:
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(BYTES)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    inner.save(str(folder / "tokenizer.json"))


def make(folder: Path, *, shard: str = "1GB", dtype: torch.dtype = torch.float32, bos: bool = False, **changes):
    """A tiny random Llama, saved by transformers."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 256,
        "eos_token_id": [257, 256], "initializer_range": 0.5, "tie_word_embeddings": False, **changes,
    }  # fmt: skip
    reference = LlamaForCausalLM(LlamaConfig(**config)).eval().to(dtype)
    for name, weight in reference.named_parameters():
        if "norm" in name:  # ones would hide a norm that is left out or mixed up
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    reference.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder, bos=bos)
    return reference


def change(path: Path, **facts) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"head_dim": 16},
        {"rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"shard": "8KB"},
        {"shard": "8KB", "tie_word_embeddings": True},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()) or "plain",
)
def test_logits_are_those_of_transformers(tmp_path, changes):
    reference = make(tmp_path, **changes)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("shard" in changes)
    model, _ = load(tmp_path, device="cpu", dtype=torch.float64)
    ids = torch.randint(0, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, theirs = model(ids), reference.double()(ids).logits
    # transformers keeps its norms and its RoPE tables in float32, whatever the weights are.
    assert (ours - theirs).abs().max() < 2e-4
    assert theirs.abs().max() > 1


def test_old_configs_keep_rope_theta_beside_the_rest(tmp_path):
    make(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("rope_parameters")["rope_theta"] == 500.0
    path.write_text(json.dumps({**config, "rope_theta": 500.0, "rope_scaling": None}))
    assert load(tmp_path)[0].shape.rope_base == 500.0


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"attention_bias": True}, "attention has biases"),
        ({"mlp_bias": True}, "feed-forward has biases"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}}, "RoPE is scaled (llama3)"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE is scaled (linear)"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "only a part of each head"),
        ({"sliding_window": 4096}, "within a window of 4096"),
        ({"hidden_act": "gelu"}, "activation is 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights are quantised"),
        ({"hidden_size": 0}, "no complete Llama config"),
        ({"num_hidden_layers": "two"}, "no complete Llama config"),
        ({"num_key_value_heads": 3}, "kv_heads must divide"),
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "holds model.layers.1"),
        ({"intermediate_size": 64}, "should be"),
        ({"vocab_size": 100}, "tokenizer has 258 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_honoured_is_refused_in_one_sentence(tmp_path, facts, said):
    make(tmp_path)
    change(tmp_path / "config.json", **facts)
    with pytest.raises(ModelUnavailable) as caught:
        load(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    make(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelUnavailable, match="only safetensors are read, never a pickle"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelUnavailable, match="no safetensors file"):
        load(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "model.bin", "a/../b.safetensors"])
def test_an_index_may_not_name_files_elsewhere(tmp_path, shard):
    make(tmp_path, shard="8KB")
    change(tmp_path / "model.safetensors.index.json", weight_map={"model.embed_tokens.weight": shard})
    with pytest.raises(ModelUnavailable, match="names files outside its folder"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "binary"])
def test_damaged_files_give_one_sentence(tmp_path, name, damage):
    make(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "binary": bytes(range(256)) * 9}[damage])
    with pytest.raises(ModelUnavailable) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quantised_integers_are_refused(tmp_path):
    make(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelUnavailable, match=r"holds model\.norm\.weight as torch\.int8"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("stored", "given", "found"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_the_dtype_is_the_stored_one_unless_told_otherwise(tmp_path, stored, given, found):
    make(tmp_path, dtype=stored)
    model, _ = load(tmp_path, dtype=given, device="cpu")
    assert {p.dtype for p in model.parameters()} == {found}


def test_the_tokenizer_knows_its_ends_and_what_the_model_expects(tmp_path):
    make(tmp_path, bos=True)
    _, tokenizer = load(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.size) == (256, 257, 258)
    assert tokenizer.decode([tokenizer.newline]) == "\n"
    assert tokenizer.encode("ab") == [BYTES.index("a"), BYTES.index("b")]
    assert tokenizer.prompt("ab") == [256, *tokenizer.encode("ab")]
