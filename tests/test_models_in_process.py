"""Every family, on every rank of every layout: a push leaves the bytes that a start with the checkpoint leaves.

Real SGLang models without servers (`tests/in_process.py`). Bytes of parameters, buffers, and of tensors that a model
holds besides, such as what it derives from its parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from receiver_plugin.sglang_engine import _backends, _unsafe_layers
from sender import export_checkpoint
from tests.in_process import check_together, differences, one_thread, replay, same_bytes, sglang_rank, tensors_of
from tests.zoo import CASES

Exported = Callable[[str], tuple[Path, nn.Module]]


@dataclass(frozen=True)
class Layout:
    tp_size: int = 1
    ep_size: int = 1
    args: tuple[str, ...] = ()
    num_held: int | None = None  # experts in a layer of a rank, where that is what the layout is about


DENSE = {"TP 1": Layout(), "TP 2": Layout(2), "TP 4": Layout(4)}
EXPERTS = {**DENSE, "TP 2, EP 2": Layout(2, 2, num_held=4), "TP 4, EP 2": Layout(4, 2), "TP 4, EP 4": Layout(4, 4)}
DP_ATTENTION = Layout(2, 2, ("--dp-size", "2", "--enable-dp-attention", "--moe-dense-tp-size", "1"))
REDUNDANT = Layout(2, 2, ("--ep-num-redundant-experts", "2"), num_held=5)
FUSED = Layout(2, 1, ("--enforce-shared-experts-fusion",), num_held=9)
SPECIAL = {
    ("qwen3_moe", "redundant experts"): REDUNDANT,
    ("qwen3_moe", "DP attention"): DP_ATTENTION,
    ("glm4_moe", "DP attention"): DP_ATTENTION,
    ("deepseek_v3", "redundant experts"): REDUNDANT,
    ("deepseek_v3", "DP attention"): DP_ATTENTION,
    ("deepseek_v3", "fused shared experts"): FUSED,
}
# SGLang's Llama loader drops block scales, at start-up too: the scales of a push are held against the checkpoint's.
DROPS_SCALES = ("llama", "mistral")


def cells() -> list[Any]:
    found = {}
    for name, case in CASES.items():
        layouts = EXPERTS if any("expert" in key for key in case.config) else DENSE
        found.update({(name, key): layout for key, layout in layouts.items() if layout.tp_size <= case.max_tp})
    found.update(SPECIAL)
    return [pytest.param(name, layout, id=f"{name}: {key}") for (name, key), layout in found.items()]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    @cache
    def export(name: str) -> tuple[Path, nn.Module]:
        """The folder of an FP8 checkpoint, and the trainer whose weights it holds."""
        folder, trainer = tmp_path_factory.mktemp(name), CASES[name].make_model(seed=11)
        export_checkpoint(trainer, folder, hf_config=CASES[name].hf_config(), config=CASES[name].fp8)
        return folder, trainer

    return export


@pytest.mark.parametrize(("name", "layout"), cells())
def test_a_push_equals_a_start_with_the_checkpoint(
    name: str, layout: Layout, exported: Exported, record_property: Callable[[str, object], None]
) -> None:
    case, (folder, trainer), findings = CASES[name], exported(name), []
    other = case.make_model(seed=12)
    args = (*case.server_args, *layout.args)
    with mock.patch.dict(os.environ, dict(case.server_env)):
        for number in range(layout.tp_size):
            with sglang_rank(folder, number, layout.tp_size, layout.ep_size, args) as rank:
                loaded, pushed = rank.load(), rank.start()
                assert _unsafe_layers(pushed, _backends((0, 0))) == [], "the server would refuse to start"
                before = addresses(pushed)
                replay(pushed, other, case.fp8)
                assert differences(loaded, pushed), "two trainers, one result"
                findings.append(replay(pushed, trainer, case.fp8))
            dropped = llama_scales(folder, number, layout.tp_size, case.config) if name in DROPS_SCALES else {}
            assert differences(loaded, pushed) == sorted(dropped), f"rank {number}"
            held = tensors_of(pushed)
            assert [name for name, scale in dropped.items() if not same_bytes(held[name], scale)] == []
            assert changed(before, addresses(pushed)) == [], f"moved in memory on rank {number}"
            experts = {len(tensor) for name, tensor in held.items() if name.endswith("w13_weight")}
            assert layout.num_held is None or experts == {layout.num_held}
    check_together(trainer, findings, case.fp8)
    record_property("result", "identical")


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors_of(model).items()}


def changed(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def llama_scales(folder: Path, rank: int, tp_size: int, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The block scales that `rank` should hold, cut from those of the checkpoint by Llama's own rules."""
    scales = {n: s for file in folder.glob("*.safetensors") for n, s in load_file(file).items() if "_scale_inv" in n}
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, scale in scales.items():
        *path, part, leaf = name.split(".")
        heads = config["num_key_value_heads"] if part in ("k_proj", "v_proj") else tp_size
        num_cuts = min(tp_size, heads)  # ranks share a key-value head where there are more of them
        cuts = scale.chunk(num_cuts, dim=1 if part in ("o_proj", "down_proj") else 0)
        parts.setdefault(".".join([*path, fused.get(part, part), leaf]), {})[part] = cuts[rank * num_cuts // tp_size]
    order = [*fused, "o_proj", "down_proj"]
    return {name: torch.cat([found[part] for part in order if part in found]) for name, found in parts.items()}


# ---- the harness itself


@pytest.fixture
def process() -> Iterator[None]:
    """What a test may not leave changed."""
    environment = {**os.environ, "PYTEST_CURRENT_TEST": ""}
    yield
    assert not dist.is_initialized() and {**os.environ, "PYTEST_CURRENT_TEST": ""} == environment


@pytest.mark.usefixtures("process")
def test_ranks_hold_different_parts_and_leave_nothing_behind(exported: Exported) -> None:
    folder, _ = exported("qwen3")
    models = []
    for number in range(2):
        with sglang_rank(folder, number, tp_size=2) as rank:
            models.append(rank.load())
            with pytest.raises(RuntimeError, match="a process group is open"), sglang_rank(folder):
                pass
    with sglang_rank(folder) as rank:
        whole = rank.load()
        assert differences(whole, rank.load()) == [] and differences(whole, rank.start()) != []
        assert all(tensor.is_meta for tensor in rank.build("meta").parameters())
        assert differences(whole, rank.load()) == [], "a model on meta left something behind"
    name = "model.layers.0.mlp.down_proj.weight"
    halves = [dict(model.named_parameters())[name].view(torch.uint8) for model in models]
    assert torch.equal(torch.cat(halves, dim=1), dict(whole.named_parameters())[name].view(torch.uint8))


def test_differences_are_seen_wherever_a_module_holds_a_tensor(exported: Exported) -> None:
    with sglang_rank(exported("qwen3")[0]) as rank:
        one, other = rank.load(), rank.load()
    vars(one)["derived"], vars(other)["derived"] = {"w": [torch.zeros(2)]}, {"w": [torch.tensor([0.0, -0.0])]}
    next(other.parameters()).detach().view(torch.uint8)[0, 0] ^= 1
    name = next(name for name, _ in other.named_parameters())
    assert differences(one, other) == sorted(["derived.w.0", name])
