"""What SGLang's models compute from their parameters after a load (0.5.16 to 0.5.23), and how to compute it again.

    MLA (DeepSeek and its kin)   `post_load_weights` splits kv_b_proj into w_kc and w_vc
    GemmaRMSNorm                 the buffer gemma_weight is weight + 1
    routers of GLM-4, older ones the buffer _weight_fp32 is weight in fp32, made by the first forward

Neither is in a checkpoint. A loader derives them at the end of a load; a push derives them right after its commit copy,
by the same code, into the same memory. Whatever else a module keeps besides its parameters may be derived as well, by
code that is not known here: `unknown_tensors` finds it, and servers that have any are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from torch import nn

from receiver_plugin.held import modules, plain_tensors
from receiver_plugin.recorder import Call
from shared.errors import CommitError


class SglangDerived:
    """The derived tensors of `model`. `buffers` by name; `deferred` are the methods that a traced load puts off."""

    deferred: tuple[str, ...] = ("post_load_weights",)

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        norms = [(name, m) for name, m in model.named_modules() if type(m).__name__ == "GemmaRMSNorm"]
        self._norms = [module for _, module in norms]
        routers = (m for m in model.modules() if "_weight_fp32" in m._buffers and "weight" in m._parameters)
        self._routers: list[Any] = list(routers)
        self.buffers = tuple(f"{name}.gemma_weight" for name, _ in norms)
        self._halves = [name for name, _ in plain_tensors(model) if name.rpartition(".")[2] in _MLA]

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
            CommitError: a derived tensor moved, so that a captured CUDA graph would read its old memory; or the load
                left out the method that derives it.
        """
        calls = tuple(calls)
        if self._halves and not calls:
            raise CommitError(
                f"{self._halves[0]} stays that of the old weights: load_weights calls no {self.deferred[0]}"
            )
        if not (calls or self._norms or self._routers):
            return
        before = _addresses(self._model)
        for norm in self._norms:
            torch.add(norm.weight.data, 1.0, out=norm.gemma_weight)
        for router in self._routers:
            if router._weight_fp32 is not None:
                router._weight_fp32.copy_(router.weight)
        for call in calls:
            call.run()
        after = _addresses(self._model)
        if moved := sorted(name for name, address in before.items() if after.get(name) != address):
            raise CommitError(f"derived again, {moved[0]} moved in memory ({len(moved)} in all)")


def unknown_tensors(model: nn.Module) -> Iterator[str]:
    """Names of tensors that may be computed from the weights of `model`, in a way that `SglangDerived` does not know.

    All floating-point tensors of more than one element that modules hold as attributes (in lists, dicts and SGLang's
    dataclasses too), as buffers that no checkpoint has, or as attributes of parameters; but for those that lie in the
    memory of a parameter, those that are derived again, and constants that SGLang makes from the configuration.
    """
    layers = modules(model)
    stored = {_storage(tensor) for layer in layers.values() for tensor in _of_checkpoints(layer)}
    for prefix, layer in layers.items():
        if type(layer).__module__.startswith(_ROPE):
            continue
        held = {name: value for name, value in vars(layer).items() if name not in _TORCH_OWN}
        parameters = {name: vars(p) for name, p in layer._parameters.items() if p is not None}
        for name, tensor in _tensors_in(prefix, {**held, **layer._buffers, **parameters}):
            leaf = name.rpartition(".")[2]
            if leaf in _CONSTANTS or (leaf in _MLA and hasattr(layer, "kv_b_proj")):
                continue
            if leaf == "gemma_weight" and type(layer).__name__ == "GemmaRMSNorm":
                continue
            if leaf == "_weight_fp32" and "weight" in layer._parameters:
                continue
            if tensor.is_floating_point() and tensor.numel() > 1 and _storage(tensor) not in stored:
                yield name


_MLA = ("w_kc", "w_vc", "w_scale", "w_scale_k", "w_scale_v")
_ROPE = "sglang.srt.layers.rotary_embedding"  # holds nothing but tables of angles
_CONSTANTS = ("inv_freq", "original_inv_freq", "freqs_cis", "freqs_cache", "cos_cache", "sin_cache", "mup_vector")
# Attributes of every module, of torch: its tensors have their turn, and hooks hold none.
_TORCH_OWN = frozenset(vars(nn.Module()))


_PLAIN = (str, bytes, int, float, type(None), nn.Module)  # most of what there is: no tensors, or those of another turn
_DEPTH = 3  # of containers in containers; two are the most that SGLang has


def _tensors_in(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    items: dict[Any, Any] = {}
    if isinstance(value, dict):
        items = value
    elif isinstance(value, (list, tuple)):
        items = dict(enumerate(value))
    elif is_dataclass(value) and type(value).__module__.startswith("sglang."):  # not the model's whole configuration
        items = vars(value)
    if depth <= _DEPTH:
        for key, item in items.items():
            if not isinstance(item, _PLAIN):
                yield from _tensors_in(f"{name}.{key}" if name else str(key), item, depth + 1)


def _of_checkpoints(layer: nn.Module) -> Iterator[torch.Tensor]:
    """What a push writes: parameters and persistent buffers."""
    buffers = ((name, b) for name, b in layer._buffers.items() if name not in layer._non_persistent_buffers_set)
    yield from (tensor for _, tensor in chain(layer._parameters.items(), buffers) if tensor is not None)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _addresses(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in plain_tensors(model) if _holds_address(tensor)}


def _holds_address(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph may have captured where `tensor` lies."""
    return tensor.is_cuda
