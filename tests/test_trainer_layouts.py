"""However a trainer wraps and shards its model, a push delivers what the bare BF16 model would; or it says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.nn.parallel import DistributedDataParallel

from receiver_plugin.probe import fingerprint
from sender import export_checkpoint
from shared.errors import ConfigError
from tests.test_distributed import make_sender
from tests.test_push_memory import Server, expected
from tests.test_ranks import caught, run_on_ranks
from tests.test_trainer_names import with_adapters
from tests.tiny_models import HIDDEN, VOCAB, Trainer, TrainerLayer

BF16, FP32 = torch.bfloat16, torch.float32
Layout = Callable[[Any], nn.Module]


def fsdp2(**settings: Any) -> Layout:
    def wrap(model: nn.Module) -> nn.Module:
        for layer in [module for module in model.modules() if isinstance(module, TrainerLayer)]:
            fully_shard(layer, **settings)
        fully_shard(model, **settings)
        return model

    return wrap


def fsdp1(**settings: Any) -> Layout:
    def wrap(model: nn.Module) -> nn.Module:
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


def tied(model: Trainer) -> Trainer:
    """A checkpoint has one name for both."""
    model.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
    model.lm_head.weight = model.get_parameter("model.embed_tokens.weight")
    return model


def compiled_layers(model: Trainer) -> Trainer:
    layers = model.get_submodule("model.layers")
    for name, layer in list(layers.named_children()):
        setattr(layers, name, compiled(layer))
    return model


def compiled(model: nn.Module) -> nn.Module:
    found = torch.compile(model)
    assert isinstance(found, nn.Module)
    return found


MASTERS = MixedPrecision(param_dtype=BF16)
ON_2_RANKS: dict[str, tuple[torch.dtype, Layout]] = {
    "unsharded": (BF16, lambda model: model),
    "compiled layers in a compiled model": (BF16, lambda model: compiled(compiled_layers(model))),
    "DDP of a compiled model": (FP32, lambda model: DistributedDataParallel(compiled(model))),
    "compiled DDP, checkpointed": (BF16, lambda model: compiled(DistributedDataParallel(checkpointed(model)))),
    "FSDP2, fp32 masters": (FP32, fsdp2(mp_policy=MixedPrecisionPolicy(param_dtype=BF16))),
    "FSDP2, CPU offload": (BF16, fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "FSDP2, frozen layer": (BF16, lambda model: fsdp2()(frozen(model))),
    "FSDP2, checkpointed and compiled": (BF16, lambda model: compiled(fsdp2()(checkpointed(model)))),
    "FSDP2, tied": (BF16, lambda model: fsdp2()(tied(model))),
    "FSDP2 of merged adapters": (BF16, lambda model: fsdp2()(with_adapters(model, merged=True))),
    "tensor parallel": (BF16, tensor_parallel),
    "FSDP1, original parameters": (BF16, fsdp1(use_orig_params=True)),
    "FSDP1, flat parameters, fp32 masters": (FP32, fsdp1(use_orig_params=False, mixed_precision=MASTERS)),
    "FSDP1, original parameters, fp32 masters, frozen": (
        FP32,
        lambda model: fsdp1(use_orig_params=True, mixed_precision=MASTERS)(frozen(model)),
    ),
    "FSDP1, tied": (BF16, lambda model: fsdp1(use_orig_params=False)(tied(model))),
    "FSDP1 of merged adapters": (BF16, lambda m: fsdp1(use_orig_params=True)(with_adapters(m, merged=True))),
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


# Of 14: each rank has rows of them, in rank order.
QUANTIZED_EARLY = {name: 14 for name in ON_2_RANKS if name.startswith("FSDP2")} | {"tensor parallel": 12}


def push_each(rank: int, layouts: tuple[str, ...]) -> dict[str, str]:
    """By layout: "" or what went wrong. One server on rank 0 takes the pushes of all of them."""
    server, found = (Server(fence="nothing loaded") if rank == 0 else None), {}
    with make_sender(server) as sender:
        for seed, name in enumerate(layouts):
            dtype, wrap = {**ON_2_RANKS, **ON_4_RANKS}[name]
            model = wrap(Trainer(seed, dtype))
            report = sender.push(model)
            wanted = expected(Trainer(seed, dtype).to(BF16))
            same = server is None or fingerprint(server.model) == wanted
            as_planned = report.num_quantized_early == (QUANTIZED_EARLY.get(name, 0))
            found[name] = "" if same and as_planned and report.version == seed + 1 else f"bytes: {same}, {report}"
    return found


@pytest.mark.parametrize(("size", "layouts"), [(2, tuple(ON_2_RANKS)), (4, tuple(ON_4_RANKS))])
def test_all_layouts_push_the_bare_model(size: int, layouts: tuple[str, ...]) -> None:
    for found in run_on_ranks(push_each, size, layouts):
        assert found == dict.fromkeys(layouts, "")


# What training did last must not matter


def embedding_sum(model: Any) -> torch.Tensor:
    total: torch.Tensor = model.model.embed_tokens.weight.float().sum()
    return total


def push_after_evaluation(rank: int, original: bool) -> bool:
    server, model = Server() if rank == 0 else None, fsdp1(use_orig_params=original)(Trainer())
    Trainer.forward = embedding_sum
    with torch.no_grad():
        before = model()  # the root keeps what it gathered
        for parameter in model.parameters():
            parameter.mul_(3.0)
    with make_sender(server) as sender:
        sender.push(model)
    tripled = Trainer()
    for parameter in tripled.parameters():
        parameter.data.mul_(3.0)
    assert torch.equal(model(), embedding_sum(tripled)) and not torch.equal(before, model())
    return server is None or fingerprint(server.model) == expected(tripled)


@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_after_a_forward_without_backward(original: bool) -> None:
    assert run_on_ranks(push_after_evaluation, 2, original) == [True, True]


# What cannot be pushed


def watched() -> tuple[Server, list[object]]:
    """A server, and all messages that reach it."""
    server, heard = Server(), list[object]()
    answer = server.control._handle

    def hear(message: Any) -> Any:
        heard.append(message)
        return answer(message)

    server.control._handle = hear
    return server, heard


class PackedTensor(torch.Tensor):
    """As torchao's: a subclass that calls itself bf16 and holds something else."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        assert func in (torch.ops.aten.detach.default, torch.ops.aten.view.default), f"its values were read: {func}"
        return packed()


def packed() -> torch.Tensor:
    size = torch.Size((256, 192))
    tensor = torch.Tensor._make_wrapper_subclass(PackedTensor, size, dtype=BF16)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def q_proj_replaced(tensor: torch.Tensor) -> Trainer:
    model = Trainer()
    q_proj = model.get_submodule("model.layers.0.self_attn.q_proj")
    q_proj._parameters["weight"] = nn.Parameter(tensor, requires_grad=False)
    return model


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
def test_what_cannot_be_pushed_is_named(tensor: Callable[[], torch.Tensor], why: str, tmp_path: Path) -> None:
    model, (server, heard) = q_proj_replaced(tensor()), watched()
    named = rf"model\.layers\.0\.self_attn\.q_proj\.weight: .*{why}"
    with make_sender(server) as sender, pytest.raises(ConfigError, match=named):
        sender.push(model)
    with pytest.raises(ConfigError, match=named):
        export_checkpoint(model, tmp_path / "out", hf_config={})
    assert not heard and not (tmp_path / "out").exists()


def packed_shards() -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    return q_proj_replaced(DTensor.from_local(packed(), mesh, [ShardPlacement(0)], run_check=False))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return fsdp2()(Trainer())


REFUSED_ON_RANKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "packed shards": (packed_shards, "q_proj.weight: a PackedTensor of torch.bfloat16 cannot be pushed"),
    "FSDP2 on the meta device": (on_meta, "it is on the meta device"),
    "FSDP2, adapters": (lambda: fsdp2()(with_adapters(Trainer(), merged=False)), "model.merge_adapter(), push"),
    "FSDP1, adapters": (
        lambda: fsdp1(use_orig_params=True)(with_adapters(Trainer(), merged=False)),
        "model.merge_adapter(), push",
    ),
}


def push_refused(rank: int) -> dict[str, str]:
    (server, heard), found = watched(), {}
    with make_sender(server if rank == 0 else None) as sender:
        for name, (make_model, _) in REFUSED_ON_RANKS.items():
            found[name] = caught(sender.push, make_model())["text"]
        assert not heard
        sender.push(fsdp2()(Trainer()))
    return found


def test_all_ranks_refuse_alike_and_go_on() -> None:
    for found in run_on_ranks(push_refused, 2):
        for name, (_, text) in REFUSED_ON_RANKS.items():
            assert text in found[name], (name, found[name])
