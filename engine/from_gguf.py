"""From a GGUF file of the Llama architecture to this engine's weights and tokenizer.

GGUF (github.com/ggml-org/ggml, docs/gguf.md) keeps quantised tensors, the tokenizer and the shape in one file.
Its converter reorders the query and key rows for RoPE on neighbouring pairs; `straight_rows` undoes that.
"""

from __future__ import annotations

import errno
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from engine.model import Shape
from engine.weights import ModelUnavailable, Progress

CONTROL = 3  # GGUF's type of a token that is no text


def convert(gguf: Path, into: Path, *, tell: Progress) -> dict[str, Any]:
    """Write `model.safetensors` and `tokenizer.json` from a GGUF of the Llama architecture; returns the shape
    and the special tokens as plain values."""
    reader = GGUFReader(gguf)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts.get("general.architecture") != "llama":
        raise ModelUnavailable(f"{gguf} holds a {facts.get('general.architecture')} model, and a llama was expected.")
    heads = facts["llama.attention.head_count"]
    shape = Shape(
        vocab=facts["llama.vocab_size"],
        width=facts["llama.embedding_length"],
        layers=facts["llama.block_count"],
        heads=heads,
        kv_heads=facts["llama.attention.head_count_kv"],
        head_width=facts["llama.embedding_length"] // heads,
        ffn_width=facts["llama.feed_forward_length"],
        rope_base=float(facts["llama.rope.freq_base"]),
        norm_eps=round(float(facts["llama.attention.layer_norm_rms_epsilon"]), 9),
        tied=not any(tensor.name == "output.weight" for tensor in reader.tensors),
        max_positions=facts["llama.context_length"],
    )
    weights = into / "model.safetensors"
    try:
        save_file(_engine_weights(reader, shape, tell), weights)
    except SafetensorError as error:  # the library keeps the system's error number in its words alone
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
    weights.chmod(0o644)  # safetensors makes it private, and a cache may be shared
    _byte_level_bpe(facts).save(str(into / "tokenizer.json"))
    return {
        "shape": asdict(shape),
        "bos": facts["tokenizer.ggml.bos_token_id"],
        "eos": facts["tokenizer.ggml.eos_token_id"],
    }


def straight_rows(weight: Tensor, *, heads: int) -> Tensor:
    """Undo GGUF's order of query or key rows: pairs (2i, 2i+1) for interleaved RoPE become (i, i + half)."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _engine_weights(reader: GGUFReader, shape: Shape, tell: Progress) -> dict[str, Tensor]:
    """Every tensor dequantised to float32, under this engine's names."""
    raw: dict[str, Tensor] = {}
    for done, tensor in enumerate(reader.tensors):
        tell("convert", done, len(reader.tensors))
        raw[tensor.name] = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
    weights = {"embed.weight": raw["token_embd.weight"], "norm.weight": raw["output_norm.weight"]}
    if not shape.tied:
        weights["head.weight"] = raw["output.weight"]
    for i in range(shape.layers):
        old, new = f"blk.{i}", f"blocks.{i}"
        q = straight_rows(raw[f"{old}.attn_q.weight"], heads=shape.heads)
        k = straight_rows(raw[f"{old}.attn_k.weight"], heads=shape.kv_heads)
        weights[f"{new}.norm1.weight"] = raw[f"{old}.attn_norm.weight"]
        weights[f"{new}.mixer.qkv.weight"] = torch.cat([q, k, raw[f"{old}.attn_v.weight"]])
        weights[f"{new}.mixer.out.weight"] = raw[f"{old}.attn_output.weight"]
        weights[f"{new}.norm2.weight"] = raw[f"{old}.ffn_norm.weight"]
        weights[f"{new}.ffn.gate_up.weight"] = torch.cat([raw[f"{old}.ffn_gate.weight"], raw[f"{old}.ffn_up.weight"]])
        weights[f"{new}.ffn.down.weight"] = raw[f"{old}.ffn_down.weight"]
    tell("convert", len(reader.tensors), len(reader.tensors))
    return weights


def _byte_level_bpe(facts: dict[str, Any]) -> Tokenizer:
    """The tokenizer of the metadata: byte-level BPE whose pre-tokenizer ("smollm") splits digits singly."""
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    if (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ModelUnavailable(f"the tokenizer is {facts['tokenizer.ggml.pre']!r}, and 'smollm' was expected.")
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == CONTROL]
    )
    return inner
