"""A bucket packed in a few launches against the same bucket packed tensor by tensor with the torch reference."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sender.grouped import GroupedBucket
from sender.quantize import copy_into
from shared.buckets import Bucket, Entry, Layout, make_layout
from shared.config import FP8BlockConfig
from shared.errors import ConfigError
from shared.numerics import quantize_reference_into
from shared.protocol import DTypeName, ManifestTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8: DTypeName = "float8_e4m3fn"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype).to(DEVICE)


def layout_of(weights: dict[str, Tensor], plain: dict[str, DTypeName]) -> Layout:
    return make_layout(
        [
            ManifestTensor(name=name, shape=tuple(w.shape), dtype=plain.get(name, FP8), quantized=name not in plain)
            for name, w in weights.items()
        ]
    )


def reference(bucket: Bucket, weights: dict[str, Tensor], config: FP8BlockConfig, alone: list[str]) -> GroupedBucket:
    """A grouped bucket that notes in `alone` what it packed by itself."""
    rows = {entry.tensor.name: row for row, entry in enumerate(bucket.entries)}

    def pack_one(entry: Entry, weight: Tensor, packed: Tensor) -> None:
        alone.append(entry.tensor.name)
        pack(entry, weight, packed, config)

    return GroupedBucket(bucket, rows, config, pack_one)


def pack(entry: Entry, weight: Tensor, packed: Tensor, config: FP8BlockConfig) -> None:
    flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
    if entry.scale is None:
        copy_into(weight, entry.values.view(packed), flag)
    else:
        values, scale = entry.values.view(packed), entry.scale.view(packed)
        quantize_reference_into(weight, values, scale, flag, scale_fmt=config.scale_fmt, zero_scale=config.zero_scale)


def both(weights: dict[str, Tensor], plain: dict[str, DTypeName], config: FP8BlockConfig) -> list[str]:
    """Packs twice, in both ways, and compares every byte. The names of those that no launch took."""
    (bucket,) = layout_of(weights, plain).buckets
    alone: list[str] = []
    ours = reference(bucket, weights, config, alone)
    for _ in range(2):
        packed, wanted = (torch.zeros(bucket.num_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        nonfinite = torch.zeros(len(weights), dtype=torch.int32, device=DEVICE)
        before = {name: weight.clone() for name, weight in weights.items()}
        ours.pack(weights, packed, nonfinite)
        for entry in bucket.entries:
            pack(entry, weights[entry.tensor.name], wanted, config)
        assert torch.equal(packed, wanted)
        assert not nonfinite.any()
        assert all(torch.equal(weights[name], before[name]) for name in weights)
    return alone[: len(alone) // 2]


@pytest.mark.parametrize("config", [FP8BlockConfig(), FP8BlockConfig(scale_fmt="ue8m0", zero_scale="floor")])
def test_a_bucket_of_all_kinds(config: FP8BlockConfig) -> None:
    wide = normal(256, 512, seed=3)
    weights = {
        "even": normal(256, 384),
        "slice of columns": wide[:, 128:384],
        "odd start": normal(128 * 129 + 1)[1:].view(128, 129),
        "ragged": normal(130, 200, seed=1),
        "fp16": normal(256, 128, dtype=torch.float16),
        "fp32": normal(128, 260, dtype=torch.float32),
        "fp32 even": normal(128, 256, dtype=torch.float32),
        "zero": torch.zeros(128, 128, dtype=torch.bfloat16, device=DEVICE),
        "transposed": normal(200, 128).t(),
        "norm": normal(77),
        "embedding": normal(300, 64),
        "odd copy": normal(65)[1:],
        "router": normal(8, 16, dtype=torch.float32),
    }
    plain: dict[str, DTypeName] = {"norm": "bfloat16", "embedding": "bfloat16", "odd copy": "bfloat16"}
    alone = both(weights, {**plain, "router": "float32"}, config)
    assert alone == ["transposed", "router"]


def test_experts_of_one_parameter() -> None:
    fused = normal(6, 384, 128)
    assert both({f"experts.{i}": fused[i] for i in range(6)}, {}, FP8BlockConfig()) == []


def test_weights_that_moved_are_found_again() -> None:
    first = {"a": normal(128, 128), "b": normal(140, 128, seed=1)}
    (bucket,) = layout_of(first, {}).buckets
    config = FP8BlockConfig()
    ours = reference(bucket, first, config, [])
    for seed in (2, 3):
        weights = {"a": normal(128, 128, seed=seed), "b": normal(140, 128, seed=seed + 10)}
        packed, wanted = (torch.zeros(bucket.num_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        ours.pack(weights, packed, torch.zeros(2, dtype=torch.int32, device=DEVICE))
        for entry in bucket.entries:
            pack(entry, weights[entry.tensor.name], wanted, config)
        assert torch.equal(packed, wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nonfinite_weights_are_named() -> None:
    weights = {name: normal(256, 256) for name in ("a", "b", "c")} | {"d": normal(300), "e": normal(9000)}
    weights["b"][200, 3] = math.inf
    weights["e"][8999] = math.nan
    (bucket,) = layout_of(weights, {"d": "bfloat16", "e": "bfloat16"}).buckets
    nonfinite = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    packed = torch.zeros(bucket.num_bytes, dtype=torch.uint8, device=DEVICE)
    reference(bucket, weights, FP8BlockConfig(), []).pack(weights, packed, nonfinite)
    assert nonfinite.tolist() == [0, 1, 0, 0, 1]


def test_another_shape_than_planned_is_refused() -> None:
    weights = {"a": normal(128, 128)}
    (bucket,) = layout_of(weights, {}).buckets
    ours = reference(bucket, weights, FP8BlockConfig(), [])
    with pytest.raises(ConfigError, match="a is \\[128, 256\\]"):
        ours.pack(
            {"a": normal(128, 256)},
            torch.zeros(bucket.num_bytes, dtype=torch.uint8, device=DEVICE),
            torch.zeros(1, dtype=torch.int32, device=DEVICE),
        )


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sender.triton_grouped import _copy_many_kernel, _quantize_many_kernel

def ptx(kernel, constants):
    types = {name: "i32" for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    types |= {"where_ptr": "*i64", "tasks_ptr": "*i64", "task_of_program_ptr": "*i32"}
    types |= {"out_ptr": "*u8", "nonfinite_ptr": "*i32"}
    aligned = {(argument,): [["tt.divisibility", 16]] for argument in range(5)}
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]

options = {"KIND": "bf16", "UE8M0": True, "ZERO_IS_ONE": True, "HARDWARE_CAST": True, "BLOCK_SIZE": 128}
text = ptx(_quantize_many_kernel, options | {"EVEN": True})
assert text.count("div.rn.f32") == 2, "both divisions are IEEE"
assert not re.search(r"ftz|fma[.]|div[.](full|approx)|rcp[.]", text), "nothing flushed, fused or approximate"
assert "ld.global.v4" in text and "ld.global.b16" not in text, "read 16 bytes at a time"
assert "st.global.v4" in text and "st.global.b8" not in text, "written 16 bytes at a time"
for kind in ("bf16", "fp32"):
    copied = {"INFINITY": 0x7F80, "NUM_ELEMENTS": 8192, "KIND": kind}
    text = ptx(_copy_many_kernel, copied | {"EVEN": True})
    assert "ld.global.v4" in text and "st.global.v4" in text
    ptx(_copy_many_kernel, copied | {"EVEN": False})
"""


def test_compiles_into_exact_and_wide_instructions(tmp_path: Path) -> None:
    """Needs no GPU: what the interpreter cannot see."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
