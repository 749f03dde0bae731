"""A local folder in the Hugging Face layout of the Llama family: config.json, safetensors, tokenizer.json.

What this decoder cannot honour (biases, scaled RoPE, sliding windows, quantised weights) is refused by name
rather than ignored: a model that is nearly right would show wrong numbers. No pickle is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.model import Decoder, Shape
from engine.tokenizer import Tokenizer
from engine.weights import ModelUnavailable, read_tensors, settle, unfilled

# transformers' MistralForCausalLM without a window is its LlamaForCausalLM, down to the names.
FAMILY = ("llama", "mistral")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_folder(folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> tuple[Decoder, Tokenizer]:
    """The model and tokenizer of a folder, in the stored dtype unless told otherwise.

    float16 becomes float32 on a CPU, which has no fast kernels for it. Raises ModelUnavailable.
    """
    config = _read_json(folder / "config.json")
    shape = shape_of(config, folder)
    bos, eos = (_first(config.get(name)) for name in ("bos_token_id", "eos_token_id"))
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", bos=bos, eos=eos)
    if tokenizer.size > shape.vocab:
        raise ModelUnavailable(
            f"{folder} does not fit together: its tokenizer has {tokenizer.size} tokens, its model {shape.vocab}."
        )
    stored = _read_shards(folder)
    kind = stored["model.embed_tokens.weight"].dtype if "model.embed_tokens.weight" in stored else torch.float32
    if dtype is None:
        dtype = torch.float32 if kind == torch.float16 and device.type == "cpu" else kind
    empty = unfilled(lambda: Decoder(shape))
    return settle(empty, engine_weights(stored, shape, folder), dtype=dtype, device=device), tokenizer


def shape_of(config: dict[str, Any], folder: Path) -> Shape:
    """The Shape that a Llama config.json describes. Raises ModelUnavailable for what cannot be honoured."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = config.get("model_type")
    rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else repr(rope)
    refusals = {
        f"its model_type is {kind!r}": kind not in FAMILY,
        "its attention has biases": config.get("attention_bias"),
        "its feed-forward has biases": config.get("mlp_bias"),
        f"its RoPE is scaled ({rope_type})": rope_type != "default",
        "it rotates only a part of each head": float(_number(rope, config, "partial_rotary_factor", 1.0)) != 1.0,
        f"it attends within a window of {config.get('sliding_window')}": config.get("sliding_window") is not None,
        f"its activation is {config.get('hidden_act')!r}": config.get("hidden_act", "silu") not in ("silu", "swish"),
        "its weights are quantised": config.get("quantization_config"),
    }
    for reason, applies in refusals.items():
        if applies:
            raise ModelUnavailable(f"{folder} cannot be run: {reason}, and this decoder is a plain Llama.")
    try:
        heads = config["num_attention_heads"]
        return Shape(
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or config["hidden_size"] // heads,
            ffn_width=config["intermediate_size"],
            rope_base=float(_number(rope, config, "rope_theta", 10000.0)),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied=bool(config.get("tie_word_embeddings", False)),
            max_positions=config.get("max_position_embeddings", 2048),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelUnavailable(f"{folder / 'config.json'} is no complete Llama config: {error}.") from error


def engine_weights(stored: dict[str, Tensor], shape: Shape, folder: Path) -> dict[str, Tensor]:
    """The stored tensors under this engine's names, q, k, v joined and gate, up joined; each must be used."""
    # Old checkpoints keep RoPE's frequencies, and tied ones may keep the head twice: both are known already.
    left = {name for name in stored if not name.endswith(".rotary_emb.inv_freq")}
    left -= {"lm_head.weight"} if shape.tied else set()

    def take(name: str) -> Tensor:
        if name not in stored:
            raise ModelUnavailable(f"{folder} has no tensor {name}: is the folder whole?")
        if stored[name].dtype not in FLOATS:
            raise ModelUnavailable(f"{folder} holds {name} as {stored[name].dtype}: its weights are quantised.")
        left.discard(name)
        return stored[name]

    weights = {"embed.weight": take("model.embed_tokens.weight"), "norm.weight": take("model.norm.weight")}
    if not shape.tied:
        weights["head.weight"] = take("lm_head.weight")
    for i in range(shape.layers):
        old, new = f"model.layers.{i}", f"blocks.{i}"
        weights[f"{new}.norm1.weight"] = take(f"{old}.input_layernorm.weight")
        weights[f"{new}.mixer.qkv.weight"] = torch.cat([take(f"{old}.self_attn.{x}_proj.weight") for x in "qkv"])
        weights[f"{new}.mixer.out.weight"] = take(f"{old}.self_attn.o_proj.weight")
        weights[f"{new}.norm2.weight"] = take(f"{old}.post_attention_layernorm.weight")
        gate_up = [take(f"{old}.mlp.{x}_proj.weight") for x in ("gate", "up")]
        weights[f"{new}.ffn.gate_up.weight"] = torch.cat(gate_up)
        weights[f"{new}.ffn.down.weight"] = take(f"{old}.mlp.down_proj.weight")
    if left:
        raise ModelUnavailable(f"{folder} holds {min(left)}, for which a plain Llama has no place.")
    return weights


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise ModelUnavailable(f"{folder} has no model.safetensors: only safetensors are read, never a pickle.")
        return read_tensors(folder / "model.safetensors")
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelUnavailable(f"{index} has no weight_map from tensors to files.")
    shards = sorted(set(names.values()))
    # An index is data: it may name files beside it and nothing else.
    if any(Path(shard).name != shard or not shard.endswith(".safetensors") for shard in shards):
        raise ModelUnavailable(f"{index} names files outside its folder, or no safetensors.")
    return {name: tensor for shard in shards for name, tensor in read_tensors(folder / shard).items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} is missing or no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{path} should hold a JSON object.")
    return content


def _number(rope: Any, config: dict[str, Any], name: str, default: float) -> Any:
    """transformers 5 keeps RoPE's numbers in `rope_parameters`, older ones beside the rest."""
    value = rope.get(name) if isinstance(rope, dict) else None
    return value if value is not None else config.get(name, default)


def _first(ids: Any) -> int | None:
    """Some configs list several end tokens."""
    return ids[0] if isinstance(ids, list) and ids else ids if isinstance(ids, int) else None
