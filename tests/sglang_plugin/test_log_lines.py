"""Log lines of sglang about a client's media."""

from __future__ import annotations

import io
import logging

from sglang_mm_conn.sglang_plugin.log_lines import LINE_CHARACTERS, TRACEBACK_CHARACTERS, shorten_log_lines

DATA = "iVBORw0K" * 1_000_000


def test_media_in_an_error_that_sglang_logs_take_no_line_of_megabytes() -> None:
    shorten_log_lines()
    shorten_log_lines()
    logger = logging.getLogger("sglang.srt.disaggregation.encoder.runtime")
    assert len(logger.filters) == 1
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    logger.addHandler(handler)
    try:
        logger.error("Dropping req_id=%s from batch: %s", "room", f"cannot load data:image/png;base64,{DATA}")
        try:
            raise ValueError(f"cannot load {DATA}")
        except ValueError:
            logger.exception("batch_encode raised: %s", DATA)
        logger.error("short: %d", 5)
    finally:
        logger.removeHandler(handler)
    written = out.getvalue()
    assert len(written) < 2 * LINE_CHARACTERS + TRACEBACK_CHARACTERS and DATA[:100] not in written
    assert "Dropping req_id=room from batch: cannot load data:image/png;base64,iVBORw0K" in written
    assert "Traceback" in written and "ValueError: cannot load iVBORw0K" in written and "short: 5" in written
