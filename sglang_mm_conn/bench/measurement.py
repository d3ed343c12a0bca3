"""From the rooms' seconds to the figures of the report. Pure: no clock, no processes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang_mm_conn.bench.records import Result

LIMIT = "memcpy"  # what every transport is compared with
BUILT_IN = ("zmq_to_scheduler", "mooncake_builtin")


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


@dataclass(frozen=True)
class Row:
    """One transport at one size: rooms one after the other, and flows of several."""

    transport: str
    nbytes: int
    rooms: int
    rounds: int
    median_ms: float
    p99_ms: float
    best_ms: float
    gbytes_per_s: float  # at the median
    cpu_s_per_gbyte: (
        float  # of both processes together, at the largest concurrency (one after the other where there is none)
    )
    of_limit: float | None  # speed in parts of LIMIT's: median over the rounds of the ratio within one round
    of_limit_best: float | None  # the same of the best rooms of each, which other work on the machine disturbs least
    times_built_in: float | None  # how many times as fast as sglang's best: median over the rounds, as above
    rooms_per_s: dict[int, float]  # by rooms in flight at a time; median over the rounds
    per_room: dict[str, float]  # threads started, sockets made, ... by both processes, per room of all runs


def rows(results: Iterable[Result]) -> list[Row]:
    """In the order in which transports and sizes first appear."""
    cells: dict[tuple[int, str], list[Result]] = defaultdict(list)
    for result in results:
        cells[result.nbytes, result.transport].append(result)
    return [
        _row(
            transport, nbytes, cell, cells.get((nbytes, LIMIT), []),
            [cells[nbytes, name] for name in BUILT_IN if (nbytes, name) in cells],
        )
        for (nbytes, transport), cell in cells.items()
    ]  # fmt: skip


def _row(
    transport: str, nbytes: int, cell: Sequence[Result], limit: Sequence[Result], built_in: Sequence[Sequence[Result]]
) -> Row:
    singles = [result for result in cell if result.in_flight == 0]
    seconds = [second for result in singles for second in result.seconds]
    flows: dict[int, list[Result]] = defaultdict(list)
    for result in cell:
        if result.in_flight:
            flows[result.in_flight].append(result)
    busiest = flows[max(flows)] if flows else singles
    gbytes = sum(len(result.seconds) for result in busiest) * nbytes / 1e9
    median = statistics.median(seconds)
    return Row(
        transport=transport,
        nbytes=nbytes,
        rooms=len(seconds),
        rounds=len(singles),
        median_ms=median * 1e3,
        p99_ms=quantile(seconds, 0.99) * 1e3,
        best_ms=min(seconds) * 1e3,
        gbytes_per_s=nbytes / median / 1e9,
        cpu_s_per_gbyte=sum(result.cpu for result in busiest) / gbytes,
        of_limit=ratio_by_round(limit, singles),
        of_limit_best=best(limit) / min(seconds) if limit else None,
        times_built_in=min(
            (ratio for other in built_in if (ratio := ratio_by_round(other, singles)) is not None), default=None
        ),
        rooms_per_s={
            in_flight: statistics.median(len(result.seconds) / result.wall for result in same)
            for in_flight, same in sorted(flows.items())
        },
        per_room=_per_room(cell),
    )


def rooms_per_second(results: Iterable[Result], nbytes: int, transport: str) -> float | None:
    """At the largest concurrency of ``transport``: the median over the rounds. None where nothing ran concurrently."""
    flows = [
        result for result in results if (result.nbytes, result.transport) == (nbytes, transport) and result.in_flight
    ]
    largest = max((result.in_flight for result in flows), default=0)
    return (
        statistics.median(len(one.seconds) / one.wall for one in flows if one.in_flight == largest) if flows else None
    )


def best(results: Sequence[Result]) -> float:
    """Seconds of the best room that did not share its time with others."""
    return min(second for result in results if result.in_flight == 0 for second in result.seconds)


def medians_by_round(results: Iterable[Result]) -> dict[int, float]:
    """Seconds of a room in each round, one after the other."""
    return {result.round: statistics.median(result.seconds) for result in results if result.in_flight == 0}


def ratio_by_round(above: Iterable[Result], below: Iterable[Result]) -> float | None:
    """The median over the rounds of (median seconds of ``above``) / (median seconds of ``below``)."""
    upper, lower = medians_by_round(above), medians_by_round(below)
    common = [upper[number] / lower[number] for number in upper if number in lower]
    return statistics.median(common) if common else None


@dataclass(frozen=True)
class Comparison:
    """Two times of one room, and the median over the rounds of their ratio within one round."""

    what: str
    nbytes: int
    ratio: float
    best: float  # the ratio of the best rooms


def comparisons(results: Iterable[Result]) -> list[Comparison]:
    """What the transport of an embedding adds to what it cannot do without."""
    cells: dict[tuple[int, str], list[Result]] = defaultdict(list)
    for result in results:
        cells[result.nbytes, result.transport].append(result)
    found = []
    for nbytes in dict.fromkeys(size for size, _ in cells):
        for transport, parts, what in (
            ("mooncake", ("engine", "memcpy"), "the engine's own and one copy"),
            ("mooncake+key", ("engine", "memcpy"), "the engine's own and one copy"),
            ("shm+windows", ("shm",), "shm's"),
            ("shm+windows", ("shm+copied",), "shm+copied's"),
            ("zmq_baseline+windows", ("zmq_baseline+copied",), "zmq_baseline+copied's"),
            ("shm", ("zmq_baseline",), "zmq_baseline's"),
            ("shm+copied", ("zmq_baseline+copied",), "zmq_baseline+copied's"),
            ("shm+windows", ("zmq_baseline+windows",), "zmq_baseline+windows's"),
        ):
            compared = [cells.get((nbytes, name), []) for name in (transport, *parts)]
            if not all(compared):
                continue
            mine, *others = [medians_by_round(cell) for cell in compared]
            common = set(mine).intersection(
                *others
            )  # an interrupted run has a round that only some transports have had
            if not common:
                continue
            rounds = [mine[number] / sum(other[number] for other in others) for number in common]
            ratio = best(compared[0]) / sum(best(cell) for cell in compared[1:])
            found.append(
                Comparison(f"{transport}: its time in parts of {what}", nbytes, statistics.median(rounds), ratio)
            )
    return found


def _per_room(cell: Sequence[Result]) -> dict[str, float]:
    count = sum(len(result.seconds) for result in cell)
    calls: dict[str, float] = {"threads": 0.0, "sockets": 0.0, "connections": 0.0, "http": 0.0, "registrations": 0.0}
    for result in cell:
        for side in (result.encoder, result.language):
            for name, number in side["calls"].items():
                calls[name] = calls.get(name, 0.0) + number
    return {name: number / count for name, number in calls.items()}


def as_json(rows_: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows_]
