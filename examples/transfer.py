"""One embedding from an encoder's end to a language server's, both in this process, over shared memory.

    python examples/transfer.py

In sglang the plugin does all of this: the two managers live in two servers, and the room's name travels in `/encode`.
"""

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

TOKENS, WIDTH = 200, 1024
HOST = "127.0.0.1"


def main() -> None:
    args = EmbeddingArgs(
        Settings(blocks=64, block_size=16, data_path="shm"),
        dtype=torch.float32, row_bytes=WIDTH * 4, host=HOST, timeout=30.0, server=new_id(),
    )  # fmt: skip
    encoder = EmbeddingManager(args, EmbeddingMode.ENCODE)
    language = EmbeddingManager(args, EmbeddingMode.LANGUAGE)
    # Where a language server asks for the encoder's control port.
    bootstrap = EmbeddingBootstrapServer(HOST, 0, encoder)
    try:
        room = new_room_base(args.server)
        receiver = EmbeddingReceiver(language, bootstrap.url, room)
        receiver.init()

        sender = EmbeddingSender(encoder, "", room)
        sender.init(TOKENS)  # as soon as the size is known: blocks are offered while the model runs
        embedding = torch.randn(TOKENS, WIDTH)
        sender.send(embedding, {"modality": "image"})

        while receiver.poll() not in (Poll.Success, Poll.Failed):
            time.sleep(0.001)
        receiver.failure_exception()  # raises where the room failed
        arrived, metadata = receiver.take()
        receiver.clear()
        assert torch.equal(arrived, embedding)
        print(f"{tuple(arrived.shape)} arrived, {metadata}")
    finally:
        language.teardown()
        encoder.teardown()
        bootstrap.close()


if __name__ == "__main__":
    main()
