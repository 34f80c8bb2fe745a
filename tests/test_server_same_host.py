"""A real SGLang server on this host, over shared memory: equality with a checkpoint load, and nothing left behind."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from examples.local_server import LocalServer
from examples.tiny_qwen3 import make_model
from sender import FP8Sender
from shared.protocol import StagingWay
from tests.server_fixtures import ADMIN_KEY, CHANGES, REFERENCE_SEED
from tests.test_distributed import soon

pytestmark = pytest.mark.server

PROMPTS = [[11, 12, 13], [100, 200, 300, 400, 500]]


def mapped(server: LocalServer) -> list[int]:
    """The shared memory of fp8sync, by its number, once for each process of the server, or this one, that has it."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # of another user, or gone
            if int(process.name) == os.getpid() or os.getpgid(int(process.name)) == server.process.pid:
                lines = (process / "maps").read_text().splitlines()
                found += {int(line.split()[4]) for line in lines if "memfd:fp8sync" in line}
    return found


@pytest.mark.parametrize("way", ["reserved", "kv_pool", "in_place"])
def test_a_push_equals_a_checkpoint_load(
    way: StagingWay, pushed_server: LocalServer, loaded_server: LocalServer
) -> None:
    settings = {"admin_key": ADMIN_KEY, "timeout_s": 60.0, "bucket_bytes": 256 << 10}
    (reserved,) = mapped(pushed_server)  # for good
    with FP8Sender([pushed_server.url], plane="same_host", staging=way, **settings) as sender:  # type: ignore[arg-type]
        sender.push(make_model(1, **CHANGES))
        assert pushed_server.probe() != loaded_server.probe()
        report = sender.push(make_model(REFERENCE_SEED, **CHANGES))
        assert set(report.staging.values()) == {way} and report.num_buckets > 3
        held = 2 if way == "reserved" else 1
        assert mapped(pushed_server) == [reserved] * held, "what was lent is given back"
    assert pushed_server.probe() == loaded_server.probe()
    replies, wanted = pushed_server.generate(PROMPTS), loaded_server.generate(PROMPTS)
    assert [reply["tokens"] for reply in replies] == [reply["tokens"] for reply in wanted]
    assert [reply["logprobs"] for reply in replies] == [reply["logprobs"] for reply in wanted]


def test_a_sender_that_is_gone_leaves_nothing(pushed_server: LocalServer) -> None:
    reserved = mapped(pushed_server)
    assert len(reserved) == 1
    with FP8Sender([pushed_server.url], plane="same_host", admin_key=ADMIN_KEY, timeout_s=60.0) as sender:
        sender.push(make_model(REFERENCE_SEED, **CHANGES))
        assert mapped(pushed_server) == 2 * reserved
    pushed_server.http.get("/fp8sync/info")  # it hears of the end with the next message at the latest
    assert soon(lambda: mapped(pushed_server) == reserved, timeout_s=10.0)
    assert not any("fp8sync" in name for name in os.listdir("/dev/shm"))
