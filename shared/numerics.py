"""The numbers of block-wise FP8, written down once: kernel, fallback, checks and tests all mean this file.

Per block of 128x128 weights `x`, all in fp32:

1. fp32 weights are first rounded to BF16, which is what training computes with; BF16 and FP16 are taken as they are.
2. `amax = max|x|`. Ragged edge blocks count as if padded with zeros.
3. `S = max(amax, 1e-10) / 448`. A block of nothing but zeros (either sign) gets `S = 1`, or with `zero_scale="floor"`
   the floor `1e-10 / 448` that the kernels of slime and verl write.
4. `scale_fmt="ue8m0"` rounds S up to a power of two: `(bits(S) + 0x7FFFFF) & 0xFF800000`. Never a logarithm, which
   differs between devices near powers of two. `S = 1` is a power of two and stays; the floor becomes `2**-42`.
5. `code = e4m3fn(clamp(x * (1/S), -448, 448))`, round to nearest, ties to even. `1/S` is an IEEE division, then the
   product is rounded. Checkpoints made with `x / S` differ in about 0.03% of the codes.
6. `x` is about `code * S`: the scale tensor is what SGLang and Hugging Face call `weight_scale_inv`, always 2-D.

Inf and NaN are found in the same pass; what is written for such a block is unspecified, the caller throws it away.
A finite fp32 weight that rounds to a BF16 infinity counts as inf.

Why the bits agree on every device. The maximum is taken over integers (`bits & 0x7fff`), which order like the absolute
values, so it is exact, keeps inf and NaN, and sees subnormals also where floats are flushed to zero. Every other step
is one correctly rounded IEEE operation, and none has a subnormal result that matters: `1e-10/448 <= S <= 2**120`, so S
and 1/S are normal, and a subnormal input or product, flushed or not, gives a scaled value far below `2**-10`, half of
the least code, which rounds to a zero of its own sign.

A matrix that is cut between rows quantizes to the same bits: whole blocks are a smaller matrix, and of a block that is
cut each part gives its maximum (`amax_bits`), then takes that of all (`quantize_rows_into`).
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from shared.errors import ConfigError, NonFiniteWeightError

BLOCK: Final = 128
FP8_MAX: Final = 448.0
AMAX_FLOOR: Final = 1e-10

ScaleFormat = Literal["fp32", "ue8m0"]
ZeroScale = Literal["one", "floor"]

WEIGHT_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)

# Bits of +inf in the format that the maximum is taken in (fp32 weights are BF16 by then); above it lie the NaNs.
_INF_BITS: Final = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}

# Working memory of the reference: about 8 bytes for each element of a strip.
_STRIP_ELEMENTS: Final = 1 << 21


def scale_shape(rows: int, cols: int, block: int = BLOCK) -> tuple[int, int]:
    """Shape of the scale tensor of a [rows, cols] weight: one entry for each started block."""
    return -(-rows // block), -(-cols // block)


def check_weight(weight: Tensor) -> None:
    """Raise `ConfigError` unless `weight` is a matrix [rows, cols] of bf16, fp16 or fp32."""
    if weight.dim() != 2:
        raise ConfigError(f"weight must be a matrix [rows, cols]; its shape is {list(weight.shape)}")
    if weight.dtype not in WEIGHT_DTYPES:
        raise ConfigError(f"weight must be bfloat16, float16 or float32; it is {weight.dtype}")


def check_nonfinite_flag(nonfinite: Tensor, device: torch.device) -> None:
    """Raise `ConfigError` unless `nonfinite` is an int32 tensor with one element on `device`."""
    if nonfinite.dtype != torch.int32 or nonfinite.numel() != 1:
        raise ConfigError(
            f"nonfinite must be an int32 tensor with one element; it is {nonfinite.dtype} {list(nonfinite.shape)}"
        )
    if nonfinite.device != device:
        raise ConfigError(f"nonfinite must be on the weight's device {device}; it is on {nonfinite.device}")


def _check_codes_and_scale(codes: Tensor, scale: Tensor, rows: int, cols: int, device: torch.device) -> None:
    if codes.dtype != torch.float8_e4m3fn:
        raise ConfigError(f"codes must be float8_e4m3fn; they are {codes.dtype}")
    if codes.shape != (rows, cols):
        raise ConfigError(f"codes must have the weight's shape {[rows, cols]}; theirs is {list(codes.shape)}")
    if scale.dtype != torch.float32:
        raise ConfigError(f"scale must be float32; it is {scale.dtype}")
    if scale.shape != scale_shape(rows, cols):
        raise ConfigError(
            f"scale of a {[rows, cols]} weight must be {list(scale_shape(rows, cols))}; it is {list(scale.shape)}"
        )
    for name, tensor in (("codes", codes), ("scale", scale)):
        if tensor.device != device:
            raise ConfigError(f"{name} must be on the weight's device {device}; found on {tensor.device}")


def check_quantize_arguments(
    weight: Tensor, codes: Tensor, scale: Tensor, nonfinite: Tensor, scale_fmt: ScaleFormat, zero_scale: ZeroScale
) -> None:
    """Raise `ConfigError` unless the arguments fit; shared by every implementation of `quantize_*_into`."""
    check_weight(weight)
    rows, cols = weight.shape
    _check_codes_and_scale(codes, scale, rows, cols, weight.device)
    check_nonfinite_flag(nonfinite, weight.device)
    if scale_fmt not in get_args(ScaleFormat):
        raise ConfigError(f"scale_fmt must be one of {get_args(ScaleFormat)}; it is {scale_fmt!r}")
    if zero_scale not in get_args(ZeroScale):
        raise ConfigError(f"zero_scale must be one of {get_args(ZeroScale)}; it is {zero_scale!r}")


def allocate_outputs(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """New (codes, scale, nonfinite) for `weight`: [rows, cols], as `quantize_reference_into` wants them.

    The flag is zero, codes and scale are uninitialised. Raises `ConfigError` if `weight` cannot be quantized.
    """
    check_weight(weight)
    rows, cols = weight.shape
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(scale_shape(rows, cols), dtype=torch.float32, device=weight.device)
    return codes, scale, torch.zeros(1, dtype=torch.int32, device=weight.device)


@torch.no_grad()
def quantize_reference_into(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    nonfinite: Tensor,
    *,
    scale_fmt: ScaleFormat = "fp32",
    zero_scale: ZeroScale = "one",
) -> None:
    """Quantize `weight` into `codes` and `scale` by the recipe of this module, in plain torch on any device.

    weight: [rows, cols] bf16, fp16 or fp32, any strides, never written to.
    codes: [rows, cols] float8_e4m3fn, any strides, overwritten.
    scale: [ceil(rows/128), ceil(cols/128)] fp32, any strides, overwritten with S.
    nonfinite: int32, one element; set to 1 if `weight` holds inf or NaN, else left alone (so that many tensors can
    share one flag). No host synchronization takes place.

    Raises `ConfigError` where an argument does not fit, before anything is written.
    """
    check_quantize_arguments(weight, codes, scale, nonfinite, scale_fmt, zero_scale)
    rows, cols = weight.shape
    if rows == 0 or cols == 0:
        return
    strip_blocks = max(1, _STRIP_ELEMENTS // (BLOCK * cols))
    for first in range(0, scale.shape[0], strip_blocks):
        block_rows = slice(first, first + strip_blocks)
        strip = slice(first * BLOCK, (first + strip_blocks) * BLOCK)
        _quantize_strip(weight[strip], codes[strip], scale[block_rows], nonfinite, scale_fmt, zero_scale)


def _quantize_strip(
    weight: Tensor, codes: Tensor, scale: Tensor, nonfinite: Tensor, scale_fmt: ScaleFormat, zero_scale: ZeroScale
) -> None:
    """`quantize_reference_into` without checks, for a strip that starts on a block boundary."""
    blocks = _as_blocks(weight)
    _quantize_blocks(blocks, _magnitude_of(blocks), codes, scale, nonfinite, scale_fmt, zero_scale)


def _quantize_blocks(
    blocks: Tensor,
    magnitude: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    nonfinite: Tensor,
    scale_fmt: ScaleFormat,
    zero_scale: ZeroScale,
) -> None:
    """`magnitude`: the largest `bits & 0x7fff` of each block, of these weights or of more."""
    rows, cols = codes.shape
    nonfinite.masked_fill_((magnitude >= _INF_BITS[blocks.dtype]).any(), 1)
    block_scale = _scale_of(magnitude, blocks.dtype, scale_fmt, zero_scale)
    if scale is not None:
        scale.copy_(block_scale)
    inverse = torch.ones_like(block_scale) / block_scale
    # .float() copies, because blocks are 16 bits wide: the in-place steps never reach the weight.
    scaled = blocks.float().mul_(inverse[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX)
    codes.copy_(scaled.to(torch.float8_e4m3fn).flatten(2, 3).flatten(0, 1)[:rows, :cols])


def _as_blocks(matrix: Tensor) -> Tensor:
    """[rows, cols] -> [row blocks, 128, column blocks, 128] of 16-bit floats, zero-padded; a view if that can be."""
    rows, cols = matrix.shape
    matrix = matrix.to(torch.bfloat16) if matrix.dtype == torch.float32 else matrix
    if rows % BLOCK or cols % BLOCK:
        matrix = functional.pad(matrix, (0, -cols % BLOCK, 0, -rows % BLOCK))
    return matrix.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))


def _magnitude_of(blocks: Tensor) -> Tensor:
    """[row blocks, column blocks] int16."""
    return (blocks.view(torch.int16) & 0x7FFF).amax(dim=(1, 3))


def _scale_of(magnitude: Tensor, dtype: torch.dtype, scale_fmt: ScaleFormat, zero_scale: ZeroScale) -> Tensor:
    """S of each block, fp32, from the largest `bits & 0x7fff` (int16) of its weights of the 16-bit `dtype`."""
    amax = magnitude.view(dtype).float().clamp_min_(AMAX_FLOOR)
    # A tensor for a divisor: torch on CUDA multiplies by the reciprocal of a Python scalar, which is not IEEE division.
    block_scale = amax / torch.full_like(amax, FP8_MAX)
    if zero_scale == "one":
        block_scale.masked_fill_(magnitude == 0, 1.0)
    if scale_fmt == "ue8m0":
        # -0x800000 is 0xFF800000 as int32.
        block_scale = ((block_scale.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32)
    return block_scale


@torch.no_grad()
def amax_bits(rows: Tensor) -> Tensor:
    """What these rows add to the maximum of one row of blocks, whose other rows are elsewhere.

    rows: [1 to 128, cols] bf16, fp16 or fp32. Returns [ceil(cols/128)] int32, the largest `bits & 0x7fff` of each
    block: integers that order as the magnitudes do, inf and NaN on top, so that the maximum of all parts is exact.
    Raises `ConfigError` for anything else.
    """
    _check_rows(rows)
    return _magnitude_of(_as_blocks(rows))[0].int()


@torch.no_grad()
def quantize_rows_into(
    rows: Tensor,
    amax: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    nonfinite: Tensor,
    *,
    scale_fmt: ScaleFormat = "fp32",
    zero_scale: ZeroScale = "one",
) -> None:
    """`quantize_reference_into` for a part of one row of blocks, given the maximum over all of its rows.

    rows: [1 to 128, cols] bf16, fp16 or fp32. amax: [ceil(cols/128)] int32, the maximum of `amax_bits` over all parts.
    codes: [same shape] float8_e4m3fn. scale: [1, ceil(cols/128)] fp32, or None where another part writes it.
    nonfinite: int32, one element, set to 1 if a block holds inf or NaN, in whichever part; else left alone.

    Raises `ConfigError` where an argument does not fit, before anything is written.
    """
    _check_rows(rows)
    written = torch.empty(scale_shape(*rows.shape), device=rows.device) if scale is None else scale
    check_quantize_arguments(rows, codes, written, nonfinite, scale_fmt, zero_scale)
    if amax.dtype != torch.int32 or amax.shape != written.shape[1:] or amax.device != rows.device:
        text = f"it is {amax.dtype} {list(amax.shape)} on {amax.device}"
        raise ConfigError(f"amax must be int32 {list(written.shape[1:])} on {rows.device}; {text}")
    _quantize_blocks(_as_blocks(rows), amax.short()[None], codes, scale, nonfinite, scale_fmt, zero_scale)


def _check_rows(rows: Tensor) -> None:
    check_weight(rows)
    if not 1 <= rows.shape[0] <= BLOCK or not rows.shape[1]:
        raise ConfigError(f"rows of one row of blocks are 1 to {BLOCK}, and not empty; these are {list(rows.shape)}")


def quantize_reference(
    weight: Tensor, *, name: str = "weight", scale_fmt: ScaleFormat = "fp32", zero_scale: ZeroScale = "one"
) -> tuple[Tensor, Tensor]:
    """`quantize_reference_into` with outputs of its own.

    weight: [rows, cols] bf16, fp16 or fp32. Returns codes [rows, cols] float8_e4m3fn and scale
    [ceil(rows/128), ceil(cols/128)] fp32. Raises `NonFiniteWeightError` naming `name` if the weight holds inf or NaN,
    `ConfigError` if an argument does not fit. Waits for the device.
    """
    codes, scale, nonfinite = allocate_outputs(weight)
    quantize_reference_into(weight, codes, scale, nonfinite, scale_fmt=scale_fmt, zero_scale=zero_scale)
    if nonfinite.item():
        raise NonFiniteWeightError((name,))
    return codes, scale


@torch.no_grad()
def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weights that `codes` and `scale` stand for: `code * S`, multiplied in fp32, then rounded to `dtype`.

    codes: [rows, cols] float8_e4m3fn. scale: [ceil(rows/128), ceil(cols/128)] fp32. Returns [rows, cols] of `dtype`.
    Raises `ConfigError` if shapes, dtypes or devices do not fit.
    """
    if codes.dim() != 2:
        raise ConfigError(f"codes must be a matrix [rows, cols]; their shape is {list(codes.shape)}")
    rows, cols = codes.shape
    _check_codes_and_scale(codes, scale, rows, cols, codes.device)
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    for i, row_scale in enumerate(scale):
        strip = slice(i * BLOCK, (i + 1) * BLOCK)
        out[strip] = codes[strip].float().mul_(row_scale.repeat_interleave(BLOCK)[:cols])
    return out
