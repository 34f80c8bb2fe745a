"""Requests in the process that takes them from users (SGLang 0.5.16 to 0.5.23): HTTP server, or one with `sgl.Engine`.

All of them go through that process's tokenizer manager, which waits for commits behind its own lock. So the fence and
what a request demands of the version are asked inside it: where a request leaves, and where parts of its answer come
back. A manager that nobody attached a control to sends nothing, because nobody knows what its weights are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sglang.version import __version__ as SGLANG_VERSION

from receiver_plugin.gate import FencedError
from receiver_plugin.http import Control
from receiver_plugin.sglang_surface import ENGINE, MANAGER, missing_of
from receiver_plugin.version_headers import current
from shared.errors import IncompatibleServerError, ServerFencedError


class _Attached(NamedTuple):
    control: Control
    has_gate: bool  # requests have passed `receiver_plugin.gate.Gate`, and so have routes that change weights


_attached: WeakKeyDictionary[Any, _Attached] = WeakKeyDictionary()  # by tokenizer manager


def attach_manager(manager: Any, make_control: Callable[[Any], Control], has_gate: bool) -> Control:
    """From here on `manager` serves, as its control says. Raises: IncompatibleServerError."""
    if missing := missing_of(manager, MANAGER):
        raise IncompatibleServerError(f"the tokenizer manager of SGLang {SGLANG_VERSION} has no {', '.join(missing)}")
    control = make_control(manager)
    _attached[manager] = _Attached(control, has_gate)
    return control


def attach_engine(
    sgl_engine: Any, make_control: Callable[[Any], Control]
) -> tuple[Control, Callable[[], asyncio.AbstractEventLoop]]:
    """The control of an `sgl.Engine`, once, and what tells the event loop that its requests run in."""
    if missing := missing_of(sgl_engine, ENGINE):
        raise IncompatibleServerError(f"the engine of SGLang {SGLANG_VERSION} has no {', '.join(missing)}")
    manager = sgl_engine.tokenizer_manager
    known = _attached.get(manager)
    control = known.control if known else attach_manager(manager, make_control, has_gate=False)
    return control, lambda: manager.event_loop or sgl_engine.loop


def start_engine(args: list[str]) -> Any:
    """An `sgl.Engine` from the arguments of a command line: those of the plugin are only known once it is loaded."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    return Engine(server_args=prepare_server_args(args))


# Memory, for who calls from the event loop of the engine


async def release_memory(sgl_engine: Any, tags: tuple[str, ...]) -> bool:
    """Whether the memory of `tags` was released. It is not while requests run: SGLang would end its schedulers.

    From here on no request leaves for the schedulers: the fence goes up before the first step that waits.
    """
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    manager = sgl_engine.tokenizer_manager
    if not (await manager.flush_cache()).success or manager.model_update_lock._readers:
        return False
    await manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=list(tags)), None)
    return True


async def resume_memory(sgl_engine: Any, tags: tuple[str, ...]) -> None:
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

    manager = sgl_engine.tokenizer_manager
    await manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=list(tags)), None)


# Hooks on the tokenizer manager


async def generate(original: Any, manager: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    """Around `generate_request`, which every route that runs the model and every call of an engine goes through."""
    control, has_gate = _of(manager)
    passage = current()
    try:
        if not has_gate and await control.fence() is not None:
            control.refuse_if_fenced()
        async with aclosing(original(manager, *args, **kwargs)) as parts:
            async for part in parts:
                passage.reply(_version_of(part, control))  # before SGLang lets go of its lock
                yield part
    except FencedError as error:
        if has_gate:
            raise
        raise ServerFencedError(error.detail) from error


def _version_of(part: Any, control: Control) -> int:
    """That of the last token in `part`. A reply to several prompts is a list; of several versions the newest counts.

    From 0.5.19 on SGLang says in what ends a reply which tokens came of which version. Without its word the version may
    be said too new, by a commit that the request did not meet, and never too old.
    """
    replies = part if isinstance(part, list) else [part]
    spans = [reply["meta_info"].get("weight_versions") for reply in replies]
    return max(control.version_of(found[-1]["version"]) if found else control.newest for found in spans)


def send(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around what hands requests to the schedulers: since the door they may have waited for a commit."""
    control, passage = _of(manager).control, current()
    try:
        control.refuse_if_fenced()
    except FencedError as error:
        passage.refusal = error.response  # for streams: SGLang would have sent their status before
        raise
    passage.send(control.version)
    return original(manager, *args, **kwargs)


async def change_weights(original: Any, manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's own weight updates and memory calls. Those of an HTTP server were seen at the gate."""
    control, has_gate = _of(manager)
    if has_gate:
        return await original(manager, *args, **kwargs)
    result: list[Any] = []

    async def call() -> None:
        result.append(await original(manager, *args, **kwargs))

    name = original.__name__
    await control.while_weights_change(call(), "/weights_checker" if name == "check_weights" else name)
    return result[0]


def _of(manager: Any) -> _Attached:
    if (attached := _attached.get(manager)) is None:
        raise RuntimeError("fp8sync is loaded, but this engine is not attached: receiver_plugin.engine.attach(engine)")
    return attached
