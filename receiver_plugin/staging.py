"""Staging: a byte image of what a push will change, filled while requests are served, copied at commit.

`prepare` resolves the binding plan once into pairs of views; per push there is no name, no shape and no lookup:

    scatter(i)   bucket buffer -> image     one grouped copy a bucket, any time
    commit()     image -> live parameters   one grouped copy, in place; addresses never change

The image is as large as the parameters of this rank and lies on their device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from receiver_plugin.binding import BindingPlan
from receiver_plugin.held import destinations
from receiver_plugin.recorder import Copy
from shared.buckets import ALIGNMENT_BYTES, Layout, Slot
from shared.errors import PlanError

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Target:
    parameter: torch.Tensor
    image: torch.Tensor
    data_ptr: int


class Staging:
    """Buffers and resolved copies of one plan on one rank.

    Raises:
        PlanError: no memory for image and bucket buffer.
    """

    def __init__(self, model: nn.Module, plan: BindingPlan, layout: Layout) -> None:
        parameters = destinations(model)
        touched = dict.fromkeys([*(c.parameter for c in plan.copies), *(f.parameter for f in plan.fills)])
        device = next(iter(parameters.values())).device
        sizes = {name: -(-parameters[name].nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for name in touched}
        try:
            self.image = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=device)
            self.bucket = torch.empty(layout.largest_bucket_bytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, a plain RuntimeError on a CPU
            need = sum(sizes.values()) + layout.largest_bucket_bytes
            raise PlanError(
                f"no memory for {need / 1e9:.2f} GB of staging on {device}: "
                f"start the server with a lower --mem-fraction-static ({error})"
            ) from error
        self.plan = plan
        self._model, self._layout = model, layout
        self._targets: dict[str, _Target] = {}
        offset = 0
        for name, size in sizes.items():
            parameter = parameters[name].detach()
            window = self.image[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            self._targets[name] = _Target(parameter, window, parameter.data_ptr())
            offset += size
        for fill in plan.fills:
            fill.parameter_view.of(self._targets[fill.parameter].image).fill_(fill.value)
        self._scatter = self._resolve(plan.copies)

    @property
    def num_bytes(self) -> int:
        return self.image.numel() + self.bucket.numel()

    def _resolve(self, copies: tuple[Copy, ...]) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        by_source: dict[str, list[Copy]] = {}
        for copy in copies:
            by_source.setdefault(copy.source, []).append(copy)
        return [self._pairs(bucket.slots, by_source) for bucket in self._layout.buckets]

    def _pairs(
        self, slots: tuple[Slot, ...], by_source: dict[str, list[Copy]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        to, of = [], []
        for slot in slots:
            arrived = slot.view(self.bucket)
            for copy in by_source.get(slot.name, ()):
                target, source = (
                    copy.parameter_view.of(self._targets[copy.parameter].image),
                    copy.source_view.of(arrived),
                )
                if target.dtype == source.dtype and target.dtype.itemsize == 1:
                    target, source = target.view(torch.uint8), source.view(torch.uint8)
                to.append(target)
                of.append(source)
        return to, of

    def scatter(self, index: int) -> None:
        """Spread bucket `index`, which lies in `self.bucket`, over the image."""
        to, of = self._scatter[index]
        if to:
            torch._foreach_copy_(to, of)

    def check_addresses(self) -> str | None:
        """The name of a parameter that no longer lies where it was when the plan was made, or None."""
        now = destinations(self._model)
        return next((n for n, t in self._targets.items() if n not in now or now[n].data_ptr() != t.data_ptr), None)

    def commit(self) -> None:
        """Copy the image over the live parameters, byte for byte."""
        live = [_bytes(target.parameter) for target in self._targets.values()]
        staged = [_bytes(target.image) for target in self._targets.values()]
        torch._foreach_copy_(live, staged)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
