"""A real SGLang server takes a push from several trainer ranks: equality with a checkpoint load."""

from __future__ import annotations

import pytest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from examples.local_server import LocalServer
from examples.tiny_qwen3 import make_model
from sender import FP8Sender
from sender.report import PushReport
from sender.sending_ranks import SendFrom
from shared.protocol import PlaneName
from tests.server_fixtures import ADMIN_KEY, CHANGES, REFERENCE_SEED
from tests.test_ranks import run_on_ranks

pytestmark = pytest.mark.server


def push(rank: int, url: str, plane: PlaneName, senders: SendFrom) -> PushReport:
    settings = {"admin_key": ADMIN_KEY, "timeout_s": 60.0, "bucket_bytes": 256 << 10}
    with FP8Sender([url], plane=plane, send_from=senders, **settings) as sender:  # type: ignore[arg-type]
        for seed in (1, REFERENCE_SEED):
            model = make_model(seed, **CHANGES)
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            report = sender.push(model)
    return report


@pytest.mark.parametrize(
    ("plane", "senders"), [("tcp", (0, 1)), ("same_host", (0, 1)), ("same_host", (1,)), ("same_host", "holders")]
)
def test_a_push_of_several_ranks_equals_a_checkpoint_load(
    plane: PlaneName, senders: SendFrom, pushed_server: LocalServer, loaded_server: LocalServer
) -> None:
    reports = run_on_ranks(push, 2, pushed_server.url, plane, senders, timeout_s=180.0)
    wanted = (0, 1) if senders == "holders" else senders
    assert reports[0] == reports[1] and reports[0].senders == wanted and reports[0].num_buckets > 3
    assert pushed_server.probe() == loaded_server.probe()
    (info,) = pushed_server.http.get("/fp8sync/info").json()["info"]["places"]
    assert info["gpu"] == "" and len(info["host"]) == 32
