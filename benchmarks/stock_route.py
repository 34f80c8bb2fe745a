"""The weight updates that SGLang has on board, as peers of a push: `/update_weights_from_distributed`, and for a
trainer on the server's own GPU `/update_weights_from_tensor`.

Buckets of named tensors go to one server of one rank, each as one flattened tensor or tensor by tensor. What makes
them out of a trainer's weights is here, too: tensor by tensor (`quantized`), or with the kernels of a push, a few
launches a bucket (`Grouped`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor

from examples.local_server import LocalServer, free_port
from sender.packer import Packer
from sender.quantize import quantize_into
from shared.buckets import DTYPE_NAMES, Layout, make_layout
from shared.config import FP8BlockConfig
from shared.naming import scale_name, should_quantize_param
from shared.numerics import scale_shape
from shared.protocol import ManifestTensor

BUCKET_BYTES = 1 << 30
GROUP_TIMEOUT_S = 1800.0  # longer than any deadline here: torch's NCCL watchdog ends the whole process then
FIRST_WITH_SESSIONS = Version("0.5.21")  # before it there are no routes to begin and end an update
Named = list[tuple[str, Tensor]]


def quantized(weights: Mapping[str, Tensor], config: FP8BlockConfig) -> Iterator[tuple[str, Tensor]]:
    """What a server of block FP8 loads, tensor by tensor, without waiting for the device.

    Linear weights as codes and scales, all else as it is. Nobody looks whether there was inf or NaN.
    """
    nonfinite = torch.zeros(1, dtype=torch.int32, device=next(iter(weights.values())).device)
    for name, weight in weights.items():
        if not should_quantize_param(name, tuple(weight.shape), config):
            yield name, weight
            continue
        codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        scale = torch.empty(scale_shape(*weight.shape), device=weight.device)
        quantize_into(weight, codes, scale, nonfinite, scale_fmt=config.scale_fmt, zero_scale=config.zero_scale)
        yield name, codes
        yield scale_name(name), scale


def buckets(tensors: Iterable[tuple[str, Tensor]], most_bytes: int = BUCKET_BYTES) -> Iterator[Named]:
    """`tensors` in their order, in lists of at most `most_bytes` (larger tensors alone), made when asked for."""
    bucket, num_bytes = Named(), 0
    for name, tensor in tensors:
        if bucket and num_bytes + tensor.nbytes > most_bytes:
            yield bucket
            bucket, num_bytes = Named(), 0
        bucket.append((name, tensor))
        num_bytes += tensor.nbytes
    if bucket:
        yield bucket


def layout_of(weights: Mapping[str, Tensor], config: FP8BlockConfig, bucket_bytes: int) -> Layout:
    """How a push would lay them out."""
    tensors = []
    for name, weight in weights.items():
        in_fp8 = should_quantize_param(name, tuple(weight.shape), config)
        spec = {"name": name, "shape": tuple(weight.shape), "quantized": in_fp8}
        dtype = "float8_e4m3fn" if in_fp8 else DTYPE_NAMES[weight.dtype]
        tensors.append(ManifestTensor.model_validate({**spec, "dtype": dtype}))
    return make_layout(tensors, bucket_bytes)


def staging_gb(weights: Mapping[str, Tensor], config: FP8BlockConfig, bucket_mib: Sequence[int]) -> str:
    """For `--fp8sync-staging`: an image, the largest bucket, and what a server holds beside its weights."""
    layouts = [layout_of(weights, config, mib << 20) for mib in bucket_mib]
    num_bytes = layouts[0].num_bytes * 1.01 + max(layout.window_bytes(3) for layout in layouts) + 100e6
    return f"{num_bytes / 1e9:.2f}"


class Grouped:
    """The buckets of `quantized(weights)`, each quantized in one buffer by the kernels of a push.

    A bucket is valid until the next one is asked for.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: FP8BlockConfig) -> None:
        self._weights, self.layout = weights, layout_of(weights, config, BUCKET_BYTES)
        self._packer = Packer(self.layout, config, next(iter(weights.values())).device)

    def buckets(self) -> Iterator[Named]:
        self._packer.begin()
        for bucket in self.layout.buckets:
            packed = self._packer.pack(bucket, {name: self._weights[name] for name in bucket.names})
            yield [(slot.name, slot.view(packed)) for slot in bucket.slots]


def flat(bucket: Named) -> Tensor:
    """The bytes of all tensors, one after the other: of their own memory if they lie like that, else a copy."""
    tensors = [tensor for _, tensor in bucket]
    storage, start = tensors[0].untyped_storage(), tensors[0].data_ptr()
    at = list(accumulate((tensor.nbytes for tensor in tensors), initial=start))
    in_a_row = all(
        (tensor.data_ptr(), tensor.untyped_storage().data_ptr()) == (begin, storage.data_ptr())
        and tensor.is_contiguous()
        for tensor, begin in zip(tensors, at[:-1], strict=True)
    )
    if not in_a_row:
        return torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
    whole = torch.empty(0, dtype=torch.uint8, device=tensors[0].device).set_(storage)
    return whole[start - storage.data_ptr() : at[-1] - storage.data_ptr()]


class Posts:
    """Requests to `server`, one after the other, while the caller goes on."""

    def __init__(self, server: LocalServer) -> None:
        self._server, self._pool = server, ThreadPoolExecutor(1)
        self._in_sessions = Version(importlib.metadata.version("sglang")) >= FIRST_WITH_SESSIONS

    def post(self, path: str, body: dict[str, object]) -> Callable[[], None]:
        """What is returned waits for the answer. Raises: RuntimeError: it is a refusal."""
        reply = self._pool.submit(self._server.post, path, body)

        def wait() -> None:
            response = reply.result()
            if response.status_code != 200 or not response.json()["success"]:
                raise RuntimeError(f"{path}: {response.status_code} {response.text}")

        return wait

    @contextmanager
    def updating(self) -> Iterator[None]:
        """An update of weights, in as many parts as it takes; at its end no KV cache of the old ones is left."""
        if self._in_sessions:
            self.post("/begin_weight_update", {})()
        yield
        if self._in_sessions:
            self.post("/end_weight_update", {})()
        if (reply := self._server.post("/flush_cache")).status_code != 200:
            raise RuntimeError(f"/flush_cache: {reply.text}")

    def abandon(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class TensorRoute:
    """`/update_weights_from_tensor` of one server of one rank, which opens memory of this process: on a GPU over CUDA
    IPC, elsewhere as a file of shared memory.
    """

    def __init__(self, server: LocalServer) -> None:
        self._posts = Posts(server)
        torch.multiprocessing.set_sharing_strategy("file_system")  # the other needs a parent in common

    def push(self, of_tensors: Iterable[Named]) -> int:
        """Update the server, a flattened tensor a bucket; the bytes that were sent."""
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        num_bytes = 0
        with self._posts.updating():
            for bucket in of_tensors:
                whole = flat(bucket)
                described = FlattenedTensorBucket(named_tensors=[(n, t.to("meta")) for n, t in bucket]).get_metadata()
                told = {"flattened_tensor": whole, "metadata": described}
                if whole.is_cuda:
                    torch.cuda.current_stream().synchronize()  # the other process does not wait for it
                tensors = [MultiprocessingSerializer.serialize(told, output_str=True)]
                body = {"serialized_named_tensors": tensors, "load_format": "flattened_bucket", "flush_cache": False}
                self._posts.post("/update_weights_from_tensor", body)()
                num_bytes += sum(tensor.nbytes for _, tensor in bucket)
        return num_bytes

    def abandon(self) -> None:
        self._posts.abandon()


class StockRoute:
    """`/update_weights_from_distributed` of one server of one rank, in a process group of its own.

    `backend`: `gloo`, which carries no FP8 tensors by themselves, or `nccl`, with the trainer's current device.
    """

    def __init__(self, server: LocalServer, backend: str = "gloo") -> None:
        from sglang.srt.utils import init_custom_process_group

        self._posts = Posts(server)
        port = free_port()
        self._name = f"stock {port}"  # this process has one for each server
        body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
        asked = self._posts.post("/init_weights_update_group", {**body, "group_name": self._name, "backend": backend})
        self._group: Any = init_custom_process_group(
            backend=backend,
            init_method=f"tcp://127.0.0.1:{port}",
            world_size=2,
            rank=0,
            group_name=self._name,
            timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )
        asked()

    def push(self, of_tensors: Iterable[Named], flattened: bool) -> int:
        """Update the server, bucket by bucket; the bytes that were sent.

        Returns when the server says that it is done, which on a GPU may be before its last copies are.
        """
        num_bytes = 0
        with self._posts.updating():
            for bucket in of_tensors:
                num_bytes += self._send(bucket, flattened)
        return num_bytes

    def _send(self, bucket: Named, flattened: bool) -> int:
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._name,
            "flush_cache": False,
            "load_format": "flattened_bucket" if flattened else None,
        }
        done = self._posts.post("/update_weights_from_distributed", body)
        tensors = [flat(bucket)] if flattened else [tensor for _, tensor in bucket]
        sent = [dist.broadcast(tensor, src=0, group=self._group, async_op=True) for tensor in tensors]
        for work in sent:
            assert work is not None  # this process is in the group
            work.wait()
        done()
        return sum(tensor.nbytes for tensor in tensors)

    def abandon(self) -> None:
        """After a failure: end on this device what waits for a server that never came. The server keeps its end."""
        if dist.get_backend(self._group) == "nccl":
            dist.distributed_c10d._abort_process_group(self._group)
        self._posts.abandon()
