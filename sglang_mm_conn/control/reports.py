"""Owns the local socket on which a language server's scheduler reports to its dispatchers (tokenizer processes).

It is a Unix socket in a directory that only the server's user can enter. The scheduler publishes, every dispatcher
subscribes. Reports that a dispatcher does not read in time are dropped, never queued without limit, and never delay the
scheduler; the important ones are repeated.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import zmq
import zmq.asyncio

from sglang_mm_conn.core.dispatch.reports import Report, decode_report, encode_report

_MOST_WAITING = 1000  # reports that a dispatcher has not read yet
_LONGEST_PATH = 100  # of a Unix socket, in bytes: the kernel's limit is 107
_PREFIX = "mm-conn-reports-"
_LOCK_SECONDS = 60.0  # the longest time from the making of a directory to its lock


def new_report_address() -> str:
    """The address of a new report socket, in a directory of its own that goes when this process ends.

    If the process is killed, the directory goes when the next one asks for an address.
    """
    directory = tempfile.mkdtemp(prefix=_PREFIX)
    if len(os.fsencode(directory)) > _LONGEST_PATH - len("/reports"):  # TMPDIR may be long
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp")
    with contextlib.suppress(OSError):  # on NFS a directory cannot be locked, and is never swept
        _lock(directory)  # for the life of this process
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child runs this, too
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    _sweep(Path(directory).parent)
    return f"ipc://{directory}/reports"


def _lock(directory: str | Path) -> int:
    """Lock ``directory`` until the process ends. Returns the descriptor. Raises OSError if another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(parent: Path) -> None:
    """Remove the directories of processes that were killed: those that nobody has locked."""
    for directory in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone
            found = directory.lstat()
            if found.st_uid == os.getuid() and time.time() > found.st_mtime + _LOCK_SECONDS:
                descriptor = _lock(directory)
                shutil.rmtree(directory, ignore_errors=True)
                os.close(descriptor)


class ReportSender:
    """The scheduler's end. Any thread may send."""

    def __init__(self, address: str) -> None:
        """Raises ZMQError if the address is in use or its directory is gone."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _MOST_WAITING)
        try:
            self._socket.bind(address)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        self._lock = threading.Lock()

    def send(self, report: Report) -> None:
        """Send ``report`` to every dispatcher that is connected. Never waits."""
        frame = encode_report(report)
        with self._lock, contextlib.suppress(zmq.ZMQError):  # closed
            self._socket.send(frame, zmq.NOBLOCK)

    def close(self) -> None:
        with self._lock:
            self._context.destroy(linger=0)


class ReportReceiver:
    """A dispatcher's end, for the event loop that it is made on. It may be made before the scheduler's end."""

    def __init__(self, address: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, _MOST_WAITING)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.subscribe(b"")
        self._socket.connect(address)

    async def receive(self) -> Report:
        """The next report. Raises ProtocolError if it is malformed or too long.

        The socket has no limit of its own: after a frame beyond that it would never connect again.
        """
        return decode_report(await self._socket.recv())

    def close(self) -> None:
        self._context.destroy(linger=0)
