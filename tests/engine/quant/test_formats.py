"""Every bit pattern of the 8- and 16-bit formats, and every cast between them, against torch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quant.formats import (
    FORMATS,
    NF4_LEVELS,
    Float,
    bits_of,
    ends,
    flip,
    level_numbers,
    losses,
    number_line,
    rounded,
)
from engine.quant.nf4 import from_blocks, storage_bits, to_blocks
from engine.quant.stored import CASTS
from engine.recording import record

TORCH = {
    "fp32": (torch.float32, torch.int32),
    "fp16": (torch.float16, torch.int16),
    "bf16": (torch.bfloat16, torch.int16),
    "fp8 e4m3fn": (torch.float8_e4m3fn, torch.uint8),
    "fp8 e5m2": (torch.float8_e5m2, torch.uint8),
}
# torch before 2.12 turned what is too large for e4m3fn into NaN.
SATURATES = bool(torch.tensor(1000.0).to(torch.float8_e4m3fn).float() == 448)
LISTED = [name for name in TORCH if name != "fp32"]


def stored(values: torch.Tensor, name: str) -> torch.Tensor:
    """torch's own codes of values already in its dtype, from 0 on."""
    return values.view(TORCH[name][1]).long() & (2 ** FORMATS[name].bits - 1)


def torch_values(name: str) -> torch.Tensor:
    """torch's reading of every code, in its dtype."""
    codes = torch.arange(2 ** FORMATS[name].bits)
    narrow, whole = TORCH[name]
    return codes.to(whole if whole == torch.uint8 else torch.int32).to(whole).view(narrow)


@pytest.mark.parametrize("name", LISTED)
def test_every_pattern_means_what_torch_says(name):
    codes = torch.arange(2 ** FORMATS[name].bits)
    ours, theirs = FORMATS[name].decode(codes), torch_values(name).double()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf),
                       theirs.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf))  # fmt: skip
    assert torch.equal(torch.signbit(ours[~ours.isnan()]), torch.signbit(theirs[~theirs.isnan()]))
    back = FORMATS[name].encode(ours)
    assert torch.equal(back[~ours.isnan()], codes[~ours.isnan()])
    assert FORMATS[name].decode(back[ours.isnan()]).isnan().all()


@pytest.mark.parametrize("source", ["fp16", "bf16"])
@pytest.mark.parametrize("name", list(TORCH))
def test_every_16_bit_value_is_cast_as_torch_casts_it(source, name):
    values = torch_values(source).float()
    assert_cast(values, name)


@pytest.mark.parametrize("name", [n for n in TORCH if n != "fp32"])
def test_ties_and_edges_are_cast_as_torch_casts_them(name):
    line = number_line(FORMATS[name])
    middle = (line[1:] + line[:-1]) / 2  # each tie, and the float32 values on either side of it
    middle = middle.float()
    up, down = torch.full_like(middle, torch.inf), torch.full_like(middle, -torch.inf)
    step = float(line[-1] - line[-2])
    past = (line[-1] + step * torch.tensor([0.25, 0.49, 0.5, 0.51, 1.0, 2.0])).float()
    assert_cast(torch.cat((middle, middle.nextafter(up), middle.nextafter(down), past, -past)), name)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.sampled_from(list(TORCH)))
def test_any_float32_pattern_is_cast_as_torch_casts_it(patterns, name):
    values = torch.tensor(patterns).to(torch.int32).view(torch.float32)
    assert_cast(values, name)
    if name == "fp32":
        numbers = values[~values.isnan()]
        if numbers.numel():
            assert torch.equal(FORMATS[name].encode(numbers), stored(numbers, name))


def assert_cast(values: torch.Tensor, name: str) -> None:
    theirs = values.to(TORCH[name][0])
    form = FORMATS[name] if SATURATES or name != "fp8 e4m3fn" else replace(FORMATS[name], saturates=False)
    ours = form.encode(values)
    assert torch.equal(form.decode(ours).isnan(), theirs.float().isnan())
    kept = ~theirs.float().isnan()
    assert torch.equal(ours[kept], stored(theirs, name)[kept])


def test_known_patterns():
    half = FORMATS["fp16"]
    assert half.encode(torch.tensor([1.0, -2.0, 65504.0, 2.0**-24])).tolist() == [0x3C00, 0xC000, 0x7BFF, 0x0001]
    assert {k: int(v) for k, v in half.fields(torch.tensor(0xC000)).items()} == {
        "sign": 1, "exponent": 16, "mantissa": 0}  # fmt: skip
    assert float(number_line(FORMATS["fp8 e4m3fn"])[-1]) == 448
    assert float(number_line(FORMATS["fp8 e5m2"])[-1]) == 57344
    assert float(number_line(FORMATS["fp16"])[-1]) == torch.finfo(torch.float16).max
    assert float(number_line(FORMATS["bf16"])[-1]) == torch.finfo(torch.bfloat16).max


def test_too_large_for_e4m3fn_is_its_largest_value_or_nan():
    x = torch.tensor([448.0, 464.0, 464.01, 1e6, torch.inf, -1e6])
    form = FORMATS["fp8 e4m3fn"]
    assert form.decode(form.encode(x)).tolist() == [448, 448, 448, 448, 448, -448]
    strict = replace(form, saturates=False)
    assert strict.decode(strict.encode(x)).isfinite().tolist() == [True, True, False, False, False, False]
    assert losses(x, form).overflow == 3  # of the finite ones


def test_bf16_is_the_upper_half_of_fp32_and_has_its_range():
    wide, narrow = FORMATS["fp32"], FORMATS["bf16"]
    codes = torch.arange(2**16)
    codes = codes[narrow.decode(codes).isfinite()]
    assert torch.equal(narrow.decode(codes), wide.decode(codes << 16))
    assert isinstance(wide, Float)
    assert isinstance(narrow, Float)
    assert (wide.bias, wide.exponent_bits) == (narrow.bias, narrow.exponent_bits)


@pytest.mark.parametrize(("name", "count"), [("fp16", 63487), ("bf16", 65279), ("fp8 e4m3fn", 253), ("fp8 e5m2", 247),
                                             ("int8", 256), ("int4", 16), ("nf4", 16)])  # fmt: skip
def test_number_lines_hold_every_finite_value_once(name, count):
    line = number_line(FORMATS[name])
    assert len(line) == count
    assert (line[1:] > line[:-1]).all()


def test_integers_are_twos_complement():
    codes = torch.arange(256)
    assert torch.equal(FORMATS["int8"].decode(codes), codes.to(torch.uint8).view(torch.int8).double())
    assert FORMATS["int4"].decode(torch.arange(16)).tolist() == [*range(8), *range(-8, 0)]
    x = torch.tensor([-200.0, -128, -0.5, 0.5, 1.5, 126.5, 200])
    assert FORMATS["int8"].decode(FORMATS["int8"].encode(x)).tolist() == [-128, -128, 0, 0, 2, 126, 127]
    for name in ("int8", "int4"):
        whole = torch.arange(2 ** FORMATS[name].bits)
        assert torch.equal(FORMATS[name].encode(FORMATS[name].decode(whole)), whole)


def test_nf4_levels_are_normal_quantiles():
    # QLoRA, section 3: eight levels from the lower tail to 0 and nine from 0 up, 0 shared, scaled to reach 1.
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    up = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    down = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((down, torch.zeros(1, dtype=torch.float64), up)).sort().values
    assert torch.allclose(levels / levels.abs().max(), torch.tensor(NF4_LEVELS, dtype=torch.float64), atol=4e-6, rtol=0)


def test_nf4_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == list(NF4_LEVELS)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    code, largest = to_blocks(x, block=64)
    assert torch.allclose(from_blocks(code, largest).view_as(x), theirs, rtol=1e-6, atol=1e-7)


@given(st.integers(0, 15), st.integers(0, 15))
def test_nf4_takes_the_nearest_level(a, b):
    value = 0.3 * NF4_LEVELS[a] + 0.7 * NF4_LEVELS[b]
    nearest = min(NF4_LEVELS, key=lambda level: abs(level - value))
    assert float(rounded(torch.tensor([value], dtype=torch.float64), FORMATS["nf4"])) == nearest


@pytest.mark.parametrize("name", ["nf4", "int4", "int8"])
def test_blocks_keep_their_largest_value_and_zero(name):
    x = torch.randn(8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[:, 3] = x.abs().amax(1) + 1
    x[:, 5] = 0
    x[7] = 0
    code, largest = to_blocks(x, form=FORMATS[name])
    back = from_blocks(code, largest, form=FORMATS[name])
    assert torch.allclose(back[:, 3], x[:, 3], rtol=1e-12, atol=0)
    assert (back[:, 5] == 0).all()
    assert (back[7] == 0).all()
    assert storage_bits(code, largest, form=FORMATS[name]) == 512 * FORMATS[name].bits + 8 * 64


@given(st.sampled_from(list(FORMATS)), st.integers(0, 2**32 - 1), st.integers(0, 31))
def test_flipping_a_bit_twice_changes_nothing_and_once_exactly_one_bit(name, code, bit):
    form = FORMATS[name]
    codes, bit = torch.tensor([code % 2**form.bits]), bit % form.bits
    flipped = flip(codes, bit, form)
    assert (bits_of(codes, form) != bits_of(flipped, form)).sum() == 1
    assert torch.equal(flip(flipped, bit, form), codes)
    powers = 2 ** torch.arange(form.bits - 1, -1, -1)
    assert torch.equal((bits_of(codes, form) * powers).sum(-1), codes)


def test_losses_are_counted():
    x = torch.tensor([1.0, 1e6, 1e-9, 0.0, 65504.0, 1 / 3, torch.inf, torch.nan])
    got = losses(x, FORMATS["fp16"])
    assert (got.values, got.overflow, got.underflow, got.exact) == (6, 1, 1, 3)
    got = losses(x, FORMATS["bf16"])
    assert (got.overflow, got.underflow) == (0, 0)
    got = losses(torch.tensor([127.4, 127.6, -128.4, 0.3, 5.0]), FORMATS["int8"])
    assert (got.overflow, got.underflow, got.exact) == (1, 1, 1)
    got = losses(torch.tensor([1.01, 0.01, -1.0]), FORMATS["nf4"])
    assert (got.overflow, got.underflow, got.exact) == (1, 1, 1)


def test_taps_hold_bits_and_values():
    with record() as recorder:
        rounded(torch.tensor([1.0, -0.3]), FORMATS["fp8 e4m3fn"])
    recording = recorder.freeze()
    assert recording.track("format.bits").latest().tolist()[0] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert recording.track("format.rounded").latest().tolist() == [1.0, -0.3125]


def test_bad_input_is_named():
    half = FORMATS["fp16"]
    for call, words in [
        (lambda: half.encode(torch.zeros(0)), "x must hold a value"),
        (lambda: half.decode(torch.tensor([70000])), "code must hold whole numbers from 0 to 65535"),
        (lambda: half.decode(torch.tensor([1.0])), "code must hold whole numbers"),
        (lambda: flip(torch.tensor([1]), 16, half), "bit must be from 0 to 15 in fp16, not 16"),
        (lambda: number_line(FORMATS["fp32"]), "at most 16 bits"),
        (lambda: FORMATS["int8"].encode(torch.tensor([torch.nan])), "finite"),
        (lambda: to_blocks(torch.ones(65)), "block must divide the 65 values of x, and 64 does not"),
        (lambda: to_blocks(torch.ones(0)), "x must hold a value"),
        (lambda: to_blocks(torch.full((64,), torch.inf)), "x must be finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(("name", "dtype"), CASTS.items())
def test_the_ends_are_torch_s(name, dtype):
    info = torch.finfo(dtype)
    least, normal, largest = ends(FORMATS[name])
    assert (normal, largest) == (info.smallest_normal, info.max)
    assert least == info.smallest_normal * 2.0 ** -FORMATS[name].mantissa_bits


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.bits <= 16])
def test_level_numbers_count_the_values_from_zero(name):
    form = FORMATS[name]
    values = number_line(form)
    numbers = level_numbers(form.encode(values), form)
    assert torch.equal(numbers, torch.arange(len(values)) - int((values < 0).sum()))
    if not isinstance(form, Float):
        assert ends(form) == (float(values[values > 0][0]), float(values[values > 0][0]), float(values[-1]))
