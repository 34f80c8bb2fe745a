"""`sgl.Engine` without an HTTP server: pushed to, and asked for versions, in its own process.

    control = start(sglang_fp8_args("MODEL", FP8BlockConfig()))      # or attach(engine) to one that was made elsewhere
    sender = FP8Sender([control])                                    # in place of a URL
    sender.push(model)
    with requires_version(minimum=1) as versions:
        reply = control.engine.generate(input_ids=[1, 2, 3])
    versions.start, versions.end

An engine runs its event loop inside its own calls only, so `generate` and `push` take turns on one thread. Where the
loop is the caller's own (`async_generate`), push from another thread: `await asyncio.to_thread(sender.push, model)`.
Whoever carries control messages himself, as Ray does (`receiver_plugin.ray_engine`), awaits `answer` on that loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel

from receiver_plugin.version_headers import Passage, passing
from shared.errors import ConfigError, Fp8SyncError, ServerBusyError, ServerUnreachableError, error_from_wire
from shared.protocol import MAX_BODY_BYTES, Reply, ServerState, WireError, decode_message
from shared.versions import Demand

_T = TypeVar("_T")
MEMORY_TAGS = ("weights", "kv_cache", "cuda_graph")  # as SGLang calls them
_IDLE_POLL_S = 0.01
_RUNNING = threading.Lock()  # engines made on one thread share its event loop; a sender asks all of them at once


class EngineControl:
    """One engine, as `FP8Sender` knows servers (`sender.control.ControlClient`)."""

    def __init__(self, engine: Any) -> None:
        from receiver_plugin.sglang_http import make_control
        from receiver_plugin.sglang_requests import attach_engine

        self.engine = engine
        self.name = f"engine {id(engine):x} of this process"
        self._control, self._loop = attach_engine(engine, make_control)
        self._released: set[str] = set()  # by `release_memory`
        self._moving = asyncio.Lock()  # one release or resume at a time

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
        return await _within(timeout_s, self._control.answer(message))

    # On the event loop of the engine, for who has it

    @property
    def state(self) -> ServerState:
        """`FENCED` whenever requests are refused."""
        return self._control.state

    @property
    def version(self) -> int:
        return self._control.version

    @property
    def released(self) -> frozenset[str]:
        """Which of its memory is released."""
        return frozenset(self._released)

    async def fence(self) -> str | None:
        """Why requests are refused, or None."""
        return await self._control.fence()

    async def answer(self, message: bytes, timeout_s: float) -> bytes:
        """The reply to a control message, both as JSON. An error is part of the reply."""
        try:
            if len(message) > MAX_BODY_BYTES:
                raise ConfigError(f"a control message of more than {MAX_BODY_BYTES} bytes")
            reply = await self._ask(decode_message(message), timeout_s)
            if reply is None:
                raise ServerUnreachableError(f"no answer within {timeout_s:.0f} s")
        except Fp8SyncError as error:
            fence = await self.fence()
            found = WireError(kind=type(error).__name__, message=str(error))
            reply = Reply(state=self.state, version=self.version, fence=fence, error=found)
        return reply.model_dump_json().encode()

    async def release_memory(self, tags: Collection[str], timeout_s: float) -> None:
        """Give memory of `tags` (`MEMORY_TAGS`) back to the GPU, once no request runs; none is served from here on.

        Raises: ConfigError: it is released already. ServerBusyError: requests did not end in time; nothing was done.
        ServerUnreachableError: the schedulers do not answer.
        """
        from receiver_plugin.sglang_requests import release_memory

        chosen = self._of_memory(tags, released=False)

        async def release() -> bool:
            async with self._moving:  # also beyond the time that is waited for it
                self._of_memory(chosen, released=False)
                if done := await release_memory(self.engine, chosen):
                    self._released |= {*chosen}
                return done

        deadline = asyncio.get_running_loop().time() + timeout_s
        while not (done := await _within(timeout_s, release())):
            if done is None:
                raise ServerUnreachableError(f"its schedulers did not release memory within {timeout_s:.0f} s")
            if asyncio.get_running_loop().time() > deadline:
                raise ServerBusyError(f"requests were running for {timeout_s:.0f} s: no memory was released")
            await asyncio.sleep(_IDLE_POLL_S)

    async def resume_memory(self, tags: Collection[str], timeout_s: float) -> None:
        """Take memory of `tags` again. That of weights holds none until the next full push: until then it is fenced.

        Raises: ConfigError: it was not released. ServerUnreachableError: the schedulers do not answer.
        """
        from receiver_plugin.sglang_requests import resume_memory

        chosen = self._of_memory(tags, released=True)

        async def resume() -> bool:
            async with self._moving:
                self._of_memory(chosen, released=True)
                await resume_memory(self.engine, chosen)
                self._released -= {*chosen}
                return True

        if not await _within(timeout_s, resume()):
            raise ServerUnreachableError(f"its schedulers did not resume memory within {timeout_s:.0f} s")

    def _of_memory(self, tags: Collection[str], released: bool) -> tuple[str, ...]:
        """`tags` in SGLang's order; a second release or resume of one would end its schedulers."""
        wrong = {*tags} - {*MEMORY_TAGS} or {tag for tag in tags if (tag in self._released) != released}
        if wrong or not tags:
            known = sorted(self._released) if released else [tag for tag in MEMORY_TAGS if tag not in self._released]
            what = "resumed" if released else "released"
            raise ConfigError(f"memory of {sorted(wrong)} cannot be {what} now, but of {known}")
        return tuple(tag for tag in MEMORY_TAGS if tag in tags)


async def _within(seconds: float, work: Awaitable[_T]) -> _T | None:
    """What comes of `work`, None if it takes longer: it goes on then, because it cannot be taken back."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=seconds)
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
