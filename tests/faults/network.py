"""Two network namespaces of our own with a cable between them that can be cut: what is sent while it is cut is lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "mm-conn-faults-"
_DIRECTORY = Path("/run/netns")
# A unicast address of nobody: frames to it are dropped by whoever gets them, without a word.
_NOBODY = "02:00:00:00:00:ff"
_numbers = itertools.count()


def why_impossible() -> str:
    """Why this process can make no network namespace; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces can be made by root only"
    if _command() is None:
        return "there is no `ip` command (Debian package iproute2)"
    probe = f"{_PREFIX}{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "delete", probe)
    except subprocess.CalledProcessError as error:
        return f"`ip netns add` fails: {error.stderr.strip()}"
    return ""


def _ip(*words: str) -> None:
    subprocess.run([_command() or "ip", *words], check=True, capture_output=True, text=True, timeout=30)


def _command() -> str | None:
    """Debian keeps it in /sbin, which is not on everybody's PATH."""
    return shutil.which("ip", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))


@dataclass(frozen=True)
class Side:
    """One end of the cable: a namespace and the address in it."""

    namespace: str
    address: str
    hardware: str

    @property
    def path(self) -> str:
        return str(_DIRECTORY / self.namespace)

    @property
    def as_host(self) -> tuple[str, ...]:
        """What makes a command run as on another host: in this network, with a /dev/shm of its own."""
        own_memory = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        return ("nsenter", f"--net={self.path}", "unshare", "--mount", "sh", "-c", own_memory, "sh")


class Cable:
    """Two sides, each other's only neighbours."""

    def __init__(self, subnet: str = "10.79.0") -> None:
        """Raises subprocess.CalledProcessError where ``why_impossible`` would have said why."""
        _remove_those_of_the_dead()
        name = f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        self.sides = (
            Side(f"{name}-a", f"{subnet}.1", "02:00:00:00:00:01"),
            Side(f"{name}-b", f"{subnet}.2", "02:00:00:00:00:02"),
        )
        for side in self.sides:
            _ip("netns", "add", side.namespace)
            _ip("-n", side.namespace, "link", "set", "lo", "up")
        near, far = (side.namespace for side in self.sides)
        _ip("-n", near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", far)
        for side in self.sides:
            _ip("-n", side.namespace, "link", "set", "cable", "address", side.hardware, "up")
            _ip("-n", side.namespace, "address", "add", f"{side.address}/24", "dev", "cable")
        self.mend()

    def cut(self) -> None:
        """From now on nothing arrives, and nobody is told: no connection is refused or closed."""
        self._neighbours(lambda other: _NOBODY)

    def mend(self) -> None:
        self._neighbours(lambda other: other.hardware)

    def _neighbours(self, hardware_of: Callable[[Side], str]) -> None:
        for side, other in (self.sides, self.sides[::-1]):
            _ip(
                "-n", side.namespace, "neighbour", "replace", other.address, "dev", "cable",
                "lladdr", hardware_of(other), "nud", "permanent",
            )  # fmt: skip

    def close(self) -> None:
        """The processes in it must have ended."""
        for side in self.sides:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", side.namespace)


def _remove_those_of_the_dead() -> None:
    """Namespaces of runs that were killed before they could remove them."""
    for path in _DIRECTORY.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path("/proc", pid).exists():
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", path.name)
