"""Senders and servers in processes of their own, so that signals can end or freeze them at a named point.

A point is armed in the process before the push; there it sends the signal to itself, so the moment is exact. Control
messages go through pipes as JSON. Between a test and its own children, pickled pipes carry the rest.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from shared import errors, protocol
from tests.faults.models import Trainer
from tests.faults.sending import Call, WatchedSender
from tests.faults.server import Look, Server
from tests.faults.tripwire import Action, Place, Tripwire
from tests.test_ranks import PROCESSES, caught

START_TIMEOUT_S = 60.0
PROCESSES.set_forkserver_preload(["torch.distributed.fsdp", "sender", "receiver_plugin.receiver", __name__])


def killing() -> Action:
    return lambda data: _signal_self(signal.SIGKILL)


def stopping() -> Action:
    return lambda data: _signal_self(signal.SIGSTOP)


def _signal_self(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.1)  # another thread may be the one that takes it: this one must not get any further


def killing_soon(seed: int) -> Action:
    """At a moment within the next two milliseconds, while this process goes on: in the middle of what it sends."""

    def action(data: torch.Tensor | None) -> None:
        threading.Timer(random.Random(seed).uniform(0.0, 0.002), killing(), (None,)).start()

    return action


def waiting(seconds: float) -> Action:
    return lambda data: time.sleep(seconds)


class PipeCall:
    """Control messages through a pipe. Answers carry the number of their message: a late one counts for no other."""

    def __init__(self, name: str, pipe: Connection) -> None:
        self.name, self._pipe, self._lock, self._number = name, pipe, threading.Lock(), 0

    def __call__(self, message: BaseModel, timeout_s: float) -> protocol.Reply:
        kind, text = self.ask("call", message.model_dump_json(), timeout_s)
        if kind == "error":
            raise errors.error_from_wire(*text)
        return protocol.Reply.model_validate_json(text)

    def ask(self, what: str, body: Any, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        try:
            with self._lock:
                self._number += 1
                self._pipe.send((self._number, what, body))
                while self._pipe.poll(max(0.0, deadline - time.monotonic())):
                    number, answer = self._pipe.recv()
                    if number == self._number:
                        return answer
        except (EOFError, OSError) as error:
            raise errors.ServerUnreachableError(f"{self.name} is gone") from error
        raise errors.ServerUnreachableError(f"{self.name} did not answer within {timeout_s:.0f} s")


def answer_call(call: Call, text: str) -> tuple[str, Any]:
    try:
        return "reply", call(protocol.decode_message(text), START_TIMEOUT_S).model_dump_json()
    except errors.Fp8SyncError as error:
        return "error", (type(error).__name__, str(error), getattr(error, "problems", ()))


# ---- a server


def serve(pipe: Connection, index: int, tp_size: int) -> None:
    torch.set_num_threads(1)
    tripwire = Tripwire()
    server = Server(index, tp_size, tripwire)
    actions = {"kill": killing(), "stop": stopping()}
    while True:
        number, what, body = pipe.recv()
        answer: Any = None
        if what == "call":
            answer = answer_call(server.call, body)
        elif what == "arm":
            tripwire.arm(body[0], actions[body[1]])
        else:
            answer = server.look()
        pipe.send((number, answer))


class ServerProcess:
    """`Server` in a process of its own."""

    def __init__(self, index: int, tp_size: int) -> None:
        self.index, self.tp_size, self.name = index, tp_size, f"server {index}"
        self._start()

    def _start(self) -> None:
        pipe, theirs = PROCESSES.Pipe()
        arguments = (theirs, self.index, self.tp_size)
        self.process = PROCESSES.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self._pipe, self._ask = pipe, PipeCall(self.name, pipe)
        self._ask.ask("look", None, START_TIMEOUT_S)

    def call(self, message: BaseModel, timeout_s: float) -> protocol.Reply:
        return self._ask(message, timeout_s)

    def arm(self, place: Place, signal_name: str) -> None:
        self._ask.ask("arm", (place, signal_name), 10.0)

    def look(self) -> Look:
        found: Look = self._ask.ask("look", None, 10.0)
        return found

    def resume(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self._pipe.close()

    def restart(self) -> None:
        self.stop()
        self._start()


# ---- a sender


Arms = Sequence[tuple[Place, str]]


def push_once(
    result: Connection,
    pipes: Sequence[Connection],
    plane: protocol.PlaneName,
    seed: int,
    timeout_s: float,
    arms: Arms,
) -> None:
    """Push `Trainer(seed)` to servers that are reached through `pipes`."""
    calls = [(f"server {index}", PipeCall(f"server {index}", pipe)) for index, pipe in enumerate(pipes)]
    push_and_tell(result, WatchedSender(calls, plane, timeout_s), Trainer(seed), arms)


def push_and_tell(result: Connection, sender: WatchedSender, model: nn.Module, arms: Arms) -> None:
    """Prepare (unless the fault strikes there), arm, push, and say what came of it."""
    torch.set_num_threads(1)
    seed = model.get_parameter("model.embed_tokens.weight").sum().int().item()
    actions = {"kill": killing(), "stop": stopping(), "kill soon": killing_soon(int(seed)), "wait": waiting(2.0)}
    if not any(place.stage.split()[-1] in ("describe", "offer", "open") for place, _ in arms):
        sender.inner.prepare(model)
        sender.watch_plane()
    for place, action in arms:
        sender.tripwire.arm(place, actions[action])
    found = caught(lambda: sender.inner.push(model))
    sender.close()
    result.send(found)


class SenderProcess:
    """A sender in a process of its own: `body(result, *arguments)`. What it sends through its pipes goes to `calls`."""

    def __init__(self, body: Callable[..., None], arguments: Sequence[Any], calls: Sequence[Call] = ()) -> None:
        pairs = [PROCESSES.Pipe() for _ in calls]
        self._result, writer = PROCESSES.Pipe(duplex=False)
        pipes = ([theirs for _, theirs in pairs],) if calls else ()
        self.process = PROCESSES.Process(target=body, args=(writer, *pipes, *arguments), daemon=True)
        self.process.start()
        for end in (writer, *(theirs for _, theirs in pairs)):
            end.close()
        self._threads = [
            threading.Thread(target=_pump, args=(mine, call), daemon=True)
            for (mine, _), call in zip(pairs, calls, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def killed(self, timeout_s: float) -> bool:
        """Whether the signal that was armed has ended it; any other end is none of the fault."""
        self.process.join(timeout_s)
        return self.process.exitcode == -signal.SIGKILL

    def frozen(self) -> bool:
        """Whether it is stopped by a signal."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"

    def wait_until_frozen(self, timeout_s: float) -> None:
        """Raises: TimeoutError: it is not stopped by a signal in time."""
        deadline = time.monotonic() + timeout_s
        while not self.frozen():
            if time.monotonic() > deadline:
                raise TimeoutError("the sender was to be frozen and was not")
            time.sleep(0.01)

    def resume(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def outcome(self, timeout_s: float) -> dict[str, Any] | None:
        """What its push ended with, None if it was killed before that. Raises: TimeoutError: neither in time."""
        try:
            if not self._result.poll(timeout_s):
                raise TimeoutError(f"the sender said nothing for {timeout_s:.0f} s")
            found: dict[str, Any] = self._result.recv()
            return found
        except EOFError:
            return None

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self._result.close()
        for thread in self._threads:
            thread.join(5.0)


def _pump(pipe: Connection, call: Call) -> None:
    with pipe:
        while True:
            try:
                number, _, text = pipe.recv()
                pipe.send((number, answer_call(call, text)))
            except (EOFError, OSError):
                return
