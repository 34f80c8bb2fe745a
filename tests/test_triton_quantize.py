"""The Triton kernel bit for bit against the torch reference: on the GPU if there is one, else under the interpreter.

Under the interpreter TRITON_INTERPRET must be set before Triton itself is imported (its own `tl.max` and the like are
decorated at import). conftest.py does it for the whole process; the lines below do it for this file run alone.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

triton = pytest.importorskip("triton")

from sender import quantize as dispatch  # noqa: E402
from sender import triton_quantize  # noqa: E402
from shared.errors import ConfigError, NonFiniteWeightError  # noqa: E402
from shared.numerics import (  # noqa: E402
    BLOCK,
    ScaleFormat,
    ZeroScale,
    allocate_outputs,
    quantize_reference_into,
    scale_shape,
)

if not HAS_GPU and isinstance(triton.language.max, triton.JITFunction):
    raise RuntimeError("Triton was imported before TRITON_INTERPRET=1 was set: set it at the top of conftest.py")

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def needs_gpu(test: Callable[[], None]) -> Callable[[], None]:
    """The project's mark, and a skip of its own for runs without the project's conftest."""
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")(test))


def normal(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype).to(DEVICE)


def assert_same_bits(weight: Tensor, scale_fmt: ScaleFormat = "fp32", zero_scale: ZeroScale = "one") -> None:
    """The kernel, torch on the weight's device and torch on the CPU agree in every bit; the weight is untouched."""
    before = weight.clone()
    codes, scale, nonfinite = allocate_outputs(weight)
    triton_quantize.quantize_triton_into(weight, codes, scale, nonfinite, scale_fmt=scale_fmt, zero_scale=zero_scale)
    for device in {weight.device.type, "cpu"}:
        source = before.to(device)
        expected = allocate_outputs(source)
        quantize_reference_into(source, *expected, scale_fmt=scale_fmt, zero_scale=zero_scale)
        assert torch.equal(codes.to(device).view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(scale.to(device).view(torch.int32), expected[1].view(torch.int32))
        assert nonfinite.item() == expected[2].item() == 0
    assert torch.equal(weight, before)


def test_example_of_the_kernel_docstring() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.0, 448.0]], dtype=torch.bfloat16, device=DEVICE)
    codes, scale, nonfinite = allocate_outputs(weight)
    triton_quantize.quantize_triton_into(weight, codes, scale, nonfinite)
    assert codes.view(torch.uint8).tolist() == [[0x38, 0xB0, 0x00, 0x7E]]
    assert scale.tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (1000, 1), (127, 129), (128, 128), (300, 200)])
def test_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_same_bits(normal(*shape, dtype))


def test_a_real_layer() -> None:
    assert_same_bits(normal(4096, 4096))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_fmt", ["fp32", "ue8m0"])
@pytest.mark.parametrize("zero_scale", ["one", "floor"])
def test_options_and_zero_blocks(dtype: torch.dtype, scale_fmt: ScaleFormat, zero_scale: ZeroScale) -> None:
    weight = normal(130, 384, dtype)
    weight[:, 128:256] = 0.0
    weight[:64, 128:256] = -0.0
    assert_same_bits(weight, scale_fmt, zero_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_fmt", ["fp32", "ue8m0"])
def test_one_huge_value(dtype: torch.dtype, scale_fmt: ScaleFormat) -> None:
    weight = normal(128, 256, dtype)
    weight[5, 7] = -torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).max
    assert_same_bits(weight, scale_fmt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals(dtype: torch.dtype) -> None:
    """Subnormal weights alone, and beside normal ones."""
    bits = torch.arange(1, 128 * 130 + 1, device=DEVICE).view(128, 130)
    if dtype == torch.float32:
        weight = (bits * 503).to(torch.int32).view(dtype)
    else:
        mantissa = bits % (127 if dtype == torch.bfloat16 else 1023) + 1
        weight = (mantissa | (bits % 2) << 15).to(torch.int16).view(dtype)
    assert_same_bits(weight)
    assert_same_bits(weight, "ue8m0", "floor")
    mixed = weight.clone()
    mixed[::3] = normal(43, 130, dtype)
    assert_same_bits(mixed)


def finite_16_bit_values(dtype: torch.dtype) -> Tensor:
    """[128, 128 * k]: every value of |x| <= 448, both signs, and 448 in each block, so that S = 1.

    They hold every midpoint between two codes and its neighbours on both sides.
    """
    largest = torch.tensor(448.0, dtype=dtype).view(torch.int16).item()
    bits = torch.arange(int(largest) + 1, dtype=torch.int32)
    values = torch.cat([bits, bits | 0x8000]).to(torch.int16).view(dtype)
    blocks = []
    for chunk in values.split(BLOCK * BLOCK - 1):
        block = torch.full((BLOCK * BLOCK,), 448.0, dtype=dtype)
        block[1 : 1 + len(chunk)] = chunk
        blocks.append(block.view(BLOCK, BLOCK))
    return torch.cat(blocks, dim=1).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tie_and_every_value_of_the_code_range(dtype: torch.dtype) -> None:
    values = finite_16_bit_values(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(dtype)
    assert_same_bits(values)


def test_integer_encoding_wherever_this_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs that have the hardware cast, the path of those that have not."""
    monkeypatch.setattr(triton_quantize, "has_hardware_cast", lambda device: False)
    assert_same_bits(finite_16_bit_values(torch.bfloat16))
    assert_same_bits(normal(300, 200))


def test_fp32_rounds_to_bf16_as_torch_does() -> None:
    """Ties of the first rounding for both parities, and one bit beside them; the largest that stays finite.

    One value a block: its scale is a one-to-one image of the rounded value, which the codes are too coarse to show.
    """
    high = [0x3F80, 0x3F81, 0x3FFF, 0x3DCC, 0x3DCD, 0x2FFF, 0x4B7E, 0x4B7F]
    bits = [(h << 16) + low for h in high for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)] + [0x7F7F7FFF, 0x7F7E8000]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    weight = torch.zeros(2, len(bits) * BLOCK)
    weight[1, ::BLOCK] = -values
    assert_same_bits(weight.to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input_and_output(dtype: torch.dtype) -> None:
    base = normal(300, 420, dtype)
    for weight in (base.t(), base[::2, 1::3], base[7:200, 11:], base[:1].expand(130, -1)):
        expected = allocate_outputs(weight)
        quantize_reference_into(weight, *expected)
        codes = torch.empty(weight.shape[1], weight.shape[0], dtype=torch.float8_e4m3fn, device=DEVICE).t()
        scale = torch.empty(*scale_shape(*weight.shape), 3, device=DEVICE)[..., 1]
        triton_quantize.quantize_triton_into(weight, codes, scale, expected[2])
        assert torch.equal(codes.view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(scale, expected[1])


def test_writes_nothing_outside_its_outputs() -> None:
    weight = normal(130, 140)
    codes = torch.full((132, 150), 0x55, dtype=torch.uint8, device=DEVICE)
    scale = torch.full((4, 4), -7.0, device=DEVICE)
    triton_quantize.quantize_triton_into(
        weight,
        codes[1:131, 3:143].view(torch.float8_e4m3fn),
        scale[1:3, 1:3],
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
    )
    codes[1:131, 3:143] = 0x55
    scale[1:3, 1:3] = -7.0
    assert (codes == 0x55).all() and (scale == -7.0).all()


@needs_gpu  # 4 GiB, which the interpreter would copy
def test_offsets_past_two_to_the_31() -> None:
    storage = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE)
    weight = storage.as_strided((3, 256), (2**30, 1))
    weight.copy_(normal(3, 256))
    expected, codes_and_scale = allocate_outputs(weight), allocate_outputs(weight)
    quantize_reference_into(weight.contiguous(), *expected)
    triton_quantize.quantize_triton_into(weight, *codes_and_scale)
    assert torch.equal(codes_and_scale[0].view(torch.uint8), expected[0].view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 300), (300, 0)])
def test_empty_weights(shape: tuple[int, int]) -> None:
    assert_same_bits(torch.empty(shape, dtype=torch.bfloat16, device=DEVICE))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy speaks up about 0 * inf
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.parametrize("position", [(0, 0), (129, 199)], ids=["first", "ragged edge"])
def test_nonfinite_is_found_and_the_flag_never_reset(
    dtype: torch.dtype, value: float, position: tuple[int, int]
) -> None:
    good = normal(130, 200, dtype)
    bad = good * 1000.0
    bad[position] = value
    codes, scale, nonfinite = allocate_outputs(good)
    for weight, expected in ((good, 0), (bad, 1), (good, 1)):
        triton_quantize.quantize_triton_into(weight, codes, scale, nonfinite)
        assert nonfinite.item() == expected


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1, 0x7F7F8000])
def test_every_fp32_nan_and_overflow_to_bf16_is_found(bits: int) -> None:
    weight = torch.tensor([[bits, 0]], dtype=torch.int32, device=DEVICE).view(torch.float32)
    codes, scale, nonfinite = allocate_outputs(weight)
    triton_quantize.quantize_triton_into(weight, codes, scale, nonfinite)
    assert nonfinite.item() == 1


def test_wrapper_makes_the_shared_checks() -> None:
    weight = normal(4, 6)
    codes, scale, nonfinite = allocate_outputs(weight)
    with pytest.raises(ConfigError, match="weight's shape"):
        triton_quantize.quantize_triton_into(weight, codes.t(), scale, nonfinite)
    with pytest.raises(ConfigError, match="scale_fmt must be one of"):
        triton_quantize.quantize_triton_into(weight, codes, scale, nonfinite, scale_fmt="e8m0")  # type: ignore[arg-type]


def test_wrapper_refuses_host_tensors_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_quantize, "INTERPRETED", False)
    weight = normal(4, 6).cpu()
    with pytest.raises(ConfigError, match="needs CUDA tensors"):
        triton_quantize.quantize_triton_into(weight, *allocate_outputs(weight))


def test_dispatcher_takes_triton_for_gpus_only() -> None:
    assert dispatch.backend_name("cuda:0") == "triton"
    assert dispatch.backend_name("cpu") == "torch"


@needs_gpu
def test_dispatcher_on_a_gpu() -> None:
    weight = normal(300, 200)
    codes, scale = dispatch.quantize(weight)
    expected = allocate_outputs(weight)
    quantize_reference_into(weight, *expected)
    assert torch.equal(codes.view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(scale, expected[1])
    weight[7, 7] = math.nan
    with pytest.raises(NonFiniteWeightError, match="lm_head"):
        dispatch.quantize(weight, name="lm_head.weight")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what `import triton` meets where it is not installed: an ImportError
import torch
from sender import quantize
assert quantize.backend_name("cuda") == quantize.backend_name("cpu") == "torch"
device = "cuda" if torch.cuda.is_available() else "cpu"
codes, scale = quantize.quantize(torch.tensor([[1.0, -448.0]], device=device))
assert codes.float().tolist() == [[1.0, -448.0]] and scale.tolist() == [[1.0]]
assert "sender.triton_quantize" not in sys.modules
"""


def test_dispatcher_falls_back_to_torch_without_triton() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sender.triton_quantize import _quantize_block_kernel as kernel

def ptx(capability, weight_type, constants):
    types = {name: "i32" for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    types |= {"weight_ptr": weight_type, "codes_ptr": "*u8", "scale_ptr": "*fp32", "nonfinite_ptr": "*i32"}
    source = ASTSource(kernel, types, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]

options = {"UE8M0": True, "ZERO_IS_ONE": True, "BLOCK_SIZE": 128}
for capability, kind, weight_type in ((90, "bf16", "*i16"), (90, "fp16", "*i16"), (80, "fp32", "*i32")):
    text = ptx(capability, weight_type, options | {"KIND": kind, "HARDWARE_CAST": capability == 90})
    assert text.count("div.rn.f32") == 2, "both divisions are IEEE"
    assert not re.search(r"ftz|fma[.]|div[.](full|approx)|rcp[.]", text), "nothing flushed, fused or approximate"
    assert ("cvt.rn.satfinite.e4m3x2.f32" in text) == (capability == 90)
"""


def test_compiles_for_gpus_into_exact_instructions(tmp_path: Path) -> None:
    """Needs no GPU, and holds what the interpreter lets pass: it runs the kernel as Python."""
    root = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
