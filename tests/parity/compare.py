"""Owns the comparison of one form on two deployments."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import requests

from tests.parity.client import Client
from tests.parity.deployments import Pair
from tests.parity.files import Files
from tests.parity.form import Form
from tests.parity.replies import Reply, difference, replies_in, unfit_cause
from tests.servers.observe import is_idle

_IDLE_SECONDS = 20.0


@dataclass(frozen=True)
class Compared:
    """One form on two deployments.

    Attributes:
        there, here: the statuses of the colocated server and of encoders and language server.
        difference: what is not the same; empty if all is.
        seconds: that both took.
    """

    form: Form
    there: str
    here: str
    difference: str
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether all is the same, or the form says why it is not."""
        return not self.difference or bool(self.form.differs)


def compare(form: Form, pair: Pair, files: Files) -> Compared:
    """Ask the colocated server, then the encoders and the language server."""
    began = time.monotonic()
    there = _asked(form, pair.colocated.url, pair, files)
    here = _asked(form, pair.group.language.url, pair, files)
    addresses = [server.url.removeprefix("http://") for server in pair.group.servers]
    found = difference(here, there) or unfit_cause(here, there, addresses) or _left_behind(pair)
    return Compared(form, statuses(there), statuses(here), found, time.monotonic() - began)


def _asked(form: Form, url: str, pair: Pair, files: Files) -> Any:
    client = Client(url, files, pair.model)
    try:
        client.post("/flush_cache", {})
        return form.ask(client)
    except (OSError, TimeoutError, ValueError, requests.RequestException) as error:
        return f"{type(error).__name__}: {error}"


def _left_behind(pair: Pair) -> str:
    """What a form leaves in the language server, or which server it has ended."""
    ended = [server.name for server in pair.servers if not server.alive]
    if ended:
        return f"{', '.join(ended)} ended"
    until = time.monotonic() + _IDLE_SECONDS
    while not is_idle(pair.group.language, but_for_views=True):
        if time.monotonic() > until:
            return f"the language server still holds something after {_IDLE_SECONDS:g} s"
        time.sleep(0.02)
    return ""


def statuses(found: Any) -> str:
    """The statuses of all replies in ``found``, each once."""
    if isinstance(found, str):
        return found.partition(":")[0]
    one_each = dict.fromkeys(str(reply.status) for reply in replies_in(found))
    numbers = (str(number) for number in _numbers(found))
    return ", ".join(dict.fromkeys([*one_each, *numbers])) or "-"


def _numbers(found: Any) -> list[int]:
    """Statuses that a form has taken out of their replies."""
    if isinstance(found, list | tuple):
        return [number for one in found for number in _numbers(one)]
    return [found] if isinstance(found, int) and not isinstance(found, bool) and not isinstance(found, Reply) else []
