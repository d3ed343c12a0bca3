"""What a process and the host hold: measured from outside, compared with what was held before anything went wrong."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sglang_mm_conn.memory.segment import DIRECTORY, PREFIX, Segment
from tests.connector.processes import Child

# What allocators keep for themselves comes and goes; a pool, an engine's staging or a kept embedding is more.
RSS_MARGIN_KB = 32 << 10
# Mooncake opens one to four connections to each peer (of two here), by how many pieces have travelled side by side, and
# keeps their descriptors when the peer vanishes. A leak of our own that is smaller shows over shared memory.
MOONCAKE_PER_VANISHED, MOONCAKE_POOL = 4, 8


@dataclass(frozen=True)
class Holdings:
    """What one process holds. ``mapped``: distinct segments of the connector in its address space."""

    rss_kb: int
    descriptors: int
    sockets: int
    threads: int
    mapped: int

    @classmethod
    def of(cls, child: Child) -> Holdings:
        """Read from /proc. Raises OSError where the process is gone."""
        root = Path("/proc", str(child.pid))
        status = dict(line.split(":", 1) for line in (root / "status").read_text().splitlines())
        targets = []
        for name in os.listdir(root / "fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                targets.append(os.readlink(root / "fd" / name))
        maps = {line.split(maxsplit=5)[5] for line in (root / "maps").read_text().splitlines() if DIRECTORY in line}
        return cls(
            rss_kb=int(status["VmRSS"].split()[0]),
            descriptors=len(targets),
            sockets=sum(target.startswith("socket:") for target in targets),
            threads=int(status["Threads"]),
            mapped=len(maps),
        )

    def growth(self, before: Holdings, *, vanished: int, mooncake: bool) -> list[str]:
        """What this is more than ``before`` allows; ``vanished``: peers that were killed since."""
        spare = vanished * MOONCAKE_PER_VANISHED + MOONCAKE_POOL if mooncake else 0
        allowed = {
            "rss_kb": before.rss_kb + RSS_MARGIN_KB,
            "descriptors": before.descriptors + spare,
            "sockets": before.sockets + spare,
            "threads": before.threads,
            "mapped": before.mapped,
        }
        return [
            f"{name} {getattr(self, name)}, before {getattr(before, name)} (at most {most} allowed)"
            for name, most in allowed.items()
            if getattr(self, name) > most
        ]


class Segments:
    """Watches the host's shared memory: the segments of the living stay, those of the dead go with the next start.

    Other programs' segments lie there too. Two decoys stand for them: a segment whose owner lives (this process), and
    a file that has only the prefix.
    """

    def __init__(self) -> None:
        self._living = Segment(4096)
        self._stranger = Path(DIRECTORY, f"{PREFIX}not-a-segment-{os.getpid()}-{id(self)}")
        self._stranger.write_bytes(b"somebody else's")

    @property
    def decoy(self) -> str:
        """Name of the segment that this process owns."""
        return self._living.name

    def problems(self, living: Iterable[str], dead: Iterable[str]) -> list[str]:
        """After a start of any process: what lies there though it should not, and what is missing."""
        kept = [self.decoy, self._stranger.name, *living]
        missing = [f"segment {name} of a living owner was removed" for name in kept if not _exists(name)]
        return missing + [f"segment {name} of a dead owner was left" for name in dead if _exists(name)]

    def close(self) -> None:
        self._living.close()
        self._stranger.unlink(missing_ok=True)


def _exists(name: str) -> bool:
    return Path(DIRECTORY, name).exists()
