"""`shared/naming.py`: checkpoint names, experts cut from fused parameters, and which tensors are block FP8."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from receiver_plugin.manifest import manifest_of
from sender.packer import Packer
from sender.quantize import quantize
from sender.source import ModuleSource
from shared.buckets import make_layout
from shared.config import FP8BlockConfig
from shared.errors import ConfigError
from shared.naming import canonical_name, pieces, scale_name, should_quantize_param

CONFIG = FP8BlockConfig(modules_to_not_convert=("model.layers.1", "model.layers.2.mlp.up_proj", "vision"))
EXPERTS, INTER, HIDDEN = 3, 130, 96  # a ragged block row in every half


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("_orig_mod._fsdp_wrapped_module._checkpoint_wrapped_module.weight", "weight"),
        ("model._orig_mod_2.my_fsdp_wrapped_module.weight", "model._orig_mod_2.my_fsdp_wrapped_module.weight"),
    ],
)
def test_canonical_names(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


def test_scale_names() -> None:
    assert scale_name("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.kv_a_proj_with_mqa",
        "model.layers.0.self_attn.kv_b_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.gate_up",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.shared_expert.gate_proj",
        "model.layers.0.mlp.shared_experts.down_proj",
        "model.layers.0.mlp.experts.17.up_proj",
        "model.layers.0.mlp.router_proj",
        "model.layers.10.mlp.up_proj",  # not below the listed model.layers.1
        "model.layers.2.mlp.up_proj_2",  # not the listed model.layers.2.mlp.up_proj
        "model.vision.proj",  # listed names start at the root
    ],
)
def test_linear_weights_are_quantized(module: str) -> None:
    assert should_quantize_param(f"{module}.weight", (256, 128), CONFIG)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.kv_a_layernorm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.router.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.linear_attn.conv1d.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.gate.e_score_correction_bias",
        "model.layers.0.self_attn.sinks",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "vision.blocks.0.proj.weight",
    ],
)
def test_all_else_is_not(name: str) -> None:
    assert not should_quantize_param(name, (256, 128), CONFIG)


@pytest.mark.parametrize("shape", [(256,), (), (4, 256, 128), (8, 4, 1, 4)])
def test_only_matrices_are_quantized(shape: tuple[int, ...]) -> None:
    assert not should_quantize_param("model.layers.0.mlp.up_proj.weight", shape, CONFIG)


# ---- fused experts


class Experts(nn.Module):
    """All experts of a MoE layer as Transformers 5 keeps them: two 3-D parameters."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INTER, HIDDEN, dtype=dtype))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTER, dtype=dtype))


class Moe(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False, dtype=dtype)
        self.experts = Experts(dtype)

    def slices(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds, cut by hand."""
        gate_up, down = (p.detach().bfloat16() for p in (self.experts.gate_up_proj, self.experts.down_proj))
        found = {"gate.weight": self.gate.weight.detach().bfloat16()}
        for expert in range(EXPERTS):
            found[f"experts.{expert}.gate_proj.weight"] = gate_up[expert, :INTER, :]
            found[f"experts.{expert}.up_proj.weight"] = gate_up[expert, INTER:, :]
            found[f"experts.{expert}.down_proj.weight"] = down[expert]
        return found


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def model(request: pytest.FixtureRequest) -> Moe:
    return Moe(request.param)


def test_experts_are_cut_from_their_parameters(model: Moe) -> None:
    source, expected = ModuleSource(model), model.slices()
    specs = {spec.name: spec for spec in source.tensors}
    assert set(specs) == set(expected)
    gathered = source.gather([spec.name for spec in source.tensors])
    for name, weight in expected.items():
        assert specs[name].shape == tuple(weight.shape) and specs[name].dtype == "bfloat16"
        assert torch.equal(gathered[name], weight), name
    backwards = source.gather(list(reversed(specs)))
    assert all(torch.equal(backwards[name], weight) for name, weight in expected.items())


def test_every_expert_is_quantized_by_itself(model: Moe) -> None:
    source, expected = ModuleSource(model), model.slices()
    quantized = {t.name for t in source.tensors if should_quantize_param(t.name, t.shape, FP8BlockConfig())}
    assert quantized == set(expected) - {"gate.weight"}
    manifest = manifest_of(source.tensors, frozenset(quantized))
    layout = make_layout(manifest, 50_000)
    packer = Packer(layout, FP8BlockConfig(), torch.device("cpu"))
    for bucket in layout.buckets:
        packed = packer.pack(bucket, source.gather(bucket.names))
        for entry in bucket.entries:
            if entry.scale is not None:
                codes, scale = quantize(expected[entry.tensor.name])
                assert torch.equal(entry.values.view(packed).view(torch.uint8), codes.view(torch.uint8))
                assert torch.equal(entry.scale.view(packed), scale)
    packer.check_finite()


def test_pieces_account_for_every_row() -> None:
    gate_up = pieces("model.layers.0.mlp.experts.gate_up_proj", (2, 8, 4))
    assert [(p.name.removeprefix("model.layers.0.mlp.experts."), p.expert, p.first_row, p.shape) for p in gate_up] == [
        ("0.gate_proj.weight", 0, 0, (4, 4)),
        ("0.up_proj.weight", 0, 4, (4, 4)),
        ("1.gate_proj.weight", 1, 0, (4, 4)),
        ("1.up_proj.weight", 1, 4, (4, 4)),
    ]
    (same,) = pieces("model.norm.weight", (4,))
    assert (same.name, same.shape, same.expert) == ("model.norm.weight", (4,), None)
    (conv,) = pieces("model.layers.0.linear_attn.conv1d.weight", (8, 1, 4))
    assert (conv.name, conv.expert) == ("model.layers.0.linear_attn.conv1d.weight", None)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 7, 4)),
        ("model.layers.0.mlp.experts.w13", (2, 8, 4)),
        ("model.layers.0.mlp.gate_up_proj", (2, 8, 4)),
        ("vision.patch_embed.proj.weight", (8, 3, 2, 14, 14)),
    ],
)
def test_unknown_layouts_are_pointed_to_push_shards(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="push_shards"):
        pieces(name, shape)
