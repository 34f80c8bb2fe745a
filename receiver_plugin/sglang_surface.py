"""What fp8sync uses of SGLang's insides besides its hooks (0.5.16 to 0.5.23), in one place, looked up at every start.

A release that renamed one of these would otherwise break in the middle of a push, or not at all where a default hides
it. `missing_names` looks at classes and modules before anything is hooked; `missing_of` at objects once they exist.
A test compares these lists with what the `sglang_*` modules use.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any

from packaging.version import Version

_UPDATE_ERROR = (
    "sglang.srt.model_executor.model_runner_components.weight_updater._unsupported_derived_weight_cache_error"
)
# Dotted name -> the parameters that are passed or read by name.
NAMES: dict[str, tuple[str, ...]] = {
    "sglang.srt.distributed.get_tp_group": (),
    "sglang.srt.entrypoints.engine.Engine": (),
    "sglang.srt.entrypoints.http_server.app": (),
    "sglang.srt.entrypoints.http_server._setup_and_run_http_server": ("tokenizer_manager", "execute_warmup_func"),
    "sglang.srt.eplb.expert_location.ExpertLocationMetadata.logical_to_all_physical": (),
    "sglang.srt.eplb.expert_location.get_global_expert_location_metadata": (),
    "sglang.srt.layers.layernorm.GemmaRMSNorm": (),
    "sglang.srt.layers.moe.get_moe_a2a_backend": (),
    "sglang.srt.layers.moe.get_moe_runner_backend": (),
    "sglang.srt.layers.quantization.fp8.Fp8LinearMethod": (),
    "sglang.srt.layers.quantization.fp8.Fp8MoEMethod": (),
    "sglang.srt.layers.quantization.fp8_utils.get_fp8_gemm_runner_backend": (),
    "sglang.srt.lora.layers.BaseLayerWithLoRA": (),
    "sglang.srt.managers.io_struct.AbortReq": ("abort_all", "rid"),
    "sglang.srt.managers.io_struct.BaseReq": (),
    "sglang.srt.managers.io_struct.hook_custom_types": (),
    "sglang.srt.managers.io_struct.CheckWeightsReqInput.action": (),
    "sglang.srt.managers.io_struct.ReleaseMemoryOccupationReqInput.tags": (),
    "sglang.srt.managers.io_struct.ResumeMemoryOccupationReqInput.tags": (),
    "sglang.srt.managers.io_struct.ContinueGenerationReqInput.torch_empty_cache": (),
    "sglang.srt.managers.io_struct.PauseGenerationReqInput.mode": (),
    "sglang.srt.managers.scheduler.Scheduler.abort_request": (),
    "sglang.srt.managers.scheduler.Scheduler.continue_generation": (),
    "sglang.srt.managers.scheduler.Scheduler.flush_cache": ("empty_cache",),
    "sglang.srt.managers.scheduler.Scheduler.is_fully_idle": (),
    "sglang.srt.managers.scheduler.Scheduler.pause_generation": (),
    "sglang.srt.managers.scheduler.Scheduler.process_batch_result": ("batch", "result"),
    "sglang.srt.managers.scheduler.Scheduler.record_weight_version_change": ("new_version",),
    "sglang.srt.managers.tokenizer_manager.ServerStatus.Up": (),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._dispatch_to_scheduler": (),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._update_weight_version_if_provided": (),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request": ("abort_all",),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop": (),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.continue_generation": (),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.flush_cache": (),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.pause_generation": (),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.release_memory_occupation": (),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.resume_memory_occupation": (),
    _UPDATE_ERROR: (),
    "sglang.srt.mem_cache.base_prefix_cache.EvictParams": ("num_tokens",),
    "sglang.srt.plugins.load_plugins": (),
    "sglang.srt.server_args.prepare_server_args": (),
    "sglang.srt.utils.common.get_available_gpu_memory": (),
    "sglang.srt.utils.auth.AuthLevel.ADMIN_OPTIONAL": (),
    "sglang.srt.utils.auth.auth_level": (),
    "sglang.utils.TypeBasedDispatcher.__iadd__": (),
}
# Of `ServerArgs`: what is read, and what decides whether a server is refused.
SERVER_ARGS = (
    *(
        "admin_api_key",
        "api_key",
        "disaggregation_mode",
        "download_dir",
        "dp_size",
        "enable_dp_attention",
        "enable_eplb",
    ),
    *("enable_http2", "enable_lmcache", "enable_lora", "enable_weights_cpu_backup", "encoder_only", "grpc_mode"),
    *("grpc_port", "hicache_storage_backend", "load_format", "model_path", "moe_runner_backend", "pp_size"),
    *("revision", "smg_grpc_mode", "speculative_algorithm", "ssl_certfile", "tokenizer_worker_num", "url"),
    *("attn_dp_size", "cpu_offload_gb", "elastic_ep_backend", "enable_elastic_expert_backup", "offload_group_size"),
    "weight_cache_mode",
    *("dllm_algorithm", "enable_hierarchical_cache", "enable_hisparse", "enable_session_radix_cache"),
    "enable_streaming_session",
)
# The release that brought a name, where that is not the oldest supported one. Older ones lack the feature, too.
SINCE = {
    "attn_dp_size": "0.5.23",
    "weight_cache_mode": "0.5.17",
    _UPDATE_ERROR: "0.5.20",
    "sglang.srt.managers.scheduler.Scheduler.record_weight_version_change": "0.5.19",
}
# Of objects, when fp8sync is attached to them.
SCHEDULER = (
    *("_engine_paused", "_request_dispatcher", "enable_hicache_storage", "enable_hierarchical_cache", "server_args"),
    *("max_total_num_tokens", "tree_cache.evict", "waiting_queue"),
    *("tp_group.cpu_group", "tp_group.rank_in_group", "tp_group.world_size"),
    "tp_worker.model_runner.token_to_kv_pool",
    *("tp_worker.model_runner.model", "tp_worker.model_runner.model_config.hf_config", "weight_updater.offload_tags"),
)
MANAGER = (
    *("_result_dispatcher", "is_pause", "server_args", "server_status"),
    *("model_update_lock._cond", "model_update_lock._lock", "model_update_lock._readers"),
    *("model_update_lock.acquire_writer", "model_update_lock.release_writer"),
    "event_loop",
)
RUNNER = (
    *("device", "gpu_id", "is_draft_worker", "mem_fraction_static", "model", "pre_model_load_memory"),
    "server_args.max_total_tokens",
)
ENGINE = ("loop", "tokenizer_manager")
_SERVER_ARGS_CLASS = "sglang.srt.server_args.ServerArgs"


def missing_names(version: str) -> list[str]:
    """Of `NAMES` and `SERVER_ARGS`, what SGLang `version` as it is installed lacks, dotted."""
    found = [problem for name, wanted in NAMES.items() if _expected(name, version) for problem in _lacks(name, wanted)]
    try:
        args = pkgutil.resolve_name(_SERVER_ARGS_CLASS)
    except (ImportError, AttributeError):
        return [*found, _SERVER_ARGS_CLASS]
    # A dataclass in older releases, a msgspec structure in newer ones.
    fields = {*getattr(args, "__dataclass_fields__", ()), *getattr(args, "__struct_fields__", ()), *dir(args)}
    absent = [name for name in SERVER_ARGS if _expected(name, version) and name not in fields]
    return [*found, *(f"{_SERVER_ARGS_CLASS}.{name}" for name in absent)]


def missing_of(holder: object, paths: Iterable[str]) -> list[str]:
    """Of the dotted `paths`, those that `holder` lacks."""
    return [path for path in paths if not _reaches(holder, path.split("."))]


def exists(name: str) -> bool:
    """Whether the dotted `name` is there."""
    return not _lacks(name, ())


def _expected(name: str, version: str) -> bool:
    return Version(version) >= Version(SINCE.get(name, "0"))


def _lacks(name: str, wanted: tuple[str, ...]) -> list[str]:
    try:
        found: Any = pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return [name]
    if not wanted:
        return []
    parameters = inspect.signature(found).parameters
    return [f"{name}({parameter}=)" for parameter in wanted if parameter not in parameters]


def _reaches(holder: object, path: list[str]) -> bool:
    for attribute in path:
        if not hasattr(holder, attribute):
            return False
        holder = getattr(holder, attribute)
    return True
