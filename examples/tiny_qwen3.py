"""A Qwen3 small enough for two CPU cores, from a configuration and a seed. Nothing is downloaded.

Its sizes are chosen to be awkward where SGLang allows it: a hidden size of 320 (two and a half blocks) and a
vocabulary of 1000 (padded by the server).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

SEED = 20260731
CONFIG: dict[str, Any] = {
    "hidden_size": 320,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def hf_config(**changes: Any) -> dict[str, Any]:
    """The model's `config.json`, without quantization. `changes` are to `CONFIG`, here and below."""
    described: dict[str, Any] = Qwen3Config(**{**CONFIG, **changes}).to_dict()
    return {**described, "architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16"}


def make_model(seed: int = SEED, **changes: Any) -> nn.Module:
    """The model in BF16 with random weights, the same on every rank."""
    torch.manual_seed(seed)
    model: nn.Module = Qwen3ForCausalLM(Qwen3Config(**{**CONFIG, **changes})).to(torch.bfloat16)
    return model


def write_config(folder: Path, **changes: Any) -> Path:
    """A folder with `config.json` and no weights: what a server is started on before the first push."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(**changes), indent=2))
    return folder
