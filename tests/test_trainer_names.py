"""For every family: the names, shapes and bytes that a sender offers are those that `save_pretrained` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from sender.source import ModuleSource
from shared.errors import ConfigError
from tests.test_ranks import run_on_ranks
from tests.tiny_models import HEADS, HIDDEN, Trainer
from tests.zoo import CASES, randomize

BF16, FP32 = torch.bfloat16, torch.float32
SMALL = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100, "pad_token_id": 0},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Families with another way from the module to the checkpoint than those of the zoo.
OTHERS: dict[str, Mapping[str, Any]] = {
    "Mixtral": EXPERTS,  # w1, w2, w3 in block_sparse_moe
    "MiniMaxM2": EXPERTS,
    "Phimoe": EXPERTS,
    "Olmoe": {"num_experts": 4},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64},  # a bias in another module
    "ExaoneMoe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "HunYuanMoEV1": {"num_experts": 4, "moe_topk": 2},
    "GraniteMoe": EXPERTS,  # fused in checkpoints, too, under other names
    "MiniMax": EXPERTS,  # a persistent buffer of three dimensions
}


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def offered(model: nn.Module) -> dict[str, torch.Tensor]:
    source = ModuleSource(model)
    gathered = source.gather([tensor.name for tensor in source.tensors])
    for tensor in source.tensors:
        held = gathered[tensor.name]
        assert (tuple(held.shape), str(held.dtype)) == (tensor.shape, f"torch.{tensor.dtype}"), tensor.name
        assert held.is_contiguous(), tensor.name
    return dict(gathered)


def differences(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    """Names that only one of both has, or whose shapes, types or values differ."""
    both = mine.keys() & theirs.keys()
    other = (key for key in both if mine[key].dtype != theirs[key].dtype or not torch.equal(mine[key], theirs[key]))
    return sorted([*(mine.keys() ^ theirs.keys()), *other])


def small(family: str) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")(**SMALL, **OTHERS.get(family, EXPERTS))
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(BF16)
    randomize(model, seed=5)
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_push_offers_what_a_checkpoint_holds(name: str, tmp_path: Path) -> None:
    model = CASES[name].make_model(seed=7)
    assert differences(offered(model), saved(model, tmp_path)) == []


@pytest.mark.parametrize("family", OTHERS)
def test_families_that_checkpoints_name_otherwise(family: str, tmp_path: Path) -> None:
    model = small(family)
    held = saved(model, tmp_path)
    assert differences(offered(model), held) == []
    apply_activation_checkpointing(model, check_fn=lambda module: module is model.model.layers[1])
    wrapped: Any = torch.compile(model)
    assert differences(offered(wrapped), held) == []


def test_models_that_were_loaded_from_a_checkpoint(tmp_path: Path) -> None:
    model = small("Mixtral")
    held = saved(model, tmp_path)
    assert differences(offered(type(model).from_pretrained(tmp_path, dtype=BF16)), held) == []


def test_experts_that_transformers_writes_fused_are_cut(tmp_path: Path) -> None:
    """Qwen3-VL-MoE: block FP8 holds matrices, and servers load experts one by one; all else is as it is written."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    model = Qwen3VLMoeForConditionalGeneration(config).to(BF16)
    held = saved(model, tmp_path)
    for layer in range(2):
        experts = f"model.language_model.layers.{layer}.mlp.experts"
        gate_up, down = held.pop(f"{experts}.gate_up_proj"), held.pop(f"{experts}.down_proj")
        for expert in range(4):
            held[f"{experts}.{expert}.gate_proj.weight"] = gate_up[expert, :48]
            held[f"{experts}.{expert}.up_proj.weight"] = gate_up[expert, 48:]
            held[f"{experts}.{expert}.down_proj.weight"] = down[expert]
    assert differences(offered(model), held) == []


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_buffers_keep_their_type_and_masters_are_rounded(name: str, tmp_path: Path) -> None:
    """A router's correction bias stays fp32 in training, also where all parameters are bf16."""
    model = CASES[name].make_model(seed=7)
    for buffer in model.buffers():
        buffer.data = buffer.float() + 1e-4
    held = saved(model, tmp_path)
    assert any(tensor.dtype == FP32 for tensor in held.values())
    assert differences(offered(model), held) == []
    for parameter in model.parameters():
        parameter.data = parameter.float()
    assert differences(offered(model), held) == []


def compare_with_mixed_precision(rank: int) -> list[str]:
    """The names whose pushed values are not the very tensors that FSDP2 gathers for a forward."""
    model: Any = fully_shard(Trainer(3, FP32), mp_policy=MixedPrecisionPolicy(param_dtype=BF16))
    pushed = offered(model)
    model.unshard()
    computed_with = {name: weight.detach() for name, weight in model.named_parameters()}
    assert {weight.dtype for weight in computed_with.values()} == {BF16}
    return differences(pushed, computed_with)


def test_masters_are_rounded_as_mixed_precision_rounds_them() -> None:
    assert run_on_ranks(compare_with_mixed_precision, 2) == [[], []]


def cut_on_ranks(rank: int, folder: str) -> list[list[str]]:
    """What rank 0 has of sharded experts against the checkpoint in `folder`: FSDP2, then FSDP1."""
    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

    sharded = small("Mixtral")
    for layer in sharded.model.layers:
        fully_shard(layer)
    policy = ModuleWrapPolicy({MixtralDecoderLayer})
    flat = FullyShardedDataParallel(small("Mixtral"), auto_wrap_policy=policy, device_id=torch.device("cpu"))
    gathered = [offered(fully_shard(sharded)), offered(flat)]
    held = load_file(Path(folder) / "model.safetensors")
    return [differences(tensors, held) for tensors in gathered] if rank == 0 else []


def test_sharded_experts(tmp_path: Path) -> None:
    saved(small("Mixtral"), tmp_path)
    assert run_on_ranks(cut_on_ranks, 2, str(tmp_path)) == [[[], []], []]


@pytest.mark.parametrize(("family", "why"), [("GptOss", "transposed or interleaved"), ("Llama4Text", "transposed")])
def test_transposed_experts_are_refused(family: str, why: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(**SMALL, **EXPERTS)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).to(BF16)
    with pytest.raises(ConfigError, match=rf"layers\.0\..*experts.*{why}.*push_shards"):
        ModuleSource(model)


def test_names_that_meet_once_wrappers_are_off_are_refused() -> None:
    model = Trainer()
    model.model._orig_mod = nn.Module()
    model.model._orig_mod.embed_tokens = nn.Embedding(4, 4, dtype=BF16)
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight: two tensors"):
        ModuleSource(model)


# Adapters: stand-ins with the attributes and names of PEFT's layers


class LoraLinear(nn.Module):
    def __init__(self, base: nn.Module, merged: bool) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(HIDDEN, 4, bias=False, dtype=BF16)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 2 * HEADS, bias=False, dtype=BF16)})
        self.merged = merged


class LoraModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class PeftModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = LoraModel(model)
        self.peft_config: dict[str, Any] = {}


def with_adapters(model: Trainer, merged: bool) -> Any:
    """`model` with one adapted weight in each layer; `merged`: `merge_adapter()` was called."""
    for layer in model.get_submodule("model.layers").children():
        attention = layer.get_submodule("self_attn")
        attention.q_proj = LoraLinear(attention.get_submodule("q_proj"), merged)
    return PeftModel(model)


def test_merged_adapters_are_pushed_as_their_base_weights() -> None:
    assert differences(offered(with_adapters(Trainer(), merged=True)), dict(Trainer().named_parameters())) == []


def test_adapters_that_are_not_merged_are_refused() -> None:
    model = with_adapters(Trainer(), merged=True)
    model.base_model.model.model.layers[1].self_attn.q_proj.merged = False
    way = r"layers\.1\.self_attn\.q_proj: a LoraLinear .* not merged: model\.merge_adapter\(\), push, model\.unmerge_ad"
    with pytest.raises(ConfigError, match=way):
        ModuleSource(model)


def test_adapters_inside_of_a_layer_are_refused() -> None:
    model = Trainer()
    q_proj = model.get_submodule("model.layers.0.self_attn.q_proj")
    q_proj.lora_A = nn.Parameter(torch.zeros(4, HIDDEN, dtype=BF16))
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj\.lora_A: of an adapter .*merge_and_unload"):
        ModuleSource(model)


def test_modules_with_two_versions_are_refused() -> None:
    model = Trainer()
    wrapper = nn.Module()
    wrapper.original_module = model.get_submodule("model.embed_tokens")
    wrapper.modules_to_save = nn.ModuleDict({"default": nn.Embedding(250, HIDDEN)})
    model.get_submodule("model").embed_tokens = wrapper
    with pytest.raises(ConfigError, match=r"model\.embed_tokens: PEFT keeps two versions .*merge_and_unload\(\)"):
        ModuleSource(model)


def test_learned_prompts_are_refused() -> None:
    model = PeftModel(Trainer())
    model.prompt_encoder = nn.ModuleDict({"default": nn.Embedding(4, HIDDEN)})
    with pytest.raises(ConfigError, match="a PeftModel with learned prompts, which no weights hold"):
        ModuleSource(model)
