"""What a trainer wraps around a model: which tensors a checkpoint has of it, under which names, and how to gather them.

FSDP2              parameters are DTensors under their own names
FSDP1              `sender.fsdp1`
DDP                `module.` in front
torch.compile      `_orig_mod.` somewhere
checkpointing      `_checkpoint_wrapped_module.` somewhere
PEFT               `base_model.model.` in front, `.base_layer` inside; adapters have to be merged
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sender.fsdp1 import fsdp1_parameters
from shared.errors import ConfigError
from shared.naming import canonical_name

# What is pushed of a parameter: fp32 ones are masters, and mixed precision computes with their BF16 values. It leaves
# buffers alone: a router's correction bias that training keeps in fp32 is pushed in fp32.
WIRE_DTYPES = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float16, torch.float32: torch.bfloat16}
_BUFFER_DTYPES = {dtype: dtype for dtype in WIRE_DTYPES}


class Held(Protocol):
    """A parameter that may be spread over the ranks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""

    @property
    def dtype(self) -> torch.dtype:
        """As training keeps it."""

    def whole(self, dtype: torch.dtype, receivers: Sequence[int] = (0,)) -> torch.Tensor:
        """Collective. The whole parameter in `dtype` on ranks `receivers`; what others get is not used."""

    def release(self) -> None:
        """Drop what `whole` kept for the next call."""

    def own_memory(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What `whole(dtype)` gives if that is the parameter's own memory, wherever it lies now; else None."""


class TensorHeld:
    """A tensor of this process, or a DTensor on any mesh: shards and replicas are put together."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def whole(self, dtype: torch.dtype, receivers: Sequence[int] = (0,)) -> torch.Tensor:
        tensor = self.tensor.detach().to(dtype)
        if isinstance(tensor, DTensor):  # under CPU offload, the group of its mesh may have collectives elsewhere only
            moved: Any = tensor.to(tensor.device_mesh.device_type)
            tensor = moved.full_tensor()
        return tensor

    def release(self) -> None:
        """Nothing is kept."""

    def own_memory(self, dtype: torch.dtype) -> torch.Tensor | None:
        spread = isinstance(self.tensor, DTensor)
        return self.tensor if self.tensor.dtype == dtype and not spread else None


def checkpoint_tensors(model: nn.Module) -> Iterator[tuple[str, tuple[Held, torch.dtype]]]:
    """Parameters and persistent floating-point buffers, each under the name that the bare model has for it and with
    the type in which it is pushed; the same on every rank.

    Raises:
        ConfigError: a tensor that cannot be pushed, or an adapter that is not merged.
    """
    names = _Names(model)
    held, in_fsdp1 = fsdp1_parameters(model)
    for raw_name, parameter in held:
        if (name := names.of(raw_name)) is not None:
            dtype = _wire_dtype(name, str(parameter.dtype), WIRE_DTYPES.get(parameter.dtype))
            yield name, (parameter, dtype)
    for raw_name, tensor, dtypes in _tensors(model):
        if id(tensor) not in in_fsdp1 and (name := names.of(raw_name)) is not None:
            if tensor.is_meta:
                raise ConfigError(f"{name}: it is on the meta device and has no values to push")
            packed = _packed_type(tensor)
            what = f"{packed} of {tensor.dtype}" if packed else str(tensor.dtype)
            dtype = _wire_dtype(name, what, None if packed else dtypes.get(tensor.dtype))
            yield name, (TensorHeld(tensor), dtype)


def _wire_dtype(name: str, what: str, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        text = f"{name}: a {what} cannot be pushed: train in bf16, fp16 or fp32; the push itself quantizes to FP8"
        raise ConfigError(text)
    return dtype


def _packed_type(tensor: torch.Tensor) -> str:
    """The class of a tensor, or of the shard in a DTensor, that stands for other bytes than its type says; else ""."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    packed = type(local).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return type(local).__name__ if packed else ""


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, dict[torch.dtype, torch.dtype]]]:
    """Parameters and persistent floating-point buffers, and the types in which they are pushed."""
    yield from ((name, parameter, WIRE_DTYPES) for name, parameter in model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
            persistent = name.rpartition(".")[2] not in module._non_persistent_buffers_set
            if persistent and buffer.is_floating_point():
                yield name, buffer, _BUFFER_DTYPES


class _Names:
    """From names in the trainer to names in a checkpoint.

    Raises:
        ConfigError: an adapter that is not merged: its base weights are not what the trainer computes with.
    """

    def __init__(self, model: nn.Module) -> None:
        self._inserted: set[str] = set()  # paths whose last part a wrapper put there
        self._adapted: list[str] = []  # paths of layers with merged adapters, a dot behind
        for path, module in model.named_modules():
            start = f"{path}." if path else ""
            if isinstance(module, (DistributedDataParallel, DataParallel)):
                self._inserted.add(f"{start}module")
            if hasattr(module, "peft_config") and hasattr(module, "base_model"):
                self._inserted |= {f"{start}base_model", f"{start}base_model.model"}
            if isinstance(getattr(module, "base_layer", None), nn.Module):
                _check_merged(path, module)
                self._inserted.add(f"{start}base_layer")
                self._adapted.append(start)
            if "original_module" in module._modules:
                raise ConfigError(
                    f"{path}: PEFT keeps two versions of it ({type(module).__name__}): {_MERGE_AND_UNLOAD}"
                )
            if isinstance(getattr(module, "prompt_encoder", None), nn.ModuleDict):
                raise ConfigError(
                    f"{path or 'model'}: a {type(module).__name__} with learned prompts, which no weights hold"
                )

    def of(self, raw_name: str) -> str | None:
        """The checkpoint name, None for a tensor of a merged adapter, which is in its base weight already."""
        if any(raw_name.startswith(p) and not raw_name.startswith(f"{p}base_layer.") for p in self._adapted):
            return None
        parts = raw_name.split(".")
        kept = [part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in self._inserted]
        if found := _ADAPTER_PARTS.intersection(parts):
            text = f"of an adapter ({', '.join(sorted(found))}) in a layer that does not say whether it is merged"
            raise ConfigError(f"{raw_name}: {text}: {_MERGE_AND_UNLOAD}")
        return canonical_name(".".join(kept))


_MERGE_AND_UNLOAD = "push model.merge_and_unload() of a copy"
_LORA = {f"lora_{part}" for part in ("A", "B", "a", "b", "embedding_A", "embedding_B", "magnitude_vector")}
_ADAPTER_PARTS = frozenset(_LORA | {"modules_to_save", "token_adapter"})


def _check_merged(path: str, module: nn.Module) -> None:
    if getattr(module, "merged", False) is not True:
        way = "model.merge_adapter(), push, model.unmerge_adapter()"
        raise ConfigError(f"{path}: a {type(module).__name__} with an adapter that is not merged: {way}")


def refuse_foreign(model: nn.Module) -> None:
    """Raises: NotImplementedError, ConfigError: a module whose parameters are not what a checkpoint holds; names it."""
    for path, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "megatron":
            raise NotImplementedError(f"{path}: a Megatron module ({type(module).__name__}) {_NOT_SUPPORTED}")
        fused = getattr(module, "gate_up_proj", None)
        unusual = getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True)
        if isinstance(fused, torch.Tensor) and unusual:
            text = "its experts are stored transposed or interleaved, which no block-FP8 checkpoint is"
            raise ConfigError(f"{path}: {text}; give its tensors to FP8Sender.push_shards")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "tensor_model_parallel") or hasattr(parameter, "partition_dim"):
            raise NotImplementedError(f"{name}: a Megatron-style tensor-parallel parameter {_NOT_SUPPORTED}")


_NOT_SUPPORTED = (
    "cannot be pushed as a model: push takes FSDP2, FSDP1, DDP and unsharded modules with Hugging Face names. "
    "Use FP8Sender.push_shards for it."
)


def reshard(modules: Iterable[nn.Module]) -> None:
    """Give every FSDP2 module among them its sharded parameters back.

    After a forward without backward, a module may still hold the gathered copies of before the optimizer's step (the
    root always does, by default); reading those would push old weights.
    """
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()
