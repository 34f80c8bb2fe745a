"""Block-FP8 layers in plain torch, for the CPU reference platform: weights are dequantized, then computed with.

Nothing is prepared ahead or kept, so weights may be changed in place between any two calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shared.numerics import dequantize

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": functional.silu, "gelu": functional.gelu}
# Arguments of SGLang's operator that mean another computation than the one below, and their values where they do not.
_PLAIN = {
    **{"b1": None, "b2": None, "w1_zp": None, "w2_zp": None, "a1_q": None, "a1_scale": None, "a2_scale": None},
    **{"use_int8_w8a8": False, "use_int8_w8a16": False, "use_int4_w4a16": False, "per_channel_quant": False},
    "fuse_swiglu_interleaved": False,
}


def block_fp8_linear(
    input: Tensor,
    weight: Tensor,
    block_size: list[int],
    weight_scale: Tensor,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """`input` [..., in] times `weight` [out, in] of block FP8, in the precision of `input`."""
    return functional.linear(input, dequantize(weight, weight_scale, input.dtype), bias)


def dequantize_for_mla(weight: Tensor, weight_scale: Tensor, block_size: list[int]) -> tuple[Tensor, None]:
    """`weight` [out, in] in BF16, and no scale: what DeepSeek's MLA splits into `w_kc` and `w_vc`, as on a Hopper GPU.

    In place of a quantization to one scale a tensor, which SGLang makes where it finds no CUDA.
    """
    return dequantize(weight, weight_scale, torch.bfloat16), None


def add_gated(x: Tensor, gate_weight: Tensor, shared: Tensor, routed: Tensor) -> None:
    """Add to `routed` [tokens, hidden], in place, the shared expert times its gate, `sigmoid(x @ gate_weight)`."""
    gate = torch.sigmoid(x.float() @ gate_weight.float())
    routed.copy_(gate[:, None] * shared.float() + routed.float())


def experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    activation: str = "silu",
    weigh_input: bool = False,
) -> Tensor:
    """The weighted sum of the chosen experts, each `w2 @ (act(gate) * up)`; a new tensor [tokens, hidden].

    x: [tokens, hidden]. w13: [experts, 2 * inner, hidden], gate above up. w2: [experts, hidden, inner]; both block FP8
    with scales, or of the type of `x` without. topk_weights, topk_ids: [tokens, k]; an id of -1 (an expert of another
    rank) adds nothing. `weigh_input` weighs what goes in rather than what comes out.

    Raises:
        NotImplementedError: another activation.
    """
    if activation not in _ACTIVATIONS:
        raise NotImplementedError(f"fp8sync: the CPU reference platform has no experts with activation {activation!r}")
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(w13.shape[0]):
        tokens, slots = torch.where(topk_ids == expert)
        if tokens.numel() == 0:
            continue
        weights = topk_weights[tokens, slots, None].float()
        chosen = (x[tokens].float() * weights).to(x.dtype) if weigh_input else x[tokens]
        gate, up = functional.linear(chosen, _matrix(w13, w13_scale, expert, x.dtype)).chunk(2, dim=-1)
        inner = _ACTIVATIONS[activation](gate) * up
        result = functional.linear(inner, _matrix(w2, w2_scale, expert, x.dtype)).float()
        out.index_add_(0, tokens, result if weigh_input else result * weights)
    return out.to(x.dtype)


def _matrix(weights: Tensor, scales: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor:
    return weights[expert] if scales is None else dequantize(weights[expert], scales[expert], dtype)


def fused_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_output: Any,
    moe_runner_config: Any,
    *,
    use_fp8_w8a8: bool = False,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    block_shape: list[int] | None = None,
    **rest: Any,
) -> Tensor:
    """`experts` with the arguments of SGLang's operator of this name.

    It does not scale by `routed_scaling_factor`: models do so themselves where SGLang finds no GPU.

    Raises:
        NotImplementedError: quantization other than block FP8, biases, unusual gates, experts left unsummed.
    """
    unusual = {k: v for k, v in rest.items() if k not in _PLAIN or not (v is None or v is _PLAIN[k])}
    gates = ("gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit")
    unusual.update({k: v for k in gates if (v := getattr(moe_runner_config, k)) is not None})
    if moe_runner_config.no_combine or not moe_runner_config.is_gated:
        unusual.update(no_combine=moe_runner_config.no_combine, is_gated=moe_runner_config.is_gated)
    if unusual or use_fp8_w8a8 != (block_shape is not None):
        raise NotImplementedError(f"fp8sync: the CPU reference platform has no experts with {unusual or 'FP8 tensors'}")
    return experts(
        hidden_states,
        w1,
        w2,
        topk_output.topk_weights,
        topk_output.topk_ids,
        w13_scale=w1_scale if use_fp8_w8a8 else None,
        w2_scale=w2_scale if use_fp8_w8a8 else None,
        activation=moe_runner_config.activation,
        weigh_input=moe_runner_config.apply_router_weight_on_input,
    )


def unquantized_experts(layer: Any, x: Tensor, topk_output: Any, moe_runner_config: Any) -> Tensor:
    """`experts` of a layer whose weights are in BF16, with the arguments of SGLang's `moe_forward_native`."""
    biases: dict[str, Any] = {
        "b1": getattr(layer, "w13_weight_bias", None),
        "b2": getattr(layer, "w2_weight_bias", None),
    }
    return fused_experts(x, layer.w13_weight, layer.w2_weight, topk_output, moe_runner_config, **biases)
