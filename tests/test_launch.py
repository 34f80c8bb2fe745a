"""`shared/launch.py`: the user's arguments survive, contradictions are named, and only real FP8 folders are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shared.config import FP8BlockConfig
from shared.errors import ConfigError
from shared.launch import holds_block_fp8_weights, sglang_fp8_args

CONFIG = FP8BlockConfig(modules_to_not_convert=("lm_head",))
HF = CONFIG.to_hf()
CODES = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
FP8_TENSORS = {
    "model.layers.0.mlp.up_proj.weight": CODES,
    "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1),
    "model.norm.weight": torch.ones(4, dtype=torch.bfloat16),
}


def make_model(folder: Path, quantization: Any = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    config = {"model_type": "qwen3"} | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def value_of(args: list[str], option: str) -> str:
    assert args.count(option) == 1
    return args[args.index(option) + 1]


def overrides_of(args: list[str]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(value_of(args, "--json-model-override-args"))
    return value


@pytest.fixture
def bf16_model(tmp_path: Path) -> Path:
    return make_model(tmp_path, tensors={"model.norm.weight": torch.ones(4, dtype=torch.bfloat16)})


# ---- what is added


def test_arguments_for_a_folder_without_fp8_weights(bf16_model: Path) -> None:
    args = sglang_fp8_args(bf16_model, CONFIG, user_args=["--port", "30000"])
    assert value_of(args, "--model-path") == str(bf16_model)
    assert value_of(args, "--load-plugin") == "fp8sync"
    assert value_of(args, "--quantization") == "fp8"
    assert value_of(args, "--load-format") == "dummy"
    assert overrides_of(args) == {"quantization_config": HF}
    assert args[-2:] == ["--port", "30000"]


def test_off_returns_the_users_arguments_unchanged() -> None:
    user = ["--model-path", "m", "--quantization", "awq", "--json-model-override-args={"]
    assert sglang_fp8_args("elsewhere", None, user_args=user) == user


def test_fp8_weights_are_loaded(tmp_path: Path) -> None:
    args = sglang_fp8_args(make_model(tmp_path, HF, FP8_TENSORS), CONFIG)
    assert "--load-format" not in args


def test_a_model_name_that_is_no_folder_starts_with_dummy_weights() -> None:
    args = sglang_fp8_args("someone/some-model", CONFIG)
    assert value_of(args, "--load-format") == "dummy"
    assert value_of(sglang_fp8_args("someone/some-model", CONFIG, user_args=["--load-format=auto"]), "--load-format")


def test_power_of_two_scales_are_said(bf16_model: Path) -> None:
    args = sglang_fp8_args(bf16_model, FP8BlockConfig(scale_fmt="ue8m0"))
    assert overrides_of(args)["quantization_config"]["scale_fmt"] == "ue8m0"


# ---- what the user says


@pytest.mark.parametrize("spelling", ["two words", "one word"])
def test_overrides_merge_at_every_depth(bf16_model: Path, spelling: str) -> None:
    user = {"rope_scaling": {"factor": 2}, "quantization_config": {"extra": {"a": 1}, "fmt": "e4m3"}}
    option, text = "--json-model-override-args", json.dumps(user)
    words = [option, text] if spelling == "two words" else [f"{option}={text}"]
    args = sglang_fp8_args(bf16_model, CONFIG, user_args=["--tp", "2", *words, "--port=1"])
    assert overrides_of(args) == {"rope_scaling": {"factor": 2}, "quantization_config": HF | {"extra": {"a": 1}}}
    assert args[-3:] == ["--tp", "2", "--port=1"]


def test_several_overrides_are_all_kept_and_the_last_wins(bf16_model: Path) -> None:
    option = "--json-model-override-args"
    user = [option, '{"a": {"x": 1, "y": 1}}', option + '={"a": {"y": 2}}']
    assert overrides_of(sglang_fp8_args(bf16_model, CONFIG, user_args=user))["a"] == {"x": 1, "y": 2}


def test_users_other_quantization_keys_win(bf16_model: Path) -> None:
    user = ["--json-model-override-args", '{"quantization_config": {"modules_to_not_convert": ["a", "b"]}}']
    config = overrides_of(sglang_fp8_args(bf16_model, CONFIG, user_args=user))["quantization_config"]
    assert config == HF | {"modules_to_not_convert": ["a", "b"]}


@pytest.mark.parametrize(
    ("key", "theirs"),
    [
        ("weight_block_size", [64, 64]),
        ("weight_block_size", None),
        ("quant_method", "awq"),
        ("fmt", "e5m2"),
        ("activation_scheme", "static"),
        ("scale_fmt", "ue8m0"),
    ],
)
def test_another_format_in_the_overrides_names_both_values(bf16_model: Path, key: str, theirs: object) -> None:
    user = ["--json-model-override-args", json.dumps({"quantization_config": {key: theirs}})]
    with pytest.raises(ConfigError) as caught:
        sglang_fp8_args(bf16_model, CONFIG, user_args=user)
    assert repr({key: theirs}) in str(caught.value)
    assert repr({key: HF.get(key)}) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs a value"),
        ('{"a": 1,\n "b" 2}', "line 2 column 6"),
        ("[1]", "must be a JSON object, not list"),
        ("null", "must be a JSON object, not NoneType"),
        ('{"quantization_config": null}', "must be an object, not None"),
    ],
)
def test_bad_overrides_are_errors(bf16_model: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sglang_fp8_args(bf16_model, CONFIG, user_args=[f"--json-model-override-args={text}"])
    with pytest.raises(ConfigError, match=says):
        sglang_fp8_args(bf16_model, CONFIG, user_args=["--json-model-override-args", text])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--quantization", "awq"], "--quantization awq contradicts --quantization fp8"),
        (["--quantization=w8a8_fp8"], "w8a8_fp8"),
        (["--model-path", "other"], "--model-path other"),
        (["--model=other"], "--model-path other"),
        (["--json-model-override", "{}"], "abbreviation"),
        (["--quant=fp8"], "abbreviation"),
        (["--port", "1", "--load-format"], "--load-format needs a value"),
    ],
)
def test_contradictions_and_unclear_options_are_errors(bf16_model: Path, words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sglang_fp8_args(bf16_model, CONFIG, user_args=words)


def test_the_users_repetitions_and_other_plugins_are_fine(bf16_model: Path) -> None:
    user = ["--quantization", "fp8", "--model", str(bf16_model), "--load-plugin", "fp8sync", "--load-plugin=theirs"]
    args = sglang_fp8_args(bf16_model, CONFIG, user_args=user)
    assert [args[i + 1] for i, word in enumerate(args) if word == "--load-plugin"] == ["fp8sync", "theirs"]
    assert value_of(args, "--quantization") == "fp8"
    assert value_of(args, "--model-path") == str(bf16_model)


@pytest.mark.parametrize("load_format", ["dummy", "remote", "sharded_state"])
def test_users_load_format_wins(bf16_model: Path, load_format: str) -> None:
    args = sglang_fp8_args(bf16_model, CONFIG, user_args=[f"--load-format={load_format}"])
    assert value_of(args, "--load-format") == load_format


def test_users_dummy_weights_win_over_fp8_weights(tmp_path: Path) -> None:
    model = make_model(tmp_path, HF, FP8_TENSORS)
    args = sglang_fp8_args(model, CONFIG, user_args=["--load-format", "dummy"])
    assert value_of(args, "--load-format") == "dummy"


def test_reading_bf16_files_as_fp8_is_refused(bf16_model: Path) -> None:
    with pytest.raises(ConfigError, match="--load-format auto needs complete block-FP8"):
        sglang_fp8_args(bf16_model, CONFIG, user_args=["--load-format", "auto"])


# ---- what the checkpoint says


def test_unquantized_modules_of_the_checkpoint_stay_so(tmp_path: Path) -> None:
    own = HF | {"modules_to_not_convert": ["model.norm"], "ignored_layers": ["router"], "note": 1}
    config = overrides_of(sglang_fp8_args(make_model(tmp_path, own, FP8_TENSORS), CONFIG))["quantization_config"]
    assert config == HF | {"modules_to_not_convert": ["lm_head", "model.norm", "router"], "note": 1}


@pytest.mark.parametrize(
    "own",
    [
        HF | {"weight_block_size": [64, 64]},
        {"quant_method": "fp8", "activation_scheme": "dynamic"},  # one scale a tensor
        {"quant_method": "awq", "bits": 4},
        "fp8",
    ],
)
def test_a_checkpoint_in_another_format_is_an_error(tmp_path: Path, own: object) -> None:
    with pytest.raises(ConfigError, match=r"quantization_config in .*config\.json"):
        sglang_fp8_args(make_model(tmp_path, own), CONFIG)


def test_a_damaged_config_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON: .*line 1 column 2"):
        sglang_fp8_args(tmp_path, CONFIG)


# ---- holds_block_fp8_weights


def test_complete_fp8_weights_are_recognized(tmp_path: Path) -> None:
    assert holds_block_fp8_weights(make_model(tmp_path, HF, FP8_TENSORS))


@pytest.mark.parametrize(
    ("quantization", "tensors"),
    [
        (HF, None),
        (None, FP8_TENSORS),
        (HF | {"quant_method": "awq"}, FP8_TENSORS),
        (HF | {"weight_block_size": None}, FP8_TENSORS),
        (HF, {"a.weight": torch.ones(4, 4)}),
        (HF, {"a.weight": CODES}),
        (HF, {"a.weight_scale_inv": torch.ones(1, 1)}),
        (HF, FP8_TENSORS | {"b.weight": CODES.clone()}),
    ],
    ids=["no files", "no config", "other method", "no blocks", "bf16", "no scale", "no codes", "one scale missing"],
)
def test_other_folders_are_not(tmp_path: Path, quantization: object, tensors: dict[str, torch.Tensor] | None) -> None:
    assert not holds_block_fp8_weights(make_model(tmp_path, quantization, tensors))


def test_weights_in_several_files_need_every_file_of_the_index(tmp_path: Path) -> None:
    make_model(tmp_path, HF)
    files = {name: f"model-{i}.safetensors" for i, name in enumerate(FP8_TENSORS)}
    for name, file in files.items():
        save_file({name: FP8_TENSORS[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert holds_block_fp8_weights(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    assert not holds_block_fp8_weights(tmp_path)


def test_a_missing_folder_holds_nothing(tmp_path: Path) -> None:
    assert not holds_block_fp8_weights(tmp_path / "absent")


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    make_model(tmp_path, HF, FP8_TENSORS)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        holds_block_fp8_weights(tmp_path)
