"""Owns the match of a prompt's placeholders with its media, before anything is encoded.

A colocated Qwen refuses a prompt with more placeholders than media, and ignores media without a placeholder. With
encoders it would learn of either only when the embeddings are there. Other models have other rules: their prompts are
left as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import Modality

from sglang_mm_conn.sglang_plugin.media_items import listed

_FIELDS = {Modality.IMAGE: "image_data", Modality.VIDEO: "video_data", Modality.AUDIO: "audio_data"}
_OF_IMAGES = ("mm_hashes", "mm_content_hashes")  # one entry an image


def match_media(prompt: Any, processor: Any) -> None:
    """Take media without a placeholder from ``prompt`` (sglang's GenerateReqInput of one prompt), and write the others'
    placeholders as the processor wants them.

    ``processor``: sglang's multimodal processor. Raises ValueError, which sglang answers with 400, if a placeholder has
    no media, or the prompt is empty.
    """
    if not has_rules_of_qwen(processor):
        return
    tokens = processor.mm_tokens
    media = {modality: listed(getattr(prompt, name)) for modality, name in _FIELDS.items()}
    ids = prompt.input_ids
    # With images alone such a processor looks at nothing but the ids.
    looks_at_ids = _makes_artifacts(processor) and not media[Modality.VIDEO] and not media[Modality.AUDIO]
    if ids and looks_at_ids and list(ids).count(tokens.image_token_id) == len(media[Modality.IMAGE]):
        return
    text = prompt.text if isinstance(prompt.text, str) else _decoded(processor, ids or [])
    if not text:
        raise ValueError("The prompt is empty.")  # without its media it would end the server
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
    if isinstance(prompt.text, str):
        # "<image>", or a placeholder for each row, becomes the one that the processor takes. A colocated Qwen3-VL does
        # the same; a Qwen2-VL or Qwen2.5-VL ignores the image of the first and never answers the second.
        prompt.text = tokens.image_token_regex.sub(lambda _: tokens.image_token, prompt.text)


def has_rules_of_qwen(processor: Any) -> bool:
    """Whether ``processor`` is the one of the Qwen-VL and Qwen-Omni models."""
    return any(one.__name__ == "QwenVLImageProcessor" for one in type(processor).__mro__)


def _makes_artifacts(processor: Any) -> bool:
    """Whether sglang preprocesses each image by itself, and the prompt apart."""
    return bool(processor.uses_media_artifacts_without_cache or processor.mm_preprocess_cache.enabled)


def _decoded(processor: Any, ids: Sequence[int]) -> str:
    return str(processor._tokenizer.decode(ids))
