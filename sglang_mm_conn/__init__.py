"""Multimodal embeddings from an sglang encoder server to a language server: paged, one-sided transfers that resume.

Layers, from the bottom; each imports only those above it in this list:

- ``core``: protocol messages, state machines, block allocation, settings. No IO, no threads, no torch.
- ``control``, ``memory``: control connections and the bootstrap route; shared segments and the pool of blocks.
- ``datapath``: how bytes get into another process's blocks, over shared memory or Mooncake.
- ``connector``: the two endpoints, made of the above.
- ``conn_multimodal``: the public API, in the form of sglang's transfer backends.
- ``sglang_plugin``: hooks sglang so that servers use it.
- ``demo``, ``bench``, ``cli``: the commands of ``python -m sglang_mm_conn``.

The names in ``__all__`` are imported when they are first used: those of ``conn_multimodal`` need torch and sglang.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "conn_multimodal": (
        "EmbeddingArgs", "EmbeddingBootstrapServer", "EmbeddingManager", "EmbeddingMode", "EmbeddingReceiver",
        "EmbeddingSender",
    ),
    "core.errors": (
        "AllocatorError", "ConnError", "DataPathError", "DataPathUnavailable", "IllegalTransition", "MemoryUnavailable",
        "ProtocolError", "SettingError", "TransferFailed", "WriterSlotTaken",
    ),
    "core.settings": ("Settings",),
    "core.states": ("Poll",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
