"""Applies the hooks listed in internals.py, and checks that every one of them took effect.

sglang's plugin loader logs an error and goes on. A server with only some of the hooks would silently move embeddings
over sglang's own transport, so ``apply_and_verify`` raises in the process that starts the server.
"""

from __future__ import annotations

import inspect
import pkgutil
from importlib import metadata
from typing import Any

from sglang_mm_conn.sglang_plugin.internals import HOOKS, NEEDED, SPAWN_TARGETS, SUPPORTED
from sglang_mm_conn.sglang_plugin.log_lines import shorten_log_lines

# Returns what the bootstrap route on the encoder's HTTP server answers.
_BOOTSTRAP_SOURCE = "sglang_mm_conn.sglang_plugin.encoder:bootstrap_info"


class IncompatibleSglang(RuntimeError):
    """The installed sglang does not have what this plugin hooks or uses."""


def check_version() -> None:
    """Raise IncompatibleSglang, naming both versions, unless the installed sglang is a supported one."""
    installed = metadata.version("sglang")
    if installed not in SUPPORTED:
        raise IncompatibleSglang(
            f"sglang-mm-conn {metadata.version('sglang-mm-conn')} supports sglang {', '.join(SUPPORTED)}, "
            f"but {installed} is installed"
        )


def _load(name: str) -> Any:
    return pkgutil.resolve_name(name)


_hooked = False


def hook_all() -> None:
    """Register every hook, once per process. They take effect when sglang, or ``apply_and_verify``, applies them."""
    global _hooked
    if _hooked:
        return
    _hooked = True
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in HOOKS:
        HookRegistry.register(hook.target, _load(hook.hook), HookType[hook.kind])


def _add_route() -> None:
    from sglang.srt.disaggregation.encoder.http_server import app

    from sglang_mm_conn.control.bootstrap import ROUTE
    from sglang_mm_conn.control.bootstrap_server import bootstrap_router

    if not any(getattr(route, "path", None) == ROUTE for route in app.routes):
        app.include_router(bootstrap_router(_load(_BOOTSTRAP_SOURCE)))


def apply_and_verify() -> None:
    """Apply the hooks. Raises IncompatibleSglang, naming every problem, unless all of them took effect."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    problems = []
    for name in NEEDED:
        try:
            _load(name)
        except (AttributeError, ImportError) as error:
            problems.append(f"{name}: {error}")
    for target, expected in {**{hook.target: hook.parameters for hook in HOOKS}, **SPAWN_TARGETS}.items():
        try:
            parameters = inspect.signature(_load(target)).parameters
        except (AttributeError, ImportError) as error:
            problems.append(f"{target}: {error}")
            continue
        missing = [name for name in expected if name not in parameters]
        if missing:
            problems.append(f"{target} has no parameter {', '.join(missing)}")
    if not problems:
        HookRegistry.apply_hooks()
        _add_route()
        shorten_log_lines()
        unhooked = [hook.target for hook in HOOKS if not hasattr(_load(hook.target), "__wrapped__")]
        problems += [f"{target} could not be hooked (see the log)" for target in unhooked]
    if problems:
        raise IncompatibleSglang(
            f"sglang-mm-conn supports sglang {', '.join(SUPPORTED)}; "
            f"the installed {metadata.version('sglang')} differs: {'; '.join(problems)}"
        )
