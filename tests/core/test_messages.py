"""The codec: a message arrives as it was sent, and any bytes decode to a valid message or raise ProtocolError."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.messages import (
    PROTOCOL_VERSION,
    Abort,
    Announce,
    Done,
    Drained,
    Failed,
    Heartbeat,
    Init,
    Message,
    MooncakeMemory,
    OtherMemory,
    Progress,
    RefusalKind,
    Refused,
    Register,
    Registered,
    Resume,
    Retire,
    ShmMemory,
    decode_from_encoder,
    decode_from_language,
    encode,
)

LIMIT = 4096
ROOM, SESSION = "ab" * 8 + "-" + "cd" * 8, "10.0.0.1:17001"

REGISTER = Register(
    checksum=False,
    max_frame_bytes=1 << 20,
    max_metadata_bytes=1 << 26,
    epoch=0,
    mooncake_session_id=SESSION,
    incarnation="1",
    server="2",
    rank=0,
    size=2,
    block_size=128,
    block_bytes=512,
    blocks_per_region=4,
    regions=2,
    memory=ShmMemory(segment="name", nonce="nonce", writer_slot=3),
    row_bytes=4,
    dtype="bfloat16",
)
OVER_MOONCAKE = msgspec.structs.replace(
    REGISTER, memory=MooncakeMemory(target="10.0.0.1:17001", addresses=[1 << 40, (1 << 63) - 1]), epoch=7
)
OVER_ANOTHER_PATH = msgspec.structs.replace(REGISTER, memory=OtherMemory(data_path="cxl", content=b"\x00\xff"))
INIT = Init(
    epoch=0,
    room=ROOM,
    mooncake_session_id=SESSION,
    dst_embedding_indices=[5, 0, 7],
    allocated_tokens=300,
    required_dst_info_num=2,
    deadline=59.5,
)
RESUME = Resume(
    epoch=0,
    room=ROOM,
    mooncake_session_id=SESSION,
    window=1,
    dst_embedding_indices=[1],
    sent_tokens=1024,
    allocated_tokens=976,
    deadline=1.5,
)
FROM_LANGUAGE: list[Message] = [
    REGISTER,
    OVER_MOONCAKE,
    OVER_ANOTHER_PATH,
    INIT,
    RESUME,
    Abort(room=ROOM, mooncake_session_id=SESSION, reason="client gone"),
    Retire(mooncake_session_id=SESSION, epoch=3),
    Heartbeat(incarnation="1"),
]
FROM_ENCODER: list[Message] = [
    Registered(mooncake_session_id=SESSION, epoch=2, incarnation="3"),
    Refused(reason="block size is 64 here, 128 there", kind=RefusalKind.MISMATCH),
    Refused(reason="", kind=RefusalKind.DATA_PATH, data_path="shm"),
    Refused(reason="who?", kind=RefusalKind.REGISTER_FIRST),
    Announce(room=ROOM, total_tokens=2000, row_bytes=8192, dtype="float32"),
    Progress(room=ROOM, window=0, sent_tokens=1024, metadata=b"\x00\xff"),
    Progress(room=ROOM, window=-1, sent_tokens=0, refused="no Init before"),
    Done(room=ROOM, window=1, total_tokens=2000, checksum=0xFFFFFFFF),
    Done(room=ROOM, window=0, total_tokens=1, metadata=b"m"),
    Failed(room=ROOM, reason="out of memory", code=500, drained=False),
    Drained(room=ROOM),
    Heartbeat(incarnation="3", load=12, draining=True),
]


@dataclass(frozen=True)
class Side:
    decode: Callable[[bytes, int], Message]
    messages: list[Message]


SIDES = [Side(decode_from_language, FROM_LANGUAGE), Side(decode_from_encoder, FROM_ENCODER)]
EVERY = [(side.decode, message) for side in SIDES for message in side.messages]


@pytest.mark.parametrize(("decode", "message"), EVERY)
def test_every_message_arrives_as_it_was_sent(decode: Callable[[bytes, int], Message], message: Message) -> None:
    assert decode(encode(message), LIMIT) == message


def test_every_message_type_is_in_the_round_trip() -> None:
    assert {type(message) for side in SIDES for message in side.messages} == set(Message.__subclasses__())


@pytest.mark.parametrize("message", [message for message in FROM_LANGUAGE if not isinstance(message, Heartbeat)])
def test_a_language_message_is_refused_by_the_language_side(message: Message) -> None:
    with pytest.raises(ProtocolError):
        decode_from_encoder(encode(message), LIMIT)


@pytest.mark.parametrize("message", [message for message in FROM_ENCODER if not isinstance(message, Heartbeat)])
def test_an_encoder_message_is_refused_by_the_encoder(message: Message) -> None:
    with pytest.raises(ProtocolError):
        decode_from_language(encode(message), LIMIT)


@pytest.mark.parametrize(("decode", "message"), EVERY)
def test_every_truncation_is_refused(decode: Callable[[bytes, int], Message], message: Message) -> None:
    frame = encode(message)
    for length in range(len(frame)):
        with pytest.raises(ProtocolError):
            decode(frame[:length], LIMIT)


@pytest.mark.parametrize(("decode", "message"), EVERY)
def test_bytes_behind_a_message_are_refused(decode: Callable[[bytes, int], Message], message: Message) -> None:
    with pytest.raises(ProtocolError):
        decode(encode(message) + b"\x00", LIMIT)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[Callable[[bytes, int], Message], bytes]:
    side = draw(st.sampled_from(SIDES))
    frame = bytearray(encode(draw(st.sampled_from(side.messages))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(frame) - 1))
        kind = draw(st.sampled_from(["flip", "insert", "delete", "double"]))
        if kind == "flip":
            frame[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            frame[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "delete" and len(frame) > 1:
            del frame[at]
        else:
            frame[at:at] = frame[at : at + 8]
    return side.decode, bytes(frame)


@settings(max_examples=1500, deadline=None)
@given(damaged())
def test_a_damaged_frame_is_a_valid_message_or_a_protocol_error(
    case: tuple[Callable[[bytes, int], Message], bytes],
) -> None:
    decode, frame = case
    try:
        message = decode(frame, LIMIT)
    except ProtocolError:
        return
    assert decode(encode(message), LIMIT) == message


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(SIDES), st.binary(max_size=200))
def test_random_bytes_are_a_valid_message_or_a_protocol_error(side: Side, body: bytes) -> None:
    for frame in (body, bytes([PROTOCOL_VERSION]) + body):
        try:
            assert isinstance(side.decode(frame, LIMIT), Message)
        except ProtocolError:
            continue


@pytest.mark.parametrize("decode", [side.decode for side in SIDES])
def test_nesting_without_end_is_a_protocol_error(decode: Callable[[bytes, int], Message]) -> None:
    with pytest.raises(ProtocolError):
        decode(bytes([PROTOCOL_VERSION]) + b"\x91" * 100_000, 1 << 20)


def test_another_version_is_refused_naming_both() -> None:
    frame = bytes([PROTOCOL_VERSION + 6]) + encode(INIT)[1:]
    with pytest.raises(ProtocolError, match=f"{PROTOCOL_VERSION + 6}.*{PROTOCOL_VERSION}"):
        decode_from_language(frame, LIMIT)


@pytest.mark.parametrize("decode", [side.decode for side in SIDES])
def test_a_frame_over_the_limit_is_refused_unread(decode: Callable[[bytes, int], Message]) -> None:
    frame = encode(Heartbeat(incarnation="x" * 100))
    assert decode(frame, len(frame)) == Heartbeat(incarnation="x" * 100)
    with pytest.raises(ProtocolError, match=f"{len(frame)}.*{len(frame) - 1}"):
        decode(frame, len(frame) - 1)


@pytest.mark.parametrize(
    "change",
    [
        {"room": ""},
        {"room": "r" * 257},
        {"room": 7},
        {"mooncake_session_id": "s" * 257},
        {"dst_embedding_indices": []},
        {"dst_embedding_indices": [-1]},
        {"dst_embedding_indices": [1 << 33]},
        {"dst_embedding_indices": ["1"]},
        {"allocated_tokens": 0},
        {"allocated_tokens": -5},
        {"allocated_tokens": 1.5},
        {"allocated_tokens": 1 << 60},
        {"required_dst_info_num": 0},
        {"deadline": -0.1},
        {"deadline": float("inf")},
        {"deadline": None},
    ],
)
def test_a_value_outside_its_range_is_refused(change: dict[str, object]) -> None:
    fields = {"t": "init", **msgspec.structs.asdict(INIT)}
    assert decode_from_language(bytes([PROTOCOL_VERSION]) + msgspec.msgpack.encode(fields), LIMIT) == INIT
    frame = bytes([PROTOCOL_VERSION]) + msgspec.msgpack.encode({**fields, **change})
    with pytest.raises(ProtocolError):
        decode_from_language(frame, LIMIT)


@pytest.mark.parametrize(
    ("message", "path"), [(REGISTER, "shm"), (OVER_MOONCAKE, "mooncake"), (OVER_ANOTHER_PATH, "cxl")]
)
def test_the_memory_says_over_which_path_it_is_reached(message: Register, path: str) -> None:
    arrived = decode_from_language(encode(message), LIMIT)
    assert isinstance(arrived, Register) and arrived.data_path == path
    assert type(arrived.memory) is type(message.memory)


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"kind": "cxl"},
        {"kind": "shm", "segment": "name", "nonce": "nonce"},
        {"kind": "shm", "segment": "", "nonce": "nonce", "writer_slot": 3},
        {"kind": "shm", "segment": "name", "nonce": "n" * 65, "writer_slot": 3},
        {"kind": "shm", "segment": "name", "nonce": "nonce", "writer_slot": -1},
        {"kind": "mooncake", "target": "", "addresses": [1]},
        {"kind": "mooncake", "target": "10.0.0.1:1", "addresses": []},
        {"kind": "mooncake", "target": "10.0.0.1:1", "addresses": [0]},
        {"kind": "mooncake", "target": "10.0.0.1:1", "addresses": [1 << 63]},
        {"kind": "mooncake", "target": "10.0.0.1:1", "addresses": [1] * 65},
        {"kind": "other", "data_path": "", "content": b""},
        {"kind": "other", "data_path": "cxl", "content": bytes((1 << 16) + 1)},
        {"kind": "other", "data_path": "cxl", "content": "text"},
    ],
)
def test_memory_that_is_none_or_outside_its_ranges_is_refused(memory: dict[str, object]) -> None:
    fields = {"t": "register", **msgspec.structs.asdict(REGISTER), "memory": memory}
    with pytest.raises(ProtocolError):
        decode_from_language(bytes([PROTOCOL_VERSION]) + msgspec.msgpack.encode(fields), 1 << 20)


@pytest.mark.parametrize("window", [0, -1])
def test_a_resume_of_window_0_is_refused(window: int) -> None:
    fields = {"t": "resume", **msgspec.structs.asdict(RESUME), "window": window}
    with pytest.raises(ProtocolError):
        decode_from_language(bytes([PROTOCOL_VERSION]) + msgspec.msgpack.encode(fields), LIMIT)


@pytest.mark.parametrize("code", [0, 200, 399, 600])
def test_a_failure_with_a_code_that_is_no_http_error_is_refused(code: int) -> None:
    fields = {"t": "failed", "room": ROOM, "reason": "", "code": code, "drained": True}
    with pytest.raises(ProtocolError):
        decode_from_encoder(bytes([PROTOCOL_VERSION]) + msgspec.msgpack.encode(fields), LIMIT)


@pytest.mark.parametrize("message", [INIT, RESUME])
def test_a_missing_field_is_refused(message: Message) -> None:
    for name in msgspec.structs.asdict(message):
        fields = {"t": type(message).__name__.lower(), **msgspec.structs.asdict(message)}
        del fields[name]
        with pytest.raises(ProtocolError, match=name):
            decode_from_language(bytes([PROTOCOL_VERSION]) + msgspec.msgpack.encode(fields), LIMIT)


def test_a_heartbeat_without_load_and_draining_is_one_of_an_idle_encoder_that_serves() -> None:
    frame = encode(Heartbeat(incarnation="1"))[:1] + msgspec.msgpack.encode({"t": "heartbeat", "incarnation": "1"})
    heartbeat = decode_from_encoder(frame, LIMIT)
    assert heartbeat == Heartbeat(incarnation="1", load=0, draining=False)
