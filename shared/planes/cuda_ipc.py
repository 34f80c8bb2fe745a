"""GPU memory that another process of this host writes to: exported by a server, opened by the sender (CUDA IPC).

Of the runtime library that torch has loaded, as much as this takes. What is exported is the allocation in which the
memory lies, whole, as the driver knows it; with it goes where in that the memory begins, and the UUID of its GPU.

Declarations: cuda_runtime_api.h and cuda.h of CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import lru_cache

import torch

from shared.errors import TransferError

_HANDLE_BYTES, _UUID_BYTES = 64, 36
_WHERE = struct.Struct(f"<{_HANDLE_BYTES}s{_UUID_BYTES}sQQ")  # handle, GPU, first byte in the allocation, size
WHERE_BYTES = _WHERE.size
_LAZY_PEER_ACCESS = 1
_ALREADY = 704  # cudaErrorPeerAccessAlreadyEnabled
_DEFAULT = 4  # cudaMemcpyDefault: the driver knows on which device an address lies


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * _HANDLE_BYTES),)


@lru_cache(maxsize=1)
def _runtime() -> ctypes.CDLL:
    """Its functions let other threads run meanwhile."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise TransferError("memory of a GPU is shared through CUDA, and there is none here")
    torch.cuda.init()  # loads it
    name = f"libcudart.so.{torch.version.cuda.split('.')[0]}"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise TransferError(f"torch's {name} is not a library of its own: {error}") from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.cudaGetErrorString.restype = ctypes.c_char_p
    library.cudaGetErrorString.argtypes = (integer,)
    library.cudaSetDevice.argtypes = (integer,)
    library.cudaIpcGetMemHandle.argtypes = (ctypes.POINTER(_Handle), pointer)
    library.cudaIpcOpenMemHandle.argtypes = (ctypes.POINTER(pointer), _Handle, ctypes.c_uint)
    library.cudaIpcCloseMemHandle.argtypes = (pointer,)
    library.cudaDeviceEnablePeerAccess.argtypes = (integer, ctypes.c_uint)
    library.cudaMemcpyAsync.argtypes = (pointer, pointer, ctypes.c_size_t, integer, pointer)
    return library


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransferError(f"the driver of the GPU is not there: {error}") from error
    address = ctypes.c_uint64
    library.cuMemGetAddressRange_v2.argtypes = (
        *(ctypes.POINTER(address), ctypes.POINTER(ctypes.c_size_t)),
        address,
    )
    return library


def _said(result: int) -> str | None:
    """What went wrong, None if nothing did. torch would find it after its next kernel, and take it for its own."""
    if result == 0:
        return None
    _runtime().cudaGetLastError()
    return str(_runtime().cudaGetErrorString(result).decode())


def _uuid(gpu: int) -> bytes:
    return str(torch.cuda.get_device_properties(gpu).uuid).encode()


def where(memory: torch.Tensor, settled: bool = False) -> bytes:
    """How to open `memory` (on a GPU). Returns when nothing that was asked of that GPU before is under way any more,
    unless that is `settled`.

    Raises: TransferError: it cannot be exported.
    """
    gpu = memory.device.index
    if not settled:
        torch.cuda.synchronize(gpu)  # who had this memory before may have left work behind
    handle, base, size = _Handle(), ctypes.c_uint64(), ctypes.c_size_t()
    with torch.cuda.device(gpu):
        wrong = _said(_runtime().cudaSetDevice(gpu))  # the driver, unlike the runtime, needs it set on this thread
        address = ctypes.c_uint64(memory.data_ptr())
        if wrong is None and _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address):
            wrong = "the driver does not know it"
        wrong = wrong or _said(_runtime().cudaIpcGetMemHandle(ctypes.byref(handle), base.value))
    if wrong is not None:
        raise TransferError(
            f"memory for buckets on GPU {gpu} cannot be exported over CUDA IPC ({wrong}). It must not be of expandable "
            "segments (start the server without PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True), nor of a region of "
            "torch_memory_saver (--enable-memory-saver); or use plane='nccl' or 'tcp'"
        )
    return _WHERE.pack(bytes(handle.reserved), _uuid(gpu), memory.data_ptr() - base.value, memory.nbytes)


class CudaMapping:
    """Memory of a server, of any GPU of this host that this process sees; copied to from GPU `gpu`.

    Raises: TransferError: it cannot be opened or reached.
    """

    def __init__(self, where: bytes, gpu: int | None) -> None:
        handle, uuid, first, num_bytes = _WHERE.unpack(where)
        if gpu is None:
            raise TransferError("a server receives on a GPU, and this trainer rank has none: use plane='tcp'")
        self._gpu, self._is_own = gpu, _uuid(gpu) == uuid
        self._check_reach(uuid)
        with torch.cuda.device(gpu):
            base = ctypes.c_void_p()
            wrong = _said(
                _runtime().cudaIpcOpenMemHandle(ctypes.byref(base), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
            )
            if wrong is not None:
                raise TransferError(
                    f"memory of a server on GPU {uuid.decode()} cannot be opened ({wrong}): CUDA IPC works between two "
                    "processes of a host; in containers they share --ipc=host, or use plane='nccl' or 'tcp'"
                )
            self._base, self._first, self._num_bytes = base, first, num_bytes
            self._is_written_by_kernels = False
            self._lent: set[int] = set()  # addresses of what is being made there
            self._stream = torch.cuda.Stream(gpu, priority=-1)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def address(self) -> int:
        """Of its first byte, here. Kernels of this GPU may write there. Raises: TransferError: it is closed."""
        self._is_written_by_kernels = True
        return self._address(0)

    def _check_reach(self, uuid: bytes) -> None:
        theirs = next((index for index in range(torch.cuda.device_count()) if _uuid(index) == uuid), None)
        if theirs is None:
            raise TransferError(
                f"a server receives on GPU {uuid.decode(errors='replace')}, which this trainer rank does not see: "
                "its CUDA_VISIBLE_DEVICES must name the GPUs of all servers, beside its own"
            )
        if theirs != self._gpu and not torch.cuda.can_device_access_peer(self._gpu, theirs):
            raise TransferError(
                f"GPU {self._gpu} of the trainer cannot write to GPU {theirs}: use plane='nccl' or 'tcp'"
            )
        if theirs != self._gpu:  # memory that is opened lazily would be copied to by way of the host
            with torch.cuda.device(self._gpu):
                result = _runtime().cudaDeviceEnablePeerAccess(theirs, 0)
                wrong = _said(result)
            if wrong is not None and result != _ALREADY:
                raise TransferError(f"GPU {self._gpu} of the trainer cannot reach GPU {theirs}: {wrong}")

    def write(self, bucket: torch.Tensor, offset: int) -> Callable[[], bool]:
        """Begin to copy `bucket` (flat uint8, whole by now) there; what is returned says whether that has ended.

        The caller keeps `bucket` until then.
        """
        to = self._address(offset)
        self._lent.discard(to)
        if to == bucket.data_ptr():  # it was made there, and is whole
            return lambda: True
        with torch.cuda.device(self._gpu):
            stream = ctypes.c_void_p(self._stream.cuda_stream)
            wrong = _said(_runtime().cudaMemcpyAsync(to, bucket.data_ptr(), bucket.numel(), _DEFAULT, stream))
            if wrong is not None:
                raise TransferError(f"a bucket could not be copied to the memory of a server: {wrong}")
            ended = torch.cuda.Event()
            ended.record(self._stream)
        return ended.query

    def room(self, offset: int, num_bytes: int) -> torch.Tensor | None:
        """That part of it, flat uint8, if it is of the GPU that copies; None if not: what is made is read again here,
        for its digest, and to read over NVLink takes as long as to send.

        Nothing may be asked to write there once this is closed.
        """
        if not self._is_own:
            return None
        address, device = self._address(offset), torch.device("cuda", self._gpu)
        self._lent.add(address)
        storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (num_bytes,), (1,))

    def _address(self, offset: int) -> int:
        """Raises: TransferError: it is closed."""
        if not self._base:
            raise TransferError("the memory of a server was let go")
        return int(self._base.value or 0) + self._first + offset

    def close(self) -> None:
        """Unmap it; all copies that were begun have ended. Idempotent."""
        base, self._base = self._base, ctypes.c_void_p()
        if base:
            with torch.cuda.device(self._gpu):
                if (
                    self._lent or self._is_written_by_kernels
                ):  # one that writes there would end the trainer's use of its GPU
                    torch.cuda.synchronize(self._gpu)
                _said(_runtime().cudaIpcCloseMemHandle(base))
