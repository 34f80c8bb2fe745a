"""`FP8Sender` with and without `strict`: of several servers all commit or none does, or some are fenced."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from receiver_plugin.probe import fingerprint
from sender import FP8Sender
from shared import errors
from tests.test_push_memory import Server, expected
from tests.tiny_models import Trainer


@pytest.fixture
def servers() -> list[Server]:
    return [Server(name="a"), Server(name="b"), Server(name="c")]


@pytest.fixture(params=[False, True], ids=["loose", "strict"])
def strict(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def sender(servers: list[Server], strict: bool) -> Iterator[FP8Sender]:
    controls = [server.control for server in servers]
    with FP8Sender(controls, plane="memory", timeout_s=5.0, strict=strict) as made:
        yield made


def test_all_serve_the_same(servers: list[Server], sender: FP8Sender) -> None:
    report = sender.push(Trainer())
    assert [fingerprint(server.model) for server in servers] == [expected(Trainer())] * 3
    assert 0.0 <= report.skew_s < 5.0


def test_one_that_cannot_commit_keeps_the_others_from_it(servers: list[Server], sender: FP8Sender) -> None:
    """Its weights are released after it was staged, say: it cannot promise."""
    sender.push(Trainer(seed=1))
    before = expected(Trainer(seed=1))
    verify = sender._fleet.verify

    def then_released() -> None:
        verify()
        servers[1].engine.unsafe_reasons = ["the memory of the weights is released"]

    sender._fleet.verify = then_released  # type: ignore[method-assign]
    with pytest.raises(errors.Fp8SyncError, match="is released"):
        sender.push(Trainer(seed=2))
    assert [fingerprint(server.model) == before for server in servers] == [True, True, True]
    servers[1].engine.unsafe_reasons = []
    sender._fleet.verify = verify  # type: ignore[method-assign]
    sender.push(Trainer(seed=3))
    assert [fingerprint(server.model) for server in servers] == [expected(Trainer(seed=3))] * 3


def test_a_copy_that_fails_fences_that_server_alone(servers: list[Server], sender: FP8Sender) -> None:
    """What nobody can know beforehand."""

    def fail() -> None:
        raise RuntimeError("the device is lost")

    servers[2].engine.on_synchronize = fail
    with pytest.raises(errors.CommitError, match="the device is lost"):
        sender.push(Trainer())
    assert [server.state() for server in servers] == ["SERVING", "SERVING", "FENCED"]
    assert [server.version for server in servers] == [1, 1, 0]
    servers[2].engine.on_synchronize = lambda: None
    sender.push(Trainer(seed=4))
    assert [fingerprint(server.model) for server in servers] == [expected(Trainer(seed=4))] * 3


@pytest.mark.parametrize("in_flight", ["drain", "", None])
def test_other_words_for_requests_under_way_are_refused(in_flight: str, servers: list[Server]) -> None:
    with pytest.raises(errors.ConfigError, match="in_flight"):
        FP8Sender([servers[0].control], plane="memory", in_flight=in_flight)  # type: ignore[arg-type]
