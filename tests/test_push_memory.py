"""The whole flow over the in-memory plane: what is served afterwards, and what each bad input leaves behind."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from pydantic import BaseModel

from receiver_plugin.manifest import plan_rank
from receiver_plugin.probe import fingerprint
from receiver_plugin.ranks import SingleRank
from receiver_plugin.receiver import Receiver
from receiver_plugin.staging import Staging
from sender import FP8BlockConfig, FP8Sender, Shard
from sender.control import InProcessControl
from sender.fleet import Fleet
from sender.quantize import quantize
from sender.source import ModuleSource
from shared import errors, protocol
from shared.planes.memory import MemoryPlane
from tests.tiny_models import FakeEngine, Served, Trainer


class Server:
    def __init__(self, fence: str | None = None, name: str = "server") -> None:
        self.model, self.engine = Served(), FakeEngine()
        self.receiver = Receiver(self.model, self.engine, SingleRank(), fence)
        self.control = InProcessControl(name, self.receiver.handle)

    @property
    def version(self) -> int:
        return self.receiver.handle(protocol.Describe()).version

    def state(self) -> str:
        return self.receiver.handle(protocol.Describe()).state


def expected(model: torch.nn.Module) -> dict[str, str]:
    """Fingerprints of a server that loaded the quantized checkpoint of `model` through its own loader."""
    served = Served()
    served.load_weights(checkpoint(model))
    return fingerprint(served)


def checkpoint(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if "proj" in name:
            codes, scale = quantize(parameter.detach(), name=name)
            yield from ((name, codes), (name + "_scale_inv", scale))
        else:
            yield name, parameter.detach().to(torch.bfloat16)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def sender(server: Server) -> Iterator[FP8Sender]:
    with FP8Sender([server.control], plane="memory", timeout_s=5.0, bucket_bytes=64 << 10) as made:
        yield made


def faulty(sender: FP8Sender, on_send: Callable[..., Iterator[torch.Tensor]]) -> None:
    """Put `on_send` on the plane of the next session."""
    fleet: Fleet = sender._fleet
    fleet._make_memory_plane = lambda rendezvous: MemoryPlane(rendezvous, on_send)


def test_served_bytes_equal_a_checkpoint_load(server: Server, sender: FP8Sender) -> None:
    model = Trainer()
    addresses = {name: p.data_ptr() for name, p in server.model.named_parameters()}
    report = sender.push(model)
    assert fingerprint(server.model) == expected(model)
    assert report.version == server.version == 1
    assert server.engine.published == [0, 1]
    assert report.num_tensors == len(list(model.parameters())) and report.num_quantized == 14
    assert report.num_buckets > 3 and report.wire_bytes < report.bf16_bytes
    assert {name: p.data_ptr() for name, p in server.model.named_parameters()} == addresses


def test_second_push_reuses_the_plan(server: Server, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))
    plan, session = sender._planned, sender._fleet._session
    model = Trainer(seed=2)
    assert sender.push(model).version == 2
    assert sender._planned is plan and sender._fleet._session == session
    assert fingerprint(server.model) == expected(model)


def test_masters_in_fp32_are_pushed_as_bf16(server: Server, sender: FP8Sender) -> None:
    masters = Trainer(dtype=torch.float32)
    before = {name: p.clone() for name, p in masters.named_parameters()}
    sender.push(masters)
    assert all(torch.equal(p, before[name]) for name, p in masters.named_parameters())
    assert fingerprint(server.model) == expected(masters.to(torch.bfloat16))


def test_fenced_until_the_first_full_push() -> None:
    server = Server(fence="no weights in the folder")
    assert server.state() == "FENCED"
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as sender:
        sender.push(Trainer())
    assert server.state() == "SERVING"


def test_push_async_sends_the_weights_of_the_call(server: Server, sender: FP8Sender) -> None:
    model = Trainer()
    wanted = expected(model)
    handle = sender.push_async(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(errors.ConfigError, match="under way"):
        sender.push(model)
    assert handle.wait().version == 1
    assert fingerprint(server.model) == wanted


def test_push_shards_puts_parts_together(server: Server, sender: FP8Sender) -> None:
    model, shards = Trainer(), []
    for name, parameter in model.named_parameters():
        half = parameter.shape[0] // 2
        rest = (0,) * (parameter.dim() - 1)
        shards.append(Shard(name, parameter[:half], tuple(parameter.shape), (0, *rest)))
        shards.append(Shard(name, parameter[half:], tuple(parameter.shape), (half, *rest)))
    sender.push_shards(shards)
    assert fingerprint(server.model) == expected(model)
    with pytest.raises(errors.PlanError, match="no rank holds"):
        sender.push_shards(shards[1:])


def test_two_servers_get_the_same() -> None:
    servers = [Server(name="a"), Server(name="b")]
    with FP8Sender([s.control for s in servers], plane="memory", timeout_s=5.0) as sender:
        sender.push(Trainer())
    assert fingerprint(servers[0].model) == fingerprint(servers[1].model) == expected(Trainer())


# Bad input: a named error, the served weights as they were, and the next good push succeeds.


def assert_refused(server: Server, sender: FP8Sender, model: torch.nn.Module, error: type, match: str) -> None:
    before, version = fingerprint(server.model), server.version
    with pytest.raises(error, match=match):
        sender.push(model)
    assert fingerprint(server.model) == before
    assert server.version == version and server.state() == "SERVING"


def assert_heals(server: Server, sender: FP8Sender) -> None:
    model = Trainer(seed=77)
    sender.push(model)
    assert fingerprint(server.model) == expected(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_non_finite_weights_are_all_named(server: Server, sender: FP8Sender, value: float, name: str) -> None:
    model = Trainer()
    with torch.no_grad():
        model.get_parameter(name)[3, 5] = value
        model.get_parameter("model.layers.0.input_layernorm.weight")[1] = value
    before = fingerprint(server.model)
    with pytest.raises(errors.NonFiniteWeightError) as caught:
        sender.push(model)
    assert set(caught.value.names) == {name, "model.layers.0.input_layernorm.weight"}
    assert fingerprint(server.model) == before
    assert_heals(server, sender)


def test_extra_and_missing_tensors_are_all_listed(server: Server, sender: FP8Sender) -> None:
    model = Trainer()
    model.model.adapter = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    del model.get_submodule("model.layers.1.mlp").down_proj
    del model.get_submodule("model.layers.0.self_attn").k_proj
    with pytest.raises(errors.PlanError) as caught:
        sender.push(model)
    text = str(caught.value)
    assert "model.adapter.weight [8, 8]: the server has no place for it" in text
    assert "model.layers.1.mlp.down_proj.weight [192, 256]: the server needs it and got nothing for it" in text
    assert "model.layers.0.self_attn.qkv_proj.weight [512, 192]: nothing arrives for its part [256:384, 0:192]" in text
    assert_heals(server, sender)


def test_wrong_shapes_are_all_listed(server: Server, sender: FP8Sender) -> None:
    model = Trainer()
    narrow = torch.nn.Linear(256, 191, bias=False, dtype=torch.bfloat16)
    model.get_submodule("model.layers.0.mlp").down_proj = narrow
    tall = torch.nn.Linear(192, 300, bias=False, dtype=torch.bfloat16)
    model.get_submodule("model.layers.1.self_attn").q_proj = tall
    with pytest.raises(errors.PlanError) as caught:
        sender.push(model)
    text = str(caught.value)
    assert "layers.0.mlp.down_proj.weight: the trainer has [191, 256], the server [192, 256]" in text
    assert "layers.1.self_attn.q_proj.weight [300, 192]: the server has no place for its part [256:300, 0:192]" in text
    assert_heals(server, sender)


def test_wrong_element_type_is_refused(server: Server, sender: FP8Sender) -> None:
    assert_refused(server, sender, Trainer(dtype=torch.float16), errors.PlanError, "arrives as float16, the server")


def test_servers_that_cannot_take_part(server: Server, sender: FP8Sender) -> None:
    server.engine.block_size = (64, 64)
    assert_refused(server, sender, Trainer(), errors.IncompatibleServerError, r"blocks of \[64, 64\]")
    server.engine.block_size = None
    assert_refused(server, sender, Trainer(), errors.IncompatibleServerError, "no block FP8")
    server.engine.block_size, server.engine.scale_fmt = (128, 128), "ue8m0"
    assert_refused(server, sender, Trainer(), errors.IncompatibleServerError, "serves ue8m0 scales, this sender sends")
    server.engine.scale_fmt, server.engine.sglang_version = "fp32", "0.5.15"
    assert_refused(server, sender, Trainer(), errors.IncompatibleServerError, "older than 0.5.16")
    server.engine.sglang_version, server.engine.unsafe_reasons = "0.5.16", ["layer 3 is packed for AMX"]
    assert_refused(server, sender, Trainer(), errors.IncompatibleServerError, "layer 3 is packed for AMX")
    server.engine.unsafe_reasons = []
    assert_heals(server, sender)


def test_configuration_must_match_the_server(server: Server) -> None:
    config = FP8BlockConfig(modules_to_not_convert=("model.layers.0.mlp",))
    with FP8Sender([server.control], plane="memory", config=config, timeout_s=5.0) as sender:
        assert_refused(server, sender, Trainer(), errors.PlanError, "holds it in FP8, the configuration means BF16")


def flip(index: int, bucket: torch.Tensor) -> Iterator[torch.Tensor]:
    if index == 1:
        bucket[17] ^= 1
    yield bucket


def test_a_flipped_bit_is_found(server: Server, sender: FP8Sender) -> None:
    faulty(sender, flip)
    assert_refused(server, sender, Trainer(), errors.TransferError, r"bucket\(s\) \[1\]")
    sender._fleet._make_memory_plane = MemoryPlane
    assert_heals(server, sender)


def short(index: int, bucket: torch.Tensor) -> Iterator[torch.Tensor]:
    yield bucket[:-128] if index == 2 else bucket


def lost(index: int, bucket: torch.Tensor) -> Iterator[torch.Tensor]:
    if index != 2:
        yield bucket


def twice(index: int, bucket: torch.Tensor) -> Iterator[torch.Tensor]:
    yield bucket
    if index == 2:
        yield bucket


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (short, "bytes arrived, expected"),
        (lost, "bytes arrived, expected|deadline"),
        (twice, "bytes arrived, expected"),
    ],
)
def test_buckets_short_lost_or_repeated(
    server: Server, fault: Callable[..., Iterator[torch.Tensor]], match: str
) -> None:
    with FP8Sender([server.control], plane="memory", timeout_s=1.0, bucket_bytes=64 << 10) as sender:
        faulty(sender, fault)
        assert_refused(server, sender, Trainer(), errors.TransferError, match)
        sender._fleet._make_memory_plane = MemoryPlane
        assert_heals(server, sender)


def test_a_single_server_gets_one_more_try_with_a_quorum(server: Server) -> None:
    """Its commit finds the damage, before anything is decided."""
    damaged: list[int] = []

    def damage_once(index: int, bucket: torch.Tensor) -> Iterator[torch.Tensor]:
        if not damaged:
            bucket[len(bucket) // 2] ^= 1
            damaged.append(index)
        yield bucket

    with FP8Sender([server.control], plane="memory", timeout_s=5.0, quorum=1) as sender:
        faulty(sender, damage_once)
        assert sender.push(Trainer(seed=2)).version == 1 and damaged == [0]
    assert fingerprint(server.model) == expected(Trainer(seed=2))


def test_two_senders_at_once(server: Server, sender: FP8Sender) -> None:
    sender.prepare(Trainer())
    sender._fleet.survey()
    sender._fleet.begin(1)  # the first sender is in the middle of a push
    with (
        FP8Sender([server.control], plane="memory", timeout_s=5.0) as second,
        pytest.raises(errors.ServerBusyError, match="in the middle of a push"),
    ):
        second.push(Trainer())
    assert server.state() == "RECEIVING"


def test_a_sender_that_was_displaced_is_told_once(server: Server, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as second:
        second.push(Trainer(seed=2))
        with pytest.raises(errors.SessionLostError, match="took over"):
            sender.push(Trainer(seed=3))
    assert_heals(server, sender)


def test_a_push_async_that_was_displaced_is_told_once(server: Server, sender: FP8Sender) -> None:
    sender.push_async(Trainer(seed=1)).wait()
    with FP8Sender([server.control], plane="memory", timeout_s=5.0) as second:
        second.push(Trainer(seed=2))
        with pytest.raises(errors.SessionLostError, match="took over"):
            sender.push_async(Trainer(seed=3)).wait()
    assert_heals(server, sender)


def test_a_push_async_reaches_a_server_that_has_started_again(server: Server, sender: FP8Sender) -> None:
    sender.push_async(Trainer(seed=1)).wait()
    server.receiver = Receiver(server.model, server.engine, SingleRank(), "restarted")
    server.control._handle = server.receiver.handle
    assert sender.push_async(Trainer(seed=3)).wait().version == 2
    assert server.state() == "SERVING" and fingerprint(server.model) == expected(Trainer(seed=3))


def test_a_dead_senders_stage_expires(server: Server) -> None:
    with FP8Sender([server.control], plane="memory", timeout_s=0.2) as sender:
        sender.prepare(Trainer())
        sender._fleet.begin(1)
        assert server.state() == "RECEIVING"
        time.sleep(0.3)
        assert server.state() == "SERVING"
        sender._fleet.fail(RuntimeError("the test is over"))


@pytest.mark.parametrize("version", [1, 0, -4])
def test_stale_versions_are_refused(server: Server, sender: FP8Sender, version: int) -> None:
    sender.push(Trainer(seed=1))
    with pytest.raises(errors.StaleVersionError):
        sender.push(Trainer(seed=2), version=version)
    assert server.version == 1
    assert sender.push(Trainer(seed=2), version=10).version == 10


def test_a_restarted_server_is_planned_anew(server: Server, sender: FP8Sender) -> None:
    sender.push(Trainer())
    server.receiver = Receiver(server.model, server.engine, SingleRank(), "restarted")
    server.control._handle = server.receiver.handle
    assert_heals(server, sender)
    assert server.state() == "SERVING"


def test_requests_still_running_at_commit_leave_all_untouched(server: Server, sender: FP8Sender) -> None:
    server.engine.idle = False
    assert_refused(server, sender, Trainer(), errors.ServerBusyError, "requests are still running")
    server.engine.idle = True
    assert_heals(server, sender)


def test_a_copy_that_fails_fences_and_the_next_push_heals(server: Server, sender: FP8Sender) -> None:
    def broken() -> None:
        raise RuntimeError("device lost")

    server.engine.on_synchronize = broken
    with pytest.raises(errors.CommitError, match=r"fenced.*device lost"):
        sender.push(Trainer())
    assert server.state() == "FENCED"
    server.engine.on_synchronize = lambda: None
    assert_heals(server, sender)
    assert server.state() == "SERVING"


def test_a_parameter_that_moved_is_found(server: Server, sender: FP8Sender) -> None:
    sender.push(Trainer(seed=1))
    moved = next(iter(server.model.parameters()))
    moved.data = moved.data.clone()
    assert_refused(server, sender, Trainer(seed=2), errors.SessionLostError, "moved in memory")
    assert_heals(server, sender)


def test_megatron_style_models_are_pointed_to_push_shards(sender: FP8Sender) -> None:
    model = Trainer()
    model.get_parameter("model.embed_tokens.weight").tensor_model_parallel = True  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match=r"FSDP2.*push_shards"):
        sender.push(model)


def test_a_plan_writes_nothing() -> None:
    served = Served()
    before = fingerprint(served)
    tensors = [
        protocol.ManifestTensor(name=n, shape=tuple(p.shape), dtype="bfloat16", quantized=False)
        for n, p in Trainer().named_parameters()
    ]
    plan_rank(served, tensors)
    assert fingerprint(served) == before


BAD_SERVERS = [[], "http://127.0.0.1:1", ["ftp://x"], ["127.0.0.1:30000"], ["http://h:1/v1"], ["http://h:1"] * 2]


@pytest.mark.parametrize("servers", BAD_SERVERS)
def test_servers_argument_is_checked(servers: object) -> None:
    with pytest.raises(errors.ConfigError):
        FP8Sender(servers)  # type: ignore[arg-type]


def test_an_unreachable_server() -> None:
    with FP8Sender(["http://127.0.0.1:9"], timeout_s=2.0) as sender, pytest.raises(errors.ServerUnreachableError):
        sender.push(Trainer())


class Silent(InProcessControl):
    """A server that answers nothing once it is told to `Begin`; it notes how long it was waited for."""

    waited: tuple[float, ...] = ()

    def call(self, message: BaseModel, timeout_s: float) -> protocol.Reply:
        if isinstance(message, protocol.Begin) or self.waited:
            self.waited = (*self.waited, timeout_s)
            raise errors.ServerUnreachableError(f"{self.name} did not answer")
        return super().call(message, timeout_s)


def test_a_server_that_falls_silent_is_not_waited_for_beyond_the_deadline(server: Server) -> None:
    silent = Silent("silent", server.receiver.handle)
    with FP8Sender([silent], plane="memory", timeout_s=3.0) as sender:
        with pytest.raises(errors.ServerUnreachableError):
            sender.push(Trainer())
        assert silent.waited == (3.0, 3.0)  # for its answer, and that it hears of the end; no second goodbye
    assert server.receiver._session is not None
    server.receiver.handle(protocol.Close(session=server.receiver._session.id))


def test_a_gather_that_fails_leaves_no_server_waiting(
    server: Server, sender: FP8Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: ModuleSource, names: tuple[str, ...], *more: object) -> dict[str, torch.Tensor]:
        raise MemoryError("no memory for the whole tensor")

    with monkeypatch.context() as patched:
        patched.setattr(ModuleSource, "gather", broken)
        assert_refused(server, sender, Trainer(), MemoryError, "no memory")
    assert_heals(server, sender)


def test_a_push_that_failed_frees_its_staging(server: Server, sender: FP8Sender) -> None:
    def images() -> int:
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is Staging)

    faulty(sender, flip)
    before = images()  # those of other tests, whose servers may still be there
    for _ in range(3):
        with pytest.raises(errors.TransferError):
            sender.push(Trainer())
        assert server.receiver._session is None
    assert images() <= before + 1


@pytest.mark.parametrize("version", ["step-5", 1.0, True])
def test_versions_are_whole_numbers(sender: FP8Sender, version: object) -> None:
    with pytest.raises(errors.ConfigError, match="whole numbers"):
        sender.push(Trainer(), version=version)  # type: ignore[arg-type]


def test_calls_that_cannot_work_say_so(sender: FP8Sender) -> None:
    with pytest.raises(errors.ConfigError, match="is no module"):
        sender.push(Trainer().state_dict())  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigError, match=r"sender\.Shard objects"):
        sender.push_shards(Trainer().state_dict())  # type: ignore[arg-type]
    sender.close()
    with pytest.raises(errors.ConfigError, match="was closed"):
        sender.push(Trainer())


def test_versions_go_on_after_a_server_restarted(server: Server, sender: FP8Sender) -> None:
    sender.push(Trainer(), version=7)
    server.receiver = Receiver(server.model, server.engine, SingleRank(), "restarted")
    server.control._handle = server.receiver.handle
    assert sender.push(Trainer()).version == 8


def test_places_are_looked_at_again_only_if_something_has_changed(server: Server, sender: FP8Sender) -> None:
    server.engine.makeup = object()
    sender.push(Trainer(1))
    assert server.receiver._session is not None
    looks = list[str]()
    staging = server.receiver._session.staging
    check = staging.check_addresses

    def looking() -> str | None:
        looks.append(server.receiver.state)
        return check()

    setattr(staging, "check_addresses", looking)  # noqa: B010
    sender.push(Trainer(2))
    assert looks == ["SERVING"]  # as it began
    server.engine.makeup = object()
    sender.push(Trainer(3))
    assert looks[1:] == ["SERVING", "RECEIVING"] and fingerprint(server.model) == expected(Trainer(3))
