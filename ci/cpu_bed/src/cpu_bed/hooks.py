"""Hooks around functions of sglang that must be there: sglang's registry only logs a target that it cannot find."""

import pkgutil
from collections.abc import Callable
from typing import Any


def around(variable: str, target: str, hook: Callable[..., Any]) -> None:
    """``variable`` asks for the hook, and is named where sglang has no ``target``."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        raise SystemExit(f"{variable}: there is no {target} in this sglang") from None
    HookRegistry.register(target, hook, HookType.AROUND)
