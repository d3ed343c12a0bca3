"""The flag's name, and how a process knows that its server was given it."""

from __future__ import annotations

import os
from typing import Any

BACKEND = "conn_multimodal"
FLAG = "--disaggregation-transfer-backend"
# Set by the process that resolves the arguments, inherited by the processes it spawns: the incarnation of the
# server, and the sign that the flag was given (plugins are loaded there before any argument is at hand).
SERVER_ENV = "SGLANG_MM_CONN_SERVER"
# Set by the same process for tokenizer workers: the application that ours stands in for.
APP_ENV = "SGLANG_MM_CONN_APP"


def uses_connector(server_args: Any) -> bool:
    """Whether the server of ``server_args`` was given the flag: the raw field keeps it in every process."""
    return getattr(server_args, "disaggregation_transfer_backend", None) == BACKEND


def server_incarnation() -> str:
    """The incarnation of the server that this process belongs to."""
    return os.environ[SERVER_ENV]
