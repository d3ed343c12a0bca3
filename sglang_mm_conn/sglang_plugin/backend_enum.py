"""Adds ``conn_multimodal`` to sglang's ``TransferBackend`` and ``get_kv_class``, its interface for transfer backends.

The member is added to sglang's enum itself: code that compares members must see the same objects. The module of the
enum is large, so it is not imported for this, but extended when something else imports it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MODULE = "sglang.srt.disaggregation.utils"
NAME = "CONN_MULTIMODAL"
VALUE = "conn_multimodal"


def install() -> None:
    """Extend the module now if it is imported, else as soon as it is."""
    module = sys.modules.get(MODULE)
    if module is not None:
        _extend(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds MODULE through the path finder, and extends it after its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _extend(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _extend(module: Any) -> None:
    enum = module.TransferBackend
    if VALUE in enum._value2member_map_:
        return
    member = object.__new__(enum)
    member._name_, member._value_ = NAME, VALUE
    member._sort_order_ = len(enum._member_names_)
    enum._member_names_.append(NAME)
    enum._member_map_[NAME] = member
    enum._value2member_map_[VALUE] = member
    type.__setattr__(enum, NAME, member)
    module.get_kv_class = _with_ours(module, module.get_kv_class)


def _with_ours(module: Any, original: Any) -> Any:
    @functools.wraps(original)
    def get_kv_class(transfer_backend: Any, class_type: Any, is_multimodal: bool = False) -> Any:
        """sglang's Mooncake classes for KV, or with ``is_multimodal=True`` the classes of conn_multimodal.py."""
        if transfer_backend is not module.TransferBackend(VALUE):
            return original(transfer_backend, class_type)
        if not is_multimodal:
            return original(module.TransferBackend.MOONCAKE, class_type)
        from sglang_mm_conn import conn_multimodal as ours

        kinds = module.KVClassType
        return {
            kinds.KVARGS: ours.EmbeddingArgs,
            kinds.MANAGER: ours.EmbeddingManager,
            kinds.SENDER: ours.EmbeddingSender,
            kinds.RECEIVER: ours.EmbeddingReceiver,
            kinds.BOOTSTRAP_SERVER: ours.EmbeddingBootstrapServer,
        }[class_type]

    return get_kv_class
