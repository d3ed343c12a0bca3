"""The heap: what one request frees is there for the next, unless somebody decided otherwise."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from sglang_mm_conn.memory import malloc
from sglang_mm_conn.memory.malloc import raise_trim_threshold

# Faults of one request's worth of memory that is freed together, after some that came before. Straight from malloc:
# whether torch's happens to be at the very end of the heap differs from process to process.
REQUESTS = """
import ctypes, os, resource, sys
from sglang_mm_conn.memory.malloc import raise_trim_threshold
print(raise_trim_threshold(int(sys.argv[1]), os.environ))
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault for each page of 4 KiB
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for number in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = [libc.malloc(8 << 20) for _ in range(6)]
    for one in memory:
        ctypes.memset(one, 1, 8 << 20)
    for one in memory:
        libc.free(one)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 6 * (8 << 20) // 4096

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")


def faults(nbytes: int) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", REQUESTS, str(nbytes)]
    run = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120, check=True)
    kept, faults = run.stdout.split()
    return kept == "True", int(faults)


def test_memory_that_one_request_frees_costs_the_next_no_page_faults() -> None:
    kept, with_it = faults(256 << 20)
    assert kept and with_it < PAGES // 10
    kept, without = faults(0)
    assert not kept and without > PAGES // 2, "or there is nothing to be gained by it"


@pytest.mark.parametrize(
    "environ",
    [
        {"MALLOC_TRIM_THRESHOLD_": "1"},
        {"MALLOC_MMAP_THRESHOLD_": "262144"},
        {"MALLOC_TOP_PAD_": "0"},
        {"MALLOC_MMAP_MAX_": "0"},
        {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x40000:glibc.malloc.trim_threshold=1"},
    ],
)
def test_what_the_user_decided_for_the_allocator_is_left_alone(environ: dict[str, str]) -> None:
    assert not raise_trim_threshold(256 << 20, environ)


class Library:
    """A C library whose functions are at other addresses than glibc's, as an allocator's that is loaded before it."""

    malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(lambda size: None)

    def mallopt(self, parameter: int, value: int) -> int:
        raise AssertionError("it would do nothing, and say that it did")


@pytest.mark.parametrize("names", [("libc.so.6",), ()], ids=["another allocator", "musl"])
def test_another_allocator_is_left_alone(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    glibc = ctypes.CDLL("libc.so.6")

    def load(name: str | None) -> object:
        if name is None:
            return Library()
        if name not in names:
            raise OSError(f"{name}: no such file")
        return glibc

    monkeypatch.setattr(malloc.ctypes, "CDLL", load)
    assert not raise_trim_threshold(256 << 20, {})
