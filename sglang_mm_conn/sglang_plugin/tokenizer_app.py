"""The application of tokenizer workers (``--tokenizer-worker-num`` above 1): sglang's own, after loading the plugins.

sglang's HTTP server starts these workers with the import path of an application, and without plugins. A worker imports
this module before it creates its tokenizer manager, and with it the dispatcher that names rooms.
"""

from __future__ import annotations

import os
from typing import Any

from sglang_mm_conn.sglang_plugin.names import APP_ENV
from sglang_mm_conn.sglang_plugin.processes import hook_this_process


def _load() -> Any:
    from uvicorn.importer import import_from_string

    hook_this_process()
    return import_from_string(os.environ[APP_ENV])


app = _load()
