"""The control messages: tagged msgspec structs, one version byte in front, length-limited. No pickle.

Names follow the seed. Times are durations in seconds: the clocks of two hosts are never compared.

A Register describes memory by one of a few structs, one for each data path; ``OtherMemory`` is for paths that this
module does not know.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.layout import Geometry

PROTOCOL_VERSION = 3

Count = Annotated[int, Meta(ge=0, le=1 << 48)]
Positive = Annotated[int, Meta(ge=1, le=1 << 48)]
Block = Annotated[int, Meta(ge=0, le=1 << 32)]
Blocks = Annotated[list[Block], Meta(min_length=1, max_length=1 << 20)]
Seconds = Annotated[float, Meta(ge=0, le=1e7)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
MOST_REGIONS = 64


class Memory(Struct, frozen=True, tag_field="kind", kw_only=True):
    """Base of what a Register says of the memory: how an encoder's half of a data path finds it."""

    @property
    def path(self) -> str:
        """The name of the data path."""
        return str(self.__struct_config__.tag)


class ShmMemory(Memory, frozen=True, kw_only=True, tag="shm"):
    """A shared segment: its name, proof that it is this one, and the byte that the writer locks."""

    segment: Name
    nonce: Annotated[str, Meta(max_length=64)]
    writer_slot: Count


class MooncakeMemory(Memory, frozen=True, kw_only=True, tag="mooncake"):
    """Memory registered with an engine: the engine to write through (host:port), and where each region begins in the
    language rank's process."""

    target: Name
    addresses: Annotated[
        list[Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]], Meta(min_length=1, max_length=MOST_REGIONS)
    ]


class OtherMemory(Memory, frozen=True, kw_only=True, tag="other"):
    """Memory of a path that this module does not know: its name, and bytes that only its two halves understand."""

    data_path: Name
    content: Annotated[bytes, Meta(max_length=1 << 16)]

    @property
    def path(self) -> str:
        return self.data_path


AnyMemory: TypeAlias = ShmMemory | MooncakeMemory | OtherMemory


class Message(Struct, frozen=True, tag_field="t", kw_only=True):
    """Base of all control messages."""


# language server -> encoder


class Register(Message, frozen=True, kw_only=True, tag="register"):
    """A language rank presents one session and the memory it may be written to through it.

    A session keeps its id for life. The way into its memory may be replaced (Mooncake: the engine): each way has an
    epoch, and a window is written only by the way of the epoch it was offered for.
    """

    mooncake_session_id: Name
    number: Count = 0  # of this registration: one that arrives late, from a broken connection, is known by it
    epoch: Count
    oldest_epoch: Count = 0  # epochs below it were revoked (a Retire may have been lost)
    incarnation: Name  # of this rank's process
    server: Name  # incarnation of its server: the prefix of its rooms
    rank: Count
    size: Positive
    block_size: Positive
    block_bytes: Positive
    blocks_per_region: Positive
    regions: Annotated[int, Meta(ge=1, le=MOST_REGIONS)]
    memory: AnyMemory
    row_bytes: Positive  # of the model's widest row
    dtype: Name
    checksum: bool
    max_frame_bytes: Positive
    max_metadata_bytes: Positive

    @property
    def data_path(self) -> str:
        """The name of the path that the memory is reached over."""
        return self.memory.path

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.block_bytes, self.blocks_per_region, self.regions)


class Init(Message, frozen=True, kw_only=True, tag="init"):
    """Window 0 of a room: blocks for ``allocated_tokens`` rows."""

    room: Name
    mooncake_session_id: Name
    epoch: Count
    dst_embedding_indices: Blocks
    allocated_tokens: Positive
    required_dst_info_num: Positive
    deadline: Seconds  # what is left of it; the encoder's is never later


class Resume(Message, frozen=True, kw_only=True, tag="resume"):
    """Window ``window`` > 0: blocks for ``allocated_tokens`` further rows after ``sent_tokens`` confirmed ones."""

    room: Name
    mooncake_session_id: Name
    epoch: Count
    window: Positive
    dst_embedding_indices: Blocks
    sent_tokens: Count
    allocated_tokens: Positive
    deadline: Seconds


class Abort(Message, frozen=True, kw_only=True, tag="abort"):
    """The session gives the room up; asks for Drained."""

    room: Name
    mooncake_session_id: Name
    reason: Text


class Retire(Message, frozen=True, kw_only=True, tag="retire"):
    """The language rank revoked the session's ``epoch``: the encoder may forget it."""

    mooncake_session_id: Name
    epoch: Count


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Both directions: the sender lives."""

    incarnation: Name


# encoder -> language server


class Registered(Message, frozen=True, kw_only=True, tag="registered"):
    """The session's memory was checked and can be written."""

    mooncake_session_id: Name
    epoch: Count
    incarnation: Name  # of the encoder's process


class RefusalKind(str, Enum):
    """Why a session is not registered, and so what the language rank does about it."""

    MISMATCH = "mismatch"  # the two sides do not fit: asked again after a while
    DATA_PATH = "data_path"  # only the path named is impossible: another is tried
    REGISTER_FIRST = "register_first"  # the encoder does not know this peer (any more), or is busy: registered again


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """The session is not (or no longer) registered, and why."""

    reason: Text
    kind: RefusalKind
    data_path: Text = ""


class Announce(Message, frozen=True, kw_only=True, tag="announce"):
    """The size of a room is known; the embedding may not be computed yet."""

    room: Name
    total_tokens: Positive
    row_bytes: Positive
    dtype: Name


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """Window ``window`` landed; ``sent_tokens`` rows are confirmed in all and rows remain.

    Also the truthful answer to a Resume or Init that was refused (``refused`` says why, ``refused_window`` which) or
    repeated.
    """

    room: Name
    window: int  # -1: nothing is confirmed yet
    sent_tokens: Count
    metadata: bytes = b""  # with window 0
    refused: Text = ""
    refused_window: Count = 0


class Done(Message, frozen=True, kw_only=True, tag="done"):
    """The last window landed: all ``total_tokens`` rows are confirmed."""

    room: Name
    window: Count
    total_tokens: Positive
    elapsed: Seconds = 0.0  # since the embedding was there
    metadata: bytes = b""  # with window 0
    checksum: int | None = None


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """The room failed on the encoder. ``drained``: no write into its blocks is under way or will come."""

    room: Name
    reason: Text
    code: Annotated[int, Meta(ge=400, le=599)]
    drained: bool


class Drained(Message, frozen=True, kw_only=True, tag="drained"):
    """Answer to Abort: no write into the room's blocks is under way or will come."""

    room: Name


FromLanguage: TypeAlias = Register | Init | Resume | Abort | Retire | Heartbeat
FromEncoder: TypeAlias = Registered | Refused | Announce | Progress | Done | Failed | Drained | Heartbeat

_ENCODER = msgspec.msgpack.Encoder()
_FROM_LANGUAGE: msgspec.msgpack.Decoder[FromLanguage] = msgspec.msgpack.Decoder(FromLanguage)
_FROM_ENCODER: msgspec.msgpack.Decoder[FromEncoder] = msgspec.msgpack.Decoder(FromEncoder)
_VERSION = bytes([PROTOCOL_VERSION])


def as_text(value: str, limit: int = 1000) -> str:
    """``value`` as it can travel: shortened, without the lone surrogates that a client's JSON can put in an error."""
    return value[:limit].encode("utf-8", "replace").decode()


def encode(message: Message) -> bytes:
    """One frame: the version byte and the message."""
    return _VERSION + _ENCODER.encode(message)


def _body(frame: bytes, limit: int) -> memoryview:
    if len(frame) > limit:
        raise ProtocolError(f"frame of {len(frame)} bytes is longer than the limit of {limit}")
    if not frame:
        raise ProtocolError("empty frame")
    if frame[0] != PROTOCOL_VERSION:
        raise ProtocolError(f"peer speaks protocol version {frame[0]}, this side {PROTOCOL_VERSION}")
    return memoryview(frame)[1:]


def decode_from_language(frame: bytes, limit: int) -> FromLanguage:
    """Parse what an encoder received. Raises ProtocolError for anything that is not one valid message."""
    try:
        return _FROM_LANGUAGE.decode(_body(frame, limit))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed message: {error}") from None


def decode_from_encoder(frame: bytes, limit: int) -> FromEncoder:
    """Parse what a language server received. Raises ProtocolError for anything that is not one valid message."""
    try:
        return _FROM_ENCODER.decode(_body(frame, limit))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed message: {error}") from None
