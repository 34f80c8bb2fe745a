"""What a receiver does to the bytes of a push on one GPU, against the bandwidth of a copy in the same memory.

    python -m benchmarks.receive            digest, scatter, commit
    python -m benchmarks.receive --sweep    sizes of the kernels' programs, on rows of several lengths

The real `Staging` of plans as SGLang's loaders make them (fused q/k/v and gate/up, stacked experts, slices of tensor
parallelism), without SGLang. Bytes are those read and written; a digest only reads. What was scattered and committed is
then compared with what was sent, byte for byte, and digests with those of torch. Prints a table; code 1 if one differs.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.quantize import copy_bandwidth, host_ms, median_ms
from receiver_plugin import staging as staging_module
from receiver_plugin.binding import BindingPlan
from receiver_plugin.recorder import Copy
from receiver_plugin.staging import Staging
from receiver_plugin.windows import View
from shared import digest as digests
from shared.buckets import Layout, make_layout
from shared.grouped_copy import GroupedCopy
from shared.numerics import BLOCK, scale_shape
from shared.protocol import ManifestTensor

BUCKET_BYTES = 256 << 20
ROW = "| {} | {} | {} | {:.2f} | {:.2f} | {:.1%} | {:.2f} | {:.3f} |"


@dataclass
class Model:
    """What one rank of `tp_size` holds of a model (the middle one), and the plan that fills it."""

    title: str
    tp_size: int = 1
    tensors: list[ManifestTensor] = field(default_factory=list)
    parameters: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)

    def plain(self, name: str, rows: int, cols: int) -> None:
        """BF16; a vocabulary is cut by rows."""
        self.tensors.append(ManifestTensor(name=name, shape=(rows, cols), dtype="bfloat16", quantized=False))
        mine = rows // self.tp_size
        self.parameters[name] = (mine, cols), torch.bfloat16
        self._copy(name, cols, (self.tp_size // 2 * mine, 0), name, 0, (mine, cols))

    def linear(
        self, parameter: str, parts: dict[str, tuple[int, int]], by: str, stack: tuple[int, int] = (1, 0)
    ) -> None:
        """FP8 `parts` (rows, cols) of one parameter, each cut by "rows" or "cols", below one another.

        stack: (experts, number) for an expert of a stacked parameter.
        """
        cut = (self.tp_size, 1) if by == "rows" else (1, self.tp_size)
        shapes = {name: (rows // cut[0], cols // cut[1]) for name, (rows, cols) in parts.items()}
        height, (_, width) = sum(rows for rows, _ in shapes.values()), next(iter(shapes.values()))
        scale_rows, scale_cols = scale_shape(height, width)
        lead = (stack[0],) if stack[0] > 1 else ()
        self.parameters[parameter] = (*lead, height, width), torch.float8_e4m3fn
        self.parameters[f"{parameter}_scale_inv"] = (*lead, scale_rows, scale_cols), torch.float32
        first = stack[1] * height
        for name, shape in shapes.items():
            self.tensors.append(ManifestTensor(name=name, shape=parts[name], dtype="float8_e4m3fn", quantized=True))
            start = [self.tp_size // 2 * size if pieces > 1 else 0 for size, pieces in zip(shape, cut, strict=True)]
            for suffix, unit in (("", 1), ("_scale_inv", BLOCK)):
                size, at = tuple(n // unit for n in shape), (start[0] // unit, start[1] // unit)
                self._copy(name + suffix, parts[name][1] // unit, at, parameter + suffix, first // unit * size[1], size)
            first += shape[0]

    def _copy(
        self, source: str, source_cols: int, start: tuple[int, int], parameter: str, offset: int, size: tuple[int, ...]
    ) -> None:
        view = View(start[0] * source_cols + start[1], size, (source_cols, 1))
        self.copies.append(Copy(source, view, parameter, View(offset, size, (size[1], 1))))

    def build(self, device: str = "cuda") -> nn.Module:
        module = nn.Module()
        for name, (shape, dtype) in self.parameters.items():
            module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device), False))
        return module

    @property
    def plan(self) -> BindingPlan:
        return BindingPlan(tuple(self.copies), (), (), ())


def attention(model: Model, layer: int, hidden: int, heads: int, kv_heads: int) -> None:
    parts = {f"{layer}-{name}": (128 * n, hidden) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    model.linear(f"{layer}-qkv", parts, "rows")
    model.linear(f"{layer}-o", {f"{layer}-o": (hidden, 128 * heads)}, "cols")


def feed_forward(model: Model, layer: int, hidden: int, inner: int, stack: tuple[int, int] = (1, 0)) -> None:
    name = f"{layer}-{stack[1]}" if stack[0] > 1 else f"{layer}"
    model.linear(f"{layer}-gate_up", {f"{name}-gate": (inner, hidden), f"{name}-up": (inner, hidden)}, "rows", stack)
    model.linear(f"{layer}-down", {f"{name}-down": (hidden, inner)}, "cols", stack)


def qwen3_8b(tp_size: int = 1) -> Model:
    model = Model("Qwen3-8B" + (f", a rank of {tp_size}" if tp_size > 1 else ""), tp_size)
    model.plain("embed", 151936, 4096)
    for layer in range(36):
        attention(model, layer, 4096, 32, 8)
        feed_forward(model, layer, 4096, 12288)
    model.plain("head", 151936, 4096)
    return model


def qwen3_30b_a3b(tp_size: int = 1, num_layers: int = 24) -> Model:
    rank = f", a rank of {tp_size}" if tp_size > 1 else ""
    model = Model(f"Qwen3-30B-A3B, {num_layers} layers{rank}", tp_size)
    for layer in range(num_layers):
        attention(model, layer, 2048, 32, 4)
        for expert in range(128):
            feed_forward(model, layer, 2048, 768, (128, expert))
    return model


def fill(staging: Staging, layout: Layout, index: int) -> Tensor:
    """Bucket `index`, of random bytes that are the same every time."""
    bucket = staging.bucket(index)
    generator = torch.Generator("cuda").manual_seed(index)
    return bucket.random_(0, 256, generator=generator)


def differing(model: Model, module: nn.Module, staging: Staging, layout: Layout) -> list[str]:
    """What is not in the live parameters as it was sent, after a push of random bytes."""
    for parameter in module.parameters():
        parameter.data.view(torch.uint8).fill_(0)
    for index in range(len(layout.buckets)):
        fill(staging, layout, index)
        staging.scatter(index)
    staging.commit()
    live, wrong = dict(module.named_parameters()), []
    by_source: dict[str, list[Copy]] = {}
    for copy in model.copies:
        by_source.setdefault(copy.source, []).append(copy)
    for index, bucket in enumerate(layout.buckets):
        fill(staging, layout, index)
        for slot in bucket.slots:
            for copy in by_source[slot.name]:
                sent = copy.source_view.of(slot.view(staging.bucket(index))).contiguous()
                held = copy.parameter_view.of(live[copy.parameter].data).contiguous()
                if not torch.equal(sent.view(torch.uint8), held.view(torch.uint8)):
                    wrong.append(f"{copy.source} in {copy.parameter}")
    return wrong


def torch_copier(to: list[Tensor], of: list[Tensor]) -> Callable[[], None]:
    return lambda: torch._foreach_copy_(to, of)


def rows_of(model: Model, bandwidth: float) -> Iterator[str]:
    """Of the table; raises AssertionError where a byte differs."""
    layout = make_layout(model.tensors, BUCKET_BYTES)
    module, number = model.build(), len(layout.buckets)
    slots = {slot.name: slot.dtype.itemsize for bucket in layout.buckets for slot in bucket.slots}
    scattered = sum(2 * prod(copy.source_view.size) * slots[copy.source] for copy in model.copies)
    committed = sum(2 * parameter.nbytes for parameter in module.parameters())

    def row(what: str, of: str, moved: float, step: Callable[[], object], num_calls: int, repeats: int = 10) -> str:
        ms = median_ms(step, repeats)
        return ROW.format(
            model.title,
            what,
            of,
            moved / 1e9,
            ms,
            moved / (1e-3 * ms) / bandwidth,
            host_ms(step),
            host_ms(step) / num_calls,
        )

    for copier, how in ((staging_module.copier, "tables"), (torch_copier, "torch, as before")):
        began = time.process_time()
        with mock.patch.object(staging_module, "copier", copier):
            staging = Staging(module, model.plan, layout)
        planned_s = time.process_time() - began

        def scatter(staging: Staging = staging) -> None:
            for index in range(number):
                staging.scatter(index)

        yield row("scatter", f"{how}, {number} buckets, planned in {planned_s:.2f} s", scattered, scatter, number)
        yield row("commit", how, committed, staging.commit, 1)
        if how == "tables":
            wrong = differing(model, module, staging, layout)
            assert not wrong, f"DIFFER: {wrong[:10]}"
        del staging, scatter
        torch.cuda.empty_cache()


def digest_rows(bandwidth: float) -> Iterator[str]:
    data = torch.empty(16 * BUCKET_BYTES, dtype=torch.uint8, device="cuda").random_(0, 256)
    buckets, secret = data.split(BUCKET_BYTES), secrets.token_hex(32)
    torch.cuda.synchronize()
    began = time.perf_counter()
    digests.warm(secret, data.device)
    warm_ms = 1e3 * (time.perf_counter() - began)
    began = time.perf_counter()
    digests.warm(secrets.token_hex(32), data.device)
    again_ms = 1e3 * (time.perf_counter() - began)

    def all_of_them() -> list[Tensor]:
        return [digests.start_digest(b, secret=secret, version=1, bucket=i) for i, b in enumerate(buckets)]

    def in_torch() -> None:
        with mock.patch.object(digests, "_kernel", lambda device: None):
            digests.start_digest(buckets[0], secret=secret, version=1, bucket=0)

    odd = data[4 : BUCKET_BYTES - 12]  # an address, a start and an end that no chunk has
    for part, first in ((buckets[3], 0), (buckets[3], 12345), (odd, (1 << 20) - 3), (odd[: 1 << 20], 0)):
        wanted = digests.digest(part.cpu(), secret=secret, version=1, bucket=3, first_word=first)
        assert digests.digest(part, secret=secret, version=1, bucket=3, first_word=first) == wanted
    what = f"one launch each; warm {warm_ms:.0f} ms, with another secret {again_ms:.0f} ms"
    for how, step, num_buckets in ((what, all_of_them, len(buckets)), ("torch, as before", in_torch, 1)):
        ms, moved = median_ms(step, 10), num_buckets * BUCKET_BYTES
        spent = host_ms(step)
        share = moved / (1e-3 * ms) / bandwidth
        yield ROW.format(f"{num_buckets} bucket(s)", "digest", how, moved / 1e9, ms, share, spent, spent / num_buckets)


def sweep(bandwidth: float) -> None:
    """The shares of the copy's bandwidth, by sizes of programs (rows of the table) and lengths of rows in bytes."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_(0, 256)
    target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    lengths = (128, 192, 384, 512, 1024, 2048, 16384)
    print("| units, warps | one row |" + "".join(f" {length} |" for length in lengths) + " 4-byte units, 384 |")
    print("|---" * (3 + len(lengths)) + "|")
    for num_units in (512, 1024, 2048, 4096):
        for num_warps in (4, 8):
            pairs = [(target, source[: 1 << 30])]
            for length in lengths:
                rows = (1 << 28) // length
                of = source[: 2 * rows * length].view(rows, -1)[:, length:]
                pairs.append((target[: rows * length].view(rows, length), of))
            rows = (1 << 28) // 384
            odd = source[: 2 * rows * 388].view(rows, -1)
            pairs.append((target[: rows * 384].view(rows, 384), odd[:, 388 : 388 + 384]))
            cells = []
            for to, of in pairs:
                ms = median_ms(GroupedCopy([to], [of], num_units, num_warps).run, 10)
                cells.append(f"{2 * to.numel() / (1e-3 * ms) / bandwidth:.1%}")
            print(f"| {num_units}, {num_warps} | " + " | ".join(cells) + " |", flush=True)
    from shared.triton_digest import digest_many

    table = digests._table("5e" * 32, source.device, 1 << 20)
    words = source[: 1 << 28].view(torch.int32)
    pages = torch.ones(64, dtype=torch.int64, device="cuda")
    print("\n| digest of 256 MiB: words, pages, warps | of the copy's bandwidth |\n|---|---|")
    for num_words, num_pages, num_warps in (
        (512, 8, 4), (1024, 4, 4), (1024, 8, 4), (1024, 16, 4), (2048, 4, 4), (2048, 8, 4), (2048, 8, 8), (4096, 8, 8)
    ):  # fmt: skip

        def step(num_words: int = num_words, num_pages: int = num_pages, num_warps: int = num_warps) -> Tensor:
            return digest_many(words, table, pages, 0, num_words=num_words, num_pages=num_pages, num_warps=num_warps)

        ms = median_ms(step, 10)
        print(
            f"| {num_words}, {num_pages}, {num_warps} | {4 * words.numel() / (1e-3 * ms) / bandwidth:.1%} |", flush=True
        )


def main() -> int:
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, copy of 8 GiB: {bandwidth / 1e12:.3f} TB/s read and written\n")
    if "--sweep" in sys.argv[1:]:
        sweep(bandwidth)
        return 0
    print("| of | what | how | GB moved | ms | of the copy's bandwidth | host ms | host ms a bucket |")
    print("|---|---|---|---|---|---|---|---|")
    try:
        for line in digest_rows(bandwidth):
            print(line, flush=True)
        torch.cuda.empty_cache()
        for make, tp_size in ((qwen3_8b, 1), (qwen3_8b, 4), (qwen3_30b_a3b, 1), (qwen3_30b_a3b, 2)):
            for line in rows_of(make(tp_size), bandwidth):
                print(line, flush=True)
            torch.cuda.empty_cache()
    except AssertionError as error:
        print(f"\n{error}")
        return 1
    print("\nevery byte and digest is that of torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
