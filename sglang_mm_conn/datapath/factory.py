"""Owns the table of data paths, and makes the halves that the settings allow. No other module names a path."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypeVar

from sglang_mm_conn.core.errors import DataPathUnavailable
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.datapath.base import DataPath, ReceivePath
from sglang_mm_conn.datapath.mooncake.engine import EngineFactory, engine_factory
from sglang_mm_conn.datapath.mooncake.exposure import MooncakeReceivePath
from sglang_mm_conn.datapath.mooncake.writer import MooncakePath
from sglang_mm_conn.datapath.shm import ShmPath, ShmReceivePath
from sglang_mm_conn.memory.device import Device
from sglang_mm_conn.memory.pool import BlockPool
from sglang_mm_conn.memory.segment import sweep_stale_segments

logger = logging.getLogger(__name__)

Half = TypeVar("Half")  # DataPath or ReceivePath

# Reserves a port. Returns it and the function that releases it.
ReservePort: TypeAlias = Callable[[], tuple[int, Callable[[], None]]]


class Halves(NamedTuple):
    """Makes the halves of one path. Either raises DataPathUnavailable if the path cannot work here."""

    words: str  # the path's name in log lines
    encoder: Callable[[Settings, str, Device], DataPath]
    language: Callable[[Settings, str, BlockPool, ReservePort], ReceivePath]


def _shm(settings: Settings, host: str, pool: BlockPool, reserve_port: ReservePort) -> ReceivePath:
    if pool.segment is None:
        raise DataPathUnavailable("the pool is not in shared memory")
    return ShmReceivePath(pool.segment, host, reserve_port)


def _engines(settings: Settings, host: str) -> EngineFactory:
    return engine_factory(
        host,
        protocol=settings.mooncake_protocol,
        device=settings.mooncake_device,
        memory_device=settings.pool_device,
    )


def _mooncake_encoder(settings: Settings, host: str, device: Device) -> DataPath:
    return MooncakePath(
        _engines(settings, host), settings.staging_bytes, settings.all_workers, device, settings.pool_device
    )


def _mooncake(settings: Settings, host: str, pool: BlockPool, reserve_port: ReservePort) -> ReceivePath:
    # The engine's library is imported only when an engine is needed.
    return MooncakeReceivePath(lambda: _engines(settings, host)(), host, pool.regions)


# Every data path by name, in the order in which a language rank tries them.
PATHS: dict[str, Halves] = {
    "shm": Halves("shared memory", lambda settings, host, device: ShmPath(device), _shm),
    "mooncake": Halves("Mooncake", _mooncake_encoder, _mooncake),
}


def _allowed(settings: Settings) -> dict[str, Halves]:
    """The paths that ``settings`` allow. Raises DataPathUnavailable if they force an unknown one."""
    if settings.data_path == "auto":
        return PATHS
    if settings.data_path not in PATHS:
        raise DataPathUnavailable(f"there is no data path {settings.data_path!r} (there are {', '.join(PATHS)})")
    return {settings.data_path: PATHS[settings.data_path]}


def _make(settings: Settings, half: Callable[[Halves], Half]) -> tuple[dict[str, Half], list[DataPathUnavailable]]:
    """One half of every allowed path that can work here, and why the others cannot.

    Raises DataPathUnavailable if no allowed path can."""
    paths: dict[str, Half] = {}
    missing: list[DataPathUnavailable] = []
    for name, halves in _allowed(settings).items():
        try:
            paths[name] = half(halves)
        except DataPathUnavailable as error:
            missing.append(error)
    if not paths:
        raise missing[0]
    return paths, missing


def encoder_data_paths(settings: Settings, host: str, device: Device | None = None) -> dict[str, DataPath]:
    """The encoder's halves of the paths that ``settings`` allow, for embeddings that ``device`` computes.

    Raises MemoryUnavailable if the device lacks the memory that a setting asks for, DataPathUnavailable if no allowed
    path can work here."""
    device = device or Device()
    device.require(settings)
    sweep_stale_segments()
    paths, missing = _make(settings, lambda halves: halves.encoder(settings, host, device))
    for why in missing:
        logger.warning("Only %s is available: %s", " and ".join(PATHS[name].words for name in paths), why)
    return paths


def receive_paths(settings: Settings, host: str, pool: BlockPool, reserve_port: ReservePort) -> dict[str, ReceivePath]:
    """The language rank's halves of the paths into ``pool`` that ``settings`` allow, in the order to try them.

    ``host``: the address at which peers on other hosts reach this process. Raises DataPathUnavailable if no allowed
    path can work here."""
    # What is missing is no news if another path is left: a pool has one kind of memory.
    paths, _ = _make(settings, lambda halves: halves.language(settings, host, pool, reserve_port))
    return paths
