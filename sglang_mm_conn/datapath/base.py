"""Owns the interface of a data path, which writes the bytes of a window into a language rank's blocks.

A data path has two halves:

- ``DataPath``, the encoder's half, opens ``WriteLink``s into memory that a Register describes.
- ``ReceivePath``, the language rank's half, describes the memory, and proves that no further write lands in it.

Who owns which bytes (P2 in docs/protocol.md):

- The caller owns the source bytes again as soon as ``WriteLink.write`` has returned or raised. A link that may still
  read them afterwards must have copied them.
- The encoder owns a block from the offer until a message proves that its window has landed or never will. If no such
  message comes, the block stays in quarantine until the data path itself proves it. Each path gives one of two proofs:

  - A lock (``exclusive_lock``): a process holds the lock on its writer slot as long as it may write. Once the language
    rank has taken that lock (``prove_writer_gone``), no process can write with that slot.
  - A revocation (``revocation``): the engine that leads into the memory is destroyed, for all writers together. A new
    engine with the next epoch replaces it.

datapath.factory lists the paths. docs/extending.md describes how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import torch

from sglang_mm_conn.core.layout import Extent, Geometry
from sglang_mm_conn.core.messages import AnyMemory, Memory


class WriteLink(Protocol):
    """Writes into the memory of one session."""

    name: str
    synchronous: bool  # whether no byte lands after ``write`` has returned or raised

    def write(self, source: torch.Tensor, extents: Sequence[Extent]) -> None:
        """Write bytes of ``source``, an embedding (uint8, one dimension), to ``extents``. Returns when all bytes are in
        place.

        The caller has checked the extents against the session's geometry; they lie within ``source``. Raises
        DataPathError. If it is ``in_doubt``, bytes may still land. The link then makes sure that the memory which it
        may still send from is not reused.
        """

    def close(self) -> None:
        """Close the link. Call this only when no write is under way. Over a path with an exclusive lock this drops the
        lock, which proves that this process can no longer write there."""


class DataPath(Protocol):
    """The encoder's half: opens links of one kind."""

    name: str

    def open(self, memory: Memory, geometry: Geometry, incarnation: str) -> WriteLink:
        """Open a link to the pool of shape ``geometry`` that the process ``incarnation`` describes as ``memory``.

        This writes nothing, since any block may be in use. Raises DataPathUnavailable with the reason why no link is
        possible, or WriterSlotTaken if a Register with another writer slot may succeed.
        """

    def close(self) -> None:
        """Release everything at the end of the process."""


@dataclass(frozen=True)
class Description:
    """The memory and epochs in a Register: the epoch to write through, and the oldest one that is not revoked."""

    memory: AnyMemory
    epoch: int = 0
    oldest_epoch: int = 0


class Revoking(Protocol):
    """Starts a revocation whenever blocks have been in doubt for too long, one at a time."""

    def tick(self, now: float) -> None:
        """Take the next step. The endpoint calls this regularly under its lock, so it must never block."""


@dataclass(frozen=True)
class Doubts:
    """What a revocation needs of its endpoint. All callbacks are called from ``Revoking.tick`` only."""

    executor: Executor  # runs work that takes long
    patience: float  # seconds in doubt before a revocation begins
    in_doubt_since: Callable[[str], float | None]  # session id -> when its oldest quarantine began
    is_in_use: Callable[[str, int], bool]  # session id, epoch -> whether healthy windows are open in epochs up to it
    register_again: Callable[[ReceivePath], None]  # registers the next epoch with every encoder
    revoked: Callable[[ReceivePath, int], None]  # no write lands any more through epochs up to this one


class ReceivePath(Protocol):
    """The language rank's half: describes the pool, and proves that no further write lands in it.

    The language rank owns the pool, which outlives this object. This object owns what leads into it (a name, an
    engine).
    """

    name: str
    # Whether the lock on a writer slot proves that its process is gone. If not, only a revocation frees the blocks that
    # a process that is gone might have written.
    exclusive_lock: bool

    @property
    def session_id(self) -> str:
        """``host:port``, unique to this path. It never changes once ``start`` has returned. The shard rule uses its
        port."""

    def start(self) -> None:
        """Create what leads into the pool, unless it exists. May take long. Raises DataPathUnavailable."""

    def describe(self, slot: int) -> Description:
        """How the process with writer slot ``slot`` reaches the pool now. Starts the path if necessary, and raises as
        ``start`` does."""

    def is_current(self, epoch: int) -> bool:
        """Whether ``epoch`` is the epoch to register and offer. Never waits."""

    @property
    def retired_epoch(self) -> int | None:
        """The newest revoked epoch; None if no epoch was revoked. Never waits."""

    def prove_writer_gone(self, slot: int) -> bool:
        """Whether no process writes with ``slot`` now or later. True takes the slot away permanently. Always False
        without an exclusive lock. Never waits."""

    def revocation(self, doubts: Doubts) -> Revoking | None:
        """The object that revokes epochs of this path; None if the path's proof is the lock."""

    def close(self) -> None:
        """Release everything at the end of the process."""


class RevocablePath(ReceivePath, Protocol):
    """A path whose proof is a revocation: its engine can be replaced. Both calls take about a second."""

    def renew(self) -> int:
        """Make the engine of the next epoch. Returns the replaced epoch, whose engine stays."""

    def revoke(self, epoch: int) -> None:
        """Destroy the engine of ``epoch``. When this returns, no write through it lands any more."""
