"""From a safetensors file to a model: memory-mapped, checked by name and shape, frozen.

No pickle is ever read here or elsewhere: safetensors holds numbers and nothing that could run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)

Progress = Callable[[str, int, int], None]
"""Called with a stage ("waiting", "download" or "convert"), how much is done, and of how much."""


class ModelUnavailable(RuntimeError):  # noqa: N818  it reads as what it says: except ModelUnavailable
    """A model that cannot be had; the message is one plain sentence saying why and what to do."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped rather than read: pages come in when first touched.

    The map is private, so writing to a tensor never reaches the file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelUnavailable(f"{path} is missing, cut short or no safetensors file ({error}).") from error


class _Unfilled(TorchFunctionMode):
    """Leaves out `nn.init`: on the meta device it fills nothing, and its import of torch's compiler takes 1.3 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def unfilled(make: Callable[[], Model]) -> Model:
    """The model that `make` builds, on the meta device: names and shapes without memory or time."""
    with torch.device("meta"), _Unfilled():
        return make()


def settle(model: Model, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None, device: torch.device) -> Model:
    """Give `model` the `tensors` (converted to `dtype`, if one is given), ready to run and frozen.

    The model may be on the meta device: its own parameters are dropped, not filled. Raises ModelUnavailable
    when names or shapes are not exactly the model's.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != wanted.get(name):
            raise ModelUnavailable(
                f"the weights do not fit the model: {name} should be {wanted.get(name) or 'absent'}, "
                f"and is {found or 'absent'}."
            )
    model.load_state_dict({name: value.to(device, dtype) for name, value in tensors.items()}, assign=True)
    return model.to(device).eval().requires_grad_(False)


def sha256(path: Path) -> str:
    """The file's hash, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
