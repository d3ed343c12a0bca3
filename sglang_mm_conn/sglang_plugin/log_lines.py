"""Owns the shortening of sglang's log lines that repeat a client's media: an error about an image of 6 MB is one line
of 8 MB, several times over."""

from __future__ import annotations

import logging

from sglang_mm_conn.core.texts import as_text

LINE_CHARACTERS, TRACEBACK_CHARACTERS = 2000, 8000
# The modules of sglang that log what an encode has raised.
_MODULES = ("http_server", "runtime", "server", "preprocessor", "receiver")
_FORMATTER = logging.Formatter()


class _Shorten(logging.Filter):
    """Lets every record pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if len(message) > LINE_CHARACTERS:
            record.msg, record.args = as_text(message, LINE_CHARACTERS), ()
        if record.exc_info and not record.exc_text:  # the formatter takes a text that is there
            record.exc_text = as_text(_FORMATTER.formatException(record.exc_info), TRACEBACK_CHARACTERS)
        return True


def shorten_log_lines() -> None:
    """In this process, from now on."""
    for module in _MODULES:
        logger = logging.getLogger(f"sglang.srt.disaggregation.encoder.{module}")
        if not any(isinstance(one, _Shorten) for one in logger.filters):
            logger.addFilter(_Shorten())
