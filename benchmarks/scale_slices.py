"""Which part of every checkpoint tensor each rank of a tensor-parallel server holds: a model of what SGLang does.

Read from SGLang's layers, not traced: columns of a matrix that is cut by its inputs, rows of one that is cut by its
outputs or by the vocabulary, whole heads of keys and values, each on several ranks where there are fewer than ranks,
and all of everything else. Experts are cut in their intermediate dimension where that leaves whole blocks; where it
does not, SGLang refuses to cut them, and a server is started with `--ep-size` of its ranks: whole experts, dealt out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from shared.buckets import Entry
from shared.coverage import Box, whole
from shared.errors import PlanError
from shared.numerics import BLOCK

_BY_ROWS = frozenset({"q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"})
_BY_COLUMNS = frozenset({"o_proj", "down_proj"})
_BY_HEADS = frozenset({"k_proj", "v_proj"})
_ON_ALL = frozenset({"gate", "q_a_proj", "kv_a_proj_with_mqa"})
_EXPERT = re.compile(r".*\.experts\.(\d+)\.\w+\.weight")


@dataclass(frozen=True)
class Served:
    """What decides the slices: ranks of the server, heads of keys and values (0: none, MLA), experts of a layer and
    their intermediate size (0: none)."""

    num_ranks: int
    num_kv_heads: int = 0
    num_experts: int = 0
    expert_size: int = 0

    @property
    def deals_out_experts(self) -> bool:
        return self.expert_size % (self.num_ranks * BLOCK) != 0


def slices(name: str, shape: tuple[int, ...], served: Served) -> tuple[Box | None, ...]:
    """Of every rank, the part of checkpoint tensor `name` that it holds: [start, stop) per dimension; None: nothing.

    Raises:
        PlanError: a tensor that this model does not know, or one that does not divide by the ranks.
    """
    ranks, module = served.num_ranks, name.split(".")[-2]
    if len(shape) == 1 and (module.endswith("norm") or name.endswith(".e_score_correction_bias")):
        return (whole(shape),) * ranks
    if len(shape) != 2 or not name.endswith(".weight"):
        raise PlanError(f"{name} {list(shape)}: not known how a server cuts it")
    if (expert := _EXPERT.fullmatch(name)) and served.deals_out_experts:
        owner = int(expert[1]) // _part(name, served.num_experts, ranks)
        return tuple(whole(shape) if rank == owner else None for rank in range(ranks))
    rows, cols = shape
    if module in _ON_ALL:
        return (whole(shape),) * ranks
    if module in _BY_COLUMNS:
        step = _part(name, cols, ranks)
        return tuple(((0, rows), (rank * step, (rank + 1) * step)) for rank in range(ranks))
    if module in _BY_ROWS:
        return _rows(shape, _part(name, rows, ranks), range(ranks))
    if module in _BY_HEADS:
        parts = min(served.num_kv_heads, ranks)
        each = _part(name, ranks, parts)  # ranks that hold the same heads
        return _rows(shape, _part(name, rows, parts), [rank // each for rank in range(ranks)])
    raise PlanError(f"{name} {list(shape)}: not known how a server cuts it")


def _rows(shape: tuple[int, ...], step: int, numbers: Sequence[int]) -> tuple[Box, ...]:
    return tuple(((number * step, (number + 1) * step), (0, shape[1])) for number in numbers)


def _part(name: str, length: int, num_parts: int) -> int:
    if num_parts < 1 or length % num_parts:
        raise PlanError(f"{name}: {length} cannot be cut into {num_parts} equal parts")
    return length // num_parts


def slice_bytes(entry: Entry, box: Box) -> int:
    """Bytes of the values in `box` and of the scales of its blocks.

    Raises:
        PlanError: a border that lies within a block, so that two ranks would need the same scale.
    """
    lengths = [stop - start for start, stop in box]
    num_bytes = prod(lengths) * entry.values.dtype.itemsize
    if entry.scale is None:
        return num_bytes
    for (start, stop), full in zip(box, entry.values.shape, strict=True):
        if start % BLOCK or (stop % BLOCK and stop != full):
            raise PlanError(f"{entry.tensor.name}: {start} to {stop} of {full} is cut within a block of {BLOCK}")
    return num_bytes + prod(-(-length // BLOCK) for length in lengths) * entry.scale.dtype.itemsize
