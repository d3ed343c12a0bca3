"""Copies of bytes in host memory: on the calling thread alone, the GIL released only where that pays.

Why not ``Tensor.copy_``: torch shares a large copy out over a team of OpenMP threads, one team for *each* calling
thread, and the team's barrier waits for the slowest: measured 20 ms and more for a copy of 2 ms where the cores are
busy, and threads that are made in the middle of a request. One thread's memmove nearly fills a memory channel.
"""

from __future__ import annotations

import ctypes

import torch

# A thread that released the GIL waits up to the switch interval (5 ms) to get it back from a busy one.
HOLD_GIL_BELOW = 256 << 10

_ADDRESS = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value
assert _ADDRESS is not None
_move = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_ADDRESS)
_move_holding_gil = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(_ADDRESS)


def copy_bytes(target: torch.Tensor, at: int, source: torch.Tensor, start: int, nbytes: int) -> None:
    """Copy ``source[start : start + nbytes]`` to ``target[at : at + nbytes]``; both uint8, one dimension, contiguous.

    Raises ValueError, before a byte moves, where that is beyond either of them.
    """
    if not (0 <= at <= at + nbytes <= target.numel() and 0 <= start <= start + nbytes <= source.numel()):
        raise ValueError(
            f"{nbytes} bytes from {start} of {source.numel()} do not go to {at} of {target.numel()}"
        )
    if not (target.is_cpu and source.is_cpu):
        target[at : at + nbytes].copy_(source[start : start + nbytes])
        return
    move = _move_holding_gil if nbytes < HOLD_GIL_BELOW else _move
    move(target.data_ptr() + at, source.data_ptr() + start, nbytes)
