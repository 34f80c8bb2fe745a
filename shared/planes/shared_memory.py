"""CPU memory that another process of this host writes to: made and exported by a server, opened by the sender.

It has no name in any folder, so that nothing of it can be left behind: a sender opens it as a file of the process that
made it, which the kernel allows to the same user, in the same PID namespace. It is sealed, so that it never becomes
smaller under whoever has it open (the process would be ended by SIGBUS).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import struct
import weakref
from collections.abc import Callable

import torch

from shared.errors import TransferError

_WHERE = struct.Struct("<QQQQ")  # process, its file, inode number of that, size in bytes
WHERE_BYTES = _WHERE.size
_files: dict[int, int] = {}  # address of memory that was made here -> its file


def allocate(num_bytes: int) -> torch.Tensor:
    """Flat uint8 that `where` can export. Raises: TransferError: there is none."""
    try:
        file = os.memfd_create("fp8sync", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError) as error:
        raise TransferError(f"plane='same_host' needs memfd_create, of Linux: {error}") from error
    try:
        os.fchmod(file, 0o600)
        os.ftruncate(file, num_bytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        mapped = mmap.mmap(file, num_bytes)
    except OSError as error:
        os.close(file)
        raise TransferError(f"no {num_bytes / 1e9:.2f} GB of shared memory: {error}") from error
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    _files[memory.data_ptr()] = file
    weakref.finalize(mapped, _forget, memory.data_ptr(), file)
    return memory


def _forget(address: int, file: int) -> None:
    if _files.get(address) == file:  # Python unmaps first: other memory may lie there already
        del _files[address]
    os.close(file)


def holds(memory: torch.Tensor) -> bool:
    """Whether `allocate` made what `memory` lies in, so that another process can open it."""
    return memory.untyped_storage().data_ptr() in _files


def where(memory: torch.Tensor) -> bytes:
    """How to open `memory`, all of what `allocate` returned. Raises: TransferError: it was not made by that."""
    if (file := _files.get(memory.data_ptr())) is None:
        raise TransferError("a bucket on the CPU does not lie in shared memory, so that no other process can write it")
    found = os.fstat(file)
    return _WHERE.pack(os.getpid(), file, found.st_ino, found.st_size)


class SharedMapping:
    """Memory of a server in this process. Raises: TransferError: it cannot be opened, or is not what it should be."""

    def __init__(self, where: bytes) -> None:
        process, file, inode, num_bytes = _WHERE.unpack(where)
        path = f"/proc/{process}/fd/{file}"
        try:
            found = os.stat(path)
        except OSError as error:
            raise TransferError(
                f"memory of process {process} cannot be opened ({error.strerror}): with plane='same_host' trainer and "
                "servers run as one user, in one PID namespace (containers: --pid=host); or use plane='tcp'"
            ) from error
        if (found.st_ino, found.st_size) != (inode, num_bytes) or not stat.S_ISREG(found.st_mode):
            raise TransferError(f"file {file} of process {process} is not the memory that a server made")
        try:
            opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if not fcntl.fcntl(opened, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:  # on other files it is an error
                    raise TransferError(f"file {file} of process {process} could become smaller: it is not sealed")
                mapped = mmap.mmap(opened, num_bytes)
            finally:
                os.close(opened)
        except (OSError, ValueError, OverflowError) as error:
            raise TransferError(f"file {file} of process {process} is no memory to be shared: {error}") from error
        self._memory: torch.Tensor | None = torch.frombuffer(mapped, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        return self._opened.numel()

    @property
    def address(self) -> int:
        """Of its first byte, in this process. Raises: TransferError: it is closed."""
        return self._opened.data_ptr()

    def write(self, bucket: torch.Tensor, offset: int) -> Callable[[], bool]:
        """Begin to copy `bucket` (flat uint8, on any device) there; what is returned says whether that has ended."""
        to = self._opened[offset : offset + bucket.numel()]
        if to.data_ptr() != bucket.data_ptr():  # it was made there
            to.copy_(bucket)
        return lambda: True

    def room(self, offset: int, num_bytes: int) -> torch.Tensor | None:
        """That part of it, flat uint8."""
        return self._opened[offset : offset + num_bytes]

    def close(self) -> None:
        """Nothing is written any more. Idempotent."""
        self._memory = None  # unmapped with the last tensor that lies in it

    @property
    def _opened(self) -> torch.Tensor:
        if self._memory is None:
            raise TransferError("the memory of a server was let go")
        return self._memory
