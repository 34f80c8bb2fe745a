"""Random small architectures: on every rank, a push leaves the bytes that SGLang's own loader leaves.

Families and layouts (TP 1, 2, 4; EP) come in turn; random are sizes, heads, experts, layers, tied embeddings, biases,
and what stays in BF16. Only shapes that SGLang itself serves in block FP8: what one rank holds is whole blocks of 128.

Each case is a seed. `make test` takes the first 30; FP8SYNC_PLAN_SEEDS=START:STOP takes others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sender import FP8BlockConfig, export_checkpoint
from tests.in_process import check_together, differences, one_thread, replay, sglang_rank

VARIABLE = "FP8SYNC_PLAN_SEEDS"
START, STOP = (int(part) for part in os.environ.get(VARIABLE, "0:30").split(":"))
# YaRN, because SGLang has no other rotary embedding for MLA on a CPU.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0}


@dataclass(frozen=True)
class Arch:
    """A configuration of transformers, and the layout and the exceptions it is served with."""

    kind: str  # "Qwen3": transformers has Qwen3Config and Qwen3ForCausalLM
    config: dict[str, Any]
    kept: tuple[str, ...]  # modules that stay in BF16
    tp_size: int
    ep_size: int = 1


def random_arch(seed: int) -> Arch:
    random = Random(seed)
    tp_size, ep_size = LAYOUTS[seed // len(FAMILIES) % len(LAYOUTS)]
    config: dict[str, Any] = {
        "num_hidden_layers": random.randint(1, 3),
        "vocab_size": random.randint(100, 700),
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "hidden_size": 64 * random.randint(2, 6),
        "intermediate_size": 128 * tp_size * random.randint(1, 2),
    }
    kind, changes = FAMILIES[seed % len(FAMILIES)](random, tp_size)
    if "num_experts_per_tok" not in changes:
        ep_size = 1
    return Arch(kind, {**config, **changes}, _kept(random, config["num_hidden_layers"]), tp_size, ep_size)


Family = tuple[str, dict[str, Any]]


def _qwen2(random: Random, tp_size: int) -> Family:
    heads = _heads(random, tp_size)
    hidden_size = heads["head_dim"] * heads["num_attention_heads"]
    return "Qwen2", {**heads, "hidden_size": hidden_size, "tie_word_embeddings": random.random() < 0.5}


def _qwen3(random: Random, tp_size: int) -> Family:
    options = {"attention_bias": random.random() < 0.5, "tie_word_embeddings": random.random() < 0.5}
    return "Qwen3", {**_heads(random, tp_size), **options}


def _qwen3_moe(random: Random, tp_size: int) -> Family:
    experts = _experts(random, tp_size)
    num_experts = experts.pop("n_routed_experts")
    options = {"num_experts": num_experts, "attention_bias": random.random() < 0.5, "decoder_sparse_step": 1}
    return "Qwen3Moe", {**_heads(random, tp_size), **experts, **options}


def _glm4_moe(random: Random, tp_size: int) -> Family:
    experts = _experts(random, tp_size)
    options = {"attention_bias": random.random() < 0.5, "use_qk_norm": random.random() < 0.5}
    return "Glm4Moe", {**_heads(random, tp_size), **experts, **_shared(random), **options}


def _deepseek(random: Random, tp_size: int) -> Family:
    experts = _experts(random, tp_size)
    num_heads = 2 * tp_size * random.randint(1, 2)
    mla = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "q_lora_rank": random.choice([None, 128, 256]),
        "kv_lora_rank": random.choice([128, 256]),
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_scaling": {**YARN, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1, "rope_theta": 10000.0},
        **{"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},  # SGLang asks for them
    }
    return "DeepseekV3", {**experts, **_shared(random), **mla}


def _heads(random: Random, tp_size: int) -> dict[str, Any]:
    """Heads of one or half a block. With half a block, a rank holds them in pairs."""
    head_dim = random.choice([64, 128])
    fewest = 128 // head_dim
    kv_heads = fewest * random.choice([1, 2]) * (1 if head_dim == 128 and random.random() < 0.3 else tp_size)
    heads = max(kv_heads, fewest * tp_size) * random.choice([1, 2])
    return {"head_dim": head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}


def _experts(random: Random, tp_size: int) -> dict[str, Any]:
    return {
        "n_routed_experts": 4 * random.randint(1, 2),
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128 * tp_size * random.randint(1, 2),
    }


def _shared(random: Random) -> dict[str, Any]:
    options = {"n_shared_experts": random.randint(1, 2), "first_k_dense_replace": random.randint(0, 1)}
    return {**options, "n_group": 1, "topk_group": 1}


def _kept(random: Random, num_layers: int) -> tuple[str, ...]:
    """Modules left in BF16; what SGLang fuses is left so together."""
    layer = f"model.layers.{random.randrange(num_layers)}"
    return random.choice([(), (), (f"{layer}.self_attn",), (f"{layer}.mlp",), (f"{layer}.self_attn.o_proj", layer)])


FAMILIES: list[Callable[[Random, int], Family]] = [_qwen2, _qwen3, _qwen3_moe, _glm4_moe, _deepseek]
LAYOUTS = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4)]


def make_trainer(arch: Arch, seed: int) -> nn.Module:
    """BF16, and nothing in it is zero or one: a tensor that is bound to the wrong place shows."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{arch.kind}Config")(**arch.config)
    model: nn.Module = getattr(transformers, f"{arch.kind}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))]:
            tensor.normal_(0.0, 0.1)
    return model


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


@contextmanager
def told(seed: int, arch: Arch) -> Iterator[None]:
    """What fails inside says how to repeat it."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"seed {seed}: {arch}")
        error.add_note(f"repeat: {VARIABLE}={seed}:{seed + 1} python -m pytest tests/test_plan_properties.py")
        raise


@pytest.mark.parametrize("seed", range(START, STOP))
def test_every_rank_holds_what_its_own_loader_leaves(seed: int, tmp_path: Path) -> None:
    arch = random_arch(seed)
    with told(seed, arch):
        trainer, config = make_trainer(arch, seed), FP8BlockConfig(modules_to_not_convert=arch.kept)
        described: dict[str, Any] = trainer.config.to_dict()  # type: ignore[operator,union-attr]
        described |= {"architectures": [type(trainer).__name__], "dtype": "bfloat16"}
        export_checkpoint(trainer, tmp_path, config=config, hf_config=described)
        findings = []
        for number in range(arch.tp_size):
            with sglang_rank(tmp_path, number, arch.tp_size, arch.ep_size) as rank:
                loaded, again, pushed = rank.load(rank.garbage(1)), rank.load(rank.garbage(2)), rank.garbage(3)
                assert differences(loaded, again) == [], f"SGLang's own loader leaves these as they are, rank {number}"
                findings.append(replay(pushed, trainer, config))
                assert differences(loaded, pushed) == [], f"rank {number} of {arch.tp_size}"
        check_together(trainer, findings, config)


def test_the_first_seeds_reach_every_family_in_every_layout() -> None:
    found = [random_arch(seed) for seed in range(30)]
    assert len({(arch.kind, arch.tp_size, arch.ep_size) for arch in found}) == 3 * len(LAYOUTS) + 2 * 3
    for option in ("tie_word_embeddings", "attention_bias", "use_qk_norm"):
        assert {arch.config.get(option) for arch in found} >= {True, False}
    assert {arch.config["q_lora_rank"] is None for arch in found if arch.kind == "DeepseekV3"} == {True, False}
    assert any(arch.config["num_key_value_heads"] < arch.tp_size for arch in found), "no key-value head is shared"
    assert len({bool(arch.kept) for arch in found}) == 2
