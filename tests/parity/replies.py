"""Owns what must be the same in two replies: everything but times, ids that the server draws, and rounding."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-3  # of log-probabilities and hidden states
MOST_OF_A_CAUSE = 1024  # bytes of an error's text
OURS = "parity"  # ids that a form gives begin with it, and must come back

_VOLATILE = re.compile(
    r"id|created|created_at|completed_at|item_id|response_id|call_id|request_id|session_id|sequence_number|obfuscation"
    r"|system_fingerprint|.*_(ts|time|latency|duration|throughput|timestamp)|load_duration|weight_version"
)
_INTERNALS = re.compile(r"_local_part_|\broom\b|\bdispatch|\brank\b|conn_multimodal|Unknown error")


@dataclass(frozen=True)
class Reply:
    """What a client gets.

    Attributes:
        status: of HTTP.
        content: what must be the same; a stream is joined.
        cause: the text of an error.
    """

    status: int
    content: Any = None
    cause: str = ""

    def __str__(self) -> str:
        return str(self.status)


def difference(here: Any, there: Any, place: str = "") -> str:
    """The first difference of two replies, or of what holds replies; empty if there is none."""
    if isinstance(here, Reply) and isinstance(there, Reply):
        if here.status != there.status:
            return f"{place} status {here.status}, not {there.status}: {here.cause or there.cause}".strip()
        return difference(here.content, there.content, place)
    if isinstance(here, dict) and isinstance(there, dict):
        if here.keys() != there.keys():
            return f"{place}: {sorted(here.keys() ^ there.keys())} on one side only"
        return next(filter(None, (difference(here[key], there[key], f"{place}.{key}") for key in here)), "")
    if isinstance(here, list | tuple) and isinstance(there, list | tuple):
        if len(here) != len(there):
            return f"{place}: {len(here)} entries, not {len(there)}"
        pairs = enumerate(zip(here, there, strict=True))
        return next(filter(None, (difference(one, other, f"{place}[{n}]") for n, (one, other) in pairs)), "")
    if isinstance(here, float) and isinstance(there, float):
        same = here == there or math.isclose(here, there, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        return "" if same else f"{place}: {here}, not {there}"
    return "" if here == there else f"{place}: {here!r:.120}, not {there!r:.120}"


def unfit_cause(here: Any, there: Any, addresses: Sequence[str] = ()) -> str:
    """What a client should not read in an error of ``here``, unless a colocated server says the same; empty if nothing.

    ``addresses``: of the servers, HOST:PORT.
    """
    known = {one.cause for one in replies_in(there)}
    for one in replies_in(here):
        if one.status < 400 or one.cause in known:
            continue
        size = len(one.cause.encode())
        if not 0 < size <= MOST_OF_A_CAUSE:
            return f"a cause of {size} bytes"
        inside = _INTERNALS.search(one.cause)
        named = [inside[0]] if inside else [address for address in addresses if address in one.cause]
        if named:
            return f"the cause names {named[0]!r}: {one.cause}"
    return ""


def replies_in(found: Any) -> Iterator[Reply]:
    if isinstance(found, Reply):
        yield found
    elif isinstance(found, dict | list | tuple):
        for one in found.values() if isinstance(found, dict) else found:
            yield from replies_in(one)


def lasting(value: Any) -> Any:
    """``value`` without what differs from one answer to the next."""
    if isinstance(value, dict):
        return {key: lasting(one) for key, one in value.items() if not _is_volatile(key, one)}
    return [lasting(one) for one in value] if isinstance(value, list) else value


def _is_volatile(key: str, value: Any) -> bool:
    given = isinstance(value, str) and value.startswith(OURS)
    return bool(_VOLATILE.fullmatch(key)) and not given


def cause_of(text: str) -> str:
    """The message in the body of an error."""
    try:
        body = json.loads(text)
    except ValueError:
        return text
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if key in body), json.dumps(body))
    return body if isinstance(body, str) else json.dumps(body)


# -- streams -------------------------------------------------------------------------------------------------------


def joined(lines: Iterable[bytes]) -> Any:
    """The events of a stream as one answer: texts joined, the newest of everything else."""
    answer: dict[str, Any] = {}
    for event in events(lines):
        if not isinstance(event, dict):
            continue
        if isinstance(event.get("error"), dict):
            event["error"].pop("message", None)  # as that of an error without a stream
        if "meta_info" in event:  # of /generate: the text so far
            answer[str(event.get("index", 0))] = event
        elif isinstance(event.get("choices"), list):
            for choice in event["choices"]:
                _add(answer.setdefault(str(choice["index"]), {}), choice)
            if event.get("usage"):
                answer["usage"] = event["usage"]
        elif "type" in event:  # of /v1/responses and /v1/messages
            of_type = answer.setdefault(event["type"], {})
            _add(of_type, {key: one for key, one in event.items() if key != "type"})
        else:
            _add(answer, event)
    return answer


def events(lines: Iterable[bytes]) -> Iterator[Any]:
    for line in lines:
        data = line.removeprefix(b"data:").strip()
        if not data or data == b"[DONE]" or data.startswith((b"event:", b":")):
            continue
        yield json.loads(data)


_JOINED = {"content", "text", "delta", "reasoning_content", "arguments", "thinking", "partial_json"}


def _add(answer: dict[str, Any], event: dict[str, Any]) -> None:
    for key, value in event.items():
        before = answer.get(key)
        if key in _JOINED and isinstance(value, str) and isinstance(before, str):
            answer[key] = before + value
        elif isinstance(value, dict) and isinstance(before, dict):
            _add(before, value)
        elif isinstance(value, list) and isinstance(before, list) and key == "content":
            before += value  # log-probabilities
        elif value is not None or key not in answer:
            answer[key] = value
