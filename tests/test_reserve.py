"""How much memory is reserved for staging, what of SGLang's KV caches is lent, and the flag that says so."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from receiver_plugin import entry, sglang_memory
from receiver_plugin.reserve import Account, bucket_bytes, bytes_beside, image_bytes, reserved_bytes, wish
from receiver_plugin.rooms import CannotLendError
from receiver_plugin.sglang_memory import SglangMemory, buffers_of, reserve_staging
from shared.buckets import DEFAULT_BUCKET_BYTES
from shared.errors import ConfigError


@pytest.mark.parametrize(("text", "num_bytes"), [("auto", None), ("0", 0), ("8", 8 * 10**9), ("0.25", 25 * 10**7)])
def test_the_flag(text: str, num_bytes: int | None) -> None:
    assert wish(text) == num_bytes


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "8GB", "none", "1e9"])
def test_the_flag_takes_nothing_else(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--fp8sync-staging .*auto, 0, or so many GB"):
        wish(text)


def test_auto_takes_at_most_half_of_what_is_left() -> None:
    fits, tight = Account(6, 4, 20), Account(6, 4, 19)
    assert reserved_bytes(None, [fits, fits], 1)[0] == 10
    assert reserved_bytes(None, [fits, tight], 0)[0] == 0
    assert "more than half" in reserved_bytes(None, [tight], 0)[1]


def test_a_size_is_a_size() -> None:
    assert reserved_bytes(7, [Account(6, 4, 0)], 0)[0] == 7
    assert reserved_bytes(0, [Account(6, 4, 100)], 0)[0] == 0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(100, 3, dtype=torch.bfloat16))
        self.register_buffer("offsets", torch.empty(5))

    def stack(self, *shape: int) -> Model:
        self.experts = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), requires_grad=False)
        return self


def test_what_a_model_needs() -> None:
    assert image_bytes(Model()) == 640 + 128
    assert bucket_bytes(Model(), 1) == DEFAULT_BUCKET_BYTES
    assert bucket_bytes(Model().stack(1 << 18, 1 << 14), 2) >= 2 << 32  # one matrix
    assert bucket_bytes(Model().stack(1 << 8, 1 << 10, 1 << 14), 2) == DEFAULT_BUCKET_BYTES  # of which one expert comes


def test_the_only_rank_of_a_server_needs_no_bucket_beside_its_weights() -> None:
    assert bytes_beside(Model(), 1) == 64 << 20
    huge = Model().stack(1 << 8, 1 << 12, 1 << 14)  # 16 GiB
    assert bytes_beside(huge, 1) == image_bytes(huge) // 64
    assert bytes_beside(huge, 2) == bucket_bytes(huge, 2)


# ---- at the start of a scheduler


class Runner:
    """A model runner before its KV cache is allocated."""

    def __init__(self, draft: bool) -> None:
        self.device, self.gpu_id, self.is_draft_worker = "cpu", 0, draft
        self.mem_fraction_static, self.pre_model_load_memory = 0.5, 4.0
        self.model = Model()
        self.server_args = SimpleNamespace(max_total_tokens=2048)
        self.reserved_before: float | None = None

    def alloc_memory_pool(self, config: Any = None) -> str:
        held = sglang_memory._reserved
        self.reserved_before = 0 if held is None else held.numel()
        return "allocated"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(staging: str, free_gib: float, draft: bool = False) -> float | None:
        runner = Runner(draft)
        group = SimpleNamespace(world_size=1, rank_in_group=0, cpu_group=None)
        monkeypatch.setattr(sglang_memory, "_reserved", None)
        monkeypatch.setattr("sglang.srt.distributed.get_tp_group", lambda: group)
        monkeypatch.setattr("sglang.srt.utils.common.get_available_gpu_memory", lambda device, gpu: free_gib)
        monkeypatch.setattr(sglang_memory, "_wanted", wish(staging))
        assert reserve_staging(Runner.alloc_memory_pool, runner) == "allocated"
        return runner.reserved_before

    return run


NEED = 640 + 128 + (64 << 20)


@pytest.mark.parametrize(
    ("staging", "free_gib", "num_bytes"),
    [("auto", 2.2, NEED), ("auto", 2.1, 0), ("0", 9.0, 0), ("0.1", 2.0, 10**8)],
)
def test_memory_is_there_before_the_kv_cache(start: Any, staging: str, free_gib: float, num_bytes: int) -> None:
    """2 GiB of the 4 are not SGLang's to use; 0.0625 GiB are needed."""
    assert start(staging, free_gib) == num_bytes


def test_a_draft_model_gets_none(start: Any) -> None:
    assert start("0.1", 9.0, draft=True) == 0


def test_memory_that_is_not_there_ends_the_start(start: Any) -> None:
    with pytest.raises(SystemExit, match=r"no memory for 999999.*smaller --fp8sync-staging"):
        start("999999.9", 9.0)


# ---- the KV cache


def pool(kind: str, **fields: Any) -> Any:
    return type(kind, (), fields)()


def two() -> list[torch.Tensor]:
    return [torch.zeros(4, 2, 3), torch.zeros(4, 2, 3)]


MHA = pool("MHATokenToKVPool", k_buffer=two(), v_buffer=two())
MLA = pool("MLATokenToKVPool", kv_buffer=two())
NVFP4 = pool("MHATokenToKVPoolFP4", k_buffer=two(), v_buffer=two())
LATE = pool("MHATokenToKVPool", k_buffer=two(), v_buffer=two(), post_capture_active=True)
MIXED = pool("MHATokenToKVPool", k_buffer=[torch.zeros(4, 2, 3)[:, 0]], v_buffer=two())


@pytest.mark.parametrize(
    ("kv_pool", "num_buffers"),
    [
        (MHA, 4),
        (MLA, 2),
        (pool("SWAKVPool", full_kv_pool=MHA, swa_kv_pool=MHA), 8),
        (pool("HybridLinearKVPool", full_kv_pool=MLA, mamba_pool=object()), 2),
    ],
)
def test_buffers_of_the_pools_that_are_known(kv_pool: Any, num_buffers: int) -> None:
    assert len(list(buffers_of(kv_pool))) == num_buffers


@pytest.mark.parametrize(
    ("kv_pool", "why"),
    [
        (NVFP4, "kind MHATokenToKVPoolFP4 is not lent"),
        (pool("SWAKVPool", full_kv_pool=MHA, swa_kv_pool=NVFP4), "kind MHATokenToKVPoolFP4 is not lent"),
        (LATE, "sized after its CUDA graphs"),
        (MIXED, "interleave"),
    ],
)
def test_other_pools_are_refused_by_name(kv_pool: Any, why: str) -> None:
    with pytest.raises(CannotLendError, match=why):
        list(buffers_of(kv_pool))


def scheduler(**changes: Any) -> Any:
    runner = SimpleNamespace(token_to_kv_pool=MHA)
    made = {
        "enable_hierarchical_cache": False,
        "weight_updater": SimpleNamespace(offload_tags=set()),
        "tp_worker": SimpleNamespace(model_runner=runner),
    }
    return SimpleNamespace(**{**made, **changes})


def test_a_kv_cache_is_lent_as_bytes() -> None:
    lent = SglangMemory(scheduler()).kv_pool()
    assert [(buffer.dtype, buffer.numel()) for buffer in lent] == [(torch.uint8, 96)] * 4
    lent[0].fill_(1)
    assert MHA.k_buffer[0].view(-1).view(torch.uint8).eq(1).all()
    lent[0].zero_()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
        ({"weight_updater": SimpleNamespace(offload_tags={"kv_cache"})}, "released: resume it first"),
    ],
)
def test_a_kv_cache_that_others_use_or_that_is_away(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CannotLendError, match=why):
        SglangMemory(scheduler(**changes)).kv_pool()


def test_the_names_are_those_of_sglang() -> None:
    from sglang.srt.mem_cache import memory_pool, swa_memory_pool

    for kind in (*sglang_memory._PLAIN_POOLS, *sglang_memory._COMPOSED_POOLS):
        assert kind == "MlaPool" or hasattr(memory_pool, kind) or hasattr(swa_memory_pool, kind)


# ---- the command line


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    entry._add_flag(None, parser)
    return parser.parse_args(list(words))


def test_the_flags_reach_the_children(monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[Any] = []
    monkeypatch.setattr(entry, "_arm", armed.append)
    found: dict[str, str] = {}
    monkeypatch.setattr("os.environ", found)
    words = ["--load-plugin", "fp8sync", "--fp8sync-staging", "0"]
    assert entry._parse_flag(lambda cls, args: "server args", object, parsed(*words)) == "server args"
    assert found == {"FP8SYNC_LOAD": "fp8sync", "FP8SYNC_STAGING": "0"} and armed == ["server args"]
    entry._parse_flag(lambda cls, args: "server args", object, parsed(*words[:2]))
    assert found["FP8SYNC_STAGING"] == "auto"


def test_the_flag_needs_the_plugin() -> None:
    with pytest.raises(SystemExit, match="--fp8sync-staging 4 needs --load-plugin fp8sync"):
        entry._parse_flag(lambda cls, args: None, object, parsed("--fp8sync-staging", "4"))


def test_a_wrong_size_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("receiver_plugin.sglang_adapter._installed", False)
    monkeypatch.setenv("FP8SYNC_STAGING", "8GB")
    with pytest.raises(SystemExit, match="--fp8sync-staging 8GB"):
        entry._arm()
