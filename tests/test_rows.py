"""Rows quantized before the gather, all ranks of it in one process: every byte as if whole tensors were quantized."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sender.hf_names import Cut, Cuts
from sender.packer import Packer
from sender.rows import ReceivedRows, RowsBackend, TorchRows, _flags
from sender.rows_plan import RowsPlan, plan_rows
from sender.sharding import ShardedRows, Sharding
from shared.buckets import Bucket, Layout, make_layout
from shared.config import FP8BlockConfig
from shared.errors import ConfigError, NonFiniteWeightError
from shared.numerics import amax_bits, quantize_reference, quantize_rows_into, scale_shape
from shared.protocol import DTypeName, ManifestTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMATS = [FP8BlockConfig(), FP8BlockConfig(scale_fmt="ue8m0"), FP8BlockConfig(zero_scale="floor")]
MakeBackend = Callable[[RowsPlan, FP8BlockConfig], RowsBackend]


def triton_rows(plan: RowsPlan, config: FP8BlockConfig) -> RowsBackend:
    pytest.importorskip("triton")
    from sender.grouped_rows import GroupedRows

    return GroupedRows(plan, config)


BACKENDS = pytest.mark.parametrize("make_backend", [TorchRows, triton_rows])


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (found * torch.logspace(-3, 3, shape[-1])).to(dtype).to(DEVICE)


# ---- a model and its ranks


def experts(name: str, shape: tuple[int, ...]) -> tuple[Cut, ...]:
    """[E, 2I, H] as E times two matrices, [E, H, I] named `down` as E matrices."""
    if "down" in name:
        return tuple(Cut(f"{name}.{e}", shape[1:], (shape[2], 1), e * shape[1] * shape[2]) for e in range(shape[0]))
    rows = shape[1] // 2
    strides, half = (shape[2], 1), rows * shape[2]
    halves = [(e, part) for e in range(shape[0]) for part in range(2)]
    return tuple(Cut(f"{name}.{e}.{part}", (rows, shape[2]), strides, (2 * e + part) * half) for e, part in halves)


def _wire(tensor: Tensor) -> DTypeName:
    return "float16" if tensor.dtype == FP16 else "bfloat16"


@dataclass(frozen=True)
class Model:
    """Parameters that are sharded along their first dimension, but for the `whole` ones; the names of tensors that are
    not quantized."""

    parameters: dict[str, Tensor]
    plain: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    bucket_bytes: int = 64 << 10

    @property
    def cuts(self) -> Cuts:
        return {
            name: experts(name, tuple(tensor.shape))
            if tensor.dim() == 3 and name not in self.plain
            else (Cut(name, tuple(tensor.shape), tuple(tensor.stride())),)
            for name, tensor in self.parameters.items()
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {cut.name: cut.of(self.parameters[owner]) for owner, cuts in self.cuts.items() for cut in cuts}

    @property
    def layout(self) -> Layout:
        return make_layout(
            [
                ManifestTensor(name=n, shape=tuple(t.shape), dtype=_wire(t), quantized=False)
                if n in self.plain
                else ManifestTensor(name=n, shape=tuple(t.shape), dtype="float8_e4m3fn", quantized=True)
                for n, t in self.tensors.items()
            ],
            self.bucket_bytes,
        )

    def sharding(self, rank: int, num_ranks: int) -> Sharding:
        parameters, locals_ = [], []
        for name, tensor in self.parameters.items():
            if name not in self.whole:
                inner, cols = prod(tensor.shape[1:-1]), tensor.shape[-1] if tensor.dim() > 1 else 1
                per_rank = -(-tensor.shape[0] // num_ranks)
                parameters.append(ShardedRows(name, str(tensor.dtype), tensor.shape[0] * inner, cols, per_rank * inner))
                locals_.append(tensor[rank * per_rank : (rank + 1) * per_rank].reshape(-1, cols).clone())
        return Sharding(tuple(parameters), tuple(locals_))


def push_rows(model: Model, num_ranks: int, config: FP8BlockConfig, make_backend: MakeBackend) -> list[Tensor]:
    """Every bucket, each rank having quantized its rows. Raises: NonFiniteWeightError."""
    layout, device = model.layout, torch.device(DEVICE)
    held = [model.sharding(rank, num_ranks) for rank in range(num_ranks)]
    plans = [plan_rows(layout, held[rank], model.cuts, rank, num_ranks) for rank in range(num_ranks)]
    assert all(
        (p.names, p.num_amax, p.num_bytes) == (plans[0].names, plans[0].num_amax, plans[0].num_bytes) for p in plans
    )
    assert plans[0].names == model.tensors.keys() - set(model.whole)
    backends = [make_backend(plan, config) for plan in plans]
    amaxes = []
    for backend, mine in zip(backends, held, strict=True):
        amaxes.append(torch.zeros(plans[0].num_amax, dtype=torch.int32, device=DEVICE))
        backend.begin(mine.locals, amaxes[-1])
    amax = torch.stack(amaxes).amax(0)
    packer, found = Packer(layout, config, device, plans[0].names), []
    packer._memory.fill_(0xA5)
    packer.begin()
    for bucket in layout.buckets:
        check_runs(bucket, plans[0])
        chunks, received = [], None
        for rank, (plan, backend, mine) in enumerate(zip(plans, backends, held, strict=True)):
            rows = plan.buckets[bucket.index]
            if rows is None:
                continue
            chunks.append(torch.full((rows.num_bytes,), 0xA5, dtype=torch.uint8, device=DEVICE))
            if rows.parts:
                rows.flags_of(chunks[-1]).zero_()
                backend.quantize(bucket.index, mine.locals, amax, chunks[-1])
            first = plans[0].buckets[bucket.index]
            assert first is not None and first.chunk_bytes[rank] == rows.num_bytes
        if chunks:
            first = plans[0].buckets[bucket.index]
            assert first is not None
            received = ReceivedRows(bucket.index, torch.cat(chunks), _flags(first, device), backends[0])
        late = {name: tensor for name, tensor in model.tensors.items() if name not in plans[0].names}
        found.append(packer.pack(bucket, late, received).clone())
    packer.check_finite()
    return found


def check_runs(bucket: Bucket, plan: RowsPlan) -> None:
    """Every byte of a tensor comes from one place."""
    rows, times = plan.buckets[bucket.index], torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    for run in rows.runs if rows is not None else ():
        assert run.from_byte % 128 == run.to_byte % 128, "it cannot be moved in large words"
        times[run.to_byte : run.to_byte + run.num_bytes] += 1
    for entry in bucket.entries:
        for slot in (entry.values, entry.scale):
            if slot is not None:
                found = times[slot.offset_bytes : slot.offset_bytes + slot.num_bytes]
                assert bool((found == (entry.tensor.name in plan.names)).all()), slot.name
    assert times.max() <= 1


def push_whole(model: Model, config: FP8BlockConfig) -> list[Tensor]:
    layout = model.layout
    packer = Packer(layout, config, torch.device(DEVICE))
    found = [packer.pack(bucket, model.tensors).clone() for bucket in layout.buckets]
    packer.check_finite()
    return found


def assert_same(model: Model, num_ranks: int, config: FP8BlockConfig, make_backend: MakeBackend) -> None:
    before = {name: tensor.clone() for name, tensor in model.parameters.items()}
    ours, wanted = push_rows(model, num_ranks, config, make_backend), push_whole(model, config)
    assert len(ours) == len(wanted) and all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.parameters.items())


# ---- the same bytes


@BACKENDS
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_what_is_not_quantized_is_copied_by_the_rank_that_holds_it(
    dtype: torch.dtype, num_ranks: int, make_backend: MakeBackend
) -> None:
    shapes = ((77,), (1,), (300, 64), (5, 3), (9000, 3), (16, 1, 4), (6,))
    parameters = {f"plain{number}": normal(*shape, dtype=dtype) for number, shape in enumerate(shapes)}
    model = Model({**parameters, "q": normal(250, 128, dtype=dtype), "w": normal(9, 5)}, tuple(parameters), ("w",))
    assert_same(model, num_ranks, FP8BlockConfig(), make_backend)


@BACKENDS
def test_inf_in_what_is_copied_is_found(make_backend: MakeBackend) -> None:
    norm = normal(130)
    norm[100] = torch.inf
    with pytest.raises(NonFiniteWeightError) as found:
        push_rows(Model({"q": normal(128, 128), "norm": norm}, ("norm",)), 2, FP8BlockConfig(), make_backend)
    assert found.value.names == ("norm",)


SHAPES = {
    "whole blocks": (2, (512, 256)),
    "one block over 8 ranks": (8, (128, 128)),
    "two blocks over 8 ranks": (8, (200, 130)),
    "ragged, 3 ranks": (3, (257, 129)),
    "a block over 2 ranks": (2, (384, 128)),
    "one row a rank": (8, (8, 256)),
    "last ranks empty": (8, (10, 384)),
    "one row in all": (4, (1, 200)),
    "odd columns": (5, (333, 77)),
    "crossing and whole blocks": (3, (1000, 128)),
    "last block crosses": (2, (250, 128)),
}


@BACKENDS
@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case: str, make_backend: MakeBackend) -> None:
    num_ranks, shape = SHAPES[case]
    assert_same(Model({"a": normal(*shape), "b": normal(*shape, seed=1)}), num_ranks, FP8BlockConfig(), make_backend)


def mixed(dtype: torch.dtype) -> Model:
    parameters = {
        "embed": normal(50, 64),
        "q": normal(200, 192, dtype=dtype, seed=1),
        "norm": normal(192, seed=2),
        "narrow": normal(1, 20, seed=6),
        "bias": normal(4, seed=7),
        "narrower": normal(1, 10, seed=8),
        "zero": torch.zeros(300, 130, dtype=dtype, device=DEVICE),
        "experts.gate_up": normal(8, 2 * 96, 128, dtype=dtype, seed=3),
        "experts.down": normal(8, 128, 96, dtype=dtype, seed=4),
        "o": normal(130, 256, dtype=dtype, seed=5),
    }
    parameters["q"][:, 64:] = 0
    parameters["zero"][131, 5] = 1.0
    parameters["zero"][0, 0] = -0.0
    return Model(parameters, ("embed", "norm", "bias"))


@BACKENDS
@pytest.mark.parametrize("config", FORMATS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_types_formats_and_experts(dtype: torch.dtype, config: FP8BlockConfig, make_backend: MakeBackend) -> None:
    assert_same(mixed(dtype), 3, config, make_backend)


@pytest.mark.parametrize("num_ranks", [2, 4, 5, 8, 16])
def test_experts_on_any_number_of_ranks(num_ranks: int) -> None:
    assert_same(mixed(BF16), num_ranks, FP8BlockConfig(), TorchRows)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 300), st.booleans()), min_size=1, max_size=5),
    st.integers(2, 9),
    st.sampled_from([4 << 10, 40 << 10, 1 << 20]),
)
def test_any_shapes(shapes: list[tuple[int, int, bool]], num_ranks: int, bucket_bytes: int) -> None:
    parameters = {f"w{i}": normal(rows, cols, seed=i) for i, (rows, cols, _) in enumerate(shapes)}
    plain = tuple(f"w{i}" for i, (_, _, is_plain) in enumerate(shapes) if is_plain and i)
    assert_same(Model(parameters, plain, bucket_bytes=bucket_bytes), num_ranks, FP8BlockConfig(), TorchRows)


# ---- inf and NaN


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("value", "row", "make_backend"),
    [
        (float("nan"), 0, TorchRows),
        (float("-inf"), 70, TorchRows),
        (float("nan"), 199, TorchRows),
        (3.4e38, 70, TorchRows),
        (float("nan"), 70, triton_rows),
        (3.4e38, 199, triton_rows),
    ],
)
def test_nonfinite_weights_are_named(value: float, row: int, make_backend: MakeBackend) -> None:
    """3.4e38 rounds to a BF16 infinity."""
    model = mixed(FP32)
    model.parameters["q"][row, 100] = value
    model.parameters["experts.down"][7, 127, 95] = value
    with pytest.raises(NonFiniteWeightError) as caught:
        push_rows(model, 3, FP8BlockConfig(), make_backend)
    assert set(caught.value.names) == {"q", "experts.down.7"}


# ---- the plan


def test_an_experts_tensors_are_one_run_and_cross_no_ranks() -> None:
    model = Model({"gate_up": normal(8, 256, 128), "down": normal(8, 128, 128)}, bucket_bytes=4 << 20)
    plan = plan_rows(model.layout, model.sharding(0, 4), model.cuts, 0, 4)
    (bucket,) = plan.buckets
    assert bucket is not None and plan.num_amax == 0
    assert len(bucket.runs) == 2 * 4, "of each parameter one for each rank"
    others = [plan_rows(model.layout, model.sharding(r, 4), model.cuts, r, 4).buckets[0] for r in range(4)]
    assert all(other is not None and len(other.parts) == 6 and other.runs == () for other in others[1:])


def test_tensors_that_are_no_rows_are_left_to_rank_0() -> None:
    tensor = normal(256, 128)
    cuts: Cuts = {
        "p": (
            Cut("columns", (256, 64), (128, 1)),
            Cut("transposed", (128, 256), (1, 128)),
            Cut("three", (2, 128, 128), (16384, 128, 1)),
            Cut("within a row", (2, 128), (128, 1), 64),
            Cut("rows", (100, 128), (128, 1), 28 * 128),
        )
    }
    names = {name: shape for cut in cuts["p"] for name, shape in [(cut.name, cut.shape)] if len(shape) == 2}
    manifest = [ManifestTensor(name=n, shape=s, dtype="float8_e4m3fn", quantized=True) for n, s in names.items()]
    sharding = Model({"p": tensor}).sharding(0, 2)
    assert plan_rows(make_layout(manifest), sharding, cuts, 0, 2).names == {"rows"}


def test_a_plan_holds_for_the_same_shards_only() -> None:
    model, other = mixed(BF16), mixed(FP32)
    plan = plan_rows(model.layout, model.sharding(0, 3), model.cuts, 0, 3)
    assert plan.still_holds(model.sharding(1, 3), mixed(BF16).cuts)
    assert not plan.still_holds(model.sharding(0, 4), model.cuts)
    assert not plan.still_holds(other.sharding(0, 3), model.cuts)
    assert not plan.still_holds(Sharding(), model.cuts)
    assert not plan.still_holds(model.sharding(0, 3), {**model.cuts, "q": (Cut("q", (192, 200), (1, 192)),)})


def test_a_bucket_without_the_rows_of_the_ranks_is_refused() -> None:
    model = Model({"a": normal(128, 128)})
    packer = Packer(model.layout, FP8BlockConfig(), torch.device(DEVICE), frozenset({"a"}))
    with pytest.raises(ConfigError, match="have not come"):
        packer.pack(model.layout.buckets[0], {})


# ---- what the interpreter cannot see

COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sender.triton_rows import _amax_rows_kernel, _move_kernel, _quantize_rows_kernel

def ptx(kernel, constants):
    types = {name: "i32" for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    types |= {"where_ptr": "*i64", "tasks_ptr": "*i64", "task_of_program_ptr": "*i32", "amax_ptr": "*i32"}
    types |= {"out_ptr": "*u8", "nonfinite_ptr": "*i32", "moves_ptr": "*i64", "move_of_program_ptr": "*i32"}
    types |= {"from_ptr": "*i64", "to_ptr": "*i64"}
    types = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, types, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]

options = {"UE8M0": True, "ZERO_IS_ONE": True, "HARDWARE_CAST": True}
ptx(_amax_rows_kernel, {"KIND": "fp32", "BLOCK_SIZE": 128})
text = ptx(_quantize_rows_kernel, {"KIND": "bf16", "BLOCK_SIZE": 128, **options})
assert text.count("div.rn.f32") == 2, "both divisions are IEEE"
assert not re.search(r"ftz|fma[.]|div[.](full|approx)|rcp[.]", text), "nothing flushed, fused or approximate"
ptx(_move_kernel, {"NUM_WORDS": 4096})
"""


def test_kernels_compile_into_exact_instructions(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


# ---- the numbers


def test_amax_bits_orders_as_magnitudes_do() -> None:
    rows = torch.zeros(3, 260, dtype=BF16)
    rows[1, 3], rows[2, 128], rows[0, 259] = -2.0, float("inf"), float("nan")
    rows[2, 5] = 1.5
    found = amax_bits(rows)
    assert found.dtype == torch.int32 and found.tolist()[:2] == [0x4000, 0x7F80] and found[2] > 0x7F80


@pytest.mark.parametrize("cut", [1, 64, 127])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_two_parts_of_a_block(cut: int, dtype: torch.dtype) -> None:
    weight = normal(128, 200, dtype=dtype).cpu()
    codes, scale = quantize_reference(weight)
    amax = torch.maximum(amax_bits(weight[:cut]), amax_bits(weight[cut:]))
    flag, ours = torch.zeros(1, dtype=torch.int32), torch.empty(128, 200, dtype=torch.float8_e4m3fn)
    ours_scale = torch.empty(1, 2)
    quantize_rows_into(weight[:cut], amax, ours[:cut], ours_scale, flag)
    quantize_rows_into(weight[cut:], amax, ours[cut:], None, flag)
    assert torch.equal(ours.view(torch.uint8), codes.view(torch.uint8)) and torch.equal(ours_scale, scale)
    assert flag.item() == 0


def arguments() -> dict[str, Any]:
    return {
        "rows": normal(5, 130).cpu(),
        "amax": torch.zeros(2, dtype=torch.int32),
        "codes": torch.empty(5, 130, dtype=torch.float8_e4m3fn),
        "scale": torch.empty(scale_shape(5, 130)),
        "nonfinite": torch.zeros(1, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": torch.zeros(129, 130, dtype=BF16)},
        {"rows": torch.zeros(0, 130, dtype=BF16)},
        {"rows": torch.zeros(5, 130, dtype=torch.float64)},
        {"amax": torch.zeros(3, dtype=torch.int32)},
        {"amax": torch.zeros(2, dtype=torch.int16)},
        {"amax": torch.zeros(2, dtype=torch.int32, device="meta")},
        {"codes": torch.empty(5, 130, dtype=torch.uint8)},
        {"scale": torch.empty(1, 3)},
        {"scale": None, "codes": torch.empty(4, 130, dtype=torch.float8_e4m3fn)},
        {"nonfinite": torch.zeros(2, dtype=torch.int32)},
    ],
)
def test_arguments_are_checked(wrong: dict[str, Any]) -> None:
    quantize_rows_into(**arguments())
    with pytest.raises(ConfigError):
        quantize_rows_into(**{**arguments(), **wrong})
