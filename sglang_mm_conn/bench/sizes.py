"""Sizes of embeddings: how they are written, and how many rooms of each a round measures."""

from __future__ import annotations

import re
from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "B": 1, "K": KIB, "KIB": KIB, "M": MIB, "MIB": MIB, "G": GIB, "GIB": GIB}
_TEXT = re.compile(r"(\d+)\s*([A-Za-z]*)")


def parse_size(text: str, row_bytes: int = 1) -> int:
    """The bytes of a size such as ``64K`` or ``16 MiB``. Raises ValueError naming what is wrong."""
    match = _TEXT.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size: write, for example, 64K, 16M or 1G")
    nbytes = int(match[1]) * _UNITS[match[2].upper()]
    if nbytes < row_bytes or nbytes % max(row_bytes, 4096):
        raise ValueError(f"{text!r} is not whole rows of {row_bytes} bytes and whole pages of 4096 bytes")
    return nbytes


def show_size(nbytes: int) -> str:
    """``nbytes`` with its unit, for example ``16 MiB``."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


@dataclass(frozen=True)
class Effort:
    """What each transport does in one round.

    Attributes:
        singles: Rooms one after the other.
        concurrent: For every concurrency (rooms in flight, number of rooms).
    """

    singles: int
    concurrent: tuple[tuple[int, int], ...]


def effort(nbytes: int, *, quick: bool) -> Effort:
    """The work for one size, such that every size takes about the same time."""
    budget = (32 if quick else 256) * MIB
    most = 50 if quick else 200
    singles = max(1, min(most, budget // nbytes))
    concurrencies: tuple[int, ...]
    if nbytes <= 256 * KIB:
        concurrencies = (1, 8, 64)
    elif nbytes <= 4 * MIB:
        concurrencies = (1, 4, 16)
    elif nbytes <= 32 * MIB:
        concurrencies = (1, 4)
    else:
        concurrencies = (2,) if nbytes <= 128 * MIB else ()
    many = max(2, min(5 * most, 2 * budget // nbytes))
    return Effort(singles, tuple((in_flight, max(many, 2 * in_flight)) for in_flight in concurrencies))
