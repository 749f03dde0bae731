r"""BitNet b1.58: weights of -1, 0 and 1 with one scale a matrix, so that a product of matrices is only additions.

Ma et al. (arXiv:2402.17764), section 2, equations 1 to 3; the layer around it: BitNet (arXiv:2310.11453), section 2.1.

    W̃ = RoundClip(W / (γ + ε), -1, 1),   γ = mean|W|;   x̃ = RoundClip(127 x / max|x|) of each token

Paper -> here: γ + ε = `gamma`; Q_b = 127; SubLN = the norm inside `BitLinear`; ε = 1e-5.
Shapes: weight [out, in] -> codes int8 [out, in], gamma a scalar; x [..., in], a scale a token.
The gradient passes both roundings unchanged, also where weights are clipped, as in the authors' code: a weight past
1.5 γ would else never come back.
Errors: ValueError for codes that are not ternary, empty or non-finite values.
Deviations: RMSNorm where BitNet has LayerNorm (as b1.58 does); five trits a byte is ours, the paper counts log2 3 bits.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.norm import RMSNorm
from engine.quant import check_values, quantised
from engine.quant.affine import Grid
from engine.quant.integer import fake_quantise
from engine.quant.packing import pack, unpack
from engine.recording import recording_on, site, tap

TERNARY = site("bitnet.ternary", "the weights that compute: add, skip, subtract", symbol="W̃", low=-1, high=1)
GAMMA = site("bitnet.gamma", "the one scale of the matrix", symbol="γ", low=0.0)

EPS = 1e-5
TOKENS = Grid(8, granularity="token")
TRITS = 5  # in a byte: 3^5 = 243


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The codes -1, 0, 1 (int8) and gamma, equations 1 to 3."""
    check_values(weight, name="weight")
    gamma = weight.detach().abs().mean() + EPS
    return (weight.detach() / gamma).round().clamp(-1, 1).to(torch.int8), gamma


def unchanged_back(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` going forward, to the bit; going back the gradient reaches `x` as it is."""
    return rounded.detach() + (x - x.detach())


class BitLinear(nn.Module):
    """A linear layer that trains float weights and computes with ternary ones, on normed 8-bit activations."""

    def __init__(self, linear: nn.Linear, *, name: str = "") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.name = name
        self.norm = RMSNorm(linear.in_features, eps=EPS).to(linear.weight)
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        codes, gamma = ternary(self.weight)
        if recording_on(TERNARY, linear=self.name):
            tap(TERNARY, codes, "output input", linear=self.name)
        tap(GAMMA, gamma, "", linear=self.name)
        weight = unchanged_back(self.weight, codes.to(gamma.dtype) * gamma)
        return F.linear(unchanged_back(x, fake_quantise(x, TOKENS)), weight, self.bias)


def bitnet(model: nn.Module) -> nn.Module:
    """A copy of its own of a decoder with a BitLinear for every linear layer. Each brings its norm, so the blocks'
    own norms go."""
    twin = quantised(copy.deepcopy(model), lambda name, linear: BitLinear(linear, name=name))
    for block in twin.modules():
        for norm in ("norm1", "norm2"):
            if isinstance(getattr(block, norm, None), nn.Module):
                setattr(block, norm, nn.Identity())
    return twin


@dataclass(frozen=True)
class Additions:
    """What a ternary product took. Zeros are skipped; each weight of 1 is an addition, of -1 a subtraction."""

    additions: int
    subtractions: int
    multiplications: int = 0


def signed_additions(x: Tensor, codes: Tensor) -> tuple[Tensor, Additions]:
    """x [..., in] times ternary codes [out, in] without a multiplication: [..., out]. Clear, not fast.

    Integers x (8-bit codes) are summed in 32 bits; the answer then waits for one multiplication by the scales.
    """
    _check(codes)
    if x.shape[-1] != codes.shape[1]:
        raise ValueError(f"x must have {codes.shape[1]} values along its last axis, not {x.shape[-1]}")
    x = x if x.is_floating_point() else x.int()
    plus, minus = codes == 1, codes == -1
    columns = [x[..., p].sum(-1, dtype=x.dtype) - x[..., m].sum(-1, dtype=x.dtype)
               for p, m in zip(plus, minus, strict=True)]  # fmt: skip
    rows = x[..., 0].numel()
    return torch.stack(columns, -1), Additions(rows * int(plus.sum()), rows * int(minus.sum()))


def pack_ternary(codes: Tensor) -> Tensor:
    """Two bits a weight: -1, 0, 1 become 0, 1, 2, four to a byte."""
    _check(codes)
    return pack(codes.int() + 1, 2)


def unpack_ternary(packed: Tensor, count: int) -> Tensor:
    """The codes again, int8."""
    return _trits(unpack(packed, 2, count))


def pack_trits(codes: Tensor) -> Tensor:
    """Five weights to a byte, in base 3: 1.6 bits a weight where log2 3 = 1.585 is the least."""
    _check(codes)
    fives = F.pad(codes.int() + 1, (0, -codes.shape[-1] % TRITS)).unflatten(-1, (-1, TRITS))
    return (fives * 3 ** torch.arange(TRITS - 1, -1, -1, device=codes.device)).sum(-1).to(torch.uint8)


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """The codes again, int8."""
    if packed.shape[-1] != -(-count // TRITS) or (packed.numel() and int(packed.max()) >= 3**TRITS):
        raise ValueError(f"packed must have {-(-count // TRITS)} bytes below {3**TRITS} for {count} weights")
    powers = 3 ** torch.arange(TRITS - 1, -1, -1, device=packed.device)
    return _trits((packed[..., None].int() // powers % 3).flatten(-2)[..., :count])


def _trits(raised: Tensor) -> Tensor:
    if raised.numel() and int(raised.max()) > 2:
        raise ValueError(f"packed must hold the codes 0, 1 and 2, not {int(raised.max())}")
    return (raised - 1).to(torch.int8)


def _check(codes: Tensor) -> None:
    if codes.is_floating_point() or not bool(((codes >= -1) & (codes <= 1)).all()):
        raise ValueError("codes must be the whole numbers -1, 0 and 1")
