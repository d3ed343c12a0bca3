"""Which data paths an encoder opens links of, from the settings."""

from __future__ import annotations

import logging

from sglang_mm_conn.core.errors import DataPathUnavailable
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.datapath.base import DataPath
from sglang_mm_conn.datapath.mooncake.writer import MooncakePath, engine_factory
from sglang_mm_conn.datapath.shm import ShmPath
from sglang_mm_conn.memory.device import Device
from sglang_mm_conn.memory.segment import sweep_stale_segments

logger = logging.getLogger(__name__)


def encoder_data_paths(settings: Settings, host: str, device: Device | None = None) -> dict[str, DataPath]:
    """The paths that ``settings`` allow, from what ``device`` computes. Raises MemoryUnavailable where that has no
    memory of the kind asked for, DataPathUnavailable where Mooncake is forced and not installed."""
    device = device or Device()
    device.require(settings)
    sweep_stale_segments()
    paths: dict[str, DataPath] = {}
    if settings.data_path in ("auto", "shm"):
        paths["shm"] = ShmPath(device)
    if settings.data_path in ("auto", "mooncake"):
        try:
            make_engine = engine_factory(settings, host)
            paths["mooncake"] = MooncakePath(
                make_engine, settings.staging_bytes, settings.all_workers, device, settings.pool_device
            )
        except DataPathUnavailable as error:
            if settings.data_path == "mooncake":
                raise
            logger.warning("Only shared memory is available: %s", error)
    return paths
