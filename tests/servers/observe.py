"""What running servers hold, seen from outside: /server_info, their logs, /proc."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from sglang_mm_conn.control.draining import ask_status
from sglang_mm_conn.demo.servers import Server
from sglang_mm_conn.memory.segment import PREFIX

_SEGMENT = re.compile(re.escape(f"/dev/shm/{PREFIX}") + "([0-9a-f]{32})")


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began


def report(language: Server) -> dict[str, Any]:
    """Pool and rooms of a language server, as it says itself."""
    found: dict[str, Any] = _get(f"{language.url}/server_info")["internal_states"][0]["conn_multimodal"]
    return found


def requests_in(language: Server) -> int:
    """Requests that run or wait in the scheduler."""
    load = _get(f"{language.url}/v1/loads")["loads"][0]
    return int(load["num_running_reqs"] + load["num_waiting_reqs"])


def _get(url: str) -> Any:
    answer = requests.get(url, timeout=30)
    answer.raise_for_status()
    return answer.json()


def encodes_held(encoder: Server) -> int:
    """Requests to /encode that have not ended: an encoder holds each until the embedding is delivered or given up."""
    return ask_status(encoder.url, None).held


def rooms_ended(encoder: Server) -> int:
    """Whether delivered or not; then its /encode ends too."""
    return len(re.findall(r"Embedding (?:not )?sent: room=", _this_life(encoder)))


def encodes_begun(encoder: Server) -> int:
    """Requests that sglang gave to the model, by its own words."""
    return sum(int(found) for found in re.findall(r"Dispatching batch of (\d+)", _this_life(encoder)))


def _this_life(server: Server) -> str:
    """Its log since it was last started: the command is the first line."""
    return server.log().rpartition("\n$ ")[2]


def is_idle(language: Server, *, but_for_views: bool = False) -> bool:
    """No request, no room, no announcement, every block free. ``but_for_views``: sglang's scheduler may keep a view of
    the newest request."""
    now = report(language)
    free = now["free"] + (now["views"] if but_for_views else 0)
    return not now["rooms"] and not now["unclaimed"] and free == now["blocks"] and not requests_in(language)


def cpu_seconds(server: Server) -> float:
    """Processor time that its processes have spent."""
    ticks = 0
    for pid in server.pids():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def segments_of(server: Server) -> set[str]:
    """Names of the connector's segments that its processes map."""
    found: set[str] = set()
    for pid in server.pids():
        with contextlib.suppress(OSError):
            found |= {PREFIX + name for name in _SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text())}
    return found


@dataclass(frozen=True)
class Holdings:
    """What all processes of a server hold together."""

    rss_mb: int
    descriptors: int
    sockets: int
    threads: int

    @classmethod
    def of(cls, server: Server) -> Holdings:
        rss = descriptors = sockets = threads = 0
        for pid in server.pids():
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            rss += int(status["VmRSS"].split()[0])
            threads += int(status["Threads"])
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    descriptors += 1
                    sockets += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
        return cls(rss >> 10, descriptors, sockets, threads)
