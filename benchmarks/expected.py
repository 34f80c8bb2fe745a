"""What a server of Qwen3 or Qwen3-MoE has to hold after a push, worked out without the push's own code.

Every weight is quantized by the torch reference, and put together as SGLang's models fuse their parameters on one rank.
`expected` gives the fingerprints of `receiver_plugin.probe` for them.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

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
_MOST_WAITING = 8  # tensors on the device whose bytes are being read


def place(name: str) -> tuple[str, int, int]:
    """Of checkpoint tensor `name`: the parameter of SGLang's model that it is a part of, expert, number of the part."""
    if found := _EXPERT.fullmatch(name):
        target = f"{found[1]}.{'w2' if found[3] == 'down_proj' else 'w13'}_{found[4]}"
        return target, int(found[2]), int(found[3] == "up_proj")
    parts = name.split(".")
    number = sum(_FUSED[part][1] for part in parts if part in _FUSED)
    return ".".join(_FUSED[part][0] if part in _FUSED else part for part in parts), 0, number


def fused(weights: Mapping[str, Tensor], config: FP8BlockConfig) -> Iterator[tuple[str, Tensor]]:
    """SGLang's parameters, one after the other, from checkpoint tensors in any order."""
    parts: dict[str, list[str]] = {}
    for name in weights:
        parts.setdefault(place(name)[0], []).append(name)
    for target, names in parts.items():
        made = [_as_served(name, weights[name], config) for name in sorted(names, key=place)]
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


def expected(weights: Mapping[str, Tensor], config: FP8BlockConfig) -> dict[str, str]:
    """Name -> SHA-256 as `receiver_plugin.probe.fingerprint` has it."""
    found: dict[str, str] = {}
    waiting: deque[tuple[str, Future[str]]] = deque()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for name, tensor in fused(weights, config):
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
