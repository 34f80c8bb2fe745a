"""What `benchmarks.push` can be told, and what it tells its servers and NCCL on a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from benchmarks.shapes import MODELS
from shared.protocol import PlaneName

GPU_ARGS = (
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--fp8-gemm-backend", "triton", "--moe-runner-backend", "triton", "--skip-tokenizer-init"),
    *("--skip-server-warmup", "--disable-prefill-cuda-graph", "--cuda-graph-max-bs", "8"),
    *("--max-running-requests", "16", "--max-total-tokens", "32768", "--random-seed", "1"),
)
# Both ends of an NCCL group have to agree on the first; SGLang sets it to 0 for itself.
NCCL = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
EVERY_WAY = ("ours", "peers")


def arguments(description: str | None, words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="so many layers in place of the model's")
    parser.add_argument("--out", type=Path, required=True, help="folder for figures (JSON) and the servers' logs")
    parser.add_argument("--label", help="of its files there; default: the model")
    parser.add_argument("--plane", choices=get_args(PlaneName), default="nccl")
    parser.add_argument("--bucket-mib", type=int, nargs="+", default=[256], help="a row for each")
    parser.add_argument("--staging", nargs="+", choices=["reserved", "in_place"], default=["reserved", "in_place"])
    parser.add_argument("--pushes", type=int, default=5, help="after the first, of every way of ours")
    parser.add_argument("--peer-pushes", type=int, help="the same of the others")
    parser.add_argument("--only", choices=EVERY_WAY, help="the others are left out")
    parser.add_argument("--bf16", action="store_true", help="a third server, which serves BF16")
    parser.add_argument("--load", type=int, default=0, metavar="STREAMS", help="push while so many requests generate")
    parser.add_argument("--in-flight", nargs="+", choices=["retract", "keep"], default=["retract", "keep"])
    parser.add_argument("--gpus", nargs=2, default=["0", "1"], metavar="GPU", help="of the trainer, of the server")
    parser.add_argument("--together", action="store_true", help="all servers are up from the start, in one memory")
    parser.add_argument("--mem-fraction-static", default="0.85", help="of the servers, on a GPU")
    parser.add_argument("--server-arg", action="append", default=[], metavar="WORD", help="more for every server")
    parser.add_argument("--deadline-s", type=float, default=540.0, help="the table is printed then, whatever runs")
    chosen = parser.parse_args(words)
    chosen.label = chosen.label or chosen.model
    return chosen
