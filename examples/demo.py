"""The main job, end to end, on a machine without a GPU: `make demo`.

    1  a real SGLang server starts on a folder without weights: fenced, it refuses requests
    2  an FSDP2 trainer on two ranks takes three steps; after each it pushes and asks the server
    3  the trainer exports its weights as a Hugging Face FP8 checkpoint; a second server, without the plugin, loads it
    4  both servers have to agree on every byte, every greedy token and every logprob

Ends with `demo ok: ...`, or with what differs and exit code 1.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.local_server import CPU_ARGS, LocalServer, free_port
from examples.tiny_qwen3 import write_config
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "demo"
PROMPTS = [[11, 12, 13], [100, 200, 300, 400, 500], list(range(3, 40)), [999, 3, 999]]
NEW_TOKENS = 16


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for, every five seconds, and how long it took."""
    started, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(5.0):
            print(f"  ... {time.monotonic() - started:.0f} s", flush=True)

    print(f"{what}", flush=True)
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
    print(f"  done in {time.monotonic() - started:.1f} s", flush=True)


def start_fenced_server() -> LocalServer:
    folder = write_config(OUT / "no_weights")
    args = sglang_fp8_args(str(folder), FP8BlockConfig())
    print("  python -m sglang.launch_server", " ".join(a if len(a) < 60 else a[:57] + "..." for a in args))
    return LocalServer([*args, *CPU_ARGS], OUT / "server.log")


def show_fence(server: LocalServer) -> None:
    response = server.post("/generate", {"input_ids": PROMPTS[0]})
    print(f"  before the first push it answers {response.status_code}: {response.json()['error']['message']}")
    if response.status_code != 503:
        raise SystemExit("a server without weights answered a request")


def train(server: LocalServer) -> list[dict[str, Any]]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
        *("-m", "examples.demo_trainer", "--server", server.url, "--out", str(OUT)),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (OUT / "trainer.log").open("wb") as log:
        code = subprocess.run(command, cwd=ROOT, env=env, stderr=log, check=False, timeout=600).returncode
    if code:
        raise SystemExit(f"the trainer ended with code {code}:\n{(OUT / 'trainer.log').read_text()[-3000:]}")
    reports: list[dict[str, Any]] = json.loads((OUT / "reports.json").read_text())
    return reports


def compare_bytes(pushed: LocalServer, loaded: LocalServer) -> tuple[int, list[str]]:
    """How many parameters and buffers there are, and the names of those whose raw bytes differ."""
    here, there = pushed.probe(), loaded.probe()
    if len(here) != len(there):
        return 0, [f"the servers have {len(here)} and {len(there)} ranks"]
    differ = [
        f"rank {rank}: {name}"
        for rank, (mine, other) in enumerate(zip(here, there, strict=True))
        for name in sorted({*mine, *other})
        if mine.get(name) != other.get(name)
    ]
    return sum(len(rank) for rank in here), differ


def compare_tokens(pushed: LocalServer, loaded: LocalServer) -> tuple[int, list[str]]:
    """How many greedy tokens there are, and where token or logprob differs."""
    pairs = zip(pushed.generate(PROMPTS, NEW_TOKENS), loaded.generate(PROMPTS, NEW_TOKENS), strict=True)
    num_tokens, differ = 0, []
    for prompt, (mine, other) in enumerate(pairs):
        for at, (token, wanted) in enumerate(zip(mine["tokens"], other["tokens"], strict=True)):
            num_tokens += 1
            if token != wanted or mine["logprobs"][at] != other["logprobs"][at]:
                differ.append(f"prompt {prompt}, token {at}: {token} against {wanted}")
    return num_tokens, differ


def compare_checksums(pushed: LocalServer, loaded: LocalServer) -> list[str]:
    """SGLang's own checker, which cannot dequantize block FP8 of ragged shapes such as this model's."""
    mine, other = pushed.checksums(), loaded.checksums()
    if not mine["success"] and not other["success"] and mine["message"] == other["message"]:
        print(f"  SGLang's /weights_checker (a weaker witness) cannot judge this model: {mine['message']}")
        return []
    return [] if mine == other else ["/weights_checker: the servers differ"]


def print_table(reports: list[dict[str, Any]]) -> None:
    phases = ("plan", "gather", "quantize", "send", "verify", "commit", "total")
    print("\n version  tensors  BF16 MB   FP8 MB " + "".join(f"{phase:>10}" for phase in phases) + "   (seconds)")
    for report in reports:
        sizes = f"{report['bf16_bytes'] / 1e6:8.2f} {report['wire_bytes'] / 1e6:8.2f} "
        seconds = "".join(f"{report['seconds'][phase]:10.3f}" for phase in phases)
        print(f"{report['version']:8d} {report['num_tensors']:8d} {sizes}{seconds}")


def main() -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    print("1. A server on a folder with a configuration and no weights", flush=True)
    with start_fenced_server() as pushed:
        with waiting("  starting it (about 25 s)"):
            pushed.wait()
        show_fence(pushed)
        with waiting("2. An FSDP2 trainer on two ranks: step, push, ask"):
            reports = train(pushed)
        print("3. A second server, without --load-plugin, on the exported FP8 checkpoint", flush=True)
        loaded_args = ["--model-path", str(OUT / "checkpoint"), *CPU_ARGS]
        with LocalServer(loaded_args, OUT / "reference.log", env={"FP8SYNC_PROBE": "1"}) as loaded:
            with waiting("  starting it"):
                loaded.wait()
            print("4. Comparing", flush=True)
            num_tensors, tensors_differ = compare_bytes(pushed, loaded)
            num_tokens, tokens_differ = compare_tokens(pushed, loaded)
            others_differ = compare_checksums(pushed, loaded)
    print_table(reports)
    differ = [*tensors_differ, *tokens_differ, *others_differ]
    for difference in differ:
        print(f"DIFFERS  {difference}")
    verdict = "ok" if not differ and num_tensors and num_tokens else "FAILED"
    print(
        f"\ndemo {verdict}: {num_tensors - len(tensors_differ)} of {num_tensors} tensors identical, "
        f"{num_tokens - len(tokens_differ)} of {num_tokens} tokens identical"
    )
    return 0 if verdict == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
