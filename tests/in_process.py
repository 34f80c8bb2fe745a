"""Real SGLang models of any tensor- or expert-parallel rank in this process: no server, no other rank.

    with sglang_rank(checkpoint, rank=1, tp_size=2) as rank:
        loaded = rank.load()        # as SGLang's own loader does it, from the files in `checkpoint`
        pushed = rank.start()       # as a server with `--load-format dummy` starts
        replay(pushed, trainer)     # what a push of `trainer` does to it on this rank
    assert differences(pushed, loaded) == []

A process group that answers nothing (torch's "fake") stands for the other ranks: loading needs none of them. Models
may be looked at after the block; their `load_weights` asks SGLang who it is, so it runs inside only. Blocks do not
nest. A block takes 0.1 s; the first one imports SGLang, 10 s.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from examples.local_server import CPU_ARGS
from receiver_plugin.manifest import (
    RankFindings,
    expected_in_fp8,
    manifest_of,
    plan_rank,
    raise_problems,
    unused_problems,
)
from receiver_plugin.staging import Staging
from sender.packer import Packer
from sender.source import ModuleSource
from shared.buckets import make_layout
from shared.config import FP8BlockConfig

KV_CACHE_SCALES = (".k_scale", ".v_scale")  # of attention, not in a checkpoint of weights


def replay(model: nn.Module, trainer: nn.Module, config: FP8BlockConfig | None = None) -> RankFindings:
    """Plan, move bytes and commit as a push of `trainer` does on the rank of `model`; what the rank found is returned.

    Raises:
        PlanError: the push would be refused on this rank.
    """
    from receiver_plugin.sglang_derived import SglangDerived

    config, source, derived = config or FP8BlockConfig(), ModuleSource(trainer), SglangDerived(model)
    manifest = manifest_of(source.tensors, expected_in_fp8(source.tensors, config))
    plan, findings = plan_rank(model, manifest, derived)
    raise_problems(findings.problems, 1)
    layout = make_layout(manifest, 256 << 10)
    staging, packer = Staging(model, plan, layout), Packer(layout, config, torch.device("cpu"))
    for bucket in reversed(layout.buckets):  # their order does not matter
        staging.bucket(bucket.index)[:] = packer.pack(bucket, source.gather(bucket.names))
        staging.scatter(bucket.index)
    packer.check_finite()
    assert staging.check_addresses() is None
    with torch.inference_mode():
        staging.commit()
        derived.refresh(plan.calls)
    return findings


def check_together(trainer: nn.Module, findings: Sequence[RankFindings], config: FP8BlockConfig | None = None) -> None:
    """What a server asks of the findings of all its ranks.

    Raises:
        PlanError: a tensor of `trainer`, or a part of one, has no place on any rank.
    """
    config, tensors = config or FP8BlockConfig(), ModuleSource(trainer).tensors
    expected = expected_in_fp8(tensors, config)
    assert frozenset().union(*(rank.quantized for rank in findings)) == expected, "the ranks hold others in FP8"
    raise_problems(unused_problems(manifest_of(tensors, expected), findings), len(findings))


@dataclass(frozen=True)
class SglangRank:
    """One rank of a server. Models are built on the CPU."""

    model_config: Any
    load_config: Any

    def load(self, into: nn.Module | None = None) -> nn.Module:
        """The model, or `into`, with the weights of its folder, as SGLang starts with them."""
        from sglang.srt.model_loader.loader import DefaultModelLoader

        model, loader = self.build() if into is None else into, DefaultModelLoader(self.load_config)
        weights = loader._get_all_weights(self.model_config, model)
        loader.load_weights_and_postprocess(model, weights, torch.device("cpu"))
        return model

    def start(self) -> nn.Module:
        """The model as a server with `--load-format dummy` starts with it."""
        from sglang.srt.model_loader.loader import DummyModelLoader

        model: nn.Module = DummyModelLoader(self.load_config).load_model(
            model_config=self.model_config, device_config=_device("cpu")
        )
        return model

    def garbage(self, seed: int) -> nn.Module:
        """The model with other finite values for every seed in all that a checkpoint holds, derived weights too."""
        from sglang.srt.model_loader.loader import DefaultModelLoader, post_load_weights

        model, generator = self.build(), torch.Generator().manual_seed(seed)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and not name.endswith(KV_CACHE_SCALES):
                tensor.detach().copy_((torch.rand(tensor.shape, generator=generator) + 0.5).to(tensor.dtype))
        with torch.no_grad():
            post_load_weights(model)
            DefaultModelLoader.postprocess_weights(model, torch.device("cpu"))
        return model

    def build(self, device: str = "cpu") -> nn.Module:
        """The model as it is before it loads anything; on "meta" it takes no memory."""
        from sglang.srt.model_loader.loader import DefaultModelLoader

        model: nn.Module = DefaultModelLoader(self.load_config).initialize_model_for_startup(
            model_config=self.model_config, device_config=_device(device)
        )
        _forget_meta_rope()
        return model.eval()


@contextmanager
def sglang_rank(
    folder: Path, rank: int = 0, tp_size: int = 1, ep_size: int = 1, args: Sequence[str] = ()
) -> Iterator[SglangRank]:
    """Be tensor-parallel rank `rank` of `tp_size` of a server on `folder` (config.json; for `load` weights too).

    `args` are further SGLang arguments. What this sets in the process is undone at the end.

    Raises:
        RuntimeError: a process group is open already, or SGLang found an accelerator.
    """
    if dist.is_initialized():
        raise RuntimeError("a process group is open in this process: no SGLang rank can be pretended beside it")
    import_sglang()
    from sglang.srt import runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap

    sizes = ["--tp-size", str(tp_size), "--ep-size", str(ep_size)]
    with ExitStack() as undo:
        undo.enter_context(one_thread())
        undo.enter_context(_environment())
        # Qwen3-Next asks torch for the device of its norms, and a CUDA build of torch answers without a GPU, too.
        undo.enter_context(mock.patch("torch.cuda.current_device", return_value="cpu"))
        undo.callback(runtime_context.restore_context, runtime_context.snapshot_context())
        server_args = _server_args(["--model-path", str(folder), *CPU_ARGS, *sizes, *args])
        ranks = runtime_context.SpawnRanks(world_rank=rank, gpu_id=0)
        runtime_context.publish(server_args, role="scheduler", ranks=ranks)
        undo.enter_context(_fake_ranks(rank, tp_size))
        undo.callback(_destroy_groups)
        bootstrap._init_parallel_groups(backend="fake", dist_init_method="", server_args=server_args, gpu_id=0)
        model_config = ModelConfig.from_server_args(server_args)
        bootstrap.init_layer_runtime(model_config=model_config)
        _init_layers(model_config)
        yield SglangRank(model_config, LoadConfig(load_format="auto", tp_rank=rank))


@contextmanager
def one_thread() -> Iterator[None]:
    """No torch threads: on tensors this small they cost more than they save, 20 times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def import_sglang() -> None:
    """Import SGLang as a scheduler does; its platform for machines without an accelerator acts from then on."""
    with _environment(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dozens, of what SGLang itself imports
        import sglang.srt.model_executor.model_runner  # noqa: F401
    from sglang.srt.platforms import current_platform

    if type(current_platform).__name__ != "CpuReference":
        raise RuntimeError(f"SGLang chose {type(current_platform).__name__}: these models are those of a CPU machine")


@contextmanager
def _environment() -> Iterator[None]:
    """That of a server: without Triton's interpreter. Its broadcaster would wait for the other ranks."""
    with mock.patch.dict(os.environ, SGLANG_USE_MESSAGE_QUEUE_BROADCASTER="false"):
        os.environ.pop("TRITON_INTERPRET", None)
        yield


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of `model`: parameters, buffers, and what its modules hold besides, in lists and dicts too."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if name not in ("_modules", "_parameters", "_buffers"):
                found.update(_tensors_in(f"{path}.{name}" if path else name, value))
    return found


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_in(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors_in(f"{name}.{index}", item)


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """The names of all tensors that differ in presence, type, shape, or any byte."""
    mine, theirs = tensors_of(one), tensors_of(other)
    shared = mine.keys() & theirs.keys()
    return sorted({*(mine.keys() ^ theirs.keys()), *(n for n in shared if not same_bytes(mine[n], theirs[n]))})


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.numel() == 0 or torch.equal(_raw(one), _raw(other))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _device(name: str) -> Any:
    from sglang.srt.configs.device_config import DeviceConfig

    return DeviceConfig(name, 0)


def _server_args(words: Sequence[str]) -> Any:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return ServerArgs.from_cli_args(parser.parse_args(list(words)))


@contextmanager
def _fake_ranks(rank: int, size: int) -> Iterator[None]:
    """A default group of `size` ranks without peers; while it stands, every new group is of that kind."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    real: Callable[..., Any] = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **{**kwargs, "backend": "fake"})

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with mock.patch.object(dist, "new_group", new_group):
            yield
    finally:
        if dist.is_initialized():  # SGLang's own end destroys it too
            dist.destroy_process_group()


def _destroy_groups() -> None:
    from sglang.srt.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def _init_layers(model_config: Any) -> None:
    """What a scheduler sets before it builds the model."""
    from sglang.srt.eplb import expert_location
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.runtime_context import get_parallel

    initialize_moe_config()
    initialize_fp8_gemm_config()
    experts = expert_location.compute_initial_expert_location_metadata(
        model_config=model_config, moe_ep_rank=get_parallel().moe_ep_rank
    )
    expert_location.set_global_expert_location_metadata(experts)


def _forget_meta_rope() -> None:
    """SGLang shares rotary embeddings between all models of a process: none on meta may reach the next one."""
    from sglang.srt.layers.rotary_embedding.factory import _ROPE_DICT

    for key in [key for key, rope in _ROPE_DICT.items() if any(buffer.is_meta for buffer in rope.buffers())]:
        del _ROPE_DICT[key]
