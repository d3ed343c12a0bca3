"""Owns the match of a prompt's placeholders with its media, before anything is encoded.

A colocated sglang refuses a prompt with more placeholders than media, and ignores media without a placeholder. With
encoders it would learn of either only when the embeddings are there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import Modality

_FIELDS = {Modality.IMAGE: "image_data", Modality.VIDEO: "video_data", Modality.AUDIO: "audio_data"}
_OF_IMAGES = ("mm_hashes", "mm_content_hashes")  # one entry an image


def match_media(prompt: Any, processor: Any, decode: Callable[[Sequence[int]], str]) -> None:
    """Take media without a placeholder from ``prompt`` (sglang's GenerateReqInput of one prompt).

    ``processor``: sglang's multimodal processor. ``decode``: of its tokenizer. Raises ValueError, which sglang answers
    with 400, if a placeholder has no media. Does nothing if the processor does not say what a placeholder is.
    """
    tokens = getattr(processor, "mm_tokens", None)
    media = {modality: _listed(getattr(prompt, name)) for modality, name in _FIELDS.items()}
    if tokens is None or any(isinstance(item, dict) and "format" in item for items in media.values() for item in items):
        return  # what is preprocessed already has its own rules
    text = prompt.text if isinstance(prompt.text, str) else decode(prompt.input_ids or [])
    parts = re.split(tokens.get_combined_regex(), text)
    found = Counter(modality for part in parts if (modality := tokens.get_modality_of_token(part)) is not None)
    for modality, name in _FIELDS.items():
        items, placeholders = media[modality], found[modality]
        if placeholders > len(items):
            kind = modality.name.lower()
            raise ValueError(
                f"Prompt has {placeholders} {kind} placeholders but {len(items)} {kind} inputs were provided"
            )
        if placeholders < len(items):
            setattr(prompt, name, items[:placeholders] or None)
            for of_images in _OF_IMAGES if modality is Modality.IMAGE else ():
                hashes = getattr(prompt, of_images, None)
                if isinstance(hashes, list):
                    setattr(prompt, of_images, hashes[:placeholders] or None)


def _listed(data: Any) -> list[Any]:
    """``data`` as sglang lists it: items may be nested."""
    if data is None:
        return []
    if not isinstance(data, list | tuple):
        return [data]
    return [item for one in data for item in _listed(one)]
