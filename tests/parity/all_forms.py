"""Owns the list of all forms, in the order of the table."""

from __future__ import annotations

from tests.parity.form import Form
from tests.parity.forms import bad, endpoints, engine, media, prompts, sampling, states

FORMS: list[Form] = [
    *endpoints.FORMS, *prompts.ALL, *media.ALL, *sampling.ALL, *states.ALL, *bad.ALL, *engine.ALL,
]  # fmt: skip
