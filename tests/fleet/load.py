"""Owns the load: client threads that ask one question after the other, and the questions that they ask."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence

import requests

from sglang_mm_conn.demo.chat import Answer, ask
from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.questions import Question
from tests.fleet.tally import NO_ANSWER, Reply, Tally

CLIENTS = 8
CLIENT_SECONDS = 120.0  # a client waits no longer for an answer
_MAX_TOKENS = 8  # enough to tell two images apart
_IMAGES = (1, 2, 0, 3, 1, 5, 0, 4, 2, 1)
_AFTER_AN_ERROR = 0.05  # seconds: a refusal comes at once

Right = Callable[[Question], Answer]


def questions(count: int = 30, seed: int = 1000) -> tuple[Question, ...]:
    """Text only, with one image and with up to five; no two have an image in common."""
    seeds = itertools.count(seed)
    made = []
    for number in range(count):
        images = tuple(Image(one, 84 + 28 * (one % 3), 84) for one in itertools.islice(seeds, _IMAGES[number % 10]))
        name = f"{len(images)} images" if images else "text only"
        made.append(Question(f"{name}, {number}", f"what is this, {number}?", images, max_tokens=_MAX_TOKENS))
    return tuple(made)


def one_image_each(count: int, seed: int = 5000) -> tuple[Question, ...]:
    return tuple(
        Question(f"image {number}", "what is this?", (Image(seed + number, 112, 84),), max_tokens=4)
        for number in range(count)
    )


def put(url: str, question: Question, right: Right, timeout: float = CLIENT_SECONDS) -> Reply:
    """Asks, and compares the answer."""
    began = time.monotonic()
    status, correct, error = NO_ANSWER, False, ""
    try:
        answer = ask(url, question, timeout=timeout)
        status, error = answer.status, answer.error
        correct = answer.ok and answer.same_as(right(question))
        if answer.ok and not correct:
            error = f"{answer.text!r} in place of {right(question).text!r}"
    except requests.RequestException as failure:
        error = f"{type(failure).__name__}: {failure}"
    return Reply(question.name, len(question.images), began, time.monotonic() - began, status, correct, error)


class Load:
    """As a context manager it begins on entry; on exit every client has its last answer.

    Attributes:
        replies: how each question went, in the order of the answers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        asked: Sequence[Question],
        right: Right,
        *,
        clients: int = CLIENTS,
        most: int | None = None,
        enter: Callable[[], None] | None = None,
    ) -> None:
        """The questions go to ``urls`` in turn; ``most`` of them in all (None: until the end); ``enter`` is called
        first in each client's thread."""
        self.replies: list[Reply] = []
        self._urls, self._asked, self._right = tuple(urls), tuple(asked), right
        self._most, self._enter = most, enter
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._client, name=f"client-{number}", daemon=True) for number in range(clients)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.join()

    def join(self) -> Tally:
        """Waits until all questions are answered."""
        for thread in self._threads:
            thread.join()
        return Tally.of(self.replies)

    def wait_for_more(self, answers: int, seconds: float = 120.0) -> None:
        """Until so many further questions ended, or so many seconds have passed."""
        wanted, deadline = len(self.replies) + answers, time.monotonic() + seconds
        while len(self.replies) < wanted and time.monotonic() < deadline:
            time.sleep(0.05)

    def tally(self, *, since: float = 0.0, until: float = float("inf"), images: bool | None = None) -> Tally:
        return Tally.of(list(self.replies), since=since, until=until, images=images)

    def _client(self) -> None:
        if self._enter is not None:
            self._enter()
        while not self._stop.is_set():
            number = next(self._numbers)
            if self._most is not None and number >= self._most:
                return
            reply = put(
                self._urls[number % len(self._urls)],
                # Another place in the list each time round, so that no question always goes to the same server.
                self._asked[(number + number // len(self._asked)) % len(self._asked)],
                self._right,
            )
            self.replies.append(reply)
            if reply.failed:
                time.sleep(_AFTER_AN_ERROR)


def play(urls: Sequence[str], asked: Sequence[Question], right: Right, *, count: int, clients: int = CLIENTS) -> Tally:
    """So many questions, and how they went."""
    load = Load(urls, asked, right, clients=clients, most=count)
    with load:
        return load.join()
