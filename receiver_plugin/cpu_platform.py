"""SGLang on a machine without an accelerator: a reference platform in plain torch, for tests, demos and laptops.

SGLang asks installed distributions for platforms it does not know. Where an accelerator is found, or SGLang's own CPU
engine is asked for, this one stands back. It serves block FP8 by dequantizing a weight and calling `F.linear`, and
keeps tensors in the layout that a Hopper GPU has, so that the same binding is tested. It is slow on purpose.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from shared.numerics import dequantize

logger = logging.getLogger(__name__)


def activate() -> str | None:
    """The platform class by name where nothing faster is here, else None. Called by SGLang, in every process."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or _accelerator():
        return None
    try:
        from sglang.srt.platforms.interface import PlatformCapabilities  # noqa: F401
    except ImportError:
        logger.warning("fp8sync: this SGLang has no seam for the CPU reference platform; 0.5.23 has")
        return None
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


def block_fp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    block_size: list[int],
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """`input` [..., in] times `weight` [out, in] of block FP8, in the precision of `input`."""
    return functional.linear(input, dequantize(weight, weight_scale, input.dtype), bias)


def _replace_operators() -> None:
    """Runs while SGLang's model runner is imported, before any model is built."""
    from sglang.srt.configs import update_config
    from sglang.srt.layers.quantization import fp8, fp8_utils

    _rebind(fp8_utils, "dispatch_w8a8_block_fp8_linear", lambda *args, **kwargs: block_fp8_linear, also=[fp8])
    # SGLang pads heads and intermediate sizes on CPUs only; a GPU has the layout without it.
    import sglang.srt.model_executor.model_runner as runner  # half imported: it is what called us

    _rebind(update_config, "adjust_config_with_unaligned_cpu_tp", lambda config, *args: config, also=[runner])


def _rebind(module: Any, name: str, new: Callable[..., Any], also: list[Any]) -> None:
    """Replace `module.name`, and the copies that `also` imported by name; a missing one ends the start."""
    for holder in (module, *also):
        if not hasattr(holder, name):
            raise SystemExit(f"fp8sync: {holder.__name__} has no {name}; this SGLang is not supported on a CPU")
        setattr(holder, name, new)
