"""Staging: what a push will change, filled while it arrives, copied at commit.

All is resolved once into pairs of views; when a bucket comes there is no name, no shape and no lookup:

    accept(i)    bucket buffer -> image     one grouped copy a bucket
    commit()     image -> live parameters   one grouped copy, in place; addresses never change

On a GPU a grouped copy is a launch or two, from tables that are made here (`shared/grouped_copy.py`).

The image is as large as the parameters of this rank and lies in a `Room`: one piece of memory, or several, among which
parameters are cut wherever one ends. A room that keeps whole buckets has none, and one copy from all of these to the
live parameters at the commit. In place there is none either: each bucket goes to the live parameters as it comes.

Where trainer ranks write what they hold themselves there are no buckets, but a `Landing`, of the same pairs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from receiver_plugin.binding import BindingPlan
from receiver_plugin.held import Places, destinations
from receiver_plugin.landing import Landing, Pairs
from receiver_plugin.recorder import Copy
from receiver_plugin.rooms import Need, Room, aligned, num_at_once, own_room
from receiver_plugin.windows import View
from shared.buckets import Bucket, Layout
from shared.coverage import Box
from shared.errors import TransferError


class Piece(NamedTuple):
    """Elements of a parameter from number `start` on; `tensor` has its element type."""

    start: int
    tensor: torch.Tensor


class _Target(NamedTuple):
    parameter: torch.Tensor
    data_ptr: int
    pieces: list[Piece]

    def windows(self, view: View) -> Iterator[tuple[torch.Tensor, Box | None]]:
        """`view` of the parameter, as windows of its pieces; with each its box in `view`, None for all of it."""
        if len(self.pieces) == 1:
            yield view.of(self.pieces[0].tensor), None
            return
        for box in cut(view, [piece.start for piece in self.pieces[1:]]):
            part = view.window(box)
            piece = self.pieces[bisect_right(self.pieces, part.offset, key=lambda piece: piece.start) - 1]
            yield part._replace(offset=part.offset - piece.start).of(piece.tensor), box


class Staging:
    """Buffers and resolved copies of one plan on one rank. Without a `room`, in memory of its own.

    Raises:
        PlanError: no memory for image and bucket buffer.
    """

    def __init__(self, model: nn.Module, plan: BindingPlan, layout: Layout, room: Room | None = None) -> None:
        need = Need.of(model, plan, layout)
        self.room = room or own_room(need)
        self.num_at_once = self.room.num_at_once or num_at_once(need.device)
        self.num_ahead = self.room.num_ahead or self.num_at_once  # buckets that may be on their way
        self.plan = plan
        self.touched = False  # whether live parameters were written to
        self._in_place = self.room.way == "in_place"
        self._has_image = not self._in_place and not self.room.whole
        self._model, self._layout = model, layout
        self._take_in(self.room)
        parameters = destinations(model)
        live = {name: parameters[name].detach() for name in need.sizes}
        places = (
            _place(live, self.room.buffers) if self._has_image else {name: [Piece(0, p)] for name, p in live.items()}
        )
        self._targets = {name: _Target(p, p.data_ptr(), places[name]) for name, p in live.items()}
        self._places = Places(model, (parameters[name] for name in live))
        if self._has_image:
            self._fill()
        self._scatter: list[Callable[[], None] | None] = [None] * len(layout.buckets)
        self.landing: Landing | None = None
        if self.room.lands:
            self.landing = Landing(self._resolve(plan.copies), self._windows, need.device)
        elif not self.room.whole:
            self._scatter = [copier(*pairs) for pairs in self._resolve(plan.copies)]
        self._commit = copier(*self._staged())
        # The tables of a GPU are made of these addresses, and hold no memory.
        keeps = all(_knows_addresses_only(copy) for copy in self._scatter if copy is not None)
        self._bucket_address = self.room.bucket.data_ptr() if keeps and self._in_place else None

    def will_be_written(self) -> None:
        """Trainer ranks may write where it lands, from here on, and nobody hears of the first byte."""
        self.touched |= self._in_place and self.landing is not None

    def _take_in(self, room: Room) -> None:
        self.room = room
        self._windows = self._layout.windows(room.bucket, self.num_at_once)

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self.room.buffers) + self.room.bucket.numel()

    def leave(self) -> bool:
        """Give the memory back; whether `enter` may be tried with other memory. Nothing was lent where it lands."""
        if self.landing is not None:
            return True
        self.room.leave()
        self.room, self._windows = Room(self.room.way, [], self.room.bucket.new_empty(0)), []
        return self._bucket_address is not None

    def enter(self, room: Room) -> bool:
        """Whether all that was resolved holds in `room`; it is taken then, for another transfer."""
        if self.landing is not None:
            self.touched = False
            return True
        if room.bucket.data_ptr() != self._bucket_address:
            return False
        self._take_in(room)
        self.touched = False
        return True

    def bucket(self, index: int) -> torch.Tensor:
        """Where bucket `index` arrives, flat uint8, when bucket `index - num_at_once` is no longer there."""
        return self._windows[index]

    def _fill(self) -> None:
        for fill in self.plan.fills:
            for window, _ in self._targets[fill.parameter].windows(fill.parameter_view):
                window.fill_(fill.value)

    def _resolve(self, copies: tuple[Copy, ...]) -> list[Pairs]:
        """For each bucket what is copied, to where it is copied first."""
        by_source: dict[str, list[Copy]] = {}
        for copy in copies:
            by_source.setdefault(copy.source, []).append(copy)
        return [self._pairs(bucket, by_source) for bucket in self._layout.buckets]

    def _pairs(self, bucket: Bucket, by_source: dict[str, list[Copy]]) -> Pairs:
        to, of, arriving = [], [], self.bucket(bucket.index)
        arrived = {dtype: arriving.view(dtype) for dtype in {slot.dtype for slot in bucket.slots}}
        for slot in bucket.slots:
            elements, first = arrived[slot.dtype], slot.offset_bytes // slot.dtype.itemsize
            for copy in by_source.get(slot.name, ()):
                offset, size, stride = copy.source_view
                source = elements.as_strided(size, stride, elements.storage_offset() + first + offset)
                for target, box in self._targets[copy.parameter].windows(copy.parameter_view):
                    part = source if box is None else _part(source.expand(copy.parameter_view.size), box)
                    if target.dtype == part.dtype and target.dtype.itemsize == 1:
                        target, part = target.view(torch.uint8), part.view(torch.uint8)
                    to.append(target)
                    of.append(part)
        return to, of

    def accept(
        self, index: int, sent: int, begin: Callable[[torch.Tensor, int], Callable[[], int]]
    ) -> Callable[[], int]:
        """Take bucket `index`, which has arrived; what waits for its digest. `sent`: the one sent ahead of it.

        `begin` begins to take the digest, and what it returns waits for it.

        Raises:
            TransferError: in place, the bytes are not those that were sent; none of them was written.
        """
        found = begin(self.bucket(index), index)
        if self._in_place and found() != sent:
            raise TransferError(f"the bytes of bucket(s) [{index}] are not those that were sent")
        self.scatter(index)
        return found

    def scatter(self, index: int) -> None:
        """Spread bucket `index`, which has arrived, over the image, or over the live parameters; or leave it there."""
        if (copy := self._scatter[index]) is not None:
            self.touched |= self._in_place
            copy()

    def check_addresses(self) -> str | None:
        """The name of a parameter that no longer lies where it was when the plan was made, or None."""
        if self._places.hold():
            return None
        now = destinations(self._model)
        return next((n for n, t in self._targets.items() if n not in now or now[n].data_ptr() != t.data_ptr), None)

    def commit(self) -> None:
        """Copy what is staged over the live parameters, byte for byte. In place, what is left to do are constants."""
        self.touched |= self._in_place
        if self._commit is not None:
            self._commit()
        if not self._has_image:
            self._fill()

    def _staged(self) -> Pairs:
        """Live parameters, and what the commit copies to them."""
        if self.room.whole:
            to, of = zip(*self._resolve(self.plan.copies), strict=True)
            return list(chain.from_iterable(to)), list(chain.from_iterable(of))
        return self._whole_parameters() if self._has_image else ([], [])

    def _whole_parameters(self) -> Pairs:
        """Live parameters and their image, as bytes."""
        live: list[torch.Tensor] = []
        staged: list[torch.Tensor] = []
        for target in self._targets.values():
            whole = _bytes(target.parameter)
            for start, tensor in target.pieces:
                first = start * tensor.dtype.itemsize
                live.append(whole[first : first + tensor.nbytes])
                staged.append(_bytes(tensor))
        return live, staged


def copier(to: list[torch.Tensor], of: list[torch.Tensor]) -> Callable[[], None] | None:
    """What copies `of` to `to`, pair by pair, whenever it is called; None if there is nothing to copy.

    On a GPU it knows addresses only: the caller keeps the memory of both.
    """
    if not to:
        return None
    if to[0].device.type == "cuda" and find_spec("triton") is not None:
        from shared.grouped_copy import GroupedCopy

        return GroupedCopy(to, of).run
    return partial(torch._foreach_copy_, to, of)


def _knows_addresses_only(copy: Callable[[], None]) -> bool:
    left = getattr(getattr(copy, "__self__", None), "alone", None)
    return left is not None and not left[0]


def cut(view: View, bounds: Sequence[int]) -> Iterator[Box]:
    """Boxes that make up `view`, in its own coordinates; no box holds elements from both sides of one of `bounds`.

    bounds: numbers of elements, ascending; each begins a new piece.
    """
    whole = tuple((0, size) for size in view.size)
    if 0 not in view.size:
        yield from _cut(view, whole, bounds)


def _cut(view: View, box: Box, bounds: Sequence[int]) -> Iterator[Box]:
    part = view.window(box)
    steps = [(step, dim) for dim, (size, step) in enumerate(zip(part.size, part.stride, strict=True)) if size > 1]
    first, last = part.offset, part.offset + sum((part.size[dim] - 1) * step for step, dim in steps)
    next_bound = bisect_right(bounds, first)
    if next_bound == bisect_right(bounds, last):
        yield box
        return
    step, dim = max(steps)
    start, stop = box[dim]
    below = -(-(bounds[next_bound] - first) // step)  # so many of this dimension begin before the bound
    middle = start + min(max(below, 1), stop - start - 1)
    for edge in ((start, middle), (middle, stop)):
        yield from _cut(view, (*box[:dim], edge, *box[dim + 1 :]), bounds)


def _place(live: dict[str, torch.Tensor], buffers: Sequence[torch.Tensor]) -> dict[str, list[Piece]]:
    """Lay an image of `live` into `buffers`, which are large enough, one tensor after the other."""
    found: dict[str, list[Piece]] = {}
    left, at = list(buffers), 0
    for name, parameter in live.items():
        pieces: list[Piece] = []
        start, end = 0, parameter.nbytes
        while start < end or not pieces:
            if left and at == left[0].numel():
                left, at = left[1:], 0
            size = min(end - start, left[0].numel() - at) if left else 0
            assert size or start == end, "the image is larger than its room"
            window = left[0][at : at + size].view(parameter.dtype) if size else parameter.new_empty(0)
            pieces.append(Piece(start // parameter.dtype.itemsize, window))
            start, at = start + size, at + aligned(size)
        found[name] = pieces
    return found


def _part(source: torch.Tensor, box: Box) -> torch.Tensor:
    return source[tuple(slice(start, stop) for start, stop in box)]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
