"""`shared/protocol.py` and `shared/errors.py`: the bytes of the wire, what is refused, errors that cross it."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from shared import errors, protocol
from shared.config import FP8BlockConfig, WireModel
from shared.protocol import (
    PROTOCOL_VERSION,
    ManifestTensor,
    Offer,
    Open,
    Rendezvous,
    Reply,
    TensorSpec,
    WireError,
    decode_message,
)

# Golden bytes. To change one of these literals is to raise PROTOCOL_VERSION.
GOLDEN_VERSION = 9

OFFER = Offer(
    config=FP8BlockConfig(scale_fmt="ue8m0", modules_to_not_convert=("lm_head",)),
    tensors=(
        TensorSpec(name="a.weight", shape=(130, 64), dtype="bfloat16"),
        TensorSpec(name="norm.weight", shape=(64,), dtype="float16"),
    ),
)
OFFER_BYTES = (
    b'{"kind":"offer","protocol":9,"config":{"block_size":[128,128],"dtype":"float8_e4m3fn","scale_fmt":"ue8m0",'
    b'"zero_scale":"one","modules_to_not_convert":["lm_head"]},"tensors":[{"name":"a.weight","shape":[130,64],'
    b'"dtype":"bfloat16"},{"name":"norm.weight","shape":[64],"dtype":"float16"}]}'
)

OPEN = Open(
    sender="host-0a",
    session="5e55",
    incarnation="1nc",
    plan_hash="beef",
    bucket_bytes=1 << 20,
    rendezvous=(
        Rendezvous(
            plane="tcp",
            host="10.0.0.1",
            port=29500,
            key="4ey",
            secret="5e" * 32,
            world_size=5,
            first_rank=2,
            timeout_s=30.0,
        ),
    ),
)
OPEN_BYTES = (
    b'{"kind":"open","sender":"host-0a","session":"5e55","incarnation":"1nc","plan_hash":"beef","bucket_bytes":1048576,'
    b'"staging":"auto","slices":false,"rendezvous":[{"plane":"tcp","host":"10.0.0.1","port":29500,"key":"4ey","secret":"'
    + b"5e"
    * 32
    + b'","world_size":5,'
    b'"first_rank":2,"timeout_s":30.0}]}'
)

MANIFEST = (
    ManifestTensor(name="a.weight", shape=(130, 64), dtype="float8_e4m3fn", quantized=True),
    ManifestTensor(name="norm.weight", shape=(64,), dtype="bfloat16", quantized=False),
)
MANIFEST_BYTES = (
    b'[{"name":"a.weight","shape":[130,64],"dtype":"float8_e4m3fn","quantized":true},'
    b'{"name":"norm.weight","shape":[64],"dtype":"bfloat16","quantized":false}]'
)

REPLY = Reply(
    state="FENCED",
    version=3,
    fence="why",
    error=WireError(kind="PlanError", message="no", problems=("x", "y")),
    manifest=MANIFEST,
    lands=("in_place",),
)
REPLY_BYTES = (
    b'{"state":"FENCED","version":3,"fence":"why","exclusive":false,"error":{"kind":"PlanError","message":"no",'
    b'"problems":["x","y"]},"info":null,"manifest":'
    + MANIFEST_BYTES
    + b',"plan_hash":null,"staging":null,"lands":["in_place"],"probe":null}'
)
FIELDS = {
    "Describe": "kind protocol",
    "Offer": "kind protocol config tensors",
    "Open": "kind sender session incarnation plan_hash bucket_bytes staging slices rendezvous",
    "Begin": "kind session version deadline_s shut",
    "Shut": "drain_s hold_s in_flight",
    "Verify": "kind session version digests",
    "Prepare": "kind session version hold_s before in_flight idle promise",
    "Hold": "drain_s hold_s in_flight kind session version promise",
    "Commit": "kind session version drain_s in_flight held opens digests",
    "Release": "kind session version",
    "Abort": "kind session version reason fence",
    "Close": "kind session",
    "Probe": "kind",
    "Reply": "state version fence exclusive error info manifest plan_hash staging lands probe",
    "WireError": "kind message problems",
    "Rendezvous": "plane host port key secret world_size first_rank timeout_s",
    "TensorSpec": "name shape dtype",
    "ManifestTensor": "name shape dtype quantized",
    "FP8BlockConfig": "block_size dtype scale_fmt zero_scale modules_to_not_convert",
    "ServerInfo": "protocol sglang_version incarnation num_ranks num_replicas block_size scale_fmt device "
    "compute_capability gemm_backend moe_backend cannot_keep places",
    "Place": "host gpu",
}


def changed(message: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(message), **fields}).encode()


def test_golden_bytes() -> None:
    assert PROTOCOL_VERSION == GOLDEN_VERSION
    assert OFFER.model_dump_json().encode() == OFFER_BYTES
    assert OPEN.model_dump_json().encode() == OPEN_BYTES
    assert REPLY.model_dump_json().encode() == REPLY_BYTES
    manifest = TypeAdapter(tuple[ManifestTensor, ...])
    assert manifest.dump_json(MANIFEST) == MANIFEST_BYTES
    assert manifest.validate_json(MANIFEST_BYTES) == MANIFEST


def test_the_fields_of_everything_on_the_wire() -> None:
    models = {name: model for name, model in vars(protocol).items() if isinstance(model, type)}
    wire = {name: model for name, model in models.items() if issubclass(model, WireModel) and model is not WireModel}
    assert {name: " ".join(model.model_fields) for name, model in wire.items()} == FIELDS


def test_messages_decode_to_what_they_were() -> None:
    assert decode_message(OFFER_BYTES) == OFFER
    assert decode_message(OPEN_BYTES.decode()) == OPEN
    assert Reply.model_validate_json(REPLY_BYTES) == REPLY


@pytest.mark.parametrize(
    "data",
    [
        changed(OPEN_BYTES, extra=1),
        changed(OPEN_BYTES, bucket_bytes="1048576"),
        changed(OPEN_BYTES, bucket_bytes=1048576.5),
        changed(OPEN_BYTES, bucket_bytes=True),
        changed(OPEN_BYTES, plan_hash=None),
        changed(OPEN_BYTES, rendezvous=[{**OPEN.rendezvous[0].model_dump(), "port": "29500"}]),
        changed(OPEN_BYTES, rendezvous=[{**OPEN.rendezvous[0].model_dump(), "plane": "ucx"}]),
        changed(OPEN_BYTES, rendezvous=[{**OPEN.rendezvous[0].model_dump(), "rank": 1}]),
        OPEN_BYTES.replace(b'"session":"5e55",', b""),
        changed(OPEN_BYTES, kind="reopen"),
        OPEN_BYTES.replace(b'"kind":"open",', b""),
        changed(OFFER_BYTES, tensors=[{"name": "a", "shape": [2], "dtype": "int8"}]),
        changed(OFFER_BYTES, tensors=[{"name": "a", "shape": ["2"], "dtype": "bfloat16"}]),
        changed(OFFER_BYTES, config={"block_size": [64, 64]}),
        OPEN_BYTES[:-1],
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(errors.ConfigError, match="not a control message of protocol 9"):
        decode_message(data)


BEGIN_BYTES = b'{"kind":"begin","session":"s","version":1,"deadline_s":1.0}'
TENSOR = {"name": "a", "shape": [2], "dtype": "bfloat16"}
BEYOND = [
    changed(BEGIN_BYTES, session="s" * 257),
    changed(BEGIN_BYTES, version=-1),
    changed(BEGIN_BYTES, version=1 << 62),
    changed(BEGIN_BYTES, deadline_s=0.0),
    changed(BEGIN_BYTES, deadline_s=1e9),
    BEGIN_BYTES.replace(b"1.0", b"NaN"),
    BEGIN_BYTES.replace(b"1.0", b"1e999"),
    BEGIN_BYTES.replace(b'"version":1', b'"version":1' + b"0" * 10_000),
    changed(OPEN_BYTES, sender="s" * 257),
    changed(OPEN_BYTES, incarnation="i" * ((1 << 14) + 1)),
    changed(OPEN_BYTES, bucket_bytes=0),
    changed(OPEN_BYTES, bucket_bytes=(1 << 40) + 1),
    *(
        changed(OPEN_BYTES, rendezvous=[{**OPEN.rendezvous[0].model_dump(), **field}])
        for field in (
            {"port": 1 << 16},
            {"port": -1},
            {"host": "h" * 257},
            {"key": "k" * 257},
            {"secret": ""},
            {"secret": "5e" * 31},
            {"secret": "5E" * 32},
            {"secret": "5e" * 32 + "\n"},
            {"world_size": 1},
            {"world_size": 1 << 21},
            {"first_rank": -1},
        )
    ),
    changed(OFFER_BYTES, tensors=[{**TENSOR, "name": "n" * 1025}]),
    changed(OFFER_BYTES, tensors=[{**TENSOR, "name": ""}]),
    changed(OFFER_BYTES, tensors=[{**TENSOR, "shape": [1] * 9}]),
    changed(OFFER_BYTES, tensors=[{**TENSOR, "shape": [-1]}]),
    changed(OFFER_BYTES, tensors=[{**TENSOR, "shape": [(1 << 40) + 1]}]),
    changed(OFFER_BYTES, tensors=[TENSOR] * ((1 << 18) + 1)),
    b'{"kind":"verify","session":"s","version":1,"digests":[-1]}',
    b'{"kind":"verify","session":"s","version":1,"digests":[18446744073709551616]}',
    b'{"kind":"verify","session":"s","version":1,"digests":[' + b"1," * (1 << 18) + b"1]}",
    changed(b'{"kind":"abort","session":"s","version":1}', reason="r" * ((1 << 14) + 1)),
    b"[" * 100_000 + b"]" * 100_000,
    b'{"kind":' * 100_000,
]


@pytest.mark.parametrize("data", BEYOND, ids=range(len(BEYOND)))
def test_what_is_too_large_is_refused_in_few_words(data: bytes) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        decode_message(data)
    assert len(str(caught.value)) < 4096


def test_an_error_does_not_repeat_what_was_given() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        decode_message(
            changed(OFFER_BYTES, tensors=[{"name": "hidden", "shape": ["hidden"], "dtype": "hidden"}] * 5000)
        )
    assert "hidden" not in str(caught.value) and "more" in str(caught.value)


@pytest.mark.parametrize("data", [changed(OFFER_BYTES, protocol=1), b'{"kind":"describe","protocol":0}'])
def test_another_protocol_version_is_named(data: bytes) -> None:
    with pytest.raises(errors.IncompatibleServerError, match=r"speaks protocol \d, this server 9"):
        decode_message(data)


def test_replies_are_strict_too() -> None:
    for data in (changed(REPLY_BYTES, ok=True), changed(REPLY_BYTES, version="3"), changed(REPLY_BYTES, state="READY")):
        with pytest.raises(ValidationError):
            Reply.model_validate_json(data)
    with pytest.raises(ValidationError):
        Reply.model_validate_json(REPLY_BYTES.replace(b'"fence":"why",', b""))


def test_models_are_frozen() -> None:
    for model, key in ((OFFER, "tensors"), (OFFER.config, "scale_fmt"), (REPLY, "error"), (MANIFEST[0], "quantized")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model, key, None)


# ---- FP8BlockConfig and Hugging Face


@pytest.mark.parametrize(
    "config",
    [
        FP8BlockConfig(),
        FP8BlockConfig(scale_fmt="ue8m0"),
        FP8BlockConfig(modules_to_not_convert=("lm_head", "model.layers.0.mlp")),
        FP8BlockConfig(scale_fmt="ue8m0", modules_to_not_convert=("lm_head",)),
    ],
)
def test_config_to_hugging_face_and_back(config: FP8BlockConfig) -> None:
    written = json.loads(json.dumps(config.to_hf()))
    assert FP8BlockConfig.from_hf(written) == config
    assert written["weight_block_size"] == [128, 128] and ("scale_fmt" in written) == (config.scale_fmt == "ue8m0")


def test_no_quantization_config_means_off() -> None:
    assert FP8BlockConfig.from_hf(None) is None
    assert FP8BlockConfig.from_hf({}) is None


def test_foreign_keys_and_nulls_of_real_checkpoints_are_fine() -> None:
    hf = {**FP8BlockConfig().to_hf(), "modules_to_not_convert": None, "scale_fmt": None, "dequantize": False}
    assert FP8BlockConfig.from_hf(hf) == FP8BlockConfig()
    del hf["fmt"]
    assert FP8BlockConfig.from_hf(hf) == FP8BlockConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_block_size", [64, 64]),
        ("weight_block_size", None),
        ("quant_method", "awq"),
        ("activation_scheme", "static"),
        ("fmt", "e5m2"),
        ("scale_fmt", "e8m0"),
    ],
)
def test_other_formats_are_refused_by_key_and_value(key: str, value: object) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        FP8BlockConfig.from_hf({**FP8BlockConfig().to_hf(), key: value})
    assert f"{key}={value!r}" in str(caught.value)


@pytest.mark.parametrize("fields", [{"block_size": (64, 64)}, {"dtype": "float8_e5m2"}, {"blocks": 1}])
def test_config_refuses_what_is_not_supported(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FP8BlockConfig(**fields)


# ---- errors by class name


def all_errors(base: type[errors.Fp8SyncError]) -> list[type[errors.Fp8SyncError]]:
    return [cls for child in base.__subclasses__() for cls in (child, *all_errors(child))]


@pytest.mark.parametrize("cls", all_errors(errors.Fp8SyncError))
def test_every_error_crosses_the_wire_as_its_class(cls: type[errors.Fp8SyncError]) -> None:
    found = errors.error_from_wire(cls.__name__, "server-3: what happened", ("a.weight", "b.weight"))
    assert type(found) is cls
    if cls is errors.PlanError:
        assert str(found) == "server-3: what happened\n  - a.weight\n  - b.weight"
        assert found.problems == ("a.weight", "b.weight")  # type: ignore[attr-defined]
    elif cls is errors.NonFiniteWeightError:
        assert found.names == ("a.weight", "b.weight")  # type: ignore[attr-defined]
    else:
        assert str(found) == "server-3: what happened"


@pytest.mark.parametrize("kind", ["ValueError", "SomethingNewer", "Fp8SyncError", "object"])
def test_an_unknown_class_becomes_a_push_error_that_names_it(kind: str) -> None:
    found = errors.error_from_wire(kind, "text")
    assert type(found) is errors.PushError and str(found) == f"{kind}: text"


@pytest.mark.parametrize(
    "error", [errors.PlanError("no", ("x", "y")), errors.NonFiniteWeightError(("a", "b")), errors.CommitError("half")]
)
def test_errors_survive_pickling(error: errors.Fp8SyncError) -> None:
    """Ray and multiprocessing hand them from process to process so."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)
