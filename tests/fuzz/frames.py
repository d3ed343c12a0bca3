"""Frames that nobody should send: random ones, and messages of every kind with something wrong about them.

All of it comes from one ``random.Random``, so a seed gives the same frames again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sglang_mm_conn.control.batches import MOST_FRAMES
from sglang_mm_conn.core.messages import (
    Abort,
    Announce,
    Done,
    Drained,
    Failed,
    Heartbeat,
    Init,
    Message,
    Progress,
    RefusalKind,
    Refused,
    Register,
    Registered,
    Resume,
    Retire,
    encode,
)

# Of the frames of a batch: the first byte, before a list of them.
BATCH_MARK = b"\xff"
VERSION = encode(Heartbeat(incarnation="x"))[:1]
LONGEST_RANDOM = 4096
# A frame of a message: one part, or several (which no side of the connector sends).
Parts = list[bytes]
NUMBERS = (
    -(1 << 63), -(1 << 31), -1, 0, 1, 2, 3, 255, (1 << 31) - 1, 1 << 32, 1 << 48, (1 << 48) + 1, (1 << 63) - 1,
    (1 << 64) - 1, -0.5, 0.001, 1e7, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = ("", "x", "\0", "\u20ac" * 64, "x" * 256, "x" * 257, "\u20ac" * 4096, "x" * 5000, "../../etc/passwd", "%s%n")
OTHERS: tuple[Any, ...] = (None, True, False, b"", b"\xff" * 64, [], {}, [[]], [0] * 3, {"t": "init"}, [None] * 70)


@dataclass
class Knowledge:
    """What a malicious peer knows and puts into its messages."""

    session: str = "127.0.0.1:1"
    incarnation: str = "0" * 16
    sessions: Sequence[str] = ()  # others'
    rooms: list[str] = field(default_factory=list)  # its own, which are under way
    other_rooms: list[str] = field(default_factory=list)  # somebody else's
    blocks: int = 8
    register: Register | None = None


class Frames:
    """Makes the frames of one malicious peer. ``overlong``: more bytes than the receiver takes."""

    def __init__(self, dice: random.Random, knowledge: Knowledge, overlong: int) -> None:
        self.dice = dice
        self.knowledge = knowledge
        self._overlong = overlong

    def to_encoder(self) -> Parts:
        return self._parts(lambda: encode(self._from_language()))

    def to_language(self) -> Parts:
        return self._parts(lambda: encode(self._from_encoder()))

    def _parts(self, frame: Callable[[], bytes]) -> Parts:
        """One frame, spoiled, or a batch: of good ones and spoiled ones, or itself spoiled."""
        dice = self.dice
        if dice.random() < 0.9:
            return self._spoil(frame())
        count = dice.choice((0, 1, 2, 3, MOST_FRAMES, MOST_FRAMES + 1, 200))
        frames = [b"".join(self._spoil(frame())) if dice.random() < 0.3 else frame() for _ in range(count)]
        batch = BATCH_MARK + msgspec.msgpack.encode(frames)
        return [batch] if dice.random() < 0.8 else self._spoil_any(batch)

    # -- valid ones ------------------------------------------------------------------------------------------------

    def _room(self) -> str:
        dice, known = self.dice, self.knowledge
        kind = dice.random()
        if known.rooms and kind < 0.7:
            return known.rooms[int(dice.random() * len(known.rooms))]
        if known.other_rooms and kind < 0.85:
            return known.other_rooms[int(dice.random() * len(known.other_rooms))]
        server = known.register.server if known.register is not None else known.incarnation
        return f"{server}-{dice.getrandbits(64):016x}_local_part_{dice.randrange(3)}"

    def _session(self) -> str:
        known = self.knowledge
        return self.dice.choice(known.sessions) if known.sessions and self.dice.random() < 0.1 else known.session

    def _blocks(self) -> list[int]:
        dice, most = self.dice, self.knowledge.blocks
        if dice.random() < 0.1:
            return [dice.choice((0, 1, most - 1, most, 1 << 20, 1 << 32)) for _ in range(dice.randrange(1, 9))]
        return dice.sample(range(most), dice.randrange(1, most + 1))

    def _from_language(self) -> Message:
        dice, known = self.dice, self.knowledge
        kind = dice.choices(("register", "init", "resume", "abort", "retire", "heartbeat"), (2, 30, 30, 15, 3, 20))[0]
        if kind == "register" and known.register is not None:
            return msgspec.structs.replace(known.register, number=dice.randrange(1 << 16))
        if kind == "init":
            return Init(
                room=self._room(), mooncake_session_id=self._session(), epoch=0, dst_embedding_indices=self._blocks(),
                allocated_tokens=dice.randrange(1, 200), required_dst_info_num=dice.choice((1, 1, 1, 2)),
                deadline=dice.choice((0.0, 1.0, 5.0)),
            )  # fmt: skip
        if kind == "resume":
            return Resume(
                room=self._room(), mooncake_session_id=self._session(), epoch=0, window=dice.randrange(1, 4),
                dst_embedding_indices=self._blocks(), sent_tokens=dice.randrange(200),
                allocated_tokens=dice.randrange(1, 200), deadline=dice.choice((0.0, 1.0, 5.0)),
            )  # fmt: skip
        if kind == "abort":
            return Abort(room=self._room(), mooncake_session_id=self._session(), reason="r" * dice.randrange(4096))
        if kind == "retire":
            return Retire(mooncake_session_id=self._session(), epoch=dice.choice((0, 1, 1 << 48)))
        return Heartbeat(incarnation=known.incarnation)

    def _from_encoder(self) -> Message:
        dice, known = self.dice, self.knowledge
        kind = dice.choices(
            ("registered", "refused", "announce", "progress", "done", "failed", "drained", "heartbeat"),
            (3, 2, 30, 20, 20, 5, 10, 10),
        )[0]
        if kind == "registered":
            return Registered(
                mooncake_session_id=self._session(), epoch=dice.choice((0, 0, 1, 1 << 48)),
                incarnation=known.incarnation,
            )  # fmt: skip
        if kind == "refused":
            first = RefusalKind.REGISTER_FIRST
            why = dice.choice((RefusalKind.MISMATCH, RefusalKind.DATA_PATH, first, first))
            path = dice.choice(("", "shm", "mooncake"))
            return Refused(reason="r" * dice.randrange(4096), kind=why, data_path=path)
        if kind == "announce":
            tokens = dice.choice((1, 50, 100, 256, 300, 1 << 20, 1 << 48))
            row_bytes = dice.choice((1024, 1024, 1024, 1, 3, 1 << 20))
            dtype = dice.choice(("float32", "float32", "bfloat16", "nonsense"))
            return Announce(room=self._room(), total_tokens=tokens, row_bytes=row_bytes, dtype=dtype)
        if kind == "progress":
            return Progress(
                room=self._room(), window=dice.randrange(-1, 3), sent_tokens=dice.choice((0, 50, 100, 256, 1 << 48)),
                metadata=dice.randbytes(dice.randrange(64)), refused=dice.choice(("", "", "", "no")),
                refused_window=dice.randrange(3),
            )  # fmt: skip
        if kind == "done":
            return Done(
                room=self._room(), window=dice.randrange(3), total_tokens=dice.choice((1, 50, 100, 256, 300)),
                elapsed=dice.random(), metadata=dice.randbytes(dice.randrange(64)),
                checksum=dice.choice((None, 0, -(1 << 63), (1 << 63) - 1)),
            )  # fmt: skip
        if kind == "failed":
            return Failed(
                room=self._room(), reason="r" * dice.randrange(4096), code=dice.randrange(400, 600),
                drained=dice.random() < 0.5,
            )  # fmt: skip
        if kind == "drained":
            return Drained(room=self._room())
        return Heartbeat(incarnation=known.incarnation)

    # -- spoiled ---------------------------------------------------------------------------------------------------

    def _spoil(self, frame: bytes) -> Parts:
        dice = self.dice
        how = dice.random()
        if how < 0.35:
            return [frame]
        if how < 0.65:
            return [self._change_a_field(frame)]
        return self._spoil_any(frame)

    def _spoil_any(self, frame: bytes) -> Parts:
        """Whatever ``frame`` is."""
        dice = self.dice
        how = dice.uniform(0.65, 1.0)  # the shares that _spoil leaves
        if how < 0.75:
            return [self._flip(frame)]
        if how < 0.80:
            return [frame[: dice.randrange(len(frame))]]
        if how < 0.85:
            return [frame + dice.randbytes(dice.randrange(1, 64))]
        if how < 0.88:
            return [dice.randbytes(1) + frame[1:]]
        if how < 0.97:
            return [VERSION * (dice.random() < 0.5) + dice.randbytes(dice.randrange(200))]
        if how < 0.98:
            return [dice.randbytes(dice.randrange(LONGEST_RANDOM))]
        if how < 0.9995:
            return [frame] * dice.choice((2, 2, 2, 3, 100)) if dice.random() < 0.5 else [b"", frame]
        return [frame + bytes(self._overlong)]

    def _flip(self, frame: bytes) -> bytes:
        changed = bytearray(frame)
        for _ in range(self.dice.randrange(1, 9)):
            changed[self.dice.randrange(len(changed))] ^= 1 << self.dice.randrange(8)
        return bytes(changed)

    def _change_a_field(self, frame: bytes) -> bytes:
        dice, known = self.dice, self.knowledge
        message: dict[str, Any] = msgspec.msgpack.decode(frame[1:])
        fields = message
        name = dice.choice(list(fields))
        if isinstance(fields[name], dict) and dice.random() < 0.8:  # what a Register says of its memory
            fields = fields[name]
            name = dice.choice(list(fields))
        old = fields[name]
        if dice.random() < 0.1:
            del fields[name]
        elif isinstance(old, int | float) and dice.random() < 0.8:
            fields[name] = dice.choice(NUMBERS)
        elif isinstance(old, list) and old and dice.random() < 0.8:
            more = [*old, dice.choice(NUMBERS)]
            fields[name] = dice.choice((old * 2, old[:-1], more, old * 500, [dice.choice(TEXTS)]))
        else:
            name_of_somebody = dice.choice((*known.sessions, known.session))
            values = (dice.choice(TEXTS), dice.choice(OTHERS), dice.choice(NUMBERS), name_of_somebody)
            fields[name] = dice.choice(values)
        return VERSION + msgspec.msgpack.encode(message)
