"""Owns the prompts whose embeddings a scheduler process waits for. Usually one request has a prompt.

With parallel sampling (``n`` above 1) several have: sglang first sends a copy that generates nothing, so that the
prompt is in the prefix cache, and then ``n`` copies, each with an id of its own. The embeddings are encoded and sent
once, and kept until the last copy has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeAlias

import torch
from sglang.srt.disaggregation.encoder.receiver import EmbeddingData, MultiModalEmbeddingData
from sglang.srt.managers.schedule_batch import Modality

from sglang_mm_conn.conn_multimodal import EmbeddingManager, EmbeddingReceiver
from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched
from sglang_mm_conn.core.dispatch.reports import Report
from sglang_mm_conn.core.dispatch.waiting import WaitingParts
from sglang_mm_conn.core.errors import ConnError

# So long a rank that cannot ask the dispatcher waits for its decision about a room that has failed on this rank.
_PATIENCE_SECONDS = 10.0
# Copies of a prompt that never come keep its embeddings for so long. The tokenizer process says so if it knows.
_KEEP_SECONDS = 3600.0

Joined: TypeAlias = tuple[MultiModalEmbeddingData, dict[Modality, torch.Tensor]]


class RequestGivenUp(ConnError):
    """The dispatcher has given a request up. ``reason`` and ``code`` are for the client."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


class Prompt:
    """One prompt on one rank."""

    def __init__(
        self,
        parts: WaitingParts[EmbeddingReceiver],
        join: Callable[[list[EmbeddingReceiver]], Future[Joined]],
        requests: int,
        now: float,
    ) -> None:
        """``join``: joins the parts, on another thread. ``requests``: how many will use it."""
        self.keep_until = now + _KEEP_SECONDS
        self._parts = parts
        self._join = join
        self._to_come, self._users = requests, 0
        self._joined: Future[Joined] | None = None
        self._failure: Exception | None = None

    @property
    def is_over(self) -> bool:
        """Whether no request uses it, and none will."""
        return self._users == 0 and self._to_come <= 0

    def use(self) -> None:
        """A request begins to use it."""
        self._to_come -= 1
        self._users += 1

    def leave(self) -> None:
        """A request needs it no more."""
        self._users -= 1

    def poll(self, now: float) -> Joined | None:
        """The embeddings; None: not all are there. Raises what has failed it."""
        if self._failure is not None:
            raise self._failure
        if self._joined is None:
            if not self._parts.arrived(now):
                return None
            self._joined = self._join([*self._parts.rooms])
        return self._joined.result() if self._joined.done() else None

    def look(self, now: float) -> None:
        """Ask the dispatcher about rooms that have failed, and join the parts, though no request uses it yet."""
        if self._users == 0 and self._failure is None:
            try:
                self.poll(now)
            except Exception as error:
                self._failure = error

    def redispatch(self, news: Redispatched) -> None:
        """A part comes from another encoder, in another room."""
        try:
            if self._parts.redispatch(news):
                self._joined = None
        except Exception as error:  # fails the requests, not the scheduler
            self._failure = error

    def fail(self, failure: Exception) -> None:
        """Fail every request that uses it, or will."""
        self._failure = self._failure or failure

    def expect_no_more(self) -> None:
        """No further request will use it."""
        self._to_come = 0

    def clear(self) -> None:
        """Give up and forget its rooms."""
        self._parts.clear()
        self._joined = None  # an exception in it would keep the rows alive


class Prompts:
    """The prompts of one rank, by room base."""

    def __init__(self, manager: EmbeddingManager, model_type: str, report: Callable[[Report], None] | None) -> None:
        """``model_type``: sglang's name of the model. ``report``: tells the dispatchers; None: this rank does not."""
        self._manager = manager
        self._model_type = model_type
        self._report = report
        self._prompts: dict[str, Prompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def use(self, room_base: str, label: str, rooms: Callable[[], Sequence[tuple[str, str]]]) -> Prompt:
        """A request begins to use its prompt. ``rooms`` is called if it is the first one. Raises ConnError."""
        prompt = self._prompts.get(room_base) or self.expect(room_base, label, rooms(), requests=1)
        prompt.use()
        return prompt

    def leave(self, room_base: str) -> None:
        """A request needs its prompt no more."""
        prompt = self._prompts[room_base]
        prompt.leave()
        self._drop_if_over(room_base, prompt)

    def expect_no_more(self, room_base: str) -> None:
        """No further request will use the prompt."""
        prompt = self._prompts.get(room_base)
        if prompt is not None:
            prompt.expect_no_more()
            self._drop_if_over(room_base, prompt)

    def _drop_if_over(self, room_base: str, prompt: Prompt) -> None:
        if prompt.is_over:
            del self._prompts[room_base]
            prompt.clear()

    def expect(self, room_base: str, label: str, rooms: Sequence[tuple[str, str]], requests: int) -> Prompt:
        """Wait for ``rooms``, (encoder URL, room) in the order of the parts. Raises ConnError.

        ``label``: of the prompt, in logs. ``requests``: how many will use it.
        """
        args, now = self._manager.args, time.monotonic()
        parts: WaitingParts[EmbeddingReceiver] = WaitingParts(
            partial(self._expect, label, now + args.timeout), self._report,
            args.settings.dispatch_wait + _PATIENCE_SECONDS,
        )  # fmt: skip
        prompt = Prompt(parts, partial(self._join, label), requests, now)
        try:
            for url, room in rooms:
                parts.expect(url, room)
        except BaseException:
            prompt.clear()
            raise
        self._prompts[room_base] = prompt
        return prompt

    def heed(self, news: Redispatched | GiveUp) -> None:
        """What the dispatcher says of a prompt. Nothing, if it is over."""
        prompt = self._prompts.get(news.room_base)
        if prompt is None:
            return
        if isinstance(news, Redispatched):
            prompt.redispatch(news)
        else:
            prompt.fail(RequestGivenUp(news.reason, news.code))

    def sweep(self, now: float) -> None:
        """Look at the prompts that no request uses yet. Wait no longer for requests that have not come for long."""
        for room_base, prompt in list(self._prompts.items()):
            prompt.look(now)
            if now > prompt.keep_until:
                self.expect_no_more(room_base)

    def _expect(self, label: str, deadline: float, url: str, room: str) -> EmbeddingReceiver:
        receiver = EmbeddingReceiver(self._manager, url, room)
        receiver.init(label=label, timeout=max(0.0, deadline - time.monotonic()))
        return receiver

    def _join(self, label: str, receivers: list[EmbeddingReceiver]) -> Future[Joined]:
        return self._manager.language_endpoint.submit(partial(join_parts, label, receivers, self._model_type))


def join_parts(label: str, receivers: Sequence[EmbeddingReceiver], model_type: str) -> Joined:
    """sglang's record of the parts, and one tensor per modality. Copies: not for the scheduler's tick."""
    data: MultiModalEmbeddingData | None = None
    tensors: dict[Modality, list[torch.Tensor]] = {}
    for number, receiver in enumerate(receivers):
        embedding, metadata = receiver.take()
        part = _embedding_data(label, embedding, metadata)
        if part.part_idx != number or part.num_parts != len(receivers):
            raise ConnError(f"part {part.part_idx} of {part.num_parts} arrived as part {number} of {len(receivers)}")
        if data is None:
            data = MultiModalEmbeddingData.from_embedding_data(part, model_type=model_type)
        else:
            data.add(part)
        tensors.setdefault(part.modality, []).append(embedding)
    assert data is not None
    return data, {modality: parts[0] if len(parts) == 1 else torch.cat(parts) for modality, parts in tensors.items()}


def _embedding_data(label: str, embedding: torch.Tensor, metadata: dict[str, Any]) -> EmbeddingData:
    """sglang's record of one part; the inverse of ``encoder.metadata_of``."""
    values = dict(metadata)
    return EmbeddingData(
        label,
        values.pop("num_parts"),
        values.pop("part_idx"),
        values.pop("grid_dim"),
        Modality[values.pop("modality")],
        embedding,
        **values,
    )
