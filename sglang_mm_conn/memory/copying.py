"""Copies of bytes in host memory: on the calling thread alone, the GIL released only where that pays, and then once.

Why not ``Tensor.copy_``: torch shares a large copy out over a team of OpenMP threads, one team for *each* calling
thread, and the team's barrier waits for the slowest: measured 20 ms and more for a copy of 2 ms where the cores are
busy, and threads that are made in the middle of a request. One thread's memmove nearly fills a memory channel.

Why not one memmove after the other: the GIL would be let go for each, and a thread that has let it go waits up to the
switch interval (5 ms) to get it back from a busy one, such as a scheduler's. Pieces that lie in units of one size are
therefore rows of a matrix, and NumPy copies them in one call.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

# Target and where in it, source and where in it, how many bytes; both are uint8, one dimension, contiguous.
Piece = tuple[torch.Tensor, int, torch.Tensor, int, int]

# Shorter copies take less time than getting the GIL back may.
HOLD_GIL_BELOW = 256 << 10
# A copy that no cache holds is made in units that a core's own cache does: glibc copies those with another instruction,
# which is faster on some processors (seen on AMD's Zen 5) and much the same on others (glibc's bug 30994).
LARGE = 32 << 20
UNIT = 512 << 10
# Smaller units are not worth an index each.
_SMALLEST_UNIT = 4 << 10

_ADDRESS = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value
assert _ADDRESS is not None
_move = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_ADDRESS)
_move_holding_gil = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_ADDRESS)


class Span(NamedTuple):
    """``nbytes`` bytes from ``start`` of a source go to ``at`` of a target."""

    at: int
    start: int
    nbytes: int


def copy_pieces(pieces: Iterable[Piece]) -> None:
    """Copy every piece; no two of them may have bytes of a target in common.

    Raises ValueError, before a byte moves, where one is beyond the end of either side or not in host memory.
    """
    groups: list[tuple[torch.Tensor, torch.Tensor, list[Span]]] = []
    for target, at, source, start, nbytes in pieces:
        _check(target, at, source, start, nbytes)
        if not groups or groups[-1][0] is not target or groups[-1][1] is not source:
            groups.append((target, source, []))
        spans = groups[-1][2]
        if spans and spans[-1].at + spans[-1].nbytes == at and spans[-1].start + spans[-1].nbytes == start:
            spans[-1] = Span(spans[-1].at, spans[-1].start, spans[-1].nbytes + nbytes)
        else:
            spans.append(Span(at, start, nbytes))
    for target, source, spans in groups:
        _copy(target, source, spans)


def _check(target: torch.Tensor, at: int, source: torch.Tensor, start: int, nbytes: int) -> None:
    if not (target.is_cpu and source.is_cpu):
        raise ValueError(f"a copy from {source.device} to {target.device} is not one in host memory")
    if not (0 <= at <= at + nbytes <= target.numel() and 0 <= start <= start + nbytes <= source.numel()):
        raise ValueError(f"{nbytes} bytes from {start} of {source.numel()} do not go to {at} of {target.numel()}")


def _copy(target: torch.Tensor, source: torch.Tensor, spans: Sequence[Span]) -> None:
    total = sum(span.nbytes for span in spans)
    if total >= (LARGE if len(spans) == 1 else HOLD_GIL_BELOW):
        spans = _copy_rows(target, source, spans, total)
    for at, start, nbytes in spans:
        move = _move_holding_gil if nbytes < HOLD_GIL_BELOW else _move
        move(target.data_ptr() + at, source.data_ptr() + start, nbytes)


def _copy_rows(
    target: torch.Tensor, source: torch.Tensor, spans: Sequence[Span], total: int
) -> Sequence[Span]:
    """Copy the spans as rows of a matrix, which NumPy can where one side is whole. Returns what is left to be done."""
    unit = unit_of(spans, total)
    if unit < _SMALLEST_UNIT:
        return spans
    *others, (at, start, nbytes) = spans
    body = nbytes // unit * unit
    whole = [*others, Span(at, start, body)] if body else others
    end = [Span(at + body, start + body, nbytes - body)] if nbytes > body else []
    to, into = _rows(target, [(span.at, span.nbytes) for span in whole], unit)
    of, out_of = _rows(source, [(span.start, span.nbytes) for span in whole], unit)
    if into is None:
        # mode: the default would copy to a buffer first. No index is beyond the end.
        np.take(of, np.arange(len(of)) if out_of is None else out_of, axis=0, out=to, mode="clip")
    elif out_of is None:
        to[into] = of
    else:
        return spans
    return end


def unit_of(spans: Sequence[Span], total: int) -> int:
    """The size of which every span has its distance from the first one, on both sides, and (but for the last one) its
    length; of a large copy a part of it, if there is one that is not much smaller than ``UNIT``."""
    first = spans[0]
    unit = math.gcd(
        *(span.at - first.at for span in spans),
        *(span.start - first.start for span in spans),
        *(span.nbytes for span in spans[:-1]),
    )
    if unit == 0:
        return UNIT  # one span
    if total < LARGE:
        return unit
    least = -(-unit // UNIT)
    return next((unit // parts for parts in range(least, 2 * least + 1) if unit % parts == 0), unit)


def _rows(
    memory: torch.Tensor, places: Sequence[tuple[int, int]], unit: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The part of ``memory`` that holds ``places`` (where, how many bytes) as rows of ``unit`` bytes, and which rows
    they are; None: all of them, in this order."""
    low = min(at for at, _ in places)
    high = max(at + nbytes for at, nbytes in places)
    matrix = memory.numpy()[low:high].reshape(-1, unit)
    if all(at + nbytes == following for (at, nbytes), (following, _) in itertools.pairwise(places)):
        return matrix, None
    numbers = [np.arange((at - low) // unit, (at + nbytes - low) // unit) for at, nbytes in places]
    return matrix, np.concatenate(numbers)
