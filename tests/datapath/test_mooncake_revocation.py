"""What revokes an epoch for certain, with the real engine: destroying it does, unregistering memory does not."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

BYTES = 512 << 20
HOST = "127.0.0.1"
_WRITER = """
import sys
import torch
from mooncake.engine import TransferEngine

session, address, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
source = torch.ones(count, dtype=torch.uint8)
engine = TransferEngine()
assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
assert engine.register_memory(source.data_ptr(), count) == 0
print("ready", flush=True)
print(engine.transfer_sync_write(session, source.data_ptr(), address, count), flush=True)
"""


@pytest.fixture(autouse=True)
def _quiet_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    monkeypatch.setenv("MC_LOG_LEVEL", "ERROR")


def _engine(memory: torch.Tensor) -> Any:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.register_memory(memory.data_ptr(), memory.numel()) == 0
    return engine


def _landed(memory: torch.Tensor) -> int:
    """One byte in each page is looked at."""
    return int(memory[::4096].count_nonzero())


@contextmanager
def _writer_frozen_in_mid_write(engine: Any, memory: torch.Tensor) -> Iterator[subprocess.Popen[str]]:
    session = f"{HOST}:{engine.get_rpc_port()}"
    del engine
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, session, str(memory.data_ptr()), str(memory.numel())],
        stdout=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    try:
        assert writer.stdout is not None and "ready" in writer.stdout.readline()
        deadline = time.monotonic() + 30
        while not memory[: 8 << 20 : 4096].any():  # few pages: a look at all of them takes longer than the write
            assert time.monotonic() < deadline, "nothing was written"
        os.kill(writer.pid, signal.SIGSTOP)
        before = -1
        while before != _landed(memory):  # what was on its way when it froze
            before = _landed(memory)
            time.sleep(0.3)
        assert before < memory.numel() // 4096, "the write was over before the writer could be frozen"
        yield writer
    finally:
        writer.kill()
        writer.communicate()  # waits, and closes the pipe


def _wait_for_more(memory: torch.Tensor, than: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while _landed(memory) == than and time.monotonic() < deadline:
        time.sleep(0.05)
    return _landed(memory)


def test_bytes_go_on_landing_in_memory_that_was_unregistered() -> None:
    """The hazard itself: if this fails one day, unregistering has become a proof, and the simpler one."""
    memory = torch.zeros(BYTES, dtype=torch.uint8)
    engine = _engine(memory)
    with _writer_frozen_in_mid_write(engine, memory) as writer:
        assert engine.unregister_memory(memory.data_ptr()) == 0
        before = _landed(memory)
        os.kill(writer.pid, signal.SIGCONT)
        assert _wait_for_more(memory, before, 20) > before


def test_nothing_lands_after_the_engine_is_destroyed_and_another_serves_its_memory() -> None:
    memory = torch.zeros(BYTES, dtype=torch.uint8)
    engines = [_engine(memory)]
    with _writer_frozen_in_mid_write(engines[0], memory) as writer:
        engines.append(_engine(memory))  # the next epoch is registered before the old one goes
        engines.pop(0)
        gc.collect()
        before = _landed(memory)
        os.kill(writer.pid, signal.SIGCONT)
        assert writer.stdout is not None
        assert writer.stdout.readline().strip() not in ("", "0"), "the writer is told that its write failed"
        assert _wait_for_more(memory, before, 2) == before
