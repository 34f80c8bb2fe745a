"""Block scales go where the codes of their weight went, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from receiver_plugin.recorder import Copy
from receiver_plugin.windows import View
from shared.coverage import Box
from shared.naming import scale_name
from shared.numerics import BLOCK, scale_shape

Shape = tuple[int, ...]


class Placed(NamedTuple):
    """A copy, with the boxes of its source and of its parameter that it reads and writes."""

    copy: Copy
    source: Box
    parameter: Box


def follow(
    placed: list[Placed],
    filled: set[str],
    shapes: Mapping[str, Shape],
    held: Mapping[str, torch.Tensor],
    problems: list[str],
) -> list[Copy]:
    """The copies of scales that belong to those of FP8 codes in `placed`.

    `shapes` are those of the sources, `held` the live parameters. What cannot be followed is added to `problems`, once
    a parameter; so are FP8 parameters in `filled`, because a constant comes without a scale. Boxes of codes that are
    whole blocks, disjoint and cover a parameter do so for its scale as well.
    """
    found: list[Copy] = []
    codes = (name for name in filled if held[name].dtype == torch.float8_e4m3fn)
    refused = dict.fromkeys(codes, "the loader fills part of it with a constant, which has no block scale")
    targets = {copy.parameter for copy, _, _ in placed if held[copy.parameter].dtype == torch.float8_e4m3fn}
    scales = {name: _scale_of(name, held) for name in targets}
    parameter_shapes = {name: tuple(held[name].shape) for name in targets}
    for copy, of, to in placed:
        if copy.parameter not in targets:
            continue
        if isinstance(why := scales[copy.parameter], str):
            refused[copy.parameter] = why
            continue
        source_shape, parameter_shape = shapes[copy.source], parameter_shapes[copy.parameter]
        view = _scale_view(of, source_shape, copy.source_view)
        window = _scale_view(to, parameter_shape, copy.parameter_view)
        if view is None or window is None:
            refused[copy.parameter] = f"the loader cuts {copy.source} through its {BLOCK}x{BLOCK} blocks"
            continue
        found.append(Copy(scale_name(copy.source), view, scale_name(copy.parameter), window))
    problems += [f"{name}: {why}" for name, why in refused.items()]
    return found


def _scale_of(name: str, held: Mapping[str, torch.Tensor]) -> torch.Tensor | str:
    """The live block scale of FP8 parameter `name`, or why there is none."""
    scale, weight = held.get(scale_name(name)), held[name]
    if scale is None:
        return "FP8 without block scales on this server"
    want = (*weight.shape[:-2], *scale_shape(*weight.shape[-2:])) if weight.dim() >= 2 else ()
    if tuple(scale.shape) != want or scale.dtype != torch.float32 or not scale.is_contiguous():
        return f"its scale is kept as {scale.dtype} {list(scale.shape)}, not torch.float32 {list(want)}"
    return scale


@lru_cache(maxsize=16384)  # layers are alike
def _scale_view(box: Box, shape: Shape, view: View) -> View | None:
    """The window of the contiguous scale of a tensor of `shape` that belongs to `view`, which touches `box` of it."""
    blocks = _blocks(box, shape, view)
    if blocks is None:
        return None
    scale = (*shape[:-2], *scale_shape(*shape[-2:]))
    offset = sum(start * prod(scale[dim + 1 :]) for dim, (start, _) in enumerate(blocks))
    return View(offset, tuple(stop - start for start, stop in blocks[-2:]), (scale[-1], 1))


def _blocks(box: Box, shape: Shape, view: View) -> Box | None:
    """The blocks of `box`, which `view` of a tensor of `shape` touches; None if it is no row-major matrix of them."""
    if len(view.size) != 2 or view.stride[1] != 1 or view.size[0] != box[-2][1] - box[-2][0]:
        return None
    blocks = list(box[:-2])
    for (start, stop), full in zip(box[-2:], shape[-2:], strict=True):
        if start % BLOCK or (stop % BLOCK and stop != full):
            return None
        blocks.append((start // BLOCK, -(-stop // BLOCK)))
    return tuple(blocks)
