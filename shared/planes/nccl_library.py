"""As much of NCCL as the data plane needs, called without torch's process groups.

torch's group has a watchdog that ends the process, here a server, when a peer is silent for too long. What is here
waits for nothing: a communicator is made and used in NCCL's non-blocking mode, whoever waits has a deadline of his own,
and `abort` ends a kernel that waits for a peer. The library is the one that torch has loaded.

Declarations: nccl.h of NCCL 2.18, whose calls and structures later releases take as they are.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from shared.errors import TransferError

ID_BYTES = 128
_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_MAGIC, _VERSION, _UNDEFINED = 0xCAFEBEEF, 21800, -(1 << 31)


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


class _Config(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    )


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """Its functions let other threads run meanwhile."""
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        raise TransferError("NCCL needs a GPU and a torch that was built with it")
    torch.cuda.init()  # loads it
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise TransferError(f"torch's NCCL is not a library of its own: {error}") from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.ncclGetErrorString.restype = library.ncclGetLastError.restype = ctypes.c_char_p
    library.ncclGetErrorString.argtypes = (integer,)
    library.ncclGetLastError.argtypes = (pointer,)
    library.ncclGetUniqueId.argtypes = (ctypes.POINTER(_UniqueId),)
    library.ncclCommInitRankConfig.argtypes = (
        *(ctypes.POINTER(pointer), integer, _UniqueId, integer),
        ctypes.POINTER(_Config),
    )
    library.ncclCommAbort.argtypes = (pointer,)
    return library


@lru_cache(maxsize=1)
def _quick() -> ctypes.PyDLL:
    """Calls that take microseconds: to let other threads run, and to wait for one's turn again, would take longer."""
    _library()
    library, pointer, integer = ctypes.PyDLL("libnccl.so.2"), ctypes.c_void_p, ctypes.c_int
    library.ncclCommGetAsyncError.argtypes = (pointer, ctypes.POINTER(integer))
    library.ncclBroadcast.argtypes = (pointer, pointer, ctypes.c_size_t, integer, integer, pointer, pointer)
    return library


def new_unique_id() -> bytes:
    """What all ranks of one communicator must have. Raises: TransferError."""
    found = _UniqueId()
    _check(_library().ncclGetUniqueId(ctypes.byref(found)), None)
    return bytes(found.internal)


class Communicator:
    """Rank `rank` of `size`, on the current device. It is ready to be used once `settled` says so.

    `max_ctas`: how many multiprocessors a transfer may occupy.

    Raises (all methods but `abort`): TransferError: what NCCL says.
    """

    def __init__(self, unique_id: bytes, rank: int, size: int, max_ctas: int) -> None:
        config = _Config(
            ctypes.sizeof(_Config), _MAGIC, _VERSION, 0, _UNDEFINED, _UNDEFINED, max_ctas, None, _UNDEFINED
        )
        self._comm = ctypes.c_void_p()
        id_of_all = _UniqueId.from_buffer_copy(unique_id)
        _check(
            _library().ncclCommInitRankConfig(ctypes.byref(self._comm), size, id_of_all, rank, ctypes.byref(config)),
            None,
        )

    def settled(self) -> bool:
        """Whether what was asked for last has been taken up, or is at least on its stream."""
        state = ctypes.c_int()
        _check(_quick().ncclCommGetAsyncError(self._handle, ctypes.byref(state)), self._comm)
        _check(state.value, self._comm)
        return state.value == _SUCCESS

    def broadcast(self, data: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """`data` (flat uint8) of rank 0 to all ranks, on `stream`. The kernel runs once all ranks have called it."""
        address = ctypes.c_void_p(data.data_ptr())
        asked = _quick().ncclBroadcast(
            address, address, data.numel(), _UINT8, 0, self._handle, ctypes.c_void_p(stream.cuda_stream)
        )
        _check(asked, self._comm)

    def abort(self) -> None:
        """End what runs, and leave. Idempotent."""
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            _library().ncclCommAbort(comm)

    @property
    def _handle(self) -> ctypes.c_void_p:
        if not self._comm:
            raise TransferError("the data plane is closed")
        return self._comm


def _check(result: int, comm: ctypes.c_void_p | None) -> None:
    if result in (_SUCCESS, _IN_PROGRESS):
        return
    text = _library().ncclGetErrorString(result).decode()
    last = (_library().ncclGetLastError(comm) or b"").decode().strip()
    raise TransferError(f"NCCL: {text}" + (f" ({last})" if last else ""))
