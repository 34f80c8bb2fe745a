"""The numeric recipe: the torch reference against a slow loop written another way, and every refusal."""

from __future__ import annotations

import bisect
import itertools
import math
import struct
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sender import quantize as dispatch
from shared.errors import ConfigError, NonFiniteWeightError
from shared.numerics import (
    BLOCK,
    ScaleFormat,
    ZeroScale,
    allocate_outputs,
    dequantize,
    quantize_reference,
    quantize_reference_into,
    scale_shape,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOOR = 2.2321429e-13  # 1e-10 / 448


# --- a second implementation: Python floats (fp64), a table of e4m3 values, no tensors ---


def round_to_fp32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def fp32_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def round_to_bf16(value: float) -> float:
    bits = fp32_bits(value)
    low, high = bits & 0xFFFF, bits & 0xFFFF0000
    if low > 0x8000 or (low == 0x8000 and high & 0x10000):
        high += 0x10000
    return struct.unpack("<f", struct.pack("<I", high))[0]


def e4m3_value(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    return math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)


E4M3 = [e4m3_value(code) for code in range(127)]  # 127 itself is NaN


def e4m3_code(value: float) -> int:
    """Nearest code, ties to the even one: found by distance in the table."""
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    value = min(abs(value), 448.0)
    upper = min(bisect.bisect_left(E4M3, value), 126)
    lower = max(upper - 1, 0)
    below, above = value - E4M3[lower], E4M3[upper] - value
    if below == above:
        return sign | (lower if lower % 2 == 0 else upper)
    return sign | (lower if below < above else upper)


def slow_scale(amax: float, scale_fmt: ScaleFormat, zero_scale: ZeroScale) -> float:
    # fp64 division of fp32 numbers, then rounding to fp32, is the fp32 division: 53 >= 2 * 24 + 2 bits.
    scale = round_to_fp32(max(amax, round_to_fp32(1e-10)) / 448.0)
    if amax == 0.0 and zero_scale == "one":
        scale = 1.0
    if scale_fmt == "ue8m0":
        mantissa, exponent = math.frexp(scale)
        scale = math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
    return scale


def slow_quantize(
    weight: Tensor, scale_fmt: ScaleFormat = "fp32", zero_scale: ZeroScale = "one"
) -> tuple[Tensor, Tensor]:
    """(codes as uint8, scale) of a small weight."""
    values = weight.double().tolist()
    if weight.dtype == torch.float32:
        values = [[round_to_bf16(v) for v in row] for row in values]
    rows, cols = weight.shape
    codes = torch.zeros(rows, cols, dtype=torch.uint8)
    scales = torch.zeros(scale_shape(rows, cols))
    for r in range(0, rows, BLOCK):
        for c in range(0, cols, BLOCK):
            block = [row[c : c + BLOCK] for row in values[r : r + BLOCK]]
            scale = slow_scale(max(abs(v) for row in block for v in row), scale_fmt, zero_scale)
            inverse = round_to_fp32(1.0 / scale)
            block_codes = [[e4m3_code(round_to_fp32(v * inverse)) for v in row] for row in block]
            codes[r : r + BLOCK, c : c + BLOCK] = torch.tensor(block_codes, dtype=torch.uint8)
            scales[r // BLOCK, c // BLOCK] = scale
    return codes, scales


def assert_matches_slow(weight: Tensor, scale_fmt: ScaleFormat = "fp32", zero_scale: ZeroScale = "one") -> None:
    before = weight.clone()
    codes, scale = quantize_reference(weight, scale_fmt=scale_fmt, zero_scale=zero_scale)
    expected_codes, expected_scale = slow_quantize(weight, scale_fmt, zero_scale)
    assert torch.equal(scale.view(torch.int32), expected_scale.view(torch.int32))
    assert torch.equal(codes.view(torch.uint8), expected_codes)
    assert torch.equal(weight, before)


def normal(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


# --- the recipe ---


def test_scale_shape_counts_started_blocks() -> None:
    assert scale_shape(128, 128) == (1, 1)
    assert scale_shape(129, 1) == (2, 1)
    assert scale_shape(0, 300) == (0, 3)
    assert scale_shape(5, 5, block=4) == (2, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 300), (127, 129), (128, 128), (257, 130)])
def test_equals_the_slow_loop(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_matches_slow(normal(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_slow_loop_with_power_of_two_scales(dtype: torch.dtype) -> None:
    assert_matches_slow(normal(130, 200, dtype), scale_fmt="ue8m0")


def test_known_bits() -> None:
    codes, scale = quantize_reference(torch.tensor([[1.0, -0.5, 0.0, 448.0]], dtype=torch.bfloat16))
    assert codes.view(torch.uint8).tolist() == [[0x38, 0xB0, 0x00, 0x7E]]
    assert scale.tolist() == [[1.0]]


def test_every_bf16_value_of_the_code_range() -> None:
    """With 448 in the block S is 1: all midpoints between codes, their neighbours, subnormals, both signs."""
    bits = torch.arange(0x43E0 + 1, dtype=torch.int32)
    values = torch.cat([bits, bits | 0x8000]).to(torch.int16).view(torch.bfloat16)
    for chunk in values.split(BLOCK * BLOCK - 1):
        block = torch.full((BLOCK * BLOCK,), 448.0, dtype=torch.bfloat16)
        block[1 : 1 + len(chunk)] = chunk
        assert_matches_slow(block.view(BLOCK, BLOCK))


def test_ties_go_to_the_even_code() -> None:
    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(E4M3)]
    codes, scale = quantize_reference(torch.tensor([[448.0, *midpoints]], dtype=torch.bfloat16))
    assert scale.item() == 1.0
    assert codes.view(torch.uint8)[0, 1:].tolist() == [code + code % 2 for code in range(126)]


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(700, 300)
    codes, scale = quantize_reference(weight)
    monkeypatch.setattr("shared.numerics._STRIP_ELEMENTS", 2 * BLOCK * 300)
    strip_codes, strip_scale = quantize_reference(weight)
    assert torch.equal(codes.view(torch.uint8), strip_codes.view(torch.uint8))
    assert torch.equal(scale, strip_scale)


@pytest.mark.parametrize("shape", [(512, 512), (300, 200)])
def test_round_trip_error_of_normal_data(shape: tuple[int, int]) -> None:
    """2.65% in the Frobenius norm, 2.25% in the mean of absolute values.

    Both follow from the format: the largest of 16384 normal weights is about 4.1 sigma, so sigma lies at 109 of 448,
    and the sum over binades of P(binade) * step**2 / 12 is (0.0265 sigma)**2.
    """
    weight = normal(*shape)
    back = dequantize(*quantize_reference(weight))
    assert back.shape == shape and back.dtype == torch.bfloat16
    error = back.double() - weight.double()
    assert 0.0258 < error.norm() / weight.double().norm() < 0.0274
    assert 0.0215 < error.abs().sum() / weight.double().abs().sum() < 0.0235


def test_a_second_round_trip_changes_nothing_with_power_of_two_scales() -> None:
    weight = normal(200, 300)
    codes, scale = quantize_reference(weight, scale_fmt="ue8m0")
    codes_again, scale_again = quantize_reference(dequantize(codes, scale), scale_fmt="ue8m0")
    assert torch.equal(codes.view(torch.uint8), codes_again.view(torch.uint8))
    assert torch.equal(scale, scale_again)


def test_dequantize_multiplies_in_fp32_and_crops() -> None:
    codes, scale = quantize_reference(normal(130, 257))
    back = dequantize(codes, scale, torch.float32)
    assert back.shape == (130, 257)
    assert back[129, 256].item() == (codes[129, 256].float() * scale[1, 2]).item()
    assert back[0, 128].item() == (codes[0, 128].float() * scale[0, 1]).item()


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_block(dtype: torch.dtype, zero: float) -> None:
    weight = normal(130, 256, dtype)
    weight[:128, 128:] = zero
    for zero_scale, expected in (("one", 1.0), ("floor", FLOOR)):
        codes, scale = quantize_reference(weight, zero_scale=zero_scale)  # type: ignore[arg-type]
        assert scale[0, 1].item() == pytest.approx(expected, rel=1e-6)
        assert not codes[:128, 128:].float().any()
        assert_matches_slow(weight, zero_scale=zero_scale)  # type: ignore[arg-type]


def test_zero_block_with_power_of_two_scales() -> None:
    weight = torch.zeros(4, 4, dtype=torch.bfloat16)
    assert quantize_reference(weight, scale_fmt="ue8m0")[1].item() == 1.0
    assert quantize_reference(weight, scale_fmt="ue8m0", zero_scale="floor")[1].item() == 2.0**-42


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_huge_value(dtype: torch.dtype) -> None:
    weight = normal(128, 256, dtype)
    # The largest fp32 that does not round to a BF16 infinity is the largest BF16.
    weight[5, 7] = -torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).max
    codes, _ = quantize_reference(weight)
    assert codes[5, 7].item() == -448.0
    assert_matches_slow(weight)
    assert_matches_slow(weight, scale_fmt="ue8m0")


def subnormals(dtype: torch.dtype) -> Tensor:
    """[128, 130], every value subnormal in `dtype` (fp32: also those that round to BF16 subnormals)."""
    bits = torch.arange(1, 128 * 130 + 1).view(128, 130)
    if dtype == torch.float32:
        return (bits * 503).to(torch.int32).view(torch.float32)
    mantissa = bits % (127 if dtype == torch.bfloat16 else 1023) + 1
    return (mantissa | (bits % 2) << 15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_get_the_floor(dtype: torch.dtype) -> None:
    weight = subnormals(dtype)
    assert_matches_slow(weight)
    if dtype != torch.float16:  # the fp16 ones are far above 1e-10
        codes, scale = quantize_reference(weight)
        assert scale[0, 0].item() == pytest.approx(FLOOR, rel=1e-6)
        assert not codes.float().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_flushing_floats_to_zero_changes_nothing(dtype: torch.dtype) -> None:
    weight = torch.cat([subnormals(dtype), normal(128, 130, dtype)])
    codes, scale = quantize_reference(weight)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no flush-to-zero mode")
    try:
        flushed_codes, flushed_scale = quantize_reference(weight)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(codes.view(torch.uint8), flushed_codes.view(torch.uint8))
    assert torch.equal(scale, flushed_scale)


def test_fp32_masters_are_rounded_to_bf16_first() -> None:
    master = normal(200, 300, torch.float32)
    codes, scale = quantize_reference(master)
    bf16_codes, bf16_scale = quantize_reference(master.to(torch.bfloat16))
    assert torch.equal(codes.view(torch.uint8), bf16_codes.view(torch.uint8))
    assert torch.equal(scale, bf16_scale)


@pytest.mark.parametrize("exponent", [-40, -10, 0, 13, 119])
def test_power_of_two_scales_are_exact_near_powers_of_two(exponent: int) -> None:
    exact = torch.tensor([[448.0 * 2.0**exponent]], dtype=torch.bfloat16)
    bits = exact.view(torch.int16)
    below, above = (bits - 1).view(torch.bfloat16), (bits + 1).view(torch.bfloat16)
    assert quantize_reference(exact, scale_fmt="ue8m0")[1].item() == max(2.0**exponent, 2.0**-42)
    if above.isfinite():
        assert quantize_reference(above, scale_fmt="ue8m0")[1].item() == 2.0 ** (exponent + 1)
    assert quantize_reference(below, scale_fmt="ue8m0")[1].item() == 2.0**exponent


def test_power_of_two_scales_have_no_mantissa_and_hold_the_block() -> None:
    weight = normal(512, 512) * torch.logspace(-3, 3, 512).to(torch.bfloat16)
    _, scale = quantize_reference(weight, scale_fmt="ue8m0")
    _, plain = quantize_reference(weight)
    assert not (scale.view(torch.int32) & 0x7FFFFF).any()
    assert ((scale >= plain) & (scale < 2 * plain)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input_and_output(dtype: torch.dtype) -> None:
    base = normal(300, 420, dtype)
    before = base.clone()
    for weight in (base.t(), base[::2, 1::3], base[7:200, 11:], base[:1].expand(130, -1)):
        expected_codes, expected_scale = quantize_reference(weight.contiguous())
        codes = torch.empty(weight.shape[1], weight.shape[0], dtype=torch.float8_e4m3fn).t()
        scale = torch.empty(*expected_scale.shape, 3)[..., 1]
        quantize_reference_into(weight, codes, scale, torch.zeros(1, dtype=torch.int32))
        assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
        assert torch.equal(scale, expected_scale)
    assert torch.equal(base, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_parameter_is_read_without_autograd_and_not_written_to(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(normal(130, 130, dtype))
    before, version = weight.detach().clone(), weight._version
    codes, scale = quantize_reference(weight)
    assert not codes.requires_grad and not scale.requires_grad
    assert torch.equal(weight, before) and weight._version == version


@pytest.mark.parametrize("shape", [(0, 300), (300, 0), (0, 0)])
def test_empty_weights(shape: tuple[int, int]) -> None:
    codes, scale = quantize_reference(torch.empty(shape, dtype=torch.bfloat16))
    assert codes.shape == shape and scale.shape == scale_shape(*shape)
    assert dequantize(codes, scale).shape == shape


# --- inf and NaN ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.parametrize("position", [(0, 0), (64, 64), (129, 199)], ids=["first", "middle", "ragged edge"])
def test_nonfinite_is_found(dtype: torch.dtype, value: float, position: tuple[int, int]) -> None:
    weight = normal(130, 200, dtype)
    weight[position] = value
    with pytest.raises(NonFiniteWeightError, match=r"layers\.3\.mlp") as caught:
        quantize_reference(weight, name="layers.3.mlp.weight")
    assert caught.value.names == ("layers.3.mlp.weight",)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_beside_large_values_is_found(dtype: torch.dtype) -> None:
    weight = torch.full((128, 128), 60000.0).to(dtype)
    weight[77, 3] = math.nan
    with pytest.raises(NonFiniteWeightError):
        quantize_reference(weight)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1])
def test_every_fp32_nan_is_found(bits: int) -> None:
    weight = torch.tensor([[bits, 0]], dtype=torch.int32).view(torch.float32)
    assert weight.isnan().any()
    with pytest.raises(NonFiniteWeightError):
        quantize_reference(weight)


def test_fp32_that_rounds_to_a_bf16_infinity_counts_as_inf() -> None:
    with pytest.raises(NonFiniteWeightError):
        quantize_reference(torch.tensor([[torch.finfo(torch.float32).max]]))


def test_the_flag_is_never_reset() -> None:
    bad, good = torch.tensor([[math.nan]], dtype=torch.bfloat16), normal(4, 4)
    _, _, nonfinite = allocate_outputs(good)
    for weight, expected in ((good, 0), (bad, 1), (good, 1)):
        codes, scale, _ = allocate_outputs(weight)
        quantize_reference_into(weight, codes, scale, nonfinite)
        assert nonfinite.item() == expected


# --- host checks, each tripped ---

REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "weight rank": ({"weight": torch.zeros(4, dtype=torch.bfloat16)}, "must be a matrix"),
    "weight dtype": ({"weight": torch.zeros(4, 6, dtype=torch.float64)}, "bfloat16, float16 or float32"),
    "codes dtype": ({"codes": torch.zeros(4, 6, dtype=torch.uint8)}, "codes must be float8_e4m3fn"),
    "codes shape": ({"codes": torch.zeros(6, 4, dtype=torch.float8_e4m3fn)}, "weight's shape"),
    "codes device": ({"codes": torch.zeros(4, 6, dtype=torch.float8_e4m3fn, device="meta")}, "codes must be on"),
    "scale dtype": ({"scale": torch.zeros(1, 1, dtype=torch.bfloat16)}, "scale must be float32"),
    "scale shape": ({"scale": torch.zeros(1, 2)}, r"must be \[1, 1\]"),
    "scale rank": ({"scale": torch.zeros(1)}, r"must be \[1, 1\]"),
    "scale device": ({"scale": torch.zeros(1, 1, device="meta")}, "scale must be on"),
    "flag dtype": ({"nonfinite": torch.zeros(1)}, "int32 tensor with one element"),
    "flag size": ({"nonfinite": torch.zeros(2, dtype=torch.int32)}, "int32 tensor with one element"),
    "flag device": ({"nonfinite": torch.zeros(1, dtype=torch.int32, device="meta")}, "nonfinite must be on"),
    "scale_fmt": ({"scale_fmt": "e8m0"}, "scale_fmt must be one of"),
    "zero_scale": ({"zero_scale": "zero"}, "zero_scale must be one of"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("into", [quantize_reference_into, dispatch.quantize_into], ids=["reference", "dispatcher"])
def test_arguments_that_do_not_fit_are_refused(case: str, into: Callable[..., None]) -> None:
    weight = normal(4, 6)
    codes, scale, nonfinite = allocate_outputs(weight)
    change, message = REFUSALS[case]
    arguments = {"weight": weight, "codes": codes, "scale": scale, "nonfinite": nonfinite} | change
    with pytest.raises(ConfigError, match=message):
        into(**arguments)


def test_dequantize_refuses_what_does_not_fit() -> None:
    codes, scale = quantize_reference(normal(130, 6))
    with pytest.raises(ConfigError, match="must be a matrix"):
        dequantize(codes[0], scale)
    with pytest.raises(ConfigError, match="codes must be float8_e4m3fn"):
        dequantize(codes.view(torch.uint8), scale)
    with pytest.raises(ConfigError, match=r"must be \[2, 1\]"):
        dequantize(codes, scale[:1])


# --- the dispatcher on a host without a GPU ---


def test_dispatcher_uses_the_reference_on_cpu() -> None:
    weight = normal(130, 140)
    assert dispatch.backend_name("cpu") == dispatch.backend_name(weight.device) == "torch"
    for ours, reference in zip(dispatch.quantize(weight), quantize_reference(weight), strict=True):
        assert torch.equal(ours.view(torch.uint8), reference.view(torch.uint8))


def test_dispatcher_names_the_weight_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteWeightError, match="lm_head"):
        dispatch.quantize(torch.tensor([[math.inf]]), name="lm_head.weight")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_copy_of_the_same_dtype(dtype: torch.dtype) -> None:
    weight, nonfinite = torch.randn(3, 5, 7).to(dtype).transpose(0, 2), torch.zeros(1, dtype=torch.int32)
    out = torch.empty(7, 5, 3, dtype=dtype)
    dispatch.copy_into(weight, out, nonfinite)
    assert torch.equal(out, weight) and nonfinite.item() == 0


def test_copy_rounds_fp32_to_bf16_and_takes_scalars_and_empty_tensors() -> None:
    nonfinite = torch.zeros((), dtype=torch.int32)
    for shape in ((), (0, 4), (130,)):
        weight, out = torch.randn(shape), torch.empty(shape, dtype=torch.bfloat16)
        dispatch.copy_into(weight, out, nonfinite)
        assert torch.equal(out, weight.to(torch.bfloat16))
    assert nonfinite.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_copy_finds_nonfinite_anywhere(dtype: torch.dtype, value: float) -> None:
    for position in (0, 1, 31, 32, 500, 998):
        weight, nonfinite = torch.randn(999).to(dtype), torch.zeros(1, dtype=torch.int32)
        weight[position] = value
        dispatch.copy_into(weight, torch.empty_like(weight), nonfinite)
        assert nonfinite.item() == 1
        dispatch.copy_into(torch.ones(2), torch.empty(2), nonfinite)
        assert nonfinite.item() == 1


def test_copy_finds_an_overflow_of_its_own_rounding() -> None:
    nonfinite = torch.zeros(1, dtype=torch.int32)
    dispatch.copy_into(torch.tensor([torch.finfo(torch.float32).max]), torch.empty(1, dtype=torch.bfloat16), nonfinite)
    assert nonfinite.item() == 1


@pytest.mark.parametrize(
    ("weight", "out", "message"),
    [
        (torch.zeros(3), torch.zeros(4), "weight's shape"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float16), "cannot copy"),
        (torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3), "cannot copy"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "cannot copy"),
        (torch.zeros(3), torch.zeros(3, device="meta"), "weight's device"),
    ],
)
def test_copy_refuses_what_does_not_fit(weight: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dispatch.copy_into(weight, out, torch.zeros(1, dtype=torch.int32))


def test_copy_refuses_a_flag_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="int32 tensor with one element"):
        dispatch.copy_into(torch.zeros(3), torch.zeros(3), torch.zeros(1))
