"""Owns texts that go into messages, logs and answers: how long they may be, and that they hold no media."""

from __future__ import annotations

import re

MOST_CHARACTERS = 1000
# sglang puts encoded media into the errors about them. Digests and names are shorter than the runs of the second kind.
_DATA = re.compile(
    r"(?P<uri>\bdata:[^,\s]{0,100},)(?P<of_uri>(?:[A-Za-z0-9+/=_%-]|\\n|\s(?=[A-Za-z0-9+/=_-]{20}))*)"
    r"|(?P<run>[A-Za-z0-9+/=_-]{129,})",
    re.IGNORECASE,
)
_SHOWN = 16


def as_text(value: str, limit: int = MOST_CHARACTERS) -> str:
    """``value`` cut to ``limit`` characters, without media and without lone surrogates: a client's JSON can put both
    into an error."""
    beginning = _DATA.sub(_shown, value[: 64 * limit])
    return beginning[:limit].encode("utf-8", "replace").decode()


def _shown(found: re.Match[str]) -> str:
    data = found["run"] or found["of_uri"]
    return (found["uri"] or "") + (f"{data[:_SHOWN]}…" if len(data) > _SHOWN else data)
