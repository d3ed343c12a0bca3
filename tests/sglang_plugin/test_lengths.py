"""The length of a prompt is checked as sglang checks it."""

from __future__ import annotations

import pytest

from sglang_mm_conn.sglang_plugin.lengths import Context, PromptTooLong


@pytest.mark.parametrize(("prompt", "new", "told"), [
    (100, 1, "The input"), (90, 20, "Requested token count"), (80, 20, ""), (80, None, ""), (80, 128, ""), (99, 1, ""),
])  # fmt: skip
def test_a_prompt_that_does_not_fit_is_refused(prompt: int, new: int | None, told: str) -> None:
    if not told:
        Context(100).check(prompt, new)
        return
    with pytest.raises(PromptTooLong, match=told):
        Context(100).check(prompt, new)


def test_what_speculative_decoding_needs_counts() -> None:
    Context(100).check(90, 5)
    with pytest.raises(PromptTooLong):
        Context(100, reserved=8).check(90, 5)
