"""Answers from the servers: every rank asks for its own prompts, all at once, and scores what comes back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from examples.fsdp_gsm8k.gsm8k import Row, prompt_tokens, reward
from examples.fsdp_gsm8k.settings import Settings


@dataclass(frozen=True)
class Group:
    """One prompt and its answers: token ids, the server's natural logprobs of them, and what each was worth."""

    prompt: list[int]
    answers: list[list[int]]
    logprobs: list[list[float]]
    rewards: list[float]


def post(url: str, body: dict[str, Any], timeout_s: float) -> Any:
    """Raises: RuntimeError: the server refused, with what it said."""
    response = httpx.post(url, json=body, timeout=timeout_s, trust_env=False)
    if response.is_error:
        raise RuntimeError(f"{url} answered {response.status_code}: {response.text[:500]}")
    return response.json()


def rollout(rows: list[Row], tokenizer: PreTrainedTokenizerBase, settings: Settings, version: str) -> list[Group]:
    """This rank's prompts, all at once, spread over the servers. Raises: RuntimeError: a reply is not of `version`."""
    servers = settings.rollout.servers
    prompts = [prompt_tokens(row.question, tokenizer) for row in rows]
    chosen = [servers[(dist.get_rank() + i) % len(servers)] for i in range(len(rows))]
    with ThreadPoolExecutor(len(rows)) as pool:
        replies = list(pool.map(lambda server, prompt: ask(server, prompt, settings), chosen, prompts))
    served = {answer["meta_info"]["weight_version"] for answers in replies for answer in answers}
    if served != {version}:
        raise RuntimeError(f"replies come from weights of version {sorted(served)}, the trainer's are {version}")
    return [score(*one, tokenizer) for one in zip(rows, prompts, replies, strict=True)]


def ask(server: str, prompt: list[int], settings: Settings) -> list[dict[str, Any]]:
    """`group_size` answers to one prompt, sampled from the model's own distribution."""
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": settings.rollout.max_new_tokens}
    prompts = [prompt] * settings.train.group_size
    body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
    answers: list[dict[str, Any]] = post(f"{server}/generate", body, settings.rollout.timeout_s)
    return answers


def score(row: Row, prompt: list[int], replies: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Group:
    pairs = [reply["meta_info"]["output_token_logprobs"] for reply in replies]  # (logprob, token, ...) a token
    answers = [[token for _, token, *_ in answer] for answer in pairs]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    logprobs = [[logprob for logprob, *_ in answer] for answer in pairs]
    return Group(prompt, answers, logprobs, [reward(text, row) for text in texts])
