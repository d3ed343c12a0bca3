"""The hook to sglang 0.5.23: the only folder that imports sglang's internals, besides the public classes' bases and the
benchmark's driver of sglang's own transports (bench/transports/builtin.py).

``register`` is the entry point of group ``sglang.srt.plugins``. Without the flag it only teaches the command line the
name ``conn_multimodal`` and sglang's backend enum the same word; everything else is hooked when the flag is seen.
"""

from __future__ import annotations


def register() -> None:
    """Called by sglang in every process that loads plugins, before the arguments are parsed."""
    from sglang_mm_conn.sglang_plugin import flag

    flag.install()
