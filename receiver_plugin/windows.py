"""Windows of tensors: which elements of a source a loader's view stands for."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from shared.coverage import Box, box_of


class View(NamedTuple):
    """A strided window, in elements, from the first element of its tensor."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    def window(self, box: Box) -> View:
        """The part `box` of this window, in the window's own coordinates."""
        offset = self.offset + sum(start * step for (start, _), step in zip(box, self.stride, strict=True))
        return View(offset, tuple(stop - start for start, stop in box), self.stride)


class Part(NamedTuple):
    """A window of a source, and the box of a tensor that holds its values."""

    source: str
    view: View
    box: Box

    def shifted(self, dim: int, by: int) -> Part:
        box = tuple((a + by, b + by) if d == dim % len(self.box) else (a, b) for d, (a, b) in enumerate(self.box))
        return Part(self.source, self.view, box)

    def within(self, box: Box) -> Part | None:
        """What of this part lies in `box`, placed relative to it; None if nothing does."""
        cut = tuple((max(a, low), min(b, high)) for (a, b), (low, high) in zip(self.box, box, strict=True))
        if any(start >= stop for start, stop in cut):
            return None
        inside = tuple((start - a, stop - a) for (start, stop), (a, _) in zip(cut, self.box, strict=True))
        place = tuple((start - low, stop - low) for (start, stop), (low, _) in zip(cut, box, strict=True))
        return Part(self.source, self.view.window(inside), place)


@dataclass(frozen=True)
class Assembled:
    """A contiguous tensor that a loader made of parts of sources; `tensor` stands for it and keeps its storage."""

    tensor: torch.Tensor
    parts: tuple[Part, ...]

    def parts_of(self, window: torch.Tensor) -> list[Part] | None:
        """The parts that make up `window`, a view of `tensor`; None where it is transposed, merged or expanded."""
        pairs = zip(window.shape, window.stride(), self.tensor.stride(), strict=False)
        if window.dim() != self.tensor.dim() or any(n > 1 and mine != own for n, mine, own in pairs):
            return None
        box = box_of(self.tensor.shape, int(window.storage_offset()), window.shape, window.stride())
        if box is None:
            return None
        found = [inside for part in self.parts if (inside := part.within(box)) is not None]
        return found if sum(prod(part.view.size) for part in found) == window.numel() else None
