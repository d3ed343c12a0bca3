"""The machine and the packages that the benchmark ran on, for its report and its JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

_PACKAGES = ("sglang", "torch", "pyzmq", "mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine",
             "mooncake-transfer-engine-cuda13")  # fmt: skip


def describe() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "cpu": _cpu(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return ""


def line(facts: dict[str, Any]) -> str:
    """``facts`` in one line."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    cpu = f"{facts['cores']} cores" + (f" ({facts['cpu']})" if facts["cpu"] else "")
    system = f"Linux {'.'.join(facts['kernel'].split('.')[:2])}, Python {facts['python']}"
    return f"{cpu}, load {facts['load']:.1f} at the start, {system}, {packages}"
