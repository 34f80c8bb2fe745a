"""A push beside what SGLang has on board: `make bench`, on a CPU, from one trainer process to one server, 2 minutes.

    push           `FP8Sender.push`, over `tcp` and over `gloo`, staged in reserved memory
    flattened      the same FP8 tensors as one flattened bucket, `/update_weights_from_distributed` over gloo
    BF16 stock     the BF16 tensors one by one on the same route, to a server that serves BF16

Quantizing is part of the first two. Gloo carries no FP8 tensors, so FP8 tensors cannot go one by one here. After the
timing every byte that the flattened bucket's server holds is compared with what the push's server holds. The rows are
the median of `--pushes` after the first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from examples.local_server import CPU_ARGS, LocalServer, free_port
from examples.tiny_qwen3 import make_model, write_config
from sender import FP8Sender
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args
from shared.naming import scale_name
from shared.numerics import quantize_reference
from shared.protocol import PlaneName

CHANGES = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
BUCKET_BYTES = 1 << 30
Named = list[tuple[str, torch.Tensor]]


def quantized(model: nn.Module, config: FP8BlockConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """What a server of block FP8 loads: linear weights of the layers as codes and scales, the rest as it is."""
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name not in linear or name == "lm_head.weight":
            yield name, weight
            continue
        codes, scale = quantize_reference(weight, scale_fmt=config.scale_fmt, zero_scale=config.zero_scale)
        yield name, codes
        yield scale_name(name), scale


class StockRoute:
    """`/update_weights_from_distributed` of one server of one rank, over gloo."""

    def __init__(self, server: LocalServer) -> None:
        from sglang.srt.utils import init_custom_process_group

        self._server, self._pool = server, ThreadPoolExecutor(1)
        port = free_port()
        self._name = f"stock {port}"  # this process has one for each server
        body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
        asked = self._post("/init_weights_update_group", {**body, "group_name": self._name, "backend": "gloo"})
        self._group = init_custom_process_group(
            backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name=self._name
        )
        asked()

    def push(self, tensors: Named, flattened: bool) -> None:
        self._post("/begin_weight_update", {})()
        for bucket in _buckets(tensors):
            body = {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": self._name,
                "flush_cache": False,
                "load_format": "flattened_bucket" if flattened else None,
            }
            done = self._post("/update_weights_from_distributed", body)
            flat = [torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])] if flattened else None
            for tensor in flat or [tensor for _, tensor in bucket]:
                dist.broadcast(tensor, src=0, group=self._group)
            done()
        self._post("/end_weight_update", {})()
        assert self._server.post("/flush_cache").status_code == 200

    def _post(self, path: str, body: dict[str, object]) -> Callable[[], None]:
        reply = self._pool.submit(self._server.post, path, body)

        def wait() -> None:
            response = reply.result()
            assert response.status_code == 200 and response.json()["success"], response.text

        return wait


def _buckets(tensors: Named) -> Iterator[Named]:
    bucket: Named = []
    for name, tensor in tensors:
        if bucket and sum(t.nbytes for _, t in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append((name, tensor))
    yield bucket


def seconds(push: Callable[[nn.Module], object], models: list[nn.Module], pushes: int) -> tuple[float, float]:
    """Of the first push, and the median of the others. The last one pushes the last model."""
    times = []
    for number in range(pushes + 1):
        model = models[(number - pushes - 1) % len(models)]
        began = time.monotonic()
        push(model)
        times.append(time.monotonic() - began)
    return times[0], statistics.median(times[1:])


@contextmanager
def serving(folder: Path, name: str, args: list[str]) -> Iterator[LocalServer]:
    with LocalServer([*args, *CPU_ARGS], folder / f"{name}.log", env={"FP8SYNC_PROBE": "1"}) as started:
        yield started.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pushes", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    chosen = parser.parse_args()
    changes, config = {**CHANGES, "num_hidden_layers": chosen.layers}, FP8BlockConfig()
    models = [make_model(seed, **changes) for seed in (1, 2)]
    num_bytes = sum(p.nbytes for p in models[0].parameters())
    rows: dict[str, tuple[float, float]] = {}
    planes: tuple[PlaneName, ...] = ("tcp", "gloo")
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        model_folder = str(write_config(folder / "model", **changes))
        fp8 = sglang_fp8_args(model_folder, config)
        with serving(folder, "push", [*fp8, "--fp8sync-staging", "1"]) as server:
            for plane in planes:
                with FP8Sender([server.url], plane=plane, config=config, staging="reserved") as sender:
                    sender.prepare(models[0])
                    rows[f"push, {plane}"] = seconds(sender.push, models, chosen.pushes)
            pushed = server.probe()
        stock = [arg for arg in fp8 if arg not in ("--load-plugin", "fp8sync")]
        with serving(folder, "flattened", stock) as server:
            route = StockRoute(server)
            rows["stock, flattened bucket, FP8"] = seconds(
                lambda model: route.push(list(quantized(model, config)), flattened=True), models, chosen.pushes
            )
            assert server.probe() == pushed, "the two servers do not hold the same bytes"
        with serving(folder, "bf16", ["--model-path", model_folder, "--load-format", "dummy"]) as server:
            route = StockRoute(server)
            rows["stock, tensor by tensor, BF16"] = seconds(
                lambda model: route.push(
                    [(name, parameter.detach()) for name, parameter in model.named_parameters()], flattened=False
                ),
                models,
                chosen.pushes,
            )
    _, best_stock = rows["stock, flattened bucket, FP8"]
    print(f"{num_bytes / 1e6:.0f} MB in BF16; seconds a push to one idle server; both FP8 servers hold the same bytes")
    print("| way | first | later | to the flattened bucket |\n|---|---|---|---|")
    for way, (first, later) in rows.items():
        print(f"| {way} | {first:.2f} | {later:.2f} | {later / best_stock:.2f} |")


if __name__ == "__main__":
    main()
