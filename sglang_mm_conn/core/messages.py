"""Owns the control messages and their codec: tagged msgspec structs behind one version byte, length-limited, no pickle.

docs/protocol.md says where the names come from. Times are durations in seconds: the clocks of two hosts are never
compared. Each data path describes its memory in a Register by a struct of its own kind.
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
    """Base of the structs that describe registered memory: how the encoder's half of a data path opens it."""

    @property
    def path(self) -> str:
        """The name of the data path."""
        return str(self.__struct_config__.tag)


class ShmMemory(Memory, frozen=True, kw_only=True, tag="shm"):
    """A shared segment: its name, a nonce that proves it is this segment, and the byte that the encoder must lock."""

    segment: Name
    nonce: Annotated[str, Meta(max_length=64)]
    writer_slot: Count


class MooncakeMemory(Memory, frozen=True, kw_only=True, tag="mooncake"):
    """Memory registered with a Mooncake engine: the engine to write through (host:port), and the address at which
    each region begins in the language rank's process."""

    target: Name
    addresses: Annotated[
        list[Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]], Meta(min_length=1, max_length=MOST_REGIONS)
    ]


class OtherMemory(Memory, frozen=True, kw_only=True, tag="other"):
    """Memory of a data path unknown to this module: the path's name, and bytes that only its two halves understand."""

    data_path: Name
    content: Annotated[bytes, Meta(max_length=1 << 16)]

    @property
    def path(self) -> str:
        return self.data_path


AnyMemory: TypeAlias = ShmMemory | MooncakeMemory | OtherMemory


class Message(Struct, frozen=True, tag_field="t", kw_only=True):
    """Base of all control messages."""


class Register(Message, frozen=True, kw_only=True, tag="register"):
    """Language rank -> encoder: registers one session and the pool that the encoder may write through it.

    A session keeps its id for life, but its engine may be replaced. Each engine has an epoch, and a window is only
    ever written through the engine epoch that it was offered for.

    Attributes:
        mooncake_session_id: host:port, names the session.
        number: counts registrations. A lower one that arrives later, from a broken connection, is dropped.
        epoch: the engine epoch that new windows are offered for.
        oldest_epoch: lower epochs were revoked (their Retire may have been lost).
        incarnation: of the rank's process.
        server: incarnation of the language server; the prefix of its rooms.
        rank, size: which of how many receiving ranks.
        block_size: rows of the widest row in a block.
        block_bytes: bytes of a block.
        blocks_per_region, regions: the shape of the pool.
        memory: how to reach the pool over the session's data path.
        row_bytes, dtype: bytes of the model's widest row, and the type of its values.
        checksum: whether embeddings carry one.
        max_frame_bytes, max_metadata_bytes: size limits.
    """

    mooncake_session_id: Name
    number: Count = 0
    epoch: Count
    oldest_epoch: Count = 0
    incarnation: Name
    server: Name
    rank: Count
    size: Positive
    block_size: Positive
    block_bytes: Positive
    blocks_per_region: Positive
    regions: Annotated[int, Meta(ge=1, le=MOST_REGIONS)]
    memory: AnyMemory
    row_bytes: Positive
    dtype: Name
    checksum: bool
    max_frame_bytes: Positive
    max_metadata_bytes: Positive

    @property
    def data_path(self) -> str:
        """The name of the session's data path."""
        return self.memory.path

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.block_bytes, self.blocks_per_region, self.regions)


class Init(Message, frozen=True, kw_only=True, tag="init"):
    """Language rank -> encoder: offers blocks for window 0 of a room.

    Attributes:
        room: which.
        mooncake_session_id: whose blocks.
        epoch: the engine epoch that the window may be written through.
        dst_embedding_indices: the numbers of the blocks, in token order.
        allocated_tokens: rows that the blocks are offered for.
        required_dst_info_num: ranks that must send an Init before the room is complete.
        deadline: seconds left. The encoder's deadline is never the later one.
    """

    room: Name
    mooncake_session_id: Name
    epoch: Count
    dst_embedding_indices: Blocks
    allocated_tokens: Positive
    required_dst_info_num: Positive
    deadline: Seconds


class Resume(Message, frozen=True, kw_only=True, tag="resume"):
    """Language rank -> encoder: offers blocks for the next window of a room.

    Attributes:
        room: which.
        mooncake_session_id: whose blocks.
        epoch: the engine epoch that the window may be written through.
        window: its number, from 1.
        dst_embedding_indices: the numbers of the blocks, in token order.
        sent_tokens, allocated_tokens: rows confirmed before, and rows that the blocks are offered for now.
        deadline: seconds left.
    """

    room: Name
    mooncake_session_id: Name
    epoch: Count
    window: Positive
    dst_embedding_indices: Blocks
    sent_tokens: Count
    allocated_tokens: Positive
    deadline: Seconds


class Abort(Message, frozen=True, kw_only=True, tag="abort"):
    """Language rank -> encoder: the rank gives the room up. Answered by Drained.

    Attributes:
        room, mooncake_session_id: which session gives up which room.
        reason: why.
    """

    room: Name
    mooncake_session_id: Name
    reason: Text


class Retire(Message, frozen=True, kw_only=True, tag="retire"):
    """Language rank -> encoder: the rank revoked engine epochs; the encoder closes its links to them.

    Attributes:
        mooncake_session_id: whose epochs.
        epoch: this one and all before it.
    """

    mooncake_session_id: Name
    epoch: Count


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Both directions: the sender's process is alive.

    Attributes:
        incarnation: of that process.
        load, draining: of an encoder's server: requests to /encode that it holds, whether it refuses new ones.
    """

    incarnation: Name
    load: Count = 0
    draining: bool = False


class Registered(Message, frozen=True, kw_only=True, tag="registered"):
    """Encoder -> language rank: the session's memory is checked and attached.

    Attributes:
        mooncake_session_id: the session that may be offered now.
        epoch: the engine epoch of the Register that this answers.
        incarnation: of the encoder process.
    """

    mooncake_session_id: Name
    epoch: Count
    incarnation: Name


class RefusalKind(str, Enum):
    """Why a session is not registered. The language rank reacts to each kind differently."""

    MISMATCH = "mismatch"  # the two sides do not fit; the rank registers again every few seconds
    DATA_PATH = "data_path"  # only the named data path is impossible; the rank registers over another one at once
    REGISTER_FIRST = "register_first"  # the peer is not (or no longer) registered, or the encoder is busy: next tick


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """Encoder -> language rank: the session is not (or no longer) registered.

    Attributes:
        reason: why, as text.
        kind: why, as one of three kinds.
        data_path: the one that is impossible, if ``kind`` is DATA_PATH.
    """

    reason: Text
    kind: RefusalKind
    data_path: Text = ""


class Announce(Message, frozen=True, kw_only=True, tag="announce"):
    """Encoder -> language rank: the size of a room is known. The embedding may not be computed yet.

    Attributes:
        room: which.
        total_tokens: its rows.
        row_bytes, dtype: bytes of each row, type of its values.
    """

    room: Name
    total_tokens: Positive
    row_bytes: Positive
    dtype: Name


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """Encoder -> language rank: confirms a window after which rows remain.

    Also the answer, with the confirmed state, to an Init or Resume that was refused or repeated.

    Attributes:
        room: which.
        window: the last confirmed one; -1: none.
        sent_tokens: rows confirmed in all.
        metadata: of the part, with window 0.
        refused, refused_window: why an offer was refused (empty: none was), and which.
    """

    room: Name
    window: int
    sent_tokens: Count
    metadata: bytes = b""
    refused: Text = ""
    refused_window: Count = 0


class Done(Message, frozen=True, kw_only=True, tag="done"):
    """Encoder -> language rank: confirms the last window.

    Attributes:
        room: which.
        window: the last one.
        total_tokens: all rows; all are confirmed.
        elapsed: seconds from the hand-over of the embedding to the confirmation of its last row.
        metadata: of the part, if this is window 0.
        checksum: of all rows, if both sides use it.
    """

    room: Name
    window: Count
    total_tokens: Positive
    elapsed: Seconds = 0.0
    metadata: bytes = b""
    checksum: int | None = None


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """Encoder -> language rank: the room failed.

    Attributes:
        room: which.
        reason: why.
        code: HTTP status.
        drained: whether no write into this session's blocks is under way or will come.
    """

    room: Name
    reason: Text
    code: Annotated[int, Meta(ge=400, le=599)]
    drained: bool


class Drained(Message, frozen=True, kw_only=True, tag="drained"):
    """Encoder -> language rank: no write into this session's blocks of the room is under way or will come.

    Attributes:
        room: which.
    """

    room: Name


FromLanguage: TypeAlias = Register | Init | Resume | Abort | Retire | Heartbeat
FromEncoder: TypeAlias = Registered | Refused | Announce | Progress | Done | Failed | Drained | Heartbeat

_ENCODER = msgspec.msgpack.Encoder()
_FROM_LANGUAGE: msgspec.msgpack.Decoder[FromLanguage] = msgspec.msgpack.Decoder(FromLanguage)
_FROM_ENCODER: msgspec.msgpack.Decoder[FromEncoder] = msgspec.msgpack.Decoder(FromEncoder)
_VERSION = bytes([PROTOCOL_VERSION])


def encode(message: Message) -> bytes:
    """One frame: the version byte and the message."""
    return _VERSION + _ENCODER.encode(message)


def _body(frame: bytes, limit: int) -> memoryview:
    if len(frame) > limit:
        raise ProtocolError(f"frame of {len(frame)} bytes is longer than the limit of {limit}")
    if not frame:
        raise ProtocolError("empty frame")
    if frame[0] != PROTOCOL_VERSION:
        raise ProtocolError(f"the peer has protocol version {frame[0]}, this side {PROTOCOL_VERSION}")
    return memoryview(frame)[1:]


def decode_from_language(frame: bytes, limit: int) -> FromLanguage:
    """Parse a frame that an encoder received. Raises ProtocolError unless it is exactly one valid message."""
    try:
        return _FROM_LANGUAGE.decode(_body(frame, limit))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed message: {error}") from None


def decode_from_encoder(frame: bytes, limit: int) -> FromEncoder:
    """Parse a frame that a language rank received. Raises ProtocolError unless it is exactly one valid message."""
    try:
        return _FROM_ENCODER.decode(_body(frame, limit))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed message: {error}") from None
