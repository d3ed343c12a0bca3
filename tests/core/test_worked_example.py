"""The worked example of docs/protocol.md, step by step: 2000 tokens, 1024 offered at first."""

from __future__ import annotations

from sglang_mm_conn.core.actions import CopyOut
from sglang_mm_conn.core.messages import Done, Init, Progress, Resume
from sglang_mm_conn.core.states import Poll
from tests.core.harness import Wire, only


def test_2000_tokens_with_1024_offered_go_in_two_windows_on_the_stored_queue() -> None:
    wire = Wire(blocks=16, block_rows=128, first_offer=1024)
    rank, room = wire.rank, wire.room()
    wire.expect(room)
    wire.announce(room, 2000)
    wire.deliver()
    (init,) = only(wire.to_encoder, Init)
    assert (init.allocated_tokens, init.dst_embedding_indices) == (1024, list(range(8)))

    # T0: the chunk is queued, on the port sum's queue.
    wire.compute(room)
    entry = wire.encoder.rooms[room]
    queue_idx = 17001 % 4
    assert [chunk.queue_idx for chunk in wire.chunk_log] == [queue_idx]
    (chunk,) = wire.chunk_log
    assert chunk.is_last and chunk.total_tokens == 2000

    # T1: the worker saves source and total, sends 1024 tokens; partial, Transferring on both sides.
    info = entry.transfer_infos[rank.session_id]
    assert (info.src_embedding_indices, info.total_tokens) == (None, 0)
    write = wire.begin_write()
    assert write is not None and (write.window, write.first_token, write.tokens) == (0, 0, 1024)
    assert info.src_embedding_indices == (0, 1, 2) and info.total_tokens == 2000
    wire.end_write(write)
    assert info.sent_tokens == 1024 and entry.poll() is Poll.Transferring
    progress = wire.deliver_to_rank(rank)
    assert isinstance(progress, Progress) and progress.sent_tokens == 1024
    assert rank.core.rooms[room].poll() is Poll.Transferring

    # T2: the rows are copied out, and the rest is asked for: min(8 blocks x 128, 976 remaining).
    copy = wire.copy_out()
    assert isinstance(copy, CopyOut) and not copy.last
    resume = wire.deliver_to_encoder(rank)
    assert isinstance(resume, Resume)
    assert (resume.window, resume.sent_tokens, resume.allocated_tokens) == (1, 1024, 976)
    assert len(resume.dst_embedding_indices) == 8
    assert rank.core.rooms[room].poll() is Poll.Transferring

    # T3: the info is replaced and a new chunk queued on the same shard: without it, a hang for ever.
    assert (info.sent_tokens, info.allocated_tokens) == (1024, 976)
    assert info.dst_embedding_indices == resume.dst_embedding_indices
    assert [chunk.queue_idx for chunk in wire.chunk_log] == [queue_idx, queue_idx]
    assert wire.chunk_log[1] == chunk  # the same source, the same total

    # T4: the worker sends the remaining 976; no longer partial, Success.
    write = wire.begin_write()
    assert write is not None and (write.window, write.first_token, write.tokens) == (1, 1024, 976)
    wire.end_write(write)
    done = wire.deliver_to_rank(rank)
    assert isinstance(done, Done) and done.total_tokens == 2000
    copy = wire.copy_out()
    assert copy is not None and copy.last
    assert rank.core.rooms[room].poll() is Poll.Success
    assert wire.succeeded(room)  # the harness has compared the bytes
    assert rank.core.rooms[room].resumes == 1
    wire.assert_baseline()
