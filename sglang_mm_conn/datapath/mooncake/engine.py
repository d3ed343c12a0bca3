"""Owns how either side creates a Mooncake Transfer Engine and registers memory with it.

Measured properties of the engine (0.3.13) that determine this module; each module of this package lists such
properties:

- GPU memory is registered like any other. Hazard: the build without CUDA would write to GPU addresses as if they were
  host addresses.
- The engine does not authenticate writes. So callers check extents against the registered memory first.
- Calls before ``initialize`` crash. A fork()ed child that uses the engine hangs, so only spawned children may use it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from sglang_mm_conn.core.errors import DataPathUnavailable, MemoryUnavailable
from sglang_mm_conn.core.sharding import session_at

_WITHOUT_CUDA = "mooncake-transfer-engine-non-cuda"

EngineFactory = Callable[[], Any]


def engine_factory(host: str, *, protocol: str, device: str = "", memory_device: str = "cpu") -> EngineFactory:
    """A function that makes an engine, which peers reach at ``host``. ``protocol``, ``device``: passed to the engine.
    ``memory_device``: the kind of memory that it reads and writes (cpu, cuda).

    Raises DataPathUnavailable if the library is missing, or if the installed build cannot access that memory.
    """
    if memory_device != "cpu" and _is_installed(_WITHOUT_CUDA):
        raise DataPathUnavailable(
            f"SGLANG_MM_CONN_POOL_DEVICE={memory_device}, but {_WITHOUT_CUDA} is installed, which cannot access "
            "GPU memory: pip install mooncake-transfer-engine instead"
        )
    # The library reads these when it is imported or initialized.
    os.environ.setdefault("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", "65535")
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    if ":" in host:
        os.environ.setdefault("MC_USE_IPV6", "1")
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise DataPathUnavailable(f"Mooncake (pip install mooncake-transfer-engine) is missing: {error}") from None

    def make() -> Any:
        engine = TransferEngine()
        code = engine.initialize(host, "P2PHANDSHAKE", protocol, device)
        if code != 0:
            raise DataPathUnavailable(
                f"Mooncake engine: initialize({host!r}, protocol {protocol!r}, device {device!r}) returned {code}"
            )
        return engine

    return make


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def session_id(engine: Any, host: str) -> str:
    """The session id under which peers write through ``engine``."""
    return session_at(host, engine.get_rpc_port())


def register_memory(engine: Any, memory: torch.Tensor) -> None:
    """Register ``memory`` with ``engine``. Call this once per memory. Raises MemoryUnavailable."""
    code = engine.register_memory(memory.data_ptr(), memory.numel())
    if code != 0:
        raise MemoryUnavailable(f"Mooncake engine: registering {memory.numel()} bytes returned {code}")
