"""Loaders that put sources together, clone them or read single elements: followed back to the sources, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from receiver_plugin.binding import trace
from receiver_plugin.recorder import Source

Weights = dict[str, torch.Tensor]


class Joined(nn.Module):
    """`out` [6, 4], loaded by `load(out, sources)` once all sources have come."""

    def __init__(self, load: Callable[[torch.Tensor, Weights], object], shape: tuple[int, ...] = (6, 4)) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.load = load

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.load(self.out.data, dict(weights))


def replay(load: Callable[[torch.Tensor, Weights], object], values: Weights, *shape: int) -> tuple[torch.Tensor, ...]:
    """What the plan writes, and what the loader itself writes."""
    model = Joined(load, shape or (6, 4))
    plan = trace(model, [Source(name, tuple(value.shape), value.dtype) for name, value in values.items()])
    assert plan.problems == ()
    found = torch.zeros_like(model.out)
    for copy in plan.copies:
        copy.parameter_view.of(found).copy_(copy.source_view.of(values[copy.source]))
    model.load_weights(values.items())
    return found, model.out


def values(**shapes: tuple[int, ...]) -> Weights:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


LOADERS: dict[str, Callable[[torch.Tensor, Weights], object]] = {
    "joined by rows": lambda out, w: out.copy_(torch.cat([w["a"], w["b"]])),
    "joined by columns": lambda out, w: out.copy_(torch.cat([w["c"], w["d"]], dim=-1)),
    "joined in another order": lambda out, w: out.copy_(torch.cat([w["b"], w["a"]])),
    "a part of what was joined": lambda out, w: out[1:5].copy_(torch.cat([w["a"], w["b"]])[1:5]),
    "columns of what was joined": lambda out, w: out[:, :3].copy_(torch.cat([w["a"], w["b"]])[:, 1:]),
    "joined twice": lambda out, w: out.copy_(torch.cat([torch.cat([w["a"][:1], w["a"][1:]]), w["b"]])),
    "halves of one source": lambda out, w: out.copy_(torch.cat([w["e"][3:], w["e"][:3]])),
    "cloned": lambda out, w: out.copy_(w["e"].clone()),
    "a contiguous slice": lambda out, w: out.copy_(w["f"][:, 2:6].contiguous()),
    "moved to its own type": lambda out, w: out.copy_(w["e"].to(torch.float32, copy=True)),
    "chunks of what was joined": lambda out, w: [
        part.copy_(piece) for part, piece in zip(out.chunk(3), torch.cat([w["a"], w["b"]]).chunk(3), strict=True)
    ],
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_they_are_followed(load: Callable[[torch.Tensor, Weights], object]) -> None:
    given = values(a=(2, 4), b=(4, 4), c=(6, 1), d=(6, 3), e=(6, 4), f=(6, 8))
    model = Joined(load)
    plan = trace(model, [Source(name, tuple(value.shape), value.dtype) for name, value in given.items()])
    holes = ("out [6, 4]: nothing arrives", "out [6, 4]: the server needs")
    assert all(problem.startswith(holes) for problem in plan.problems)
    found = torch.zeros_like(model.out)
    for copy in plan.copies:
        copy.parameter_view.of(found).copy_(copy.source_view.of(given[copy.source]))
    model.load_weights(given.items())
    assert torch.equal(found, model.out) and bool(found.any())


def test_a_single_element_is_followed() -> None:
    found, loaded = replay(lambda out, w: out.fill_(w["a"].item()), values(a=(1, 1)), 1)
    assert torch.equal(found, loaded) and bool(found.any())


REFUSED: dict[str, Callable[[torch.Tensor, Weights], object]] = {
    "a transposed part of it": lambda out, w: out.copy_(torch.cat([w["g"][:, :3], w["g"][:, 3:]], dim=1).t()),
    "with something else": lambda out, w: out.copy_(torch.cat([w["a"], torch.zeros(4, 4, device="meta")])),
    "a sum of it": lambda out, w: out.copy_(torch.cat([w["a"], w["b"]]) + 1),
    "an element, doubled": lambda out, w: out.fill_(2 * w["h"].item()),
    "an element, plus one": lambda out, w: out.fill_(1 + w["h"].item()),
    "an element's size": lambda out, w: out.fill_(abs(w["h"].item())),
    "an element, at least": lambda out, w: out.fill_(max(w["h"].item(), 1e-6)),
    "an element, at most": lambda out, w: out.fill_(min(w["h"].item(), 1e6) + 0.0 * w["h"].item() + 1),
    "its bits": lambda out, w: out.copy_(w["e"].view(torch.int32)),
    "the bits of a copy": lambda out, w: out.copy_(w["e"].clone().view(torch.int32)),
    "as bits": lambda out, w: out.view(torch.int32).copy_(w["e"]),
    "negated": lambda out, w: out.copy_(torch._neg_view(w["e"])),
    "an element for many": lambda out, w: out.fill_(w["h"].item()),
    "another type": lambda out, w: out.copy_(w["e"].to(torch.bfloat16)),
}


@pytest.mark.parametrize("load", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused(load: Callable[[torch.Tensor, Weights], object]) -> None:
    given = values(a=(2, 4), b=(4, 4), e=(6, 4), g=(4, 6), h=(1,))
    plan = trace(Joined(load), [Source(name, tuple(value.shape), value.dtype) for name, value in given.items()])
    assert any("cannot be replayed" in problem for problem in plan.problems), plan.problems
