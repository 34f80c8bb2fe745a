"""Trainer actors and engine actors on the same GPUs of a Ray cluster, made by one call. It knows neither side's code.

    cluster = colocate(MyTrainer, 8, EngineActor, [EngineSpec(args, tp_size=4), EngineSpec(args, tp_size=4)])
    for _ in range(steps):
        cluster.trainers_do("train_step")
        cluster.push()
        replies = ray.get([engine.actor.generate.remote(request) for engine in cluster.engines])
    cluster.close()

A *slot* is one GPU, or without GPUs a share of a CPU, and what runs on it: one trainer, and a rank of one engine. Slots
are bundles of placement groups, STRICT_PACK, one group for each node: where the trainers of a node run, so do the
engines that share their GPUs. Slots are put in the order of nodes and GPUs; trainer `r` has slot `r`, and engines take
slots from the first on, each so many as it has ranks, all of one node.

Ray's fractional shares of a GPU only say who may be placed where; nobody is kept from taking more memory than that.
What an engine may take of a GPU says its `--mem-fraction-static`.

**Ray and CUDA_VISIBLE_DEVICES.** All actors are made with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1. Without it
Ray would show every actor the one GPU that it was assigned, and rank 0 of the trainer could not open memory of servers
on the others (plane `same_host`); an engine of several ranks would see one GPU. So every trainer sees the GPUs of its
node and is told which one is its own, and an engine is told those of its slots.

Every wait has a deadline. Ray's own errors become those of `shared.errors`, which name the actor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shared.errors import ConfigError, Fp8SyncError, IncompatibleServerError, PushError, RankMissingError

logger = logging.getLogger(__name__)

# Calls of an engine that run at a time. Ray's 1000 may all be requests that wait for a push to end, and the messages of
# the push would wait behind them. An actor with async methods has no thread for each.
_MOST_CALLS = 1 << 16
_ENVIRONMENT = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
_SHARE, _PROBE_SHARE = 0.3, 0.01


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """An engine: arguments of its command line without `--tp-size`, and further environment of its processes."""

    args: Sequence[str]
    tp_size: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


class Slot(NamedTuple):
    """Bundle `bundle` of `group`. `gpu`: its name in CUDA_VISIBLE_DEVICES, "" without GPUs."""

    group: Any
    bundle: int
    node: str
    address: str
    gpu: str


class TrainerSpec(NamedTuple):
    """The trainers, as `colocate` was told to make them."""

    kind: type
    args: tuple[Any, ...]
    sender_options: dict[str, Any]
    watch_every_s: float | None
    group_timeout_s: float


class EngineAt(NamedTuple):
    """An engine actor and the node that it runs on; a list of its fields goes to the trainers."""

    actor: Any
    name: str
    node: str
    address: str


def colocate(
    trainer: type,
    num_trainers: int,
    engine: type,
    engines: Sequence[EngineSpec],
    *,
    trainer_args: Sequence[Any] = (),
    sender_options: Mapping[str, Any] | None = None,
    num_nodes: int = 1,
    use_gpus: bool | None = None,
    cpus_per_slot: float = 1.0,
    engine_restarts: int = 3,
    watch_every_s: float | None = None,
    group_timeout_s: float = 300.0,
    timeout_s: float = 900.0,
) -> Cluster:
    """Returns when all engines are up, the trainers have set themselves up, and a sender stands on each.

    Args:
        trainer: a subclass of `sender.ray_trainer.TrainerActor`, made with `trainer_args`.
        engine: `receiver_plugin.ray_engine.EngineActor`.
        sender_options: of `FP8Sender`. The default plane is `same_host` on one node and `tcp` on several.
        num_nodes: among which slots are divided evenly.
        use_gpus: None: if the cluster has any.
        engine_restarts: how often Ray may start an engine again after it died; -1: always.
        watch_every_s: how often rank 0 looks for engines that have started again, and brings them the last version.
        group_timeout_s: of the trainers' process group: how long a collective waits for a rank that is lost.
        timeout_s: for each step of this, and of a later `set_up_trainers`: slots, engines, trainers. And for what
            `trainers_do`, if nothing else is said.

    Raises:
        ConfigError: the engines do not fit the slots, or the slots the cluster.
        IncompatibleServerError: an engine does not start.
        RankMissingError: a trainer died.
    """
    gpus = ray.cluster_resources().get("GPU", 0) > 0 if use_gpus is None else use_gpus
    if num_trainers < 1 or num_trainers % num_nodes:
        raise ConfigError(f"{num_trainers} trainers cannot be divided evenly among {num_nodes} node(s)")
    if not engines or (wanted := sum(spec.tp_size for spec in engines)) > num_trainers:
        raise ConfigError(f"engines with {wanted if engines else 0} ranks on {num_trainers} slots: one rank on a slot")
    slots = _take_slots(num_trainers // num_nodes, num_nodes, gpus, cpus_per_slot, timeout_s)
    cluster = Cluster(slots, gpus, cpus_per_slot, timeout_s)
    try:
        cluster.engines = [
            cluster.start_engine(engine, spec, index, mine, engine_restarts)
            for index, (spec, mine) in enumerate(zip(engines, divided(slots, engines), strict=True))
        ]
        cluster.wait_for_engines()
        several = len({slot.node for slot in slots}) > 1
        options = {"plane": "tcp" if several else "same_host", **(sender_options or {})}
        cluster.trainer_spec = TrainerSpec(trainer, tuple(trainer_args), options, watch_every_s, group_timeout_s)
        cluster.set_up_trainers()
    except BaseException:
        cluster.close()
        raise
    return cluster


def divided(slots: Sequence[Slot], engines: Sequence[EngineSpec]) -> list[list[Slot]]:
    """The slots of each engine, from the first on. Raises: ConfigError: one would lie on two nodes."""
    found, at = list[list[Slot]](), 0
    for index, spec in enumerate(engines):
        mine, at = list(slots[at : at + spec.tp_size]), at + spec.tp_size
        if len({slot.node for slot in mine}) > 1:
            raise ConfigError(f"engine {index} of {spec.tp_size} ranks would lie on two nodes: order or size them anew")
        found.append(mine)
    return found


class Cluster:
    """What `colocate` made. `trainers`: actors by rank; `engines`: in the order of their specifications."""

    def __init__(self, slots: Sequence[Slot], gpus: bool, cpus_per_slot: float, timeout_s: float) -> None:
        self.slots, self.trainers, self.engines = slots, list[Any](), list[EngineAt]()
        self.trainer_spec: TrainerSpec | None = None
        self._gpus, self._cpus, self._timeout_s = gpus, cpus_per_slot, timeout_s

    def push(self, version: int | None = None, timeout_s: float | None = None) -> dict[str, Any]:
        """On all trainers; the report of rank 0 as a dictionary. Raises: as `FP8Sender.push`, and `trainers_do`."""
        report: dict[str, Any] = self.trainers_do("push", version, timeout_s=timeout_s)[0]
        return report

    def trainers_do(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call `method` on all trainers at the same time: what each returned, by rank.

        Raises: an error of fp8sync that one of them raised; else RankMissingError: one died, or does not return; else
        PushError: what else one raised.
        """
        late_s = self._timeout_s if timeout_s is None else timeout_s
        refs = [getattr(trainer, method).remote(*args) for trainer in self.trainers]
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=late_s, fetch_local=False)
        names = [f"trainer rank {rank}" for rank in range(len(refs))]
        found = [_outcome(ref, who, None if ref in done else late_s) for ref, who in zip(refs, names, strict=True)]
        failed = [outcome for outcome in found if isinstance(outcome, _Failed)]
        if failed:
            raise min(failed, key=lambda failure: failure.order).error
        return found

    def set_up_trainers(self) -> None:
        """Make the trainers, all anew: those that are left of an earlier group cannot join another one.

        Raises: as `colocate`.
        """
        spec = self.trainer_spec
        assert spec is not None
        for trainer in self.trainers:
            ray.kill(trainer)
        kind = ray.remote(spec.kind)
        self.trainers = [kind.options(**self._options(slot)).remote(*spec.args) for slot in self.slots]
        address = _result(self.trainers[0].listen.remote(), "trainer rank 0", self._timeout_s)
        joins = [
            trainer.join.remote(rank, len(self.slots), address, slot.gpu, spec.group_timeout_s)
            for rank, (trainer, slot) in enumerate(zip(self.trainers, self.slots, strict=True))
        ]
        for rank, join in enumerate(joins):
            _result(join, f"trainer rank {rank}", self._timeout_s)
        self.trainers_do("connect", [tuple(engine) for engine in self.engines], spec.sender_options, spec.watch_every_s)

    def start_engine(self, kind: type, spec: EngineSpec, index: int, slots: Sequence[Slot], restarts: int) -> EngineAt:
        args = [*spec.args, "--tp-size", str(spec.tp_size)]
        gpus = [slot.gpu for slot in slots if slot.gpu]
        options = {**self._options(slots[0]), "max_restarts": restarts, "max_task_retries": 0}
        options["max_concurrency"] = _MOST_CALLS
        actor = ray.remote(kind).options(**options).remote(args, gpus, dict(spec.environment))
        return EngineAt(actor, f"engine {index} (actor {actor._actor_id.hex()[:12]})", slots[0].node, slots[0].address)

    def wait_for_engines(self, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """The health of each, once it has started. Raises: IncompatibleServerError: one does not."""
        found, late = list[dict[str, Any]](), self._timeout_s if timeout_s is None else timeout_s
        refs = [engine.actor.health.remote() for engine in self.engines]
        for engine, ref in zip(self.engines, refs, strict=True):
            try:
                found.append(ray.get(ref, timeout=late))
            except RayError as error:
                raise IncompatibleServerError(f"{engine.name} does not start: {_first_lines(error)}") from error
        return found

    def close(self) -> None:
        """End all actors and give their slots back. Idempotent."""
        for actor in (*self.trainers, *(engine.actor for engine in self.engines)):
            ray.kill(actor)
        self.trainers, self.engines = [], []
        for group in {id(slot.group): slot.group for slot in self.slots}.values():
            remove_placement_group(group)
        self.slots = ()

    def _options(self, slot: Slot) -> dict[str, Any]:
        """Less than a third of a slot: a trainer, an engine, and room for what you start beside them."""
        strategy = PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=slot.bundle)
        share = {"num_cpus": _SHARE * self._cpus, "num_gpus": _SHARE if self._gpus else 0}
        return {**share, "scheduling_strategy": strategy, "runtime_env": {"env_vars": _ENVIRONMENT}}


def _take_slots(per_node: int, num_nodes: int, gpus: bool, cpus: float, timeout_s: float) -> list[Slot]:
    bundle = {"CPU": cpus, **({"GPU": 1} if gpus else {})}
    groups = [placement_group([bundle] * per_node, strategy="STRICT_PACK") for _ in range(num_nodes)]
    try:
        ray.get([group.ready() for group in groups], timeout=timeout_s)
        slots = [slot for group in groups for slot in _looked_at(group, per_node, gpus, timeout_s)]
    except BaseException as error:
        for group in groups:
            remove_placement_group(group)
        if isinstance(error, GetTimeoutError):
            text = f"{num_nodes} node(s) with {per_node} times {bundle} free at once"
            raise ConfigError(f"the cluster did not have {text} within {timeout_s:.0f} s") from error
        raise
    return slots


def _looked_at(group: Any, num: int, gpus: bool, timeout_s: float) -> list[Slot]:
    """The bundles of `group`, in the order of their GPUs."""
    probe = ray.remote(_where_am_i)
    share = {
        "num_cpus": _PROBE_SHARE,
        "num_gpus": _PROBE_SHARE if gpus else 0,
        "runtime_env": {"env_vars": _ENVIRONMENT},
    }
    strategies = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(num)]
    asked = [probe.options(**share, scheduling_strategy=strategy).remote() for strategy in strategies]
    found = ray.get(asked, timeout=timeout_s)
    return sorted((Slot(group, index, *where) for index, where in enumerate(found)), key=_order)


def _order(slot: Slot) -> tuple[str, int, str]:
    return slot.node, int(slot.gpu) if slot.gpu.isdigit() else 0, slot.gpu


def _where_am_i() -> tuple[str, str, str]:
    """Node, its address, and the GPU of the bundle that this task runs in."""
    gpus = ray.get_gpu_ids()
    context = ray.get_runtime_context()
    return context.get_node_id(), ray.util.get_node_ip_address(), str(gpus[0]) if gpus else ""


class _Failed(NamedTuple):
    """`order`: what a rank says of a push tells more than that another one is gone, and that more than what follows."""

    order: int
    error: Exception


def _result(ref: Any, who: str, timeout_s: float) -> Any:
    done, _ = ray.wait([ref], timeout=timeout_s, fetch_local=False)
    outcome = _outcome(ref, who, None if done else timeout_s)
    if isinstance(outcome, _Failed):
        raise outcome.error
    return outcome


def _outcome(ref: Any, who: str, late_s: float | None) -> Any:
    """What `ref`, which is done unless it is `late_s`, came to: a value, or `_Failed` with an error of ours."""
    if late_s is not None:
        return _Failed(1, RankMissingError(f"{who} did not return within {late_s:.0f} s"))
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, Fp8SyncError):
            return _Failed(0, error.cause)
        return _Failed(2, PushError(f"{who} failed: {error}"))
    except RayError as error:
        return _Failed(1, RankMissingError(f"{who} died, or cannot be reached: {_first_lines(error)}"))


def _first_lines(error: BaseException, most: int = 3) -> str:
    return " ".join(str(error).split("\n")[:most])[:500]
