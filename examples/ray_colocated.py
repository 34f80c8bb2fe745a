"""Trainers and an SGLang engine on the same GPUs, as Ray actors: train, push, generate; in the end a proof.

    python -m examples.ray_colocated [--rounds 5]

Without a GPU all of it runs on the CPU, in about two minutes. With GPUs there is a trainer on each of the first two,
and the engine shares the first of them: weights go through memory of that GPU. The proof is an engine that loads the
exported checkpoint: it has to agree with the one that was pushed to, on every byte and every token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from examples.local_server import CPU_ARGS
from examples.tiny_qwen3 import CONFIG, hf_config, make_model, write_config
from receiver_plugin.ray_engine import EngineActor
from sender import export_checkpoint
from sender.ray_trainer import TrainerActor
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args
from shared.protocol import Probe
from shared.ray_cluster import EngineAt, EngineSpec, colocate

GPU_ARGS = (
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--disable-cuda-graph", "--skip-tokenizer-init", "--max-total-tokens", "4096", "--mem-fraction-static", "0.1"),
)
CHANGES = {"hidden_size": 256}  # whole blocks, which kernels of GPUs want
REQUEST: dict[str, Any] = {
    "input_ids": [[11, 12, 13], [100, 200, 300, 400, 500]],
    "sampling_params": {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True},
}


class Trainer(TrainerActor):
    """One of the FSDP2 ranks."""

    def set_up(self) -> None:
        torch.set_num_threads(1)
        self.model = make_model(**CHANGES).to(self.device)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in self.model.get_submodule("model.layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.generator = torch.Generator().manual_seed(self.rank)

    def train_step(self) -> float:
        tokens = torch.randint(3, CONFIG["vocab_size"], (4, 64), generator=self.generator).to(self.device)
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def export(self, folder: str) -> None:
        export_checkpoint(self.model, Path(folder), hf_config=hf_config(**CHANGES))


def tokens_of(engine: EngineAt, **demand: int) -> list[list[int]]:
    """Greedy, of the version that is demanded."""
    return [reply["output_ids"] for reply in ray.get(engine.actor.generate.remote(REQUEST, **demand))]


def bytes_of(engine: EngineAt) -> Any:
    """SHA-256 of every parameter and buffer, by rank."""
    message = Probe().model_dump_json().encode()
    return json.loads(ray.get(engine.actor.control.remote(message, 60.0)))["probe"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds, folder = parser.parse_args().rounds, Path(tempfile.mkdtemp(prefix="fp8sync-ray-"))
    num_gpus = torch.cuda.device_count()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    user_args = [*(GPU_ARGS if num_gpus else CPU_ARGS), "--fp8sync-staging", "0"]
    args = sglang_fp8_args(str(write_config(folder / "no_weights", **CHANGES)), FP8BlockConfig(), user_args=user_args)
    where = f"{min(num_gpus, 2)} GPU(s)" if num_gpus else "the CPU"
    print(f"starting an engine and its trainers on {where} (about a minute)", flush=True)
    cluster = colocate(
        Trainer, min(num_gpus, 2) or 2, EngineActor, [EngineSpec(args=args)], sender_options={"timeout_s": 120.0}
    )
    (engine,) = cluster.engines
    print(f"before the first push the engine is {ray.get(engine.actor.health.remote())['state']}")
    for _ in range(rounds):
        losses = cluster.trainers_do("train_step")
        report = cluster.push()
        (way,) = report["staging"].values()
        print(
            f"version {report['version']}: loss {losses[0]:.4f}, pushed in {report['seconds']['total']:.2f} s ({way});"
        )
        print(f"  the engine generates {tokens_of(engine, minimum=report['version'])}", flush=True)
    print("the proof: another engine loads the exported checkpoint (about a minute)", flush=True)
    cluster.trainers_do("export", str(folder / "checkpoint"))
    args = sglang_fp8_args(str(folder / "checkpoint"), FP8BlockConfig(), user_args=user_args)
    loaded = cluster.start_engine(EngineActor, EngineSpec(args=args), 1, cluster.slots[-1:], restarts=0)
    same = bytes_of(loaded) == bytes_of(engine), tokens_of(loaded) == tokens_of(engine)
    ray.kill(loaded.actor)
    cluster.close()
    ray.shutdown()
    if same != (True, True):
        raise SystemExit(f"the engines differ: bytes and tokens agree {same}")
    print("ray ok: every byte and every token agrees")


if __name__ == "__main__":
    main()
