"""The CPU reference platform for SGLang before 0.5.23, which asks an out-of-tree platform for more.

Those releases have no `PlatformCapabilities`; where 0.5.23 falls back to its own memory pools, they demand the
platform's. SGLang's own classes, which serve any torch device, are handed back.
"""

from __future__ import annotations

from typing import Any


def make_platform() -> type:
    """The platform's class. Raises: ImportError: this SGLang has not even the older seam."""
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import SRTPlatform

    class CpuReferenceOlder(CpuDeviceMixin, SRTPlatform):
        _enum = PlatformEnum.OOT

        def get_device(self, device_id: int = 0) -> str:
            return "cpu"  # a string: it becomes the default of --device

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_dispatch_key_name(self) -> str:
            return "native"

        def get_mha_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_mla_kv_pool_cls(self) -> type:
            return _mla_pool()

        def get_paged_allocator_cls(self) -> type:
            return _allocator()

        def init_backend(self) -> None:
            from receiver_plugin.cpu_platform import _replace_operators

            _replace_operators()

    return CpuReferenceOlder


def _mla_pool() -> type:
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    class MlaPool(MLATokenToKVPool):
        def __init__(self, *args: Any, index_head_dim: None = None, **more: Any) -> None:
            if index_head_dim is not None:  # sent to every platform's class, meant for models with an indexer
                raise SystemExit("fp8sync: the CPU reference platform has no sparse attention on this SGLang")
            super().__init__(*args, **more)

    return MlaPool


def _allocator() -> type:
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

    class OneTokenPages(TokenToKVPoolAllocator):  # the pages of more tokens are allocated by Triton kernels
        def __init__(self, size: int, page_size: int, **more: Any) -> None:
            if page_size != 1:
                raise SystemExit("fp8sync: the CPU reference platform needs --page-size 1 on this SGLang")
            super().__init__(size, **more)

    return OneTokenPages


def __getattr__(name: str) -> Any:
    if name == "CpuReferenceOlder":
        return make_platform()
    raise AttributeError(name)
