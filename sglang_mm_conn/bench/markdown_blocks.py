"""Puts the tables of a run into a Markdown file, between two marker lines."""

from __future__ import annotations

from pathlib import Path

TRANSFERS, STREAMED, SERVERS = "bench", "bench streamed", "bench servers"
RESULTS = Path("docs/results")
_FILES = {TRANSFERS: "transfers.md", STREAMED: "streamed.md", SERVERS: "servers.md"}


def document(path: Path, name: str) -> Path:
    """The file that takes the block ``name``: ``path`` itself, or the block's own file where it is a folder."""
    return path / _FILES[name] if path.is_dir() else path


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def insert(text: str, tables: str, name: str = TRANSFERS) -> str:
    """``text`` with ``tables`` between its markers. Raises ValueError unless it has both, once each and in order."""
    first, last = markers(name)
    head, begin, rest = text.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end or first in tail or last in tail:
        raise ValueError(f"the file must hold the lines {first} and {last}, once each and in this order")
    return f"{head}{first}\n\n{tables.strip()}\n\n{last}{tail}"


def write(path: Path, tables: str, name: str = TRANSFERS) -> None:
    """As ``insert``, in the file ``path``. Raises ValueError, OSError."""
    path.write_text(insert(path.read_text(), tables, name))
