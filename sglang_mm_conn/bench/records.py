"""A run of one transport: what its two processes are told to do, and what they report. Sent between processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """``count`` rooms of ``tokens`` rows: one after the other (``in_flight`` 0), or up to ``in_flight`` at a time.

    One after the other, a room is prepared, both processes become idle, and then its tensor is ready. In a concurrent
    run a room's tensor is ready as soon as the room is prepared, so the run's time includes the preparation.
    """

    server: str  # prefix of the rooms' names
    first: int  # number of the first room
    count: int
    tokens: int
    width: int
    in_flight: int = 0


@dataclass
class Side:
    """What one process measured: a clock reading per room (CLOCK_MONOTONIC, the same in both), and its costs."""

    times: list[float]
    cpu: float  # seconds
    began: float = 0.0
    ended: float = 0.0
    threads: int = 0  # threads at the end, less those at the start; ``descriptors`` likewise
    descriptors: int = 0
    calls: dict[str, int] = field(default_factory=dict)  # threads started, sockets made, connections, registrations
    by_thread: dict[str, list[float]] = field(
        default_factory=dict
    )  # by thread name: CPU seconds, voluntary context switches


@dataclass(frozen=True)
class Result:
    """One run of one transport."""

    transport: str
    nbytes: int
    in_flight: int
    seconds: list[float]  # of each room; in a concurrent run, from the start of its preparation
    wall: float
    cpu: float
    encoder: dict[str, Any]
    language: dict[str, Any]
    round: int = 0
