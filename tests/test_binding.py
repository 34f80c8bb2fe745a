"""`receiver_plugin/binding.py`: the recorded plan does what the model's own loader does, or says what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from receiver_plugin.binding import BindingPlan, trace
from receiver_plugin.manifest import expected_in_fp8, manifest_of, plan_rank, unused_problems
from receiver_plugin.probe import fingerprint
from receiver_plugin.recorder import Source
from receiver_plugin.staging import Staging
from sender.packer import Packer
from sender.source import ModuleSource
from shared.buckets import make_layout
from shared.config import FP8BlockConfig
from shared.protocol import ManifestTensor
from tests import tiny_models
from tests.test_push_memory import checkpoint
from tests.tiny_models import Served, Trainer

Loader = Callable[[nn.Parameter, torch.Tensor], object]


class Linear(nn.Module):
    """One parameter `out` and a loader that a test writes: `load(out, weight)`."""

    load: Loader

    def __init__(self, rows: int = 4, cols: int = 6) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.randn(rows, cols), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, weight in weights:
            self.load(self.out, weight)


@pytest.fixture
def wide_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of two blocks: SGLang too refuses block-FP8 weights that a tensor-parallel cut would split in a block."""
    heads = 256
    monkeypatch.setattr(tiny_models, "HEADS", heads)
    for part, cut in (("q_proj", (0, 2 * heads)), ("k_proj", (2 * heads, heads)), ("v_proj", (3 * heads, heads))):
        monkeypatch.setitem(tiny_models.STACKED, part, ("qkv_proj", *cut))


def manifest_for(trainer: nn.Module) -> tuple[ManifestTensor, ...]:
    offered = ModuleSource(trainer).tensors
    return manifest_of(offered, expected_in_fp8(offered, FP8BlockConfig()))


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.usefixtures("wide_heads")
def test_a_replay_equals_the_models_own_loader(rank: int, size: int) -> None:
    trainer, replayed, loaded = Trainer(seed=9), Served(rank, size), Served(rank, size)
    addresses = {name: p.data_ptr() for name, p in replayed.named_parameters()}
    manifest = manifest_for(trainer)
    assert sum(tensor.quantized for tensor in manifest) == 14
    untouched = fingerprint(replayed)
    plan, findings = plan_rank(replayed, manifest)
    assert findings.problems == ()

    layout = make_layout(manifest, 64 << 10)
    staging, source = Staging(replayed, plan, layout), ModuleSource(trainer)
    packer = Packer(layout, FP8BlockConfig(), torch.device("cpu"))
    for bucket in reversed(layout.buckets):  # the order does not matter
        staging.bucket(bucket.index)[:] = packer.pack(bucket, source.gather(bucket.names))
        staging.scatter(bucket.index)
    assert fingerprint(replayed) == untouched, "written before the commit"
    assert staging.check_addresses() is None
    staging.commit()

    loaded.load_weights(checkpoint(trainer))
    assert fingerprint(replayed) == fingerprint(loaded)
    assert {name: p.data_ptr() for name, p in replayed.named_parameters()} == addresses


@pytest.mark.parametrize("padded", [256, 300])
def test_a_vocabulary_with_and_without_padding(padded: int) -> None:
    """SGLang's embedding fills the rows after the vocabulary with zeros, also if there are none."""
    model = Linear(padded, 4)
    model.load = lambda out, weight: (out.data[:256].copy_(weight), out.data[256:].fill_(0))
    plan = trace(model, [Source("w0", (256, 4), torch.float32)])
    assert plan.problems == ()
    weight = ManifestTensor(name="w0", shape=(256, 4), dtype="float32", quantized=False)
    layout = make_layout([weight])
    staging = Staging(model, plan, layout)
    values = torch.randn(256, 4)
    staging.bucket(0).copy_(values.view(-1).view(torch.uint8))
    staging.scatter(0)
    staging.commit()
    assert torch.equal(model.out[:256], values) and not model.out[256:].any()


@pytest.mark.usefixtures("wide_heads")
def test_the_ranks_together_use_every_source_whole() -> None:
    manifest = manifest_for(Trainer())
    findings = [plan_rank(Served(rank, 2), manifest)[1] for rank in range(2)]
    assert unused_problems(manifest, findings) == []
    missing = unused_problems(manifest, findings[:1])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert f"{name} [512, 192]: the server has no place for its part [256:512, 0:192]" in missing


def test_a_cut_inside_of_a_block_is_a_named_hole() -> None:
    """k and v of 64 rows a rank: there is no scale for half a block."""
    manifest = manifest_for(Trainer())
    _, findings = plan_rank(Served(0, 2), manifest)
    assert findings.problems == tuple(
        f"{layer}.qkv_proj.weight: the loader cuts {layer}.v_proj.weight through its 128x128 blocks"
        for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn")
    )


# ---- loaders that cannot be replayed


def trace_loader(load: Loader, *shapes: tuple[int, ...]) -> BindingPlan:
    model = Linear()
    model.load = load
    before, address = model.out.clone(), model.out.data_ptr()
    sources = [Source(f"w{i}", shape, torch.float32) for i, shape in enumerate(shapes or [(4, 6)])]
    plan = trace(model, sources)
    assert torch.equal(model.out, before) and model.out.data_ptr() == address, "a trace wrote to a parameter"
    return plan


def doubled(out: nn.Parameter, weight: torch.Tensor) -> None:
    out.data.copy_(weight * 2)


def read(out: nn.Parameter, weight: torch.Tensor) -> None:
    out.data.copy_(weight)
    weight[0, 0].item()


def cast(out: nn.Parameter, weight: torch.Tensor) -> None:
    out.data.copy_(weight.to(torch.bfloat16))


def copied(out: nn.Parameter, weight: torch.Tensor) -> None:
    out.data.copy_(weight.t().contiguous().t())


def changed_in_place(out: nn.Parameter, weight: torch.Tensor) -> None:
    out.data.copy_(weight.mul_(2))


@pytest.mark.parametrize("load", [doubled, read, cast, copied, changed_in_place])
def test_a_loader_that_computes_with_a_source_is_named(load: Loader) -> None:
    plan = trace_loader(load)
    said = ("computes with it (aten.", "reads its value")
    assert plan.problems[0].startswith((*(f"w0: the loader {what}" for what in said), "w0: the model's loader refused"))


def added(out: nn.Parameter, weight: torch.Tensor) -> None:
    out.data.copy_(weight)
    out.data.add_(1)


def scattered(out: nn.Parameter, weight: torch.Tensor) -> None:
    out.data.copy_(weight)
    out.data.index_fill_(0, torch.tensor([1]), 0.0)


def multiplied_into(out: nn.Parameter, weight: torch.Tensor) -> None:
    out.data.copy_(weight)
    torch.mul(out.data, 2, out=out.data)


def multiplied_as_a_list(out: nn.Parameter, weight: torch.Tensor) -> None:
    out.data.copy_(weight)
    torch._foreach_mul_([out.data], 2.0)


def copied_from_elsewhere(out: nn.Parameter, weight: torch.Tensor) -> None:
    out.data.copy_(torch.zeros(4, 6))
    out.data.copy_(weight)


WRITERS = [added, scattered, multiplied_into, multiplied_as_a_list, copied_from_elsewhere]


@pytest.mark.parametrize("load", WRITERS)
def test_other_writes_to_a_parameter_are_named(load: Loader) -> None:
    model = Linear()
    model.load = load
    problems = trace(model, [Source("w0", (4, 6), torch.float32)]).problems
    assert any(p.startswith("out: load_weights writes it by aten.") for p in problems), problems


@pytest.mark.parametrize("load", WRITERS)
def test_other_writes_leave_the_parameter_as_it_is(load: Loader) -> None:
    """A server traces while it serves: what the plan cannot hold must not happen to its weights either."""
    trace_loader(load)


def swapped(out: nn.Parameter, weight: torch.Tensor) -> None:
    out.data = weight.clone()


def test_a_loader_that_puts_another_tensor_in_place_is_named() -> None:
    plan = trace_loader(swapped)
    assert any(problem.startswith("out [4, 6]: the server needs it and got nothing") for problem in plan.problems)


# ---- what covers a parameter, and what does not


def test_views_of_views_are_followed() -> None:
    """Transposed, cut, and with another shape, on both sides."""

    def load(out: nn.Parameter, weight: torch.Tensor) -> None:
        first, second = weight.t().detach().chunk(2, dim=0)
        out.data.view(1, 4, 6)[0][:2].copy_(first.unsqueeze(0)[0])
        out.data[2:].copy_(second.narrow(1, 0, 6))

    plan = trace_loader(load, (6, 4))
    assert plan.problems == ()
    weight, out = torch.randn(6, 4), torch.empty(4, 6)
    for copy in plan.copies:
        copy.parameter_view.of(out).copy_(copy.source_view.of(weight))
    assert torch.equal(out, weight.t())


def test_flattened_views_are_followed() -> None:
    plan = trace_loader(lambda out, weight: out.data.view(-1).copy_(weight.view(-1)), (6, 4))
    assert plan.problems == () and plan.used_boxes == {"w0": (((0, 6), (0, 4)),)}


def test_holes_and_double_writes_are_named() -> None:
    plan = trace_loader(lambda out, weight: out.data[:3].copy_(weight), (3, 6))
    assert plan.problems == ("out [4, 6]: nothing arrives for its part [3:4, 0:6]",)
    plan = trace_loader(lambda out, weight: out.data[:, 1:].copy_(weight), (4, 5))
    assert plan.problems == ("out [4, 6]: nothing arrives for its part [0:4, 0:1]",)
    plan = trace_loader(lambda out, weight: out.data[: len(weight)].copy_(weight), (4, 6), (1, 6))
    assert plan.problems == ("out [4, 6]: its part [0:1, 0:6] would be written twice",)
    plan = trace_loader(lambda out, weight: None)
    assert plan.problems == ("out [4, 6]: the server needs it and got nothing for it",)


def test_a_window_that_is_no_box_is_named() -> None:
    plan = trace_loader(lambda out, weight: out.data[::2].copy_(weight), (2, 6))
    assert plan.problems[0].startswith("out: the loader uses a window of it that is no box")


def test_fills_are_part_of_the_plan() -> None:
    def load(out: nn.Parameter, weight: torch.Tensor) -> None:
        out.data[:3].copy_(weight)
        out.data[3:].fill_(2.5)

    plan = trace_loader(load, (3, 6))
    assert plan.problems == () and [fill.value for fill in plan.fills] == [2.5]


def test_all_sources_that_a_loader_refuses_are_named_at_once() -> None:
    def load(out: nn.Parameter, weight: torch.Tensor) -> None:
        assert weight.shape == out.shape, f"got {tuple(weight.shape)}"
        out.data.copy_(weight)

    plan = trace_loader(load, (4, 5), (4, 6), (3, 6))
    assert [problem.split(":")[0] for problem in plan.problems] == ["w0", "w2"]
    assert "refused it: AssertionError: got (4, 5)" in plan.problems[0]


def test_k_scale_and_v_scale_need_no_source() -> None:
    model = Linear()
    model.load = lambda out, weight: out.data.copy_(weight)
    model.k_scale = nn.Parameter(torch.ones(()), requires_grad=False)
    assert trace(model, [Source("w0", (4, 6), torch.float32)]).problems == ()
