"""All tensors of a bucket in one launch: quantized (`_quantize_many_kernel`) or copied (`_copy_many_kernel`).

What a launch has to do stands in tables on the device, one row a tensor, which programs look up by their number. The
numbers are those of `sender.triton_quantize`; inf and NaN are found in the same pass. Rows of the tables:

    where      address of the weight in memory, elements from one of its rows to the next
    tasks      first program, block columns (or elements a program), rows, cols, offset of the values and of the scale
               in the bucket (bytes), row of the non-finite flag
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sender.triton_quantize import KINDS, _quantize_bits, _wire_bits, has_hardware_cast
from shared.numerics import BLOCK, ScaleFormat, ZeroScale

COPY_ELEMENTS = 8192  # a program of the copy kernel
_NUM_WARPS = 4
TASK_FIELDS = 7


@triton.jit
def _quantize_many_kernel(
    where_ptr: tl.tensor,
    tasks_ptr: tl.tensor,
    task_of_program_ptr: tl.tensor,
    out_ptr: tl.tensor,
    nonfinite_ptr: tl.tensor,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
    UE8M0: tl.constexpr,
    ZERO_IS_ONE: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Program p does one 128x128 block of tensor `task_of_program[p]`.

    where: [tasks, 2] int64, tasks: [tasks, 7] int64, task_of_program: [programs] int32, out: flat uint8 bucket,
    nonfinite: int32. EVEN: whole blocks only, and every address and row a multiple of 16 bytes.
    """
    pid = tl.program_id(0)
    task = tl.load(task_of_program_ptr + pid).to(tl.int64)
    row = tasks_ptr + task * 7
    local = pid - tl.load(row).to(tl.int32)
    num_block_cols = tl.load(row + 1).to(tl.int32)
    block_row, block_col = (local // num_block_cols).to(tl.int64), (local % num_block_cols).to(tl.int64)
    num_cols = tl.load(row + 3)
    address, stride = tl.load(where_ptr + task * 2), tl.load(where_ptr + task * 2 + 1)
    weight_ptr = address.to(tl.pointer_type(tl.int32) if KIND == "fp32" else tl.pointer_type(tl.int16))
    codes_ptr = out_ptr + tl.load(row + 4)
    if EVEN:
        weight_ptr = tl.multiple_of(weight_ptr + block_row * BLOCK_SIZE * stride + block_col * BLOCK_SIZE, 16)
        codes_ptr = tl.multiple_of(codes_ptr + block_row * BLOCK_SIZE * num_cols + block_col * BLOCK_SIZE, 16)
        stride, num_cols = tl.multiple_of(stride.to(tl.int32), 8), tl.multiple_of(num_cols.to(tl.int32), 16)
        rows, cols = tl.arange(0, BLOCK_SIZE)[:, None], tl.arange(0, BLOCK_SIZE)[None, :]
        bits = tl.load(weight_ptr + rows * stride + cols)
        codes, scale, is_nonfinite = _quantize_bits(bits, KIND, UE8M0, ZERO_IS_ONE, HARDWARE_CAST)
        tl.store(codes_ptr + rows * num_cols + cols, codes)
    else:
        rows = block_row * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE).to(tl.int64)[:, None]
        cols = block_col * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE).to(tl.int64)[None, :]
        inside = (rows < tl.load(row + 2)) & (cols < num_cols)
        bits = tl.load(weight_ptr + rows * stride + cols, mask=inside, other=0)
        codes, scale, is_nonfinite = _quantize_bits(bits, KIND, UE8M0, ZERO_IS_ONE, HARDWARE_CAST)
        tl.store(codes_ptr + rows * num_cols + cols, codes, mask=inside)
    scale_ptr = (out_ptr + tl.load(row + 5)).to(tl.pointer_type(tl.float32))
    tl.store(scale_ptr + local, scale)
    # Every program that stores, stores the same value: no atomic needed.
    tl.store(nonfinite_ptr + tl.load(row + 6), 1, mask=is_nonfinite)


@triton.jit
def _copy_many_kernel(
    where_ptr: tl.tensor,
    tasks_ptr: tl.tensor,
    task_of_program_ptr: tl.tensor,
    out_ptr: tl.tensor,
    nonfinite_ptr: tl.tensor,
    INFINITY: tl.constexpr,
    NUM_ELEMENTS: tl.constexpr,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Program p copies `NUM_ELEMENTS` floats of contiguous tensor `task_of_program[p]`, one row of `cols`, as 16 bits.
    EVEN: 16 divides both addresses."""
    pid = tl.program_id(0)
    task = tl.load(task_of_program_ptr + pid).to(tl.int64)
    row = tasks_ptr + task * 7
    first = (pid - tl.load(row)) * NUM_ELEMENTS
    address = tl.load(where_ptr + task * 2)
    from_ptr = address.to(tl.pointer_type(tl.int32) if KIND == "fp32" else tl.pointer_type(tl.int16)) + first
    to_ptr = (out_ptr + tl.load(row + 4)).to(tl.pointer_type(tl.int16)) + first
    if EVEN:
        from_ptr, to_ptr = tl.multiple_of(from_ptr, 16), tl.multiple_of(to_ptr, 16)
    at = tl.arange(0, NUM_ELEMENTS)
    left = tl.load(row + 3) - first
    if left >= NUM_ELEMENTS:  # without a mask: 16 bytes at a time
        bits = _wire_bits(tl.load(from_ptr + at), KIND)
        tl.store(to_ptr + at, bits.to(tl.int16))
    else:
        bits = _wire_bits(tl.load(from_ptr + at, mask=at < left, other=0), KIND)
        tl.store(to_ptr + at, bits.to(tl.int16), mask=at < left)
    largest = tl.max(bits & 0x7FFF, axis=0)
    tl.store(nonfinite_ptr + tl.load(row + 6), 1, mask=largest >= INFINITY)


def quantize_many(
    where: Tensor,
    tasks: Tensor,
    task_of_program: Tensor,
    out: Tensor,
    nonfinite: Tensor,
    *,
    dtype: torch.dtype,
    even: bool,
    scale_fmt: ScaleFormat,
    zero_scale: ZeroScale,
    num_warps: int = _NUM_WARPS,
) -> None:
    """One launch on the current stream and device; tables as in this module's docstring, checked by the caller."""
    _quantize_many_kernel[(task_of_program.numel(),)](
        where,
        tasks,
        task_of_program,
        out,
        nonfinite,
        KIND=KINDS[dtype],
        EVEN=even,
        UE8M0=scale_fmt == "ue8m0",
        ZERO_IS_ONE=zero_scale == "one",
        HARDWARE_CAST=has_hardware_cast(out.device),
        BLOCK_SIZE=BLOCK,
        num_warps=num_warps,
    )


def copy_many(
    where: Tensor,
    tasks: Tensor,
    task_of_program: Tensor,
    out: Tensor,
    nonfinite: Tensor,
    *,
    dtype: torch.dtype,
    even: bool,
) -> None:
    """One launch on the current stream and device, for contiguous floats; those of 32 bits are rounded to BF16."""
    _copy_many_kernel[(task_of_program.numel(),)](
        where,
        tasks,
        task_of_program,
        out,
        nonfinite,
        INFINITY=0x7C00 if dtype == torch.float16 else 0x7F80,
        NUM_ELEMENTS=COPY_ELEMENTS,
        KIND=KINDS[dtype],
        EVEN=even,
        num_warps=_NUM_WARPS,
    )
