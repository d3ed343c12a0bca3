"""Pairs of processes: when one of them ends, the benchmark says which one and how."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sglang_mm_conn.bench.payload import PayloadFile
from sglang_mm_conn.bench.process_pair import BenchError, Pair
from sglang_mm_conn.bench.transports import parse
from sglang_mm_conn.bench.transports.base import Config

NBYTES = 64 << 10


@pytest.mark.parametrize("role", ["encoder", "language"])
def test_a_process_that_was_killed_is_named_with_what_may_have_killed_it(role: str, tmp_path: Path) -> None:
    payload = PayloadFile(NBYTES)
    try:
        config = Config(nbytes=NBYTES, width=4096, in_flight=1)
        with Pair(parse("memcpy"), config, (payload.path, NBYTES, 1), str(tmp_path / "key")) as pair:
            assert len(pair.run(2, NBYTES).seconds) == 2
            os.kill(pair.facts[f"{role}_pid"], signal.SIGKILL)
            with pytest.raises(BenchError, match=f"memcpy, {role} process: was killed.* memory is short"):
                pair.run(1, NBYTES)
    finally:
        payload.close()
