"""The HTTP process of SGLang (0.5.16 to 0.5.23): our routes, the gate, the way to the schedulers, the warm-up."""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput
from sglang.srt.utils.auth import AuthLevel, auth_level
from sglang.utils import TypeBasedDispatcher

from receiver_plugin.gate import Gate
from receiver_plugin.http import Control
from receiver_plugin.sglang_messages import Fp8SyncReqInput, Fp8SyncReqOutput
from receiver_plugin.sglang_requests import attach_manager
from receiver_plugin.version_headers import VersionHeaders
from shared import protocol as wire
from shared.errors import IncompatibleServerError, PushError, ServerUnreachableError

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 55.0
_WARM_UP_S = 120.0
_ABORT_AGAIN_S = 0.1


class SchedulerChannel:
    """From the HTTP process to the schedulers, by the request type that fp8sync adds.

    SGLang sends it to every replica, whose first rank answers. SGLang's own way to collect answers would count one that
    comes late as an answer to the next message; here the nonce decides, and a replica that is silent is named.
    """

    def __init__(self, tokenizer_manager: Any) -> None:
        self.num_replicas = int(tokenizer_manager.server_args.dp_size)
        self._manager = tokenizer_manager
        self._one_at_a_time = asyncio.Lock()
        self._nonce = ""
        self._answers: dict[int, str] = {}
        self._complete = asyncio.Event()
        tokenizer_manager._result_dispatcher += TypeBasedDispatcher([(Fp8SyncReqOutput, self._take)])

    @property
    def busy(self) -> bool:
        return bool(self._manager.model_update_lock._readers)  # every request is one of them while it runs

    async def ask(self, message: Any) -> tuple[wire.Reply, ...]:
        self._manager.auto_create_handle_loop()
        replicas, answers = range(self.num_replicas), dict[int, str]()
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S), self._one_at_a_time:
                request = Fp8SyncReqInput(nonce=secrets.token_hex(8), message=message.model_dump_json())
                self._nonce, self._answers = request.nonce, answers
                self._complete.clear()
                self._manager._dispatch_to_scheduler(request)
                await self._complete.wait()
        except TimeoutError:
            silent = [replica for replica in replicas if replica not in answers]
            who = f"the schedulers of replica(s) {silent}" if len(replicas) > 1 else "the schedulers"
            raise ServerUnreachableError(f"{who} did not answer within {_ANSWER_TIMEOUT_S:.0f} s") from None
        return tuple(wire.Reply.model_validate_json(answers[replica]) for replica in replicas)

    def _take(self, output: Fp8SyncReqOutput) -> None:
        if output.nonce != self._nonce:
            logger.warning("fp8sync: replica %d answered a message that was given up", output.replica)
            return
        self._answers[output.replica] = output.reply
        if len(self._answers) == self.num_replicas:
            self._complete.set()

    @asynccontextmanager
    async def drained(self, in_flight: wire.Drain) -> AsyncIterator[None]:
        """Inside, no request runs.

        Raises: PushError: generation is paused, so that the requests under way will not end.
        """
        if in_flight == "retract":
            async with self._retracted():
                yield
            return
        lock = self._manager.model_update_lock  # SGLang's own: every request holds its reader side while it runs
        if in_flight == "wait" and self._manager.is_pause and lock._readers:
            raise PushError("generation is paused with requests under way: continue or abort them first")
        aborting = asyncio.create_task(self._keep_aborting()) if in_flight == "abort" else None
        try:
            await lock.acquire_writer()
        except asyncio.CancelledError:
            async with lock._lock:  # those who waited for us behind the door are woken by nobody else
                lock._cond.notify_all()
            raise
        finally:
            if aborting is not None:
                aborting.cancel()
        try:
            yield
        finally:
            await lock.release_writer()

    @asynccontextmanager
    async def _retracted(self) -> AsyncIterator[None]:
        """SGLang's own pause: its schedulers put requests back and free their KV cache. A pause of others goes on."""
        was_paused = self._manager.is_pause
        if not was_paused:
            await self._manager.pause_generation(PauseGenerationReqInput(mode="retract"))
        try:
            yield
        finally:
            if not was_paused:
                await self._manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))

    async def _keep_aborting(self) -> None:
        """Again and again: a request that was on its way to the schedulers is not yet known to them."""
        while True:
            self.abort_all()
            await asyncio.sleep(_ABORT_AGAIN_S)

    def abort_all(self) -> None:
        self._manager.abort_request(abort_all=True)

    def publish(self, version: int) -> None:
        self._manager._update_weight_version_if_provided(str(version))


def make_control(manager: Any) -> Control:
    return Control(SchedulerChannel(manager))


def run_with_control(original: Any, *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    manager = bound.arguments["tokenizer_manager"]
    try:
        control = attach_manager(manager, make_control, has_gate=True)
    except IncompatibleServerError as error:
        raise SystemExit(f"fp8sync: {error}") from error
    http_server.app.add_middleware(VersionHeaders, served=control)
    http_server.app.add_middleware(Gate, control=control)  # the last one added is the first one asked
    _add_routes(control)
    stock_warmup = bound.arguments["execute_warmup_func"]
    bound.arguments["execute_warmup_func"] = lambda server_args: _warm_up(server_args, manager, stock_warmup)
    return original(*bound.args, **bound.kwargs)


def run_with_probe(original: Any, *args: Any, **kwargs: Any) -> Any:
    manager = inspect.signature(original).bind(*args, **kwargs).arguments["tokenizer_manager"]
    _add_routes(make_control(manager))
    return original(*args, **kwargs)


def _add_routes(control: Control) -> None:
    admin = auth_level(AuthLevel.ADMIN_OPTIONAL)

    async def on_control(request: Any) -> Any:
        return await control.control(request)

    async def on_info(request: Any) -> Any:
        return await control.info(request)

    http_server.app.add_route(wire.CONTROL_PATH, admin(on_control), methods=["POST"])
    http_server.app.add_route(wire.INFO_PATH, admin(on_info), methods=["GET"])


def _warm_up(server_args: Any, manager: Any, stock_warmup: Callable[[Any], bool]) -> bool:
    """SGLang's warm-up sends a request and ends the server if it is refused, as a fenced server would."""
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    key = server_args.admin_api_key or server_args.api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = server_args.url() + wire.INFO_PATH
    # This server's own certificate, read from its own file, or the system's authorities where TLS ends elsewhere.
    verify = ssl.create_default_context(cafile=server_args.ssl_certfile) if server_args.ssl_certfile else True
    if isinstance(verify, ssl.SSLContext):
        verify.check_hostname = False  # it is reached over its loopback address, whatever name it was issued for
    deadline, last = time.monotonic() + _WARM_UP_S, httpx.TransportError("never asked")
    while time.monotonic() < deadline:
        try:
            reply = httpx.get(url, headers=headers, timeout=60.0, trust_env=False, verify=verify)
        except httpx.TransportError as error:
            last = error
            time.sleep(0.2)
            continue
        if reply.status_code == 200 and wire.Reply.model_validate_json(reply.content).fence is not None:
            manager.server_status = ServerStatus.Up
            return True
        return stock_warmup(server_args)
    logger.error("fp8sync: %s did not answer within %.0f s: %s", url, _WARM_UP_S, last)
    return False
