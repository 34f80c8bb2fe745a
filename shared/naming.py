"""Tensor names: Hugging Face checkpoint names everywhere on the wire.

A parameter of the trainer becomes one or more checkpoint tensors. Most map one to one once the prefixes of wrappers
are taken off. Transformers 5 stores the experts of a MoE layer as two fused 3-D parameters, while checkpoints (and
SGLang) name every expert:

    mlp.experts.gate_up_proj [E, 2I, H]  ->  mlp.experts.{e}.gate_proj.weight [I, H], mlp.experts.{e}.up_proj.weight
    mlp.experts.down_proj    [E, H, I]   ->  mlp.experts.{e}.down_proj.weight [H, I]
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.config import FP8BlockConfig
from shared.errors import ConfigError

WRAPPER_PARTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
SCALE_SUFFIX = "_scale_inv"

# Path components (never substrings) whose 2-D weights are not block-FP8 linear layers.
_NOT_LINEAR = frozenset(
    {
        "embed_tokens",
        "embed_positions",
        "wte",
        "lm_head",
        "gate",
        "router",
        "shared_expert_gate",
        "conv1d",
    }
)


def scale_name(weight_name: str) -> str:
    """`X.weight` -> `X.weight_scale_inv`."""
    return weight_name + SCALE_SUFFIX


def canonical_name(parameter_name: str) -> str:
    """The parameter's name without the path components that FSDP1, checkpointing and `torch.compile` insert."""
    return ".".join(part for part in parameter_name.split(".") if part not in WRAPPER_PARTS)


def should_quantize_param(name: str, shape: tuple[int, ...], config: FP8BlockConfig) -> bool:
    """Whether a checkpoint holds tensor `name` of `shape` in block FP8: 2-D weights of linear layers only.

    For offline use (export); a push asks the live server and asserts that both agree. Embeddings, `lm_head`, norms,
    routers, gates and the modules listed in `config.modules_to_not_convert` (with all below them) are not quantized.
    """
    parts = name.split(".")
    if len(shape) != 2 or parts[-1] != "weight":
        return False
    if any(part in _NOT_LINEAR or part.endswith(("norm", "layernorm")) for part in parts[:-1]):
        return False
    module = ".".join(parts[:-1])
    return not any(module == kept or module.startswith(kept + ".") for kept in config.modules_to_not_convert)


@dataclass(frozen=True)
class Piece:
    """One checkpoint tensor cut from a trainer parameter: `parameter[expert][rows]`, or the whole of it."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0


def pieces(name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """The checkpoint tensors that parameter `name` (canonical) of `shape` holds.

    Raises:
        ConfigError: a 3-D parameter that is none of the known fused expert layouts.
    """
    if len(shape) < 3 or name.endswith("conv1d.weight"):
        return (Piece(name, shape),)
    prefix, _, leaf = name.rpartition(".")
    if len(shape) == 3 and prefix.endswith("experts") and leaf == "gate_up_proj" and shape[1] % 2 == 0:
        num_experts, rows, cols = shape[0], shape[1] // 2, shape[2]
        return tuple(
            Piece(f"{prefix}.{expert}.{half}.weight", (rows, cols), expert, first_row)
            for expert in range(num_experts)
            for half, first_row in (("gate_proj", 0), ("up_proj", rows))
        )
    if len(shape) == 3 and prefix.endswith("experts") and leaf == "down_proj":
        return tuple(Piece(f"{prefix}.{e}.down_proj.weight", shape[1:], e) for e in range(shape[0]))
    raise ConfigError(
        f"{name} {list(shape)}: a parameter of {len(shape)} dimensions that is no known fused expert layout; "
        "pass its checkpoint tensors through FP8Sender.push_shards"
    )
