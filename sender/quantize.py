"""One way to turn a trainer's tensor into what a server holds: Triton on GPUs, plain torch elsewhere, the same bits.

`quantize_into` serves the tensors that the server holds in FP8, `copy_into` all others. Both write into buffers of the
caller, read the weight only, find inf and NaN in the same call and never wait for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from shared.errors import ConfigError, NonFiniteWeightError
from shared.numerics import (
    ScaleFormat,
    ZeroScale,
    allocate_outputs,
    check_nonfinite_flag,
    quantize_reference_into,
)

_COPY_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@functools.cache
def _triton_into() -> Callable[..., None] | None:
    """The Triton wrapper, or None where Triton cannot be imported. Hosts without a GPU never come here."""
    try:
        import triton  # noqa: F401
    except ImportError:  # no wheel for this platform, or left out on purpose
        return None
    # Outside the try: a mistake in our own file must not look like a missing Triton.
    from sender.triton_quantize import quantize_triton_into

    return quantize_triton_into


def backend_name(device: torch.device | str) -> Literal["triton", "torch"]:
    """Which implementation `quantize_into` uses for tensors on `device`; imports Triton the first time it is a GPU."""
    return "triton" if torch.device(device).type == "cuda" and _triton_into() is not None else "torch"


def quantize_into(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    nonfinite: Tensor,
    *,
    scale_fmt: ScaleFormat = "fp32",
    zero_scale: ZeroScale = "one",
) -> None:
    """Quantize `weight` into `codes` and `scale` by the recipe of `shared.numerics`.

    weight: [rows, cols] bf16, fp16 or fp32, any strides. codes: [rows, cols] float8_e4m3fn.
    scale: [ceil(rows/128), ceil(cols/128)] fp32. nonfinite: int32, one element, set to 1 on inf or NaN, never reset.
    Raises `ConfigError` where an argument does not fit.
    """
    into = (_triton_into() if weight.device.type == "cuda" else None) or quantize_reference_into
    into(weight, codes, scale, nonfinite, scale_fmt=scale_fmt, zero_scale=zero_scale)


@torch.no_grad()
def copy_into(weight: Tensor, out: Tensor, nonfinite: Tensor) -> None:
    """Copy a tensor that is not quantized (norms, embeddings, biases, routers).

    weight: any shape and strides; bf16, fp16, fp32 or fp64. out: the same shape and device; the same dtype, or bf16 for
    an fp32 weight, which is rounded to nearest even. nonfinite: int32, one element, set to 1 if `out` holds inf or NaN
    afterwards (so also where rounding overflows), never reset. Raises `ConfigError` where an argument does not fit.
    """
    if weight.shape != out.shape:
        raise ConfigError(f"out must have the weight's shape {list(weight.shape)}; its shape is {list(out.shape)}")
    rounds = weight.dtype == torch.float32 and out.dtype == torch.bfloat16
    if weight.dtype not in _COPY_DTYPES or not (weight.dtype == out.dtype or rounds):
        raise ConfigError(f"cannot copy {weight.dtype} to {out.dtype}: only one float dtype, or float32 to bfloat16")
    if out.device != weight.device:
        raise ConfigError(f"out must be on the weight's device {weight.device}; it is on {out.device}")
    check_nonfinite_flag(nonfinite, weight.device)
    out.copy_(weight)
    if out.numel():
        # torch's minimum and maximum pass NaN on, and need no temporary of the tensor's size.
        extremes = torch.stack(torch.aminmax(out))
        nonfinite.masked_fill_(~extremes.isfinite().all(), 1)


def quantize(
    weight: Tensor, *, name: str = "weight", scale_fmt: ScaleFormat = "fp32", zero_scale: ZeroScale = "one"
) -> tuple[Tensor, Tensor]:
    """`quantize_into` with outputs of its own; for export, tests and a first look, not for the hot path.

    Returns codes [rows, cols] float8_e4m3fn and scale [ceil(rows/128), ceil(cols/128)] fp32. Waits for the device.
    Raises `NonFiniteWeightError` naming `name` on inf or NaN, `ConfigError` if the weight cannot be quantized.
    """
    codes, scale, nonfinite = allocate_outputs(weight)
    quantize_into(weight, codes, scale, nonfinite, scale_fmt=scale_fmt, zero_scale=zero_scale)
    if nonfinite.item():
        raise NonFiniteWeightError((name,))
    return codes, scale
