"""Owns the encoder's data links: one per session and epoch, with a count of the writes under way through each.

A link that is given up closes only when its last write has returned. A closed link guarantees that this process can no
longer write there: over shared memory, closing drops the lock on the writer slot, and the language rank takes the free
lock as proof.
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
    """The session's previous link to the same memory still has a write under way. The rank should try again."""


def _memory(register: Register) -> Register:
    """``register`` without the fields that change when the same memory is registered again."""
    return msgspec.structs.replace(register, number=0, oldest_epoch=0)


@dataclass
class _OpenLink:
    link: WriteLink
    register: Register
    writes: int = 0
    closing: bool = False

    def release(self) -> bool:
        """Count one write less. Returns whether the caller must close the link now."""
        self.writes -= 1
        return self.closing and self.writes == 0


@dataclass(frozen=True, slots=True)
class LinkLease:
    """Keeps ``link`` open until ``release`` is called. It must be called exactly once."""

    link: WriteLink
    release: Callable[[], None]


class Links:
    """Thread-safe. A private lock guards the table; it is not held while a link is opened or closed."""

    def __init__(self, data_paths: Mapping[str, DataPath]) -> None:
        self._data_paths = data_paths
        self._lock = threading.Lock()
        self._links: dict[tuple[str, int], _OpenLink] = {}

    def __len__(self) -> int:
        return len(self._links)

    def open(self, register: Register) -> bool:
        """Make sure that the link that ``register`` describes is open.

        Returns whether the session continues. It does not if it had no link, or if its links belonged to another
        process or other memory; those links are given up. Raises LinkBusy, DataPathUnavailable.
        """
        session, key = register.mooncake_session_id, (register.mooncake_session_id, register.epoch)
        # If the same memory was registered again, its link stays: nothing has to be opened.
        with self._lock:
            known = [link for (name, _), link in self._links.items() if name == session]
            same_session = bool(known) and all(
                link.register.incarnation == register.incarnation and not link.closing for link in known
            )
            same = self._links.get(key)
            if same is not None and _memory(same.register) == _memory(register) and not same.closing:
                return same_session
        # If the same process registers other memory, its old links are closed first: this process would still hold the
        # lock on the writer slot through them, and the new attachment needs that lock.
        same_process = all(link.register.incarnation == register.incarnation for link in known)
        if same_process and (not same_session or same is not None):
            self.close(session)
            same_session = False
        # A write may still be under way through the old link. It keeps that link open, so the rank must try again.
        with self._lock:
            if key in self._links and same_process:
                raise LinkBusy("the session's previous link has a write under way")
        path = self._data_paths.get(register.data_path)
        if path is None:
            raise DataPathUnavailable(
                f"this encoder has no data path {register.data_path!r} (it has {', '.join(self._data_paths) or 'none'})"
            )
        # Open the link without the lock: attaching memory or contacting an engine may take long.
        link = path.open(register.memory, register.geometry, register.incarnation)
        # Another process takes the session over. The old links are closed only now: a process whose memory cannot be
        # opened must not end the session.
        if not same_process:
            self.close(session)
        # Enter the new link. The old one is still in the table if a write is under way through it: then the new one is
        # closed, and the rank must try again.
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
        """Whether the link is open and has not been given up."""
        with self._lock:
            entry = self._links.get((session, epoch))
            return entry is not None and not entry.closing

    def synchronous(self, session: str, epoch: int) -> bool:
        """Whether writes through this link have ended when they return. False if no link is open."""
        with self._lock:
            entry = self._links.get((session, epoch))
            return entry is not None and entry.link.synchronous

    def lease(self, session: str, epoch: int) -> LinkLease:
        """Keep the link open for a write until the lease is released. Raises DataPathError if the link was given up."""
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
        """Give up the links of ``session``; with ``up_to``, only the links of epochs up to it."""
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
        """Give up all links at the end of the process."""
        for session in {session for session, _ in list(self._links)}:
            self.close(session)
        for path in self._data_paths.values():
            path.close()
