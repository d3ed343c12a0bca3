"""The plugin for sglang 0.5.23. Only this package uses sglang's internals, which internals.py lists.

(So does bench/transports/builtin.py, which times sglang's built-in transports; conn_multimodal.py imports the base
classes.) By process: flag.py in the one that starts a server, encoder.py in an encoder's, dispatch.py in a language
server's tokenizer process, scheduler.py in its scheduler processes.

``register`` is the entry point of the group ``sglang.srt.plugins``. Without the flag it only adds the choice
``conn_multimodal`` to the command line and to sglang's backend enum; the hooks are applied when the flag is given.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Called by sglang in every process that loads plugins, before the arguments are parsed."""
    from sglang_mm_conn.sglang_plugin import flag

    flag.install()
