"""A trainer's model and a server's, tiny, and cut into tensor-parallel slices along whole blocks.

Per layer: q and k fused by rows, o cut by columns, a norm in fp32; an embedding with padded rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
from torch import nn

from receiver_plugin.probe import fingerprint
from sender.quantize import quantize
from shared.numerics import scale_shape

HIDDEN, WIDE, VOCAB, PADDED, LAYERS = 128, 256, 250, 256, 2
BUCKET_BYTES = 48 << 10

Prints = tuple[dict[str, str], ...]  # of every rank of a server


class Trainer(nn.Module):
    """The same weights for the same seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.model.layers = nn.ModuleList(_trainer_layer() for _ in range(LAYERS))
        self.to(torch.bfloat16)


def _trainer_layer() -> nn.Module:
    layer = nn.Module()
    layer.self_attn = nn.Module()
    layer.self_attn.q_proj = nn.Linear(HIDDEN, WIDE, bias=False)
    layer.self_attn.k_proj = nn.Linear(HIDDEN, WIDE, bias=False)
    layer.self_attn.o_proj = nn.Linear(WIDE, HIDDEN, bias=False)
    layer.input_layernorm = nn.RMSNorm(HIDDEN)
    layer.input_layernorm.weight.data.uniform_(0.5, 1.5)
    return layer


class Served(nn.Module):
    """Rank `tp_rank` of `tp_size`, with random weights. `on_load` runs when weights are loaded or a load is traced."""

    def __init__(self, tp_rank: int, tp_size: int, on_load: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, self.on_load = tp_rank, tp_size, on_load
        self._add("model.embed_tokens.weight", (PADDED, HIDDEN), torch.bfloat16)
        for layer in range(LAYERS):
            self._linear(f"model.layers.{layer}.self_attn.qk_proj", 2 * WIDE // tp_size, HIDDEN)
            self._linear(f"model.layers.{layer}.self_attn.o_proj", HIDDEN, WIDE // tp_size)
            self._add(f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,), torch.float32)

    def _linear(self, name: str, rows: int, cols: int) -> None:
        self._add(f"{name}.weight", (rows, cols), torch.float8_e4m3fn)
        self._add(f"{name}.weight_scale_inv", scale_shape(rows, cols), torch.float32)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        noise = torch.randn(shape).to(dtype)
        self.register_parameter(name.replace(".", "/"), nn.Parameter(noise, requires_grad=False))

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator:  # type: ignore[type-arg]
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield name.replace("/", "."), parameter

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.on_load()
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            part = name.split(".")[-2]
            target = parameters.get(name.replace(part, "qk_proj") if part in ("q_proj", "k_proj") else name)
            if target is not None:
                self._load(target.data, part, weight)

    def _load(self, target: torch.Tensor, part: str, weight: torch.Tensor) -> None:
        if part == "embed_tokens":
            target[:VOCAB].copy_(weight)
            target[VOCAB:].fill_(0)
        elif part in ("q_proj", "k_proj"):
            rows = target.shape[0] // 2
            mine = weight.narrow(0, self.tp_rank * rows, rows)
            target.narrow(0, 0 if part == "q_proj" else rows, rows).copy_(mine)
        elif part == "o_proj":
            target.copy_(weight.narrow(1, self.tp_rank * target.shape[1], target.shape[1]))
        else:
            target.copy_(weight)


@lru_cache(maxsize=64)
def reference(seed: int, tp_size: int) -> Prints:
    """What the ranks of a server hold that loaded the quantized checkpoint of `Trainer(seed)` with their own loader."""
    found = []
    for rank in range(tp_size):
        served = Served(rank, tp_size)
        served.load_weights(_checkpoint(Trainer(seed)))
        found.append(fingerprint(served))
    return tuple(found)


def _checkpoint(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if "proj" in name:
            codes, scale = quantize(parameter.detach(), name=name)
            yield from ((name, codes), (name + "_scale_inv", scale))
        else:
            yield name, parameter.detach()
