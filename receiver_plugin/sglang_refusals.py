"""What fp8sync refuses to serve under, by rule: options of a server, backends of a layer, copies that would go stale.

A push copies bytes into live parameters and calls no method of SGLang. That is right only where SGLang (0.5.16 to
0.5.23) leaves a loaded weight as it is and keeps no other form of it. What is not known to do so is refused. The rules
look at layers as they are after a load, so they need nothing of SGLang but names. `docs/refusals.md` has them as a
table; a test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from receiver_plugin.held import modules
from shared.errors import IncompatibleServerError

# Options of a server


class Option(NamedTuple):
    """A field of SGLang's `ServerArgs` that has to be off; or at most `limit`, where it is a number."""

    field: str
    why: str
    way_out: str
    limit: int | None = None

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-") + ("" if self.limit is None else f" > {self.limit}")

    def is_set(self, args: Any) -> bool:
        value = getattr(args, self.field, None)  # `sglang_surface` makes sure that the release has what it should
        if self.limit is not None:
            return value is not None and value > self.limit
        return value not in (None, False, "off", "none", "null", 0)


_OLD_KV = "it keeps KV cache of old weights"
_FENCE = "only the HTTP server has the fence"
_OFFLOADED = "layers move between host and GPU"
_LEAVE = "leave it out"

OPTIONS = (
    Option("pp_size", "pipeline stages answer no control request", "use --tp-size", 1),
    Option("enable_dp_attention", "not proved yet", "leave it out, --dp-size alone is"),
    Option("attn_dp_size", "DP attention is not proved", "--dp-size is", 1),
    Option("tokenizer_worker_num", "its workers load no plugins", _LEAVE, 1),
    Option("speculative_algorithm", "the draft model would keep old weights", "start without it"),
    Option("enable_lora", "LoRA wraps the layers that are bound", "push merged weights"),
    Option("enable_eplb", "experts would move after the plan was made", "place them with --init-expert-location"),
    Option("elastic_ep_backend", "experts would move after a fault", _LEAVE),
    Option("enable_elastic_expert_backup", "after a fault it brings back old experts", _LEAVE),
    Option("cpu_offload_gb", _OFFLOADED, "use a larger --tp-size", 0),
    Option("offload_group_size", _OFFLOADED, "use a larger --tp-size", 0),
    Option("disaggregation_mode", "a request would be computed on two servers, on a version each", _LEAVE),
    Option("weight_cache_mode", "its parameters are shared with other engines", "set it to off"),
    Option("hicache_storage_backend", _OLD_KV, _LEAVE),
    Option("enable_lmcache", _OLD_KV, _LEAVE),
    Option("encoder_only", "it has no scheduler", _LEAVE),
    *(Option(name, _FENCE, _LEAVE) for name in ("grpc_mode", "smg_grpc_mode", "grpc_port", "enable_http2")),
)


def check_server_args(args: Any) -> None:
    """Raises: IncompatibleServerError: names every option with which a push would be wrong today."""
    if wrong := [f"{o.flag} ({o.why}: {o.way_out})" for o in OPTIONS if o.is_set(args)]:
        raise IncompatibleServerError("cannot be combined with " + ", ".join(wrong))


# Backends of a layer


@dataclass(frozen=True)
class Backends:
    """What SGLang has chosen in this process."""

    capability: tuple[int, int]  # of the GPU, (0, 0) without one
    is_rocm: bool
    moe_runner: str  # values of SGLang's own enumerations
    moe_a2a: str


Test = Callable[[Any, Any, Backends], bool]  # of a layer, its method, the backends


class Rule(NamedTuple):
    """Refuses a layer where `applies`. Of several rules the first that applies is named."""

    backend: str
    applies: Test
    why: str
    way_out: str


_ARGS = "start with the arguments of shared.launch"
_GEMM = "start with --fp8-gemm-backend triton"
_TRITON = "start with --moe-runner-backend triton"
_NVIDIA = "use a GPU of NVIDIA"
RAW_RUNNERS = ("triton", "deep_gemm", "cutlass")
RAW_A2A = ("none", "deepep", "mooncake", "nixl")


def runner_of(method: Any, backends: Backends) -> str:
    """The MoE runner of this layer: SGLang picks one for "auto" and for some others."""
    own = getattr(getattr(method, "runner", None), "runner_backend", None)
    if own is not None:
        return str(own.value)
    return "triton" if backends.moe_runner == "auto" else backends.moe_runner


def _marked(*attributes: str) -> Test:
    """Whether a layer, its method, the method's configuration, or a parameter of the layer says so of itself."""

    def applies(layer: Any, method: Any, backends: Backends) -> bool:
        holders = (layer, method, getattr(method, "quant_config", None), *layer._parameters.values())
        return any(getattr(holder, name, False) is True for holder in holders for name in attributes)

    return applies


def _other_blocks(layer: Any, method: Any, backends: Backends) -> bool:
    return list(method.quant_config.weight_block_size) != [128, 128]


def _pairs(layer: Any, names: Iterable[str]) -> list[tuple[Any, Any]]:
    return [(getattr(layer, name, None), getattr(layer, f"{name}_scale_inv", None)) for name in names]


def _other_types(*names: str) -> Test:
    def is_raw(weight: Any, scale: Any) -> bool:
        if weight is None or scale is None:
            return False
        return bool(weight.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32)

    return lambda layer, method, backends: not all(is_raw(*pair) for pair in _pairs(layer, names))


def _other_layout(*names: str) -> Test:
    """Whether weights or scales do not lie as a loader writes them: row by row, one scale to 128 columns."""

    def is_raw(weight: Any, scale: Any) -> bool:
        dense = weight.is_contiguous() and scale.is_contiguous() and weight.dim() == scale.dim()
        return bool(dense and scale.shape[-1] == -(-weight.shape[-1] // 128))

    return lambda layer, method, backends: not all(is_raw(*pair) for pair in _pairs(layer, names))


def _packed_experts(layer: Any, method: Any, backends: Backends) -> bool:
    on_blackwell = runner_of(method, backends) == "deep_gemm" and backends.capability >= (10, 0)
    return on_blackwell or _marked("format_ue8m0")(layer, method, backends)


ANY_METHOD = (
    Rule("ROCm", lambda layer, method, b: b.is_rocm, "its kernels want weights in another form", _NVIDIA),
    Rule("AITER", _marked("aiter_bpreshuffled", "is_shuffled"), "AITER shuffles it", _NVIDIA),
    Rule("Intel AMX", _marked("use_intel_amx_backend"), "AMX packs it", "unset SGLANG_USE_CPU_ENGINE"),
)
BLOCK_FP8 = (
    Rule("FP8 without blocks", lambda layer, m, b: not m.block_quant, "it has no block scales", _ARGS),
    Rule(
        "MXFP8",
        _marked("use_mxfp8", "convert_mxfp8_to_block", "block_fp8_mxfp8_ready"),
        "its scales are converted after a load",
        _ARGS,
    ),
    Rule("other blocks", _other_blocks, "only 128x128 is pushed", _ARGS),
)
LINEAR = (
    *BLOCK_FP8,
    Rule(
        "Marlin",
        _marked("use_marlin"),
        "Marlin repacks it",
        "unset SGLANG_FORCE_FP8_MARLIN; GPUs before Ada have no other kernel",
    ),
    Rule("DeepGEMM on Blackwell", _marked("format_ue8m0"), "DeepGEMM keeps its scales packed on this GPU", _GEMM),
    Rule("other types", _other_types("weight"), "it is not kept as float8_e4m3fn with float32 scales", _GEMM),
    Rule("other layout", _other_layout("weight"), "its weight or its scales were rearranged", _GEMM),
)
_EXPERTS = ("w13_weight", "w2_weight")
_A2A = Rule(
    "MegaMoE",
    lambda layer, method, b: b.moe_a2a not in RAW_A2A,
    "the all-to-all backend is not known to leave experts as they are loaded",
    "start with --moe-a2a-backend none",
)
MOE = (
    *BLOCK_FP8,
    Rule("FP4 experts", _marked("is_fp4_expert"), "its experts are not FP8", "serve a block-FP8 checkpoint"),
    Rule(
        "another MoE runner",
        lambda layer, method, b: runner_of(method, b) not in RAW_RUNNERS,
        "the MoE runner is not known to read experts as they are loaded",
        _TRITON,
    ),
    Rule("DeepGEMM experts on Blackwell", _packed_experts, "DeepGEMM repacks experts on this GPU", _TRITON),
    _A2A,
    Rule("HPC-Ops", lambda layer, m, b: hasattr(layer, "hpc_ops_w13_weight_scale"), "it pads its scales", _TRITON),
    Rule("other expert types", _other_types(*_EXPERTS), "they are not float8_e4m3fn with float32 scales", _TRITON),
    Rule("other expert layout", _other_layout(*_EXPERTS), "experts or their scales were rearranged", _TRITON),
)
# Experts that stay in BF16 (`modules_to_not_convert`).
BF16_MOE = (
    Rule(
        "another MoE runner for BF16",
        lambda layer, method, b: runner_of(method, b) != "triton",
        "only the runner triton is known to read BF16 experts as they are loaded",
        _TRITON,
    ),
    _A2A,
    Rule(
        "other layout of BF16 experts",
        lambda layer, method, b: (
            _marked("w13_swiglu_interleaved")(layer, method, b)
            or not all(getattr(layer, name).is_contiguous() for name in _EXPERTS)
        ),
        "its experts were rearranged",
        _TRITON,
    ),
)
# Quantization method of SGLang, by class -> its rules. Any other class is refused.
METHODS: dict[str, tuple[Rule, ...]] = {
    "UnquantizedLinearMethod": (),
    "UnquantizedEmbeddingMethod": (),
    "Fp8KVCacheMethod": (),
    "Fp8LinearMethod": LINEAR,
    "Fp8MoEMethod": MOE,
    "UnquantizedFusedMoEMethod": BF16_MOE,
}
UNKNOWN_METHOD = f"is not known to leave loaded weights as they are: {_ARGS}"
LORA = "wrapped by LoRA: start without --enable-lora and push merged weights"
DEVICE = "only GPUs of NVIDIA and fp8sync's CPU platform are supported: use one of them"
LORA_BASE = "BaseLayerWithLoRA"
DECLARED = "_derived_weight_cache_error"  # from 0.5.21 on: why SGLang itself would refuse to update it


def refused_layers(model: nn.Module, backends: Backends) -> list[str]:
    """Layers into which raw copies would be wrong, why, and what helps; one layer for each reason."""
    found: dict[str, list[str]] = {}
    for name, layer in modules(model).items():
        for reason in _reasons(layer, backends):
            found.setdefault(reason, []).append(name or "the model")
    return [f"{_and_others(names)}: {reason}" for reason, names in found.items()]


def _reasons(layer: Any, backends: Backends) -> Iterator[str]:
    if any(base.__name__ == LORA_BASE for base in type(layer).__mro__):
        yield LORA
        return  # it passes on the method of the layer inside it, whose turn comes by itself
    if declared := getattr(layer, DECLARED, None):
        yield f"SGLang says: {declared}"
    if any(p.device.type not in ("cuda", "cpu") for p in layer._parameters.values() if p is not None):
        yield DEVICE
    method = getattr(layer, "quant_method", None)
    if method is None:
        return
    kind = type(method).__name__
    if kind not in METHODS:
        yield f"its method {kind} {UNKNOWN_METHOD}"
        return
    rule = next((r for r in (*ANY_METHOD, *METHODS[kind]) if r.applies(layer, method, backends)), None)
    if rule is not None:
        is_moe = METHODS[kind] in (MOE, BF16_MOE)
        chosen = f", runner {runner_of(method, backends)}, all-to-all {backends.moe_a2a}" if is_moe else ""
        yield f"{rule.backend} ({kind}{chosen}): {rule.why}: {rule.way_out}"


# Copies that would go stale

STALE = "a tensor that may be computed from weights, and would stay that of the old ones"
NOT_SUPPORTED = "this model or option is not supported yet, serve it without"
_HC = "set SGLANG_OPT_DEEPGEMM_HC_PRENORM=0"
# Attribute that holds such a tensor -> what makes SGLang do without it.
COPIES = {
    "_block_fp8_bf16_weight": "set SGLANG_OPT_HOPPER_BLOCK_FP8_BF16=0",
    **dict.fromkeys(("_fused_in_proj_weight", "_fused_in_proj_scale"), "set SGLANG_QWEN35_PACKED_IN_PROJ=0"),
    **{f"_hc_{part}_{kind}_parts": _HC for part in ("attn", "ffn") for kind in ("tf32", "bf16")},
    **dict.fromkeys(("q_b_proj_qrep_weight", "w_kc_qrep"), "leave out --dcp-replicate-q-proj"),
}


def refused_copies(names: Iterable[str]) -> list[str]:
    """Of tensors besides the parameters (`sglang_derived.unknown_tensors`): why they are refused, and what helps."""
    found: dict[str, list[str]] = {}
    for name in names:
        *_, last = parts = name.split(".")
        found.setdefault(next((part for part in parts if part in COPIES), last), []).append(name)
    return [f"{_and_others(held)}: {STALE}: {COPIES.get(kind, NOT_SUPPORTED)}" for kind, held in found.items()]


def _and_others(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
