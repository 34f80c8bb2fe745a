"""Write a model as a Hugging Face block-FP8 checkpoint: the bytes that a push of the same weights would serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sender.quantize import quantize
from sender.ranks import Lead, TrainerRanks
from sender.source import ModuleSource
from shared.buckets import DTYPES
from shared.config import FP8BlockConfig
from shared.errors import ConfigError, NonFiniteWeightError
from shared.naming import scale_name, should_quantize_param

_MAX_FILE_BYTES = 5 << 30


def export_checkpoint(
    model: nn.Module,
    folder: str | Path,
    *,
    config: FP8BlockConfig | None = None,
    hf_config: dict[str, Any] | None = None,
    timeout_s: float = 600.0,
) -> None:
    """Collective. Write `model` (FSDP2 or unsharded) as safetensors, index and `config.json` into `folder`.

    `hf_config` is the model's `config.json` (default: `model.config.to_dict()`); `quantization_config` is added to it.

    Raises:
        NonFiniteWeightError: a weight holds inf or NaN; no index is written then.
        ConfigError: no configuration of the model is known.
    """
    config = config or FP8BlockConfig()
    if hf_config is None and not hasattr(model, "config"):
        raise ConfigError("the model has no `config`: give its config.json as hf_config")
    source, ranks = ModuleSource(model), TrainerRanks(timeout_s)
    ranks.meet("export_checkpoint")
    lead = Lead(ranks)
    writer = _Writer(Path(folder))
    lead.run(writer.start)
    for spec in source.tensors:
        weights = source.gather([spec.name])
        lead.run(_write, writer, spec.name, spec.shape, weights[spec.name].to(DTYPES[spec.dtype]), config)
    source.release()
    described = dict(hf_config if hf_config is not None else model.config.to_dict())  # type: ignore[union-attr,operator]
    lead.run(writer.finish, {**described, "quantization_config": config.to_hf()})
    lead.finish("", timeout_s)


def _write(writer: _Writer, name: str, shape: tuple[int, ...], weight: torch.Tensor, config: FP8BlockConfig) -> None:
    if should_quantize_param(name, shape, config):
        codes, scale = quantize(weight, name=name, scale_fmt=config.scale_fmt, zero_scale=config.zero_scale)
        writer.add({name: codes, scale_name(name): scale})
    elif not bool(torch.isfinite(weight).all()):
        raise NonFiniteWeightError((name,))
    else:
        writer.add({name: weight})


class _Writer:
    """Files of at most `_MAX_FILE_BYTES`; the index is written last, so that a half-written export has none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, torch.Tensor] = {}
        self._weight_map: dict[str, str] = {}
        self._num_files = 0
        self._num_bytes = 0

    def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if any(self._folder.glob("*.safetensors*")):
            raise ConfigError(f"{self._folder} already holds a checkpoint: export into an empty folder")

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        held_bytes = sum(t.nbytes for t in self._held.values())
        if self._held and held_bytes + sum(t.nbytes for t in tensors.values()) > _MAX_FILE_BYTES:
            self._flush()
        self._held.update({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    def _flush(self) -> None:
        self._num_files += 1
        file = f"model-{self._num_files:05d}.safetensors"
        save_file(self._held, self._folder / file, metadata={"format": "pt"})
        self._weight_map.update(dict.fromkeys(self._held, file))
        self._num_bytes += sum(t.nbytes for t in self._held.values())
        self._held = {}

    def finish(self, hf_config: dict[str, Any]) -> None:
        self._flush()
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._weight_map}
        (self._folder / "config.json").write_text(json.dumps(hf_config, indent=2, default=str))
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
