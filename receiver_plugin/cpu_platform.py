"""SGLang on a machine without an accelerator: a reference platform in plain torch, for tests, demos and laptops.

SGLang asks installed distributions for platforms it does not know. Where an accelerator is found, or SGLang's own CPU
engine is asked for, this one stands back. It serves block FP8 by dequantizing weights whenever it computes with them
(`cpu_ops`), and keeps tensors in the layout that a Hopper GPU has, so that the same binding is tested. It is slow on
purpose.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from receiver_plugin import cpu_ops

_QUANT, _MOE = "sglang.srt.layers.quantization", "sglang.srt.layers.moe"


def activate() -> str | None:
    """The platform class by name where nothing faster is here, else None. Called by SGLang, in every process."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or _accelerator():
        return None
    try:
        from sglang.srt.platforms.interface import PlatformCapabilities  # noqa: F401
    except ImportError:
        return "receiver_plugin.cpu_older.CpuReferenceOlder"
    return "receiver_plugin.cpu_platform.CpuReference"


def _accelerator() -> bool:
    return bool(torch.cuda.is_available() or torch.accelerator.is_available())


def _make_platform() -> type:
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

    class CpuReference(CpuDeviceMixin, SRTPlatform):
        _enum = PlatformEnum.OOT
        capabilities = PlatformCapabilities()

        def get_device(self, device_id: int = 0) -> str:
            return "cpu"  # a string: it becomes the default of --device

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_dispatch_key_name(self) -> str:
            return "native"

        def init_backend(self) -> None:
            _replace_operators()

    return CpuReference


def __getattr__(name: str) -> Any:
    if name == "CpuReference":  # made on demand: this module is imported where SGLang's platforms are not needed
        return _make_platform()
    raise AttributeError(name)


# What stands on a GPU's kernels or on a CPU's own layout: where it is (the first that this SGLang has), its name, ours.
_REPLACED: tuple[tuple[tuple[str, ...], str, Callable[..., Any]], ...] = (
    ((f"{_QUANT}.fp8_utils",), "dispatch_w8a8_block_fp8_linear", lambda *args, **kwargs: cpu_ops.block_fp8_linear),
    ((f"{_QUANT}.fp8_utils",), "block_quant_to_tensor_quant", cpu_ops.dequantize_for_mla),
    ((f"{_MOE}.moe_runner.triton_utils.fused_moe",), "fused_experts", cpu_ops.fused_experts),
    ((f"{_MOE}.fused_moe_native",), "moe_forward_native", cpu_ops.unquantized_experts),
    (
        ("sglang.kernels.ops.elementwise.elementwise", "sglang.kernels.ops.layernorm.elementwise"),
        "fused_gate_sigmoid_mul_add",
        cpu_ops.add_gated,
    ),
    # It pads heads and intermediate sizes, on CPUs only; a GPU has the layout without it.
    (("sglang.srt.configs.update_config",), "adjust_config_with_unaligned_cpu_tp", lambda config, *args: config),
)


def _replace_operators() -> None:
    """Runs while SGLang's model runner is imported, before any model is built."""
    for modules, name, ours in _REPLACED:
        _rebind(modules, name, ours)
    _absorb_always()
    # A release of memory waits for what a CUDA build of torch takes for the accelerator, and that raises without one.
    torch.cuda.synchronize = lambda device=None: None
    # SGLang compiles some operators at their first call, for seconds, and anew for other sizes: maybe to other sums.
    torch._dynamo.config.disable = True


def _absorb_always() -> None:
    """DeepSeek's MLA takes the way of decode for prompts too: plain attention reads nothing but the KV cache."""
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    handlers.AttentionBackendRegistry.register("torch_native", lambda attn, batch: handlers.AttnForwardMethod.MLA)


def _rebind(modules: Sequence[str], name: str, ours: Callable[..., Any]) -> None:
    """Replace `name` in the first of `modules` that exists, and the copies imported from it; none ends the start."""
    home = next((module for path in modules if (module := _imported(path)) and hasattr(module, name)), None)
    if home is None:
        raise SystemExit(f"fp8sync: no {name} in {' or '.join(modules)}; this SGLang is not supported on a CPU")
    theirs = getattr(home, name)
    for module in [module for path, module in sys.modules.items() if path.startswith("sglang.")]:
        if vars(module).get(name) is theirs:
            setattr(module, name, ours)


def _imported(path: str) -> ModuleType | None:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return None
