"""What a scheduler process of SGLang (0.5.16 to 0.5.23) offers to the receiver: ranks, services, dangers."""

from __future__ import annotations

import hashlib
import inspect
import pickle
import struct
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist
from sglang.version import __version__ as SGLANG_VERSION

from receiver_plugin.binding import Derived
from receiver_plugin.makeup import Makeup
from receiver_plugin.sglang_derived import SglangDerived, unknown_tensors
from receiver_plugin.sglang_keep import RunningRequests
from receiver_plugin.sglang_memory import SglangMemory
from receiver_plugin.sglang_refusals import Backends, refused_copies, refused_layers
from shared import protocol as wire
from shared.errors import IncompatibleServerError

_SIZE, _SHORT = struct.Struct("<Q"), 1024
# In newer releases, in older ones.
_EMBEDDING_MODULES = ("sglang.srt.managers.mm_schedule", "sglang.srt.managers.mm_utils")


def replica_of(scheduler: Any) -> int:
    """Which replica of its server (`--dp-size`) this scheduler belongs to, from 0."""
    if scheduler.server_args.dp_size == 1:
        return 0  # a router may number its servers through SGLANG_DP_RANK
    if hasattr(scheduler, "ps"):  # up to 0.5.22
        return int(scheduler.ps.dp_rank)
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().dp_rank)


class TpRanks:
    """The tensor-parallel ranks of a replica. Used on the scheduler's thread only, inside control requests."""

    def __init__(self, scheduler: Any) -> None:
        self._group = scheduler.tp_group.cpu_group
        self.index = scheduler.tp_group.rank_in_group
        self.size = scheduler.tp_group.world_size

    def gather(self, item: Any) -> list[Any]:
        """One collective for what is short, as most is; `dist.all_gather_object` takes two for everything."""
        if self.size == 1:
            return [item]
        data = pickle.dumps(item)
        told = self._exchange(_SIZE.pack(len(data)) + data[:_SHORT], _SIZE.size + _SHORT)
        longest = max(_SIZE.unpack_from(each)[0] for each in told)
        parts = [each[_SIZE.size :] for each in told] if longest <= _SHORT else self._exchange(data, longest)
        return [pickle.loads(part) for part in parts]  # of processes of this server, over a group of their own

    def _exchange(self, data: bytes, num_bytes: int) -> list[bytes]:
        """`data` of every rank, followed by zeros up to `num_bytes`."""
        mine = torch.zeros(num_bytes, dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self._group)
        return [each.numpy().tobytes() for each in found]


class SglangEngine:
    """What the receiver asks of SGLang (`receiver_plugin.receiver.Engine`)."""

    def __init__(self, scheduler: Any, model: torch.nn.Module) -> None:
        self._scheduler, self._model = scheduler, model
        self.derived: Derived = SglangDerived(model)
        self.memory = SglangMemory(scheduler)
        self.requests = RunningRequests(scheduler)
        self._on_gpu = next(model.parameters()).is_cuda
        self._capability = _capability() if self._on_gpu else (0, 0)
        self._safe: tuple[Backends, Makeup] | None = None  # what was found to be safe
        self._placement: tuple[tuple[torch.Tensor, ...], str] | None = None  # as it was last, and its hash
        self.placement()  # releases that keep these elsewhere do not start
        image_embeddings()

    def info(self, incarnation: str) -> wire.ServerInfo:
        from sglang.srt.layers.quantization.fp8_utils import get_fp8_gemm_runner_backend

        placement = self.placement()
        return wire.ServerInfo(
            protocol=wire.PROTOCOL_VERSION,
            sglang_version=SGLANG_VERSION,
            incarnation=f"{incarnation}@{placement}" if placement else incarnation,
            num_ranks=self._scheduler.tp_group.world_size,
            block_size=block_size(self._model),
            scale_fmt=_scale_fmt(self._scheduler.tp_worker.model_runner.model_config.hf_config),
            device=torch.cuda.get_device_name() if self._on_gpu else "cpu",
            compute_capability="{}.{}".format(*_capability()) if self._on_gpu else "",
            gemm_backend=get_fp8_gemm_runner_backend().value if self._on_gpu else "torch",
            moe_backend=str(self._scheduler.server_args.moe_runner_backend),
            cannot_keep=tuple(self.requests.cannot_keep()),
        )

    def placement(self) -> str:
        """Where the experts lie, hex, the same on all ranks; "" without experts. It changes when one is moved."""
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

        location = get_global_expert_location_metadata()
        if location is None:
            return ""
        # The copies on the host: no wait for the device.
        now = (location.physical_to_logical_map_cpu, location.logical_to_all_physical_map_cpu)
        if self._placement is None or not all(map(_same, self._placement[0], now)):
            self._placement = tuple(placed.clone() for placed in now), _hash_of(now)
        return self._placement[1]

    def unsafe(self) -> list[str]:
        """Looked up each time: caches may be made by the first request, layers wrapped by another route."""
        released = "weights" in self.memory.released
        memory = ["the memory of the weights is released: resume it first"] if released else []
        kv_store = getattr(self._scheduler, "enable_hicache_storage", False)
        storage = ["KV cache of old weights would stay in the HiCache storage: detach it"] if kv_store else []
        return [*self._unsafe_layers(), *memory, *storage]

    def _unsafe_layers(self) -> list[str]:
        backends = _backends(self._capability)
        if self._safe is None or self._safe[0] != backends or not self._safe[1].holds():
            self._safe = None
            makeup = Makeup(self._model)  # before the look, so that nothing changes in between
            if found := _unsafe_layers(self._model, backends):
                return found
            self._safe = backends, makeup
        return _refused_by_sglang(self._model, only_elsewhere=True)

    @property
    def makeup(self) -> object:
        return self._safe

    def flush_cache(self) -> bool:
        flushed = self._flush_kv_cache()
        if flushed:
            _forget_images()
        return flushed

    def cannot_keep(self) -> list[str]:
        return self.requests.cannot_keep()

    def renew_cache(self, name: str) -> None:
        self.requests.renew_cache(name)
        _forget_images()

    def end_requests(self) -> None:
        self.requests.end_all()

    def _flush_kv_cache(self) -> bool:
        scheduler = self._scheduler
        knows_retracted = _takes(scheduler.is_fully_idle, "ignore_waiting")
        if not scheduler._engine_paused or knows_retracted:
            return bool(scheduler.flush_cache(empty_cache=False))
        # Requests that a pause put back hold no KV cache; older releases would wait for them to end all the same.
        waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
        try:
            return bool(scheduler.flush_cache(empty_cache=False))
        finally:
            scheduler.waiting_queue = waiting

    def synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def publish(self, version: int) -> None:
        self.requests.label(str(version))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _hash_of(placed: tuple[torch.Tensor, ...]) -> str:
    """6 MB for 128 experts in 48 layers, which takes five times as long as to compare them."""
    found = hashlib.sha256()
    for tensor in placed:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _forget_images() -> None:
    """SGLang keeps what the old weights made of an image that it has seen."""
    cache = image_embeddings().embedding_cache
    if cache is not None:
        cache.clear()


def image_embeddings() -> Any:
    """The module of SGLang whose `embedding_cache` holds what multimodal models made of their inputs.

    Raises: IncompatibleServerError: it is elsewhere.
    """
    for name in _EMBEDDING_MODULES:
        if find_spec(name) is not None and "embedding_cache" in vars(module := import_module(name)):
            return module
    raise IncompatibleServerError(
        f"SGLang {SGLANG_VERSION} has no embedding_cache in {' or '.join(_EMBEDDING_MODULES)}"
    )


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _backends(capability: tuple[int, int]) -> Backends:
    from sglang.srt.layers.moe import get_moe_a2a_backend, get_moe_runner_backend

    return Backends(
        capability=capability,
        is_rocm=torch.version.hip is not None,
        moe_runner=str(get_moe_runner_backend().value),
        moe_a2a=str(get_moe_a2a_backend().value),
    )


def _unsafe_layers(model: torch.nn.Module, backends: Backends) -> list[str]:
    """Where raw copies into the parameters of `model` would be wrong or not enough, why, and what helps."""
    found = [*refused_layers(model, backends), *refused_copies(unknown_tensors(model))]
    return found or _refused_by_sglang(model)


def _refused_by_sglang(model: torch.nn.Module, only_elsewhere: bool = False) -> list[str]:
    """SGLang's own word (from 0.5.20 on) on caches, also those that no module holds, such as that of the HPC-Ops GEMM.

    `only_elsewhere`: modules are left out where SGLang can.
    """
    from sglang.srt.model_executor.model_runner_components import weight_updater

    ask = getattr(weight_updater, "_unsupported_derived_weight_cache_error", None)
    if ask is None:
        return []
    parameters = inspect.signature(ask).parameters.values()  # 0.5.20 looks at no model
    can_leave_out = all(parameter.default is None for parameter in parameters)
    error = ask() if not parameters or (only_elsewhere and can_leave_out) else ask(model)
    return [] if error is None else [f"the model: SGLang says: {error}"]


def _takes(method: Callable[..., Any], name: str) -> bool:
    return name in _parameters_of(getattr(method, "__func__", method))


@lru_cache
def _parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _scale_fmt(hf_config: Any) -> Literal["fp32", "ue8m0"]:
    """The scale format that the model's configuration names, overrides included."""
    described = getattr(hf_config, "quantization_config", None) or {}
    get = described.get if isinstance(described, dict) else lambda key: getattr(described, key, None)
    return "ue8m0" if get("scale_fmt") == "ue8m0" else "fp32"


def block_size(model: torch.nn.Module) -> tuple[int, int] | None:
    """The block of the model's FP8 layers, None if it has none."""
    for layer in model.modules():
        config = getattr(getattr(layer, "quant_method", None), "quant_config", None)
        block = getattr(config, "weight_block_size", None)
        if block:
            return int(block[0]), int(block[1])
    return None
