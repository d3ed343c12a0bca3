"""An embedding that is larger than the pool: what does not fit follows by resume, as soon as blocks are free.

    python examples/resume.py

The pool has 4 blocks of 16 tokens, the embedding has 300. The encoder logs every resume.
"""

import logging
import time

import torch

from sglang_mm_conn.conn_multimodal import (
    EmbeddingArgs,
    EmbeddingBootstrapServer,
    EmbeddingManager,
    EmbeddingMode,
    EmbeddingReceiver,
    EmbeddingSender,
)
from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll

TOKENS, WIDTH = 300, 1024
BLOCKS, BLOCK_SIZE = 4, 16
HOST = "127.0.0.1"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = EmbeddingArgs(
        Settings(blocks=BLOCKS, block_size=BLOCK_SIZE, data_path="shm", checksum=True),
        dtype=torch.float32, row_bytes=WIDTH * 4, host=HOST, timeout=30.0, server=new_id(),
    )  # fmt: skip
    encoder = EmbeddingManager(args, EmbeddingMode.ENCODE)
    language = EmbeddingManager(args, EmbeddingMode.LANGUAGE)
    bootstrap = EmbeddingBootstrapServer(HOST, 0, encoder)
    try:
        room = new_room_base(args.server)
        receiver = EmbeddingReceiver(language, bootstrap.url, room)
        receiver.init()
        sender = EmbeddingSender(encoder, "", room)
        sender.init(TOKENS)
        embedding = torch.randn(TOKENS, WIDTH)
        sender.send(embedding)
        while receiver.poll() not in (Poll.Success, Poll.Failed):
            time.sleep(0.001)
        receiver.failure_exception()
        arrived, _ = receiver.take()
        receiver.clear()
        assert torch.equal(arrived, embedding)
        print(f"{TOKENS} tokens arrived through a pool that holds {BLOCKS * BLOCK_SIZE}")
    finally:
        language.teardown()
        encoder.teardown()
        bootstrap.close()


if __name__ == "__main__":
    main()
