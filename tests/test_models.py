"""Model families and layouts on real servers: after a push, all that a server holds and says is as after a load.

One server a cell. It starts on the FP8 checkpoint of the weights B, the stock way, and is asked for all its bytes and
for tokens; then A is pushed, then B: bytes, tokens and logprobs have to be the first ones again, on every rank.

SGLang's Llama loader (of Mistral, too) drops block scales, so that no server of it starts on an FP8 checkpoint: there a
push has to serve what a stock server of the dequantized weights serves. The reference platform dequantizes before it
computes, so these are the same tokens and logprobs, not merely close ones.

`make test` runs three cells, `make models` all of them; it makes docs/models.md of what they record.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.local_server import CPU_ARGS, LocalServer
from sender import FP8BlockConfig, FP8Sender, export_checkpoint
from shared.launch import sglang_fp8_args
from shared.naming import scale_name
from shared.numerics import dequantize
from tests.zoo import CASES, Case

PROMPTS = [[11, 12, 13], [100, 200, 300, 400, 500], list(range(3, 40)), [999, 3, 999]]
LAYOUTS: dict[str, tuple[str, ...]] = {
    "TP 1": (),
    "TP 2": ("--tp-size", "2"),
    "TP 4": ("--tp-size", "4"),
    "TP 2, EP 2": ("--tp-size", "2", "--ep-size", "2"),
    "DP 2": ("--dp-size", "2"),
    "TP 2, DP 2": ("--tp-size", "2", "--dp-size", "2"),
}
REFUSED: dict[str, str] = {
    "--pp-size 2": "use --tp-size",
    "--speculative-algorithm NGRAM": "start without it",
    "--tp-size 2 --dp-size 2 --enable-dp-attention": "leave it out",
    "--enable-lora --max-lora-rank 8 --lora-target-modules all": "LoRA wraps the layers",
    "--tokenizer-worker-num 2": "its workers load no plugins",
}
IN_MAKE_TEST = {("qwen3_moe", "TP 2, EP 2"), ("deepseek_v3", "TP 2"), ("llama", "TP 1")}
CONSTANTS = ("cos_sin_cache", "inv_freq", ".k_scale", ".v_scale")  # of the configuration alone; unused ones
DROPS_SCALES = ("llama", "mistral")


def processes(layout: str) -> int:
    """How many ranks hold weights: experts are spread over the tensor-parallel ones."""
    words = dict(zip(LAYOUTS[layout][::2], LAYOUTS[layout][1::2], strict=True))
    return int(words.get("--tp-size", 1)) * int(words.get("--dp-size", 1))


def environment(layout: str) -> dict[str, str]:
    """One set of cores for each scheduler; a CUDA build of torch ships an NCCL that SGLang would try on a CPU."""
    if processes(layout) == 1:
        return {}
    cores = "|".join(str(rank % 2) for rank in range(processes(layout)))
    return {"SGLANG_CPU_OMP_THREADS_BIND": cores, "SGLANG_NCCL_SO_PATH": "none"}


def cells(drops_scales: bool) -> list[Any]:
    found = []
    for name, case in CASES.items():
        for layout in LAYOUTS:
            if layout in case.layouts and (name in DROPS_SCALES) == drops_scales:
                marks = [pytest.mark.server]
                if (name, layout) not in IN_MAKE_TEST:
                    marks.append(pytest.mark.models)
                found.append(pytest.param((case, layout), id=f"{name}-{layout}", marks=marks))
    return found


def served(server: LocalServer) -> list[dict[str, Any]]:
    """Greedy tokens and logprobs.

    From an empty KV cache, one prompt after the other, so that nothing depends on what is batched with what.
    """
    assert server.post("/flush_cache").status_code == 200
    replies = [reply for prompt in PROMPTS for reply in server.generate([prompt])]
    return [{"tokens": reply["tokens"], "logprobs": reply["logprobs"]} for reply in replies]


@pytest.fixture
def cell(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> tuple[Case, str]:
    case, layout = request.param
    record_property("family", case.name)
    record_property("layout", layout)
    return case, layout


@pytest.mark.parametrize("cell", cells(drops_scales=False), indirect=True)
def test_a_push_equals_a_load(
    cell: tuple[Case, str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    case, layout = cell
    model = case.make_model(2)
    export_checkpoint(model, tmp_path / "checkpoint", config=case.fp8, hf_config=case.hf_config())
    with started(case, layout, tmp_path / "checkpoint") as server:
        info = server.http.get("/fp8sync/info").json()
        assert (info["state"], info["version"]) == ("SERVING", 0), info["fence"]
        served(server)  # at TP 4 the first answer of a stock server, and only that, differs in its last bits
        wanted, loaded = served(server), server.probe()
        with FP8Sender([server.url], config=case.fp8) as sender:
            sender.push(case.make_model(1))
            between = server.probe()
            assert served(server) != wanted
            sender.push(model)
        assert_all_changed(between, loaded)
        assert server.probe() == loaded
        assert served(server) == wanted
        assert len(loaded) == processes(layout)
    record_property("result", "identical")


@pytest.mark.parametrize("cell", cells(drops_scales=True), indirect=True)
def test_a_push_serves_the_dequantized_weights(
    cell: tuple[Case, str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    case, layout = cell
    model = case.make_model(2)
    export_checkpoint(model, tmp_path / "checkpoint", config=case.fp8, hf_config=case.hf_config())
    with started(case, layout, tmp_path / "checkpoint") as server:
        info = server.http.get("/fp8sync/info").json()
        assert info["state"] == "FENCED" and "weight_scale_inv" in info["fence"]
        with FP8Sender([server.url], config=case.fp8) as sender:
            sender.push(case.make_model(1))
            before = served(server)
            sender.push(model)
            served(server)  # see above
        pushed = served(server)
    assert pushed != before
    dequantize_checkpoint(tmp_path / "checkpoint", tmp_path / "dequantized", case)
    with started(case, layout, tmp_path / "dequantized", plugin=False) as server:
        served(server)
        assert served(server) == pushed
    record_property("result", "as dequantized")


@pytest.mark.server
@pytest.mark.models
@pytest.mark.parametrize("flags", REFUSED)
def test_a_start_is_refused(flags: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("refusal", flags)
    folder = CASES["qwen3"].write_config(tmp_path / "no_weights")
    args = [*sglang_fp8_args(str(folder), FP8BlockConfig()), *CPU_ARGS, *flags.split()]
    with LocalServer(args, tmp_path / "refused.log") as server, pytest.raises(RuntimeError, match="ended"):
        server.wait(120.0)
    said = [line for line in server.log.read_text().splitlines() if line.startswith("fp8sync cannot be loaded")]
    assert len(said) == 1 and REFUSED[flags] in said[0]
    record_property("result", said[0])


def started(case: Case, layout: str, folder: Path, plugin: bool = True) -> LocalServer:
    args = ["--model-path", str(folder), *CPU_ARGS, *case.server_args, *LAYOUTS[layout]]
    args += ["--load-plugin", "fp8sync"] if plugin else []
    env = {**environment(layout), **case.server_env}
    server = LocalServer(args, folder.with_suffix(".log"), env=env)
    try:
        return server.wait(300.0)
    except BaseException:
        server.stop()
        raise


def dequantize_checkpoint(source: Path, target: Path, case: Case) -> None:
    """`target` holds the weights of FP8 checkpoint `source` in BF16, for a stock server without quantization."""
    held = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    plain = {
        name: dequantize(tensor, held[scale_name(name)], torch.bfloat16) if scale_name(name) in held else tensor
        for name, tensor in held.items()
        if not name.endswith("_scale_inv")
    }
    case.write_config(target)
    save_file(plain, target / "model.safetensors")


def assert_all_changed(before: list[dict[str, str]], after: list[dict[str, str]]) -> None:
    """Every tensor that a rank holds has other bytes for other weights, derived ones too, but for constants.

    What a model computes once and keeps would otherwise come back right with the weights that it was computed from.
    """
    for mine, other in zip(before, after, strict=True):
        same = [name for name in mine if mine[name] == other.get(name) and not name.endswith(CONSTANTS)]
        assert not same, f"equal for two sets of weights: {same}"
