"""Finished embeddings: in this process's own memory, or where the other ranks of this host can read them.

A tensor-parallel language server receives an embedding once per host: its leader's process owns the shared result,
which gets a name only when every row is in it. Every rank, the leader too, reads it through a private copy-on-write
view, so what one of them does to it reaches nobody else. The name follows from the room's, which no two dispatches
share. A result whose owner crashed is swept like any other segment (memory.segment).
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable
from typing import Protocol

import msgspec
import torch

from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.memory.segment import DIRECTORY, HEADER_BYTES, PREFIX, Segment, map_private

_LENGTH_BYTES = 8
_LENGTH_AT = HEADER_BYTES - _LENGTH_BYTES  # the last bytes of a segment's header page are free


class Contents(msgspec.Struct, frozen=True):
    """What a result holds: ``tokens`` rows of values of ``dtype``, ``nbytes`` in all, and the room's metadata."""

    tokens: int
    dtype: str
    nbytes: int
    metadata: bytes


_CONTENTS = msgspec.msgpack.Decoder(Contents)  # at import: see control.bootstrap on the first use of a struct


class Result(Protocol):
    """Memory that the rows of one room are copied into."""

    rows: torch.Tensor  # uint8, one dimension

    def publish(self) -> None:
        """Every row is in place."""

    def close(self) -> None:
        """Nobody needs the name any more; the memory lives as long as somebody uses ``rows``."""


ResultMaker = Callable[[str, Contents], Result]


class PrivateResult:
    """A result that only this process reads, in memory that ``empty`` gives (the host's, if none is named)."""

    def __init__(self, room: str, contents: Contents, empty: Callable[[int], torch.Tensor] | None = None) -> None:
        """Raises MemoryUnavailable."""
        self.rows = torch.empty(contents.nbytes, dtype=torch.uint8) if empty is None else empty(contents.nbytes)

    def publish(self) -> None:
        """Nobody else reads it."""

    def close(self) -> None:
        """Nothing has a name."""


class ViewResult:
    """A result that stays in the blocks it came in; only this process reads it."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def publish(self) -> None:
        """Nobody else reads it."""

    def close(self) -> None:
        """Nothing has a name."""


class SharedResult:
    """A result that other processes on this host can read once it is published.

    ``host_index`` tells the hosts of one server apart, should two of them share a /dev/shm.
    """

    def __init__(self, room: str, contents: Contents, host_index: int = 0) -> None:
        """Raises MemoryUnavailable."""
        described = msgspec.msgpack.encode(contents)
        self._segment = Segment(contents.nbytes + len(described), name=_name(room, host_index), published=False)
        try:
            data = self._segment.data
            data[_LENGTH_AT:HEADER_BYTES] = len(described).to_bytes(_LENGTH_BYTES, "little")
            data[HEADER_BYTES + contents.nbytes :] = described
            self.rows = _rows(data, contents)
            # Made now: the descriptor that it takes may be closed, and another file's, when the rows are asked for.
            self._view = _rows(self._segment.map_private(), contents)
            fault_in(self._view)
        except BaseException:
            self._segment.close()  # its descriptor keeps the memory
            raise

    def publish(self) -> None:
        self._segment.publish()
        self.rows = self._view  # a generation that changed the shared rows would change them for every reader

    def close(self) -> None:
        self._segment.close()


def read_result(room: str, host_index: int = 0) -> tuple[torch.Tensor, Contents] | None:
    """The rows (uint8, one dimension, private to this process) and contents of the result that the leader of this
    host published for ``room``; None where there is none yet. Copies and touches no row, so it is cheap.

    Raises OSError where it cannot be mapped, ProtocolError where it is damaged.
    """
    try:
        fd = os.open(os.path.join(DIRECTORY, _name(room, host_index)), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        data = map_private(fd)
    finally:
        os.close(fd)
    length = int.from_bytes(data[_LENGTH_AT:HEADER_BYTES], "little")
    try:
        contents = _CONTENTS.decode(memoryview(data)[len(data) - length :])
    except msgspec.DecodeError as error:
        raise ProtocolError(f"the shared result of {room} is damaged: {error}") from None
    if HEADER_BYTES + contents.nbytes + length != len(data):
        raise ProtocolError(f"the shared result of {room} has {len(data)} bytes and describes {contents.nbytes}")
    return _rows(data, contents), contents


def fault_in(rows: torch.Tensor) -> None:
    """Touch every page, so that whoever reads ``rows`` next does not wait for page faults. Reading copies none."""
    rows[:: mmap.PAGESIZE].max()


def _rows(data: mmap.mmap, contents: Contents) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)[HEADER_BYTES : HEADER_BYTES + contents.nbytes]


def _name(room: str, host_index: int) -> str:
    return PREFIX + hashlib.blake2b(f"{room}/{host_index}".encode(), digest_size=16).hexdigest()
