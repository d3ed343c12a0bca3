"""The names of the flag and of environment variables, and whether a process belongs to a server with the flag."""

from __future__ import annotations

import os
from typing import Any

BACKEND = "conn_multimodal"
FLAG = "--disaggregation-transfer-backend"
# The incarnation of the server. Set by the process that resolves the arguments and inherited by the processes it
# spawns, where it also says that the flag was given: they load plugins before they have arguments.
SERVER_ENV = "SGLANG_MM_CONN_SERVER"
# On a language server, set by the same process: where its scheduler reports to its tokenizer processes.
REPORTS_ENV = "SGLANG_MM_CONN_REPORTS"
# For tokenizer workers, set by the same process: the path of sglang's application, which tokenizer_app.py imports.
APP_ENV = "SGLANG_MM_CONN_APP"


def uses_connector(server_args: Any) -> bool:
    """Whether the server was given the flag; the raw field has it in every process."""
    return getattr(server_args, "disaggregation_transfer_backend", None) == BACKEND


def server_incarnation() -> str:
    """The incarnation of the server that this process belongs to."""
    return os.environ[SERVER_ENV]
