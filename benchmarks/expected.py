"""What a server of Qwen3 or Qwen3-MoE has to hold after a push, worked out without the push's own code.

Every weight is quantized by the torch reference, cut as SGLang's models cut it for a rank, and put together as they
fuse their parameters. `expected` gives the fingerprints of `receiver_plugin.probe` for them.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from receiver_plugin.probe import NUM_THREADS, sha256
from shared.config import FP8BlockConfig
from shared.naming import SCALE_SUFFIX, should_quantize_param
from shared.numerics import quantize_reference

VOCABULARY_MULTIPLE = 64  # SGLang pads embedding and head with rows of zeros
_FUSED = {  # into what, as which part
    **{"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)},
    **{"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)},
}
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight.*)")
_BY_ROWS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"}
_BY_COLUMNS = {"o_proj", "down_proj"}
_MOST_WAITING = 8  # tensors on the device whose bytes are being read


def place(name: str) -> tuple[str, int, int]:
    """Of checkpoint tensor `name`: the parameter of SGLang's model that it is a part of, expert, number of the part."""
    if found := _EXPERT.fullmatch(name):
        target = f"{found[1]}.{'w2' if found[3] == 'down_proj' else 'w13'}_{found[4]}"
        return target, int(found[2]), int(found[3] == "up_proj")
    parts = name.split(".")
    number = sum(_FUSED[part][1] for part in parts if part in _FUSED)
    return ".".join(_FUSED[part][0] if part in _FUSED else part for part in parts), 0, number


@dataclass(frozen=True)
class Rank:
    """Number `index` of `size` tensor-parallel ranks. `whole_experts`: it has some experts, not a part of each."""

    index: int = 0
    size: int = 1
    whole_experts: bool = False

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Its part of checkpoint tensor `name`, or of its scale: rows, columns, or all."""
        if self.whole_experts and _EXPERT.fullmatch(name):
            return tensor
        module = name.split(".")[-2]
        dim = 0 if module in _BY_ROWS else 1 if module in _BY_COLUMNS else None
        return tensor if dim is None else tensor.chunk(self.size, dim)[self.index].contiguous()

    def has(self, name: str, num_experts: int) -> bool:
        expert = _EXPERT.fullmatch(name)
        if not self.whole_experts or expert is None:
            return True
        return int(expert[2]) * self.size // num_experts == self.index


ONLY_RANK = Rank()


def fused(
    weights: Mapping[str, Tensor], config: FP8BlockConfig, rank: Rank = ONLY_RANK
) -> Iterator[tuple[str, Tensor]]:
    """SGLang's parameters on `rank`, one after the other, from checkpoint tensors in any order."""
    parts: dict[str, list[str]] = {}
    num_experts = 1 + max((place(name)[1] for name in weights), default=0)
    for name in weights:
        if rank.has(name, num_experts):
            parts.setdefault(place(name)[0], []).append(name)
    for target, names in parts.items():
        made = [_as_served(name, weights[name], config) for name in sorted(names, key=place)]
        made = [
            tuple(None if part is None else rank.part(name, part) for part in both)  # type: ignore[misc]
            for name, both in zip(sorted(names, key=place), made, strict=True)
        ]
        yield target, _together(target, [values for values, _ in made])
        scales = [scale for _, scale in made if scale is not None]
        if scales:
            yield target + SCALE_SUFFIX, _together(target, scales)


def _as_served(name: str, weight: Tensor, config: FP8BlockConfig) -> tuple[Tensor, Tensor | None]:
    if should_quantize_param(name, tuple(weight.shape), config):
        return quantize_reference(weight, scale_fmt=config.scale_fmt, zero_scale=config.zero_scale)
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        padding = -weight.shape[0] % VOCABULARY_MULTIPLE
        return torch.nn.functional.pad(weight, (0, 0, 0, padding)), None
    return weight, None


def _together(target: str, parts: list[Tensor]) -> Tensor:
    """Rows of one matrix; of experts, [experts, rows, columns], where w13 is gate and up of each."""
    raw = [part.view(torch.uint8) for part in parts]  # cat and stack need no kernels for float8 then
    if ".experts.w" not in target:
        whole = raw[0] if len(raw) == 1 else torch.cat(raw)
    elif ".w13_" in target:
        whole = torch.stack([torch.cat(raw[at : at + 2]) for at in range(0, len(raw), 2)])
    else:
        whole = torch.stack(raw)
    return whole.view(parts[0].dtype)


def expected(weights: Mapping[str, Tensor], config: FP8BlockConfig, rank: Rank = ONLY_RANK) -> dict[str, str]:
    """Name -> SHA-256 as `receiver_plugin.probe.fingerprint` has it."""
    found: dict[str, str] = {}
    waiting: deque[tuple[str, Future[str]]] = deque()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for name, tensor in fused(weights, config, rank):
            waiting.append((name, pool.submit(sha256, tensor)))
            if len(waiting) > _MOST_WAITING:
                first, future = waiting.popleft()
                found[first] = future.result()
        found.update((name, future.result()) for name, future in waiting)
    return found


def compare(held: Mapping[str, str], wanted: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The names that are missing or different in `held`, and those that it has beside `wanted`."""
    wrong = [name for name, value in wanted.items() if held.get(name) != value]
    return wrong, sorted(held.keys() - wanted.keys())
