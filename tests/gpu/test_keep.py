"""`in_flight="keep"` on a GPU: with overlap scheduling and CUDA graphs a forward pass is under way when a commit comes.

No labels of tokens are needed, which older releases have not: the second weights have no attention, so that a token
follows from the one before, and it shows where they came in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from examples.local_server import LocalServer
from examples.tiny_qwen3 import make_model, write_config
from sender import FP8Sender
from shared.config import FP8BlockConfig
from shared.launch import sglang_fp8_args
from tests.gpu.test_real_server import GPU_ARGS, START_S
from tests.server_fixtures import CHANGES
from tests.test_server_keep import PROMPT, SHARED, Asking, cached, without_attention

NUM_TOKENS = 1500


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("keep")
    config = write_config(folder / "no_weights", **CHANGES, max_position_embeddings=2000)
    args = [*sglang_fp8_args(str(config), FP8BlockConfig()), *GPU_ARGS, "--fp8-gemm-backend", "triton"]
    with LocalServer(args, folder / "keep.log") as started:
        yield started.wait(START_S)
        print(f"== {started.log}\n{started.log_end(15)}")


@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_of_one_version(server: LocalServer, seed: int) -> None:
    with closing(Asking(server)) as ask:
        with FP8Sender([server.url]) as sender:
            sender.push(make_model(100 + seed, **CHANGES).cuda())
        old = ask.now(PROMPT, NUM_TOKENS)["output_ids"]
        ask.now(SHARED)
        stream, done = ask.stream(PROMPT, NUM_TOKENS)
        stream.until(50 + 7 * seed)
        with FP8Sender([server.url], in_flight="keep") as sender:
            report = sender.push(without_attention(200 + seed).cuda())
        assert not done.done(), f"it ended before the push: {report}"
        first, again = ask.now(SHARED), ask.now(SHARED)
        assert cached(first) == 0 and cached(again) > 90 and first["output_ids"] == again["output_ids"]
        done.result()
        tokens = stream.tokens
        switched = next(n for n, (a, b) in enumerate(zip(tokens, old, strict=True)) if a != b)
        assert 50 <= switched < NUM_TOKENS
        expected = ask.now([tokens[switched - 1]], NUM_TOKENS - switched)["output_ids"]
        assert tokens[switched:] == expected, "a token was computed while the weights were written"
        print(f"switched at {switched}; longest gap {1e3 * max(stream.gaps()):.1f} ms; {report}")
