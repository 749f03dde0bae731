"""Every model by name: the zoo of trained toys, SmolLM2, and local folders of the Llama family.

    model, tokenizer = load("smollm2", dtype=torch.bfloat16)

A loaded model is shared by all who ask for the same name, dtype and device in this process: it is frozen, in
eval mode, and must not be written to; who wants to change weights copies it (`copy.deepcopy`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, Protocol

import torch

from engine import hardware, smollm2
from engine.folders import load_folder
from engine.model import Decoder
from engine.smollm2 import fetch_smollm2
from engine.weights import ModelUnavailable, read_tensors, settle, sha256

__all__ = ["Entry", "ModelUnavailable", "TextTokens", "available", "catalogue", "fetch_smollm2", "load", "verify"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # that a page may ask for by name
ZOO = Path(__file__).parent.parent / "assets" / "models"

_loaded: dict[tuple[str, torch.dtype | None, torch.device], tuple[Decoder, TextTokens]] = {}
_loading = RLock()


class TextTokens(Protocol):
    """What every tokenizer here offers: Toyland's words and byte-level BPE alike."""

    size: int
    bos: int | None
    eos: int | None
    newline: int | None

    def encode(self, text: str) -> list[int]: ...
    def prompt(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def pieces(self, ids: Sequence[int]) -> list[str]: ...


@dataclass(frozen=True)
class Entry:
    """One line of the list of models. `kind` is "toy" or "real"; `reason` says why it is not there."""

    name: str
    kind: str
    available: bool
    reason: str
    facts: dict[str, Any]


def load(
    name: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Decoder, TextTokens]:
    """The model called `name` and its tokenizer, ready to run.

    `name` is "smollm2", a toy of the zoo, or the path of a folder in the Hugging Face layout; only names of
    `catalogue()` may come from a browser. Without a dtype toys run in float32, and other weights as they are
    stored. Raises ModelUnavailable with one plain sentence.
    """
    where = torch.device(device) if device is not None else hardware.device()
    toys = manifest()
    if name != "smollm2" and name not in toys:
        path = Path(name).expanduser()
        if not path.is_dir():
            raise ModelUnavailable(
                f"there is no model {str(name)!r}: take smollm2, a toy ({', '.join(toys) or 'none yet'}) or a folder."
            )
        name = str(path.resolve())
    key = (str(name), dtype, where)
    # Weights made in inference mode could not be copied into training later, and the instance is for all.
    with _loading, torch.inference_mode(False):
        if key not in _loaded:
            if name == "smollm2":
                _loaded[key] = smollm2.load_smollm2(dtype=dtype, device=where)
            elif name in toys:
                _loaded[key] = _load_toy(str(name), toys[str(name)], dtype=dtype, device=where)
            else:
                _loaded[key] = load_folder(Path(name), dtype=dtype, device=where)
        return _loaded[key]


def available(name: str) -> tuple[bool, str]:
    """Whether `load(name)` can be expected to work, and if not why; looks at sizes, reads no weights."""
    if name == "smollm2":
        return smollm2.available()
    try:
        entry = manifest().get(name)
        if entry is None:
            return False, f"there is no model {name!r}."
        _toy_file(name, entry)
    except ModelUnavailable as error:
        return False, str(error)
    return True, ""


def verify(name: str) -> None:
    """Hash the model's files again. Raises ModelUnavailable when one is missing or altered."""
    if name == "smollm2":
        smollm2.verify()
        return
    toys = manifest()
    if name not in toys:
        raise ModelUnavailable(f"there is no model {name!r}.")
    path = _toy_file(name, toys[name])
    if sha256(path) != toys[name]["sha256"]:
        raise ModelUnavailable(f"{path} was altered since it was trained: run `leanscope train {name}`.")


def catalogue() -> list[Entry]:
    """Every model that has a name, SmolLM2 first."""
    facts = {"title": "SmolLM2-135M-Instruct", "licence": "Apache-2.0", "source": smollm2.WHEEL}
    real = Entry("smollm2", "real", *available("smollm2"), facts)
    return [real, *(Entry(name, "toy", *available(name), entry) for name, entry in manifest().items())]


def manifest() -> dict[str, dict[str, Any]]:
    """The zoo's manifest: name → recipe, shape, seed, steps, loss, sha256, bytes and more. Empty without a zoo."""
    path = ZOO / "manifest.json"
    try:
        toys = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(toys, dict) or not all(isinstance(entry, dict) for entry in toys.values()):
            raise ValueError("it should map names to objects")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} cannot be read ({error}): the zoo has no list.") from error
    return toys


def _toy_file(name: str, entry: dict[str, Any]) -> Path:
    path = ZOO / f"{name}.safetensors"
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ModelUnavailable(f"{path} is missing: run `leanscope train {name}`.") from error
    if size != entry["bytes"]:
        raise ModelUnavailable(
            f"{path} has {size:,} bytes where {entry['bytes']:,} were expected: run `leanscope train {name}`."
        )
    return path


def _load_toy(
    name: str, entry: dict[str, Any], *, dtype: torch.dtype | None, device: torch.device
) -> tuple[Decoder, TextTokens]:
    verify(name)  # a toy is small: hashing it takes milliseconds
    model, tokenizer = _toy_parts(entry["recipe"])
    # Shipped in half precision for its size, which is no precision to compute in on a CPU.
    weights = read_tensors(_toy_file(name, entry))
    return settle(model, weights, dtype=dtype or torch.float32, device=device), tokenizer


def _toy_parts(recipe: str) -> tuple[Decoder, TextTokens]:
    """The untrained model of a recipe and Toyland's tokenizer."""
    from engine import toyland, train  # training may load a teacher through this module

    try:
        return train.build(recipe), toyland.Tokenizer()
    except ValueError as error:
        raise ModelUnavailable(f"the zoo's manifest does not fit this version of Leanscope: {error}.") from error
