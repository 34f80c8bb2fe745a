"""What `benchmarks.push` can be told, and what it tells its servers, and NCCL on a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from benchmarks.shapes import MODELS, with_experts, with_layers
from examples.local_server import CPU_ARGS
from sender.sending_ranks import SendFrom
from shared.protocol import InFlight, PlaneName

GPU_ARGS = (
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--moe-runner-backend", "triton", "--skip-tokenizer-init"),
    *("--skip-server-warmup", "--disable-prefill-cuda-graph", "--random-seed", "1"),
)
# Both ends of an NCCL group have to agree on the first; SGLang sets it to 0 for itself.
NCCL = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
EVERY_WAY = ("ours", "peers", "bf16", "fsdp")  # in their order; the last one gives up the trainer's weights
PROMPT_TOKENS = 64  # more than any prompt here has, and what a server keeps beside its requests


def arguments(description: str | None, words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="so many layers in place of the model's")
    parser.add_argument("--experts", type=int, help="so many experts in place of the model's")
    parser.add_argument("--out", type=Path, required=True, help="folder for figures (JSON) and the servers' logs")
    parser.add_argument("--label", help="of its files there; default: the model, and its layers and experts if given")
    parser.add_argument("--plane", nargs="+", choices=get_args(PlaneName), default=["nccl"], help="a row for each")
    parser.add_argument("--bucket-mib", type=int, nargs="+", default=[256], help="a row for each")
    parser.add_argument("--staging", nargs="+", choices=["reserved", "in_place"], default=["reserved", "in_place"])
    parser.add_argument("--pushes", type=int, default=5, help="after the first, of every way of ours")
    parser.add_argument("--peer-pushes", type=int, help="the same of the others")
    parser.add_argument("--only", choices=EVERY_WAY, help="the others are left out")
    parser.add_argument("--bf16", action="store_true", help="a third server, which serves BF16")
    parser.add_argument("--fsdp", action="store_true", help="two trainer ranks, and a server of their own")
    senders = ["rank_0", "auto", "holders", (0, 1), (1,)]
    parser.add_argument(
        "--send-from",
        nargs="+",
        type=ranks_of,
        default=["rank_0"],
        metavar="RANKS",
        choices=senders,
        help="of --fsdp, a row for each; rank_0 and holders (over same_host) without it, too",
    )
    parser.add_argument("--load", type=int, nargs="+", default=[], metavar="STREAMS", help="so many requests generate")
    parser.add_argument("--in-flight", nargs="+", choices=get_args(InFlight), default=["retract", "keep"])
    parser.add_argument("--load-tokens", type=int, default=1000, help="that each request under load may generate")
    parser.add_argument("--colocated", action="store_true", help="the server is on the trainer's GPU")
    parser.add_argument("--gpus", nargs=2, default=["0", "1"], metavar="GPU", help="of the trainer, of the server")
    parser.add_argument("--together", action="store_true", help="all servers are up from the start, in one memory")
    parser.add_argument("--mem-fraction-static", default="0.85", help="of the servers, on a GPU")
    parser.add_argument("--fp8-gemm-backend", choices=["triton", "deep_gemm"], default="triton", help="on a GPU")
    parser.add_argument("--server-arg", action="append", default=[], metavar="WORD", help="more for every server")
    parser.add_argument("--deadline-s", type=float, default=540.0, help="the table is printed then, whatever runs")
    chosen = parser.parse_args(words)
    if chosen.colocated:
        chosen.gpus = [chosen.gpus[0]] * 2
        if {"nccl", "memory"} & set(chosen.plane) or chosen.fsdp or chosen.bf16:
            parser.error("--colocated: with --plane same_host or tcp, and without --fsdp and --bf16")
    try:
        chosen.case = with_experts(with_layers(MODELS[chosen.model], chosen.layers), chosen.experts)
    except ValueError as error:
        parser.error(str(error))
    if min(chosen.load, default=1) < 1:
        parser.error("--load: a number of streams, each 1 or more")
    sizes = {"layers": chosen.layers, "experts": chosen.experts}
    given = [f"{value}-{name}" for name, value in sizes.items() if value is not None]
    chosen.label = chosen.label or "-".join([chosen.model, *given])
    also = [way for way in ("bf16", "fsdp") if getattr(chosen, way)]
    chosen.ways = sorted({*([chosen.only] if chosen.only else EVERY_WAY[:2]), *also}, key=EVERY_WAY.index)
    chosen.load_tokens = min(chosen.load_tokens, chosen.case.config["max_position_embeddings"] - PROMPT_TOKENS)
    return chosen


def ranks_of(text: str) -> SendFrom:
    """`0,1` as ranks, and a word as it is."""
    return text if text in ("rank_0", "auto", "holders") else tuple(map(int, text.split(",")))  # type: ignore[return-value]


def server_args(chosen: argparse.Namespace, on_gpu: bool) -> list[str]:
    """Of every server: room for all streams at once, in its KV cache and, on a GPU, in its CUDA graphs."""
    streams, tokens = max(chosen.load, default=0), chosen.load_tokens + PROMPT_TOKENS
    most = 8 if streams <= 8 else streams
    running = ["--max-running-requests", str(2 * most if on_gpu else most)]
    pool = ["--max-total-tokens", str(max(32768 if on_gpu else 2048, streams * tokens))]
    chunks = ["--incremental-streaming-output"] if streams else []  # else each chunk has all tokens of its request
    if not on_gpu:
        return [*CPU_ARGS, *running, *pool, *chunks, *chosen.server_arg]
    gpu = ["--fp8-gemm-backend", chosen.fp8_gemm_backend, "--mem-fraction-static", chosen.mem_fraction_static]
    return [*GPU_ARGS, *gpu, "--cuda-graph-max-bs", str(most), *running, *pool, *chunks, *chosen.server_arg]
