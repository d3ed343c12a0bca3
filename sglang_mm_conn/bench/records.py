"""What the two processes do in one run, and what they say about it. Plain data, which travels between processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """``count`` rooms of ``tokens`` rows: one after the other (``in_flight`` 0), or up to ``in_flight`` in flight at a
    time.

    One after the other, a room is prepared, everything comes to rest, and then its tensor is ready. In a concurrent run
    rooms are prepared and ready at once, so all their work is in the time of the whole.
    """

    server: str  # prefix of the rooms' names
    first: int  # number of the first room
    count: int
    tokens: int
    width: int
    in_flight: int = 0


@dataclass
class Side:
    """What one process measured: its clock readings per room (CLOCK_MONOTONIC, the same in both), and its costs."""

    times: list[float]
    cpu: float  # seconds
    began: float = 0.0
    ended: float = 0.0
    threads: int = 0  # more threads at the end than at the beginning
    descriptors: int = 0
    calls: dict[str, int] = field(default_factory=dict)  # threads started, sockets made, connections, registrations
    by_thread: dict[str, list[float]] = field(default_factory=dict)  # CPU seconds and waits, by the threads' names


@dataclass(frozen=True)
class Result:
    """One run of one transport."""

    transport: str
    nbytes: int
    in_flight: int
    seconds: list[float]  # of each room; in a concurrent run, from the beginning of its preparation
    wall: float
    cpu: float
    encoder: dict[str, Any]
    language: dict[str, Any]
    round: int = 0
