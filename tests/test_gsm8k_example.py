"""examples/fsdp_gsm8k: its parts without a server, and once the whole on a tiny offline sample."""

from __future__ import annotations

import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from examples.fsdp_gsm8k.gsm8k import Row, advantages, final_number, prompt_tokens, read_rows, reward
from examples.fsdp_gsm8k.launch_server import main as launch_main
from examples.fsdp_gsm8k.launch_server import server_args
from examples.fsdp_gsm8k.offline_sample import make_sample, make_tokenizer, write_config
from examples.fsdp_gsm8k.rollout import Group
from examples.fsdp_gsm8k.settings import Settings, load_settings
from examples.fsdp_gsm8k.train import policy_loss
from examples.local_server import CPU_ARGS, LocalServer, free_port
from shared.config import FP8BlockConfig
from shared.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (ROOT / "examples" / "fsdp_gsm8k" / "config.toml").read_text()
FP8_ON = SHIPPED.replace("fp8 = false", "fp8 = true")


def settings_of(tmp_path: Path, text: str) -> Settings:
    (tmp_path / "config.toml").write_text(text)
    return load_settings(tmp_path / "config.toml")


def test_fp8_is_off_as_shipped_and_without_its_section(tmp_path: Path) -> None:
    assert settings_of(tmp_path, SHIPPED).rollout.quantization.block_config() is None
    without = SHIPPED[: SHIPPED.index("[rollout.quantization]")]
    assert settings_of(tmp_path, without) == settings_of(tmp_path, SHIPPED)


def test_one_section_makes_the_block_config(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, FP8_ON + 'modules_to_not_convert = ["model.layers.0.mlp"]\n')
    expected = FP8BlockConfig(modules_to_not_convert=("model.layers.0.mlp",))
    assert settings.rollout.quantization.block_config() == expected


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("fp8 = false", "fp9 = true", "rollout.quantization.fp9"),
        ("fp8 = false", 'fp8 = "yes"', "rollout.quantization.fp8"),
        ("fp8 = false", "block_size = [64, 64]", "rollout.quantization.block_size"),
        ("seed = 0", "sead = 0", "sead"),
        ("group_size = 8", "group_size = 1", "train.group_size"),
        ("learning_rate = 1e-6", "learning_rate = nan", "train.learning_rate"),
        ('servers = ["http://127.0.0.1:30000"]', "servers = []", "rollout.servers"),
        ("steps = 100", "", "train.steps"),
        ("steps = 100", "steps =", "config.toml"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert old in SHIPPED
    with pytest.raises(ConfigError, match=named):
        settings_of(tmp_path, SHIPPED.replace(old, new))


def test_server_arguments_with_fp8_off_are_plain(tmp_path: Path) -> None:
    args = server_args(settings_of(tmp_path, SHIPPED), ["--port", "30001"])
    assert args == ["--model-path", "path/to/model", "--port", "30001"]


def test_server_arguments_with_fp8_on_merge_the_users(tmp_path: Path) -> None:
    text = FP8_ON.replace("server_args = []", 'server_args = ["--json-model-override-args", \'{"a": {"b": 1}}\']')
    settings = settings_of(tmp_path, text.replace("# tokenizer", "tokenizer"))
    args = server_args(settings, ["--load-plugin", "other", "--port", "30001"])
    assert [args[i + 1] for i, word in enumerate(args) if word == "--load-plugin"] == ["fp8sync", "other"]
    overrides = args[args.index("--json-model-override-args") + 1]
    assert '"a": {"b": 1}' in overrides and '"weight_block_size": [128, 128]' in overrides
    assert args[-4:] == ["--tokenizer-path", "path/to/tokenizer", "--port", "30001"]
    with pytest.raises(ConfigError, match="awq"):
        server_args(settings, ["--quantization", "awq"])


def test_the_launcher_prints_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings_of(tmp_path, SHIPPED)
    launch_main([str(tmp_path / "config.toml"), "--port", "30001"])
    expected = "-m sglang.launch_server --model-path path/to/model --port 30001\n"
    assert capsys.readouterr().out.endswith(expected)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5, so #### 5", "5"),
        ("#### 1,200", "1200"),
        ("It costs $12.50.", "12.50"),
        ("#### -7", "-7"),
        ("That is 10-3", "3"),
        ("The answer is 42.00", "42"),
        ("no idea", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_reward_is_for_the_final_number_only() -> None:
    row = Row(question="q", answer="6 * 7 = 42, not 43\n#### 42")
    assert [reward(text, row) for text in ("I say 42.0", "42, no: 41", "", "#### 42")] == [1.0, 0.0, 0.0, 1.0]


def test_rows_without_an_answer_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = Row(question="q\u2028q", answer="#### 1").model_dump_json() + "\n"
    file.write_text(good + '{"question": "q", "answer": "#### 2", "source": "x"}\n')
    assert [row.target for row in read_rows(file)] == [1, 2]
    file.write_text(good + '{"question": "q", "answer": "two"}\n')
    with pytest.raises(ConfigError, match=r"line 2: .*'####'"):
        read_rows(file)


def test_advantages_are_normalised_within_a_group() -> None:
    assert advantages([1.0, 0.0, 0.0, 1.0]) == pytest.approx([1, -1, -1, 1], abs=1e-4)
    assert advantages([1.0, 1.0]) == [0.0, 0.0]


def test_the_sample_tokenizer_is_lossless() -> None:
    tokenizer = make_tokenizer()
    text = "caf\u00e9 = 3 #### 3\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(prompt_tokens("How many?", tokenizer)).startswith("Question: How many?\n")


class OneDistribution(nn.Module):
    """A causal model that answers every position with the same logits over four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(4))

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), logits_to_keep, -1))


def test_the_loss_favours_the_rewarded_answer_and_ignores_padding() -> None:
    model, uniform = OneDistribution(), -float(torch.tensor(4.0).log())
    group = Group([3, 3], [[1, 1, 1], [2]], [[uniform] * 3, [uniform]], [1.0, 0.0])
    loss, gap = policy_loss(model, group, 0.2, torch.device("cpu"))
    assert float(gap) == pytest.approx(0.0, abs=1e-6)
    assert float(loss.detach()) == pytest.approx(-0.5, abs=1e-4)  # four tokens: three of advantage 1, one of -1
    loss.backward()
    gradient = model.logits.grad
    assert gradient is not None and gradient[1] < 0 < gradient[2]


def train(config: Path) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
        *("-m", "examples.fsdp_gsm8k.train", str(config)),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.server
def test_two_steps_with_fp8_rollout(tmp_path: Path) -> None:
    args = server_args(load_settings(make_sample(tmp_path, fp8=True)))
    if args[-len(CPU_ARGS) :] != list(CPU_ARGS):  # the sample leaves them out where there is a GPU
        args += CPU_ARGS
    with LocalServer(args, tmp_path / "server.log") as server:
        server.wait()
        assert server.post("/generate", {"input_ids": [5, 6]}).status_code == 503  # fenced
        done = train(write_config(tmp_path, fp8=True, server=server.url))
        assert done.returncode == 0, f"{done.stderr[-3000:]}\n{server.log_end()}"
        steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
        assert [line.rpartition(" ")[2] for line in steps] == ["1", "2"]  # the weight_version of the replies
        gaps = [float(line.partition("logprob_gap ")[2].partition(",")[0]) for line in steps]
        assert max(gaps) < 0.1  # nats; 0.02 is usual, so replies and trainer are aligned
        assert server.generate([[5, 6]], 2)[0]["weight_version"] == "3"  # pushed after the second step
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
