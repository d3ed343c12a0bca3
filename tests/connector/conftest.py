"""Fixtures of the tests with real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_mm_conn.memory.segment import sweep_stale_segments
from tests.connector.processes import World, Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(params=["shm", "mooncake"])
def path(request: pytest.FixtureRequest) -> str:
    """The data path under test."""
    return str(request.param)


@pytest.fixture
def world(zygote: Zygote, path: str, tmp_path: Path) -> Iterator[World]:
    """Processes on the data path under test."""
    world = World(zygote, path, tmp_path)
    yield world
    world.close()
    sweep_stale_segments()  # those of the processes that were killed here


@pytest.fixture
def shm_world(zygote: Zygote, tmp_path: Path) -> Iterator[World]:
    """Processes on shared memory, for what is the same on every data path."""
    world = World(zygote, "shm", tmp_path)
    yield world
    world.close()
    sweep_stale_segments()
