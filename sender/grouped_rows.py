"""`sender.rows.RowsBackend` on a GPU: a few launches a bucket, however many tensors it holds.

The tables of all launches are made once, and again when a parameter has moved. Whole blocks are a smaller tensor, which
`sender.triton_grouped` quantizes, as it copies what is not quantized; rows of blocks that cross ranks are
`sender.triton_rows`'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sender.rows_plan import BucketRows, Part, RowsPlan
from sender.triton_grouped import COPY_ELEMENTS, copy_many, quantize_many
from sender.triton_rows import MOVE_WORDS, amax_rows, move, quantize_rows
from shared.config import FP8BlockConfig
from shared.numerics import BLOCK

_Places = list[tuple[int, torch.dtype]]
_Work = Literal["whole blocks", "crossing", "copy"]


@dataclass(frozen=True)
class _Launch:
    """What one launch has in common, and its tables on the device: `where`, `tasks`, and the task of every program."""

    dtype: torch.dtype
    work: _Work
    even: bool
    tables: tuple[Tensor, Tensor, Tensor]


class GroupedRows:
    def __init__(self, plan: RowsPlan, config: FP8BlockConfig) -> None:
        self._buckets = plan.buckets
        self._options: Any = {"scale_fmt": config.scale_fmt, "zero_scale": config.zero_scale}
        self._made_for: _Places | None = None
        self._launches: list[list[_Launch]] = []
        self._crossing: list[_Launch] = []
        self._moves: dict[int, list[tuple[torch.dtype, Tensor, Tensor]]] = {}

    def begin(self, rows: Sequence[Tensor], amax: Tensor) -> None:
        self._make(rows)
        with _on(amax.device):
            for launch in self._crossing:
                amax_rows(*launch.tables, amax, dtype=launch.dtype)

    def quantize(self, index: int, rows: Sequence[Tensor], amax: Tensor, chunk: Tensor) -> None:
        bucket = self._buckets[index]
        assert bucket is not None
        flags = bucket.flags_of(chunk)
        with _on(chunk.device):
            for launch in self._launches[index]:
                dtype, even = launch.dtype, launch.even
                if launch.work == "crossing":
                    quantize_rows(*launch.tables, amax, chunk, flags, dtype=dtype, **self._options)
                elif launch.work == "copy":
                    copy_many(*launch.tables, chunk, flags, dtype=dtype, even=even)
                else:
                    quantize_many(*launch.tables, chunk, flags, dtype=dtype, even=even, **self._options)

    def unpack(self, index: int, chunks: Tensor, packed: Tensor) -> None:
        bucket = self._buckets[index]
        assert bucket is not None
        if index not in self._moves:
            self._moves[index] = list(_moves(bucket, packed.device))
        with _on(packed.device):
            for word, moves, move_of_program in self._moves[index]:
                move(moves, move_of_program, chunks.view(word), packed.view(word))

    def _make(self, rows: Sequence[Tensor]) -> None:
        """The tables, unless they are those of `rows`: a comparison for each parameter, not for each tensor."""
        places: _Places = [(tensor.data_ptr(), tensor.dtype) for tensor in rows]
        if places == self._made_for:
            return
        self._launches = [list(_launches(bucket.parts if bucket else (), rows)) for bucket in self._buckets]
        crossing = [part for bucket in self._buckets if bucket for part in bucket.parts if part.amax_at is not None]
        self._crossing = list(_launches(crossing, rows))
        self._made_for = places


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _launches(parts: Iterable[Part], rows: Sequence[Tensor]) -> Iterator[_Launch]:
    groups: dict[tuple[torch.dtype, _Work, bool], list[Part]] = {}
    for part in parts:
        held, work = rows[part.parameter], _work(part)
        groups.setdefault((held.dtype, work, work != "crossing" and _is_even(part, held)), []).append(part)
    for kind, members in groups.items():
        yield _Launch(*kind, _tables(members, rows, kind[1]))


def _work(part: Part) -> _Work:
    if part.copied_as is not None:
        return "copy"
    return "crossing" if part.amax_at is not None else "whole blocks"


def _address(part: Part, held: Tensor) -> int:
    return held.data_ptr() + part.first_row * part.num_cols * held.element_size()


def _is_even(part: Part, held: Tensor) -> bool:
    """Every address a multiple of 16 bytes; if it is quantized, whole blocks only, and every row such a multiple."""
    on_16_bytes = _address(part, held) % 16 == 0 and part.codes_at % 16 == 0
    whole = part.num_rows % BLOCK == 0 and part.num_cols % BLOCK == 0 and part.num_cols < 1 << 24
    return on_16_bytes and (whole or part.copied_as is not None)


def _tables(parts: list[Part], rows: Sequence[Tensor], work: _Work) -> tuple[Tensor, Tensor, Tensor]:
    where, tasks, sizes, first = [], [], [], 0
    for part in parts:
        held, block_cols = rows[part.parameter], -(-part.num_cols // BLOCK)
        where.append((_address(part, held), part.num_cols))
        scale_at = -1 if part.scale_at is None else part.scale_at
        num_rows, num_cols = (1, part.num_rows * part.num_cols) if work == "copy" else (part.num_rows, part.num_cols)
        task = (first, block_cols, num_rows, num_cols, part.codes_at, scale_at, part.flag)
        tasks.append((*task, part.amax_at) if work == "crossing" else task)
        programs = -(-num_cols // COPY_ELEMENTS) if work == "copy" else -(-num_rows // BLOCK) * block_cols
        sizes.append(programs)
        first += programs
    device = rows[0].device
    return (
        torch.tensor(where, dtype=torch.int64).to(device),
        torch.tensor(tasks, dtype=torch.int64).to(device),
        _repeated(sizes).to(device),
    )


def _moves(bucket: BucketRows, device: torch.device) -> Iterator[tuple[torch.dtype, Tensor, Tensor]]:
    """By the largest word in which a run can be moved: the tables of a launch."""
    groups: dict[torch.dtype, list[tuple[int, int, int]]] = {}
    for run in bucket.runs:
        numbers = (run.num_bytes, run.from_byte, run.to_byte)
        word = next(word for word in _WORDS if not any(number % word.itemsize for number in numbers))
        groups.setdefault(word, []).append((run.num_bytes, run.from_byte, run.to_byte))
    for word, runs in groups.items():
        moves, sizes, first = [], [], 0
        for run_ in runs:
            length, start, target = (number // word.itemsize for number in run_)
            moves.append((first, length, start, target))
            sizes.append(-(-length // MOVE_WORDS))
            first += sizes[-1]
        yield word, torch.tensor(moves, dtype=torch.int64).to(device), _repeated(sizes).to(device)


_WORDS = (torch.int64, torch.int32, torch.uint8)


def _repeated(sizes: list[int]) -> Tensor:
    """[programs] int32: to which task each belongs."""
    return torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(sizes))
