"""The models of `benchmarks.push`: the shapes of real ones without their weights, and small ones for a CPU.

A trainer here holds one model in BF16 whose weights are drawn anew, in place, from a seed: two sets of them take turns
where only one fits into memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sender.source import ModuleSource
from tests.zoo import CASES, Case

_QWEN3: dict[str, Any] = {
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "num_attention_heads": 32,
}
_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8}
_30B_A3B = {
    **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
}
MODELS: dict[str, Case] = {
    "qwen3-8b": Case("qwen3-8b", "Qwen3", {**_QWEN3, **_8B}),
    "qwen3-30b-a3b": Case("qwen3-30b-a3b", "Qwen3Moe", {**_QWEN3, **_30B_A3B}),
    "tiny": CASES["qwen3"],
    "tiny-moe": CASES["qwen3_moe"],
}


def with_layers(case: Case, num_layers: int | None) -> Case:
    """`case` with so many layers; None: as it is."""
    return case if num_layers is None else replace(case, config={**case.config, "num_hidden_layers": num_layers})


def with_experts(case: Case, num_experts: int | None) -> Case:
    """`case` with so many experts; None: as it is. Raises: ValueError: it has none, or a token takes more."""
    if num_experts is None:
        return case
    if not 1 <= case.config.get("num_experts_per_tok", 0) <= num_experts:
        raise ValueError(f"{case.name} cannot have {num_experts} experts")
    return replace(case, config={**case.config, "num_experts": num_experts})


class Trainer:
    """A model of `case` in BF16 on `device`, without values until `fill`.

    `weights`: its checkpoint tensors by name, views of the parameters, so they follow each `fill`.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        with torch.device("meta"):
            model: nn.Module = case.model_class(case.make_config())
        self._device = device
        self.model = model.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
        source = ModuleSource(self.model)
        self.weights: dict[str, Tensor] = dict(source.gather([tensor.name for tensor in source.tensors]))
        storages = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        assert all(weight.untyped_storage().data_ptr() in storages for weight in self.weights.values())

    @property
    def num_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    def fill(self, seed: int) -> None:
        """The weights of `seed`, in place, complete on return: matrices N(0, 0.02), vectors N(1, 0.1)."""
        generator = torch.Generator(self._device).manual_seed(seed)
        for parameter in self.model.parameters():
            draw(parameter, generator)
        synchronize(self._device)

    def free(self) -> None:
        """Give its memory back, for good."""
        self.weights.clear()
        self.model.to("meta")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def draw(parameter: Tensor, generator: torch.Generator) -> None:
    if parameter.dim() > 1:
        parameter.normal_(0.0, 0.02, generator=generator)
    else:
        parameter.normal_(1.0, 0.1, generator=generator)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
