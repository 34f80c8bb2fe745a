"""The arguments that start an SGLang server ready for FP8 pushes, from the one `FP8BlockConfig` that drives all.

It becomes `--quantization fp8` and a `quantization_config` in `--json-model-override-args`, merged with what checkpoint
and user say. SGLang replaces a checkpoint's `quantization_config` by an override's, so the one given here is complete.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shared.config import FP8BlockConfig
from shared.errors import ConfigError

_OPTIONS = ("--model-path", "--load-plugin", "--quantization", "--load-format", "--json-model-override-args")
MODEL, PLUGIN, QUANTIZATION, LOAD_FORMAT, OVERRIDES = _OPTIONS
DTYPE = "--dtype"
# Two sides that differ in one of these read each other's bytes wrongly.
_FORMAT_KEYS = ("quant_method", "fmt", "weight_block_size", "activation_scheme", "scale_fmt")
_FILE_FORMATS = frozenset({"auto", "safetensors", "fastsafetensors", "instanttensor", "layered"})  # read *.safetensors


def sglang_fp8_args(
    model_path: str | Path, quantization: FP8BlockConfig | None, *, user_args: Sequence[str] = ()
) -> list[str]:
    """The arguments of `sglang.launch_server` for a server that takes FP8 pushes, the user's own included.

    `quantization=None` means off: `user_args` come back unchanged. `model_path` is a folder, or a name that SGLang
    resolves itself; such a checkpoint is not looked at. `--load-format dummy` is added where no complete block-FP8
    weights are found, unless the user chose. A file given with SGLang's `--config` is not read: repeat its overrides.
    Raises `ConfigError`: the user's arguments contradict `quantization`, are abbreviated or malformed; or the
    checkpoint is quantized in another format or damaged.
    """
    if quantization is None:
        return list(user_args)
    given, rest = _split(user_args)
    for option, ours in ((MODEL, str(model_path)), (QUANTIZATION, "fp8")):
        if other := [value for value in given[option] if value != ours]:
            raise ConfigError(f"{option} {other[0]} contradicts {option} {ours}, which is set for you: leave it out")
    folder = Path(model_path)
    plugins = [word for name in dict.fromkeys(["fp8sync", *given[PLUGIN]]) for word in (PLUGIN, name)]
    overrides = json.dumps(_model_overrides(folder, quantization, given[OVERRIDES]))
    formats = _load_format(folder, given[LOAD_FORMAT])
    # Without it SGLang serves a config.json that names no dtype in FP16, and a BF16 trainer could not push to it.
    dtype = [] if any(word.split("=")[0] == DTYPE for word in rest) else [DTYPE, "bfloat16"]
    return [MODEL, str(model_path), *plugins, QUANTIZATION, "fp8", *formats, *dtype, OVERRIDES, overrides, *rest]


def main(words: Sequence[str]) -> None:
    """`python -m shared.launch MODEL [SGLANG ARGUMENTS]`: become the SGLang server that these arguments give."""
    if not words or words[0].startswith("-"):
        raise SystemExit(main.__doc__)
    args = sglang_fp8_args(words[0], FP8BlockConfig(), user_args=words[1:])
    os.execv(sys.executable, [sys.executable, "-m", "sglang.launch_server", *args])


def holds_block_fp8_weights(folder: str | Path) -> bool:
    """Whether `folder` is a block-FP8 checkpoint: every FP8 weight has its `weight_scale_inv`, and no file is missing.

    Reads `config.json`, the index and the headers of the safetensors files; `ConfigError` for damaged ones.
    """
    folder = Path(folder)
    config = _read_object(folder / "config.json").get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != "fp8" or not config.get("weight_block_size"):
        return False
    indexed = _read_object(folder / "model.safetensors.index.json").get("weight_map", {})
    files = {folder / name for name in indexed.values()} or set(folder.glob("*.safetensors"))
    if not all(file.is_file() for file in files):
        return False
    dtypes = {name: dtype for file in sorted(files) for name, dtype in _header(file).items()}
    scaled = {name.removesuffix("_scale_inv") for name in dtypes if name.endswith(".weight_scale_inv")}
    return bool(scaled) and scaled == {name for name, dtype in dtypes.items() if dtype == "F8_E4M3"}


def _split(user_args: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The values of the options that are set here, from `--option X` and `--option=X`, and all other words."""
    given: dict[str, list[str]] = {option: [] for option in _OPTIONS}
    rest, words = [], iter(user_args)
    for word in words:
        name, equals, value = word.partition("=")
        option = MODEL if name == "--model" else name
        if option in given:
            if not (value := value if equals else next(words, "")):
                raise ConfigError(f"{name} needs a value")
            given[option].append(value)
        elif len(name) > 2 and any(option.startswith(name) for option in _OPTIONS):
            raise ConfigError(f"{name} is an abbreviation, which could hide an override: spell the option out")
        else:
            rest.append(word)
    return given, rest


def _load_format(folder: Path, given: list[str]) -> list[str]:
    complete = holds_block_fp8_weights(folder)
    if not given:
        return [] if complete else [LOAD_FORMAT, "dummy"]
    if given[-1] in _FILE_FORMATS and folder.is_dir() and not complete:
        raise ConfigError(f"{LOAD_FORMAT} {given[-1]} needs complete block-FP8 weights, not those of {folder}: omit it")
    return [LOAD_FORMAT, given[-1]]


def _model_overrides(folder: Path, quantization: FP8BlockConfig, given: list[str]) -> dict[str, Any]:
    """The user's model overrides, laid over a complete `quantization_config`: the checkpoint's, then ours."""
    ours, where = quantization.to_hf(), folder / "config.json"
    own = _read_object(where).get("quantization_config") or ours
    # Without a block size an FP8 checkpoint has one scale a tensor, which is another format.
    own = _same_format(ours, {"weight_block_size": None, **own} if isinstance(own, dict) else own, str(where))
    # What the checkpoint leaves in BF16 must stay so, or those bytes would be read as FP8.
    lists = (ours.get("modules_to_not_convert"), own.get("modules_to_not_convert"), own.pop("ignored_layers", None))
    kept = list(dict.fromkeys(name for names in lists for name in names or ()))
    merged = {"quantization_config": own | ours | ({"modules_to_not_convert": kept} if kept else {})}
    for text in given:
        user = _parse_object(text, OVERRIDES)
        _same_format(ours, user.get("quantization_config", {}), OVERRIDES)
        merged = _merge(merged, user)
    return merged


def _same_format(ours: Mapping[str, Any], theirs: object, where: str) -> dict[str, Any]:
    if not isinstance(theirs, dict):
        raise ConfigError(f"quantization_config in {where} must be an object, not {theirs!r}")
    clashes = {key: theirs[key] for key in _FORMAT_KEYS if key in theirs and theirs[key] != ours.get(key)}
    if clashes:
        expected = {key: ours.get(key) for key in clashes}
        raise ConfigError(f"quantization_config in {where} has {clashes}, FP8BlockConfig {expected}: make them agree")
    return theirs


def _merge(base: Any, extra: Any) -> Any:
    """`extra` laid over `base`: objects merge key by key at every depth, any other value of `extra` replaces."""
    if not (isinstance(base, dict) and isinstance(extra, dict)):
        return extra
    return base | {key: _merge(base.get(key), value) for key, value in extra.items()}


def _parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:  # its message says line and column
        raise ConfigError(f"{what} is not valid JSON: {error}") from error
    if isinstance(value, dict):
        return value
    raise ConfigError(f"{what} must be a JSON object, not {type(value).__name__} (line 1 column 1): {text[:80]!r}")


def _read_object(file: Path) -> dict[str, Any]:
    return _parse_object(file.read_bytes(), str(file)) if file.is_file() else {}


def _header(file: Path) -> dict[str, str]:
    """Tensor name -> dtype as safetensors spells it. A file that is cut short is an error."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in list(tensors.keys())}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
