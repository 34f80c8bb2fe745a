"""`FP8BlockConfig`: how weights are quantized, one object for server arguments, sender and manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.errors import ConfigError

MOST_TENSORS = 1 << 18
Name = Annotated[str, Field(min_length=1, max_length=1024)]  # of a tensor or a module


class WireModel(BaseModel):
    """Base of what crosses the wire: frozen, and strict about fields and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class FP8BlockConfig(WireModel):
    """How weights are quantized: block FP8.

    `None` in place of this object means that FP8 is off. `modules_to_not_convert` holds module paths (`lm_head`,
    `model.layers.0.mlp`): a listed module and all below it stay in BF16.
    """

    block_size: tuple[Literal[128], Literal[128]] = (128, 128)
    dtype: Literal["float8_e4m3fn"] = "float8_e4m3fn"
    scale_fmt: Literal["fp32", "ue8m0"] = "fp32"
    zero_scale: Literal["one", "floor"] = "one"
    modules_to_not_convert: Annotated[tuple[Name, ...], Field(max_length=MOST_TENSORS)] = ()

    def to_hf(self) -> dict[str, Any]:
        """Hugging Face's `quantization_config` for a checkpoint quantized with this configuration."""
        config: dict[str, Any] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(self.block_size),
        }
        if self.scale_fmt != "fp32":
            config["scale_fmt"] = self.scale_fmt
        if self.modules_to_not_convert:
            config["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return config

    @classmethod
    def from_hf(cls, quantization_config: Mapping[str, Any] | None) -> FP8BlockConfig | None:
        """The configuration that a Hugging Face `quantization_config` describes; empty or `None` means off.

        Raises:
            ConfigError: the method is not `fp8`, or blocks, activation scheme or format are not the supported ones.
        """
        if not quantization_config:
            return None
        hf = dict(quantization_config)
        wanted = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        wrong = [f"{key}={hf.get(key)!r} (need {value!r})" for key, value in wanted.items() if hf.get(key) != value]
        if hf.get("fmt", "e4m3") != "e4m3":
            wrong.append(f"fmt={hf['fmt']!r} (need 'e4m3')")
        if hf.get("scale_fmt") not in (None, "ue8m0"):
            wrong.append(f"scale_fmt={hf['scale_fmt']!r} (need 'ue8m0' or none)")
        if wrong:
            raise ConfigError(f"quantization_config is not 128x128 block FP8: {', '.join(wrong)}")
        return cls(
            scale_fmt="ue8m0" if hf.get("scale_fmt") == "ue8m0" else "fp32",
            modules_to_not_convert=tuple(hf.get("modules_to_not_convert") or ()),
        )
