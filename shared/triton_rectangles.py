"""The digest of `shared.digest` over rectangles of bytes that lie apart, in one launch.

Tables are those of `shared.triton_copy`, where the destination of a rectangle is the place of its bytes in the data
that the digest is of, in bytes, and the steps there are those of its rows.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.rectangles import NUM_UNITS

NUM_WARPS = 4


@triton.jit
def _digest_kernel(
    rectangles_ptr: tl.tensor,
    rectangle_of_program_ptr: tl.tensor,
    base_ptr: tl.tensor,
    table_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    out_ptr: tl.tensor,
    RELATIVE: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    NUM_UNITS: tl.constexpr,
) -> None:
    """Program p adds the share of `NUM_UNITS` units of rectangle `rectangle_of_program[p]`, or what is left of it.

    rectangles: [rectangles, 7] int64, rectangle_of_program: [programs] int32; RELATIVE: addresses count from `base`.
    table: int64, T; pages: int64, A from the first page of the data on; out: int64, one number, added to.
    """
    WIDE: tl.constexpr = UNIT_BYTES >= 4  # words; else bytes, of which four neighbours share a multiplier
    PARTS: tl.constexpr = UNIT_BYTES // 4 if WIDE else UNIT_BYTES
    PART: tl.constexpr = tl.int32 if WIDE else tl.uint8
    PAGE_PARTS: tl.constexpr = PAGE_WORDS if WIDE else PAGE_WORDS * 4
    pid = tl.program_id(0)
    row = rectangles_ptr + tl.load(rectangle_of_program_ptr + pid).to(tl.int64) * 7
    address, place = tl.load(row + 1), tl.load(row + 2)
    rows, width = tl.load(row + 3), tl.load(row + 4)
    address_step, place_step = tl.load(row + 5), tl.load(row + 6)
    if RELATIVE:
        address += base_ptr.to(tl.int64)
    first = (pid - tl.load(row)) * NUM_UNITS
    first_row = first // width
    first_column = first - first_row * width
    parts_ptr = (address + (first_row * address_step + first_column) * UNIT_BYTES).to(tl.pointer_type(PART))
    parts_ptr = tl.multiple_of(parts_ptr, UNIT_BYTES)
    place = (place + (first_row * place_step + first_column) * UNIT_BYTES) // (4 if WIDE else 1)
    lanes, parts = tl.arange(0, NUM_UNITS)[:, None], tl.arange(0, PARTS)[None, :]
    left = width - first_column  # of the first row
    if left >= NUM_UNITS:
        bits = tl.load(parts_ptr + lanes * PARTS + parts)
        places = place + lanes * PARTS + parts
    else:
        over = lanes - left.to(tl.int32)  # units into the second row, and on; negative in the first one
        short = tl.minimum(width, NUM_UNITS).to(tl.int32)  # a longer row has no third one within reach
        later = tl.maximum(over, 0) // short
        column = tl.where(over < 0, lanes, over - later * short - first_column)  # from the first one
        later = tl.where(over < 0, 0, later + 1).to(tl.int64)
        inside = first_row + later < rows
        bits = tl.load(parts_ptr + (later * address_step + column) * PARTS + parts, mask=inside, other=0)
        places = tl.where(inside, place + (later * place_step + column) * PARTS + parts, 0)
    values = bits.to(tl.int64)
    words = places % PAGE_PARTS
    if not WIDE:  # the last byte of a word has its sign
        at = (places % 4).to(tl.int64)
        values = tl.where((at == 3) & (values > 127), values - 256, values) << (8 * at)
        words = words // 4
    values *= tl.load(table_ptr + words) * tl.load(pages_ptr + places // PAGE_PARTS)
    tl.atomic_add(out_ptr, tl.sum(tl.sum(values, axis=1), axis=0), sem="relaxed")


def digest_rectangles(
    rectangles: Tensor,
    rectangle_of_program: Tensor,
    table: Tensor,
    pages: Tensor,
    out: Tensor,
    *,
    unit_bytes: int,
    source: Tensor | None = None,
    num_units: int = NUM_UNITS,
) -> None:
    """One launch on the current stream and device. `source`: flat uint8 on 16 bytes, if addresses count from it."""
    base, relative = (rectangles, False) if source is None else (source, True)
    _digest_kernel[(rectangle_of_program.numel(),)](
        rectangles,
        rectangle_of_program,
        base,
        table,
        pages,
        out,
        RELATIVE=relative,
        PAGE_WORDS=table.numel(),
        UNIT_BYTES=unit_bytes,
        NUM_UNITS=num_units,
        num_warps=NUM_WARPS,
    )


@cache
def warm(device: torch.device, unit_bytes: int, page_words: int, relative: bool) -> None:
    """Compile and load, so that no push does. `device` is the current one."""
    memory = torch.zeros(16, dtype=torch.uint8, device=device)
    table = torch.tensor([(0, 0 if relative else memory.data_ptr(), 0, 1, 1, 0, 0)], dtype=torch.int64).to(device)
    program = torch.zeros(1, dtype=torch.int32, device=device)
    numbers = torch.zeros(page_words + 2, dtype=torch.int64, device=device)
    parts = numbers[:page_words], numbers[page_words:], torch.zeros(1, dtype=torch.int64, device=device)
    digest_rectangles(table, program, *parts, unit_bytes=unit_bytes, source=memory if relative else None)
