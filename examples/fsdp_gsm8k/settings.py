"""The configuration file: TOML, read once, every key checked; an unknown key is an error."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.config import FP8BlockConfig
from shared.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TrainSettings(_Strict):
    """`batch_size` is prompts per step over all ranks, `group_size` answers per prompt, `clip` the ratio's margin."""

    steps: Count
    batch_size: Count
    group_size: Annotated[int, Field(ge=2)]
    learning_rate: PositiveFloat
    clip: PositiveFloat = 0.2


class QuantizationSettings(FP8BlockConfig):
    """A switch, off by default, beside the keys of `FP8BlockConfig`."""

    fp8: bool = False

    def block_config(self) -> FP8BlockConfig | None:
        """What drives both the servers' arguments and the sender; None means off."""
        return FP8BlockConfig(**self.model_dump(exclude={"fp8"})) if self.fp8 else None


class RolloutSettings(_Strict):
    """`timeout_s` is how long one request to a server may take; `server_args` go to every server."""

    servers: Annotated[tuple[str, ...], Field(min_length=1)]
    max_new_tokens: Count
    timeout_s: PositiveFloat = 600.0
    server_args: tuple[str, ...] = ()
    quantization: QuantizationSettings = QuantizationSettings()


class Settings(_Strict):
    """`model`, `tokenizer` (default: the model's) and `data` are the user's; `checkpoint` is written by the trainer."""

    model: str
    tokenizer: str | None = None
    data: Path
    checkpoint: Path
    seed: int = 0
    train: TrainSettings
    rollout: RolloutSettings


def load_settings(file: str | Path) -> Settings:
    """Raises: ConfigError: no TOML, an unknown or missing key, or a value of another type or out of range."""
    try:
        values = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        return Settings.model_validate_json(json.dumps(values, default=str))  # TOML's arrays are JSON's
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ConfigError(f"{file}: {error}") from error
