"""Owns copies within host memory: on the calling thread only, with as few releases of the GIL as possible.

Why not ``Tensor.copy_``: torch distributes a large copy over a team of OpenMP threads, with a separate team for *each*
calling thread, and the team's barrier waits for its slowest thread. On busy cores, a copy of 2 ms was measured to take
20 ms and more, and torch created threads during a request. One thread's memmove nearly fills a memory channel.

Why not a sequence of memmoves: each would release the GIL, and a thread that has released it waits up to the switch
interval (5 ms) to get it back from a busy thread, such as a scheduler's. So slices that are multiples of one unit are
treated as rows of a matrix, and NumPy copies all of them in one call. Only an end that is no whole unit is copied
separately.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

# Target, offset in it, source, offset in it, number of bytes. Both tensors are uint8, one-dimensional and contiguous.
Slice = tuple[torch.Tensor, int, torch.Tensor, int, int]

# A shorter copy takes less time than getting the GIL back may take.
HOLD_GIL_BELOW = 256 << 10
# Large copies are made in units that fit a core's private caches. glibc uses another instruction for such sizes: it is
# faster on some processors (seen on AMD's Zen 5) and about equal on others (glibc's bug 30994). Copies below LARGE gain
# nothing from units.
UNIT = 512 << 10
LARGE = 8 << 20
# Smaller units pay for one index each only if few of them are contiguous.
_SMALL_UNIT = 64 << 10
_FEW = 4

_ADDRESS = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value
assert _ADDRESS is not None
_memmove = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_ADDRESS)
_memmove_holding_gil = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_ADDRESS)


@dataclass(slots=True)
class _Spans:
    """The copies between one pair of tensors: (offset in the target, offset in the source, number of bytes)."""

    target: torch.Tensor
    source: torch.Tensor
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    nbytes: int = 0
    target_whole: bool = True  # each span begins where the one before it ends
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
    """Copy every slice. The target bytes of two slices must not overlap.

    Raises ValueError, before any byte is copied, if a slice exceeds either tensor or is not in host memory.
    """
    groups: list[_Spans] = []
    for slice_ in slices:
        target, at, source, start, nbytes = slice_
        if not (target.is_cpu and source.is_cpu):
            raise ValueError(f"a copy from {source.device} to {target.device} is not within host memory")
        check_within(slice_)
        if nbytes == 0:
            continue
        if not groups or groups[-1].target is not target or groups[-1].source is not source:
            groups.append(_Spans(target, source))
        groups[-1].add(at, start, nbytes)
    for group in groups:
        _copy(group)


def warm_up() -> None:
    """Make small copies from and to scattered rows, through the code that large copies use. The first run in a process
    is slower, and should not be part of a request. (The special cases of ``bench`` compare the first copy with later
    ones.)"""
    one, other = torch.zeros(2, HOLD_GIL_BELOW, dtype=torch.uint8)
    ascending = range(0, one.numel(), _SMALL_UNIT)
    for targets, sources in (ascending, reversed(ascending)), (reversed(ascending), ascending):
        copy_slices((one, at, other, start, _SMALL_UNIT) for at, start in zip(targets, sources, strict=True))


def check_within(slice_: Slice) -> None:
    """Raises ValueError if ``slice_`` exceeds the source or the target."""
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
    """Copy the spans as rows of a matrix with NumPy, if one side is contiguous. Returns the spans left to copy."""
    spans = group.spans
    if not (group.target_whole or group.source_whole):
        return spans
    unit = unit_of(spans)
    if unit < _SMALL_UNIT and group.nbytes > _FEW * unit * len(spans):
        return spans
    side = 1 if group.target_whole else 0  # the side with scattered rows: 1 the source, 0 the target
    low = min(span[side] for span in spans)
    rows = [(span[side] - low) // unit + number for span in spans for number in range(span[2] // unit)]
    high = low + (max(rows) + 1) * unit
    first_at, first_start, _ = spans[0]
    if group.target_whole:
        target = _rows(group.target, first_at, first_at + len(rows) * unit, unit)
        # The default mode would copy to a buffer first. No row is out of range, so "clip" changes no index.
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
    """The unit in which ``spans`` are copied: every span begins at a multiple of it from the first span, on both sides.

    One side is contiguous, so every span but the last is also a multiple of it long. If the largest such unit exceeds
    ``UNIT``, this returns the largest whole fraction of it that is at most ``UNIT``, but at least about half of
    ``UNIT``; if it has none, the unit itself."""
    first_at, first_start, _ = spans[0]
    unit = math.gcd(*(at - first_at for at, _, _ in spans), *(start - first_start for _, start, _ in spans))
    if unit == 0:
        return UNIT  # one span
    least = -(-unit // UNIT)
    return next((unit // parts for parts in range(least, 2 * least + 1) if unit % parts == 0), unit)
