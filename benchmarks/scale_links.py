"""What each way to send the weights of a push puts on the links: bytes, by arithmetic.

Hosts of `HOST_GPUS` GPUs with an own NIC each, joined by NVLink; trainer and servers on hosts of their own; a server is
one host. Links carry both directions at once, so bytes in and out do not add up. `broadcast`
and `broadcast_by_eight` exist:

- `broadcast`: the ranks' FP8 rows to trainer rank 0, and one broadcast of all of it to every server rank, in which each
  rank's NIC takes the whole model and passes it on.
- `broadcast_to_hosts`: the same, but it enters each host once, and goes on from GPU to GPU inside it.
- `broadcast_by_eight`: each of the eight ranks of rank 0's host gathers and broadcasts an eighth of the buckets so,
  which enters every host by a NIC of its own.
- `straight`: every trainer rank sends what it holds to every server rank that holds it too.
- `relayed`: every trainer rank sends what it holds once, to the first rank of one server that holds it. That rank
  passes it on by NVLink to those of its host that hold the same, and by NIC to the same rank of the next server.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.scale_slices import Served, slice_bytes, slices
from sender.hf_names import Cuts
from sender.sharding import ShardedRows
from shared.buckets import Entry, Layout
from shared.errors import PlanError
from shared.numerics import BLOCK

HOST_GPUS = 8
NIC_BYTES_PER_S = 50e9
NVLINK_BYTES_PER_S = 370e9  # one direction of a GPU


@dataclass(frozen=True)
class Trainers:
    """Bytes of a push that every trainer rank holds: each once, and each as often as ranks of one server hold it.

    `num_bytes`: of the whole push, as it lies in buckets.
    """

    num_bytes: int
    held: tuple[int, ...]
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class Server:
    """Bytes that every rank of a server holds, and those of them that no rank before it holds."""

    held: tuple[int, ...]
    first: tuple[int, ...]


@dataclass(frozen=True)
class Link:
    name: str
    num_bytes: int
    bytes_per_s: float

    @property
    def seconds(self) -> float:
        return self.num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Traffic:
    """Bytes through the busiest NIC of each side and direction, and into the GPU with the busiest NVLink."""

    trainer_out: int
    trainer_in: int
    server_in: int
    server_out: int
    nvlink: int

    @property
    def links(self) -> tuple[Link, ...]:
        nics = (
            Link("trainer out", self.trainer_out, NIC_BYTES_PER_S),
            Link("trainer in", self.trainer_in, NIC_BYTES_PER_S),
            Link("server out", self.server_out, NIC_BYTES_PER_S),
            Link("server in", self.server_in, NIC_BYTES_PER_S),
        )
        return *nics, Link("NVLink", self.nvlink, NVLINK_BYTES_PER_S)

    @property
    def busiest(self) -> Link:
        """The first of those that take as long."""
        return max(self.links, key=lambda link: link.seconds)

    @property
    def seconds(self) -> float:
        """No push can be quicker: the busiest link at its full rate, all links at work at once."""
        return self.busiest.seconds


def broadcast(trainers: Trainers, server: Server, num_servers: int) -> Traffic:
    last_of_all = num_servers * len(server.held) == 1  # passes nothing on
    everything, (near, far) = trainers.num_bytes, _gathered(trainers)
    return Traffic(everything, far, everything, 0 if last_of_all else everything, near)


def broadcast_to_hosts(trainers: Trainers, server: Server, num_servers: int) -> Traffic:
    everything, (near, far) = trainers.num_bytes, _gathered(trainers)
    inside = everything if len(server.held) > 1 else 0
    return Traffic(everything, far, everything, everything if num_servers > 1 else 0, max(near, inside))


def broadcast_by_eight(trainers: Trainers, server: Server, num_servers: int) -> Traffic:
    roots, num_ranks = trainers.held[:HOST_GPUS], len(server.held)
    ways_in = min(len(roots), num_ranks)
    out, far = _share(trainers.num_bytes, len(roots)), _share(sum(trainers.held[HOST_GPUS:]), len(roots))
    entered = _share(trainers.num_bytes, ways_in)
    near = _share(sum(roots) - min(roots), len(roots))
    inside = trainers.num_bytes - trainers.num_bytes // ways_in if num_ranks > 1 else 0
    return Traffic(out, far, entered, entered if num_servers > 1 else 0, max(near, inside))


def _share(num_bytes: int, num_parts: int) -> int:
    return -(-num_bytes // num_parts)


def _gathered(trainers: Trainers) -> tuple[int, int]:
    """Bytes that come to rank 0 from its own host, and from others."""
    return sum(trainers.held[1:HOST_GPUS]), sum(trainers.held[HOST_GPUS:])


def straight(trainers: Trainers, server: Server, num_servers: int) -> Traffic:
    return Traffic(num_servers * max(trainers.wanted), 0, max(server.held), 0, 0)


def relayed(trainers: Trainers, server: Server, num_servers: int) -> Traffic:
    repeated = max(held - first for held, first in zip(server.held, server.first, strict=True))
    passed_on = max(server.first) if num_servers > 1 else 0
    return Traffic(max(trainers.held), 0, max(server.first), passed_on, repeated)


Way = Callable[[Trainers, Server, int], Traffic]
WAYS: tuple[Way, ...] = (broadcast, broadcast_to_hosts, broadcast_by_eight, straight, relayed)


def rows_of(name: str, shape: tuple[int, ...], num_ranks: int) -> ShardedRows:
    """How FSDP2 cuts a BF16 parameter of `shape` over `num_ranks`; a vector has a row for every element."""
    num_cols = shape[-1] if len(shape) > 1 else 1
    whole = functools.reduce(int.__mul__, shape[1:-1], 1)
    return ShardedRows(name, "torch.bfloat16", shape[0] * whole, num_cols, -(-shape[0] // num_ranks) * whole)


def trainers_of(
    layout: Layout, parameters: Sequence[ShardedRows], cuts: Cuts, num_ranks: int, served: Served
) -> Trainers:
    """What of `layout` lies on which rank. Tensors of no parameter (buffers) lie on all, and are sent by rank 0."""
    entries = {entry.tensor.name: entry for bucket in layout.buckets for entry in bucket.entries}
    held, wanted = [0] * num_ranks, [0] * num_ranks
    for parameter in parameters:
        for cut in cuts[parameter.name]:
            entry = entries.pop(cut.name)
            rows = (parameter.num_cols, 1) if len(cut.shape) == 2 else (1,)
            if cut.strides != rows or cut.shape[1:] not in ((), (parameter.num_cols,)) or cut.offset % rows[0]:
                raise PlanError(f"{cut.name} is no run of whole rows of {parameter.name}")
            times = _holders(entry, served)
            first_row = cut.offset // parameter.num_cols
            sizes = (cut.shape[0], parameter.num_cols, entry.values.dtype.itemsize, entry.scale is not None)
            for rank, num_bytes in _shares(*sizes, first_row, parameter.rows_per_rank):
                held[rank] += num_bytes
                wanted[rank] += times * num_bytes
    for entry in entries.values():
        held[0] += _num_bytes(entry)
        wanted[0] += _holders(entry, served) * _num_bytes(entry)
    return Trainers(layout.num_bytes, tuple(held), tuple(wanted))


@functools.cache
def _shares(
    rows: int, cols: int, itemsize: int, quantized: bool, first_row: int, rows_per_rank: int
) -> tuple[tuple[int, int], ...]:
    """Bytes of a tensor on every rank that has rows of it; a scale counts where its block begins, as in a push."""

    def of_each() -> Iterator[tuple[int, int]]:
        for rank in range(first_row // rows_per_rank, (first_row + rows - 1) // rows_per_rank + 1):
            start = max(rank * rows_per_rank - first_row, 0)
            stop = min((rank + 1) * rows_per_rank - first_row, rows)
            blocks = -(-stop // BLOCK) - -(-start // BLOCK)
            yield rank, (stop - start) * cols * itemsize + (4 * blocks * -(-cols // BLOCK) if quantized else 0)

    return tuple(of_each())


def _num_bytes(entry: Entry) -> int:
    return entry.values.num_bytes + (entry.scale.num_bytes if entry.scale is not None else 0)


def _holders(entry: Entry, served: Served) -> int:
    """On how many ranks of a server each byte of it lies: as many for one as for any other."""
    boxes = [box for box in slices(entry.tensor.name, entry.values.shape, served) if box is not None]
    return len(boxes) // len(set(boxes))


def server_of(layout: Layout, served: Served) -> Server:
    held, first = [0] * served.num_ranks, [0] * served.num_ranks
    for bucket in layout.buckets:
        for entry in bucket.entries:
            seen = set()
            for rank, box in enumerate(slices(entry.tensor.name, entry.values.shape, served)):
                if box is None:
                    continue
                num_bytes = slice_bytes(entry, box)
                held[rank] += num_bytes
                first[rank] += 0 if box in seen else num_bytes
                seen.add(box)
    return Server(tuple(held), tuple(first))
