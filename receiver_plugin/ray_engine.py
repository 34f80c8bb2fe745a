"""An SGLang engine in a Ray actor, started with the plugin armed. On this side Ray is imported here and nowhere else.

Ray actors do not go through SGLang's launchers, so nobody parses `--load-plugin` for them: `engine.start` does, in the
actor. The engine's schedulers are child processes of the actor, one for each tensor-parallel rank, and its requests run
on the actor's own event loop, so that control messages of a push and requests pass each other as in an HTTP server.

    EngineActor(args, gpus)          environment -> engine -> FENCED, or serving its checkpoint
    control(message)                 a control message of `shared.protocol`, JSON in, JSON out, of `sender.ray_trainer`
    generate, health                 for those who use it
    release_memory, resume_memory    give the GPU to the trainer, and take it back; see `docs/architecture.md`

**GPUs.** Ray would set `CUDA_VISIBLE_DEVICES` to what it has assigned to an actor, which is one GPU, or a part of one:
too few for an engine of several ranks. Actors are made with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES
(`shared.ray_cluster`), so that Ray leaves it alone, and the engine sets it to the GPUs of its own bundles, in their
order. Rank 0 of the trainer sees all of them, as the plane `same_host` needs it, and finds each by its UUID.

**Restarts.** An actor that Ray has started again must not serve what it starts with: others serve a later version. It
loads no checkpoint then and is FENCED until `FP8Sender.catch_up` or the next push.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray

from receiver_plugin.engine import EngineControl, requires_version, start
from shared.errors import ConfigError
from shared.protocol import Describe, Reply

_MEMORY = ("weights", "kv_cache")
# Of a torchrun job: SGLang would take its rendezvous for its own, and wait in it for ever.
_RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


class EngineActor:
    """One engine. `shared.ray_cluster.colocate` makes it an actor; its methods are called through `.remote`.

    Args:
        args: of the command line, as `shared.launch.sglang_fp8_args` gives them, with `--tp-size`.
        gpus: what `CUDA_VISIBLE_DEVICES` names them, one for each rank, in order; none on a CPU.
        environment: further variables for the engine's processes.
    """

    def __init__(self, args: Sequence[str], gpus: Sequence[str] = (), environment: Mapping[str, str] | None = None):
        self._restarted = was_restarted()
        for name in [name for name in os.environ if name in _RENDEZVOUS or name.startswith("TORCHELASTIC_")]:
            del os.environ[name]
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        os.environ |= environment or {}
        self._engine: EngineControl = start([*args, *(("--load-format", "dummy") if self._restarted else ())])

    async def health(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """`state` (FENCED whenever requests are refused), `version`, `fence` (why), `restarted`, and of its process
        `pid`. Asks the schedulers; `error` says why they did not answer. To wait for it is to wait for the engine.
        """
        answer = await self._engine.answer(Describe().model_dump_json().encode(), timeout_s)
        error = Reply.model_validate_json(answer).error
        return {
            "state": self._engine.state,
            "version": self._engine.version,
            "fence": await self._engine.fence(),
            "error": None if error is None else error.message,
            "restarted": self._restarted,
            "pid": os.getpid(),
        }

    async def control(self, message: bytes, timeout_s: float) -> bytes:
        """The reply to a control message, both as JSON. An error of ours is part of the reply, never raised."""
        return await self._engine.answer(message, timeout_s)

    async def generate(
        self, request: dict[str, Any], minimum: int | None = None, exact: int | None = None
    ) -> dict[str, Any]:
        """SGLang's reply to `request`, keyword arguments of `sgl.Engine.async_generate`, served by such a version.

        `fp8sync_versions` in its `meta_info` are the versions at its start and its end.

        Raises: ServerFencedError, VersionMismatchError: try again later. ConfigError: a stream.
        """
        if request.get("stream"):
            raise ConfigError("streams do not pass between Ray actors here: ask for the whole reply")
        with requires_version(minimum, exact) as versions:
            reply = await self._engine.engine.async_generate(**request)
        for part in reply if isinstance(reply, list) else [reply]:
            part["meta_info"]["fp8sync_versions"] = [versions.start, versions.end]
        return reply

    async def release_memory(self, tags: Collection[str] = _MEMORY, timeout_s: float = 60.0) -> None:
        """Once no request runs; with `--enable-memory-saver` the GPU has it back. Requests are refused from here on.

        Raises: ConfigError: it is released already. ServerBusyError: requests do not end: nothing was released.
        """
        await self._engine.release_memory(tags, timeout_s)

    async def resume_memory(self, tags: Collection[str] = _MEMORY, timeout_s: float = 60.0) -> None:
        """Weights hold nothing then: first `("weights",)`, then a push, then `("kv_cache",)` takes the least memory.

        An engine that was started again has all of its memory: what it did not release is left alone.

        Raises: ConfigError: it was not released.
        """
        if self._restarted:
            tags = [tag for tag in tags if tag in self._engine.released]
        if tags:
            await self._engine.resume_memory(tags, timeout_s)


def was_restarted() -> bool:
    """Whether Ray has started this actor before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, about an older name of the actor's number
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)
