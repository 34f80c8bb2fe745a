"""The parts of `benchmarks.push` that need no server: what is sent, what is expected, what is counted."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import push
from benchmarks.expected import compare, expected, fused, place
from benchmarks.limits import Limits
from benchmarks.proofs import follows, steps_in_graphs
from benchmarks.push_arguments import arguments, server_args
from benchmarks.scaling import summary
from benchmarks.shapes import MODELS, Trainer, with_experts, with_layers
from benchmarks.stock_route import BUCKET_BYTES, Grouped, buckets, flat, layout_of, quantized
from benchmarks.table import FLATTENED, Pushed, Row, as_json, table
from shared.config import FP8BlockConfig
from shared.numerics import quantize_reference

CONFIG, CPU = FP8BlockConfig(), torch.device("cpu")


@pytest.fixture(scope="module")
def moe() -> Trainer:
    trainer = Trainer(MODELS["tiny-moe"], CPU)
    trainer.fill(1)
    return trainer


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


# What is trained


def test_weights_follow_each_fill_and_a_seed_gives_the_same_again(moe: Trainer) -> None:
    before = expected(moe.weights, CONFIG)
    moe.fill(2)
    wrong, beside = compare(expected(moe.weights, CONFIG), before)
    assert wrong == list(before) and not beside
    moe.fill(1)
    assert expected(moe.weights, CONFIG) == before
    assert sum(parameter.nbytes for parameter in moe.model.parameters()) == moe.num_bytes


def test_the_shapes_are_those_of_the_real_models() -> None:
    for name, num_weights in (("qwen3-8b", 8_190_735_360), ("qwen3-30b-a3b", 30_532_122_624)):
        with torch.device("meta"):
            model = MODELS[name].model_class(MODELS[name].make_config())
        assert sum(parameter.numel() for parameter in model.parameters()) == num_weights
    assert with_layers(MODELS["qwen3-8b"], 3).make_config().num_hidden_layers == 3
    assert with_layers(MODELS["qwen3-8b"], None) is with_experts(MODELS["qwen3-8b"], None) is MODELS["qwen3-8b"]
    assert with_experts(MODELS["qwen3-30b-a3b"], 16).make_config().num_experts == 16
    for name in ("qwen3-8b", "qwen3-30b-a3b"):
        with pytest.raises(ValueError, match="cannot have 4 experts"):
            with_experts(MODELS[name], 4)


def test_memory_that_is_given_back() -> None:
    trainer = Trainer(MODELS["tiny"], CPU)
    trainer.free()
    assert not trainer.weights and all(parameter.is_meta for parameter in trainer.model.parameters())


# What SGLang's own route is sent


def test_buckets_keep_the_order_and_the_size() -> None:
    sizes = [3, 4, 20, 1, 9, 1]
    tensors = [(str(number), torch.zeros(size, dtype=torch.uint8)) for number, size in enumerate(sizes)]
    made = [[tensor.nbytes for _, tensor in bucket] for bucket in buckets(tensors, 10)]
    assert made == [[3, 4], [20], [1, 9], [1]]
    assert list(buckets([], 10)) == []


def test_flat_takes_what_lies_in_a_row_as_it_is_and_copies_the_rest() -> None:
    memory = torch.arange(64, dtype=torch.uint8)
    row = [("a", memory[8:16].view(2, 4)), ("b", memory[16:32].view(torch.float32)), ("c", memory[32:33])]
    assert torch.equal(flat(row), memory[8:33]) and flat(row).data_ptr() == memory.data_ptr() + 8
    for parts in ([row[0], row[2]], [row[1], row[0]], [row[0], ("x", torch.ones(3, dtype=torch.uint8))]):
        made = flat(parts)
        assert torch.equal(made, torch.cat([raw(part) for _, part in parts]))
        assert made.data_ptr() != parts[0][1].data_ptr()
    across = [("t", memory[:16].view(4, 4).t()), ("u", memory[16:20])]
    assert torch.equal(flat(across), torch.cat([raw(memory[:16].view(4, 4).t()), memory[16:20]]))


def test_grouped_buckets_hold_what_tensor_by_tensor_gives(moe: Trainer) -> None:
    made = [(name, raw(tensor).clone()) for bucket in Grouped(moe.weights, CONFIG).buckets() for name, tensor in bucket]
    wanted = [(name, raw(tensor)) for name, tensor in quantized(moe.weights, CONFIG)]
    assert [name for name, _ in made] == [name for name, _ in wanted]
    assert all(torch.equal(mine, other) for (_, mine), (_, other) in zip(made, wanted, strict=True))


def test_real_buckets_have_no_gaps_and_are_sent_as_they_lie() -> None:
    for name in ("qwen3-8b", "qwen3-30b-a3b"):
        with torch.device("meta"):
            model = with_layers(MODELS[name], 1).model_class(with_layers(MODELS[name], 1).make_config())
        weights = {name: weight for name, weight in model.named_parameters() if ".experts." not in name}
        weights["model.layers.0.mlp.experts.0.up_proj.weight"] = torch.empty(768, 2048, device="meta")
        in_bf16 = {name: weight.bfloat16() for name, weight in weights.items()}
        for bucket in layout_of(in_bf16, CONFIG, BUCKET_BYTES).buckets:
            assert sum(slot.num_bytes for slot in bucket.slots) == bucket.num_bytes


# What a server has to hold


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("model.layers.3.self_attn.v_proj.weight", ("model.layers.3.self_attn.qkv_proj.weight", 0, 2)),
        ("model.layers.3.mlp.gate_proj.weight", ("model.layers.3.mlp.gate_up_proj.weight", 0, 0)),
        ("model.layers.3.mlp.gate.weight", ("model.layers.3.mlp.gate.weight", 0, 0)),
        ("model.layers.3.self_attn.q_norm.weight", ("model.layers.3.self_attn.q_norm.weight", 0, 0)),
        ("model.layers.3.mlp.experts.17.up_proj.weight", ("model.layers.3.mlp.experts.w13_weight", 17, 1)),
        ("model.layers.3.mlp.experts.17.down_proj.weight", ("model.layers.3.mlp.experts.w2_weight", 17, 0)),
        ("lm_head.weight", ("lm_head.weight", 0, 0)),
    ],
)
def test_where_a_checkpoint_tensor_goes(name: str, target: tuple[str, int, int]) -> None:
    assert place(name) == target


def test_parameters_are_put_together_from_any_order(moe: Trainer) -> None:
    made = dict(fused(dict(reversed(moe.weights.items())), CONFIG))
    assert len(made) == 2 * (4 * 2 + 5) + 3 and "lm_head.weight" in made
    prefix = "model.layers.1.mlp.experts"
    up, scale = quantize_reference(moe.weights[f"{prefix}.5.up_proj.weight"])
    rows, scale_rows = up.shape[0], scale.shape[0]
    assert torch.equal(raw(made[f"{prefix}.w13_weight"][5, rows:]), raw(up))
    assert torch.equal(made[f"{prefix}.w13_weight_scale_inv"][5, scale_rows:], scale)
    assert made["model.embed_tokens.weight"].shape[0] == 1024 and not made["model.embed_tokens.weight"][1000:].any()
    codes, _ = quantize_reference(moe.weights["model.layers.0.self_attn.k_proj.weight"])
    assert torch.equal(raw(made["model.layers.0.self_attn.qkv_proj.weight"][512:768]), raw(codes))


def test_compare_names_what_differs_and_what_is_beside_it() -> None:
    assert compare({"a": "1", "b": "2", "more": "3"}, {"a": "1", "b": "x", "c": "4"}) == (["b", "c"], ["more"])


# What is counted


def pushes(*seconds: float) -> list[Pushed]:
    return [Pushed(total_s=s, thread_s=s / 2, process_s=s, phases={"send": s / 4, "stood still": 0.0}) for s in seconds]


def test_the_table_has_ratios_and_failures() -> None:
    rows = [
        Row(
            way="ours",
            num_bytes=10**9,
            prepare_s=1.0,
            pushes=pushes(0.9, 0.2, 0.3, 0.25),
            extra_bytes=5 * 10**8,
            bucket_bytes=2 * 10**8,
        ),
        Row(way=FLATTENED, num_bytes=10**9, pushes=pushes(3.0, 0.5)),
        Row(way="broken", failed="RuntimeError: a\nb | c"),
        Row(way="left", note="left out"),
    ]
    text = table(rows, Limits(device="cpu", wire=10e9, copied=100e9))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert len({len(line) for line in lines}) == 1
    cells = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines}
    assert cells["limit: the wire, 10.0 GB/s"]["later"] == "100"
    assert cells["limit: a copy, 100 GB/s read and written"]["later"] == "20.0"
    mine = cells["ours"]
    assert (mine["first"], mine["later"], mine["first / later"]) == ("900", "250 (200 to 300)", "3.60")
    assert (mine["to the wire"], mine["to the flattened bucket"], mine["send"]) == ("2.50", "0.50", "62.5")
    assert (mine["CPU, Python thread"], mine["CPU, process"], mine["plan"]) == ("125", "250", "")
    assert (mine["memory, GB"], mine["memory, buckets"]) == ("0.5", "2.50")
    assert cells["broken"]["note"] == "failed: RuntimeError: a b / c" and cells["left"]["note"] == "left out"


def test_a_way_that_fails_is_a_row_and_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = push.Run(arguments(None, ["--model", "tiny", "--plane", "tcp", "--out", str(tmp_path)]))

    def wrong() -> str:
        raise AssertionError("another byte")

    good = Row(way="good", num_bytes=8, pushes=pushes(1.0, 1.0))
    run.row("good", lambda: good.model_copy(), lambda: "proved")
    assert run.rows[0].note == "proved" and not run.rows[0].failed
    run.row("bad", lambda: good.model_copy(), wrong, lambda: "never reached")
    run.row("after", lambda: good.model_copy())
    run.row("two", lambda: [Row(way="a"), Row(way="b")], lambda: "of both")
    assert [bool(row.failed) for row in run.rows] == [False, True, False, False, False]
    assert [(row.way, row.note) for row in run.rows[3:]] == [("a", ""), ("b", "of both")]
    assert run.end() == 1 and run.end() == 1
    written = json.loads((tmp_path / "tiny-all.json").read_text())
    assert [row["failed"] for row in written["rows"]] == ["", "AssertionError: another byte", "", "", ""]
    assert capsys.readouterr().out.count("| way ") == 1


def test_pushes_of_several_sizes_are_one_table() -> None:
    def run(layers: int, num_bytes: int, *rows: Row) -> dict[str, object]:
        limits = Limits(device="cpu", wire=10e9, copied=100e9)
        about = {"chosen": {"model": "m"}, "num_layers": layers, "num_experts": 0}
        return as_json([Row(way="push", num_bytes=num_bytes, pushes=pushes(1.0, 0.5)), *rows], limits, about)

    failed, once = Row(way="x", failed="no"), Row(way="y", num_bytes=1, pushes=pushes(1.0))
    lines = summary([run(9, 2 * 10**9), run(10, 10**9, failed, once)]).splitlines()[2:]
    assert lines == [
        "| m | 10 | 0 | push | 1 | 1000.0 | 500.0 | 2.0 | 5.00 |",
        "| m | 9 | 0 | push | 2 | 1000.0 | 500.0 | 4.0 | 2.50 |",
    ]


# What is asked, and what servers are told


def asked(*words: str) -> list[str]:
    return ["--out", "x", *words]


def test_ways_come_in_one_order_and_files_are_named_by_the_size() -> None:
    chosen = arguments(None, asked("--model", "qwen3-30b-a3b", "--layers", "24", "--experts", "16", "--fsdp", "--bf16"))
    assert chosen.ways == ["ours", "peers", "bf16", "fsdp"] and chosen.label == "qwen3-30b-a3b-24-layers-16-experts"
    assert chosen.case.make_config().num_experts == 16 and chosen.case.make_config().num_hidden_layers == 24
    assert arguments(None, asked("--only", "fsdp", "--bf16")).ways == ["bf16", "fsdp"]
    assert arguments(None, asked("--only", "peers")).ways == ["peers"]
    assert arguments(None, asked()).ways == ["ours", "peers"]
    for words in (["--experts", "16"], ["--load", "1", "0"]):
        with pytest.raises(SystemExit):
            arguments(None, asked("--model", "qwen3-8b", *words))


def test_a_server_has_room_for_the_most_streams() -> None:
    def told(on_gpu: bool, *words: str) -> dict[str, str]:
        args = server_args(arguments(None, asked(*words)), on_gpu)
        return {name: value for name, value in pairwise(args) if name.startswith("--")}

    idle = told(True)
    assert (idle["--max-total-tokens"], idle["--cuda-graph-max-bs"], idle["--max-running-requests"]) == (
        *("32768", "8", "16"),
    )
    assert idle["--fp8-gemm-backend"] == "triton" and "--incremental-streaming-output" not in idle
    busy = told(True, "--load", "1", "64", "8", "--fp8-gemm-backend", "deep_gemm", "--load-tokens", "936")
    assert (busy["--max-total-tokens"], busy["--cuda-graph-max-bs"]) == ("64000", "64")
    assert (busy["--max-running-requests"], busy["--fp8-gemm-backend"]) == ("128", "deep_gemm")
    cpu = server_args(arguments(None, asked("--model", "tiny", "--load", "12", "--server-arg=--x")), False)
    assert cpu[-6:] == [
        *("--max-running-requests", "12", "--max-total-tokens", "6144", "--incremental-streaming-output", "--x"),
    ]


# What is proved of generation


def reply(*tokens: int, logprob: float = -0.5) -> dict[str, list[float]]:
    return {"tokens": list(tokens), "logprobs": [logprob - token for token in tokens]}


def test_generation_has_to_follow_the_weights() -> None:
    first, other = [reply(1, 2), reply(3)], [reply(1, 2, logprob=-0.25), reply(4)]
    assert follows(first, other, first).startswith("3 tokens")
    for second, third, why in (
        ([other[0], first[1]], first, "prompt 1: the same reply"),
        (other, [first[0], reply(3, logprob=-0.5000001)], "prompt 1: .* again"),
        ([other[0], reply(4, logprob=float("nan"))], first, "prompt 1: log-probabilities"),
        ([other[0], reply()], first, "prompt 1: log-probabilities"),
    ):
        with pytest.raises(AssertionError, match=why):
            follows(first, second, third)


def test_a_step_without_a_graph_is_told() -> None:
    line = "[2026] Decode batch, #running-req: 1, cuda graph: {}, gen throughput (token/s): 1.0\n"
    assert steps_in_graphs(2 * line.format(True), graphs=True).startswith("all of 2 decoding steps")
    assert steps_in_graphs(line.format(False), graphs=False) == "the server has no graphs"
    for log in ("", line.format(True) + line.format(False)):
        with pytest.raises(AssertionError, match="graphs were captured"):
            steps_in_graphs(log, graphs=True)
