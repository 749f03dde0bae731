"""PyTorch's own fused attention beside the naive form: which kernel it takes here, and how long both need.

`torch.nn.functional.scaled_dot_product_attention` is FlashAttention (arXiv:2307.08691) where there is a kernel for the
device, dtype and sizes; on the CPU PyTorch has its own kernel of that kind. Times are of this machine and these sizes:
on a CPU the score matrix may stay in the caches, and the gain is then smaller than the paper's on a GPU, or none.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from engine.exact.flash import Flash, flash_attention
from engine.recording import record
from engine.timing import in_turns

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Times:
    """Median seconds of both, taken in turns; `kernel` is what the fused one ran."""

    naive: float
    fused: float
    kernel: str

    @property
    def speedup(self) -> float:
        return self.naive / self.fused


def naive_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """softmax(q kᵀ/√D) v with the whole matrix written down: S, the mask, P and P v are a kernel each."""
    scores = q @ k.mT / q.shape[-1] ** 0.5  # B H N N
    if causal:
        N = q.shape[-2]
        scores = scores.masked_fill(~torch.ones(N, N, dtype=torch.bool, device=q.device).tril(), -torch.inf)
    return scores.softmax(-1) @ v


class _Kernels(TorchDispatchMode):
    """Hears which operation PyTorch's attention turned into."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def kernel_that_ran(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> tuple[str, str]:
    """("flash", "efficient", "cudnn" or "math", the operation's name in PyTorch) for these very tensors."""
    # Inference mode hides from a dispatch mode what the attention is made of.
    with torch.inference_mode(False), torch.no_grad(), _Kernels() as heard:
        F.scaled_dot_product_attention(q.clone(), k.clone(), v.clone(), is_causal=causal)
    name = next((n for n in heard.names if n.startswith("_scaled_dot_product")), "")
    return next((kind for kind in BACKENDS if kind in name), "math"), name or "bmm, softmax, bmm"


def kernels_that_can(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> dict[str, bool]:
    """Which of PyTorch's kernels take these tensors on this device when told to. `math` always can."""
    can = {}
    for kind, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                can[kind] = kernel_that_ran(q, k, v, causal=causal)[0] == kind
        except RuntimeError:
            can[kind] = False
    return can


def enabled() -> dict[str, bool]:
    """What this process allows on CUDA, whether or not there is such a device (torch.backends.cuda)."""
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }


@torch.no_grad()
def fused_against_naive(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, rounds: int = 5) -> Times:
    """Median seconds of the naive form and of PyTorch's own attention on these tensors, on their device."""
    taken = in_turns(
        {
            "naive": lambda: naive_attention(q, k, v, causal=causal),
            "fused": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        },
        rounds=rounds,
        where=q.device,
    )
    kernel = kernel_that_ran(q, k, v, causal=causal)[0]
    return Times(statistics.median(taken["naive"]), statistics.median(taken["fused"]), kernel)


def layer_qkv(model: nn.Module, ids: Tensor | Sequence[int], *, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, H, N, D] that `layer` of a `Decoder` makes of a text, rotated, each key repeated for its group."""
    blocks = getattr(model, "blocks", ())
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer must be one of the model's {len(blocks)}, not {layer}")
    weight = next(model.parameters())
    text = torch.as_tensor(ids, device=weight.device).reshape(1, -1)
    names = ("attention.q", "attention.k", "attention.v")
    with torch.no_grad(), record(keep={name: {"layer": layer} for name in names}, budget=10**9) as recorder:
        model.through(model.embed(text), range(layer + 1), shared={})  # type: ignore[operator]  # and no further
    recording = recorder.freeze()
    if not all(recording.has(name, layer=layer) for name in names):
        raise ValueError(f"layer {layer} must be softmax attention, not {type(blocks[layer].mixer).__name__}")
    q, k, v = (torch.tensor(recording.stack(name, layer=layer), device=weight.device) for name in names)
    repeats = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)


def flash_on_layer(model: nn.Module, ids: Tensor | Sequence[int], *, layer: int, **how: Any) -> Flash:
    """`flash_attention` on the real q, k, v of a layer; `how` is what it takes (Br, Bc, head, row, ...)."""
    return flash_attention(*layer_qkv(model, ids, layer=layer), **how)
