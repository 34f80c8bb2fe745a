"""Everything of fp8sync that touches SGLang's insides (0.5.16 to 0.5.23): hooks, checks, and the engine's services.

    launcher process    routes and gate on the HTTP server, one more request type on the tokenizer manager
    scheduler process   one Receiver per rank, answering that request type in the scheduler's event loop

A hook whose target is not there ends the start and names it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import pkgutil
import secrets
import time
from collections.abc import Callable
from typing import Any

import httpx
import torch
import torch.distributed as dist
from sglang.srt.entrypoints import http_server
from sglang.srt.managers import io_struct, tokenizer_control_mixin
from sglang.srt.managers.io_struct import BaseReq
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.utils import TypeBasedDispatcher
from sglang.version import __version__ as SGLANG_VERSION

from receiver_plugin.http import CONTROL_PATH, INFO_PATH, Control, Gate
from receiver_plugin.probe import ProbeOnly
from receiver_plugin.receiver import Receiver
from receiver_plugin.startup import fence_reason
from shared import protocol as wire
from shared.errors import IncompatibleServerError, PushError

logger = logging.getLogger(__name__)

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher"
_HTTP = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"
_ANSWER_TIMEOUT_S = 55.0


class Fp8SyncReqInput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """A control message on its way to the schedulers. `nonce` pairs it with its answer."""

    nonce: str
    message: str


class Fp8SyncReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    nonce: str
    reply: str


# Installing


def install(probe_only: bool = False) -> None:
    """Hook this process. Raises: IncompatibleServerError: SGLang has changed under a hook."""
    for target, hook, kind in (
        (_SCHEDULER, _attach_probe if probe_only else _attach_receiver, HookType.AFTER),
        (_HTTP, _run_with_probe if probe_only else _run_with_control, HookType.AROUND),
    ):
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError) as error:
            raise IncompatibleServerError(f"SGLang {SGLANG_VERSION} has no {target}") from error
        HookRegistry.register(target, hook, kind)
    tokenizer_control_mixin._COMMUNICATOR_SPECS.append(("fp8sync", Fp8SyncReqOutput))
    io_struct.hook_custom_types(Fp8SyncReqInput, Fp8SyncReqOutput)
    HookRegistry.apply_hooks()
    missing = {_SCHEDULER, _HTTP} - set(HookRegistry._patched)
    if missing:
        raise IncompatibleServerError(f"SGLang {SGLANG_VERSION} did not take the hooks on {sorted(missing)}")


def check_server_args(args: Any) -> None:
    """Raises: IncompatibleServerError: names every option with which a push would be wrong today."""
    wrong = [
        f"{flag} ({why})"
        for flag, is_set, why in (
            ("--pp-size > 1", args.pp_size > 1, "pipeline stages answer no control request"),
            ("--dp-size > 1", args.dp_size > 1, "replicas are not synced as one yet"),
            ("--speculative-algorithm", args.speculative_algorithm is not None, "a draft model would keep old weights"),
            ("--enable-lora", bool(args.enable_lora), "LoRA wraps the layers that are bound"),
            ("--enable-eplb", bool(args.enable_eplb), "experts would move after the plan was made"),
            ("--tokenizer-worker-num > 1", args.tokenizer_worker_num > 1, "its workers load no plugins"),
            ("--enable-http2", bool(getattr(args, "enable_http2", False)), "another HTTP server, without the gate"),
            ("weight cache", getattr(args, "weight_cache_mode", "off") not in ("off", None), "it shares parameters"),
        )
        if is_set
    ]
    if wrong:
        raise IncompatibleServerError("cannot be combined with " + ", ".join(wrong))


# The scheduler process


def _attach_receiver(result: Any, scheduler: Any) -> None:
    model = scheduler.tp_worker.model_runner.model
    engine, ranks = SglangEngine(scheduler, model), TpRanks(scheduler)
    if reasons := engine.unsafe():
        raise SystemExit("fp8sync: weights could not be bound in place: " + "; ".join(reasons))
    args = scheduler.server_args
    fence = fence_reason(model, _local_folder(args.model_path), str(args.load_format))
    receiver = Receiver(model, engine, ranks, fence)
    _answer_with(scheduler, receiver.handle)
    if ranks.index == 0:
        logger.info("fp8sync: %s", f"FENCED until the first full push: {fence}" if fence else "serving its checkpoint")


def _attach_probe(result: Any, scheduler: Any) -> None:
    _answer_with(scheduler, ProbeOnly(scheduler.tp_worker.model_runner.model, TpRanks(scheduler)).handle)


def _answer_with(scheduler: Any, handle: Callable[[Any], wire.Reply]) -> None:
    def answer(request: Fp8SyncReqInput) -> Fp8SyncReqOutput:
        reply = handle(wire.decode_message(request.message))
        return Fp8SyncReqOutput(nonce=request.nonce, reply=reply.model_dump_json())

    scheduler._request_dispatcher += TypeBasedDispatcher([(Fp8SyncReqInput, answer)])


def _local_folder(model_path: str) -> str | None:
    from pathlib import Path

    if Path(model_path).is_dir():
        return model_path
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(model_path, local_files_only=True))
    except Exception as error:  # any failure means that the checkpoint cannot be inspected: the server is fenced
        logger.warning("fp8sync: no local copy of %s: %s", model_path, error)
        return None


class TpRanks:
    """The tensor-parallel ranks of a server. Used on the scheduler's thread only, inside control requests."""

    def __init__(self, scheduler: Any) -> None:
        self._group = scheduler.tp_group.cpu_group
        self.index = scheduler.tp_group.rank_in_group
        self.size = scheduler.tp_group.world_size

    def gather(self, item: Any) -> list[Any]:
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self._group)
        return items


class SglangEngine:
    """What the receiver asks of SGLang (`receiver_plugin.receiver.Engine`)."""

    def __init__(self, scheduler: Any, model: torch.nn.Module) -> None:
        self._scheduler, self._model = scheduler, model
        self._on_gpu = next(model.parameters()).is_cuda
        self._unsafe_layers = _unsafe_layers(model, _capability() if self._on_gpu else (0, 0))

    def info(self, incarnation: str) -> wire.ServerInfo:
        from sglang.srt.layers.quantization.fp8_utils import get_fp8_gemm_runner_backend

        return wire.ServerInfo(
            protocol=wire.PROTOCOL_VERSION,
            sglang_version=SGLANG_VERSION,
            incarnation=incarnation,
            num_ranks=self._scheduler.tp_group.world_size,
            block_size=_block_size(self._model),
            device=torch.cuda.get_device_name() if self._on_gpu else "cpu",
            compute_capability="{}.{}".format(*_capability()) if self._on_gpu else "",
            gemm_backend=get_fp8_gemm_runner_backend().value if self._on_gpu else "torch",
            moe_backend=str(self._scheduler.server_args.moe_runner_backend),
        )

    def unsafe(self) -> list[str]:
        released = getattr(self._scheduler.weight_updater, "offload_tags", ())
        memory = [f"memory is released ({sorted(released)}): resume it first"] if released else []
        return [*self._unsafe_layers, *memory]

    def flush_cache(self) -> bool:
        return bool(self._scheduler.flush_cache(empty_cache=False))

    def synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def publish(self, version: int) -> None:
        record = getattr(self._scheduler, "record_weight_version_change", None)  # from 0.5.19 on
        if record is not None:
            record(new_version=str(version))


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


_UNTOUCHED_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "Fp8KVCacheMethod"}
_RAW_MOE_RUNNERS = {"auto", "triton", "deep_gemm", "cutlass"}


def _unsafe_layers(model: torch.nn.Module, capability: tuple[int, int]) -> list[str]:
    """Layers for which `process_weights_after_loading` would do more than nothing, and why; at most a few of each."""
    reasons: dict[str, str] = {}
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        reason = None if method is None else _why_unsafe(layer, method, capability)
        if reason is not None:
            reasons.setdefault(reason, name)
    return [f"{name} (and maybe others): {reason}" for reason, name in reasons.items()]


def _why_unsafe(layer: Any, method: Any, capability: tuple[int, int]) -> str | None:
    kind = type(method).__name__
    if kind in _UNTOUCHED_METHODS:
        return None
    if kind == "Fp8LinearMethod":
        return _why_linear_unsafe(layer, method)
    if kind == "Fp8MoEMethod":
        return _why_moe_unsafe(layer, capability)
    return f"its method {kind} is not known to leave loaded weights as they are"


def _why_linear_unsafe(layer: Any, method: Any) -> str | None:
    if not method.block_quant:
        return "FP8 without blocks: start the server with the arguments of shared.launch"
    if getattr(method, "use_marlin", False):
        return "Marlin repacks it: unset SGLANG_FORCE_FP8_MARLIN; GPUs before Ada have no other kernel"
    if layer.weight.dtype != torch.float8_e4m3fn or layer.weight_scale_inv.dtype != torch.float32:
        return f"it is kept as {layer.weight.dtype} with {layer.weight_scale_inv.dtype} scales"
    if getattr(layer.weight_scale_inv, "format_ue8m0", False):
        return "DeepGEMM keeps its scales packed on this GPU: start with --fp8-gemm-backend triton"
    if getattr(layer, "aiter_bpreshuffled", False):
        return "AITER shuffles it: ROCm is not supported"
    return None


def _why_moe_unsafe(layer: Any, capability: tuple[int, int]) -> str | None:
    from sglang.srt.layers.moe import get_moe_runner_backend

    runner = get_moe_runner_backend().value
    if runner not in _RAW_MOE_RUNNERS:
        return f"the MoE runner {runner} rearranges experts: start with --moe-runner-backend triton"
    if runner in ("auto", "deep_gemm") and capability >= (10, 0):
        return "DeepGEMM repacks experts on this GPU: start with --moe-runner-backend triton"
    if any(hasattr(layer, attr) for attr in ("hpc_ops_w13_weight_scale", "mega_moe_w13")):
        return "it holds rearranged copies of its experts"
    scales = (layer.w13_weight_scale_inv, layer.w2_weight_scale_inv)
    if any(s.dtype != torch.float32 or getattr(s, "format_ue8m0", False) for s in scales):
        return "its scales are packed: start with --moe-runner-backend triton"
    return None


def _block_size(model: torch.nn.Module) -> tuple[int, int] | None:
    for layer in model.modules():
        config = getattr(getattr(layer, "quant_method", None), "quant_config", None)
        block = getattr(config, "weight_block_size", None)
        if block:
            return int(block[0]), int(block[1])
    return None


# The HTTP process


class SchedulerChannel:
    """From the HTTP process to the schedulers, by the request type that this module adds."""

    def __init__(self, tokenizer_manager: Any) -> None:
        self._manager = tokenizer_manager

    async def ask(self, message: str) -> wire.Reply:
        self._manager.auto_create_handle_loop()
        nonce = secrets.token_hex(8)
        request = Fp8SyncReqInput(nonce=nonce, message=message)
        try:
            outputs = await asyncio.wait_for(self._manager.fp8sync_communicator(request), _ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise PushError(f"the schedulers did not answer within {_ANSWER_TIMEOUT_S:.0f} s") from None
        if len(outputs) != 1 or outputs[0].nonce != nonce:
            raise PushError("the schedulers answered another message: a late answer to one that was given up")
        return wire.Reply.model_validate_json(outputs[0].reply)

    def drained(self) -> Any:
        return self._manager.model_update_lock.writer_lock

    def publish(self, version: int) -> None:
        self._manager._update_weight_version_if_provided(str(version))


def _run_with_control(original: Any, *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    manager = bound.arguments["tokenizer_manager"]
    control = Control(SchedulerChannel(manager))
    http_server.app.add_middleware(Gate, control=control)
    _add_routes(control)
    stock_warmup = bound.arguments["execute_warmup_func"]
    bound.arguments["execute_warmup_func"] = lambda server_args: _warm_up(server_args, manager, stock_warmup)
    return original(*bound.args, **bound.kwargs)


def _run_with_probe(original: Any, *args: Any, **kwargs: Any) -> Any:
    manager = inspect.signature(original).bind(*args, **kwargs).arguments["tokenizer_manager"]
    _add_routes(Control(SchedulerChannel(manager)))
    return original(*args, **kwargs)


def _add_routes(control: Control) -> None:
    admin = auth_level(AuthLevel.ADMIN_OPTIONAL)

    async def on_control(request: Any) -> Any:
        return await control.control(request)

    async def on_info(request: Any) -> Any:
        return await control.info(request)

    http_server.app.add_route(CONTROL_PATH, admin(on_control), methods=["POST"])
    http_server.app.add_route(INFO_PATH, admin(on_info), methods=["GET"])


def _warm_up(server_args: Any, manager: Any, stock_warmup: Callable[[Any], bool]) -> bool:
    """SGLang's warm-up sends a request and ends the server if it is refused, as a fenced server would."""
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    key = server_args.admin_api_key or server_args.api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline:
        try:
            # The certificate is this server's own, reached over its own address; its name need not match.
            reply = httpx.get(server_args.url() + INFO_PATH, headers=headers, timeout=60.0, trust_env=False)
        except httpx.TransportError:
            time.sleep(0.2)
            continue
        if reply.status_code == 200 and wire.Reply.model_validate_json(reply.content).fence is not None:
            manager.server_status = ServerStatus.Up
            return True
        return stock_warmup(server_args)
    logger.error("fp8sync: the HTTP server did not come up")
    return False
