"""Owns the token ids of a text in the tiny tokenizer, which has one per byte."""

from __future__ import annotations

import re

from sglang_mm_conn.demo.tiny_tokenizer import TOKEN_ID, byte_alphabet


def ids_of(text: str) -> list[int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet, letters = byte_alphabet(), bytes_to_unicode()
    pieces = re.split(f"({'|'.join(map(re.escape, TOKEN_ID))})", text)
    return [
        number
        for piece in pieces
        for number in (
            [TOKEN_ID[piece]] if piece in TOKEN_ID else [alphabet.index(letters[byte]) for byte in piece.encode()]
        )
    ]
