"""The rows of blocks that lie on more than one rank, and the chunks of all ranks, each in one launch.

    _amax_rows_kernel       this rank's part of the maxima of such blocks
    _quantize_rows_kernel   this rank's rows of them, given the maxima of all ranks
    _move_kernel            runs of bytes from one flat buffer into another

Tables on the device say what a launch has to do, as in `sender.triton_grouped`, which quantizes whole blocks. Rows:

    where      address of the rows in memory, elements from one row to the next
    tasks      first program, block columns, rows, cols, offset of the codes in the chunk (bytes), that of the scale or
               -1, number of the flag, place of the maxima; one row of blocks each
    moves      first program, words to move, word that they are moved from, and to
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sender.triton_quantize import KINDS, _quantize_given, _wire_bits, has_hardware_cast
from shared.numerics import BLOCK, ScaleFormat, ZeroScale

MOVE_WORDS = 4096  # a program of the moving kernel
_NUM_WARPS = 4


@triton.jit
def _load_rows(
    where_ptr: tl.tensor, row: tl.tensor, task: tl.tensor, block_col: tl.tensor, KIND: tl.constexpr, SIZE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One block column of the rows of a task, as wire bits (int32; 0 outside); offsets in codes of them; the mask."""
    rows, cols = tl.arange(0, SIZE).to(tl.int64)[:, None], block_col * SIZE + tl.arange(0, SIZE).to(tl.int64)[None, :]
    num_cols = tl.load(row + 3)
    inside = (rows < tl.load(row + 2)) & (cols < num_cols)
    address, stride = tl.load(where_ptr + task * 2), tl.load(where_ptr + task * 2 + 1)
    from_ptr = address.to(tl.pointer_type(tl.int32) if KIND == "fp32" else tl.pointer_type(tl.int16))
    bits = tl.load(from_ptr + rows * stride + cols, mask=inside, other=0)
    return _wire_bits(bits, KIND), rows * num_cols + cols, inside


@triton.jit
def _amax_rows_kernel(
    where_ptr: tl.tensor,
    tasks_ptr: tl.tensor,
    task_of_program_ptr: tl.tensor,
    amax_ptr: tl.tensor,
    KIND: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Program p finds the largest `bits & 0x7fff` of one block column of task `task_of_program[p]`, into int32 amax."""
    pid = tl.program_id(0)
    task = tl.load(task_of_program_ptr + pid).to(tl.int64)
    row = tasks_ptr + task * 8
    block_col = pid - tl.load(row)
    bits, _, _ = _load_rows(where_ptr, row, task, block_col, KIND, BLOCK_SIZE)
    tl.store(amax_ptr + tl.load(row + 7) + block_col, tl.max(tl.max(bits & 0x7FFF, axis=1), axis=0))


@triton.jit
def _quantize_rows_kernel(
    where_ptr: tl.tensor,
    tasks_ptr: tl.tensor,
    task_of_program_ptr: tl.tensor,
    amax_ptr: tl.tensor,
    out_ptr: tl.tensor,
    nonfinite_ptr: tl.tensor,
    KIND: tl.constexpr,
    UE8M0: tl.constexpr,
    ZERO_IS_ONE: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Program p does one block column of task `task_of_program[p]`. out: flat uint8 chunk, nonfinite: int32 flags."""
    pid = tl.program_id(0)
    task = tl.load(task_of_program_ptr + pid).to(tl.int64)
    row = tasks_ptr + task * 8
    block_col = pid - tl.load(row)
    bits, offsets, inside = _load_rows(where_ptr, row, task, block_col, KIND, BLOCK_SIZE)
    largest = tl.load(amax_ptr + tl.load(row + 7) + block_col)
    codes, scale, is_nonfinite = _quantize_given(bits, largest, KIND, UE8M0, ZERO_IS_ONE, HARDWARE_CAST)
    tl.store(out_ptr + tl.load(row + 4) + offsets, codes, mask=inside)
    scale_at = tl.load(row + 5)
    scale_ptr = (out_ptr + tl.maximum(scale_at, 0)).to(tl.pointer_type(tl.float32))
    tl.store(scale_ptr + block_col, scale, mask=scale_at >= 0)
    # Every program that stores, stores the same value: no atomic needed.
    tl.store(nonfinite_ptr + tl.load(row + 6), 1, mask=is_nonfinite)


@triton.jit
def _move_kernel(
    moves_ptr: tl.tensor,
    move_of_program_ptr: tl.tensor,
    from_ptr: tl.tensor,
    to_ptr: tl.tensor,
    NUM_WORDS: tl.constexpr,
) -> None:
    """Program p moves `NUM_WORDS` words of run `move_of_program[p]`, or what is left of it."""
    pid = tl.program_id(0)
    row = moves_ptr + tl.load(move_of_program_ptr + pid).to(tl.int64) * 4
    at = (pid - tl.load(row)) * NUM_WORDS + tl.arange(0, NUM_WORDS)
    inside = at < tl.load(row + 1)
    words = tl.load(from_ptr + tl.load(row + 2) + at, mask=inside)
    tl.store(to_ptr + tl.load(row + 3) + at, words, mask=inside)


def amax_rows(where: Tensor, tasks: Tensor, task_of_program: Tensor, amax: Tensor, *, dtype: torch.dtype) -> None:
    """One launch on the current stream and device; tables as in this module's docstring, checked by the caller."""
    _amax_rows_kernel[(task_of_program.numel(),)](
        where, tasks, task_of_program, amax, KIND=KINDS[dtype], BLOCK_SIZE=BLOCK, num_warps=_NUM_WARPS
    )


def quantize_rows(
    where: Tensor,
    tasks: Tensor,
    task_of_program: Tensor,
    amax: Tensor,
    out: Tensor,
    nonfinite: Tensor,
    *,
    dtype: torch.dtype,
    scale_fmt: ScaleFormat,
    zero_scale: ZeroScale,
) -> None:
    """As `amax_rows`."""
    _quantize_rows_kernel[(task_of_program.numel(),)](
        where,
        tasks,
        task_of_program,
        amax,
        out,
        nonfinite,
        KIND=KINDS[dtype],
        UE8M0=scale_fmt == "ue8m0",
        ZERO_IS_ONE=zero_scale == "one",
        HARDWARE_CAST=has_hardware_cast(out.device),
        BLOCK_SIZE=BLOCK,
        num_warps=_NUM_WARPS,
    )


def move(moves: Tensor, move_of_program: Tensor, source: Tensor, target: Tensor) -> None:
    """As `amax_rows`; `source` and `target` are flat, of one type, which is the word of `moves`."""
    _move_kernel[(move_of_program.numel(),)](
        moves, move_of_program, source, target, NUM_WORDS=MOVE_WORDS, num_warps=_NUM_WARPS
    )
