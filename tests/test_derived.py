"""Weights that a model derives from its parameters: after a push they are those of the new parameters, in place."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from receiver_plugin.binding import trace
from receiver_plugin.probe import fingerprint
from receiver_plugin.recorder import Source
from receiver_plugin.sglang_derived import SglangDerived, unknown_tensors
from shared.errors import CommitError


class GemmaRMSNorm(nn.Module):
    """As SGLang has it: a buffer that its loader keeps at weight + 1, in both ways of its releases."""

    gemma_weight: torch.Tensor

    def __init__(self, by_out: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("gemma_weight", torch.ones(4, dtype=torch.bfloat16), persistent=False)
        self._by_out = by_out

    def load(self, loaded: torch.Tensor) -> None:
        self.weight.data.copy_(loaded)
        if self._by_out:
            torch.add(self.weight.data, 1.0, out=self.gemma_weight)
        else:
            self.gemma_weight.copy_(self.weight.data).add_(1.0)


class Attention(nn.Module):
    """As SGLang has MLA: a plain tensor that `post_load_weights` derives, made once and then written in place."""

    halves: torch.Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.kv_b = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


class Model(nn.Module):
    def __init__(self, by_out: bool = False) -> None:
        super().__init__()
        self.norm, self.attention = GemmaRMSNorm(by_out), Attention()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        names = []
        for name, weight in weights:
            names.append(name)
            if name == "norm.weight":
                self.norm.load(weight)
            else:
                self.attention.kv_b.data.copy_(weight)
        self.post_load_weights(weight_names=names)

    def post_load_weights(self, weight_names: list[str] | None = None) -> None:
        if weight_names is not None and "attention.kv_b" not in weight_names:
            return
        halves = self.attention.kv_b[:2] / 2
        if self.attention.halves is None:
            self.attention.halves = halves
        else:
            self.attention.halves.copy_(halves)


VALUES = {"norm.weight": torch.arange(4.0).bfloat16(), "attention.kv_b": torch.arange(16.0).view(4, 4)}
SOURCES = [Source(name, tuple(value.shape), value.dtype) for name, value in VALUES.items()]


@pytest.mark.parametrize("by_out", [False, True])
def test_they_follow_the_parameters(by_out: bool) -> None:
    pushed, loaded = Model(by_out), Model(by_out)
    pushed.post_load_weights()
    assert pushed.attention.halves is not None
    before, addresses = fingerprint(pushed), (pushed.norm.gemma_weight.data_ptr(), pushed.attention.halves.data_ptr())
    derived = SglangDerived(pushed)
    plan = trace(pushed, SOURCES, derived)
    assert plan.problems == () and len(plan.calls) == 1
    assert fingerprint(pushed) == before, "a trace changed something"
    for copy in plan.copies:
        copy.parameter_view.of(pushed.get_parameter(copy.parameter).data).copy_(VALUES[copy.source])
    derived.refresh(plan.calls)
    loaded.load_weights(VALUES.items())
    assert fingerprint(pushed) == fingerprint(loaded) != before
    assert "attention.halves" in before
    assert addresses == (pushed.norm.gemma_weight.data_ptr(), pushed.attention.halves.data_ptr())


class Router(nn.Module):
    """As SGLang has those of GLM-4: the first forward keeps the weight in fp32."""

    _weight_fp32: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("_weight_fp32", None, persistent=False)

    def forward(self) -> None:
        if self._weight_fp32 is None:
            self._weight_fp32 = self.weight.data.to(torch.float32)


def test_what_the_first_forward_keeps_follows_in_place() -> None:
    router = Router()
    derived = SglangDerived(router)
    derived.refresh([])
    assert router._weight_fp32 is None  # derived by the first forward, from the weights as they are then
    router()
    kept = router.get_buffer("_weight_fp32")
    assert list(unknown_tensors(router)) == []
    router.weight.fill_(3.0)
    derived.refresh([])
    assert router.get_buffer("_weight_fp32") is kept and bool((kept == 3.0).all())


def test_without_knowing_them_they_are_refused() -> None:
    problems = trace(Model(), SOURCES).problems
    assert any(problem.startswith("norm.gemma_weight: load_weights writes it") for problem in problems)
    assert any(problem.startswith("attention.kv_b: load_weights computes with it") for problem in problems)


def test_one_that_moves_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    model.post_load_weights()
    derived = SglangDerived(model)
    plan = trace(model, SOURCES, derived)
    monkeypatch.setattr("receiver_plugin.sglang_derived._holds_address", lambda tensor: True)  # as on a GPU
    derived.refresh(plan.calls)
    monkeypatch.setattr(Model, "post_load_weights", lambda self, **_: setattr(self.attention, "halves", torch.ones(2)))
    with pytest.raises(CommitError, match=r"attention\.halves moved"):
        derived.refresh(plan.calls)
