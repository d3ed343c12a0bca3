"""Owns the tokenizer of the tiny models: one token per byte, the special tokens of Qwen's models, a chat template."""

import json
from pathlib import Path

BYTES = 256
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<|audio_pad|>",
)
TOKEN_ID = {name: BYTES + index for index, name in enumerate(SPECIAL)}
VOCABULARY = 320  # bytes and special tokens, rounded up
# The names under which processors ask the tokenizer for them.
NAMED_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] in ('audio', 'audio_url') %}<|audio_start|><|audio_pad|><|audio_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def dump(path: Path, value: object) -> None:
    """Write ``value`` as JSON."""
    path.write_text(json.dumps(value, indent=1))


def byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_tokenizer(directory: Path) -> None:
    """One token per byte, no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: index for index, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    dump(directory / "vocab.json", vocabulary)
    (directory / "merges.txt").write_text("#version: 0.2\n")
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    dump(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2TokenizerFast",
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "additional_special_tokens": list(SPECIAL[1:]),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "extra_special_tokens": NAMED_TOKENS,
            "chat_template": CHAT_TEMPLATE,
            "added_tokens_decoder": {str(index): {"content": name, **flags} for name, index in TOKEN_ID.items()},
        },
    )
    dump(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
