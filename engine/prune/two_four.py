r"""2:4 sparsity: of each four neighbouring weights of a row the two largest stay, so that hardware can skip the others.

Mishra et al. (arXiv:2104.08378), section 2.1: the format of NVIDIA's sparse tensor cores, which store the two values
and where they stood.
Paper -> here: non-zero values = `values`, metadata of 2 bits a value = `places`.

    bytes of n fp16 weights: n/2 · 2 + n/2 · 2/8 = 9/8 n, against 2 n: 9/16

Shapes: weight [out, in], in a multiple of 4 -> values [out, in/2], places uint8 [out, ceil(in/8)] (four to a byte).
Errors: ValueError for an `in` that 4 does not divide, weights not finite, x of another width.
Deviations: on a tie the first of the four stays. On a CPU nothing is skipped: `matmul` shows and counts what sparse
hardware does, `TwoFourLinear` multiplies by the weight restored.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.prune import matrices
from engine.quant import check_values
from engine.quant.packing import pack, unpack
from engine.recording import recording_on, site, tap
from engine.timing import in_turns

VALUES = site("two_four.values", "the two weights of each four that stay, side by side", symbol="W·")
PLACES = site("two_four.places", "where each of them stood among its four", symbol="2-bit index", low=0.0, high=3.0)
SHOWN = 32  # rows, and groups of four a row, that a recording keeps


@dataclass(frozen=True)
class Compressed:
    """A weight in the 2:4 format. `places` holds 2 bits a value, the first value in a byte's highest bits."""

    values: Tensor  # out in/2
    places: Tensor  # out ceil(in/8), uint8

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], 2 * self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes really held, with values in their own dtype."""
        return self.values.nbytes + self.places.nbytes

    def columns(self) -> Tensor:
        """The column of the weight that each value belongs to: int64 [out, in/2]."""
        kept = self.values.shape[1]
        four = torch.arange(kept, device=self.values.device) // 2 * 4
        return four + unpack(self.places, 2, kept).long()

    def restored(self) -> Tensor:
        """The masked weight again, [out, in]."""
        empty = self.values.new_zeros(self.shape)
        return empty.scatter(1, self.columns(), self.values)


def mask(weight: Tensor) -> Tensor:
    """True at the two largest magnitudes of each four along a row; on a tie the first stays. bool [out, in]."""
    _check(weight)
    fours = weight.abs().unflatten(1, (-1, 4))  # out in/4 4
    order = fours.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(fours, dtype=torch.bool)
    return chosen.scatter(-1, order[..., :2], True).flatten(1)


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of every linear layer, for `engine.prune.apply`."""
    return {name: mask(weight) for name, weight in matrices(model).items()}


def compress(weight: Tensor, **index: int | str) -> Compressed:
    """The two largest of each four with their places. `index` says in the taps which weight it is."""
    kept = mask(weight)
    places = kept.unflatten(1, (-1, 4)).nonzero()[:, 2].view(len(weight), -1)  # out in/2, rising in each four
    made = Compressed(weight[kept].view(places.shape), pack(places, 2))
    if recording_on(VALUES, **index) or recording_on(PLACES, **index):
        tap(VALUES, made.values[:SHOWN, : 2 * SHOWN], "output kept", **index)
        tap(PLACES, places[:SHOWN, : 2 * SHOWN].byte(), "output kept", **index)
    return made


def matmul(x: Tensor, weight: Compressed) -> Tensor:
    """x [N, in] times the compressed weight: [N, out], touching only the inputs that a stored value meets.

    One row of the weight at a time: each row picks its own half of the inputs, as sparse hardware does.
    """
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must have shape [N, {weight.shape[1]}], not {list(x.shape)}")
    columns = weight.columns()
    return torch.stack([x[:, where] @ row for where, row in zip(columns, weight.values, strict=True)], 1)


def multiplications(shape: tuple[int, int], *, rows: int, sparse: bool) -> int:
    """Multiplications of `rows` inputs with a weight of `shape` (out, in): half as many when 2:4 sparse."""
    out, width = shape
    if width % 4:
        raise ValueError(f"shape must have an in that 4 divides, not {width}")
    return rows * out * (width // 2 if sparse else width)


def fp16_bytes(shape: tuple[int, int], *, sparse: bool) -> int:
    """Bytes of a weight in fp16, dense or with two of four values and their 2-bit places."""
    out, width = shape
    if width % 4:
        raise ValueError(f"shape must have an in that 4 divides, not {width}")
    return out * (width + -(-width // 8)) if sparse else out * width * 2


class TwoFourLinear(nn.Module):
    """A linear layer that stores its weight compressed. For `engine.quant.quantised`: `TwoFourLinear.of`."""

    values: Tensor
    places: Tensor

    def __init__(self, linear: nn.Linear, *, name: str = "") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        made = compress(linear.weight.detach(), linear=name)
        self.register_buffer("values", made.values)
        self.register_buffer("places", made.places)
        self.bias = linear.bias

    @classmethod
    def of(cls, name: str, linear: nn.Linear) -> TwoFourLinear:
        return cls(linear, name=name)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Compressed(self.values, self.places).restored(), self.bias)


def timed_on_cuda(size: int = 4096, *, rows: int = 4096, tries: int = 20, seed: int = 0) -> tuple[float, float] | None:
    """Median seconds of a dense and of a 2:4 fp16 product on sparse tensor cores; None where there are none."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return None
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator)
    dense = (weight * mask(weight)).half().cuda()
    sparse = torch.sparse.to_sparse_semi_structured(dense)
    x = torch.randn(rows, size, generator=generator).half().cuda()
    products = {"dense": lambda: F.linear(x, dense), "sparse": lambda: F.linear(x, sparse)}
    took = in_turns(products, rounds=tries, where=x.device, warm_up=3)
    return statistics.median(took["dense"]), statistics.median(took["sparse"])


def _check(weight: Tensor) -> None:
    check_values(weight, name="weight")
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise ValueError(f"weight must have shape [out, in] with an in that 4 divides, not {list(weight.shape)}")
