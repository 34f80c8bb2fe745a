"""A push beside what SGLang has on board: `make bench`, on a CPU, from one trainer process to one server, 2 minutes.

    push           `FP8Sender.push`, over `same_host`, `tcp` and `gloo`, staged in reserved memory
    flattened      the same FP8 tensors as one flattened bucket, `/update_weights_from_distributed` over gloo
    BF16 stock     the BF16 tensors one by one on the same route, to a server that serves BF16

Quantizing is part of all but the last. Gloo carries no FP8 tensors, so FP8 tensors cannot go one by one here. After the
timing every byte that the flattened bucket's server holds is compared with what the push's server holds. The rows are
the median of `--pushes` after the first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from benchmarks.stock_route import StockRoute, buckets, quantized
from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import make_model, write_config
from sender import FP8Sender
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args
from shared.protocol import PlaneName

CHANGES = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


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
    planes: tuple[PlaneName, ...] = ("same_host", "tcp", "gloo")
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
                lambda model: route.push(buckets(quantized(weights_of(model), config)), flattened=True),
                models,
                chosen.pushes,
            )
            assert server.probe() == pushed, "the two servers do not hold the same bytes"
        with serving(folder, "bf16", ["--model-path", model_folder, "--load-format", "dummy"]) as server:
            route = StockRoute(server)
            rows["stock, tensor by tensor, BF16"] = seconds(
                lambda model: route.push(buckets(weights_of(model).items()), flattened=False),
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
