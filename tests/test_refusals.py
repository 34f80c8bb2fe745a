"""What is refused, rule by rule, on real layers of SGLang; and that nothing of the zoo is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from receiver_plugin import sglang_refusals as refusals
from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from receiver_plugin.sglang_derived import SglangDerived, unknown_tensors
from receiver_plugin.sglang_engine import SglangEngine, _backends, _unsafe_layers
from receiver_plugin.sglang_refusals import Backends, refused_copies, refused_layers
from sender import FP8Sender
from sender.control import InProcessControl
from shared import errors, protocol
from tests.in_process import one_thread, sglang_rank
from tests.test_keep import OPTIONS_OFF
from tests.test_push_memory import expected
from tests.tiny_models import FakeEngine, Served, Trainer
from tests.zoo import CASES, Case

DOCS = (Path(__file__).parents[1] / "docs" / "refusals.md").read_text(encoding="utf-8")
HOPPER = Backends(capability=(9, 0), is_rocm=False, moe_runner="auto", moe_a2a="none")
LINEAR, MOE = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.experts"
Change = Callable[[pytest.MonkeyPatch, Any, Any], object]  # of a layer and its method


def fp8_folder(case: Case, folder: Path) -> Path:
    """`config.json` of a block-FP8 checkpoint, and no weights."""
    described = {**case.hf_config(), "quantization_config": case.fp8.to_hf()}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    """Every family of the zoo, as a server without weights starts with it."""
    found = {}
    with one_thread():
        for name, case in CASES.items():
            folder = fp8_folder(case, tmp_path_factory.mktemp(name))
            with mock.patch.dict(os.environ, dict(case.server_env)), sglang_rank(folder, args=case.server_args) as rank:
                found[name] = rank.start()
    return found


@pytest.fixture
def model(models: dict[str, nn.Module]) -> nn.Module:
    return models["qwen3_moe"]


@pytest.fixture
def kept(models: dict[str, nn.Module]) -> nn.Module:
    """With experts in BF16."""
    return models["qwen3_moe_kept"]


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_zoo_is_refused(name: str, models: dict[str, nn.Module]) -> None:
    assert list(unknown_tensors(models[name])) == []
    assert _unsafe_layers(models[name], _backends((0, 0))) == refused_layers(models[name], HOPPER) == []


# ---- backends


def mark(name: str, value: object = True) -> Change:
    return lambda patch, layer, method: patch.setattr(layer, name, value, raising=False)


def of_method(name: str, value: object = True) -> Change:
    return lambda patch, layer, method: patch.setattr(method, name, value, raising=False)


def of_config(name: str, value: object = True) -> Change:
    return lambda patch, layer, method: patch.setattr(method.quant_config, name, value, raising=False)


def of_parameter(parameter: str, name: str) -> Change:
    return lambda patch, layer, method: patch.setattr(getattr(layer, parameter), name, True, raising=False)


def replaced(parameter: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """As SGLang puts a weight of another form into a layer."""

    def change(patch: pytest.MonkeyPatch, layer: Any, method: Any) -> None:
        other = nn.Parameter(make(getattr(layer, parameter).data), requires_grad=False)
        patch.setitem(layer._parameters, parameter, other)

    return change


def without(parameter: str) -> Change:
    return lambda patch, layer, method: patch.delitem(layer._parameters, parameter)


def runner(name: str) -> Change:
    return of_method("runner", SimpleNamespace(runner_backend=SimpleNamespace(value=name)))


def unchanged(patch: pytest.MonkeyPatch, layer: Any, method: Any) -> None:
    """The backends alone are what is wrong."""


SM100 = HOPPER.__class__((10, 0), False, "deep_gemm", "none")
BOTH: list[tuple[str, Change, Backends]] = [
    ("ROCm", unchanged, Backends((9, 4), True, "auto", "none")),
    ("Intel AMX", mark("use_intel_amx_backend"), HOPPER),
    ("FP8 without blocks", of_method("block_quant", False), HOPPER),
    ("MXFP8", of_method("use_mxfp8"), HOPPER),
    ("MXFP8", of_config("use_mxfp8"), HOPPER),  # converted to blocks at the load: the method has forgotten it
    ("other blocks", of_config("weight_block_size", [32, 32]), HOPPER),
]
FIRES_ON_LINEAR: list[tuple[str, Change, Backends]] = [
    *BOTH,
    ("AITER", mark("aiter_bpreshuffled"), HOPPER),
    ("AITER", of_parameter("weight", "is_shuffled"), HOPPER),
    ("Marlin", of_method("use_marlin"), HOPPER),
    ("DeepGEMM on Blackwell", of_parameter("weight_scale_inv", "format_ue8m0"), HOPPER),
    ("other types", replaced("weight", lambda w: w.view(torch.float8_e4m3fnuz)), HOPPER),
    ("other types", replaced("weight", lambda w: w.view(torch.int32)), HOPPER),
    ("other types", replaced("weight_scale_inv", lambda s: s.to(torch.int32)), HOPPER),
    ("other types", without("weight_scale_inv"), HOPPER),
    ("other layout", replaced("weight", lambda w: w.t()), HOPPER),
    ("other layout", replaced("weight_scale_inv", lambda s: s.t().contiguous().t()), HOPPER),
    ("other layout", replaced("weight_scale_inv", lambda s: s[:, :1].contiguous()), HOPPER),
]
FIRES_ON_MOE: list[tuple[str, Change, Backends]] = [
    *BOTH,
    ("AITER", of_parameter("w13_weight", "is_shuffled"), HOPPER),
    ("FP4 experts", of_method("is_fp4_expert"), HOPPER),
    *(("another MoE runner", runner(name), HOPPER) for name in ("marlin", "flashinfer_trtllm", "aiter", "hpc_ops")),
    ("another MoE runner", of_method("runner", None), Backends((9, 0), False, "flashinfer_mxfp4", "none")),
    ("DeepGEMM experts on Blackwell", runner("deep_gemm"), SM100),
    ("DeepGEMM experts on Blackwell", of_parameter("w2_weight_scale_inv", "format_ue8m0"), HOPPER),
    ("MegaMoE", unchanged, Backends((9, 0), False, "auto", "megamoe")),
    ("MegaMoE", unchanged, Backends((9, 0), False, "auto", "flashinfer_megamoe")),
    ("HPC-Ops", mark("hpc_ops_w13_weight_scale", torch.ones(2)), HOPPER),
    ("other expert types", replaced("w2_weight", lambda w: w.view(torch.uint8)), HOPPER),
    ("other expert layout", replaced("w13_weight", lambda w: w.transpose(1, 2)), HOPPER),
    ("other expert layout", replaced("w13_weight_scale_inv", lambda s: s[..., :1].contiguous()), HOPPER),
]


@pytest.mark.parametrize(
    ("path", "backend", "change", "backends"),
    [*((LINEAR, *case) for case in FIRES_ON_LINEAR), *((MOE, *case) for case in FIRES_ON_MOE)],
)
def test_a_layer_is_refused_with_backend_reason_and_way_out(
    path: str, backend: str, change: Change, backends: Backends, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = model.get_submodule(path)
    method: Any = layer.quant_method
    monkeypatch.setattr(method, "quant_config", SimpleNamespace(**vars(method.quant_config)))  # shared by all layers
    change(monkeypatch, layer, method)
    rule = next(r for r in (*refusals.ANY_METHOD, *refusals.METHODS[type(method).__name__]) if r.backend == backend)
    found = refused_layers(model, backends)
    (mine,) = [reason for reason in found if reason.startswith(path)]
    assert f": {backend} ({type(method).__name__}" in mine and mine.endswith(f"): {rule.why}: {rule.way_out}")
    assert change is unchanged or len(found) == 1


FIRES_ON_BF16_MOE: list[tuple[str, Change, Backends]] = [
    ("ROCm", unchanged, Backends((9, 4), True, "auto", "none")),
    ("AITER", of_parameter("w13_weight", "is_shuffled"), HOPPER),
    ("Intel AMX", mark("use_intel_amx_backend"), HOPPER),
    *(("another MoE runner for BF16", runner(name), HOPPER) for name in ("triton_kernel", "flashinfer_cutlass")),
    ("another MoE runner for BF16", of_method("runner", None), Backends((9, 0), False, "deep_gemm", "none")),
    ("MegaMoE", unchanged, Backends((9, 0), False, "auto", "megamoe")),
    ("other layout of BF16 experts", of_method("w13_swiglu_interleaved"), HOPPER),
    ("other layout of BF16 experts", replaced("w2_weight", lambda w: w.transpose(1, 2)), HOPPER),
]


@pytest.mark.parametrize(("backend", "change", "backends"), FIRES_ON_BF16_MOE)
def test_experts_in_bf16_are_refused_likewise(
    backend: str, change: Change, backends: Backends, kept: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "model.layers.1.mlp.experts"
    layer = kept.get_submodule(path)
    change(monkeypatch, layer, layer.quant_method)
    (mine,) = [reason for reason in refused_layers(kept, backends) if f"{backend} (UnquantizedFusedMoEMethod" in reason]
    assert path in mine


def test_every_rule_has_a_case() -> None:
    def names(rules: tuple[refusals.Rule, ...]) -> set[str]:
        return {rule.backend for rule in (*refusals.ANY_METHOD, *rules)}

    assert {backend for backend, _, _ in FIRES_ON_LINEAR} == names(refusals.LINEAR)
    assert {backend for backend, _, _ in FIRES_ON_MOE} == names(refusals.MOE)
    assert {backend for backend, _, _ in FIRES_ON_BF16_MOE} == names(refusals.BF16_MOE)


@pytest.mark.parametrize("name", refusals.RAW_RUNNERS)
@pytest.mark.parametrize("exchange", refusals.RAW_A2A)
def test_runners_that_read_experts_as_loaded_are_taken(
    name: str, exchange: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer in model.modules():
        if type(getattr(layer, "quant_method", None)).__name__ == "Fp8MoEMethod":
            runner(name)(monkeypatch, layer, layer.quant_method)
    assert refused_layers(model, Backends((9, 0), False, "auto", exchange)) == []


FOREIGN_METHODS = (
    "fp8.Fp8LinearMethod_of_another_plugin",
    "w4afp8.W4AFp8MoEMethod",
    "w8a8_fp8.W8A8Fp8LinearMethod",
    "modelopt_quant.ModelOptFp8LinearMethod",
    "compressed_tensors.compressed_tensors.CompressedTensorsLinearMethod",
)


@pytest.mark.parametrize("name", FOREIGN_METHODS)
def test_methods_that_are_not_known_are_refused(name: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, kind = name.rpartition(".")
    found = getattr(__import__(f"sglang.srt.layers.quantization.{module}", fromlist=[kind]), kind, None)
    method: Any = object.__new__(found or type(kind, (), {}))
    monkeypatch.setitem(vars(model.get_submodule(LINEAR)), "quant_method", method)
    assert refused_layers(model, HOPPER) == [f"{LINEAR}: its method {kind} {refusals.UNKNOWN_METHOD}"]
    assert (found is None) == name.endswith("plugin"), "SGLang has renamed it"


def test_layers_that_lora_wraps_are_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.lora.layers import BaseLayerWithLoRA, QKVParallelLinearWithLoRA

    assert BaseLayerWithLoRA.__name__ == refusals.LORA_BASE and BaseLayerWithLoRA in QKVParallelLinearWithLoRA.__mro__
    holder = model.get_submodule("model.layers.0.self_attn")
    wrapped: Any = QKVParallelLinearWithLoRA.__new__(QKVParallelLinearWithLoRA)
    BaseLayerWithLoRA.__init__(wrapped, holder.qkv_proj, None)
    monkeypatch.setitem(holder._modules, "qkv_proj", wrapped)
    assert refused_layers(model, HOPPER) == [f"{LINEAR}: {refusals.LORA}"]


def test_other_devices_are_refused() -> None:
    model = nn.Linear(2, 2, device="meta")  # as an XPU or an NPU would say its own name
    assert refused_layers(model, HOPPER) == [f"the model: {refusals.DEVICE}"]


def test_what_sglang_itself_would_not_update_is_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.model_executor.model_runner_components import weight_updater

    monkeypatch.setattr(weight_updater, "_unsupported_derived_weight_cache_error", lambda model: "HPC-Ops GEMM")
    assert _unsafe_layers(model, _backends((9, 0))) == ["the model: SGLang says: HPC-Ops GEMM"]
    monkeypatch.setattr(weight_updater, "_unsupported_derived_weight_cache_error", lambda: "HPC-Ops of 0.5.20")
    assert _unsafe_layers(model, _backends((9, 0))) == ["the model: SGLang says: HPC-Ops of 0.5.20"]
    monkeypatch.setattr(model.get_submodule(MOE), refusals.DECLARED, "unset --paged", raising=False)
    assert _unsafe_layers(model, _backends((9, 0))) == [f"{MOE}: SGLang says: unset --paged"]


def test_layers_with_one_reason_are_one_line(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in (0, 1):
        experts: Any = model.get_submodule(f"model.layers.{index}.mlp.experts")
        monkeypatch.setattr(experts.quant_method, "is_fp4_expert", True)
    (reason,) = refused_layers(model, HOPPER)
    assert reason.startswith(f"{MOE} and 1 more: FP4 experts (Fp8MoEMethod, runner triton, all-to-all none): ")


# ---- copies


MATRIX = torch.ones(2, 3)


def topk_config() -> Any:
    from sglang.srt.layers.moe.topk import TopKConfig

    return TopKConfig(top_k=2, correction_bias=MATRIX)


def on_parameter(layer: Any) -> None:
    layer.weight._mxscale_w_scale = MATRIX


KEPT: dict[str, Callable[[Any], None]] = {
    "_fused_in_proj_weight": lambda layer: setattr(layer, "_fused_in_proj_weight", MATRIX),
    "_hc_attn_tf32_parts.1": lambda layer: setattr(layer, "_hc_attn_tf32_parts", (None, MATRIX)),
    "cache.w": lambda layer: setattr(layer, "cache", {"w": MATRIX}),
    "topk_config.correction_bias": lambda layer: setattr(layer, "topk_config", topk_config()),
    "decay": lambda layer: setattr(layer, "decay", torch.ones(3)),
    "weight._mxscale_w_scale": on_parameter,
    "_block_fp8_bf16_weight": lambda layer: layer.register_buffer("_block_fp8_bf16_weight", MATRIX, persistent=False),
    "gemma_weight": lambda layer: layer.register_buffer("gemma_weight", MATRIX, persistent=False),
    "w_kc": lambda layer: setattr(layer, "w_kc", MATRIX),  # not of MLA
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("learned", torch.ones(4))


@pytest.mark.parametrize("name", KEPT)
def test_tensors_that_may_be_derived_are_refused(name: str) -> None:
    model = nn.Module()
    model.layer = Layer()
    KEPT[name](model.layer)
    (reason,) = refused_copies(unknown_tensors(model))
    way_out = next((refusals.COPIES[part] for part in name.split(".") if part in refusals.COPIES), None)
    assert reason == f"layer.{name}: {refusals.STALE}: {way_out or refusals.NOT_SUPPORTED}"


def test_tensors_that_follow_their_parameter_are_not() -> None:
    layer: Any = Layer()
    layer.halves = layer.weight.data.view(2, 8)[:1]
    layer.same = [layer.learned]
    layer.scale, layer.indices, layer.inv_freq = torch.tensor(1.5), torch.arange(9), torch.ones(3)
    assert list(unknown_tensors(layer)) == []


def test_mla_that_is_never_derived_again_fences(models: dict[str, nn.Module]) -> None:
    derived = SglangDerived(models["deepseek_v3"])
    with pytest.raises(
        errors.CommitError, match=r"w_kc stays that of the old weights: load_weights calls no post_load"
    ):
        derived.refresh([])


# ---- the engine


@pytest.fixture
def engine(model: nn.Module) -> SglangEngine:
    from sglang.srt.mem_cache.radix_cache import RadixCache

    config = SimpleNamespace(hf_config=SimpleNamespace(quantization_config={}))
    scheduler = SimpleNamespace(
        server_args=SimpleNamespace(moe_runner_backend="auto", **OPTIONS_OFF),
        tree_cache=RadixCache.create_simulated(),
        tp_group=SimpleNamespace(world_size=1),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model_config=config)),
        weight_updater=SimpleNamespace(offload_tags=set()),
        enable_hicache_storage=False,
    )
    return SglangEngine(scheduler, model)


def test_released_memory_and_stored_kv_cache_are_refused(engine: SglangEngine) -> None:
    scheduler = engine._scheduler
    assert engine.unsafe() == []
    scheduler.weight_updater.offload_tags = {"kv_cache"}
    assert engine.unsafe() == []
    scheduler.weight_updater.offload_tags = {"kv_cache", "weights"}
    assert engine.unsafe() == ["the memory of the weights is released: resume it first"]
    scheduler.weight_updater.offload_tags, scheduler.enable_hicache_storage = set(), True
    assert engine.unsafe() == ["KV cache of old weights would stay in the HiCache storage: detach it"]


def test_what_comes_up_after_the_start_is_seen(
    engine: SglangEngine, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.get_submodule(LINEAR), "made_by_the_first_request", MATRIX, raising=False)
    (reason,) = engine.unsafe()
    assert reason.startswith(f"{LINEAR}.made_by_the_first_request: ")


def test_the_placement_of_experts_is_part_of_the_incarnation(
    engine: SglangEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.eplb import expert_location

    monkeypatch.setattr(expert_location, "get_global_expert_location_metadata", lambda: None)
    assert engine.placement() == "" and engine.info("1nc").incarnation == "1nc"
    monkeypatch.undo()
    with sglang_rank(fp8_folder(CASES["qwen3_moe"], tmp_path), 0, 2, 2, ("--ep-num-redundant-experts", "2")):
        metadata: Any = expert_location.get_global_expert_location_metadata()
        before, info = engine.placement(), engine.info("1nc")
        assert before and info.incarnation == f"1nc@{before}" == f"1nc@{engine.placement()}"
        moved = metadata.physical_to_logical_map_cpu[1]
        moved[[0, 1]] = moved[[1, 0]]  # in place, as SGLang's `update` does
        assert engine.placement() != before
        moved[[0, 1]] = moved[[1, 0]]
        assert engine.placement() == before


# ---- experts that move


class Moving(FakeEngine):
    placement = "here"

    def info(self, incarnation: str) -> protocol.ServerInfo:
        return super().info(incarnation).model_copy(update={"incarnation": f"{incarnation}@{self.placement}"})


class Server:
    def __init__(self) -> None:
        self.model, self.engine = Served(), Moving()
        self.receiver = Receiver(self.model, self.engine, SingleRank())
        self.control = InProcessControl("moving", self.receiver.handle)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def sender(server: Server) -> Iterator[FP8Sender]:
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as made:
        yield made


def test_a_push_plans_anew_when_experts_were_moved(server: Server, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))
    plan = sender._planned
    sender.push(Trainer(seed=2))
    assert sender._planned is plan
    server.engine.placement = "there"
    sender.push(Trainer(seed=3))
    assert id(sender._planned) != id(plan)
    assert fingerprint(server.model) == expected(Trainer(seed=3))


STEPS: dict[str, Any] = {"Open": protocol.Open, "Commit": protocol.Commit}


def test_experts_that_move_before_a_push_begins_are_planned_anew(
    server: Server, sender: FP8Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender.push(Trainer(seed=1))
    handle = server.receiver.handle

    def move_first(message: Any) -> protocol.Reply:
        if isinstance(message, protocol.Begin):
            server.engine.placement = "there"
        return handle(message)

    monkeypatch.setattr(server.control, "_handle", move_first)
    assert sender.push(Trainer(seed=2)).version == 2
    assert fingerprint(server.model) == expected(Trainer(seed=2))


@pytest.mark.parametrize("step", STEPS)
def test_experts_that_move_in_a_push_end_it(
    step: str, server: Server, sender: FP8Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    if step != "Open":
        sender.push(Trainer(seed=1))
    before, handle = fingerprint(server.model), server.receiver.handle

    def move_first(message: Any) -> protocol.Reply:
        if isinstance(message, STEPS[step]):
            server.engine.placement = "there"
        return handle(message)

    monkeypatch.setattr(server.control, "_handle", move_first)
    with pytest.raises(errors.SessionLostError, match="its experts were moved since this sender planned; nothing was"):
        sender.push(Trainer(seed=2))
    assert fingerprint(server.model) == before
    assert handle(protocol.Describe()).state == "SERVING"
    monkeypatch.undo()
    sender.push(Trainer(seed=2))
    assert fingerprint(server.model) == expected(Trainer(seed=2))


# ---- the documentation


def rows_of(heading: str) -> list[tuple[str, ...]]:
    """The table below `heading`, without its head."""
    part = DOCS.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [tuple(row.strip("| ").split(" | ")) for row in part.splitlines() if row.startswith("| ")]
    assert rows[0] == ("what", "why", "the way out")
    return rows[1:]


def test_the_documentation_has_every_rule_and_no_other() -> None:
    assert rows_of("Options") == [(f"`{o.flag}`", o.why, o.way_out) for o in refusals.OPTIONS]
    rules = [*refusals.ANY_METHOD, *refusals.LINEAR, *(r for r in refusals.MOE if r not in refusals.BLOCK_FP8)]
    rules += [rule for rule in refusals.BF16_MOE if rule not in refusals.MOE]
    layers = [(what.split(" (")[0], why, way_out) for what, why, way_out in rows_of("Layers")]
    assert layers[: len(rules)] == [(rule.backend, rule.why, rule.way_out) for rule in rules]
    rest = [": ".join(row) for row in rows_of("Layers")[len(rules) :]]
    assert [refusals.UNKNOWN_METHOD in rest[0], refusals.LORA in rest[1], refusals.DEVICE in rest[2]] == [True] * 3
    assert f"`{refusals.DECLARED}`" in rest[3] and len(rest) == 4
    copies = [(what, way_out) for what, _, way_out in rows_of("Copies of weights")]
    assert copies == [
        *((f"`{n}`", way_out) for n, way_out in refusals.COPIES.items()),
        ("others", refusals.NOT_SUPPORTED),
    ]
    known = (*refusals.RAW_RUNNERS, *refusals.RAW_A2A, *refusals.METHODS)
    assert [name for name in known if f"`{name}`" not in DOCS] == []
