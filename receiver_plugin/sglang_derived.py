"""What SGLang's models compute from their parameters after a load (0.5.16 to 0.5.23), and how to compute it again.

    MLA (DeepSeek and its kin)   `post_load_weights` splits kv_b_proj into w_kc and w_vc
    GemmaRMSNorm                 the buffer gemma_weight is weight + 1

Neither is in a checkpoint. A loader derives them at the end of a load; a push derives them right after its commit copy,
by the same code, into the same memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from torch import nn

from receiver_plugin.held import plain_tensors
from receiver_plugin.recorder import Call
from shared.errors import CommitError


class SglangDerived:
    """The derived tensors of `model`. `buffers` by name; `deferred` are the methods that a traced load puts off."""

    deferred: tuple[str, ...] = ("post_load_weights",)

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        norms = [(name, m) for name, m in model.named_modules() if type(m).__name__ == "GemmaRMSNorm"]
        self._norms = [module for _, module in norms]
        self.buffers = tuple(f"{name}.gemma_weight" for name, _ in norms)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """While a load is traced: loaders ask where an expert lies for each of its tensors, by reading a tensor."""
        location = get_global_expert_location_metadata()
        if location is None:  # a model without experts
            yield
            return
        location.logical_to_all_physical = cache(location.logical_to_all_physical)
        try:
            yield
        finally:
            del location.logical_to_all_physical

    def refresh(self, calls: Iterable[Call]) -> None:
        """Derive all again from the parameters as they are now. `calls`: what the traced load put off.

        Raises:
            CommitError: a derived tensor moved, so that a captured CUDA graph would read its old memory.
        """
        before = _addresses(self._model)
        for norm in self._norms:
            torch.add(norm.weight.data, 1.0, out=norm.gemma_weight)
        for call in calls:
            call.run()
        after = _addresses(self._model)
        if moved := sorted(name for name, address in before.items() if after.get(name) != address):
            raise CommitError(f"derived again, {moved[0]} moved in memory ({len(moved)} in all)")


def _addresses(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in plain_tensors(model) if _holds_address(tensor)}


def _holds_address(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph may have captured where `tensor` lies."""
    return tensor.is_cuda
