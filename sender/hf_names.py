"""Which checkpoint tensors a trainer's parameters are cut into, as `save_pretrained` would write them.

Transformers 5 keeps some weights in another form than checkpoints do: experts fused, modules renamed. How each family
goes back is known to Transformers, which says it by running it: here on tensors without values, where every result
that is a view of one parameter shows where it was cut. Other modules, and experts that Transformers writes fused, are
cut by their structure (`shared.naming.pieces`).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shared.errors import ConfigError
from shared.naming import Piece, pieces

Shapes = Mapping[str, tuple[int, ...]]
_FUSED_EXPERTS = ("gate_up_proj", "down_proj")
_PUSH_SHARDS = "give its checkpoint tensors to FP8Sender.push_shards"


@dataclass(frozen=True)
class Cut:
    """One checkpoint tensor in a row-major parameter: its first element and the distance to the next, per dimension."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """[shape], contiguous; of the parameter's own memory where that is possible."""
        flat = parameter.contiguous().view(-1)[self.offset :]
        return flat.as_strided(self.shape, self.strides).contiguous()


Cuts = dict[str, tuple[Cut, ...]]


def checkpoint_cuts(model: nn.Module, shapes: Shapes) -> Cuts:
    """For each parameter or buffer in `shapes` (by canonical name), the checkpoint tensors that it holds.

    Raises:
        ConfigError: a tensor that a checkpoint holds in a form that no cut gives; experts stored transposed.
    """
    hf_model = _hf_model(model)
    if hf_model is None:
        return {name: tuple(_by_structure(name, shape, shapes)) for name, shape in shapes.items()}
    key = tuple(shapes.items())
    if hf_model not in _known or _known[hf_model][0] != key:
        _known[hf_model] = (key, _by_transformers(hf_model, shapes))
    return _known[hf_model][1]


_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Cuts]] = weakref.WeakKeyDictionary()


def _hf_model(model: nn.Module) -> nn.Module | None:
    """The Transformers model whose parameters `model` names, wrappers aside; None if it is none of Transformers 5."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or "transformers.core_model_loading" not in sys.modules:
        return None
    return next((module for module in model.modules() if isinstance(module, modeling.PreTrainedModel)), None)


def _by_structure(name: str, shape: tuple[int, ...], shapes: Shapes) -> Iterator[Cut]:
    _check_experts(name, shape, shapes)
    strides = _row_major(shape)
    for piece in pieces(name, shape):
        yield Cut(piece.name, piece.shape, strides[len(shape) - len(piece.shape) :], _offset(piece, strides))


def _offset(piece: Piece, strides: tuple[int, ...]) -> int:
    return 0 if piece.expert is None else piece.expert * strides[0] + piece.first_row * strides[1]


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _check_experts(name: str, shape: tuple[int, ...], shapes: Shapes) -> None:
    """Fused experts as [E, 2I, H] and [E, H, I] can be cut; the other way round they would be cut wrongly, unseen."""
    prefix, _, leaf = name.rpartition(".")
    down = shapes.get(f"{prefix}.down_proj", ())
    if leaf == "gate_up_proj" and len(shape) == len(down) == 3 and (shape[1], shape[2]) != (2 * down[2], down[1]):
        raise ConfigError(
            f"{name} {list(shape)}, with down_proj {list(down)}: experts that are stored transposed; {_PUSH_SHARDS}"
        )


def _by_transformers(hf_model: nn.Module, shapes: Shapes) -> Cuts:
    revert: Any = sys.modules["transformers.core_model_loading"].revert_weight_conversion
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    owners = {tensor.untyped_storage()._cdata: name for name, tensor in empty.items()}
    with torch.no_grad(), _NoCopies():
        reverted: dict[str, torch.Tensor] = revert(hf_model, dict(empty))
    cuts: dict[str, list[Cut]] = {name: [] for name in shapes}
    for name, tensor in reverted.items():
        owner = owners.get(tensor.untyped_storage()._cdata)
        if owner is None:
            raise ConfigError(f"{name}: a checkpoint holds it computed from several parameters; {_PUSH_SHARDS}")
        cuts[owner] += _cuts_of(name, tensor, shapes[owner], shapes)
    for name, found in cuts.items():
        if sum(prod(cut.shape) for cut in found) != prod(shapes[name]):
            raise ConfigError(f"{name}: a checkpoint does not hold all of it; {_PUSH_SHARDS}")
    return {name: tuple(found) for name, found in cuts.items()}


def _cuts_of(name: str, tensor: torch.Tensor, shape: tuple[int, ...], shapes: Shapes) -> Iterator[Cut]:
    as_it_is = tuple(tensor.shape) == shape and tensor.is_contiguous()
    if as_it_is and len(shape) == 3 and name.endswith(_FUSED_EXPERTS):
        yield from _by_structure(name, shape, shapes)
    else:
        yield Cut(name, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


class _NoCopies(TorchDispatchMode):
    """`contiguous()` gives back what it is called on, so that a cut stays a view of what it was cut from."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return args[0]
        return func(*args, **(kwargs or {}))
