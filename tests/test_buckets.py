"""`shared/buckets.py`: where every byte of a push lies, and that both sides come to the same answer."""

from __future__ import annotations

import hashlib

import pytest
import torch

from sender.packer import Packer
from shared.buckets import ALIGNMENT_BYTES, Layout, make_layout
from shared.config import FP8BlockConfig
from shared.errors import ConfigError
from shared.numerics import scale_shape
from shared.protocol import PROTOCOL_VERSION, ManifestTensor


def fp8(name: str, rows: int, cols: int) -> ManifestTensor:
    return ManifestTensor(name=name, shape=(rows, cols), dtype="float8_e4m3fn", quantized=True)


def bf16(name: str, *shape: int) -> ManifestTensor:
    return ManifestTensor(name=name, shape=shape, dtype="bfloat16", quantized=False)


def pack(layout: Layout, weights: dict[str, torch.Tensor]) -> list[bytes]:
    packer = Packer(layout, FP8BlockConfig(), torch.device("cpu"))
    return [packer.pack(bucket, weights).numpy().tobytes() for bucket in layout.buckets]


# Golden bytes. To change one of these literals is to raise PROTOCOL_VERSION.
GOLDEN_VERSION = 9
GOLDEN = (fp8("a.weight", 2, 4), bf16("norm.weight", 3), fp8("b.weight", 1, 3))
GOLDEN_WEIGHTS = {
    "a.weight": torch.tensor([[448, -448, 1, 0], [0.5, -0.25, 2**-9, 17]], dtype=torch.bfloat16),
    "norm.weight": torch.tensor([1, -2, 0.5], dtype=torch.bfloat16),
    "b.weight": torch.tensor([[0, 1, -3.5]], dtype=torch.bfloat16),
}
GOLDEN_BYTES = {  # offset -> bytes; all others are zero
    0: "7efe380030a80158",  # a: codes; 17 lies between 16 and 18 and goes to the even 16
    128: "0000803f",  # a: scale 448 / 448 = 1.0, fp32
    256: "803f00c0003f",  # norm: bf16
    384: "0070fe",  # b: codes
    512: "0000003c",  # b: scale 3.5 / 448 = 2**-7
}
GOLDEN_SHA256 = "3442b3589f848e85806f15cb1f5e1fc324ba95fe0a1df9c1129d639f73762e46"
GOLDEN_PLAN_HASH = "fefd93c01cc0868f003ee9d9373bcc71120ed0e3126bc6c25b28206062d4c264"


def test_golden_bucket() -> None:
    assert PROTOCOL_VERSION == GOLDEN_VERSION
    layout = make_layout(GOLDEN, 4096)
    (packed,) = pack(layout, GOLDEN_WEIGHTS)
    expected = bytearray(640)
    for offset, text in GOLDEN_BYTES.items():
        expected[offset : offset + len(text) // 2] = bytes.fromhex(text)
    assert packed == bytes(expected)
    assert hashlib.sha256(packed).hexdigest() == GOLDEN_SHA256
    assert layout.plan_hash == GOLDEN_PLAN_HASH
    assert [(slot.name, slot.offset_bytes, slot.num_bytes) for slot in layout.buckets[0].slots] == [
        ("a.weight", 0, 8),
        ("a.weight_scale_inv", 128, 4),
        ("norm.weight", 256, 6),
        ("b.weight", 384, 3),
        ("b.weight_scale_inv", 512, 4),
    ]


RAGGED = (
    fp8("q", 130, 257),
    bf16("norm", 97),
    fp8("big", 300, 300),
    fp8("k", 1, 1),
    bf16("embed", 61, 33),
    fp8("v", 256, 128),
)


@pytest.mark.parametrize("bucket_bytes", [128, 4096, 40_000, 1 << 20])
def test_every_byte_is_accounted_for(bucket_bytes: int) -> None:
    layout = make_layout(RAGGED, bucket_bytes)
    sent = [tensor for bucket in layout.buckets for tensor in (entry.tensor for entry in bucket.entries)]
    assert tuple(sent) == layout.tensors and sorted(sent, key=RAGGED.index) == list(RAGGED)
    assert make_layout(layout.tensors, bucket_bytes) == layout
    assert [bucket.index for bucket in layout.buckets] == list(range(len(layout.buckets)))
    for bucket in layout.buckets:
        end = 0
        for slot in bucket.slots:
            assert slot.offset_bytes % ALIGNMENT_BYTES == 0
            assert end <= slot.offset_bytes < end + ALIGNMENT_BYTES, "slots overlap, or a gap is too wide"
            end = slot.offset_bytes + slot.num_bytes
        assert end <= bucket.num_bytes < end + ALIGNMENT_BYTES
        assert bucket.num_bytes % ALIGNMENT_BYTES == 0
        assert bucket.num_bytes <= bucket_bytes or len(bucket.entries) == 1
    assert layout.num_bytes == sum(bucket.num_bytes for bucket in layout.buckets)
    assert layout.largest_bucket_bytes == max(bucket.num_bytes for bucket in layout.buckets)


def test_gaps_are_zero_also_in_a_reused_buffer() -> None:
    layout = make_layout(RAGGED, 40_000)
    packer = Packer(layout, FP8BlockConfig(), torch.device("cpu"))
    weights = {tensor.name: torch.ones(tensor.shape, dtype=torch.bfloat16) for tensor in RAGGED}
    for bucket in (*layout.buckets, *reversed(layout.buckets)):
        packed = packer.pack(bucket, weights).clone()
        for slot in bucket.slots:
            assert slot.view(packed).float().ne(0).all()
            packed[slot.offset_bytes : slot.offset_bytes + slot.num_bytes] = 0
        assert not packed.any()


def test_a_weight_and_its_scale_share_a_bucket() -> None:
    for bucket_bytes in (128, 1024, 5000, 40_000):
        for bucket in make_layout(RAGGED, bucket_bytes).buckets:
            for entry in bucket.entries:
                assert (entry.scale is not None) == entry.tensor.quantized
                if entry.scale is not None:
                    rows, cols = entry.tensor.shape
                    assert entry.scale.shape == scale_shape(rows, cols) and entry.scale.dtype == torch.float32
                    assert entry.scale.name == entry.tensor.name + "_scale_inv"


def test_a_scale_that_does_not_fit_takes_its_weight_along() -> None:
    first, second = bf16("first", 64), fp8("second", 1, 128)  # 128 bytes, then 128 + 128
    assert [b.names for b in make_layout((first, second), 4 * 384).buckets] == [("first", "second")]
    assert [b.names for b in make_layout((first, second), 4 * 384 - 1).buckets] == [("first",), ("second",)]


def test_a_tensor_larger_than_a_bucket_is_alone() -> None:
    layout = make_layout(RAGGED, 40_000)
    (big,) = [bucket for bucket in layout.buckets if "big" in bucket.names]
    assert big.names == ("big",) and big.num_bytes > 40_000
    assert layout.largest_bucket_bytes == big.num_bytes


@pytest.mark.parametrize("num_large", [0, 1, 2, 9])
def test_the_first_and_the_last_bucket_are_small(num_large: int) -> None:
    small, large = [bf16(f"s{i}", 64) for i in range(100)], [bf16(f"l{i}", 64 * 32) for i in range(num_large)]
    buckets = make_layout([*large, *small], 16 * 128).buckets
    sizes = [bucket.num_bytes // 128 for bucket in buckets if not bucket.names[0].startswith("l")]
    assert sizes == [4, 16, 16, 16, 16, 16, 12, 4]
    where = [bucket.index for bucket in buckets if bucket.names[0].startswith("l")]
    assert where == [2, 5, 8, 10, 11, 12, 13, 14, 15][:num_large]
    assert len(buckets) == 8 + num_large
    assert [name for bucket in buckets for name in bucket.names if name[0] == "s"] == [t.name for t in small]


def test_more_large_tensors_than_buckets_between_which_they_could_go() -> None:
    small, large = [bf16(f"s{i}", 64) for i in range(2)], [bf16(f"l{i}", 640) for i in range(4)]

    def names(tensors: list[ManifestTensor]) -> list[str]:
        return [name for bucket in make_layout(tensors, 128).buckets for name in bucket.names]

    assert names([*large, *small]) == ["s0", "l0", "l1", "l2", "l3", "s1"]
    assert names([*large, small[0]]) == ["s0", "l0", "l1", "l2", "l3"]
    assert names(large) == ["l0", "l1", "l2", "l3"]


@pytest.mark.parametrize("num_at_once", [1, 2, 3, 4])
def test_buckets_that_are_there_at_a_time_do_not_overlap(num_at_once: int) -> None:
    layout = make_layout([*RAGGED, *(bf16(f"s{i}", 64) for i in range(100))], 16 * 128)
    memory = torch.zeros(layout.window_bytes(num_at_once), dtype=torch.uint8)
    assert num_at_once > 1 or memory.numel() == layout.largest_bucket_bytes
    windows = layout.windows(memory, num_at_once)
    for bucket in layout.buckets:
        there = layout.buckets[max(0, bucket.index + 1 - num_at_once) : bucket.index + 1]
        for other in there:
            windows[other.index].fill_(other.index)
        for other in there:
            window = windows[other.index]
            assert window.numel() == other.num_bytes and bool(window.eq(other.index).all())


def test_slots_are_views_of_their_bucket() -> None:
    (bucket,) = make_layout(GOLDEN, 4096).buckets
    buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    for slot in bucket.slots:
        view = slot.view(buffer)
        assert view.shape == slot.shape and view.dtype == slot.dtype
        assert view.data_ptr() == buffer.data_ptr() + slot.offset_bytes


def test_plan_hash_tells_plans_apart() -> None:
    layout = make_layout(GOLDEN, 4096)
    assert make_layout(list(GOLDEN), 4096).plan_hash == layout.plan_hash
    others = [
        make_layout(GOLDEN, 4097),
        make_layout(GOLDEN[::-1], 4096),
        make_layout(GOLDEN[:2], 4096),
        make_layout((fp8("a.weight", 4, 2), *GOLDEN[1:]), 4096),
        make_layout((fp8("c.weight", 2, 4), *GOLDEN[1:]), 4096),
        make_layout((bf16("a.weight", 2, 4), *GOLDEN[1:]), 4096),
        make_layout((GOLDEN[0], GOLDEN[1].model_copy(update={"dtype": "float16"}), GOLDEN[2]), 4096),
        make_layout((GOLDEN[0].model_copy(update={"quantized": False}), *GOLDEN[1:]), 4096),
    ]
    assert len({layout.plan_hash, *(other.plan_hash for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("tensors", "bucket_bytes", "match"),
    [
        ((), 1024, "no tensors"),
        ((bf16("a", 2), fp8("a", 2, 2)), 1024, "same name"),
        (GOLDEN, ALIGNMENT_BYTES - 1, "smaller than the alignment"),
        (GOLDEN, -1, "smaller than the alignment"),
    ],
)
def test_layouts_that_cannot_be(tensors: tuple[ManifestTensor, ...], bucket_bytes: int, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_layout(tensors, bucket_bytes)
