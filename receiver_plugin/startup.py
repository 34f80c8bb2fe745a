"""May the weights that a server started with be served? Only if they are a complete block-FP8 checkpoint.

Stock SGLang starts on random weights (`--load-format dummy`) and on BF16 files under an FP8 override, and serves both
without a word. The check reads the headers of the safetensors files (no data) and traces the model's own loader over
what they hold: every parameter has to be covered, by tensors of the type that it has.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from receiver_plugin.binding import Derived, trace
from receiver_plugin.manifest import cast_problems
from receiver_plugin.recorder import Source

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
_CHECKPOINT_FORMATS = ("auto", "safetensors")


def fence_reason(model: nn.Module, folder: str | None, load_format: str, derived: Derived | None = None) -> str | None:
    """Why `model` must not serve what it loaded from `folder`, or None if it may.

    `folder`: local folder of the checkpoint, None if it is not known. `load_format`: SGLang's `--load-format`.
    """
    if load_format not in _CHECKPOINT_FORMATS:
        return f"started with --load-format {load_format}: its weights are no checkpoint"
    if folder is None or not Path(folder).is_dir():
        return "the folder of its checkpoint is not known"
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        return "the model's folder holds no safetensors files"
    try:
        sources = [source for file in files for source in _header(file)]
    except (SafetensorError, OSError, KeyError) as error:
        return f"a checkpoint file cannot be read: {error}"
    if not any(source.dtype == torch.float8_e4m3fn for source in sources):
        return "the checkpoint holds no FP8 weights"
    plan = trace(model, sources, derived)
    problems = (*plan.problems, *cast_problems(sources, plan))
    return f"the checkpoint is not complete: {'; '.join(problems[:3])}" if problems else None


def _header(file: Path) -> list[Source]:
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        return [Source(name, tuple(s.get_shape()), _DTYPES[s.get_dtype()]) for name, s in slices.items()]
