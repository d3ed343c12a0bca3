"""Owns the check of a prompt's length once its media's tokens are known, which sglang makes before any transfer."""

from __future__ import annotations

from dataclasses import dataclass

# What sglang takes if a client says nothing: then it shortens the answer instead of refusing the request. A client that
# says just this number is answered alike.
_DEFAULT_NEW_TOKENS = 128


class PromptTooLong(ValueError):
    """The prompt, or the prompt and the answer, do not fit into the model's context."""


@dataclass(frozen=True)
class Context:
    """The model's context: ``tokens``, of which each request needs ``reserved`` beside its own."""

    tokens: int
    reserved: int = 0

    def check(self, prompt: int, new: int | None) -> None:
        """Raise PromptTooLong, in the words of sglang's tokenizer manager, unless a prompt of ``prompt`` tokens fits,
        with ``new`` tokens to come."""
        taken = prompt + self.reserved
        if taken >= self.tokens:
            raise PromptTooLong(
                f"The input ({taken} tokens) is longer than the model's context length ({self.tokens} tokens)."
            )
        if new is not None and new != _DEFAULT_NEW_TOKENS and taken + new > self.tokens:
            raise PromptTooLong(
                f"Requested token count exceeds the model's maximum context length of {self.tokens} tokens. You "
                f"requested a total of {taken + new} tokens: {taken} tokens from the input messages and {new} tokens "
                "for the completion. Please reduce the number of tokens in the input messages or the completion to fit "
                "within the limit."
            )
