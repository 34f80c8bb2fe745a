"""However a trainer wraps and shards its model, a push delivers what the bare BF16 model would; or it says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.nn.parallel import DistributedDataParallel

from receiver_plugin.probe import fingerprint
from sender.source import ModuleSource
from shared.errors import ConfigError
from tests.test_distributed import make_sender
from tests.test_push_memory import Server, expected
from tests.test_ranks import run_on_ranks
from tests.tiny_models import Trainer, TrainerLayer

BF16, FP32 = torch.bfloat16, torch.float32
Layout = Callable[[Trainer], nn.Module]


def fsdp2(**settings: Any) -> Layout:
    def wrap(model: Trainer) -> nn.Module:
        for layer in model.get_submodule("model.layers").children():
            fully_shard(layer, **settings)
        fully_shard(model, **settings)
        return model

    return wrap


def fsdp1(**settings: Any) -> Layout:
    def wrap(model: Trainer) -> nn.Module:
        policy = ModuleWrapPolicy({TrainerLayer})
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **settings)

    return wrap


def checkpointed(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, TrainerLayer))
    return model


def frozen(model: Trainer) -> Trainer:
    model.get_submodule("model.layers.0").requires_grad_(False)
    return model


def tensor_parallel(model: Trainer) -> nn.Module:
    """Columns of one weight and rows of the others on each rank, norms on all."""
    mesh = init_device_mesh("cpu", (2,))
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        placement = ShardPlacement(1) if "o_proj" in name else Replicate() if "norm" in name else ShardPlacement(0)
        sharded = nn.Parameter(distribute_tensor(parameter.data, mesh, [placement]))
        setattr(model.get_submodule(owner), leaf, sharded)
    return model


def compiled(model: nn.Module) -> nn.Module:
    found = torch.compile(model)
    assert isinstance(found, nn.Module)
    return found


MASTERS = MixedPrecision(param_dtype=BF16)
ON_2_RANKS: dict[str, tuple[torch.dtype, Layout]] = {
    "unsharded": (BF16, lambda model: model),
    "compiled layers in a compiled model": (BF16, lambda model: compiled(checkpointed(model))),
    "DDP of a compiled model": (FP32, lambda model: DistributedDataParallel(compiled(model))),
    "compiled DDP, checkpointed": (BF16, lambda model: compiled(DistributedDataParallel(checkpointed(model)))),
    "FSDP2, fp32 masters": (FP32, fsdp2(mp_policy=MixedPrecisionPolicy(param_dtype=BF16))),
    "FSDP2, CPU offload": (BF16, fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "FSDP2, frozen layer": (BF16, lambda model: fsdp2()(frozen(model))),
    "FSDP2, checkpointed and compiled": (BF16, lambda model: compiled(fsdp2()(checkpointed(model)))),  # type: ignore[arg-type]
    "tensor parallel": (BF16, tensor_parallel),
    "FSDP1, original parameters": (BF16, fsdp1(use_orig_params=True)),
    "FSDP1, flat parameters, fp32 masters": (FP32, fsdp1(use_orig_params=False, mixed_precision=MASTERS)),
    "FSDP1, original parameters, fp32 masters, frozen": (
        FP32,
        lambda model: fsdp1(use_orig_params=True, mixed_precision=MASTERS)(frozen(model)),
    ),
    "FSDP1, checkpointed": (BF16, lambda model: checkpointed(fsdp1(use_orig_params=True)(model))),
    "FSDP1, nothing sharded": (BF16, fsdp1(use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD)),
}


def hybrid_fsdp2(model: Trainer) -> nn.Module:
    return fsdp2(mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))(model)


def hybrid_fsdp1(model: Trainer) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    strategy = ShardingStrategy.HYBRID_SHARD
    return fsdp1(use_orig_params=True, sharding_strategy=strategy, device_mesh=mesh)(model)


def fsdp_and_tensor_parallel(model: Trainer) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for name, parameter in list(model.named_parameters()):
        if name.endswith("proj.weight"):
            owner, _, leaf = name.rpartition(".")
            placement = ShardPlacement(1) if "o_proj" in name or "down_proj" in name else ShardPlacement(0)
            sharded = nn.Parameter(distribute_tensor(parameter.data, mesh["tp"], [placement]))
            setattr(model.get_submodule(owner), leaf, sharded)
    return fsdp2(mesh=mesh["dp"])(model)


ON_4_RANKS: dict[str, tuple[torch.dtype, Layout]] = {
    "FSDP2, hybrid": (FP32, hybrid_fsdp2),
    "FSDP2 and tensor parallel": (BF16, fsdp_and_tensor_parallel),
    "FSDP1, hybrid": (BF16, hybrid_fsdp1),
}


def push_each(rank: int, layouts: tuple[str, ...]) -> dict[str, str]:
    """By layout: "" or what went wrong. One server on rank 0 takes the pushes of all of them."""
    server, found = (Server(fence="nothing loaded") if rank == 0 else None), {}
    with make_sender(server) as sender:
        for seed, name in enumerate(layouts):
            dtype, wrap = {**ON_2_RANKS, **ON_4_RANKS}[name]
            model = wrap(Trainer(seed, dtype))
            version = sender.push(model).version
            wanted = expected(Trainer(seed, dtype).to(BF16))
            same = server is None or fingerprint(server.model) == wanted
            found[name] = "" if same and version == seed + 1 else f"other bytes, version {version}"
    return found


@pytest.mark.parametrize(("size", "layouts"), [(2, tuple(ON_2_RANKS)), (4, tuple(ON_4_RANKS))])
def test_all_layouts_push_the_bare_model(size: int, layouts: tuple[str, ...]) -> None:
    for found in run_on_ranks(push_each, size, layouts):
        assert found == dict.fromkeys(layouts, "")


# Adapters: stand-ins with the attributes and names of PEFT's layers


class LoraLinear(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(192, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 256, bias=False)})
        self.merged = False


class LoraModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class PeftModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = LoraModel(model)
        self.peft_config: dict[str, Any] = {}


def adapted() -> tuple[PeftModel, list[LoraLinear]]:
    model, layers = Trainer(), []
    for layer in model.get_submodule("model.layers").children():
        attention = layer.get_submodule("self_attn")
        layers.append(LoraLinear(attention.get_submodule("q_proj")))
        attention.q_proj = layers[-1]
    return PeftModel(model), layers


def names_of(model: nn.Module) -> list[str]:
    return [tensor.name for tensor in ModuleSource(model).tensors]


def test_merged_adapters_are_pushed_as_their_base_weights() -> None:
    model, layers = adapted()
    for layer in layers:
        layer.merged = True
    assert sorted(names_of(model)) == sorted(names_of(Trainer()))
    name = "model.layers.1.self_attn.q_proj.weight"
    held = ModuleSource(model).gather([name])[name]
    assert torch.equal(held, layers[1].base_layer.get_parameter("weight"))


def test_adapters_that_are_not_merged_are_refused() -> None:
    model, layers = adapted()
    layers[0].merged = True
    way = r"layers\.1\.self_attn\.q_proj: a LoraLinear .* not merged: model\.merge_adapter\(\), push, model\.unmerge_ad"
    with pytest.raises(ConfigError, match=way):
        ModuleSource(model)


def test_modules_with_two_versions_are_refused() -> None:
    model = Trainer()
    wrapper = nn.Module()
    wrapper.original_module = model.get_submodule("model.embed_tokens")
    wrapper.modules_to_save = nn.ModuleDict({"default": nn.Embedding(250, 192)})
    model.get_submodule("model").embed_tokens = wrapper
    with pytest.raises(ConfigError, match=r"model\.embed_tokens: PEFT keeps two versions .*merge_and_unload\(\)"):
        ModuleSource(model)


# Tensors that cannot be pushed


class PackedTensor(torch.Tensor):
    """As torchao's: a subclass that calls itself bf16 and holds something else."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        assert func is torch.ops.aten.detach.default, "its values were read"
        return packed()


def packed() -> torch.Tensor:
    size = torch.Size((256, 192))
    tensor = torch.Tensor._make_wrapper_subclass(PackedTensor, size, dtype=BF16)
    assert isinstance(tensor, torch.Tensor)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (
            lambda: torch.zeros(256, 96, dtype=torch.uint8),
            "a torch.uint8 cannot be pushed: train in bf16, fp16 or fp32",
        ),
        (lambda: torch.zeros(256, 192, dtype=torch.float8_e4m3fn), "a torch.float8_e4m3fn cannot be pushed"),
        (packed, "a PackedTensor of torch.bfloat16 cannot be pushed"),
        (lambda: torch.empty(256, 192, device="meta"), "on the meta device"),
    ],
)
def test_what_cannot_be_pushed_is_named(tensor: Callable[[], torch.Tensor], why: str) -> None:
    model = Trainer()
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.get_submodule("q_proj")._parameters["weight"] = nn.Parameter(tensor(), requires_grad=False)
    with pytest.raises(ConfigError, match=rf"model\.layers\.0\.self_attn\.q_proj\.weight: .*{why}"):
        ModuleSource(model)


class Interleaved(nn.Module):
    """Experts as GPT-OSS keeps them."""

    is_transposed, is_concatenated = True, False

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 16, dtype=BF16))


def test_experts_in_another_layout_are_refused() -> None:
    model = nn.Module()
    model.experts = Interleaved()
    with pytest.raises(ConfigError, match="experts: its experts are stored transposed or interleaved"):
        ModuleSource(model)


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((name, tuple(parameter.shape)) for name, parameter in Trainer().named_parameters())


def test_names_and_shapes_are_those_of_the_bare_model() -> None:
    model = compiled(checkpointed(Trainer()))
    assert [(t.name, t.shape) for t in ModuleSource(model).tensors] == list(shapes())
