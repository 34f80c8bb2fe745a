"""What a scheduler process of SGLang (0.5.16 to 0.5.23) offers to the receiver: ranks, services, dangers."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from sglang.version import __version__ as SGLANG_VERSION

from receiver_plugin.binding import Derived
from receiver_plugin.sglang_derived import SglangDerived
from shared import protocol as wire


def replica_of(scheduler: Any) -> int:
    """Which replica of its server (`--dp-size`) this scheduler belongs to, from 0."""
    if scheduler.server_args.dp_size == 1:
        return 0  # a router may number its servers through SGLANG_DP_RANK
    if hasattr(scheduler, "ps"):  # up to 0.5.22
        return int(scheduler.ps.dp_rank)
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().dp_rank)


class TpRanks:
    """The tensor-parallel ranks of a replica. Used on the scheduler's thread only, inside control requests."""

    def __init__(self, scheduler: Any) -> None:
        self._group = scheduler.tp_group.cpu_group
        self.index = scheduler.tp_group.rank_in_group
        self.size = scheduler.tp_group.world_size

    def gather(self, item: Any) -> list[Any]:
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self._group)
        return items


class SglangEngine:
    """What the receiver asks of SGLang (`receiver_plugin.receiver.Engine`)."""

    def __init__(self, scheduler: Any, model: torch.nn.Module) -> None:
        self._scheduler, self._model = scheduler, model
        self.derived: Derived = SglangDerived(model)
        self._on_gpu = next(model.parameters()).is_cuda
        self._unsafe_layers = _unsafe_layers(model, _capability() if self._on_gpu else (0, 0))

    def info(self, incarnation: str) -> wire.ServerInfo:
        from sglang.srt.layers.quantization.fp8_utils import get_fp8_gemm_runner_backend

        return wire.ServerInfo(
            protocol=wire.PROTOCOL_VERSION,
            sglang_version=SGLANG_VERSION,
            incarnation=incarnation,
            num_ranks=self._scheduler.tp_group.world_size,
            block_size=block_size(self._model),
            scale_fmt=_scale_fmt(self._scheduler.tp_worker.model_runner.model_config.hf_config),
            device=torch.cuda.get_device_name() if self._on_gpu else "cpu",
            compute_capability="{}.{}".format(*_capability()) if self._on_gpu else "",
            gemm_backend=get_fp8_gemm_runner_backend().value if self._on_gpu else "torch",
            moe_backend=str(self._scheduler.server_args.moe_runner_backend),
        )

    def unsafe(self) -> list[str]:
        released = "weights" in getattr(self._scheduler.weight_updater, "offload_tags", ())
        memory = ["the memory of the weights is released: resume it first"] if released else []
        kv_store = getattr(self._scheduler, "enable_hicache_storage", False)
        storage = ["KV cache of old weights would stay in the HiCache storage: detach it"] if kv_store else []
        return [*self._unsafe_layers, *memory, *storage]

    def flush_cache(self) -> bool:
        return bool(self._scheduler.flush_cache(empty_cache=False))

    def synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def publish(self, version: int) -> None:
        record = getattr(self._scheduler, "record_weight_version_change", None)  # from 0.5.19 on
        if record is not None:
            record(new_version=str(version))


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


_UNTOUCHED_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "Fp8KVCacheMethod"}
_RAW_MOE_RUNNERS = {"auto", "triton", "deep_gemm", "cutlass"}


def _unsafe_layers(model: torch.nn.Module, capability: tuple[int, int]) -> list[str]:
    """Layers for which `process_weights_after_loading` would do more than nothing, and why; at most a few of each."""
    reasons: dict[str, str] = {}
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        reason = None if method is None else _why_unsafe(layer, method, capability)
        if reason is not None:
            reasons.setdefault(reason, name)
    return [f"{name} (and maybe others): {reason}" for reason, name in reasons.items()]


def _why_unsafe(layer: Any, method: Any, capability: tuple[int, int]) -> str | None:
    kind = type(method).__name__
    if kind in _UNTOUCHED_METHODS:
        return None
    if kind == "Fp8LinearMethod":
        return _why_linear_unsafe(layer, method)
    if kind == "Fp8MoEMethod":
        return _why_moe_unsafe(layer, capability)
    return f"its method {kind} is not known to leave loaded weights as they are"


def _why_linear_unsafe(layer: Any, method: Any) -> str | None:
    if not method.block_quant:
        return "FP8 without blocks: start the server with the arguments of shared.launch"
    if getattr(method, "use_marlin", False):
        return "Marlin repacks it: unset SGLANG_FORCE_FP8_MARLIN; GPUs before Ada have no other kernel"
    if layer.weight.dtype != torch.float8_e4m3fn or layer.weight_scale_inv.dtype != torch.float32:
        return f"it is kept as {layer.weight.dtype} with {layer.weight_scale_inv.dtype} scales"
    if getattr(layer.weight_scale_inv, "format_ue8m0", False):
        return "DeepGEMM keeps its scales packed on this GPU: start with --fp8-gemm-backend triton"
    if getattr(layer, "aiter_bpreshuffled", False):
        return "AITER shuffles it: ROCm is not supported"
    return None


def _why_moe_unsafe(layer: Any, capability: tuple[int, int]) -> str | None:
    from sglang.srt.layers.moe import get_moe_runner_backend

    runner = get_moe_runner_backend().value
    if runner not in _RAW_MOE_RUNNERS:
        return f"the MoE runner {runner} rearranges experts: start with --moe-runner-backend triton"
    if runner in ("auto", "deep_gemm") and capability >= (10, 0):
        return "DeepGEMM repacks experts on this GPU: start with --moe-runner-backend triton"
    if any(hasattr(layer, attr) for attr in ("hpc_ops_w13_weight_scale", "mega_moe_w13")):
        return "it holds rearranged copies of its experts"
    scales = (layer.w13_weight_scale_inv, layer.w2_weight_scale_inv)
    if any(s.dtype != torch.float32 or getattr(s, "format_ue8m0", False) for s in scales):
        return "its scales are packed: start with --moe-runner-backend triton"
    return None


def _scale_fmt(hf_config: Any) -> Literal["fp32", "ue8m0"]:
    """The scale format that the model's configuration names, overrides included."""
    described = getattr(hf_config, "quantization_config", None) or {}
    get = described.get if isinstance(described, dict) else lambda key: getattr(described, key, None)
    return "ue8m0" if get("scale_fmt") == "ue8m0" else "fp32"


def block_size(model: torch.nn.Module) -> tuple[int, int] | None:
    """The block of the model's FP8 layers, None if it has none."""
    for layer in model.modules():
        config = getattr(getattr(layer, "quant_method", None), "quant_config", None)
        block = getattr(config, "weight_block_size", None)
        if block:
            return int(block[0]), int(block[1])
    return None
