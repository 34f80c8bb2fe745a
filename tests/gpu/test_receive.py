"""One GPU: what a receiver does to a bucket, at the sizes of real models and beyond those of int32, against torch.

`tests/test_grouped_copy.py` and `tests/test_triton_digest.py` run on a GPU, too, and have the small cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.receive import BUCKET_BYTES, Model, differing, feed_forward, fill, qwen3_8b, qwen3_30b_a3b
from receiver_plugin.manifest import expected_in_fp8, manifest_of, plan_rank
from receiver_plugin.probe import fingerprint
from receiver_plugin.rooms import Need, Room
from receiver_plugin.staging import Staging
from sender.packer import Packer
from sender.source import ModuleSource
from shared import digest as digests
from shared.buckets import make_layout
from shared.config import FP8BlockConfig
from shared.grouped_copy import GroupedCopy
from tests.test_digest import SECRET
from tests.test_push_memory import expected
from tests.tiny_models import Served, Trainer


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def noise(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cuda").random_(0, 256)


@pytest.mark.parametrize("way", ["reserved", "kv_pool", "in_place"])
def test_what_is_committed_is_what_a_loader_loads(way: str) -> None:
    """With bf16 norms that become fp32, which torch copies, and an image cut into pieces wherever one ends."""
    served, trainer = Served().cuda(), Trainer(seed=4).cuda()
    source, config = ModuleSource(trainer), FP8BlockConfig()
    manifest = manifest_of(source.tensors, expected_in_fp8(source.tensors, config))
    plan, _ = plan_rank(served, manifest)
    layout = make_layout(manifest, 64 << 10)
    need, size = Need.of(served, plan, layout), 128 * 77
    pieces = {"reserved": [noise(need.image_bytes)], "in_place": []}
    buffers = pieces.get(way, [noise(size) for _ in range(-(-need.image_bytes // size))])
    staging = Staging(served, plan, layout, Room(way, buffers, noise(need.bucket_bytes)))  # type: ignore[arg-type]
    packer = Packer(layout, config, torch.device("cuda"))
    for bucket in layout.buckets:
        staging.bucket(bucket.index)[:] = packer.pack(bucket, source.gather(bucket.names))
        staging.scatter(bucket.index)
    assert staging.touched == (way == "in_place")
    staging.commit()
    assert fingerprint(served) == expected(trainer.cpu())


@pytest.mark.parametrize(
    "model",
    [qwen3_8b(4), qwen3_30b_a3b(1, num_layers=2), qwen3_30b_a3b(2, num_layers=2)],
    ids=lambda model: model.title,
)
def test_every_byte_of_real_shapes(model: Model) -> None:
    layout, module = make_layout(model.tensors, BUCKET_BYTES), model.build()
    assert differing(model, module, Staging(module, model.plan, layout), layout) == []


def test_a_push_waits_for_nothing_and_launches_little() -> None:
    """No call that waits for the device, and as many kernels as there are kinds of alignment."""
    model = Model("a layer", tp_size=2)
    for expert in range(128):
        feed_forward(model, 0, 2048, 768, (128, expert))
    layout, module = make_layout(model.tensors, 1 << 30), model.build()
    staging = Staging(module, model.plan, layout)
    assert len(layout.buckets) == 1
    data = fill(staging, layout, 0)
    digests.warm(SECRET, data.device)

    def push() -> None:
        digests.start_digest(data, secret=SECRET, version=1, bucket=0)
        staging.scatter(0)
        staging.commit()

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        push()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        push()
        torch.cuda.synchronize()
    ours = Counter(event.name for event in profile.events() if event.name in ("_copy_kernel", "_digest_kernel"))
    # The codes; the scales of what is cut by columns, 12 bytes a row; the commit.
    assert ours == {"_digest_kernel": 1, "_copy_kernel": 3}


@pytest.mark.parametrize("offset", [0, 4, 5])
def test_a_row_of_more_than_int32_bytes(offset: int) -> None:
    num_bytes = (1 << 31) + 100_003
    source, target = noise(num_bytes + 16), torch.zeros(num_bytes + 16, dtype=torch.uint8, device="cuda")
    GroupedCopy([target[offset : offset + num_bytes]], [source[offset : offset + num_bytes]]).run()
    assert torch.equal(target[offset : offset + num_bytes], source[offset : offset + num_bytes])
    assert not target[:offset].any() and not target[offset + num_bytes :].any()


def test_rows_that_lie_more_than_int32_bytes_apart() -> None:
    source = noise(3 << 31).view(3, -1)[:, 64:4096]
    target = torch.zeros(3, 4032, dtype=torch.uint8, device="cuda")
    GroupedCopy([target], [source]).run()
    assert torch.equal(target, source)


@pytest.mark.parametrize(("num_words", "first_word"), [(BUCKET_BYTES // 4, 0), ((1 << 29) + 12_345, (1 << 20) - 77)])
def test_a_digest_of_many_pages(num_words: int, first_word: int) -> None:
    data = noise(4 * num_words)
    wanted = digests.digest(data.cpu(), secret=SECRET, version=3, bucket=1, first_word=first_word)
    for _ in range(3):
        started = digests.start_digest(data, secret=SECRET, version=3, bucket=1, first_word=first_word)
        assert digests.number(started) == wanted


def test_many_digests_under_way_keep_their_multipliers() -> None:
    """Those of pages travel from pinned memory that is used again."""
    data = noise(64 << 20)
    started = [digests.start_digest(data, secret=SECRET, version=1, bucket=index) for index in range(200)]
    found, plain = [digests.number(digest) for digest in started], data.cpu()
    for index in (0, 1, 57, 199):
        assert found[index] == digests.digest(plain, secret=SECRET, version=1, bucket=index)
    assert len(set(found)) == 200
