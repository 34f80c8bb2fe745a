"""A trainer's model and the model that a server would make of it, small enough to read.

`Served` loads the way SGLang's models do: q/k/v fused into one parameter, gate/up into another, FP8 weights with
`weight_scale_inv`, a padded vocabulary, tensor-parallel slices, unknown names skipped without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from receiver_plugin.binding import Derived, NothingDerived
from receiver_plugin.ranks import SingleRank
from receiver_plugin.rooms import CannotLendError
from shared.numerics import scale_shape
from shared.protocol import PROTOCOL_VERSION, ServerInfo

HIDDEN, HEADS, INTER, VOCAB = 192, 128, 256, 250


class TrainerLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(HIDDEN, 2 * HEADS, bias=False)
        self.self_attn.k_proj = nn.Linear(HIDDEN, HEADS, bias=False)
        self.self_attn.v_proj = nn.Linear(HIDDEN, HEADS, bias=False)
        self.self_attn.o_proj = nn.Linear(2 * HEADS, HIDDEN, bias=False)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(HIDDEN, INTER, bias=False)
        self.mlp.up_proj = nn.Linear(HIDDEN, INTER, bias=False)
        self.mlp.down_proj = nn.Linear(INTER, HIDDEN, bias=False)
        self.input_layernorm = nn.RMSNorm(HIDDEN)


class Trainer(nn.Module):
    """[VOCAB, HIDDEN] embedding and two layers, Hugging Face names."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.model.layers = nn.ModuleList(TrainerLayer() for _ in range(2))
        self.to(dtype)


STACKED = {
    "q_proj": ("qkv_proj", 0, 2 * HEADS),
    "k_proj": ("qkv_proj", 2 * HEADS, HEADS),
    "v_proj": ("qkv_proj", 3 * HEADS, HEADS),
    "gate_proj": ("gate_up_proj", 0, INTER),
    "up_proj": ("gate_up_proj", INTER, INTER),
}


class Served(nn.Module):
    """`tp_rank` of `tp_size`: fused and column-parallel weights are cut by rows, row-parallel ones by columns."""

    def __init__(self, tp_rank: int = 0, tp_size: int = 1) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self._add("model.embed_tokens.weight", 256, HIDDEN, torch.bfloat16)
        for layer in range(2):
            prefix = f"model.layers.{layer}"
            self._linear(f"{prefix}.self_attn.qkv_proj", 4 * HEADS // tp_size, HIDDEN)
            self._linear(f"{prefix}.self_attn.o_proj", HIDDEN, 2 * HEADS // tp_size)
            self._linear(f"{prefix}.mlp.gate_up_proj", 2 * INTER // tp_size, HIDDEN)
            self._linear(f"{prefix}.mlp.down_proj", HIDDEN, INTER // tp_size)
            self._add(f"{prefix}.input_layernorm.weight", HIDDEN, 0, torch.float32)

    def _add(self, name: str, rows: int, cols: int, dtype: torch.dtype) -> None:
        shape = (rows, cols) if cols else (rows,)
        noise = torch.randn(shape).to(dtype)
        self.register_parameter(name.replace(".", "/"), nn.Parameter(noise, requires_grad=False))

    def _linear(self, name: str, rows: int, cols: int) -> None:
        self._add(f"{name}.weight", rows, cols, torch.float8_e4m3fn)
        self._add(f"{name}.weight_scale_inv", *scale_shape(rows, cols), torch.float32)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.replace("/", "."), parameter

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            self._load(parameters, name, weight)

    def _load(self, parameters: dict[str, nn.Parameter], name: str, weight: torch.Tensor) -> None:
        unit = 128 if name.endswith("_scale_inv") else 1
        part = name.split(".")[-2]
        if part in STACKED:
            fused, first, rows = (STACKED[part][0], *(-(-n // unit) for n in STACKED[part][1:]))
            target = parameters.get(name.replace(part, fused))
            if target is None:
                return
            rows, first = rows // self.tp_size, first // self.tp_size
            target.data.narrow(0, first, rows).copy_(weight.narrow(0, self.tp_rank * rows, rows))
            return
        target = parameters.get(name)
        if target is None:
            return
        if part == "embed_tokens":
            target.data[: weight.shape[0]].copy_(weight)
            target.data[weight.shape[0] :].fill_(0)
        elif part in ("o_proj", "down_proj"):
            cols = target.shape[1]
            cut = weight.narrow(1, self.tp_rank * cols, cols)
            assert cut.shape == target.shape, f"{cut.shape} != {target.shape}"
            target.data.copy_(cut)
        else:
            assert weight.shape == target.shape, f"{weight.shape} != {target.shape}"
            target.data.copy_(weight)


class FakeMemory:
    """Memory of an engine: `reserved`, and a KV cache in `pool`, unless `refusal` says why it is not lent."""

    def __init__(self) -> None:
        self.reserved: torch.Tensor | None = torch.empty(8 << 20, dtype=torch.uint8)
        self.pool: list[torch.Tensor] = []
        self.refusal = ""
        self.released: set[str] = set()

    def kv_pool(self) -> list[torch.Tensor]:
        if self.refusal or "kv_cache" in self.released:
            raise CannotLendError(self.refusal or "its memory is released: resume it first")
        return [buffer.view(-1).view(torch.uint8) for buffer in self.pool]


class FakeEngine:
    """The engine around a receiver, with switches for what can go wrong in it."""

    def __init__(self) -> None:
        self.idle, self.published = True, [0]
        self.derived: Derived = NothingDerived()
        self.memory = FakeMemory()
        self.unsafe_reasons: list[str] = []
        self.makeup: object = None
        self.block_size: tuple[int, int] | None = (128, 128)
        self.sglang_version = "0.5.23"
        self.scale_fmt: Literal["fp32", "ue8m0"] = "fp32"
        self.on_synchronize: Callable[[], None] = lambda: None
        self.keep_refused: list[str] = []
        self.events: list[str] = []  # what became of requests and their KV cache

    def info(self, incarnation: str) -> ServerInfo:
        return ServerInfo(
            protocol=PROTOCOL_VERSION,
            sglang_version=self.sglang_version,
            incarnation=incarnation,
            num_ranks=1,
            block_size=self.block_size,
            scale_fmt=self.scale_fmt,
            device="cpu",
            compute_capability="",
            gemm_backend="torch",
            moe_backend="none",
            cannot_keep=tuple(self.keep_refused),
        )

    def unsafe(self) -> list[str]:
        return self.unsafe_reasons

    def flush_cache(self) -> bool:
        if self.idle:
            self.events.append("flushed")
        return self.idle

    def cannot_keep(self) -> list[str]:
        return self.keep_refused

    def renew_cache(self, name: str) -> None:
        self.events.append(f"renewed for version {name.split('/')[1]}")

    def end_requests(self) -> None:
        self.events.append("ended")

    def synchronize(self) -> None:
        self.on_synchronize()

    def publish(self, version: int) -> None:
        self.published.append(version)


__all__ = ["FakeEngine", "Served", "SingleRank", "Trainer"]
