"""Owns texts that go into messages, logs and answers: how long they may be, and that they hold no media."""

from __future__ import annotations

import re

MOST_CHARACTERS = 1000
# Longer runs of these are encoded media, which sglang puts into the errors about them. Digests and names are shorter.
_DATA = re.compile(r"[A-Za-z0-9+/=_-]{129,}")
_SHOWN = 16


def as_text(value: str, limit: int = MOST_CHARACTERS) -> str:
    """``value`` cut to ``limit`` characters, without media and without lone surrogates: a client's JSON can put both
    into an error."""
    beginning = _DATA.sub(lambda found: f"{found.group()[:_SHOWN]}…", value[: 64 * limit])
    return beginning[:limit].encode("utf-8", "replace").decode()
