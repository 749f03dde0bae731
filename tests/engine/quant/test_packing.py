"""Packed codes come back, and take the bytes they say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quant.packing import pack, pack_bitwise, packed_bytes, unpack


@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_packing_round_trips_and_both_forms_agree(bits, count, seed):
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, packed_bytes(count, bits)) == (3, -(-count * bits // 8))
    assert torch.equal(packed, pack_bitwise(codes, bits))
    assert torch.equal(unpack(packed, bits, count).long(), codes)


def test_the_first_code_fills_the_first_bits():
    assert pack(torch.tensor([0b101, 0b001, 0b110]), 3).tolist() == [0b10100111, 0b00000000]
    assert pack(torch.tensor([1, 2, 3, 0]), 2).tolist() == [0b01101100]


def test_bad_input_is_named():
    for call, words in [
        (lambda: pack(torch.tensor([4]), 2), "codes must be from 0 to 3 to fit 2 bits, not 4 to 4"),
        (lambda: pack(torch.tensor([-1]), 2), "not -1 to -1"),
        (lambda: pack(torch.tensor([0.5]), 2), "whole numbers"),
        (lambda: pack(torch.tensor([1]), 0), "bits must be a whole number from 1 to 16, not 0"),
        (lambda: pack(torch.tensor([1]), 17), "not 17"),
        (lambda: unpack(torch.zeros(2, dtype=torch.uint8), 3, 2), "packed must have 1 bytes for 2 codes of 3 bits"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
