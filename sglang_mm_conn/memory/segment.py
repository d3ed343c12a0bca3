"""Shared-memory segments: made by a language server, written by encoders on the same host.

Hazards, and what is done about them:

- A sparse segment raises SIGBUS in the middle of a copy when /dev/shm is full: pages are reserved at the start.
- The first touch of a page is many times slower than later ones: both ends map with MAP_POPULATE.
- A process that ends in good order unlinks its segment; one that crashes leaves it behind: the owner holds a lock on
  the file for life, and whoever starts next unlinks the segments whose owner lock is free. A segment gets its name
  only after its owner holds that lock.
- "The writer is gone" cannot be told by a PID (a frozen process resumes in mid-copy; PIDs are reused): every writer
  holds a lock of its own on the same file, which the kernel drops when the process is really gone. A free lock proves
  something about this moment only: a registration on its way could attach with it again. So the owner takes it.
- ``multiprocessing.shared_memory`` is not used: before Python 3.13 its tracker lets an attaching process unlink the
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
    """Whether another open file description holds the byte (one's own locks do not count)."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock_request(fcntl.F_WRLCK, byte))
    return bool(struct.unpack("hhqqixxxx", answer)[0] != fcntl.F_UNLCK)


def _map(fd: int, nbytes: int) -> mmap.mmap:
    return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def map_private(fd: int) -> mmap.mmap:
    """The whole file copy-on-write: what is written to the mapping reaches nobody else. Nothing is copied here."""
    # Without MAP_POPULATE: on a private mapping that can be written it copies every page.
    return mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def free_bytes() -> int:
    """Bytes that /dev/shm has left."""
    try:
        info = os.statvfs(DIRECTORY)
    except OSError:
        return 0
    return info.f_bavail * info.f_frsize


def _unlink(path: str, owner: int) -> None:
    """Also when the process ends in good order. A forked child ends too, but owns nothing."""
    if os.getpid() == owner:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def sweep_stale_segments() -> list[str]:
    """Unlink the segments whose owner is gone, and nothing else. Returns their names."""
    removed = []
    try:
        names = [name for name in os.listdir(DIRECTORY) if _NAME.fullmatch(name)]
    except OSError:
        return []
    for name in names:
        path = os.path.join(DIRECTORY, name)
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if not _is_locked(fd, 0) and os.stat(path).st_ino == os.fstat(fd).st_ino:
                    os.unlink(path)
                    removed.append(name)
            finally:
                os.close(fd)
    return removed


class Segment:
    """The owner's end. ``data`` is the mapping; payload starts at HEADER_BYTES."""

    def __init__(self, payload_bytes: int, *, name: str = "", published: bool = True) -> None:
        """Reserve a segment; others can open it by its name from ``publish`` on (``published``: at once).

        Raises MemoryUnavailable, naming the bytes asked for and those free.
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
            raise MemoryUnavailable(f"no shared memory in {DIRECTORY}: {error.strerror}") from error
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
            self.data = _map(self._fd, nbytes)
            header = _MAGIC + self.nonce.encode()
            self.data[: len(header)] = header
            if not _try_lock(self._fd, 0):
                raise MemoryUnavailable(f"segment {self.name} is locked by somebody else")
            if published:
                self.publish()
        except OSError as error:
            os.close(self._fd)
            raise MemoryUnavailable(
                f"{nbytes >> 20} MiB of shared memory asked for, {free_bytes() >> 20} MiB free in {DIRECTORY} "
                f"({error.strerror}): lower SGLANG_EMBEDDING_CACHE_BUFFER_SIZE or enlarge {DIRECTORY}"
            ) from error

    def publish(self) -> None:
        """Give it its name."""
        # linkat through /proc names the nameless file; src_dir_fd only makes Python call linkat.
        os.link(f"/proc/self/fd/{self._fd}", self._path, src_dir_fd=self._fd, follow_symlinks=True)
        self._unlink = weakref.finalize(self, _unlink, self._path, os.getpid())

    def map_private(self) -> mmap.mmap:
        """The segment as its owner may change it without anybody else noticing."""
        return map_private(self._fd)

    def retire_writer(self, slot: int) -> bool:
        """Whether nobody is attached with ``slot``, and nobody ever will be: where it is free the owner takes it."""
        return _try_lock(self._fd, 1 + slot)

    def close(self) -> None:
        """Unlink the name. The mapping lives on until nobody refers to it: a copier may still read it."""
        if self._unlink is not None:
            self._unlink()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class AttachedSegment:
    """A writer's end. Attaching proves that both are on one host: the name opens and the nonce is in it."""

    def __init__(self, name: str, nonce: str, payload_bytes: int, slot: int) -> None:
        """Attach. Raises DataPathUnavailable saying why this is not the segment that was meant."""
        if not _NAME.fullmatch(name):
            raise DataPathUnavailable(f"{name!r} is not the name of a segment")
        if len(nonce) != _NONCE_CHARACTERS:  # a shorter one would prove less, an empty one nothing
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
        """Give up the lock. Only when no write is under way: the lock says that this process may write."""
        # The mapping holds a duplicate of the descriptor, and with it the lock, until nobody refers to it any more.
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _lock_request(fcntl.F_UNLCK, 1 + self._slot))
        os.close(self._fd)
