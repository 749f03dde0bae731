"""Number formats: what each bit of a stored number means, by our own arithmetic.

IEEE 754-2019, section 3.4 (fp32, fp16; bf16 is fp32's upper half); FP8 (arXiv:2209.05433), table 1; NF4: QLoRA
(arXiv:2305.14314), appendix E.
Paper -> here: S, E, T = the sign, exponent and mantissa fields; bias = `bias`; value = (-1)^S 2^(E-bias) (1 + T/2^m),
without the 1 and with E = 1 where the exponent field is 0 (subnormals).
Shapes: any; codes are int64 and hold the stored bits as a number from 0 to 2^bits - 1. Values are float64.
Rounding is to the nearest, ties to the even code; what is too large becomes infinite in the formats that have an
infinity, and the nearest end in the others. For e4m3fn that is what torch does from 2.12 on; the paper and older torch
also know NaN instead: `saturates=False`.
Errors: ValueError for an empty tensor, a code outside the format, a bit that is not there.
Deviations: there is one NaN code, the positive quiet one; casts to integers round, where torch truncates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.recording import recording_on, site, tap

BITS = site("format.bits", "the stored bits of each value, most significant first", symbol="b", low=0, high=1)
ROUNDED = site("format.rounded", "the value that the stored bits stand for", symbol="x̂")


@dataclass(frozen=True)
class Float:
    """A sign bit, exponent bits, mantissa bits. `infinite`: the top exponent holds infinities and NaNs, else only its
    last code is NaN. `saturates`: what is too large becomes the largest finite value."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    infinite: bool = True
    saturates: bool = False

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def top(self) -> int:
        """The first code, sign aside, that is no finite number."""
        ones = (2**self.exponent_bits - 1) << self.mantissa_bits
        return ones if self.infinite else ones | (2**self.mantissa_bits - 1)

    def encode(self, x: Tensor) -> Tensor:
        x = _filled(x).double()
        size, m, lowest = x.abs(), self.mantissa_bits, 1 - self.bias
        # frexp says size = f 2^e with f in [1/2, 1): the leading bit is worth 2^(e-1).
        # It calls the exponent of 0 zero: here 0 is no step of the smallest size.
        exponent = torch.frexp(size.nan_to_num(0.0, 0.0)).exponent.clamp(min=lowest + 1) - 1
        exponent = torch.where(size > 0, exponent, lowest)
        steps = (size * _power(m - exponent)).round()  # whole steps of the last mantissa bit; ties to even
        # Steps count the implicit 1, so each exponent above the lowest adds 2^m, and a carry runs on by itself.
        code = steps.nan_to_num(0.0, 0.0).long() + ((exponent.long() - lowest) << m)
        code = torch.where(size.isinf() | (code >= self.top), self.top - self.saturates, code)
        quiet = self.top | (1 << (m - 1)) if self.infinite else self.top
        sign = torch.signbit(x).long() << (self.bits - 1)
        return torch.where(x.isnan(), quiet, code | sign)

    def decode(self, code: Tensor) -> Tensor:
        sign, exponent, mantissa = self.fields(code).values()
        normal = (exponent > 0).long()
        steps = mantissa + (normal << self.mantissa_bits)
        size = steps.double() * _power(exponent + 1 - normal - self.bias - self.mantissa_bits)
        size = torch.where((code & (2 ** (self.bits - 1) - 1)) >= self.top, torch.nan, size)
        if self.infinite:
            size = torch.where((code & (2 ** (self.bits - 1) - 1)) == self.top, torch.inf, size)
        return torch.where(sign == 1, -size, size)

    def fields(self, code: Tensor) -> dict[str, Tensor]:
        """The three fields as they stand: sign, exponent (biased), mantissa."""
        code = _coded(code, self)
        return {
            "sign": code >> (self.bits - 1),
            "exponent": (code >> self.mantissa_bits) & (2**self.exponent_bits - 1),
            "mantissa": code & (2**self.mantissa_bits - 1),
        }


@dataclass(frozen=True)
class Integer:
    """Two's complement. The value is a whole number; whoever wants others multiplies by a scale (affine.py)."""

    name: str
    bits: int

    def encode(self, x: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        return _numbers(x, self).round().clamp(-half, half - 1).long() & (2**self.bits - 1)

    def decode(self, code: Tensor) -> Tensor:
        return (_coded(code, self) - (code >> (self.bits - 1) << self.bits)).double()

    def fields(self, code: Tensor) -> dict[str, Tensor]:
        """The sign bit, worth -2^(bits-1), and the others, worth what they say."""
        code = _coded(code, self)
        return {"sign": code >> (self.bits - 1), "magnitude": code & (2 ** (self.bits - 1) - 1)}


@dataclass(frozen=True)
class Table:
    """The code is a place in a list of rising levels from -1 to 1; a tie goes to the lower one."""

    name: str
    levels: tuple[float, ...]

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    def encode(self, x: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, dtype=torch.float64, device=x.device)
        return torch.bucketize(_numbers(x, self), (levels[1:] + levels[:-1]) / 2)

    def decode(self, code: Tensor) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.float64, device=code.device)[_coded(code, self)]

    def fields(self, code: Tensor) -> dict[str, Tensor]:
        return {"place": _coded(code, self)}


Format = Float | Integer | Table

# Quantiles of the normal distribution, eight of them below zero, zero itself and seven above, scaled to [-1, 1].
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Float("fp32", 8, 23),
        Float("fp16", 5, 10),
        Float("bf16", 8, 7),
        Float("fp8 e4m3fn", 4, 3, infinite=False, saturates=True),
        Float("fp8 e5m2", 5, 2),
        Integer("int8", 8),
        Integer("int4", 4),
        Table("nf4", NF4_LEVELS),
    )
}


def rounded(x: Tensor, form: Format, **index: int | str) -> Tensor:
    """What is left of `x` once stored in this format, in the dtype of `x`."""
    code = form.encode(x)
    back = form.decode(code).to(x.dtype)
    if recording_on(BITS, **index):
        tap(BITS, bits_of(code, form).flatten(0, -2).to(torch.uint8), "value bit", **index)
    tap(ROUNDED, back.flatten(), "value", **index)
    return back


def bits_of(code: Tensor, form: Format) -> Tensor:
    """The bits of each code, most significant first: [..., bits]."""
    places = torch.arange(form.bits - 1, -1, -1, device=code.device)
    return (_coded(code, form)[..., None] >> places) & 1


def flip(code: Tensor, bit: int, form: Format) -> Tensor:
    """The codes with one bit turned over; bit 0 is the least significant."""
    if not 0 <= bit < form.bits:
        raise ValueError(f"bit must be from 0 to {form.bits - 1} in {form.name}, not {bit}")
    return _coded(code, form) ^ (1 << bit)


def number_line(form: Format) -> Tensor:
    """Every finite value of a format of at most 16 bits, rising: float64. Both zeros of a float are one."""
    if form.bits > 16:
        raise ValueError(f"form must have at most 16 bits to be listed, and {form.name} has {form.bits}")
    values = form.decode(torch.arange(2**form.bits))
    return values[values.isfinite()].unique()


def ends(form: Format) -> tuple[float, float, float]:
    """The smallest value above zero, the smallest of full precision, and the largest finite one."""
    if isinstance(form, Float):
        codes = torch.tensor([1, 1 << form.mantissa_bits, form.top - 1])
        least, normal, largest = form.decode(codes).tolist()
        return least, normal, largest
    above = [value for value in number_line(form).tolist() if value > 0]
    return above[0], above[0], above[-1]


def level_numbers(code: Tensor, form: Format) -> Tensor:
    """How many steps of the format each code's value lies above zero (below: minus as many)."""
    code = _coded(code, form)
    if isinstance(form, Float):
        size = code & (2 ** (form.bits - 1) - 1)
        return torch.where(code >> (form.bits - 1) == 1, -size, size)
    if isinstance(form, Integer):
        return form.decode(code).long()
    return code - form.levels.index(0.0)


@dataclass(frozen=True)
class Losses:
    """How many finite values of a tensor a format spoils: too large to hold, or rounded away to zero."""

    values: int
    overflow: int
    underflow: int
    exact: int


def losses(x: Tensor, form: Format) -> Losses:
    """Count, over the finite values of `x`: overflow (past the largest value, rounded), underflow and exact ones."""
    x = _filled(x).double()
    x = x[x.isfinite()]
    if not x.numel():
        return Losses(0, 0, 0, 0)
    back = form.decode(form.encode(x))
    if isinstance(form, Float):
        over = ~form.decode(replace(form, saturates=False).encode(x)).isfinite()
    else:
        low, high = number_line(form)[[0, -1]].tolist()
        nearest = x.round() if isinstance(form, Integer) else x
        over = nearest.clamp(low, high) != nearest
    under = (x != 0) & (back == 0)
    return Losses(x.numel(), int(over.sum()), int(under.sum()), int((back == x).sum()))


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, exact from -1022 to 1023: a float64 whose exponent field is written by hand."""
    return (exponent.long() + 1023 << 52).view(torch.float64)


def _filled(x: Tensor) -> Tensor:
    if not x.numel():
        raise ValueError(f"x must hold a value at least, and its shape is {list(x.shape)}")
    return x


def _numbers(x: Tensor, form: Format) -> Tensor:
    if not bool(_filled(x).isfinite().all()):
        raise ValueError(f"x must be finite, since {form.name} has neither infinities nor NaN")
    return x.double()


def _coded(code: Tensor, form: Format) -> Tensor:
    if code.is_floating_point() or (code.numel() and not 0 <= int(code.min()) <= int(code.max()) < 2**form.bits):
        raise ValueError(f"code must hold whole numbers from 0 to {2**form.bits - 1} for {form.name}")
    return code
