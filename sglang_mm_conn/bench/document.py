"""Puts the tables of a run into the documentation, between two markers."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def insert(text: str, tables: str) -> str:
    """``text`` with ``tables`` between its markers. Raises ValueError where they are not there, once each, in order."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in tail or END in tail:
        raise ValueError(f"it must hold the lines {BEGIN} and {END}, once each and in this order")
    return f"{head}{BEGIN}\n\n{tables.strip()}\n\n{END}{tail}"


def write(path: Path, tables: str) -> None:
    """Raises ValueError, OSError."""
    path.write_text(insert(path.read_text(), tables))
