"""Block-wise FP8 in Triton, bit-identical to `shared.numerics.quantize_reference_into`, which explains the recipe.

One program reads one 128x128 block once, finds its largest magnitude, and writes its scale and codes. Weights are
loaded as integers and codes stored as integers, so nothing depends on how a backend converts 16-bit or 8-bit floats,
with one exception: on NVIDIA GPUs from compute capability 8.9 the hardware rounds fp32 to e4m3.

`sender.quantize` decides when this file is used; importing it needs Triton.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.errors import ConfigError
from shared.numerics import AMAX_FLOOR, BLOCK, FP8_MAX, ScaleFormat, ZeroScale, check_quantize_arguments

_AMAX_FLOOR = tl.constexpr(AMAX_FLOOR)
_FP8_MAX = tl.constexpr(FP8_MAX)
_NUM_WARPS = 8


@triton.jit
def _round_fp32_bits_to_bf16(bits: tl.tensor) -> tl.tensor:
    """fp32 bits -> bf16 bits, both int32: nearest even, NaN stays NaN, as torch's `.to(bfloat16)`."""
    magnitude = bits & 0x7FFFFFFF
    rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
    # A NaN with a full mantissa would overflow in the line above.
    rounded = tl.where(magnitude > 0x7F800000, 0x7FC0, rounded)
    return rounded | ((bits >> 16) & 0x8000)


@triton.jit
def _fp16_bits_to_fp32(bits: tl.tensor) -> tl.tensor:
    """fp16 bits (int32) -> fp32 value; exact, and the fp16 subnormals are fp32 normals."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _bf16_bits_to_fp32(bits: tl.tensor) -> tl.tensor:
    """bf16 bits (int32) -> fp32 value; exact."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _block_scale(amax: tl.tensor, is_zero: tl.tensor, UE8M0: tl.constexpr, ZERO_IS_ONE: tl.constexpr) -> tl.tensor:
    """S of one block, fp32 scalar. `is_zero` comes from the bits: a float compare may take subnormals for zero."""
    scale = tl.div_rn(tl.maximum(amax, _AMAX_FLOOR), _FP8_MAX)
    if ZERO_IS_ONE:
        scale = tl.where(is_zero, 1.0, scale)
    if UE8M0:
        # -0x800000 is 0xFF800000 as int32.
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _e4m3_bits(x: tl.tensor) -> tl.tensor:
    """e4m3fn codes (uint8) of |x| <= 448 in fp32, nearest even, in integer operations only.

    Triton's interpreter loses the carry out of the mantissa in its own cast, and GPUs before 8.9 have no cast.
    The value is `mantissa * 2**(exponent - 150)`; a code keeps 3 bits of the mantissa, or, below 2**-6, multiples of
    2**-9. Both are a right shift with rounding. A carry into the next exponent comes out right by itself.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normals: drop 20 of 23 mantissa bits and change the exponent's bias from 127 to 7 (120 * 8 = 960).
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Subnormals: unit 2**-9. From a shift of 25 on everything rounds to 0; 21 is the least that is used here.
    shift = tl.minimum(tl.maximum(141 - (magnitude >> 23), 21), 25)
    mantissa = (magnitude & 0x7FFFFF) | 0x800000
    subnormal = (mantissa + (1 << (shift - 1)) - 1 + ((mantissa >> shift) & 1)) >> shift
    code = tl.where(magnitude >= 0x3C800000, normal, subnormal)  # 0x3C800000: bits of 2**-6
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _quantize_bits(
    bits: tl.tensor, KIND: tl.constexpr, UE8M0: tl.constexpr, ZERO_IS_ONE: tl.constexpr, HARDWARE_CAST: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One block of weights as integers -> its codes (uint8), its scale (fp32), whether it holds inf or NaN."""
    bits = _wire_bits(bits, KIND)
    largest = tl.max(tl.max(bits & 0x7FFF, axis=1), axis=0)
    return _quantize_given(bits, largest, KIND, UE8M0, ZERO_IS_ONE, HARDWARE_CAST)


@triton.jit
def _wire_bits(bits: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Weights as integers -> the bits of the 16-bit float that is quantized, int32."""
    bits = bits.to(tl.int32)
    if KIND == "fp32":
        bits = _round_fp32_bits_to_bf16(bits)
    return bits


@triton.jit
def _quantize_given(
    bits: tl.tensor,
    largest: tl.tensor,
    KIND: tl.constexpr,
    UE8M0: tl.constexpr,
    ZERO_IS_ONE: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """`_quantize_bits` for wire bits, given the largest `bits & 0x7fff` of the block, of which they may be a part."""
    if KIND == "fp16":
        x, amax, infinity = _fp16_bits_to_fp32(bits), _fp16_bits_to_fp32(largest), 0x7C00
    else:
        x, amax, infinity = _bf16_bits_to_fp32(bits), _bf16_bits_to_fp32(largest), 0x7F80
    scale = _block_scale(amax, largest == 0, UE8M0, ZERO_IS_ONE)
    # The product feeds a clamp, not an addition: there is nothing that it could be fused with.
    scaled = tl.minimum(tl.maximum(x * tl.div_rn(1.0, scale), -_FP8_MAX), _FP8_MAX)
    codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if HARDWARE_CAST else _e4m3_bits(scaled)
    return codes, scale, largest >= infinity


@triton.jit
def _quantize_block_kernel(
    weight_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    nonfinite_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_cols: tl.tensor,
    num_block_cols: tl.tensor,
    weight_stride_row: tl.tensor,
    weight_stride_col: tl.tensor,
    codes_stride_row: tl.tensor,
    codes_stride_col: tl.tensor,
    scale_stride_row: tl.tensor,
    scale_stride_col: tl.tensor,
    KIND: tl.constexpr,
    UE8M0: tl.constexpr,
    ZERO_IS_ONE: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Program p does block (p // num_block_cols, p % num_block_cols).

    weight: [num_rows, num_cols] bits, int16 (KIND "bf16", "fp16") or int32 (KIND "fp32"). codes: [num_rows, num_cols]
    uint8. scale: [num_block_rows, num_block_cols] fp32. nonfinite: int32 scalar.

    Example (tests/test_triton_quantize.py runs it): weight [1, 4] = [1.0, -0.5, 0.0, 448.0]
        amax = 448, so S = 448 / 448 = 1
        codes (bits) = [0x38, 0xB0, 0x00, 0x7E], scale [1, 1] = [[1.0]]
    """
    pid = tl.program_id(0)
    block_row = (pid // num_block_cols).to(tl.int64)
    block_col = (pid % num_block_cols).to(tl.int64)
    # int64: tensors of more than 2**31 elements are legal, and so are strides that large.
    rows = block_row * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE).to(tl.int64)[:, None]
    cols = block_col * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE).to(tl.int64)[None, :]
    inside = (rows < num_rows) & (cols < num_cols)

    weight_offsets = rows * weight_stride_row + cols * weight_stride_col
    bits = tl.load(weight_ptr + weight_offsets, mask=inside, other=0)
    codes, scale, is_nonfinite = _quantize_bits(bits, KIND, UE8M0, ZERO_IS_ONE, HARDWARE_CAST)
    # Every program that stores, stores the same value: no atomic needed.
    tl.store(nonfinite_ptr, 1, mask=is_nonfinite)
    tl.store(scale_ptr + block_row * scale_stride_row + block_col * scale_stride_col, scale)
    tl.store(codes_ptr + rows * codes_stride_row + cols * codes_stride_col, codes, mask=inside)


INTERPRETED = not isinstance(_quantize_block_kernel, triton.JITFunction)
"""True if TRITON_INTERPRET=1 was set when this module was imported: kernels run on the host, for tensors anywhere."""

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@functools.cache
def has_hardware_cast(device: torch.device) -> bool:
    """Whether fp32 -> e4m3 may be left to the device: NVIDIA from 8.9, never the interpreter."""
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@torch.no_grad()
def quantize_triton_into(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    nonfinite: Tensor,
    *,
    scale_fmt: ScaleFormat = "fp32",
    zero_scale: ZeroScale = "one",
) -> None:
    """Quantize `weight` into `codes` and `scale` in one launch on the current stream; no host synchronization.

    weight: [rows, cols] bf16, fp16 or fp32, any strides, never written to.
    codes: [rows, cols] float8_e4m3fn, any strides, overwritten.
    scale: [ceil(rows/128), ceil(cols/128)] fp32, any strides, overwritten with S.
    nonfinite: int32, one element; set to 1 if `weight` holds inf or NaN, else left alone.

    Raises `ConfigError` where an argument does not fit, or for tensors that are not on a GPU (unless the kernels are
    interpreted), before anything is written.
    """
    check_quantize_arguments(weight, codes, scale, nonfinite, scale_fmt, zero_scale)
    device = weight.device
    if device.type != "cuda" and not INTERPRETED:
        raise ConfigError(f"the Triton kernel needs CUDA tensors, or TRITON_INTERPRET=1; the weight is on {device}")
    if weight.numel() == 0:
        return
    as_bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _quantize_block_kernel[(scale.numel(),)](
            weight.view(as_bits),
            codes.view(torch.uint8),
            scale,
            nonfinite,
            *weight.shape,
            scale.shape[1],
            *weight.stride(),
            *codes.stride(),
            *scale.stride(),
            KIND=KINDS[weight.dtype],
            UE8M0=scale_fmt == "ue8m0",
            ZERO_IS_ONE=zero_scale == "one",
            HARDWARE_CAST=has_hardware_cast(device),
            BLOCK_SIZE=BLOCK,
            num_warps=_NUM_WARPS,
        )
