"""Copies of bytes in host memory: on the calling thread alone, the GIL let go only where that pays, and once for many.

Why not ``Tensor.copy_``: torch shares a large copy out over a team of OpenMP threads, one team for *each* calling
thread, and the team's barrier waits for the slowest: measured 20 ms and more for a copy of 2 ms where the cores are
busy, and threads that are made in the middle of a request. One thread's memmove nearly fills a memory channel.

Why not one memmove after the other: the GIL would be let go for each, and a thread that has let it go waits up to the
switch interval (5 ms) to get it back from a busy one, such as a scheduler's. Slices that lie in units of one size are
therefore rows of a matrix, and NumPy copies them in one call (but for an end that is no whole unit).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

# Target and where in it, source and where in it, how many bytes; both are uint8, one dimension, contiguous.
Slice = tuple[torch.Tensor, int, torch.Tensor, int, int]

# Shorter copies take less time than getting the GIL back may.
HOLD_GIL_BELOW = 256 << 10
# Copies are made in units that a core's own caches hold: glibc copies those with another instruction, which is faster
# on some processors (seen on AMD's Zen 5) and much the same on others (glibc's bug 30994). A copy that they hold as a
# whole gains nothing by it.
UNIT = 512 << 10
LARGE = 8 << 20
# Smaller units are worth an index each only where few of them lie side by side.
_SMALL_UNIT = 64 << 10
_FEW = 4

_ADDRESS = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value
assert _ADDRESS is not None
_memmove = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_ADDRESS)
_memmove_holding_gil = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_ADDRESS)


@dataclass(slots=True)
class _Spans:
    """What goes from one memory to another: (where in the target, where in the source, how many bytes)."""

    target: torch.Tensor
    source: torch.Tensor
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    nbytes: int = 0
    target_whole: bool = True  # each span begins there where the one before it ends
    source_whole: bool = True

    def add(self, at: int, start: int, nbytes: int) -> None:
        self.nbytes += nbytes
        if self.spans:
            last_at, last_start, last_nbytes = self.spans[-1]
            follows = last_at + last_nbytes == at, last_start + last_nbytes == start
            if all(follows):
                self.spans[-1] = last_at, last_start, last_nbytes + nbytes
                return
            self.target_whole &= follows[0]
            self.source_whole &= follows[1]
        self.spans.append((at, start, nbytes))


def copy_slices(slices: Iterable[Slice]) -> None:
    """Copy every slice; no two of them may have bytes of a target in common.

    Raises ValueError, before a byte moves, where one is beyond the end of either side or not in host memory.
    """
    groups: list[_Spans] = []
    for slice_ in slices:
        target, at, source, start, nbytes = slice_
        if not (target.is_cpu and source.is_cpu):
            raise ValueError(f"a copy from {source.device} to {target.device} is not one in host memory")
        check_within(slice_)
        if nbytes == 0:
            continue
        if not groups or groups[-1].target is not target or groups[-1].source is not source:
            groups.append(_Spans(target, source))
        groups[-1].add(at, start, nbytes)
    for group in groups:
        _copy(group)


def warm_up() -> None:
    """Copy a little as large copies are made, from and to scattered rows: what runs for the first time in a process is
    slower, and should not be part of a request (the special cases of ``bench`` compare the first with later ones)."""
    one, other = torch.zeros(2, HOLD_GIL_BELOW, dtype=torch.uint8)
    ascending = range(0, one.numel(), _SMALL_UNIT)
    for targets, sources in (ascending, reversed(ascending)), (reversed(ascending), ascending):
        copy_slices((one, at, other, start, _SMALL_UNIT) for at, start in zip(targets, sources, strict=True))


def check_within(slice_: Slice) -> None:
    """Raises ValueError where ``slice_`` is beyond the end of either side."""
    target, at, source, start, nbytes = slice_
    if not (0 <= at <= at + nbytes <= target.numel() and 0 <= start <= start + nbytes <= source.numel()):
        raise ValueError(f"{nbytes} bytes from {start} of {source.numel()} do not go to {at} of {target.numel()}")


def _copy(group: _Spans) -> None:
    spans = group.spans
    if group.nbytes >= (LARGE if len(spans) == 1 else HOLD_GIL_BELOW):
        spans = _copy_rows(group)
    for at, start, nbytes in spans:
        memmove = _memmove_holding_gil if nbytes < HOLD_GIL_BELOW else _memmove
        memmove(group.target.data_ptr() + at, group.source.data_ptr() + start, nbytes)


def _copy_rows(group: _Spans) -> list[tuple[int, int, int]]:
    """Copy the spans as rows of a matrix, which NumPy can where one side is whole. Returns what is left to be done."""
    spans = group.spans
    if not (group.target_whole or group.source_whole):
        return spans
    unit = unit_of(spans)
    if unit < _SMALL_UNIT and group.nbytes > _FEW * unit * len(spans):
        return spans
    side = 1 if group.target_whole else 0  # whose rows are anywhere: the source's, or the target's
    low = min(span[side] for span in spans)
    rows = [(span[side] - low) // unit + number for span in spans for number in range(span[2] // unit)]
    high = low + (max(rows) + 1) * unit
    first_at, first_start, _ = spans[0]
    if group.target_whole:
        target = _rows(group.target, first_at, first_at + len(rows) * unit, unit)
        # mode: the default would copy to a buffer first. No row is beyond the end.
        np.take(_rows(group.source, low, high, unit), rows, axis=0, out=target, mode="clip")
    else:
        source = _rows(group.source, first_start, first_start + len(rows) * unit, unit)
        _rows(group.target, low, high, unit)[rows] = source
    at, start, nbytes = spans[-1]
    done = nbytes // unit * unit
    return [(at + done, start + done, nbytes - done)] if done < nbytes else []


def _rows(memory: torch.Tensor, begin: int, end: int, unit: int) -> np.ndarray:
    return memory.numpy()[begin:end].reshape(-1, unit)


def unit_of(spans: Sequence[tuple[int, int, int]]) -> int:
    """The size in whose multiples every span lies from the first one, on both sides, and so (one side being whole) is
    long, but for the last one; or a part of that, if there is one that is not much smaller than ``UNIT``."""
    first_at, first_start, _ = spans[0]
    unit = math.gcd(*(at - first_at for at, _, _ in spans), *(start - first_start for _, start, _ in spans))
    if unit == 0:
        return UNIT  # one span
    least = -(-unit // UNIT)
    return next((unit // parts for parts in range(least, 2 * least + 1) if unit % parts == 0), unit)
