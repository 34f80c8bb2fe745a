"""Any number of rectangles of bytes, copied in one launch.

What a launch has to do stands in tables on the device, one row a rectangle, which programs look up by their number.
Rows are counted in units of `UNIT_BYTES`, which divides every address, width and stride of the launch. A row:

    first program, address of the source, address of the destination, rows, units a row, units from one row of the
    source to the next, units from one row of the destination to the next
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.rectangles import NUM_UNITS

NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_programs"])
def _copy_kernel(
    rectangles_ptr: tl.tensor,
    rectangle_of_program_ptr: tl.tensor,
    base_ptr: tl.tensor,
    num_programs: tl.tensor,
    RELATIVE: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    NUM_UNITS: tl.constexpr,
) -> None:
    """Program p copies `NUM_UNITS` units of rectangle `rectangle_of_program[p]`, or what is left of it, row by row.

    rectangles: [rectangles, 7] int64, rectangle_of_program: [programs] int32. No two rectangles write the same byte.
    RELATIVE: sources are not addresses, but count from `base`. Where fewer are launched than `num_programs`, each
    does the work of several.

    Example (tests/test_grouped_copy.py runs it): UNIT_BYTES = 1, row = (0, S, D, 2, 3, 5, 4)
        D[0:3] = S[0:3], D[4:7] = S[5:8]
    """
    # As few words a unit as there are; two of 8 bytes lie next to each other, so a thread moves both at once.
    WORDS: tl.constexpr = 2 if UNIT_BYTES == 16 else 1
    WORD: tl.constexpr = (
        tl.int64 if UNIT_BYTES == 16 else tl.int32 if UNIT_BYTES == 4 else tl.int16 if UNIT_BYTES == 2 else tl.int8
    )
    for pid in range(tl.program_id(0), num_programs, tl.num_programs(0)):
        row = rectangles_ptr + tl.load(rectangle_of_program_ptr + pid).to(tl.int64) * 7
        source, destination = tl.load(row + 1), tl.load(row + 2)
        if RELATIVE:
            source += base_ptr.to(tl.int64)
        rows, width = tl.load(row + 3), tl.load(row + 4)
        source_step, destination_step = tl.load(row + 5), tl.load(row + 6)
        first = (pid - tl.load(row)) * NUM_UNITS
        first_row = first // width
        first_column = first - first_row * width
        source_ptr = (source + (first_row * source_step + first_column) * UNIT_BYTES).to(tl.pointer_type(WORD))
        destination_ptr = (destination + (first_row * destination_step + first_column) * UNIT_BYTES).to(
            tl.pointer_type(WORD)
        )
        source_ptr = tl.multiple_of(source_ptr, UNIT_BYTES)
        destination_ptr = tl.multiple_of(destination_ptr, UNIT_BYTES)
        lanes, words = tl.arange(0, NUM_UNITS)[:, None], tl.arange(0, WORDS)[None, :]
        left = width - first_column  # of the first row
        if left >= NUM_UNITS:
            tl.store(destination_ptr + lanes * WORDS + words, tl.load(source_ptr + lanes * WORDS + words))
        else:
            over = lanes - left.to(tl.int32)  # units into the second row, and on; negative in the first one
            short = tl.minimum(width, NUM_UNITS).to(tl.int32)  # a longer row has no third one within reach
            later = tl.maximum(over, 0) // short
            column = tl.where(over < 0, lanes, over - later * short - first_column)  # from the first one
            later = tl.where(over < 0, 0, later + 1).to(tl.int64)
            inside = first_row + later < rows
            at = (later * source_step + column) * WORDS
            bits = tl.load(source_ptr + at + words, mask=inside, other=0)
            at = (later * destination_step + column) * WORDS
            tl.store(destination_ptr + at + words, bits, mask=inside)


def copy_rectangles(
    rectangles: Tensor,
    rectangle_of_program: Tensor,
    *,
    unit_bytes: int,
    source: Tensor | None = None,
    num_units: int = NUM_UNITS,
    num_warps: int = NUM_WARPS,
    most_programs: int | None = None,
) -> None:
    """One launch on the current stream and device; tables as in this module's docstring, checked by the caller.

    `source`: flat uint8 on 16 bytes, if sources count from its first byte. `most_programs`: that are there at a time,
    so that others find room on the device beside a copy that waits for a link.
    """
    base, relative = (rectangles, False) if source is None else (source, True)
    num_programs = rectangle_of_program.numel()
    _copy_kernel[(min(num_programs, most_programs or num_programs),)](
        rectangles,
        rectangle_of_program,
        base,
        num_programs,
        RELATIVE=relative,
        UNIT_BYTES=unit_bytes,
        NUM_UNITS=num_units,
        num_warps=num_warps,
    )


@cache
def warm(device: torch.device, unit_bytes: int, relative: bool = False) -> None:
    """Compile and load, so that no push does: copies one unit of nothing. `device` is the current one."""
    memory = torch.zeros(2 * unit_bytes, dtype=torch.uint8, device=device)
    first = 0 if relative else memory.data_ptr()
    table = torch.tensor([(0, first, memory.data_ptr() + unit_bytes, 1, 1, 0, 0)], dtype=torch.int64).to(device)
    program = torch.zeros(1, dtype=torch.int32, device=device)
    copy_rectangles(table, program, unit_bytes=unit_bytes, source=memory if relative else None)
