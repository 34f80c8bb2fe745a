"""GRPO on GSM8K: FSDP2 trains in BF16 with FP32 masters, SGLang servers answer. Run under torchrun:

    python -m torch.distributed.run --nproc-per-node 2 -m examples.fsdp_gsm8k.train CONFIG

Once: load, shard, give the servers the weights. Every step: each rank asks for answers to its share of the prompts,
scores them, takes its part in one policy-gradient step; then the servers get the new weights. All ranks run the same
number of forward and backward passes, as FSDP needs. What fp8sync adds is marked with `# fp8sync`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.fsdp_gsm8k.gsm8k import Row, advantages, read_rows
from examples.fsdp_gsm8k.rollout import Group, post, rollout
from examples.fsdp_gsm8k.settings import Settings, load_settings
from sender import FP8Sender
from shared.errors import ConfigError


def load_model(path: str, device: torch.device) -> PreTrainedModel:
    """Every layer and the root sharded over all ranks. Computes in BF16; FP32 masters keep small updates alive."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model.to(device)


# Weights to the servers


@contextmanager
def weight_sync(settings: Settings) -> Iterator[Callable[[PreTrainedModel], str]]:
    """A collective function that returns when every server serves the model's weights; it gives their version."""
    config = settings.rollout.quantization.block_config()
    if config is None:
        versions = itertools.count(1)
        yield lambda model: sync_through_disk(model, settings, str(next(versions)))
        return
    with FP8Sender(settings.rollout.servers, config=config) as sender:  # fp8sync
        yield lambda model: str(sender.push(model).version)  # fp8sync


def sync_through_disk(model: PreTrainedModel, settings: Settings, version: str) -> str:
    """FP8 off: SGLang's stock way, slow and simple. The servers must see the folder that rank 0 writes."""
    save(model, settings)
    if dist.get_rank() == 0:
        body = {"model_path": str(settings.checkpoint.resolve()), "weight_version": version}
        for server in settings.rollout.servers:
            post(f"{server}/update_weights_from_disk", body, settings.rollout.timeout_s)
    dist.barrier()
    return version


def save(model: PreTrainedModel, settings: Settings) -> None:
    """Collective. The weights in BF16, as a Hugging Face checkpoint."""
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        rounded = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
        model.save_pretrained(settings.checkpoint, state_dict=rounded)
        model.config.dtype = torch.bfloat16  # transformers wrote the masters' type, which SGLang would serve as FP16
        model.config.save_pretrained(settings.checkpoint)
    dist.barrier()


# Training


def policy_loss(
    model: PreTrainedModel, group: Group, clip: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped policy-gradient loss of one group, and the logprobs' distance from the server's (nats, not negative).

    Both are means over the group's tokens.
    All answers follow one prompt and are padded on the right, where a causal model sees no padding.
    """
    num_answers, longest = len(group.answers), max(map(len, group.answers))
    tokens = torch.zeros(num_answers, longest, dtype=torch.long, device=device)  # [num_answers, longest], as the next
    old = torch.zeros(num_answers, longest, device=device)
    mask = torch.zeros(num_answers, longest, device=device)
    for i, answer in enumerate(group.answers):
        tokens[i, : len(answer)] = torch.tensor(answer)
        old[i, : len(answer)] = torch.tensor(group.logprobs[i])
        mask[i, : len(answer)] = 1.0
    prompt = torch.tensor(group.prompt, device=device).expand(num_answers, -1)
    logits = model(input_ids=torch.cat([prompt, tokens], 1), logits_to_keep=longest + 1, use_cache=False).logits
    new = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    advantage = torch.tensor(advantages(group.rewards), device=device)[:, None]
    ratio = torch.exp(new - old)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    gap = ((new - old).abs() * mask).detach()
    return -(gain * mask).sum() / mask.sum(), gap.sum() / mask.sum()


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, groups: list[Group], clip: float, device: torch.device
) -> dict[str, float]:
    """One step on the groups of all ranks. Returns means, the same on every rank: reward, loss, logprob gap (nats)."""
    totals = torch.zeros(3, device=device)
    for group in groups:  # one at a time: their logits are what takes memory
        loss, gap = policy_loss(model, group, clip, device)
        (loss / len(groups)).backward()
        totals += torch.stack([torch.tensor(group.rewards, device=device).mean(), loss.detach(), gap]) / len(groups)
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(totals)
    means = (totals / dist.get_world_size()).tolist()
    return dict(zip(("reward", "loss", "logprob_gap"), means, strict=True))


def choose(rows: list[Row], settings: Settings, step: int) -> list[Row]:
    """This rank's share of the step's prompts."""
    generator = torch.Generator().manual_seed(settings.seed + step)
    chosen = torch.randperm(len(rows), generator=generator)[: settings.train.batch_size].tolist()
    return [rows[i] for i in chosen[dist.get_rank() :: dist.get_world_size()]]


def train(settings: Settings, device: torch.device) -> None:
    rows = read_rows(settings.data)
    if len(rows) < settings.train.batch_size or settings.train.batch_size % dist.get_world_size():
        raise ConfigError("train.batch_size must be a multiple of the number of ranks and at most the number of rows")
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer or settings.model)
    model = load_model(settings.model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.train.learning_rate, weight_decay=0.0)
    dist.barrier()  # ranks load at their own speed
    with weight_sync(settings) as sync:
        version = sync(model)  # a fenced server answers nothing before its first push
        for step in range(1, settings.train.steps + 1):
            groups = rollout(choose(rows, settings, step), tokenizer, settings, version)
            means = train_step(model, optimizer, groups, settings.train.clip, device)
            replied, started = version, time.perf_counter()
            version = sync(model)
            if dist.get_rank() == 0:
                numbers = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
                push = f"push {time.perf_counter() - started:.2f} s"
                print(f"step {step}: {numbers}, {push}, replies of weight_version {replied}", flush=True)
    save(model, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    settings = load_settings(parser.parse_args().config)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    train(settings, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
