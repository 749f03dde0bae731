r"""LoRA: leave W as it is, and learn a product of two thin matrices beside it.

Hu et al. (arXiv:2106.09685), section 4.1, equation 3: h = W₀x + ΔWx = W₀x + BAx, ΔW scaled by α/r.
Paper -> here: W₀ = what `base()` gives; A = `A[part]`, Gaussian at the start; B = `B[part]`, zero at the start;
r = rank; α = alpha. W_q and W_v, the paper's choice, are rows of the fused `qkv`: each such part has its own A and B.

    base     W₀ x                                       [.., in] -> [.., out]
    beside   (α/r) B (A x), added to the part's rows    [.., in] -> [.., r] -> [.., rows of the part]
    merged   W₀ + (α/r) B A in one matrix: the same function, and nothing beside it any more

Errors: ValueError for a rank that is not from 1 to the part's smaller side, an alpha that is not above 0, a target
that the model does not have.
Deviations: no dropout on x; the Gaussian is 1/√in wide, so that A x is as large as x is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model import Decoder
from engine.peft import branch, put
from engine.recording import recording_on, site, tap

A = site("lora.a", "the thin matrix that reads the input", symbol="A")
B = site("lora.b", "the thin matrix that writes to the output, zero at the start", symbol="B")

Rows = Mapping[str, tuple[int, int]]  # part -> its first row and the one after its last
SPLIT = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


class Whole(nn.Module):
    """A frozen weight as it is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self) -> Tensor:
        return self.weight


Store = Callable[[Tensor], nn.Module]
"""How the frozen weight is kept: called without arguments, the module gives it, [out, in]."""


class LoRALinear(nn.Module):
    """A linear layer with a frozen weight, and a product B A beside each of its parts."""

    def __init__(
        self,
        linear: nn.Linear,
        rows: Rows,
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        store: Store = Whole,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.base = store(linear.weight.detach())
        self.bias = linear.bias
        for part, (start, stop) in rows.items():
            check_rank(rank, stop - start, self.in_features, part)
        self.rows, self.scale = dict(rows), alpha / rank
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for part, (start, stop) in self.rows.items():
            a = torch.randn(rank, self.in_features, generator=generator) / self.in_features**0.5  # r in
            self.A[part] = nn.Parameter(a.to(linear.weight))
            self.B[part] = nn.Parameter(linear.weight.new_zeros(stop - start, rank))  # rows r

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.base(), self.bias)
        for part, (start, stop) in self.rows.items():
            beside = self.scale * F.linear(F.linear(x, self.A[part]), self.B[part])  # .. rows
            y = y + F.pad(beside, (start, self.out_features - stop))
        return y

    def delta(self) -> Tensor:
        """ΔW = (α/r) B A, every part in its rows: [out, in]."""
        whole = self.base().new_zeros(self.out_features, self.in_features)
        for part, (start, stop) in self.rows.items():
            whole[start:stop] += self.scale * (self.B[part].detach() @ self.A[part].detach())
        return whole

    def effective_weight(self) -> Tensor:
        """W₀ + ΔW."""
        return self.base() + self.delta()

    def bare(self) -> nn.Linear:
        """The layer without its product: a plain one on the frozen weight."""
        return linear_of(self.base(), self.bias)


@torch.no_grad()
def attach(
    model: Decoder,
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] = ("q", "v"),
    seed: int = 0,
    store: Store = Whole,
) -> Decoder:
    """A copy of `model` with a product beside each target in every block; alpha is the rank unless told.

    Targets are names of linear layers (qkv, out, gate_up, up, down), or q, k, v, gate and up for rows of a fused one.
    """
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be a number above 0, not {alpha}")
    generator = torch.Generator().manual_seed(seed)
    twin = branch(model)
    for name, rows in places(twin, targets).items():
        linear = cast(nn.Linear, twin.get_submodule(name))
        put(
            twin,
            name,
            LoRALinear(
                linear, rows, rank=rank, alpha=rank if alpha is None else alpha, generator=generator, store=store
            ),
        )
    return twin


@torch.no_grad()
def merge(model: Decoder) -> Decoder:
    """A copy in which every product is added into its weight, and the layers are plain ones again."""
    twin = branch(model)
    for name, layer in layers(twin).items():
        put(twin, name, linear_of(layer.effective_weight(), layer.bias))
    return twin


@torch.no_grad()
def unmerge(merged: Decoder, model: Decoder) -> Decoder:
    """W₀ back out of the merged weights, W - ΔW, with the products of `model` beside it again."""
    twin = branch(model)
    for name, layer in layers(twin).items():
        whole = merged.get_submodule(name)
        if not isinstance(whole, nn.Linear) or whole.weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"merged must have a plain layer of the same sizes at {name!r}, not {type(whole).__name__}"
            )
        layer.base = Whole(whole.weight - layer.delta())
        for p in (*layer.A.parameters(), *layer.B.parameters()):
            p.requires_grad_(True)
    return twin


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every layer with a product beside it, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def show(model: Decoder, **index: int | str) -> None:
    """Tap A and B of every part."""
    if recording_on(A, **index) or recording_on(B, **index):
        for name, layer in layers(model).items():
            for part in layer.rows:
                tap(A, layer.A[part], "rank input", matrix=name, part=part, **index)
                tap(B, layer.B[part], "output rank", matrix=name, part=part, **index)


def places(model: Decoder, targets: Sequence[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Where the targets are: linear layer -> part -> rows. Raises ValueError for a target that is nowhere."""
    if not targets or isinstance(targets, str):
        raise ValueError(f"targets must be a list with a name at least, not {targets!r}")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")}
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for target in dict.fromkeys(targets):
        before = len(found), sum(map(len, found.values()))
        for name, linear in linears.items():
            last = name.rpartition(".")[2]
            if last == target:
                found.setdefault(name, {})[target] = (0, linear.out_features)
            elif SPLIT.get(target) == last:
                found.setdefault(name, {})[target] = _rows(model, name, target, linear.out_features)
        if (len(found), sum(map(len, found.values()))) == before:
            there = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(
                f"targets must be layers of the model ({', '.join(there)}) or parts of them, not {target!r}"
            )
    for name, rows in found.items():
        spans = sorted(rows.values())
        if any(a[1] > b[0] for a, b in pairwise(spans)):
            raise ValueError(f"targets must not overlap, and {', '.join(rows)} share rows of {name}")
    return {name: found[name] for name in linears if name in found}


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear layer on that very weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def check_rank(rank: object, out: int, width: int, part: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(out, width):
        raise ValueError(
            f"rank must be a whole number from 1 to {min(out, width)} for {part} [{out}, {width}], not {rank!r}"
        )


def _rows(model: Decoder, name: str, part: str, out: int) -> tuple[int, int]:
    if part in ("gate", "up"):
        return (0, out // 2) if part == "gate" else (out // 2, out)
    mixer = model.get_submodule(name.rpartition(".")[0])
    sizes = [getattr(mixer, key, 0) for key in ("heads", "kv_heads", "head_width")]
    H, G, D = sizes
    if out != (H + 2 * G) * D:
        raise ValueError(
            f"targets must name whole layers here, since rows of {name} are not queries, keys and values: {part!r}"
        )
    return {"q": (0, H * D), "k": (H * D, (H + G) * D), "v": ((H + G) * D, out)}[part]
