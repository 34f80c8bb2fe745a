"""The wire schema: every control message, as strict pydantic models (`shared.config` has what they have in common).

Order of messages in the life of a sender (S = sender, rank 0 of the trainer; R = every rank of a server):

    once          S -> R  Describe            what are you, where, which version do you serve
                  S -> R  Offer               these are my tensors; R traces its model and answers with a manifest
                  S -> R  Open                join the data planes of all who send; R answers with its way of staging
    every push    S -> R  Begin               version v comes now (R receives in the background; where it stages in
                                              memory that requests use, none runs from here until Release)
                  S => R  flat uint8 buckets  on the data planes in turn, each with its digest ahead of it
                  S -> R  Verify              these are the digests; R compares and is STAGED
                  S -> R  Prepare             several servers: promise to commit v or to be fenced, unless I say Abort
                 (S -> R  Hold                with strict in its place, unless shut: let no request run until Release)
                  S -> R  Commit              copy in place, publish v
                 (S -> R  Release             where shut: every server has answered its Commit, go on)
                  S -> R  Abort               instead of Verify or Commit: forget v
    at the end    S -> R  Close

Messages travel as JSON. Unknown fields, wrong types, sizes beyond the limits below and other protocol versions are
refused. Who may send them, and what the secret in `Rendezvous` is for: docs/security.md.
Changing a golden byte in `tests/test_protocol.py` means raising `PROTOCOL_VERSION`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from shared.config import MOST_TENSORS, FP8BlockConfig, Name, WireModel
from shared.errors import ConfigError, IncompatibleServerError

PROTOCOL_VERSION = 9
MIN_SGLANG_VERSION = "0.5.16"
CONTROL_PATH, INFO_PATH = "/fp8sync/control", "/fp8sync/info"
LONGEST_DEADLINE_S = 24 * 3600.0

DTypeName = Literal["bfloat16", "float16", "float32", "float8_e4m3fn"]
PlaneName = Literal["tcp", "gloo", "nccl", "same_host", "memory"]
ServerState = Literal["FENCED", "SERVING", "RECEIVING", "STAGED", "PROMISED"]
# What a commit does to requests under way: let them end, put them back and compute their prompts anew, or end them.
Drain = Literal["wait", "retract", "abort"]
# Or none of these: they keep their KV cache and go on, with the new weights from the next token on.
InFlight = Literal[Drain, "keep"]
# Where a server keeps what arrives until it commits, the one that serves on first (`receiver_plugin/rooms.py`).
StagingWay = Literal["reserved", "kv_pool", "in_place"]
StagingChoice = Literal["auto", "reserved", "kv_pool", "in_place"]

# In the fence of a server whose weights are gone on purpose: whoever resumes their memory pushes, too.
MEMORY_RELEASED = "a release of their memory"

Seconds = Annotated[float, Field(gt=0, le=LONGEST_DEADLINE_S, allow_inf_nan=False)]

# Limits, far beyond what any model needs.
MAX_BODY_BYTES = 64 << 20
MOST_SENDERS = 1 << 10  # trainer ranks with a data plane of their own
_MOST_PROBLEMS_TOLD = 5
Word = Annotated[str, Field(max_length=256)]  # an id, a host, a hash
Text = Annotated[str, Field(max_length=1 << 14)]
Shape = Annotated[tuple[Annotated[int, Field(ge=0, le=1 << 40)], ...], Field(max_length=8)]
MOST_VERSION = (1 << 62) - 1
Version = Annotated[int, Field(ge=0, le=MOST_VERSION)]
NumRanks = Annotated[int, Field(ge=1, le=1 << 16)]
Digest = Annotated[int, Field(ge=0, lt=1 << 64)]
Digests = Annotated[tuple[Digest, ...], Field(max_length=MOST_TENSORS)]
Secret = Annotated[str, Field(pattern="^[0-9a-f]{64}$", repr=False)]


class TensorSpec(WireModel):
    """A tensor as the trainer names it. `shape` is the whole (unsharded) shape, `dtype` that of the wire."""

    name: Name
    shape: Shape
    dtype: DTypeName


class ManifestTensor(TensorSpec):
    """A tensor as the server wants it. `quantized`: codes of `dtype` plus `weight_scale_inv`, fp32, on the wire."""

    quantized: bool


class Rendezvous(WireModel):
    """Where and as whom to join a data plane. Ranks of the plane: sender 0, then every server rank in order.

    `key` names the plane and is no secret; `secret` (32 bytes, hex) is what a rank proves to know, of one session.
    """

    plane: PlaneName
    host: Word
    port: Annotated[int, Field(ge=0, lt=1 << 16)]
    key: Word
    secret: Secret
    world_size: Annotated[int, Field(ge=2, le=1 << 20)]
    first_rank: Annotated[int, Field(ge=0, le=1 << 20)]
    timeout_s: Seconds


class Describe(WireModel):
    kind: Literal["describe"] = "describe"
    protocol: int = PROTOCOL_VERSION


class Offer(WireModel):
    kind: Literal["offer"] = "offer"
    protocol: int = PROTOCOL_VERSION
    config: FP8BlockConfig
    tensors: Annotated[tuple[TensorSpec, ...], Field(max_length=MOST_TENSORS)]


class Open(WireModel):
    """`rendezvous`: one for each trainer rank that sends, all of one session; bucket i of a push comes from the one
    that is number i modulo their number. `slices`: each writes its part of every bucket to where it goes."""

    kind: Literal["open"] = "open"
    sender: Word
    session: Word
    incarnation: Text
    plan_hash: Word
    bucket_bytes: Annotated[int, Field(ge=1, le=1 << 40)]
    staging: StagingChoice = "auto"
    slices: bool = False
    rendezvous: Annotated[tuple[Rendezvous, ...], Field(min_length=1, max_length=MOST_SENDERS)]

    @model_validator(mode="after")
    def _is_of_one_session(self) -> Open:
        facts = {(met.plane, met.secret, met.world_size, met.first_rank) for met in self.rendezvous}
        if len(facts) > 1:
            raise ValueError("its data planes differ in kind, secret, or ranks")
        return self

    @property
    def secret(self) -> str:
        return self.rendezvous[0].secret

    @property
    def plane(self) -> PlaneName:
        return self.rendezvous[0].plane

    @property
    def first_rank(self) -> int:
        return self.rendezvous[0].first_rank


class Shut(WireModel):
    """A door that is shut: requests end within `drain_s`, by `in_flight`; none is admitted after that, until Release, a
    Commit that opens, or the end of the push, and for `hold_s` at most."""

    drain_s: Seconds
    hold_s: Seconds
    in_flight: Drain


class Begin(WireModel):
    """`shut`: first, and if the push can begin; servers that do not stage in `reserved` memory demand it."""

    kind: Literal["begin"] = "begin"
    session: Word
    version: Version
    deadline_s: Seconds
    shut: Shut | None = None


class Verify(WireModel):
    kind: Literal["verify"] = "verify"
    session: Word
    version: Version
    digests: Digests


class Commit(WireModel):
    """`held`: the door is shut, by Hold or Begin, so that no request runs; else the commit drains by `in_flight`.

    `opens`: if it succeeds it is the Release, too. `digests`: as of a Verify that did not go before.
    """

    kind: Literal["commit"] = "commit"
    session: Word
    version: Version
    drain_s: Seconds
    in_flight: InFlight = "wait"
    held: bool = False
    opens: bool = False
    digests: Digests | None = None


class Hold(Shut):
    """Shut the door before a Commit, if that would succeed. `promise`: as that of `Prepare`."""

    kind: Literal["hold"] = "hold"
    session: Word
    version: Version
    promise: bool = False


class Release(WireModel):
    """Admit requests again. What was not committed, and lies where requests would use it, is given up."""

    kind: Literal["release"] = "release"
    session: Word
    version: Version


class Prepare(WireModel):
    """Would `before` succeed now? Of a Commit: and for `hold_s` from now? Asked before what others take part in.

    `idle`: no request may run. `promise`: who says yes commits, goes back when it hears Abort, or is fenced: also if it
    hears nothing for `hold_s`, because the others may have committed by then.
    """

    kind: Literal["prepare"] = "prepare"
    session: Word
    version: Version
    hold_s: Seconds = 60.0
    before: Literal["begin", "commit"] = "commit"
    in_flight: InFlight = "wait"
    idle: bool = True
    promise: bool = False


class Abort(WireModel):
    """Forget the push. `fence`: others have committed, so a server that promised and did not must not serve on."""

    kind: Literal["abort"] = "abort"
    session: Word
    version: Version
    reason: Text
    fence: bool = False


class Close(WireModel):
    kind: Literal["close"] = "close"
    session: Word


class Probe(WireModel):
    """SHA-256 of the raw bytes of every parameter and buffer, per rank; for proofs, never part of a push."""

    kind: Literal["probe"] = "probe"


ControlMessage = Annotated[
    Describe | Offer | Open | Begin | Verify | Prepare | Hold | Commit | Release | Abort | Close | Probe,
    Field(discriminator="kind"),
]


class Place(WireModel):
    """Where a process computes: `host` is the same for all of one host, `gpu` a UUID; "" where there is none."""

    host: Word
    gpu: Word = ""


class ServerInfo(WireModel):
    """What a server says of itself. `cannot_keep`: why it would refuse a commit that lets requests go on. `places`: of
    its ranks, in order, replica by replica."""

    protocol: int
    sglang_version: Word
    incarnation: Text
    num_ranks: NumRanks
    num_replicas: NumRanks = 1
    block_size: tuple[int, int] | None
    scale_fmt: Literal["fp32", "ue8m0"]
    device: str
    compute_capability: str
    gemm_backend: str
    moe_backend: str
    cannot_keep: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()


class WireError(WireModel):
    """An error of `shared.errors` on its way to the trainer."""

    kind: str
    message: str
    problems: tuple[str, ...] = ()


class Reply(WireModel):
    """The answer of a server to any control message. Success is `error is None`; nothing else is.

    `exclusive`: a push is under way that writes where requests would use it, so that none may run. `lands`: of an
    offer, the ways in which trainer ranks could write what they hold of it themselves.
    """

    state: ServerState
    version: Version
    fence: str | None
    exclusive: bool = False
    error: WireError | None = None
    info: ServerInfo | None = None
    manifest: tuple[ManifestTensor, ...] | None = None
    plan_hash: str | None = None
    staging: StagingWay | None = None
    lands: tuple[StagingWay, ...] = ()
    probe: tuple[dict[str, str], ...] | None = None


_MESSAGE: TypeAdapter[Any] = TypeAdapter(ControlMessage)


def decode_message(data: bytes | str) -> Any:
    """The control message in `data`.

    Raises:
        ConfigError: not one of the messages of this protocol version.
    """
    try:
        message = _MESSAGE.validate_json(data)
    except ValidationError as error:  # told without what was given: there may be a secret in it
        raise ConfigError(f"not a control message of protocol {PROTOCOL_VERSION}: {_told(error)}") from None
    if getattr(message, "protocol", PROTOCOL_VERSION) != PROTOCOL_VERSION:
        theirs = f"the sender speaks protocol {message.protocol}, this server {PROTOCOL_VERSION}"
        raise IncompatibleServerError(f"{theirs}: install one fp8sync on both")
    return message


def _told(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{'.'.join(map(str, problem['loc']))[:200]}: {problem['msg'][:200]}" for problem in found]
    more = f"; and {len(told) - _MOST_PROBLEMS_TOLD} more" if len(told) > _MOST_PROBLEMS_TOLD else ""
    return "; ".join(told[:_MOST_PROBLEMS_TOLD]) + more
