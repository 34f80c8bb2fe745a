"""Tiny versions of model families, from a configuration and a seed. Nothing is downloaded.

    case = CASES["qwen3_moe"]
    export_checkpoint(case.make_model(seed=0), folder, hf_config=case.hf_config())

Their sizes are small multiples of 128 (block FP8 wants whole blocks on each rank), but for the vocabulary of 1000,
which a server pads, and for what a family cuts otherwise (576 rows of `kv_a_proj_with_mqa` in DeepSeek, here 320).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.config import FP8BlockConfig

COMMON = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "norm_topk_prob": True}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "first_k_dense_replace": 1}
MLA = {
    **{"num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 256},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
}
DEEPSEEK_JSON = {"moe_layer_freq": 1}  # SGLang reads it; transformers' own configuration has no such field
LINEAR_ATTENTION = {
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 8},
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4},
    "layer_types": ["linear_attention", "full_attention"],
}
# Snapshots of the state of linear attention stand on kernels of a GPU.
NO_SNAPSHOTS = ("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule")
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}


@dataclass(frozen=True)
class Case:
    """A tiny model of one family, and how SGLang serves it on a CPU."""

    name: str
    family: str  # of transformers' classes: "Qwen3Moe" for Qwen3MoeConfig and Qwen3MoeForCausalLM
    config: Mapping[str, Any]  # arguments of the configuration class
    json_only: Mapping[str, Any] = field(default_factory=dict)  # what only config.json has
    config_suffix: str = "Config"
    server_args: tuple[str, ...] = ()  # what this family needs besides examples.local_server.CPU_ARGS
    server_env: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()  # modules that stay in BF16, some because block FP8 cannot hold them; SGLang's names too
    max_tp: int = 4  # larger ones would cut within a block
    layouts: tuple[str, ...] = ("TP 1", "TP 2")  # those that tests start servers for

    @property
    def fp8(self) -> FP8BlockConfig:
        return FP8BlockConfig(modules_to_not_convert=self.kept)

    @property
    def config_class(self) -> Any:
        return _transformers(self.family + self.config_suffix)

    @property
    def model_class(self) -> Any:
        return _transformers(self.family + "ForCausalLM")

    def make_config(self) -> Any:
        return self.config_class(**self.config)

    def make_model(self, seed: int) -> nn.Module:
        """The trainer's model in BF16, the same on every machine; no parameter or buffer is left at a plain default."""
        torch.manual_seed(seed)
        model: nn.Module = self.model_class(self.make_config()).to(torch.bfloat16)
        randomize(model, seed)
        return model

    def hf_config(self) -> dict[str, Any]:
        """`config.json` without quantization."""
        described: dict[str, Any] = self.make_config().to_dict()
        architectures = [self.family + "ForCausalLM"]
        return {**described, "architectures": architectures, "torch_dtype": "bfloat16", **self.json_only}

    def write_config(self, folder: Path) -> Path:
        """A folder with `config.json` and no weights."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.hf_config(), indent=2))
        return folder


def randomize(model: nn.Module, seed: int) -> None:
    """Draw matrices anew, N(0, 1 / columns), and move vectors off their defaults: norms, biases, router biases, decays.

    Persistent buffers too. In place; a tensor bound to the wrong name then shows in the answers.
    """
    generator = torch.Generator().manual_seed(seed)
    held: dict[str, torch.Tensor] = dict(model.named_parameters())
    held.update({name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()})
    for _, tensor in sorted(held.items()):
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            tensor.copy_(noise * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else tensor.float() + 0.1 * noise)


def _transformers(name: str) -> Any:
    import transformers  # seconds; not while tests are collected

    return getattr(transformers, name)


def _case(name: str, family: str, *changes: Mapping[str, Any], **rest: Any) -> Case:
    config = dict(COMMON)
    for change in changes:
        config.update(change)
    return Case(name, family, config, **rest)


WITH_EP = ("TP 1", "TP 2", "TP 2, EP 2")

_ALL = (
    _case("qwen2", "Qwen2", {"hidden_size": 512}),
    _case("qwen3", "Qwen3", {"head_dim": 128}, layouts=("TP 1", "TP 2", "TP 4", "DP 2", "TP 2, DP 2")),
    _case("qwen3_tied", "Qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    _case("qwen3_moe", "Qwen3Moe", {"head_dim": 128}, EXPERTS, layouts=(*WITH_EP, "TP 4", "DP 2")),
    _case(
        "qwen3_moe_kept",
        "Qwen3Moe",
        {"head_dim": 128},
        EXPERTS,
        kept=("model.layers.0.self_attn", "model.layers.1.mlp.experts"),
    ),
    _case("mixtral", "Mixtral", {"hidden_size": 512, "sliding_window": None, "num_local_experts": 8}),
    _case(
        "qwen2_moe",
        "Qwen2Moe",
        {"hidden_size": 512, "shared_expert_intermediate_size": 512},
        {**EXPERTS, "norm_topk_prob": False},
        layouts=WITH_EP,
    ),
    _case("llama", "Llama", {"head_dim": 128}),
    _case("mistral", "Mistral", {"head_dim": 128, "sliding_window": None}),
    _case(
        "gemma3",
        "Gemma3",
        {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 256, "tie_word_embeddings": True},
        {"layer_types": ["sliding_attention", "full_attention"]},
        json_only={"sliding_window_pattern": 2},
        config_suffix="TextConfig",
    ),
    _case(
        "glm4_moe",
        "Glm4Moe",
        {"head_dim": 128, "attention_bias": True, "use_qk_norm": True, "n_shared_experts": 1, "num_mtp_layers": 0},
        {**ROUTED, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
        layouts=WITH_EP,
    ),
    _case(
        "deepseek_v2",
        "DeepseekV2",
        {**MLA, **ROUTED, "q_lora_rank": None, "n_shared_experts": 2},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "rope_parameters": YARN},
        json_only={**DEEPSEEK_JSON, "scoring_func": "softmax"},
        layouts=WITH_EP,
    ),
    _case(
        "deepseek_v3",
        "DeepseekV3",
        {**MLA, **ROUTED, "q_lora_rank": 128, "n_shared_experts": 1, "num_mtp_layers": 0},
        {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "rope_parameters": YARN},
        json_only={**DEEPSEEK_JSON, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        layouts=WITH_EP,
    ),
    _case(
        "qwen3_next",
        "Qwen3Next",
        {"head_dim": 128, "shared_expert_intermediate_size": 512, **LINEAR_ATTENTION, **EXPERTS},
        json_only={"full_attention_interval": 2},
        server_args=NO_SNAPSHOTS,
        kept=("model.layers.0.linear_attn.in_proj_ba",),
        layouts=(),  # no server: its forward stands on kernels of a GPU
    ),
    _case(
        "qwen3_5",
        "Qwen3_5",
        {"head_dim": 128, **LINEAR_ATTENTION},
        json_only={"full_attention_interval": 2},
        config_suffix="TextConfig",
        server_args=NO_SNAPSHOTS,
        kept=tuple(f"model.layers.0.linear_attn.in_proj_{part}" for part in ("b", "a", "ba")),
        layouts=(),  # no server: its forward stands on kernels of a GPU
    ),
)
CASES: dict[str, Case] = {case.name: case for case in _ALL}
