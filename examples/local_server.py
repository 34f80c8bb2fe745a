"""Start and stop a real SGLang server on this machine, as a user would on a command line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

# Small pools, no tokenizer, no CUDA graphs: a tiny model on a CPU. On a GPU the last two are left to the caller.
CPU_ARGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-cuda-graph", "--skip-tokenizer-init", "--sleep-on-idle"),
    *("--max-total-tokens", "2048", "--mem-fraction-static", "0.2", "--max-running-requests", "8"),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LocalServer:
    """`python -m sglang.launch_server ARGS` in a process group of its own, its output in `log`.

    With `wait()` it is up; `stop()` ends it and everything that it started.
    """

    def __init__(
        self,
        args: Sequence[str],
        log: Path,
        env: dict[str, str] | None = None,
        key: str | None = None,
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1", "--port", str(self.port), *args]
        self._log_file = log.open("wb")
        self.process = subprocess.Popen(
            command,
            env={**_clean_environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, timeout=120.0, trust_env=False, headers=headers)

    def wait(self, timeout_s: float = 180.0) -> LocalServer:
        """Return when the server answers. Raises: RuntimeError: it ended, or took longer; with the end of its log."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self.process.returncode}:\n{self.log_end()}")
            try:
                if self.http.get("/model_info", timeout=5.0).status_code < 500:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the server did not come up in {timeout_s:.0f} s:\n{self.log_end()}")

    def post(self, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        return self.http.post(path, json=body or {})

    def generate(self, prompts: Iterable[Sequence[int]], max_new_tokens: int = 16) -> list[dict[str, Any]]:
        """Greedy tokens and logprobs for prompts of token ids, one request each."""
        return [self._generate_one(list(prompt), max_new_tokens) for prompt in prompts]

    def _generate_one(self, prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
        sampling = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        response = self.post("/generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True})
        response.raise_for_status()
        reply = response.json()
        pairs = reply["meta_info"]["output_token_logprobs"]
        return {
            "tokens": [token for _, token, *_ in pairs],
            "logprobs": [logprob for logprob, *_ in pairs],
            "weight_version": reply["meta_info"]["weight_version"],
        }

    def probe(self) -> list[dict[str, str]]:
        """SHA-256 of every parameter and buffer, per rank."""
        response = self.post("/fp8sync/control", {"kind": "probe"})
        response.raise_for_status()
        ranks: list[dict[str, str]] = response.json()["probe"]
        return ranks

    def checksums(self) -> dict[str, Any]:
        """SGLang's own `/weights_checker`: over dequantized values, so weaker than `probe`.

        The reply has `success` false where it cannot judge: block FP8 of shapes that are no multiple of the block.
        """
        reply: dict[str, Any] = self.post("/weights_checker", {"action": "checksum"}).json()
        return reply

    def log_end(self, num_lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def stop(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(20)
        _kill_group(self.process.pid)
        self._log_file.close()

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _kill_group(group: int) -> None:
    """Whatever the server left behind in its own process group."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _clean_environment() -> dict[str, str]:
    """Without a torchrun job's rendezvous, which SGLang would take for its own and wait in for ever."""
    gone = {
        "TRITON_INTERPRET",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "GROUP_RANK",
    }
    return {k: v for k, v in os.environ.items() if k not in gone and not k.startswith("TORCHELASTIC_")}
