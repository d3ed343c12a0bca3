"""The reading of the connector's log lines."""

import pytest

from sglang_mm_conn.demo.timeline import Received, Resumed, Sent, parse, received, resumed

LOG = """\
[2026-01-02 03:04:05] Prefill batch, #new-seq: 1, #new-token: 40
[2026-01-02 03:04:05 TP0] Embedding received: room=ab:0 rid=demo-3 tokens=168 bytes=86016 windows=3 resumes=2 path=shm ms=4.25 rate=20.2MB/s
[2026-01-02 03:04:05] Resume transfer triggered: room=ab:0, queue_idx=1, src_blocks=11
[2026-01-02 03:04:05] Embedding sent: room=ab:0 tokens=168 windows=3 path=shm ms=5.0
"""  # noqa: E501


def test_events_in_order() -> None:
    assert list(parse(LOG.splitlines())) == [
        Received("ab:0", "demo-3", 168, 86016, 3, 2, "shm", 4.25, 20.2),
        Resumed("ab:0", 1, 11),
        Sent("ab:0", 168, 3, "shm", 5.0),
    ]


def test_kinds_apart() -> None:
    assert [event.room for event in received(LOG)] == ["ab:0"]
    assert [event.queue_idx for event in resumed(LOG)] == [1]


def test_other_lines_are_passed_over() -> None:
    assert received("nothing here\nEmbedding arrived: room=1\n") == []


@pytest.mark.parametrize("line", ["Embedding sent: room=1 tokens=x windows=1 path=shm ms=1", "Embedding sent: room=1"])
def test_a_line_that_does_not_read_is_shown(line: str) -> None:
    with pytest.raises(ValueError, match="Embedding sent: room=1"):
        list(parse([line]))
