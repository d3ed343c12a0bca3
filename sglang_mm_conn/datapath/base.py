"""A data path: how the bytes of a window get into a language rank's blocks. It has two halves, and owns both.

- The encoder's half, ``DataPath``, opens ``WriteLink``s into memory that was described to it.
- The language rank's half, ``ReceivePath``, describes the memory, and proves that nothing more lands in it.

Who owns which bytes (P2 in docs/protocol.md):

- Source bytes are the caller's as soon as ``WriteLink.write`` has returned or raised. A link that may still read them
  then has copied them before.
- A block is the encoder's from the offer until a message proves that its window has landed or never will. Where no
  such message comes, it stays in quarantine until the path itself proves it. There are two proofs; a path gives one:

  - a lock (``exclusive_lock``): whoever may write holds the lock of its writer slot as long as it may. Once the
    language rank has taken that lock (``prove_writer_gone``), nobody writes with that slot any more;
  - a revocation: the way into the memory is destroyed for all its writers at once, and another, with the next epoch,
    takes its place (``revocation``).

datapath.factory says which paths there are; docs/extending.md how to add one.
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
    synchronous: bool  # whether nothing more lands once ``write`` has ended, however it ended

    def write(self, source: torch.Tensor, extents: Sequence[Extent]) -> None:
        """Write bytes of ``source``, an embedding (uint8, one dimension), to ``extents``; returns when all of them are
        in place.

        The extents were checked against the session's geometry, and lie within ``source``. Raises DataPathError; where
        it is ``in_doubt``, bytes may still land, and the link has taken care that its own source memory is not reused.
        """

    def close(self) -> None:
        """Give the link up. Only when no write is under way. Over a path with an exclusive lock this drops the lock,
        which says that this process does not write there any more."""


class DataPath(Protocol):
    """The encoder's half: opens links of one kind."""

    name: str

    def open(self, memory: Memory, geometry: Geometry, incarnation: str) -> WriteLink:
        """A link to the pool of shape ``geometry`` that the process ``incarnation`` describes as ``memory``.

        Nothing is written here: every block may be somebody's. Raises DataPathUnavailable saying why there can be no
        link, WriterSlotTaken where another description of the same memory may do.
        """

    def close(self) -> None:
        """Give everything up at the end of the process."""


@dataclass(frozen=True)
class Description:
    """What a Register says of the memory, and of the epochs: the one to write in, and the oldest not revoked."""

    memory: AnyMemory
    epoch: int = 0
    oldest_epoch: int = 0


class Revoking(Protocol):
    """One revocation after another, each when blocks have been in doubt for long."""

    def tick(self, now: float) -> None:
        """Called regularly, under the endpoint's lock: it never blocks."""


@dataclass(frozen=True)
class Doubts:
    """What a revocation asks, and whom it tells. Everything is called from ``Revoking.tick`` only."""

    executor: Executor  # for work that takes long
    patience: float  # seconds in doubt before a revocation begins
    in_doubt_since: Callable[[str], float | None]  # session id -> when its oldest quarantine began
    is_in_use: Callable[[str, int], bool]  # session id, epoch -> whether healthy windows of epochs up to it are open
    register_again: Callable[[ReceivePath], None]  # every encoder is to hear of the next epoch
    revoked: Callable[[ReceivePath, int], None]  # nothing lands any more through epochs up to this one


class ReceivePath(Protocol):
    """The language rank's half: describes the pool, and proves that nothing more lands in it.

    The pool is the language rank's, and outlives this; what leads into it (a name, an engine) is owned here.
    """

    name: str
    # Whether the end of a writing process is proved by the lock on its writer slot. Otherwise nothing but a revocation
    # frees the blocks of a process that is gone.
    exclusive_lock: bool

    @property
    def session_id(self) -> str:
        """``host:port``, this path's alone, the same for life once ``start`` has returned. Its port is part of the
        shard rule."""

    def start(self) -> None:
        """Make what leads into the pool, where it is not there yet; may take long. Raises DataPathUnavailable."""

    def describe(self, slot: int) -> Description:
        """How to reach the pool now, for the process that has writer slot ``slot``. Starts the path where that has not
        been done. Raises as ``start``."""

    def is_current(self, epoch: int) -> bool:
        """Whether ``epoch`` is the one to offer. Never waits."""

    @property
    def retired_epoch(self) -> int | None:
        """The newest epoch that was revoked; None where none was. Never waits."""

    def prove_writer_gone(self, slot: int) -> bool:
        """Whether nobody writes with ``slot``, now and ever after: True takes it away for good. Always False without an
        exclusive lock. Never waits."""

    def revocation(self, doubts: Doubts) -> Revoking | None:
        """What revokes epochs of this path; None where its proof is the lock."""

    def close(self) -> None:
        """At the end of the process."""


class RevocablePath(ReceivePath, Protocol):
    """One whose proof is a revocation: the way into its memory can be replaced, and the old one destroyed."""

    def renew(self) -> int:
        """Make the way in of the next epoch, beside those that are there. Returns the epoch that was the newest."""

    def revoke(self, epoch: int) -> None:
        """Destroy the way in of ``epoch``. When this returns, nothing lands through it any more."""
