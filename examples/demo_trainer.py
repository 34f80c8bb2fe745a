"""The trainer of the demo: three FSDP2 steps in BF16, each followed by a push. Run by `demo.py` under torchrun.

What a training loop adds for fp8sync is marked with `# fp8sync`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from examples.tiny_qwen3 import CONFIG, hf_config, make_model
from sender import FP8Sender, export_checkpoint

NUM_STEPS = 3


def sharded_model() -> nn.Module:
    """The tiny Qwen3 in BF16, every layer and the root sharded over all ranks."""
    model = make_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    tokens = torch.randint(3, CONFIG["vocab_size"], (4, 64), generator=generator)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def ask(server: str) -> dict[str, Any]:
    """One greedy generation over HTTP."""
    body = {"input_ids": [11, 12, 13], "sampling_params": {"temperature": 0.0, "max_new_tokens": 8}}
    response = httpx.post(f"{server}/generate", json=body, timeout=120.0, trust_env=False)
    response.raise_for_status()
    reply: dict[str, Any] = response.json()
    return reply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = sharded_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    reports = []
    with FP8Sender(servers=[args.server]) as sender:  # fp8sync
        for step in range(1, NUM_STEPS + 1):
            loss = train_step(model, optimizer, step)
            report = sender.push(model)  # fp8sync
            if dist.get_rank() == 0:
                reply = ask(args.server)
                served = reply["meta_info"]["weight_version"]
                print(f"  step {step}: loss {loss:.4f}, pushed version {report.version} in", end=" ")
                print(
                    f"{report.seconds['total']:.2f} s; server replies {reply['output_ids']} (weight_version {served})"
                )
                if served != str(report.version):
                    raise SystemExit(f"the server replies with version {served}, pushed was {report.version}")
                reports.append(report.model_dump())
    export_checkpoint(model, args.out / "checkpoint", hf_config=hf_config())
    if dist.get_rank() == 0:
        (args.out / "reports.json").write_text(json.dumps(reports))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
