"""Owns the parsing of the connector's log lines: one for each finished room on either side, one for each resume."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_EVENT = re.compile(r"(Embedding received|Embedding sent|Resume transfer triggered): (.*)")


@dataclass(frozen=True)
class Received:
    """A finished room, as the language server saw it."""

    room: str
    rid: str
    tokens: int
    bytes: int
    windows: int
    resumes: int
    path: str
    ms: float
    rate: float  # MB/s


@dataclass(frozen=True)
class Sent:
    """A finished room, as the encoder saw it."""

    room: str
    tokens: int
    windows: int
    path: str
    ms: float


@dataclass(frozen=True)
class Resumed:
    """A transfer that continued because the language server offered more blocks."""

    room: str
    queue_idx: int
    src_blocks: int


Event = Received | Sent | Resumed


def parse(lines: Iterable[str]) -> Iterator[Event]:
    """The connector's events among the lines of a server's log, in order. Other lines are skipped."""
    for line in lines:
        match = _EVENT.search(line)
        if match:
            yield _event(match[1], _fields(match[2]), line)


def received(log: str) -> list[Received]:
    return [event for event in parse(log.splitlines()) if isinstance(event, Received)]


def resumed(log: str) -> list[Resumed]:
    return [event for event in parse(log.splitlines()) if isinstance(event, Resumed)]


def _fields(text: str) -> dict[str, str]:
    return {key: value.rstrip(",") for key, _, value in (word.partition("=") for word in text.split())}


def _event(kind: str, fields: dict[str, str], line: str) -> Event:
    try:
        if kind == "Embedding received":
            return Received(
                room=fields["room"],
                rid=fields["rid"],
                tokens=int(fields["tokens"]),
                bytes=int(fields["bytes"]),
                windows=int(fields["windows"]),
                resumes=int(fields["resumes"]),
                path=fields["path"],
                ms=float(fields["ms"]),
                rate=float(fields["rate"].removesuffix("MB/s")),
            )
        if kind == "Embedding sent":
            return Sent(
                room=fields["room"],
                tokens=int(fields["tokens"]),
                windows=int(fields["windows"]),
                path=fields["path"],
                ms=float(fields["ms"]),
            )
        return Resumed(room=fields["room"], queue_idx=int(fields["queue_idx"]), src_blocks=int(fields["src_blocks"]))
    except (KeyError, ValueError) as error:
        raise ValueError(f"log line that does not read as {kind!r}: {error!r} in {line.strip()!r}") from error
