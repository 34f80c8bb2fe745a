"""How fast weights become FP8 on a GPU, against the bandwidth of a copy in the same memory.

    python -m benchmarks.quantize

All linear weights of Qwen3-8B, and the layers of Qwen3-30B-A3B whose weights fit beside them, BF16, random. Bytes are
those read and written (2 + 1 an element, 4 a block). Every byte of the output is compared with the torch reference
after timing. Prints a table; code 1 if a byte differs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sender.packer import Packer
from sender.quantize import quantize_into
from shared.buckets import Layout, make_layout
from shared.config import FP8BlockConfig
from shared.numerics import quantize_reference_into
from shared.protocol import ManifestTensor

REPEATS = 20
Shapes = list[tuple[str, int, int]]


def qwen3_8b(num_layers: int = 36) -> Shapes:
    return [
        (f"layers.{layer}.{name}", rows, cols)
        for layer in range(num_layers)
        for name, rows, cols in (
            ("q_proj", 4096, 4096),
            ("k_proj", 1024, 4096),
            ("v_proj", 1024, 4096),
            ("o_proj", 4096, 4096),
            ("gate_proj", 12288, 4096),
            ("up_proj", 12288, 4096),
            ("down_proj", 4096, 12288),
        )
    ]


def qwen3_30b_a3b(num_layers: int) -> Shapes:
    attention = (("q_proj", 4096, 2048), ("k_proj", 512, 2048), ("v_proj", 512, 2048), ("o_proj", 2048, 4096))
    expert = (("gate_proj", 768, 2048), ("up_proj", 768, 2048), ("down_proj", 2048, 768))
    return [
        (f"layers.{layer}.{name}", rows, cols)
        for layer in range(num_layers)
        for name, rows, cols in (
            *attention,
            *((f"experts.{number}.{name}", rows, cols) for number in range(128) for name, rows, cols in expert),
        )
    ]


def median_ms(step: Callable[[], object], repeats: int = REPEATS) -> float:
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def host_ms(step: Callable[[], object]) -> float:
    """What the calling thread spends, the device left aside."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    spent = time.perf_counter() - started
    torch.cuda.synchronize()
    return 1e3 * spent


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of one large copy."""
    source = torch.empty(8 << 30, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * median_ms(lambda: target.copy_(source)))


def make_weights(shapes: Shapes) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) * 0.02 for name, rows, cols in shapes}


def layout_of(weights: dict[str, Tensor], bucket_bytes: int) -> Layout:
    tensors = [
        ManifestTensor(name=name, shape=tuple(weight.shape), dtype="float8_e4m3fn", quantized=True)
        for name, weight in weights.items()
    ]
    return make_layout(tensors, bucket_bytes)


def differing(layout: Layout, weights: dict[str, Tensor], packer: Packer) -> list[str]:
    """The tensors whose codes or scales are not those of the torch reference."""
    wrong = []
    for bucket in layout.buckets:
        packed = packer.pack(bucket, {name: weights[name] for name in bucket.names})
        for entry in bucket.entries:
            weight = weights[entry.tensor.name]
            assert entry.scale is not None
            codes, scale = torch.empty_like(entry.values.view(packed)), torch.empty_like(entry.scale.view(packed))
            quantize_reference_into(weight, codes, scale, torch.zeros(1, dtype=torch.int32, device="cuda"))
            same = torch.equal(codes.view(torch.uint8), entry.values.view(packed).view(torch.uint8))
            if not same or not torch.equal(scale.view(torch.int32), entry.scale.view(packed).view(torch.int32)):
                wrong.append(entry.tensor.name)
    return wrong


def measure(title: str, shapes: Shapes, bandwidth: float, bucket_bytes: int) -> list[str]:
    weights = make_weights(shapes)
    layout = layout_of(weights, bucket_bytes)
    num_elements = sum(weight.numel() for weight in weights.values())
    num_bytes = 3 * num_elements + 4 * num_elements // (128 * 128)
    packer = Packer(layout, FP8BlockConfig(), torch.device("cuda"))
    buckets = [(bucket, {name: weights[name] for name in bucket.names}) for bucket in layout.buckets]
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    outputs = {
        name: (torch.empty_like(w, dtype=torch.float8_e4m3fn), torch.empty(w.shape[0] // 128, w.shape[1] // 128).cuda())
        for name, w in list(weights.items())[: 36 * 7]
    }

    def grouped() -> None:
        for bucket, members in buckets:
            packer.pack(bucket, members)

    def one_by_one() -> None:
        for name, (codes, scale) in outputs.items():
            quantize_into(weights[name], codes, scale, flag)

    few_bytes = sum(3 * weights[name].numel() for name in outputs)
    rows = (("grouped", grouped, num_bytes), ("one launch a tensor", one_by_one, few_bytes))
    for what, step, moved in rows:
        ms = median_ms(step)
        share = moved / (1e-3 * ms) / bandwidth
        launches = f"{len(buckets)} buckets" if what == "grouped" else f"{len(outputs)} tensors"
        print(f"| {title} | {what}, {launches} | {moved / 1e9:.2f} | {ms:.2f} | {share:.1%} | {host_ms(step):.2f} |")
    return differing(layout, weights, packer)


def main() -> int:
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, copy of 8 GiB: {bandwidth / 1e12:.3f} TB/s read and written\n")
    print("| weights | how | GB moved | ms | of the copy's bandwidth | host ms |")
    print("|---|---|---|---|---|---|")
    wrong = []
    for bucket_bytes in (256 << 20, 1 << 30):
        for title, shapes in (("Qwen3-8B, all linear", qwen3_8b()), ("Qwen3-30B-A3B, 12 layers", qwen3_30b_a3b(12))):
            wrong += measure(title, shapes, bandwidth, bucket_bytes)
            torch.cuda.empty_cache()
    print("\nevery byte is that of the torch reference" if not wrong else f"DIFFER: {wrong[:10]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
