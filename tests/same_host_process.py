"""`tests/same_host_peer.py` from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from shared.planes.same_host import SameHostSender
from shared.planes.signing import new_secret
from shared.protocol import Rendezvous


class Peer:
    """A server rank that has joined `plane`, on `device` ("cpu", or the number of a GPU) of the environment `env`.

    Raises: TransferError: it could not join.
    """

    def __init__(self, plane: SameHostSender, device: str, num_slots: int, sizes: list[int], **env: str) -> None:
        meeting = Rendezvous(
            plane="same_host",
            host=plane.host,
            port=plane.port,
            key="k",
            secret=new_secret(),
            world_size=2,
            first_rank=0,
            timeout_s=60.0,
        )
        words = [meeting.model_dump_json(), device, str(num_slots), *map(str, sizes)]
        command = [sys.executable, "-m", "tests.same_host_peer", *words]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
        )
        try:
            plane.join(meeting)
            assert self.line() == "joined"
        except BaseException:
            self.close()
            raise

    def step(self, num: int = 1) -> None:
        """Let it take so many steps more."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n" * num)
        self.process.stdin.flush()

    def line(self, timeout_s: float = 30.0) -> str:
        out = self.process.stdout
        assert out is not None
        with ThreadPoolExecutor(1) as pool:
            return str(pool.submit(out.readline).result(timeout=timeout_s)).strip()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
