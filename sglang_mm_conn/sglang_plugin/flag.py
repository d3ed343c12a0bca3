"""The flag ``--disaggregation-transfer-backend conn_multimodal``: its choice, its resolution, its refusals."""

from __future__ import annotations

import logging
import os
from typing import Any
from urllib.parse import urlsplit

from sglang_mm_conn.control.authentication import DeploymentKey, is_loopback
from sglang_mm_conn.control.reports import new_report_address
from sglang_mm_conn.core.rooms import new_id
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.sglang_plugin.names import BACKEND, FLAG, REPORTS_ENV, SERVER_ENV, uses_connector
from sglang_mm_conn.sglang_plugin.processes import use_our_application

logger = logging.getLogger(__name__)


def install() -> None:
    """Add the choice to sglang's flag. In a process spawned by a server with the flag, register all hooks too."""
    from sglang_mm_conn.sglang_plugin import backend_enum, hooks

    hooks.check_version()
    from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES, add_disagg_transfer_backend_choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    backend_enum.install()
    if BACKEND not in DISAGG_TRANSFER_BACKEND_CHOICES:
        add_disagg_transfer_backend_choices([BACKEND])
        register_resolution_hook("handle_pd_disaggregation")(_resolve_kv_backend)
        register_resolution_hook("handle_encoder_disaggregation")(_resolve_embedding_backend)
    if SERVER_ENV in os.environ:
        hooks.hook_all()


def _resolve_kv_backend(server_args: Any, previous: Any) -> None:
    """KV between prefill and decode uses sglang's ``mooncake``, and many checks of sglang compare the flag with it."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    if uses_connector(server_args):
        declare_resolution(server_args, BACKEND, disaggregation_transfer_backend="mooncake")
    previous(server_args)


def _resolve_embedding_backend(server_args: Any, previous: Any) -> None:
    """Embeddings use the control flow of sglang's ``zmq_to_scheduler``: the encoder pushes, the scheduler receives.

    Runs once, in the process that starts the server, where an exception stops the server: so everything that is refused
    is refused here, before a model is loaded. Raises ValueError, SettingError, IncompatibleSglang.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    from sglang_mm_conn.sglang_plugin import hooks

    cfg = resolving_view(server_args)
    if not uses_connector(server_args) or not (cfg.encoder_only or cfg.language_only):
        previous(server_args)
        return
    explicit = server_args.encoder_transfer_backend
    if explicit not in (None, "auto"):
        raise ValueError(
            f"{FLAG} {BACKEND} is also the transport of the embeddings and excludes "
            f"--encoder-transfer-backend {explicit}: leave --encoder-transfer-backend out, or set it to auto"
        )
    _refuse_untested(cfg)
    settings = Settings.from_env(os.environ)
    _refuse_unsecured(cfg, settings)
    declare_resolution(server_args, BACKEND, encoder_transfer_backend="zmq_to_scheduler")
    os.environ[SERVER_ENV] = new_id()
    hooks.hook_all()
    hooks.apply_and_verify()
    if cfg.encoder_only:
        from sglang_mm_conn.sglang_plugin.encoder import start_processes

        start_processes(cfg.dp_size, settings)
    else:
        os.environ[REPORTS_ENV] = new_report_address()
        if cfg.tokenizer_worker_num > 1:
            use_our_application()
    previous(server_args)
    logger.info("Embeddings travel over %s (server %s)", BACKEND, os.environ[SERVER_ENV])


def _refuse_unsecured(cfg: Any, settings: Settings) -> None:
    """Without a key, refuse addresses beyond loopback unless SGLANG_MM_CONN_INSECURE allows them."""
    if settings.key_file is not None:
        DeploymentKey.load(settings.key_file)
        return
    hosts = [cfg.host, *(urlsplit(url).hostname for url in cfg.encoder_urls)]
    outside = [host for host in hosts if not is_loopback(host)]
    if not outside:
        return
    if not settings.insecure:
        raise ValueError(
            f"{FLAG} {BACKEND}: {', '.join(map(str, outside))} is not a loopback address and "
            "SGLANG_MM_CONN_KEY_FILE is not set. Make a key (python -m sglang_mm_conn keygen FILE) and give it to "
            "every server, or set SGLANG_MM_CONN_INSECURE=1 on a network where every host is trusted"
        )
    logger.warning("INSECURE: control connections beyond this host are neither authenticated nor encrypted")


def _refuse_untested(cfg: Any) -> None:
    """Refuse combinations that this connector has not been tested with, naming the option and its value."""
    from sglang.srt.environ import envs

    found = []
    for option, value in (
        ("--grpc-mode", cfg.grpc_mode),
        ("--smg-grpc-mode", cfg.smg_grpc_mode),
        ("--use-ray", cfg.use_ray),
        ("SGLANG_RUST_SERVER", envs.SGLANG_RUST_SERVER.get()),
    ):
        if value:
            found.append(f"{option} {value}")
    if envs.SGLANG_ENCODER_MM_RECEIVER_MODE.get() != "http":
        found.append(f"SGLANG_ENCODER_MM_RECEIVER_MODE={envs.SGLANG_ENCODER_MM_RECEIVER_MODE.get()}")
    must_be_one = [("--pp-size", cfg.pp_size)]
    if cfg.encoder_only:
        must_be_one.append(("--nnodes", cfg.nnodes))
        if cfg.tp_size > 1:  # sglang supports one or the other, and checks that only after loading the model
            must_be_one.append((f"--tp-size {cfg.tp_size} together with --dp-size", cfg.dp_size))
    else:
        # With data parallelism every rank would receive announcements of rooms that only one of them waits for.
        must_be_one += [("--dp-size", cfg.dp_size), ("--attn-cp-size", cfg.attn_cp_size)]
        if not cfg.encoder_urls:  # encoders register with one worker only, and the others would encode by themselves
            must_be_one.append(("without --encoder-urls, --tokenizer-worker-num", cfg.tokenizer_worker_num))
    found += [f"{option} {value}" for option, value in must_be_one if value != 1]
    if found:
        raise ValueError(f"{FLAG} {BACKEND} does not support {', '.join(found)} yet")
