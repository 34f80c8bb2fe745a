"""The digest of `shared.digest` on a GPU: one launch that reads every byte once and waits for nothing.

    digest = sum over places i of  T[i] * (sum over pages p of A[p] * word[p, i])    (mod 2^64)

which is the same sum in another order. A program takes `NUM_WORDS` neighbouring places in up to `NUM_PAGES` pages: it
loads their multipliers T once for all of its pages, else the table would cost twice the bytes of the data. Programs add
to one number; addition modulo 2^64 is the same in any order, so the result is too.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WORDS = 1024
NUM_PAGES = 8
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["start", "end"])
def _digest_kernel(
    words_ptr: tl.tensor,
    table_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    out_ptr: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    EVEN: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
) -> None:
    """Program (c, g) does places [c * NUM_WORDS, (c + 1) * NUM_WORDS) of pages [g * NUM_PAGES, (g + 1) * NUM_PAGES).

    Positions count words from the start of page 0. words: int32, those of positions [start, end), 0 <= start <
    PAGE_WORDS. table: int64, T. pages: int64, A from page 0 on. out: int64, one number, added to. EVEN: the address of
    position 0, which need not exist, is a multiple of 16 bytes. NUM_WORDS divides PAGE_WORDS.
    """
    first_place = tl.program_id(0).to(tl.int64) * NUM_WORDS
    first_page = tl.program_id(1).to(tl.int64) * NUM_PAGES
    lanes = tl.arange(0, NUM_WORDS)
    zero_ptr = words_ptr - start
    if EVEN:
        zero_ptr = tl.multiple_of(zero_ptr, 16)
    sums = tl.zeros((NUM_WORDS,), dtype=tl.int64)
    for number in tl.static_range(NUM_PAGES):
        page = first_page + number
        first = page * PAGE_WORDS + first_place
        # One truth value for all: with a mask of its own for each word they would be read 4 bytes at a time.
        whole = (first >= start) & (first + NUM_WORDS <= end)
        words = tl.load(zero_ptr + first + lanes, mask=whole, other=0)
        sums += words.to(tl.int64) * tl.load(pages_ptr + page, mask=whole, other=0)
    # What is left are two chunks at most: that of the start, in page 0, and that of the end, in the last page.
    last_page = ((end - 1) // PAGE_WORDS).to(tl.int64)
    for edge in range(2):
        edge_page = last_page * edge
        position = edge_page * PAGE_WORDS + first_place
        mine = (edge_page >= first_page) & (edge_page < first_page + NUM_PAGES) & (edge <= last_page)
        partly = (position < start) | (position + NUM_WORDS > end)
        if mine & partly & (position < end) & (position + NUM_WORDS > start):
            inside = (position + lanes >= start) & (position + lanes < end)
            edge_words = tl.load(zero_ptr + position + lanes, mask=inside, other=0)
            sums += edge_words.to(tl.int64) * tl.load(pages_ptr + edge_page)
    total = tl.sum(sums * tl.load(table_ptr + first_place + lanes), axis=0)
    tl.atomic_add(out_ptr, total, sem="relaxed")


def digest_many(
    words: Tensor,
    table: Tensor,
    pages: Tensor,
    start: int,
    *,
    num_words: int = NUM_WORDS,
    num_pages: int = NUM_PAGES,
    num_warps: int = _NUM_WARPS,
) -> Tensor:
    """The digest of `words`, int64 (0-d, on their device), in one launch on the current stream, without waiting for it.

    words: [n] int32, n > 0, the first one at place `start` of page 0; table: [page] int64, all of T; pages: [as many
    as `words` touch] int64. All contiguous and on one device; checked by the caller.
    """
    (page_words,) = table.shape
    end, num_words = start + words.numel(), min(num_words, page_words)
    last_place = page_words if end > page_words else end
    grid = (triton.cdiv(last_place, num_words), triton.cdiv(pages.numel(), num_pages))
    out = torch.zeros((), dtype=torch.int64, device=words.device)
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(words.device) if words.device.type == "cuda" else contextlib.nullcontext():
        _digest_kernel[grid](
            words,
            table,
            pages,
            out,
            start,
            end,
            EVEN=(words.data_ptr() - 4 * start) % 16 == 0,
            PAGE_WORDS=page_words,
            NUM_WORDS=num_words,
            NUM_PAGES=num_pages,
            num_warps=num_warps,
        )
    return out
