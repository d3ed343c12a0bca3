"""Owns shared-memory segments and their locks: language servers create segments, encoders on the same host write them.

Hazards, and what this module does about them:

- A sparse segment raises SIGBUS during a copy if /dev/shm is full. So all pages are reserved at the start.
- The first touch of a page takes many times as long as later ones. So both sides map with MAP_POPULATE.
- A process that exits normally unlinks its segments, but a process that crashes leaves them behind. So the owner holds
  a lock on the file as long as it lives, and the next process that starts unlinks the segments whose owner lock is
  free. A segment gets its name only after its owner holds that lock.
- A PID cannot prove that a writer is gone: a suspended process may resume in the middle of a copy, and PIDs are reused.
  So every writer holds a separate lock on the same file, which the kernel drops only when the process is gone. A free
  lock proves this for the present moment only, since a registration in flight could attach and lock it again. So the
  owner takes the lock.
- ``multiprocessing.shared_memory`` is not used: before Python 3.13, its tracker lets an attaching process unlink the
  owner's segment.

The locks are open-file-description locks on single bytes beyond the end of the data.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import struct
import weakref

from sglang_mm_conn.core.errors import DataPathUnavailable, MemoryUnavailable, WriterSlotTaken

DIRECTORY = "/dev/shm"
PREFIX = "sglang-mm-conn-"
_NAME = re.compile(PREFIX + r"[0-9a-f]{32}")
_NONCE_CHARACTERS = 32
_MAGIC = b"sglang-mm-conn 1\n"
HEADER_BYTES = 4096
_LOCKS_AT = 1 << 60  # byte 0: the owner; byte 1 + slot: the writer with that slot


def _lock_request(kind: int, byte: int) -> bytes:
    return struct.pack("hhqqixxxx", kind, os.SEEK_SET, _LOCKS_AT + byte, 1, 0)


def _try_lock(fd: int, byte: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock_request(fcntl.F_WRLCK, byte))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another open file description has locked the byte. Locks of ``fd`` itself do not count."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock_request(fcntl.F_WRLCK, byte))
    return bool(struct.unpack("hhqqixxxx", answer)[0] != fcntl.F_UNLCK)


def _map(fd: int, nbytes: int) -> mmap.mmap:
    return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def map_private(fd: int) -> mmap.mmap:
    """Map the whole file copy-on-write: writes to the mapping stay private. This copies nothing."""
    # Not with MAP_POPULATE: for a writable private mapping it would copy every page.
    return mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def free_bytes() -> int:
    """Free bytes in /dev/shm."""
    try:
        info = os.statvfs(DIRECTORY)
    except OSError:
        return 0
    return info.f_bavail * info.f_frsize


def _unlink(path: str, owner: int) -> None:
    """Unlink ``path``, unless this is a forked child: it does not own the segment. Also runs at a normal exit."""
    if os.getpid() == owner:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def sweep_stale_segments() -> list[str]:
    """Unlink the segments whose owner is gone, and no others. Returns their names."""
    removed = []
    try:
        names = [name for name in os.listdir(DIRECTORY) if _NAME.fullmatch(name)]
    except OSError:
        return []
    for name in names:
        path = os.path.join(DIRECTORY, name)
        with contextlib.suppress(OSError):  # it belongs to another user, or was unlinked meanwhile
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if not _is_locked(fd, 0) and os.stat(path).st_ino == os.fstat(fd).st_ino:
                    os.unlink(path)
                    removed.append(name)
            finally:
                os.close(fd)
    return removed


class Segment:
    """The owner's side. ``data`` is the mapping; the payload starts at HEADER_BYTES."""

    def __init__(self, payload_bytes: int, *, name: str = "", published: bool = True) -> None:
        """Reserve a segment. Other processes can open it by its name after ``publish``; with ``published``, at once.

        Raises MemoryUnavailable, which names the bytes asked for and the bytes free.
        """
        self.payload_bytes = payload_bytes
        self.nonce = secrets.token_hex(_NONCE_CHARACTERS // 2)
        self.name = name or PREFIX + secrets.token_hex(16)
        self._path = os.path.join(DIRECTORY, self.name)
        self._unlink: weakref.finalize[..., Segment] | None = None
        nbytes = HEADER_BYTES + payload_bytes
        sweep_stale_segments()
        try:
            self._fd = os.open(DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MemoryUnavailable(f"cannot create shared memory in {DIRECTORY}: {error.strerror}") from error
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
            self.data = _map(self._fd, nbytes)
            header = _MAGIC + self.nonce.encode()
            self.data[: len(header)] = header
            if not _try_lock(self._fd, 0):
                raise MemoryUnavailable(f"segment {self.name} is locked by another process")
            if published:
                self.publish()
        except OSError as error:
            os.close(self._fd)
            raise MemoryUnavailable(
                f"{nbytes >> 20} MiB of shared memory asked for, {free_bytes() >> 20} MiB free in {DIRECTORY} "
                f"({error.strerror}): lower SGLANG_EMBEDDING_CACHE_BUFFER_SIZE or enlarge {DIRECTORY}"
            ) from error

    def publish(self) -> None:
        """Give the segment its name, so that other processes can open it."""
        # linkat through /proc gives the unnamed file a name. src_dir_fd only makes Python call linkat.
        os.link(f"/proc/self/fd/{self._fd}", self._path, src_dir_fd=self._fd, follow_symlinks=True)
        self._unlink = weakref.finalize(self, _unlink, self._path, os.getpid())

    def map_private(self) -> mmap.mmap:
        """Map the segment privately: the owner's changes to this mapping stay invisible to other processes."""
        return map_private(self._fd)

    def retire_writer(self, slot: int) -> bool:
        """Take the lock of writer ``slot`` if it is free. If so, returns True: no process is attached with the slot,
        and none ever can be."""
        return _try_lock(self._fd, 1 + slot)

    def close(self) -> None:
        """Unlink the name. The mapping stays until nothing refers to it: a copier may still read it."""
        if self._unlink is not None:
            self._unlink()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class AttachedSegment:
    """A writer's side. Attaching proves that both sides are on one host: the name opens, and the segment has the
    nonce."""

    def __init__(self, name: str, nonce: str, payload_bytes: int, slot: int) -> None:
        """Attach with writer ``slot``. Raises DataPathUnavailable if this is not the announced segment,
        WriterSlotTaken."""
        if not _NAME.fullmatch(name):
            raise DataPathUnavailable(f"{name!r} is not the name of a segment")
        if len(nonce) != _NONCE_CHARACTERS:  # a shorter nonce would prove less, an empty one nothing
            raise DataPathUnavailable(f"a nonce of {len(nonce)} characters proves nothing")
        self._slot = slot
        nbytes = HEADER_BYTES + payload_bytes
        try:
            self._fd = os.open(os.path.join(DIRECTORY, name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise DataPathUnavailable(f"segment {name} cannot be opened here: {error.strerror}") from error
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != nbytes:
                raise DataPathUnavailable(f"segment {name} has {status.st_size} bytes, not {nbytes}")
            header = _MAGIC + nonce.encode()
            if os.pread(self._fd, len(header), 0) != header:
                raise DataPathUnavailable(f"segment {name} does not hold the nonce that was announced")
            if not _try_lock(self._fd, 1 + slot):
                raise WriterSlotTaken(f"writer slot {slot} of segment {name} is taken")
            self.data = _map(self._fd, nbytes)
        except OSError as error:
            os.close(self._fd)
            raise DataPathUnavailable(f"segment {name} cannot be mapped: {error.strerror}") from error
        except DataPathUnavailable:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Drop the lock. Call this only when no write is under way: a free lock proves that this process cannot
        write."""
        # Unlock explicitly: the mapping has a duplicate of the descriptor, which would keep the lock until nothing
        # refers to the mapping any more.
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _lock_request(fcntl.F_UNLCK, 1 + self._slot))
        os.close(self._fd)
