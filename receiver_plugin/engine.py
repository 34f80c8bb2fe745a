"""`sgl.Engine` without an HTTP server: pushed to, and asked for versions, in its own process.

    control = start(sglang_fp8_args("MODEL", FP8BlockConfig()))      # or attach(engine) to one that was made elsewhere
    sender = FP8Sender([control])                                    # in place of a URL
    sender.push(model)
    with requires_version(minimum=1) as versions:
        reply = control.engine.generate(input_ids=[1, 2, 3])
    versions.start, versions.end

An engine runs its event loop inside its own calls only, so `generate` and `push` take turns on one thread. Where the
loop is the caller's own (`async_generate`), push from another thread: `await asyncio.to_thread(sender.push, model)`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel

from receiver_plugin.version_headers import Passage, passing
from shared.errors import ServerUnreachableError, error_from_wire
from shared.protocol import Reply, decode_message
from shared.versions import Demand

_RUNNING = threading.Lock()  # engines made on one thread share its event loop; a sender asks all of them at once


class EngineControl:
    """One engine, as `FP8Sender` knows servers (`sender.control.ControlClient`)."""

    def __init__(self, engine: Any) -> None:
        from receiver_plugin.sglang_http import make_control
        from receiver_plugin.sglang_requests import attach_engine

        self.engine = engine
        self.name = f"engine {id(engine):x} of this process"
        self._control, self._loop = attach_engine(engine, make_control)

    def call(self, message: BaseModel, timeout_s: float) -> Reply:
        """Raises: the error that the engine reported, or `ServerUnreachableError`."""
        loop, asked = self._loop(), self._ask(decode_message(message.model_dump_json()), timeout_s)
        if not _RUNNING.acquire(timeout=timeout_s):
            asked.close()
            raise ServerUnreachableError(f"{self.name} was not asked for {timeout_s:.0f} s: another engine's turn")
        try:
            if idle := not loop.is_running():
                reply = loop.run_until_complete(asked)
        finally:
            _RUNNING.release()
        if not idle:
            reply = _wait(asyncio.run_coroutine_threadsafe(asked, loop), timeout_s)
        if reply is None:
            text = f"{self.name} did not answer within {timeout_s:.0f} s"
            raise ServerUnreachableError(f"{text}; its event loop must run: push from another thread than the loop's")
        if reply.error is not None:
            raise error_from_wire(reply.error.kind, f"{self.name}: {reply.error.message}", reply.error.problems)
        return reply

    def local_host(self) -> str:
        return "127.0.0.1"

    def close(self) -> None:
        """The engine is its owner's to shut down."""

    async def _ask(self, message: Any, timeout_s: float) -> Reply | None:
        """None if it takes longer. A commit that was sent is not cut off: nobody would know what it did."""
        task = asyncio.ensure_future(self._control.answer(message))
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        return task.result() if done else None


def _wait(future: Future[Reply | None], timeout_s: float) -> Reply | None:
    try:
        return future.result(timeout_s + 1.0)
    except TimeoutError:
        return None


def start(args: Sequence[str]) -> EngineControl:
    """Start an `sgl.Engine` with the plugin. `args` as for a server, with `--load-plugin fp8sync`: `sglang_fp8_args`.

    It spawns processes, so a script calls it behind `if __name__ == "__main__":`, as with any `sgl.Engine`.
    """
    from receiver_plugin.sglang_requests import start_engine

    return EngineControl(start_engine(list(args)))


def arm(staging: str = "auto") -> None:
    """Load the plugin into engines that are made from here on, where somebody else makes them. Then `attach`.

    `staging`: as `--fp8sync-staging`. Raises: ConfigError: it is none of its values.
    """
    from receiver_plugin.entry import load

    load(staging)


def attach(engine: Any) -> EngineControl:
    """Let `engine`, made with the plugin loaded, take pushes and serve; before this it refuses every request."""
    return EngineControl(engine)


@contextmanager
def requires_version(minimum: int | None = None, exact: int | None = None) -> Iterator[Passage]:
    """Requests made inside the block are served by such a version or raise `VersionMismatchError`.

    What it yields has the versions at which they started and ended. Streams are to be read inside the block, too.
    """
    with passing(Passage(Demand(minimum, exact))) as passage:
        yield passage
