"""The encoder's data links: owns one link per session and epoch, and counts the writes under way through each.

A link that is given up closes when its last write has returned, not before: a closed link means that this process can
write there no more. Over shared memory, closing drops the writer's lock, which the language rank takes as proof.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import msgspec

from sglang_mm_conn.core.errors import DataPathError, DataPathUnavailable
from sglang_mm_conn.core.messages import Register
from sglang_mm_conn.datapath.base import DataPath, WriteLink


class LinkBusy(DataPathUnavailable):
    """The session's previous link to the same memory has a write under way: try again."""


def _memory(register: Register) -> Register:
    """What ``register`` says of the memory, without what differs from one registration of it to the next."""
    return msgspec.structs.replace(register, number=0, oldest_epoch=0)


@dataclass
class _OpenLink:
    link: WriteLink
    register: Register
    writes: int = 0
    closing: bool = False

    def release(self) -> bool:
        """One write less. Returns whether the link is to be closed now."""
        self.writes -= 1
        return self.closing and self.writes == 0


@dataclass(frozen=True, slots=True)
class LinkLease:
    """A link that stays open until ``release`` is called, once."""

    link: WriteLink
    release: Callable[[], None]


class Links:
    """Thread-safe. A lock of its own guards the table; links are opened and closed without it."""

    def __init__(self, data_paths: Mapping[str, DataPath]) -> None:
        self._data_paths = data_paths
        self._lock = threading.Lock()
        self._links: dict[tuple[str, int], _OpenLink] = {}

    def __len__(self) -> int:
        return len(self._links)

    def open(self, register: Register) -> bool:
        """Make sure that there is a link as ``register`` describes it. Returns whether the session goes on: False
        where it was opened by another process (or with other memory) before; those links are given up.

        Raises LinkBusy, DataPathUnavailable.
        """
        session, key = register.mooncake_session_id, (register.mooncake_session_id, register.epoch)
        with self._lock:
            known = [link for (name, _), link in self._links.items() if name == session]
            same_session = bool(known) and all(
                link.register.incarnation == register.incarnation and not link.closing for link in known
            )
            same = self._links.get(key)
            if same is not None and _memory(same.register) == _memory(register) and not same.closing:
                return same_session
        same_process = all(link.register.incarnation == register.incarnation for link in known)
        if same_process and (not same_session or same is not None):
            self.close(session)  # first: its lock on the writer slot is in the way of the new attachment
            same_session = False
        with self._lock:
            if key in self._links and same_process:
                raise LinkBusy("the session's previous link has a write under way")
        path = self._data_paths.get(register.data_path)
        if path is None:
            raise DataPathUnavailable(
                f"this encoder has no data path {register.data_path!r} (it has {', '.join(self._data_paths) or 'none'})"
            )
        link = path.open(register.memory, register.geometry, register.incarnation)
        if not same_process:
            self.close(session)  # only now: nobody takes a session over without memory that could be opened
        with self._lock:
            if key in self._links:
                busy = True
            else:
                busy = False
                self._links[key] = _OpenLink(link, register)
        if busy:
            link.close()
            raise LinkBusy("the session's previous link has a write under way")
        return same_session

    def has(self, session: str, epoch: int) -> bool:
        """Whether there is a link that has not been given up."""
        with self._lock:
            entry = self._links.get((session, epoch))
            return entry is not None and not entry.closing

    def synchronous(self, session: str, epoch: int) -> bool:
        """Whether writes through this link are over when they return; False where there is none."""
        with self._lock:
            entry = self._links.get((session, epoch))
            return entry is not None and entry.link.synchronous

    def lease(self, session: str, epoch: int) -> LinkLease:
        """The link to write through, which stays open until the lease is released. Raises DataPathError where it was
        given up."""
        with self._lock:
            entry = self._links.get((session, epoch))
            if entry is None or entry.closing:
                raise DataPathError(f"session {session}: epoch {epoch} was revoked", in_doubt=False)
            entry.writes += 1
        return LinkLease(entry.link, partial(self._returned, (session, epoch), entry))

    def _returned(self, key: tuple[str, int], entry: _OpenLink) -> None:
        with self._lock:
            over = entry.release()
            if over and self._links.get(key) is entry:
                del self._links[key]
        if over:
            entry.link.close()

    def close(self, session: str, up_to: int | None = None) -> None:
        """Give up the links of ``session`` (with ``up_to``: those of epochs up to it)."""
        idle = []
        with self._lock:
            for key, entry in list(self._links.items()):
                if key[0] != session or (up_to is not None and key[1] > up_to) or entry.closing:
                    continue
                entry.closing = True
                if entry.writes == 0:
                    idle.append(self._links.pop(key))
        for entry in idle:
            entry.link.close()

    def close_all(self) -> None:
        """At the end of the process."""
        for session in {session for session, _ in list(self._links)}:
            self.close(session)
        for path in self._data_paths.values():
            path.close()
