"""Codes packed bit by bit, so that three bits take three bits: what `nbytes` of a quantised tensor is counted on.

No paper: the layout is big-endian, the first code in the first bits. Eight codes of b bits fill b bytes.
Shapes: codes [..., n] whole numbers from 0 to 2^b - 1 -> uint8 [..., ceil(n b / 8)] -> int32 [..., n].
Errors: ValueError for bits outside 1..16, a code that does not fit, a wrong number of bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.quant import check_bits


def pack_bitwise(codes: Tensor, bits: int) -> Tensor:
    """The clear form: every code as its bits in a row, every eight bits a byte."""
    codes = _fitting(codes, bits)
    stream = (codes[..., None] >> torch.arange(bits - 1, -1, -1, device=codes.device)) & 1  # ... n bits
    stream = stream.flatten(-2)
    stream = F.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))  # ... bytes 8
    return (stream << torch.arange(7, -1, -1, device=codes.device)).sum(-1).to(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """The same bytes without spreading the bits out: eight codes are shifted into `bits` bytes."""
    codes = _fitting(codes, bits)
    count = codes.shape[-1]
    eights = F.pad(codes, (0, -count % 8)).unflatten(-1, (-1, 8))  # ... n/8 8
    packed = eights.new_zeros(*eights.shape[:-1], bits)  # ... n/8 bits
    for i in range(8):
        first, past = i * bits, (i + 1) * bits  # the bits that code i fills
        for byte in range(first // 8, (past - 1) // 8 + 1):
            shift = (byte + 1) * 8 - past  # how far left of this byte's last bit the code ends
            part = eights[..., i] << shift if shift >= 0 else eights[..., i] >> -shift
            packed[..., byte] |= part & 255
    return packed.flatten(-2)[..., : packed_bytes(count, bits)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes again."""
    check_bits(bits)
    if packed.shape[-1] != packed_bytes(count, bits):
        raise ValueError(
            f"packed must have {packed_bytes(count, bits)} bytes for {count} codes of {bits} bits, "
            f"not {packed.shape[-1]}"
        )
    groups = F.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).int()  # ... n/8 bits
    codes = groups.new_zeros(*groups.shape[:-1], 8)  # ... n/8 8
    for i in range(8):
        first, past = i * bits, (i + 1) * bits
        for byte in range(first // 8, (past - 1) // 8 + 1):
            shift = (byte + 1) * 8 - past
            codes[..., i] |= groups[..., byte] >> shift if shift >= 0 else groups[..., byte] << -shift
    return (codes & (2**bits - 1)).flatten(-2)[..., :count]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes in one row."""
    return -(-count * bits // 8)


def _fitting(codes: Tensor, bits: int) -> Tensor:
    check_bits(bits)
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(f"codes must hold whole numbers, not {codes.dtype}")
    codes = codes.int()
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(f"codes must be from 0 to {2**bits - 1} to fit {bits} bits, not "
                         f"{int(codes.min())} to {int(codes.max())}")  # fmt: skip
    return codes
