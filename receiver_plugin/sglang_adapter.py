"""Where fp8sync is hooked into SGLang (0.5.16 to 0.5.23).

    launcher process    routes and gate on the HTTP server (`sglang_http`), one more request type (`sglang_messages`),
                        fence and versions where requests leave for the schedulers (`sglang_requests`)
    scheduler process   one Receiver per rank, answering that request type in the event loop (here, `sglang_engine`);
                        keys and fence where requests enter its queue (`sglang_keep`)

These modules, named `sglang_*`, are all that touches SGLang's insides; `entry` and `cpu_platform` use its public seams.

A hook whose target is not there, or anything else that was renamed (`sglang_surface`), ends the start and is named.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from sglang.srt.managers import io_struct
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.utils import TypeBasedDispatcher
from sglang.version import __version__ as SGLANG_VERSION

from receiver_plugin.probe import ProbeOnly
from receiver_plugin.receiver import Receiver
from receiver_plugin.replicas import for_replica
from receiver_plugin.reserve import AUTO
from receiver_plugin.sglang_engine import SglangEngine, TpRanks, block_size, replica_of
from receiver_plugin.sglang_http import run_with_control, run_with_probe
from receiver_plugin.sglang_keep import RunningRequests
from receiver_plugin.sglang_memory import reserve_staging, want
from receiver_plugin.sglang_messages import Fp8SyncReqInput, Fp8SyncReqOutput
from receiver_plugin.sglang_refusals import check_server_args as check_server_args
from receiver_plugin.sglang_requests import change_weights, generate, send
from receiver_plugin.sglang_surface import SCHEDULER, exists, missing_names, missing_of
from receiver_plugin.startup import fence_reason
from shared import protocol as wire
from shared.errors import IncompatibleServerError

logger = logging.getLogger(__name__)

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher"
_QUEUE = "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue"
_LOOP = "sglang.srt.managers.scheduler.Scheduler.process_input_requests"  # in every turn of the event loop
_HTTP = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool"
_UPDATES = ("update_weights_from_disk", "update_weights_from_distributed", "update_weights_from_tensor")
_MANAGER_UPDATES = ("update_weights_from_ipc", "release_memory_occupation", "resume_memory_occupation", "check_weights")

_GIVE_WAY_S = 0.0005

_receiver: Receiver | None = None  # of this scheduler process
_requests: RunningRequests | None = None  # likewise
_installed = False  # in this process
_keep_on_host = False  # whether SGLang restores the weights when their memory is resumed


# Installing


def install(probe_only: bool = False, staging: str = AUTO) -> None:
    """Hook this process, once. `staging`: as `--fp8sync-staging`.

    Raises:
        IncompatibleServerError: SGLang has changed; names all that is missing.
        ConfigError: `staging` is none of the flag's values.
    """
    global _installed
    if _installed:
        return
    want(staging)
    hooks = _PROBE_HOOKS if probe_only else _HOOKS
    targets = [target for target, _, _ in hooks]
    if missing := [*(name for name in targets if not exists(name)), *missing_names(SGLANG_VERSION)]:
        raise IncompatibleServerError(f"SGLang {SGLANG_VERSION} has no {', '.join(missing)}")
    if taken := sorted(set(targets) & set(HookRegistry._patched)):
        raise IncompatibleServerError(f"another plugin has hooked {', '.join(taken)}; SGLang would leave ours out")
    for target, hook, kind in hooks:
        HookRegistry.register(target, hook, kind)
    io_struct.hook_custom_types(Fp8SyncReqInput, Fp8SyncReqOutput)
    HookRegistry.apply_hooks()
    if left_out := sorted(set(targets) - set(HookRegistry._patched)):
        raise IncompatibleServerError(f"SGLang {SGLANG_VERSION} did not take the hooks on {', '.join(left_out)}")
    _installed = True


# The scheduler process


def _attach_receiver(result: Any, scheduler: Any) -> None:
    global _receiver, _requests, _keep_on_host
    try:
        check_server_args(scheduler.server_args)  # again: engines that parse no command line come here only
        if missing := missing_of(scheduler, SCHEDULER):
            raise IncompatibleServerError(f"the scheduler of SGLang {SGLANG_VERSION} has no {', '.join(missing)}")
    except IncompatibleServerError as error:
        raise SystemExit(f"fp8sync: {error}") from error
    _keep_on_host = bool(scheduler.server_args.enable_weights_cpu_backup)
    model = scheduler.tp_worker.model_runner.model
    try:
        engine, ranks = SglangEngine(scheduler, model), TpRanks(scheduler)
    except IncompatibleServerError as error:
        raise SystemExit(f"fp8sync: {error}") from error
    if block_size(model) is None:
        raise SystemExit("fp8sync: this model has no block-FP8 layers: start it as `python -m shared.launch` does")
    if reasons := engine.unsafe():
        raise SystemExit("fp8sync: weights could not be bound in place: " + "; ".join(reasons))
    args = scheduler.server_args
    fence = fence_reason(model, _local_folder(args), str(args.load_format), engine.derived)
    _receiver, _requests = Receiver(model, engine, ranks, fence), engine.requests
    _answer_with(scheduler, _receiver.handle)
    if ranks.index == 0:
        logger.info("fp8sync: %s", f"FENCED until the first full push: {fence}" if fence else "serving its checkpoint")


def _attach_probe(result: Any, scheduler: Any) -> None:
    _answer_with(scheduler, ProbeOnly(scheduler.tp_worker.model_runner.model, TpRanks(scheduler)).handle)


def _answer_with(scheduler: Any, handle: Callable[[Any], wire.Reply]) -> None:
    replica, ranks = replica_of(scheduler), scheduler.tp_group.world_size

    def answer(request: Fp8SyncReqInput) -> Fp8SyncReqOutput:
        reply = handle(for_replica(wire.decode_message(request.message), replica, ranks))
        return Fp8SyncReqOutput(nonce=request.nonce, replica=replica, reply=reply.model_dump_json())

    scheduler._request_dispatcher += TypeBasedDispatcher([(Fp8SyncReqInput, answer)])


def _enter_queue(original: Any, scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """The HTTP process sends nothing to a fenced server, but what it had sent before may arrive later."""
    if _requests is not None:
        _requests.enter(request)
    original(scheduler, request, *args, **kwargs)
    if _requests is not None and _receiver is not None and (_receiver.fence is not None or _receiver.lacks_memory):
        _requests.end(request)


def _turn(original: Any, scheduler: Any, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Around what is done with all that has come in a turn of the event loop."""
    if _receiver is not None and len(requests) > 1:
        _receiver.busy()  # a message of ours may come after something else
    result = original(scheduler, requests, *args, **kwargs)
    if _receiver is not None:
        _after_turn(_receiver, scheduler, bool(requests))
    return result


def _after_turn(receiver: Receiver, scheduler: Any, has_requests: bool) -> None:
    """A scheduler that is idle or paused spins, and Python runs one thread: what receives would wait 5 ms before each
    of its steps.
    """
    computes = getattr(scheduler, "split_prefill_batch", None) is not None  # which SGLang does not count as work
    idle = not has_requests and receiver.has_session and not computes and scheduler.is_fully_idle()
    if idle:
        receiver.idle()
    else:
        receiver.busy()
    if receiver.is_receiving and not has_requests and (idle or scheduler._engine_paused):
        time.sleep(_GIVE_WAY_S)


def _local_folder(args: Any) -> str | None:
    """The folder of the checkpoint that SGLang loaded, None if it is not known."""
    if Path(args.model_path).is_dir():
        return str(args.model_path)
    where = {"revision": args.revision, "cache_dir": args.download_dir, "local_files_only": True}
    try:
        return str(snapshot_download(args.model_path, **where))
    except Exception as error:  # any failure means that the checkpoint cannot be inspected: the server is fenced
        logger.warning("fp8sync: no local copy of %s: %s", args.model_path, error)
        return None


def _after_update(result: Any, updater: Any, request: Any, *rest: Any, **more: Any) -> None:
    """A stock route wrote to the weights, or failed half-way: whatever is served now is no version of a push."""
    if _receiver is not None:
        _receiver.weights_changed(f"{type(request).__name__.removesuffix('ReqInput')}, a route of SGLang")


def _release(original: Any, updater: Any, request: Any, *rest: Any, **more: Any) -> Any:
    """Around a release of memory: what arrives there must have stopped before, or it would be written to no memory."""
    if _receiver is not None:
        _receiver.memory_leaves(request.tags or ("weights", "kv_cache"))
    return _after_memory_call(original(updater, request, *rest, **more), updater, request)


def _after_memory_call(result: Any, updater: Any, request: Any, *rest: Any, **more: Any) -> Any:
    """Weights whose memory was released come back undefined, unless SGLang kept a copy on the host."""
    whole = not request.tags or "weights" in request.tags
    if _receiver is not None and whole and not _keep_on_host:
        _receiver.weights_lost()
    return result


def _after_check(result: Any, updater: Any, request: Any, *rest: Any, **more: Any) -> None:
    if _receiver is not None and request.action == "reset_tensors":
        _receiver.weights_changed("/weights_checker")


_HOOKS: tuple[tuple[str, Any, HookType], ...] = (
    (_RUNNER, reserve_staging, HookType.AROUND),
    (_SCHEDULER, _attach_receiver, HookType.AFTER),
    (_QUEUE, _enter_queue, HookType.AROUND),
    (_LOOP, _turn, HookType.AROUND),
    (_HTTP, run_with_control, HookType.AROUND),
    (f"{_MANAGER}.generate_request", generate, HookType.AROUND),
    (f"{_MANAGER}._send_one_request", send, HookType.AROUND),
    (f"{_MANAGER}._send_batch_request", send, HookType.AROUND),
    *((f"{_MANAGER}.{name}", change_weights, HookType.AROUND) for name in (*_UPDATES, *_MANAGER_UPDATES)),
    *((f"{_UPDATER}.{name}", _after_update, HookType.AFTER) for name in (*_UPDATES, "update_weights_from_ipc")),
    (f"{_UPDATER}.release_memory_occupation", _release, HookType.AROUND),
    (f"{_UPDATER}.resume_memory_occupation", _after_memory_call, HookType.AFTER),
    (f"{_UPDATER}.check_weights", _after_check, HookType.AFTER),
)
_PROBE_HOOKS: tuple[tuple[str, Any, HookType], ...] = (
    (_SCHEDULER, _attach_probe, HookType.AFTER),
    (_HTTP, run_with_probe, HookType.AROUND),
)
