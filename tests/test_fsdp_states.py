"""What FSDP2 holds when `push` is called depends on what the training loop did last; what is pushed must not."""

from __future__ import annotations

from typing import Any

import torch

from receiver_plugin.probe import fingerprint
from tests.test_distributed import gathered, make_sender, make_sharded
from tests.test_push_memory import Server, expected
from tests.test_ranks import run_on_ranks
from tests.tiny_models import Trainer


def forward(model: Trainer) -> torch.Tensor:
    """Something that reads parameters of the root and of a layer."""
    return model.get_parameter("model.embed_tokens.weight").float().sum()


def push_after_evaluation(rank: int) -> Any:
    server = Server() if rank == 0 else None
    model = make_sharded(2)
    sharded = list(model.parameters())
    type(model).forward = forward
    with torch.no_grad():
        model()  # the root keeps the gathered parameters of before the step below
        plain = not hasattr(model.get_parameter("model.embed_tokens.weight"), "full_tensor")
        for parameter in sharded:  # what an optimizer does: it has the sharded parameters
            parameter.to_local().mul_(3.0)  # type: ignore[attr-defined]
    with make_sender(server) as sender:
        sender.push(model)
        whole = gathered(model)
    return plain, server is None or fingerprint(server.model) == expected(whole)


def test_a_forward_without_backward_before_the_step() -> None:
    for plain, same in run_on_ranks(push_after_evaluation, 2):
        assert plain, "the case is not staged: this torch reshards the root"
        assert same
