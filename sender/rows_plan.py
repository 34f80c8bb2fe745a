"""Quantize before the gather: what each trainer rank makes of its rows, and how it lies in what goes to who packs.

A rank quantizes the rows that it holds of a tensor, as up to three parts: rows of a block that begins on an earlier
rank, whole blocks, and the first rows of a block that ends on a later rank. For the first and the last, which cross,
the largest magnitudes of all ranks are put together ahead of the push, in one buffer for the whole model; the rank with
the first row of a block writes its scale. Of a tensor that is not quantized it copies its rows.

For every bucket a rank sends one chunk, flat uint8: the bytes of the bucket that are its own (codes of its rows, scales
of the blocks that begin in them, rows as they are), in the order of the bucket, then an int32 for each tensor that it
has rows of, not 0 where it found inf or NaN. Bytes that are neighbours in the bucket, or have nothing but alignment
between them, stay together, so that a rank's experts are one run of bytes.

    rank 1's chunk   | codes of its rows of q_proj | their scales | experts 16-31, codes and scales | flags |

Made once, from facts that are the same on every rank (`sender.sharding`), so no message says which way a tensor goes.
A tensor goes this way if it is a run of whole rows of a parameter that is sharded by rows; an expert is, in a parameter
of all experts. All others are gathered whole and quantized where they are packed.

Where every rank writes what it holds itself (`sender.slices`), chunks stay where they are made. Else
buckets are packed by `senders` in turn (rank 0 alone, unless several ranks send). Of the chunks of other ranks a rank
lays out those of the buckets that it packs itself, and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from sender.hf_names import Cut, Cuts
from sender.sharding import ShardedRows, Sharding
from shared.buckets import ALIGNMENT_BYTES, Entry, Layout, Slot
from shared.numerics import BLOCK

FLAG_BYTES = 4
_COPIES = {("torch.bfloat16",) * 2, ("torch.float16",) * 2, ("torch.float32", "torch.bfloat16")}


@dataclass(frozen=True)
class Part:
    """Rows of one tensor on this rank: whole blocks, or (`amax_at` is not None) a part of one row of blocks.

    They are rows `first_row` and following of what the rank holds of parameter number `parameter`. `codes_at` and
    `scale_at` are bytes in the chunk; the scale is another rank's, or there is none, where `scale_at` is None. `flag`:
    the number of the tensor's flag in the chunk. `amax_at`: where the row of blocks has its ceil(num_cols/128) values
    in the buffer. `copied_as`: not quantized, but copied, in this type; `codes_at` is where to.
    """

    parameter: int
    first_row: int
    num_rows: int
    num_cols: int
    codes_at: int
    scale_at: int | None
    flag: int
    amax_at: int | None
    copied_as: torch.dtype | None = None


@dataclass(frozen=True)
class Run:
    """`num_bytes` at `from_byte` of the chunks of all ranks, laid end to end, that go to `to_byte` of the bucket."""

    from_byte: int
    to_byte: int
    num_bytes: int


@dataclass(frozen=True)
class BucketRows:
    """One bucket. `flags_at`: bytes in the chunk of this rank. On the rank that packs it also `chunk_bytes` of
    every rank, what lies in the chunks, and pairs (number of an int32 of the chunks, of the tensor of that flag)."""

    parts: tuple[Part, ...]
    flags_at: int
    num_bytes: int
    chunk_bytes: tuple[int, ...] = ()
    runs: tuple[Run, ...] = ()
    flags: tuple[tuple[int, int], ...] = ()

    def flags_of(self, chunk: torch.Tensor) -> torch.Tensor:
        """The int32 flags of this rank in `chunk`, flat uint8."""
        return chunk[self.flags_at : self.num_bytes].view(torch.int32)


@dataclass(frozen=True)
class RowsPlan:
    """`names`: the tensors that come so, quantized or copied. `buckets`: by number, None for one without any.
    `num_amax`: values in the buffer of the blocks that cross ranks. `num_bytes`: codes and scales of all ranks.
    `senders`: bucket i goes to the rank that is number i modulo their number; `stays`: to none, all keep theirs.
    """

    rank: int
    num_ranks: int
    names: frozenset[str]
    buckets: tuple[BucketRows | None, ...]
    num_amax: int
    num_bytes: int
    made_for: tuple[tuple[ShardedRows, ...], Cuts] = field(repr=False)
    senders: tuple[int, ...] = (0,)
    stays: bool = False

    def still_holds(self, sharding: Sharding, cuts: Cuts, senders: tuple[int, ...] = (0,)) -> bool:
        parameters, known = self.made_for
        same = parameters == sharding.parameters and senders == self.senders
        return same and (not parameters or known == cuts)

    def goes_to(self, index: int) -> int:
        """The rank that packs bucket `index`."""
        return self.senders[index % len(self.senders)]


def plan_rows(
    layout: Layout,
    sharding: Sharding,
    cuts: Cuts,
    rank: int,
    num_ranks: int,
    senders: tuple[int, ...] = (0,),
    stays: bool = False,
) -> RowsPlan:
    """`cuts`: the tensors of every parameter of `sharding`, by its name."""
    sources = dict(_sources(sharding, cuts))
    maker = _Maker(sharding.parameters, rank)
    number = 0
    for bucket in layout.buckets:
        packs = not stays and senders[bucket.index % len(senders)] == rank
        maker.begin([rank] if stays else range(num_ranks) if packs else ())
        for entry in bucket.entries:
            if (source := sources.get(entry.tensor.name)) is not None and _fits(entry, sharding, source):
                maker.add(entry, number, *source)
            number += 1
        maker.end()
    names, buckets = frozenset(maker.names), tuple(maker.buckets)
    made_for = (sharding.parameters, cuts)
    return RowsPlan(rank, num_ranks, names, buckets, maker.num_amax, maker.num_bytes, made_for, senders, stays)


def held_bytes(layout: Layout, sharding: Sharding, cuts: Cuts, num_ranks: int) -> list[int]:
    """What each rank makes of its rows for those that pack; 0 where tensors are gathered whole."""
    sources, held = dict(_sources(sharding, cuts)), [0] * num_ranks
    for bucket in layout.buckets:
        for entry in bucket.entries:
            if (source := sources.get(entry.tensor.name)) is None or not _fits(entry, sharding, source):
                continue
            parameter, first_row = sharding.parameters[source[0]], source[1]
            rows = prod(entry.tensor.shape) // parameter.num_cols
            for rank, first, stop in _spread(parameter, first_row, rows):
                held[rank] += (stop - first) * parameter.num_cols * entry.values.dtype.itemsize
                if entry.scale is not None:
                    num_blocks = -(-stop // BLOCK) - -(-first // BLOCK)  # those that begin in these rows
                    held[rank] += num_blocks * entry.scale.num_bytes // entry.scale.shape[0]
    return held


def _fits(entry: Entry, sharding: Sharding, source: tuple[int, int]) -> bool:
    """Whether blocks of `entry` are blocks of the rows of its parameter; without blocks, whether rows can be copied."""
    parameter, shape = sharding.parameters[source[0]], entry.tensor.shape
    if entry.scale is not None:
        return len(shape) == 2 and shape[1] == parameter.num_cols
    return (parameter.dtype, str(entry.values.dtype)) in _COPIES


def _spread(held: ShardedRows, first_row: int, num_rows: int) -> Iterator[tuple[int, int, int]]:
    """The ranks that hold some of rows `first_row` and following, and which: from the first to before the last."""
    for rank in range(first_row // held.rows_per_rank, (first_row + num_rows - 1) // held.rows_per_rank + 1):
        start, end = held.of(rank)
        yield rank, max(start - first_row, 0), min(end - first_row, num_rows)


def _sources(sharding: Sharding, cuts: Cuts) -> Iterator[tuple[str, tuple[int, int]]]:
    """The tensors that are whole rows of such a parameter: its number, and the row of it that is their first."""
    for number, parameter in enumerate(sharding.parameters):
        for cut in cuts[parameter.name]:
            if _is_rows(cut, parameter):
                yield cut.name, (number, cut.offset // parameter.num_cols)


def _is_rows(cut: Cut, parameter: ShardedRows) -> bool:
    num_elements = prod(cut.shape)
    if not num_elements or num_elements % parameter.num_cols or cut.offset % parameter.num_cols:
        return False
    inner = 1
    for length, stride in zip(reversed(cut.shape), reversed(cut.strides), strict=True):
        if length != 1 and stride != inner:
            return False
        inner *= length
    return True


class _Chunk:
    """What one rank sends for one bucket, as it grows."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.flags: list[int] = []  # the numbers of the tensors
        self.flags_at = 0  # the first aligned byte behind the runs
        self._slot_ended = False

    def place(self, slot: Slot, start: int, stop: int) -> int:
        """Take in the bytes from `start` to `stop` of `slot`; where in the chunk they begin."""
        at, last = slot.offset_bytes + start, self.runs[-1] if self.runs else Run(0, 0, 0)
        if self._slot_ended and start == 0 and at - last.to_byte - last.num_bytes < ALIGNMENT_BYTES:
            run = Run(last.from_byte, last.to_byte, at + stop - start - last.to_byte)
            self.runs[-1] = run
        else:  # as far from a border of the alignment as in the bucket, so that both can be copied in the same words
            run = Run(self.flags_at + at % ALIGNMENT_BYTES, at, stop - start)
            self.runs.append(run)
        self._slot_ended = stop == slot.num_bytes
        self.flags_at = _aligned(run.from_byte + run.num_bytes)
        return run.from_byte + at - run.to_byte

    @property
    def num_bytes(self) -> int:
        return _aligned(self.flags_at + FLAG_BYTES * len(self.flags))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class _Maker:
    """Goes through the tensors in the order of the layout. Who packs a bucket lays out the chunks of all ranks."""

    def __init__(self, parameters: tuple[ShardedRows, ...], rank: int) -> None:
        self._parameters, self._rank = parameters, rank
        self.names: list[str] = []
        self.buckets: list[BucketRows | None] = []
        self.num_amax = self.num_bytes = 0

    def begin(self, laid_out: Sequence[int]) -> None:
        """`laid_out`: the ranks whose chunks of the bucket come to this one."""
        self._parts: list[Part] = []
        self._laid_out = laid_out
        self._chunks = {rank: _Chunk() for rank in self._laid_out or [self._rank]}
        self._is_used = False

    def end(self) -> None:
        mine, sizes, runs, flags = self._chunks[self._rank], list[int](), list[Run](), list[tuple[int, int]]()
        for rank in self._laid_out:
            chunk, start = self._chunks[rank], sum(sizes)
            runs += [Run(start + run.from_byte, run.to_byte, run.num_bytes) for run in chunk.runs]
            first = (start + chunk.flags_at) // FLAG_BYTES
            flags += [(first + place, number) for place, number in enumerate(chunk.flags)]
            sizes.append(chunk.num_bytes)
        rows = BucketRows(tuple(self._parts), mine.flags_at, mine.num_bytes, tuple(sizes), tuple(runs), tuple(flags))
        self.buckets.append(rows if self._is_used else None)

    def add(self, entry: Entry, number: int, parameter: int, first_row: int) -> None:
        """Tensor `number`, which begins at row `first_row` of `parameter`."""
        held, scale, copied_as = self._parameters[parameter], entry.scale, None
        rows, cols = prod(entry.tensor.shape) // held.num_cols, held.num_cols
        row_bytes, scale_row_bytes, amax_at = cols * entry.values.dtype.itemsize, 0, dict[int, int]()
        self._is_used = True
        self.names.append(entry.tensor.name)
        if scale is None:
            copied_as = entry.values.dtype
        else:
            self.num_bytes += entry.values.num_bytes + scale.num_bytes
            scale_row_bytes = scale.num_bytes // scale.shape[0]
            amax_at = self._crossing(rows, cols, first_row, held.rows_per_rank)
        for rank, first, stop in _spread(held, first_row, rows):
            chunk = self._chunks.get(rank)
            if chunk is None:
                continue
            values_at, scales_at = chunk.place(entry.values, first * row_bytes, stop * row_bytes), 0
            first_block, end_block = -(-first // BLOCK), -(-stop // BLOCK)  # those that begin in these rows
            if scale is not None and first_block < end_block:
                scales_at = chunk.place(scale, first_block * scale_row_bytes, end_block * scale_row_bytes)
            if rank == self._rank:
                to_held = first_row - held.of(rank)[0]
                for a, b in _cut_at_blocks(first, stop, rows) if copied_as is None else ((first, stop),):
                    begins = copied_as is None and a % BLOCK == 0
                    scale_at = scales_at + (a // BLOCK - first_block) * scale_row_bytes if begins else None
                    place = (parameter, to_held + a, b - a, cols, values_at + (a - first) * row_bytes)
                    self._parts.append(Part(*place, scale_at, len(chunk.flags), amax_at.get(a // BLOCK), copied_as))
            chunk.flags.append(number)

    def _crossing(self, rows: int, cols: int, first_row: int, rows_per_rank: int) -> dict[int, int]:
        """The rows of blocks that lie on more than one rank, and where each has its maxima."""
        found = dict[int, int]()
        border = (first_row // rows_per_rank + 1) * rows_per_rank - first_row  # the first row of the next rank
        for row in range(border, rows, rows_per_rank):
            if row % BLOCK and row // BLOCK not in found:
                found[row // BLOCK] = self.num_amax
                self.num_amax += -(-cols // BLOCK)
        return found


def _cut_at_blocks(first: int, stop: int, num_rows: int) -> Iterator[tuple[int, int]]:
    """Rows `first` to `stop` of a tensor as a part of a block, whole blocks, and a part of a block; none is empty."""
    whole = min(-(-first // BLOCK) * BLOCK, stop)
    end = stop if stop == num_rows else max(stop // BLOCK * BLOCK, whole)
    yield from ((a, b) for a, b in ((first, whole), (whole, end), (end, stop)) if a < b)
