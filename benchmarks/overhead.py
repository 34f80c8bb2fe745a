"""What a push costs beside its bytes: `python -m benchmarks.overhead`, on a CPU, about a minute.

A model of a few MB to a real, idle SGLang server, by way of staging: the median of `--pushes` pushes after the first
five, their phases, and what control messages of each kind took, as rank 0 sees it. All of it is there on a GPU, too,
beside bytes that take no longer than this.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from examples.local_server import CPU_ARGS, LocalServer
from examples.tiny_qwen3 import make_model, write_config
from sender import FP8Sender
from sender.control import HttpControl
from sender.report import PHASES
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args
from shared.protocol import PlaneName, Reply, StagingChoice

CHANGES = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 512}
WARM = 5
WAYS: tuple[tuple[PlaneName, StagingChoice], ...] = (
    ("tcp", "reserved"),
    ("tcp", "in_place"),
    ("same_host", "reserved"),
    ("same_host", "in_place"),
)


class Timed(HttpControl):
    """Notes what every message took, in seconds, by its kind."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.took: dict[str, list[float]] = defaultdict(list)

    def call(self, message: object, timeout_s: float) -> Reply:
        began = time.perf_counter()
        try:
            return super().call(message, timeout_s)  # type: ignore[arg-type]  # any message
        finally:
            self.took[str(getattr(message, "kind", message))].append(time.perf_counter() - began)


def ms(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pushes", type=int, default=40)
    chosen = parser.parse_args()
    model = make_model(1, **CHANGES)
    print(f"ms; medians of {chosen.pushes} pushes of {sum(p.nbytes for p in model.parameters()) / 1e6:.1f} MB in BF16")
    print(f"| way | push | {' | '.join(PHASES)} | messages a push |\n{'|---' * (len(PHASES) + 3)}|")
    with tempfile.TemporaryDirectory() as at:
        args = [*sglang_fp8_args(str(write_config(Path(at) / "model", **CHANGES)), FP8BlockConfig()), *CPU_ARGS]
        with LocalServer(args, Path(at) / "server.log") as server:
            server.wait()
            for plane, staging in WAYS:
                control, totals, phases = Timed(server.url), list[float](), defaultdict[str, list[float]](list)
                with FP8Sender([control], plane=plane, staging=staging) as sender:
                    sender.prepare(model)
                    for number in range(WARM + chosen.pushes):
                        if number == WARM:
                            control.took.clear()
                        began = time.perf_counter()
                        report = sender.push(model)
                        if number >= WARM:
                            totals.append(time.perf_counter() - began)
                            for phase in PHASES:
                                phases[phase].append(report.seconds[phase])
                    told = ", ".join(
                        f"{len(took) / chosen.pushes:.2g} {kind} of {ms(took)}" for kind, took in control.took.items()
                    )
                cells = [f"{plane}, {staging}", ms(totals), *(ms(phases[phase]) for phase in PHASES), told]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
