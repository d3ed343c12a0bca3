"""The places where sglang is hooked, as a table, and the check that every hook took effect.

sglang's plugin loader logs what goes wrong and goes on. A server that is half hooked would move embeddings over
sglang's own transport without a word, so ``apply_and_verify`` raises in the process that starts the server.
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from dataclasses import dataclass
from importlib import metadata
from typing import Any

logger = logging.getLogger(__name__)

SUPPORTED = ("0.5.23",)
_ENCODER = "sglang.srt.disaggregation.encoder"


class IncompatibleSglang(RuntimeError):
    """The installed sglang does not have the hooks that this plugin needs."""


@dataclass(frozen=True)
class Hook:
    """One hooked function, the parameters that the hook relies on, and the hook (``module:function``)."""

    target: str
    parameters: tuple[str, ...]
    hook: str
    kind: str = "AROUND"


HOOKS = (
    Hook(
        f"{_ENCODER}.receiver.create_mm_receiver",
        ("server_args", "dtype", "hf_config", "scheduler", "encode_urls"),
        "sglang_mm_conn.sglang_plugin.language:create_receiver",
    ),
    Hook(
        f"{_ENCODER}.server.MMEncoder.__init__",
        ("self", "server_args", "rank"),
        "sglang_mm_conn.sglang_plugin.encoder:start_manager",
        "AFTER",
    ),
    Hook(
        f"{_ENCODER}.server.MMEncoder._publish_preprocess_metadata",
        ("self", "ctx", "requests"),
        "sglang_mm_conn.sglang_plugin.encoder:announce_rooms",
    ),
    Hook(
        f"{_ENCODER}.server.MMEncoder._compute_direct_embedding",
        ("self", "ctx", "keep_on_gpu"),
        "sglang_mm_conn.sglang_plugin.encoder:keep_on_device",
    ),
    Hook(
        f"{_ENCODER}.runtime._push_embedding_to_prefill",
        ("enc", "request", "background_url_send"),
        "sglang_mm_conn.sglang_plugin.encoder:push_embedding",
    ),
)
# Functions that the runtime spawns processes with: not hooked but replaced, see processes.py.
SPAWN_TARGETS = {
    f"{_ENCODER}.runtime.launch_dp_worker": ("server_args", "dp_rank"),
    f"{_ENCODER}.runtime.launch_encoder": ("server_args", "rank"),
}
# What our route on the encoder's HTTP server answers.
ROUTE_SOURCE = "sglang_mm_conn.sglang_plugin.encoder:bootstrap_info"
# Used by the hooks, not hooked: their absence must be noticed at the start as well.
NEEDED = (
    f"{_ENCODER}.runtime.DPDispatcher.alive_ranks",
    f"{_ENCODER}.http_server.dp_dispatcher",
    f"{_ENCODER}.receiver.MMReceiverHTTP.encode",
    f"{_ENCODER}.receiver.MMReceiverBase._process_waiting_requests",
    f"{_ENCODER}.receiver.MMReceiverBase._init_mm_processor",
    f"{_ENCODER}.receiver.MMReceiverBase._extract_url_data",
    f"{_ENCODER}.receiver.MMReceiverBase._assign_items_by_modality",
    f"{_ENCODER}.receiver.WaitingMMRequestBase._finish_assemble",
    f"{_ENCODER}.receiver.WaitingMMRequestBase._fail_and_release",
    f"{_ENCODER}.receiver.MultiModalEmbeddingData.from_embedding_data",
    f"{_ENCODER}.receiver.create_part_req_id",
    f"{_ENCODER}.receiver.calculate_modality_num_parts",
    f"{_ENCODER}.server.MMEncoder._wait_for_embedding",
    f"{_ENCODER}.server.MMEncoder._infer_embedding_dims",
    f"{_ENCODER}.server.MMEncoder.release_request",
    f"{_ENCODER}.http_server.app",
    "sglang.srt.managers.scheduler_components.idle_sleeper.IdleSleeper.maybe_sleep",
    "sglang.srt.managers.scheduler_components.ipc_channels.SchedulerIpcChannels",
    "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state",
)


def check_version() -> None:
    """Raise IncompatibleSglang, naming both versions, where the installed sglang is none of the supported ones."""
    installed = metadata.version("sglang")
    if installed not in SUPPORTED:
        raise IncompatibleSglang(
            f"sglang-mm-conn {metadata.version('sglang-mm-conn')} fits sglang {', '.join(SUPPORTED)}, "
            f"but {installed} is installed"
        )


def _load(name: str) -> Any:
    return pkgutil.resolve_name(name)


_hooked = False


def hook_all() -> None:
    """Register every hook, once per process. sglang applies them; nothing has changed before that."""
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
        app.include_router(bootstrap_router(_load(ROUTE_SOURCE)))


def apply_and_verify() -> None:
    """Apply the hooks and raise IncompatibleSglang unless every one took effect."""
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
        for hook in HOOKS:
            if not hasattr(_load(hook.target), "__wrapped__"):
                problems.append(f"{hook.target} could not be hooked (see the log)")
    if problems:
        raise IncompatibleSglang(
            f"sglang-mm-conn fits sglang {', '.join(SUPPORTED)}; the installed {metadata.version('sglang')} differs: "
            + "; ".join(problems)
        )
