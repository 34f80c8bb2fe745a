"""Memory of an SGLang scheduler (0.5.16 to 0.5.23) for staging: reserved at its start, or its KV cache while idle.

    load the model   ->   `reserve_staging`   ->   SGLang sizes its KV cache from what is left   ->   CUDA graphs

The reservation lies outside of every region of torch_memory_saver, so that releases of memory leave it alone.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from sglang.version import __version__ as SGLANG_VERSION

from receiver_plugin.reserve import Account, bytes_beside, image_bytes, reserved_bytes, wish
from receiver_plugin.rooms import CannotLendError
from receiver_plugin.sglang_surface import RUNNER, missing_of
from shared.errors import TransferError
from shared.planes import shared_memory

logger = logging.getLogger(__name__)

# Pools whose memory is that of their K and V buffers; others are refused by name.
_PLAIN_POOLS = ("MHATokenToKVPool", "MLATokenToKVPool", "DSATokenToKVPool", "MlaPool")
_COMPOSED_POOLS = ("SWAKVPool", "HybridLinearKVPool")
_BUFFERS, _POOLS = ("k_buffer", "v_buffer", "kv_buffer"), ("full_kv_pool", "swa_kv_pool")

_wanted: int | None = None  # bytes; None leaves it to us
_reserved: torch.Tensor | None = None  # of this scheduler process, for as long as it lives


def want(staging: str) -> None:
    """What `--fp8sync-staging` says, before the model is loaded. Raises: ConfigError: it is none of its values."""
    global _wanted
    _wanted = wish(staging)


def reserve_staging(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `alloc_memory_pool`: the model is loaded, and the memory for its KV cache not yet counted."""
    global _reserved
    if _reserved is None and not runner.is_draft_worker:
        _reserved = _reserve(runner)
    return original(runner, *args, **kwargs)


def _reserve(runner: Any) -> torch.Tensor | None:
    from sglang.srt.distributed import get_tp_group

    if missing := missing_of(runner, RUNNER):
        raise SystemExit(f"fp8sync: the model runner of SGLang {SGLANG_VERSION} has no {', '.join(missing)}")
    group = get_tp_group()
    account = Account(
        image_bytes(runner.model), bytes_beside(runner.model, group.world_size), _left_for_kv_cache(runner)
    )
    accounts: list[Any] = [None] * group.world_size
    if group.world_size > 1:
        dist.all_gather_object(accounts, account, group=group.cpu_group)
    else:
        accounts = [account]
    num_bytes, why = reserved_bytes(_wanted, accounts, group.rank_in_group)
    logger.info("fp8sync: %.2f GB reserved for staging (%s)", num_bytes / 1e9, why)
    if (tokens := runner.server_args.max_total_tokens) is not None:
        logger.info("fp8sync: --max-total-tokens %d holds if so many fit beside that; SGLang warns if not", tokens)
    if num_bytes == 0:
        return None
    device = next(runner.model.parameters()).device
    try:
        if device.type == "cpu":
            try:  # what a trainer of this host can open, for plane='same_host'
                return shared_memory.allocate(num_bytes)
            except TransferError as error:
                logger.info("fp8sync: staging is reserved in memory that no trainer can open: %s", error)
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise SystemExit(
            f"fp8sync: no memory for {num_bytes / 1e9:.2f} GB of staging on {device}: "
            f"start with a smaller --fp8sync-staging, or 0 ({error})"
        ) from error


def _left_for_kv_cache(runner: Any) -> int:
    """Bytes, as SGLang counts them. Gives back what the allocator holds first: also blocks of a released region."""
    from sglang.srt.utils.common import get_available_gpu_memory

    gc.collect()
    free_gib = get_available_gpu_memory(runner.device, runner.gpu_id)
    slack_gib = runner.pre_model_load_memory * (1 - runner.mem_fraction_static)
    return int((free_gib - slack_gib) * (1 << 30))


class SglangMemory:
    """What a scheduler lends (`receiver_plugin.rooms.Memory`)."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    @property
    def reserved(self) -> torch.Tensor | None:
        return _reserved

    @property
    def released(self) -> Collection[str]:
        tags: Collection[str] = self._scheduler.weight_updater.offload_tags
        return tags

    def kv_pool(self) -> list[torch.Tensor]:
        scheduler = self._scheduler
        if scheduler.enable_hierarchical_cache:
            raise CannotLendError("the KV cache is copied to the host: start without --enable-hierarchical-cache")
        if "kv_cache" in self.released:
            raise CannotLendError("the memory of the KV cache is released: resume it first")
        pool = scheduler.tp_worker.model_runner.token_to_kv_pool
        return [buffer.view(-1).view(torch.uint8) for buffer in buffers_of(pool)]


def buffers_of(pool: Any) -> Iterator[torch.Tensor]:
    """The buffers that the K and V of all layers lie in. State of linear attention is left alone.

    Raises: CannotLendError: the pool is of another kind, or lays its buffers out in another way.
    """
    kind = type(pool).__name__
    if kind in _COMPOSED_POOLS:
        for name in _POOLS:
            if hasattr(pool, name):
                yield from buffers_of(getattr(pool, name))
        return
    if kind not in _PLAIN_POOLS:
        raise CannotLendError(f"a KV cache of kind {kind} is not lent: start the server with --fp8sync-staging GB")
    if getattr(pool, "post_capture_active", False):
        raise CannotLendError(f"parts of a KV cache that is sized after its CUDA graphs ({kind}) have no memory")
    for name in _BUFFERS:
        for buffer in getattr(pool, name, None) or ():
            if not buffer.is_contiguous():
                raise CannotLendError(f"the buffers of a {kind} interleave: start the server with --fp8sync-staging GB")
            yield buffer
