"""The tokenizer's side of the plugin, as far as it can be tested without a server."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.sglang_plugin import dispatch
from sglang_mm_conn.sglang_plugin.dispatch import RoomDispatcher, split_room, with_room


@pytest.mark.parametrize("url", ["http://encoder:30000", "http://[::1]:1/path"])
def test_the_room_base_travels_in_the_url_of_the_encoder(url: str) -> None:
    room_base = new_room_base(new_id())
    assert split_room(with_room(url, room_base)) == (url, room_base)
    assert split_room(url) == (url, "")


def test_a_batch_of_prompts_is_refused() -> None:
    dispatcher = RoomDispatcher.__new__(RoomDispatcher)
    dispatcher._static, dispatcher.encode_urls = ["http://encoder:1"], []
    batch = SimpleNamespace(
        is_single=False, image_data=[["a"], ["b"]], video_data=None, audio_data=None, mm_content_hashes=None, rid=["r"]
    )
    with pytest.raises(ValueError, match="send one prompt with n=1"):
        dispatcher._send_encode_request(batch)
    dispatcher._static = []
    assert dispatcher._send_encode_request(batch) is None and not batch.need_wait_for_mm_inputs, "sglang encodes itself"


def test_the_tokenizers_side_does_not_import_the_schedulers() -> None:
    assert dispatch.__file__ is not None
    imported = [node.module for node in ast.walk(ast.parse(Path(dispatch.__file__).read_text()))
                if isinstance(node, ast.ImportFrom)]  # fmt: skip
    assert imported and not any(module and module.endswith("scheduler") for module in imported)
