"""`receiver_plugin/startup.py`: only a complete block-FP8 checkpoint may be served as it was started."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from receiver_plugin.probe import fingerprint
from receiver_plugin.startup import fence_reason
from tests.test_push_memory import checkpoint
from tests.tiny_models import Served, Trainer

Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Tensors, num_files: int = 1) -> Path:
    names = list(tensors)
    for number in range(num_files):
        part = {name: tensors[name] for name in names[number::num_files]}
        save_file(part, folder / f"model-{number + 1:05d}-of-{num_files:05d}.safetensors")
    return folder


@pytest.fixture
def tensors() -> Tensors:
    """The FP8 checkpoint of a trainer's model: codes, scales, and the rest in BF16."""
    return dict(checkpoint(Trainer()))


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
@pytest.mark.parametrize("num_files", [1, 3])
def test_a_complete_checkpoint_is_served(tmp_path: Path, tensors: Tensors, load_format: str, num_files: int) -> None:
    model = Served()
    before = fingerprint(model)
    assert fence_reason(model, str(write(tmp_path, tensors, num_files)), load_format) is None
    assert fingerprint(model) == before, "the check wrote to the model"


@pytest.mark.parametrize("load_format", ["dummy", "pt", "gguf", "remote", "sharded_state", ""])
def test_other_load_formats_are_no_checkpoint(tmp_path: Path, tensors: Tensors, load_format: str) -> None:
    reason = fence_reason(Served(), str(write(tmp_path, tensors)), load_format)
    assert reason == f"started with --load-format {load_format}: its weights are no checkpoint"


def test_an_unknown_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (None, str(tmp_path / "absent"), str(file), "someone/some-model"):
        assert fence_reason(Served(), folder, "auto") == "the folder of its checkpoint is not known"


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert fence_reason(Served(), str(tmp_path), "auto") == "the model's folder holds no safetensors files"


def test_bf16_files_under_an_fp8_override(tmp_path: Path) -> None:
    write(tmp_path, {name: p.detach() for name, p in Trainer().named_parameters()})
    assert fence_reason(Served(), str(tmp_path), "auto") == "the checkpoint holds no FP8 weights"


@pytest.mark.parametrize(
    ("missing", "parameter"),
    [
        ("model.layers.1.mlp.down_proj.weight_scale_inv", "model.layers.1.mlp.down_proj.weight_scale_inv"),
        ("model.layers.0.self_attn.k_proj.weight_scale_inv", "model.layers.0.self_attn.qkv_proj.weight_scale_inv"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_one_missing_tensor_is_named(tmp_path: Path, tensors: Tensors, missing: str, parameter: str) -> None:
    del tensors[missing]
    reason = fence_reason(Served(), str(write(tmp_path, tensors)), "auto")
    assert reason is not None and reason.startswith("the checkpoint is not complete: ")
    assert f"{parameter} [" in reason


def test_a_missing_file_of_several(tmp_path: Path, tensors: Tensors) -> None:
    write(tmp_path, tensors, num_files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    reason = fence_reason(Served(), str(tmp_path), "auto")
    assert reason is not None and reason.startswith("the checkpoint is not complete: ")


def test_one_weight_left_in_bf16(tmp_path: Path, tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = Trainer().get_parameter(name).detach()
    reason = fence_reason(Served(), str(write(tmp_path, tensors)), "auto")
    assert reason is not None and f"{name}: arrives as bfloat16, the server holds float8_e4m3fn" in reason


def test_a_wrong_shape(tmp_path: Path, tensors: Tensors) -> None:
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    tensors[name] = torch.ones(3, 2)
    reason = fence_reason(Served(), str(write(tmp_path, tensors)), "auto")
    assert reason is not None and name in reason


def test_a_tensor_that_is_there_twice(tmp_path: Path, tensors: Tensors) -> None:
    write(tmp_path, tensors)
    name = "model.layers.0.input_layernorm.weight"
    save_file({name: tensors[name]}, tmp_path / "extra.safetensors")
    reason = fence_reason(Served(), str(tmp_path), "auto")
    assert reason is not None and f"{name} [192]: its part [0:192] would be written twice" in reason


@pytest.mark.parametrize("damage", ["cut short", "no header", "empty", "unknown type", "a folder"])
def test_files_that_cannot_be_read(tmp_path: Path, tensors: Tensors, damage: str) -> None:
    (file,) = write(tmp_path, tensors).glob("*.safetensors")
    data = file.read_bytes()
    file.unlink()
    if damage == "unknown type":
        save_file({**tensors, "ids": torch.zeros(4, dtype=torch.int64)}, file)
    elif damage == "a folder":
        file.mkdir()
    else:
        file.write_bytes({"cut short": data[:-1], "no header": b"\xff" * 64, "empty": b""}[damage])
    reason = fence_reason(Served(), str(tmp_path), "auto")
    assert reason is not None and reason.startswith("a checkpoint file cannot be read: ")
