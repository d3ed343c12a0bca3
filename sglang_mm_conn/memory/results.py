"""Owns the memory of results: private to this process, a view of blocks, or shared with the ranks of this host.

A tensor-parallel language server receives an embedding once per host. The leader's process owns the shared result,
which gets a name only when every row is in it. Every rank, even the leader, reads it through a private copy-on-write
mapping, so a rank's changes stay invisible to the others. The name is derived from the room's name, which no two
dispatches share. If the owner crashes, the result is swept like any other segment (memory.segment).
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
_LENGTH_AT = HEADER_BYTES - _LENGTH_BYTES  # a segment does not use the last bytes of its header page


class Contents(msgspec.Struct, frozen=True):
    """What a result holds: ``tokens`` rows of values of ``dtype``, ``nbytes`` in all, and the room's metadata."""

    tokens: int
    dtype: str
    nbytes: int
    metadata: bytes


_CONTENTS = msgspec.msgpack.Decoder(Contents)  # made at import: see the hazard in control.bootstrap


class Result(Protocol):
    """Memory that the rows of one room are copied into."""

    rows: torch.Tensor  # uint8, one dimension

    def publish(self) -> None:
        """Make the result readable for the other ranks. Called when every row is in place."""

    def close(self) -> None:
        """Remove the name. The memory lives as long as anything refers to ``rows``."""


ResultMaker = Callable[[str, Contents], Result]


class PrivateResult:
    """A result that only this process reads, in memory from ``empty`` (by default new host memory)."""

    def __init__(self, room: str, contents: Contents, empty: Callable[[int], torch.Tensor] | None = None) -> None:
        """Raises MemoryUnavailable."""
        self.rows = torch.empty(contents.nbytes, dtype=torch.uint8) if empty is None else empty(contents.nbytes)

    def publish(self) -> None:
        """Nothing to do: no other process reads it."""

    def close(self) -> None:
        """Nothing to do: it has no name."""


class ViewResult:
    """A result that stays in its blocks. Only this process reads it."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def publish(self) -> None:
        """Nothing to do: no other process reads it."""

    def close(self) -> None:
        """Nothing to do: it has no name."""


class SharedResult:
    """A result that other processes on this host can read once it is published.

    ``host_index`` distinguishes the hosts of one server, in case two of them share a /dev/shm.
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
            # Map it now: later, the segment's descriptor may be closed, and its number reused for another file.
            self._view = _rows(self._segment.map_private(), contents)
            fault_in(self._view)
        except BaseException:
            self._segment.close()  # otherwise its descriptor would keep the memory
            raise

    def publish(self) -> None:
        self._segment.publish()
        self.rows = self._view  # so that a generation that changes the rows does not change them for the other ranks

    def close(self) -> None:
        self._segment.close()


def read_result(room: str, host_index: int = 0) -> tuple[torch.Tensor, Contents] | None:
    """The rows (uint8, one dimension, private to this process) and contents of the result that the leader of this host
    has published for ``room``. None if it has not published it yet. This is cheap: it copies and touches no row.

    Raises OSError if the result cannot be mapped, ProtocolError if it is damaged.
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
        raise ProtocolError(f"the shared result of {room} has {len(data)} bytes but describes {contents.nbytes}")
    return _rows(data, contents), contents


def fault_in(rows: torch.Tensor) -> None:
    """Touch every page, so that the next reader of ``rows`` does not wait for page faults. Reading copies no page."""
    rows[:: mmap.PAGESIZE].max()


def _rows(data: mmap.mmap, contents: Contents) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)[HEADER_BYTES : HEADER_BYTES + contents.nbytes]


def _name(room: str, host_index: int) -> str:
    return PREFIX + hashlib.blake2b(f"{room}/{host_index}".encode(), digest_size=16).hexdigest()
